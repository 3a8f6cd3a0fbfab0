"""Fine-tuning on text: rows from a file, and a released model's folder through the whole run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import save_diffusion_lm_folder
from jaxgen.models import DiffusionLM, DiffusionLMConfig
from jaxgen.pipelines import TextToText
from jaxgen.pipelines.chat import CHATML
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
        ("{", "data.jsonl, line 2 is no JSON"),
        ("[1]", "data.jsonl, line 2 must be an object with the strings prompt and answer"),
        ('{"prompt": "a"}', "line 2 must be an object with the strings prompt and answer"),
        ('{"prompt": "a", "answer": 3}', "line 2 must be an object"),
        ("[" * 100_000, "line 2 is no JSON"),
    ],
)
def test_refuses_lines_by_their_number(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "data.jsonl", TEXTS[:1])
    path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read(path, tokenizer)


def test_refuses_a_file_without_short_texts_and_one_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no text of at most max_tokens=8 tokens, 3 longer ones"):
        read(write(tmp_path / "data.jsonl"), tokenizer, max_tokens=8)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.jsonl", tokenizer)


def test_a_released_folder_is_fine_tuned_to_rcd_and_answers(tmp_path, tokenizer):
    shape = DiffusionLMConfig(
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=16,
        vocabulary_size=tokenizer.size + 3,
        mask_id=tokenizer.size,
        qk_norm=True,
    )
    released = tmp_path / "released-b8"
    shutil.copytree(FOLDER, released)
    save_diffusion_lm_folder(released, DiffusionLM(shape, rngs=nnx.Rngs(0)))
    config = Config(
        output=tmp_path / "run",
        task="text",
        data=write(tmp_path / "data.jsonl"),
        start_from=released,
        reference=released,
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
    result = train(config, show_progress=False)
    assert [row["step"] for row in result.rows] == [1, 2, 3]
    validation = read_metrics(result.folder / "validation.jsonl")
    assert validation[-1]["validation"] > 0
    model = TextToText.from_pretrained(result.folder / "export", dtype="float32", block_length=8)
    answers = model(["2+2?"], new_tokens=8)
    assert len(answers.texts) == 1
    with pytest.raises(ValueError, match="no model that was trained on problems"):
        carry_out(Sweep((released,), tmp_path / "sweep"), show_progress=False)


def test_text_needs_a_file_and_a_model():
    with pytest.raises(ValueError, match="task=text needs data and start_from, got data=None"):
        Config(task="text")


def test_refuses_to_hold_out_every_text(tmp_path, tokenizer):
    from train.diffusion_lm_parts import open_rows

    released = tmp_path / "released"
    shutil.copytree(FOLDER, released)
    shape = DiffusionLMConfig(1, 16, 2, 1, 8, 16, tokenizer.size + 1, tokenizer.size, qk_norm=True)
    save_diffusion_lm_folder(released, DiffusionLM(shape, rngs=nnx.Rngs(0)))
    config = Config(task="text", data=write(tmp_path / "data.jsonl"), start_from=released)
    with pytest.raises(ValueError, match=r"has 3 texts of at most .* not more than test_problems"):
        open_rows(config)
