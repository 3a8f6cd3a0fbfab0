"""Fine-tuning on text: rows from a file, and a released model's folder through the whole run."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models

from jaxgen.checkpoints import save_diffusion_lm_folder
from jaxgen.models import DiffusionLM, DiffusionLMConfig
from jaxgen.pipelines import TextToText
from jaxgen.pipelines.chat import CHATML, ChatFormat
from jaxgen.tokenizers import TextTokenizer
from train.decoding_sweep import Sweep, carry_out
from train.diffusion_lm import train
from train.diffusion_lm_config import Config
from train.metrics import read_rows as read_metrics
from train.text_data import read_rows

FOLDER = Path(__file__).parent.parent / "goldens" / "text_tokenizers" / "qwen"
TEXTS = [("2+2?", "4"), ("Name a color.", "red and blue"), ("Hi", "Hello!\nHow are you?")]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.from_folder(FOLDER)


def write(path, texts=TEXTS):
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in texts]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def read(path, tokenizer, **changes):
    options = {"max_tokens": 200, "block_length": 8, "chat": CHATML}
    return read_rows(path, tokenizer, **(options | changes))


@pytest.mark.parametrize("chat", [CHATML, None])
def test_rows_hold_prompts_answers_and_their_end(tmp_path, tokenizer, chat):
    rows, dropped = read(write(tmp_path / "data.jsonl"), tokenizer, chat=chat)
    assert dropped == 0
    end = tokenizer.token_id("<|im_end|>")
    for (prompt, answer), tokens, maskable, length in zip(
        TEXTS, rows.tokens, rows.maskable, rows.lengths, strict=True
    ):
        if chat is not None:
            prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        first = len(tokenizer.encode(prompt))
        said = [*tokenizer.encode(answer), end]
        assert tokenizer.decode(tokens[:first], skip_special=False) == prompt
        assert tokens[first : first + len(said)].tolist() == said
        # Padding fills the last block, and that is learned; what comes after it is not.
        assert (tokens[first + len(said) :] == tokenizer.pad_id).all()
        assert length == -(-(first + len(said)) // 8) * 8
        np.testing.assert_array_equal(np.flatnonzero(maskable), np.arange(first, length))


def test_long_texts_are_dropped_and_counted(tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl", [*TEXTS, ("long", "word " * 100)])
    rows, dropped = read(path, tokenizer, max_tokens=64)
    assert (len(rows), dropped) == (3, 1)
    assert rows.tokens.shape[1] <= 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"prompt": "a"}', "must be an object with the strings prompt and answer"),
        ('{"prompt": "a", "answer": 3}', "must be an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"prompt": "caf\u00e9", "answer": "b"}', "not valid JSON: 'utf-8' codec"),
        ('{"prompt": "a", "answer": "\\ud83d"}', "text must be Unicode, got half of a surrogate"),
        ('{"prompt": "\\ud83d", "answer": "b"}', "text must be Unicode, got half of a surrogate"),
        (f'{{"prompt": "a", "answer": {"1" * 5000}}}', "not valid JSON: Exceeds the limit"),
        ('{"prompt": "a", "answer": "b", "answer": "c"}', "key 'answer' occurs twice"),
        ('{"prompt": "a", "answer": "<|MASK|>"}', "must not spell out the mask token, 461"),
        ('{"prompt": "<|MASK|>", "answer": "b"}', "must not spell out the mask token, 461"),
        ('{"prompt": "a", "answer": "b<|im_end|>c"}', "a token that ends its answer"),
        ('{"prompt": "a", "answer": "b<|im_end|>"}', "a token that ends its answer"),
    ],
)
def test_refuses_lines_by_their_number(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "data.jsonl", TEXTS[:1])
    path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2.* {message}"):
        read(path, tokenizer)


def test_special_tokens_that_an_answer_must_not_have(tmp_path, tokenizer):
    refused = lambda text: pytest.raises(ValueError, match=f"line 1 must not spell out {text}")
    think, end = tokenizer.token_id("<think>"), "<|im_end|>"
    path = write(tmp_path / "data.jsonl", [(f"a{end}", "<think>b")])
    assert len(read(path, tokenizer)[0]) == 1
    with refused(f"the mask token, {think}"):
        read(path, tokenizer, mask_id=think)
    for special in (tokenizer.pad_id, tokenizer.token_id(end)):
        with pytest.raises(ValueError, match=f"must not be the mask token, {special}"):
            read(path, tokenizer, mask_id=special)
    # What ends any text ends an answer, whatever the format.
    other = dataclasses.replace(tokenizer, eos_id=think)
    for chat in (CHATML, None):
        with refused("a token that ends its answer"):
            read(path, other, chat=chat)


def test_a_chat_format_needs_its_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl")
    odd = ChatFormat("<|user|>", "\n", "<|im_end|>")
    with pytest.raises(ValueError, match=r"of the chat format, it does not of '<\|user\|>'"):
        read(path, tokenizer, chat=odd)
    split = TextTokenizer(Tokenizer(models.BPE({"<|im_start|>": 0, "<|im_end|>": 1}, [])))
    with pytest.raises(ValueError, match=r"does not of '<\|im_start\|>', '<\|im_end\|>'"):
        read(path, split)


def test_lines_may_begin_with_a_mark_and_end_with_a_return(tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl")
    expected, _ = read(path, tokenizer)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(read(path, tokenizer)[0].tokens, expected.tokens)


def test_refuses_a_file_without_short_texts_and_one_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no text of at most max_tokens=8 tokens, 3 longer ones"):
        read(write(tmp_path / "data.jsonl"), tokenizer, max_tokens=8)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.jsonl", tokenizer)


@pytest.mark.parametrize("kind", ["sdar", "qwen3"])
def test_a_released_folder_is_fine_tuned_to_rcd_and_answers(tmp_path, tokenizer, kind):
    shape = DiffusionLMConfig(
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=16,
        vocabulary_size=tokenizer.size + 3,
        mask_id=tokenizer.mask_id,
        qk_norm=True,
    )
    released = tmp_path / "released-b8"
    shutil.copytree(FOLDER, released)
    save_diffusion_lm_folder(released, DiffusionLM(shape, rngs=nnx.Rngs(0)))
    values = json.loads((released / "config.json").read_text()) | {"eos_token_id": [3, 5]}
    mask_id = None
    if kind == "qwen3":  # an autoregressive model, which knows of no mask
        mask_id = values.pop("mask_token_id")
        values["model_type"] = kind
    (released / "config.json").write_text(json.dumps(values))
    config = Config(
        output=tmp_path / "run",
        task="text",
        data=write(tmp_path / "data.jsonl"),
        start_from=released,
        reference=released,
        mask_id=mask_id,
        precision="float32",
        block_length=8,
        batch_size=2,
        steps=3,
        warmup_steps=1,
        learning_rate=1e-2,
        devices=1,
        log_every=1,
        validate_every=3,
        test_problems=1,
    )
    if kind == "qwen3":
        with pytest.raises(ValueError, match=r"mask_token_id.*; mask_id can be given"):
            train(dataclasses.replace(config, mask_id=None), show_progress=False)
    result = train(config, show_progress=False)
    assert [row["step"] for row in result.rows] == [1, 2, 3]
    validation = read_metrics(result.folder / "validation.jsonl")
    assert validation[-1]["validation"] > 0
    model = TextToText.from_pretrained(result.folder / "export", dtype="float32")
    theirs = TextToText.from_pretrained(released, dtype="float32", mask_id=mask_id)
    decoders = [one.default_decoder(8) for one in (model, theirs)]
    assert decoders[0] == decoders[1]
    assert decoders[0].block_length == 8
    assert 3 in decoders[0].stop_ids
    answers = model(["2+2?"], new_tokens=8)
    assert len(answers.texts) == 1
    with pytest.raises(ValueError, match="no model that was trained on problems"):
        carry_out(Sweep((result.folder / "export",), tmp_path / "sweep"), show_progress=False)


def test_text_needs_a_file_and_a_model():
    with pytest.raises(ValueError, match="task=text needs data and start_from, got data=None"):
        Config(task="text")


def test_refuses_what_does_not_fit_the_released_folder(tmp_path, tokenizer):
    from train.diffusion_lm_parts import open_rows

    released = tmp_path / "released"
    shutil.copytree(FOLDER, released)

    def config(size, qk_norm=True, mask_id=tokenizer.mask_id, **changes):
        mask_id = min(mask_id, size - 1)
        shape = DiffusionLMConfig(1, 16, 2, 1, 8, 16, size, mask_id, qk_norm=qk_norm)
        save_diffusion_lm_folder(released, DiffusionLM(shape, rngs=nnx.Rngs(0)))
        data = write(tmp_path / "data.jsonl")
        return Config(task="text", data=data, start_from=released, **changes)

    with pytest.raises(ValueError, match=r"has 3 texts of at most .* not more than test_problems"):
        open_rows(config(tokenizer.size + 1))
    with pytest.raises(ValueError, match=f"the tokenizer has ids up to {tokenizer.size - 1}, the"):
        open_rows(config(tokenizer.size - 1))
    with pytest.raises(ValueError, match=f"{tokenizer.mask_id}, must be that of the model, 7;"):
        open_rows(config(tokenizer.size + 1, mask_id=7))
    with pytest.raises(ValueError, match="answers with sight='bidirectional' and is to be trained"):
        open_rows(config(tokenizer.size + 1, qk_norm=False))
    with pytest.raises(ValueError, match="answers with sight='block_causal' and is to be trained"):
        open_rows(config(tokenizer.size + 1, sight="bidirectional"))
