"""Writes golden files of the tokenizers of SDAR, which is Qwen2's, and LLaDA.

Usage: write_text_tokenizers.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

Everything lies below `text_tokenizers`: one tiny byte-level vocabulary, trained here, in the
layouts that are met in the wild. `qwen` has vocabulary, merges and `added_tokens_decoder`, as Qwen2
and SDAR are published; `qwen_old` lists added tokens as older folders do; `qwen_json` is what
transformers saves; `llada` is a `tokenizer.json` of another kind, with the special tokens of LLaDA.
`ids.json` holds awkward texts, the ids that transformers gives them and the texts that it makes of
ids, with and without special tokens.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast

MERGES = 200
SENTENCES = [
    "The quick brown fox doesn't jump over the lazy dog, and it's not that the others won't.",
    "If x + y = 12 and x = 5, then y = 12 - 5 = 7. So the answer is \\boxed{7}.\n\n",
    "def answer(question):\n    return [token for token in question if token != mask]\n",
    "Größe, garçon, naïve, señor, Ångström, Źdźbło; привет, мир! γεια!",
    "你好\uff0c世界。 こんにちは世界。 안녕하세요 세계. नमस्ते",
    "<think>\nFirst we add, then we take the other from the answer.\n</think>\n\n",
]
# Texts whose white space, digits or case are at odds with how a text is split.
TEXTS = [
    "",
    " ",
    "\n",
    "\r\n\r\n  \t x  \n y\u00a0z\u3000 ",
    "The answer is 7.",
    "  the   answer\tis\n\n\n   not    that  ",
    "1234567890 3.14 1,000 ½ ² Ⅷ x2 ١٢٣",
    "it's they'll I'VE DON'T we'd y'all'd've rock'n'roll 'S ''s '\u017f 's'",
    "Größe caf\u00e9 cafe\u0301 A\u030angstro\u0308m \u212b \ufb01 \uff21\uff11 \u1e9e",
    "🦊 a fox👩‍🚒🏽 emoji🇫🇷! 1️⃣",
    "你好\uff0c世界。日本語の文 한국어 العربية नमस्ते",
    "!!!??? -- ... (\\frac{a}{b}) $x^2$ #! /usr/bin `code` | ~ @ %",
    "def f(x):\n    return x**2  # two\n\n\n\tpass\r\n",
    "a\u200bb\u00adc\u2028d\x00e\x1b[0m\x7f",
    "under_score CamelCase snake-case",
    "<|im_start|>user\nWhat is 5 + 7?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>assistant\n<think>\n\n</think>\n\n12<|im_end|><|endoftext|>",
    "a<|im_end|> b <|IM_END|> <|im_end| > <|im_end|><|im_end|>",
    "<|MASK|>the<|MASK|> <think>x</think> <THINK>",
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "aaaaaaaaaaaaaaaaaaaaaaaa" * 4,
]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|MASK|>"]
SHOWN = {"<think>", "</think>"}  # added, but not special
LLADA = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# How another tokenizer may split: digits by threes, no normal form.
OTHER_SPLIT = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


def train() -> Tokenizer:
    """Returns a byte-level vocabulary of all bytes and some merges."""
    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=256 + MERGES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend


def write_json(path: Path, values: object) -> None:
    """Writes JSON in one line, or one line an entry for small objects."""
    path.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


def write_qwen(folder: Path, backend: Tokenizer) -> None:
    """Writes the three layouts of Qwen2's tokenizer."""
    first = backend.get_vocab_size()
    numbers = {token: first + place for place, token in enumerate(QWEN)}
    decoder = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in SHOWN,
        }
        for token, number in numbers.items()
    }
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": "<|MASK|>"}
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    for name in ("qwen", "qwen_old"):
        (folder / name).mkdir(parents=True)
        backend.model.save(str(folder / name))
    write_json(
        folder / "qwen/tokenizer_config.json",
        settings | roles | {"added_tokens_decoder": decoder},
    )
    old = folder / "qwen_old"
    special = {"additional_special_tokens": settings.pop("additional_special_tokens")}
    write_json(old / "tokenizer_config.json", settings)
    write_json(old / "special_tokens_map.json", special | roles)
    write_json(old / "added_tokens.json", numbers)
    Qwen2TokenizerFast.from_pretrained(folder / "qwen").save_pretrained(folder / "qwen_json")
    compact(folder / "qwen_json/tokenizer.json")


def write_llada(folder: Path, backend: Tokenizer) -> None:
    """Writes a `tokenizer.json` with LLaDA's special tokens that splits in its own way."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(OTHER_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(LLADA)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder / "llada")
    compact(folder / "llada/tokenizer.json")


def compact(path: Path) -> None:
    """Rewrites JSON without the white space."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")))


def answers(folder: Path, rows: list[list[int]]) -> dict:
    """Returns what transformers makes of all texts, and of rows of ids."""
    kind = PreTrainedTokenizerFast if folder.name == "llada" else Qwen2TokenizerFast
    tokenizer = kind.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    both = {
        name: [tokenizer.decode(row, skip_special_tokens=skip) for row in ids + rows]
        for name, skip in (("skipped", True), ("shown", False))
    }
    special = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return {"ids": ids, **both, "special": special, "size": len(tokenizer)}


if __name__ == "__main__":
    target_folder = Path(sys.argv[1]) / "text_tokenizers"
    shutil.rmtree(target_folder, ignore_errors=True)
    target_folder.mkdir(parents=True)
    trained = train()
    write_qwen(target_folder, trained)
    write_llada(target_folder, trained)
    generator = random.Random(0)
    # Any ids: bytes that are no UTF-8, special tokens anywhere, and some that no token has.
    most = trained.get_vocab_size() + len(QWEN) + 4
    random_rows = [[generator.randrange(most) for _ in range(12)] for _ in range(12)]
    layouts = sorted(path.name for path in target_folder.iterdir())
    about = {module.__name__: module.__version__ for module in (tokenizers, transformers)}
    golden = {"about": about, "texts": TEXTS, "rows": random_rows}
    golden |= {name: answers(target_folder / name, random_rows) for name in layouts}
    write_json(target_folder / "ids.json", golden)
    for file in sorted(target_folder.rglob("*.*")):
        file.chmod(0o644)
        print(f"{file}: {file.stat().st_size} bytes")
