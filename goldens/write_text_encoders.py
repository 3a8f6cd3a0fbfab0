"""Writes golden files of the text encoders of SD3 and Wan and of their tokenizers.

Usage: write_text_encoders.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

Everything lies below `text_encoders`. `clip_l`, `clip_g`, `t5` and `umt5` are tiny random models
as transformers saves them, each with an `example.safetensors` of inputs and outputs. The
`tokenizer*` folders are tiny tokenizers, trained here, in the layouts that are met in the wild:
CLIP's vocabulary and merges with padding by the end or by "!", a SentencePiece model, and both as
`tokenizer.json`. `ids.json` holds awkward texts and the ids that transformers gives them.
`sd3.safetensors` holds what diffusers' pipeline makes of prompts with all of this.
"""

import contextlib
import io
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import diffusers
import sentencepiece
import tokenizers
import torch
import transformers
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CAPTIONS = [
    f"{number} photo{'s' * (number > 1)} of a {color} {animal}'s house, {place}"
    for number, (color, animal, place) in enumerate(
        itertools.product(
            ["red", "green", "dark blue", "très coloré"],
            ["cat", "running dog", "hummingbird", "señor fox"],
            ["in the snow.", "on a table!", "under the bright moon", "by night (oil painting)"],
        )
    )
]
TEXTS = [
    "",
    " ",
    "a red cat",
    "  A   RED\tcat \n in the snow ",
    "Crème brûlée, décomposée: cafe\u0301 nin\u0303o Ångström",
    "STRAẞE İstanbul ΣΊΣΥΦΟΣ",
    "🦊 a fox👩‍🚒🏽 emoji🇫🇷!",
    "日本語の文 和 한국어 العربية",
    "1234567890 3.14 ½ ² Ⅷ x2",
    "it's they're I'VE don't rock'n'roll ''s 'S'T",
    "!!! wow!really !",
    'semi;colon--dash\u2014em... (par[en]{th}) "quotes" \\ / # $%^&*@~`|',
    "non\u00a0breaking\u3000wide\u200bzero\u00adsoft ﬁ ﬂ \uff21\uff11\uff01 …",
    "under_score CamelCase",
    f"a {EOS} b{BOS}c <|ENDOFTEXT|> <|endoftext| >",
    "</s> <pad> a<extra_id_0>b <extra_id_99> <unk> <extra_id_100>",
    "\u2581lower one eighth\u2581block \x00\x07control\x7f",
    "supercalifragilisticexpialidocious" * 3,
    ", ".join(f"{number} running dogs by the bright moon" for number in range(30)),
]
PROMPTS = ["a red cat in the snow!", "the hummingbird's house, by night (oil painting)"]
CLIP_TOKENS, T5_TOKENS = 77, 40
LENGTHS = {"tokenizer": CLIP_TOKENS, "tokenizer_2": CLIP_TOKENS, "tokenizer_3": T5_TOKENS}

CLIP = {"vocab_size": 580, "max_position_embeddings": CLIP_TOKENS}
MODELS = {
    "clip_l": (
        CLIPTextModelWithProjection,
        CLIPTextConfig(
            **CLIP,
            hidden_size=16,
            intermediate_size=40,
            projection_dim=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=2,
        ),
    ),
    "clip_g": (
        CLIPTextModelWithProjection,
        CLIPTextConfig(
            **CLIP,
            hidden_size=24,
            intermediate_size=32,
            projection_dim=20,
            num_hidden_layers=2,
            num_attention_heads=3,
            hidden_act="gelu",
            layer_norm_eps=1e-3,
            bos_token_id=578,
            eos_token_id=579,
        ),
    ),
    "t5": (
        T5EncoderModel,
        T5Config(
            vocab_size=288,
            d_model=44,
            d_kv=10,
            d_ff=36,
            num_layers=3,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "umt5": (
        UMT5EncoderModel,
        UMT5Config(
            vocab_size=60,
            d_model=20,
            d_kv=8,
            d_ff=36,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=50,
            layer_norm_epsilon=1e-3,
        ),
    ),
}


@torch.no_grad()
def draw(name: str):
    """Returns a random model in which no parameter is zero or one and every term shows."""
    kind, config = MODELS[name]
    generator = torch.Generator().manual_seed(sorted(MODELS).index(name))
    model = kind(config).eval()
    for key, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            tensor.copy_(0.3 * noise + (1.0 if key.endswith("norm.weight") else 0.0))
        elif "relative_attention_bias" in key or "embed" in key or "shared" in key:
            tensor.copy_(noise)
        elif key.endswith("SelfAttention.q.weight"):
            tensor.copy_(noise / (tensor.shape[1] * config.d_kv) ** 0.5)  # scores are not scaled
        else:
            tensor.copy_(noise / tensor.shape[1] ** 0.5)
    return model


@torch.no_grad()
def run_clip(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what SD3 takes of a CLIP model, and its last state."""
    output = model(input_ids=tokens, output_hidden_states=True)
    return {
        "penultimate": output.hidden_states[-2].float(),
        "last": output.last_hidden_state.float(),
        "pooled": output.text_embeds.float(),
    }


def clip_tokens(model) -> torch.Tensor:
    """Ids in which the place of the end depends on how it is looked for."""
    generator = torch.Generator().manual_seed(10)
    config = model.config
    highest = config.vocab_size - 1
    tokens = torch.randint(3, highest - 1, (3, 21), generator=generator)
    end = highest if config.eos_token_id == 2 else config.eos_token_id
    tokens[0, 9:] = end
    tokens[1, 20] = end
    tokens[2, [5, 12]] = end
    tokens[2, 15:] = 0
    if config.eos_token_id == 2:
        tokens[:, 3] = 2  # does not end a text
    return tokens


def write_clip(name: str, folder: Path) -> None:
    """Writes a CLIP model and examples, also in bfloat16 and with the other kind of end."""
    model = draw(name)
    model.save_pretrained(folder)
    tokens = clip_tokens(model)
    example = {"tokens": tokens.int()} | run_clip(model, tokens)
    other = 7  # not the highest id of a text
    model.text_model.eos_token_id, kept = other, model.text_model.eos_token_id
    tokens[:, 8] = other
    example["other_tokens"] = tokens.int()
    example["other_pooled"] = run_clip(model, tokens)["pooled"]
    model.text_model.eos_token_id = kept
    model.bfloat16()
    half = run_clip(model, example["tokens"].long())
    example |= {f"{key}_bfloat16": value for key, value in half.items()}
    save(folder / "example.safetensors", example, {"other_eos_token_id": other})


@torch.no_grad()
def write_t5(name: str, folder: Path) -> None:
    """Writes a T5 model and examples with and without a mask, long enough for far buckets."""
    model = draw(name)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, model.config.vocab_size, (2, 150), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 137:] = 0
    tokens[1, 137:] = 0
    short = tokens[:, :40]
    example = {
        "tokens": tokens.int(),
        "mask": mask.bool(),
        "output": model(input_ids=tokens).last_hidden_state,
        "output_masked": model(input_ids=tokens, attention_mask=mask).last_hidden_state,
        "output_short": model(input_ids=short).last_hidden_state,
    }
    model.bfloat16()
    example["output_bfloat16"] = model(input_ids=short).last_hidden_state.float()
    save(folder / "example.safetensors", example, {})


def byte_letters() -> list[str]:
    """The letters that stand for bytes, in the order of CLIP's vocabulary: printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = len(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(hidden)]


def write_clip_tokenizers(folder: Path) -> None:
    """Trains byte-level pairs with CLIP's settings; writes them as SD3's folders are."""
    blank = CLIPTokenizer().backend_tokenizer
    trained = tokenizers.Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=400, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    trained.train_from_iterator(CAPTIONS, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = byte_letters()
    pieces = letters + [letter + "</w>" for letter in letters]
    pieces += ["".join(pair) for pair in merges]
    pieces = [*itertools.islice(dict.fromkeys(pieces), CLIP["vocab_size"] - 2), BOS, EOS]
    merges = [pair for pair in merges if "".join(pair) in pieces]
    assert len(pieces) == CLIP["vocab_size"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    for name, padding in (("tokenizer", EOS), ("tokenizer_2", "!")):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (target / "merges.txt").write_text("\n".join(lines) + "\n")
        added = {
            str(vocabulary[token]): {
                "content": token,
                "lstrip": False,
                "normalized": token != "!",
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in dict.fromkeys([padding, BOS, EOS])
        }
        settings = {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "bos_token": BOS,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": EOS,
            "errors": "replace",
            "model_max_length": CLIP_TOKENS,
            "pad_token": padding,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": EOS,
        }
        (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # An older layout: no list of added tokens, and padding in a file of its own.
    target = folder / "tokenizer_old"
    shutil.copytree(folder / "tokenizer", target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    special = {"bos_token": added[str(vocabulary[BOS])], "eos_token": added[str(vocabulary[EOS])]}
    special |= {"pad_token": "!", "unk_token": EOS}
    (target / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def write_t5_tokenizer(folder: Path) -> None:
    """Trains a SentencePiece model with T5's ids and a few replacements of characters."""
    pairs = {"\u00a0": " ", "\u3000": " ", "\t": " ", "\n": " ", "\u200b": "", "\u00ad": ""}
    pairs |= {"…": "...", "ﬁ": "fi", "ﬂ": "fl", "½": "1\u20442", "²": "2", "Ⅷ": "VIII"}
    pairs |= {"e\u0301": "é", "n\u0303": "ñ"}
    pairs |= {chr(0xFF01 + number): chr(0x21 + number) for number in range(94)}
    codes = lambda text: " ".join(f"{ord(letter):X}" for letter in text)
    rules = "".join(f"{codes(old)}\t{codes(new)}\n" for old, new in pairs.items())
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    # The path of the rules becomes part of the model, so it must not depend on the machine.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path("rules.tsv").write_text(rules)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS),
            model_writer=model,
            model_type="unigram",
            vocab_size=188,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_tsv="rules.tsv",
            num_threads=1,
            minloglevel=2,
        )
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100}
    settings |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_ids(folder: Path) -> None:
    """Writes the same tokenizers as `tokenizer.json`, and the ids of all."""
    ids = {"texts": TEXTS, "ids": {}}
    names = ("tokenizer", "tokenizer_2", "tokenizer_old")
    kinds = dict.fromkeys(names, (CLIPTokenizer, CLIP_TOKENS)) | {"tokenizer_3": (T5Tokenizer, 64)}
    for name, (kind, length) in kinds.items():
        tokenizer = kind.from_pretrained(folder / name)
        rows = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True)
        ids["ids"][name] = rows["input_ids"]
        if name in ("tokenizer_2", "tokenizer_3"):
            target = folder / f"{name}_json"
            tokenizer.save_pretrained(target)
            again = kind.from_pretrained(target)
            rows = again(TEXTS, padding="max_length", max_length=length, truncation=True)
            ids["ids"][target.name] = rows["input_ids"]
    (folder / "ids.json").write_text(json.dumps(ids) + "\n")


def make_pipeline(folder: Path, with_t5: bool) -> StableDiffusion3Pipeline:
    """The pipeline of diffusers, as far as prompts go; its transformer only says its sizes."""
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=1,
        joint_attention_dim=44,
        caption_projection_dim=4,
        pooled_projection_dim=32,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModelWithProjection.from_pretrained(folder / "clip_l"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "clip_g"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_3=T5EncoderModel.from_pretrained(folder / "t5") if with_t5 else None,
        tokenizer_3=T5Tokenizer.from_pretrained(folder / "tokenizer_3"),
    )


@torch.no_grad()
def write_sd3(folder: Path) -> None:
    """Writes context and pooled vector of prompts."""
    options = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    options |= {"max_sequence_length": T5_TOKENS, "device": torch.device("cpu")}
    tensors = {}
    for with_t5, end in ((True, ""), (False, "_without_t5")):
        pipeline = make_pipeline(folder, with_t5)
        context, _, pooled, _ = pipeline.encode_prompt(PROMPTS, **options)
        tensors |= {f"context{end}": context, f"pooled{end}": pooled}
    for name, length in LENGTHS.items():
        encode = getattr(pipeline, name)
        rows = encode(PROMPTS, padding="max_length", max_length=length, truncation=True)
        tensors[name] = torch.tensor(rows["input_ids"], dtype=torch.int32)
    save(folder / "sd3.safetensors", tensors, {"prompts": PROMPTS})


def save(path: Path, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Writes one safetensors file; what it says about itself is one entry, whose order is fixed."""
    about |= {module.__name__: module.__version__ for module in (diffusers, torch, transformers)}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, path, {"about": json.dumps(about)})


if __name__ == "__main__":
    target_folder = Path(sys.argv[1]) / "text_encoders"
    shutil.rmtree(target_folder, ignore_errors=True)
    for model_name in MODELS:
        write = write_clip if model_name.startswith("clip") else write_t5
        write(model_name, target_folder / model_name)
    write_clip_tokenizers(target_folder)
    write_t5_tokenizer(target_folder / "tokenizer_3")
    write_ids(target_folder)
    write_sd3(target_folder)
    for file in sorted(target_folder.rglob("*.*")):
        file.chmod(0o644)
        print(f"{file}: {file.stat().st_size} bytes")
