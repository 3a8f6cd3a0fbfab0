"""Pretraining of a tiny language model on a few files of text."""

import json
import shlex
import signal
import time

import jax
import numpy as np
import pytest
import tyro

from tests.train import commands
from train import language_model
from train.corpus import ByteTokenizer
from train.language_model import train
from train.language_model_config import MODELS, Config
from train.language_model_parts import load_export, open_documents
from train.metrics import read_rows
from train.run_folder import ConfigChangedError
from train.state import take_apart

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return commands.write_text(tmp_path_factory.mktemp("text") / "files")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(folder, text, **changes):
    settings = {
        "output": folder, "data": text, "model": "tiny", "precision": "float32", "context": 32,
        "batch_size": 4, "steps": STEPS, "warmup_steps": 2, "learning_rate": 1e-2, "devices": 1,
        "held_out": 0.2, "log_every": 1, "save_every": 4, "validate_every": 3,
        "validation_batches": 2,
    }  # fmt: skip
    return Config(**(settings | changes))


def run(folder, text, on_row=None, **changes):
    return train(config(folder, text, **changes), on_row=on_row, show_progress=False)


def losses(result):
    return [row["loss"] for row in result.rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text):
    return run(tmp_path_factory.mktemp("straight"), text)


@pytest.fixture(scope="module")
def short(tmp_path_factory, text):
    return run(tmp_path_factory.mktemp("short"), text, validate_every=0, steps=3)


def test_a_run_leaves_its_folder(straight):
    folder = straight.folder
    assert (straight.step, straight.stopped) == (STEPS, "finished")
    assert read_rows(folder / "metrics.jsonl") == straight.rows
    assert losses(straight)[-1] < losses(straight)[0] - 0.5
    rows = read_rows(folder / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[1]["validation"] < rows[0]["validation"]
    card = json.loads((folder / "export" / "card.json").read_text())
    assert card["validation"] == rows[1]
    assert card["tokens_seen"] == STEPS * 4 * 32
    assert card["final_loss"] == pytest.approx(np.mean(losses(straight)))


def test_rows_say_tokens_a_second_and_the_share_of_the_peak(straight, text):
    row, shape = straight.rows[-1], MODELS["tiny"]
    assert row["tokens_per_second"] == pytest.approx(32 * row["examples_per_second"])
    operations = 3 * shape.operations(32) * row["examples_per_second"]
    assert row["mfu"] == pytest.approx(operations / 989e12)


def test_the_export_is_the_model(straight, text):
    model, card = load_export(straight.folder / "export")
    _, arrays = take_apart(model)
    assert arrays.keys() == straight.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, straight.arrays[name])
        # Without averaging, what is validated and exported is the last state.
        np.testing.assert_array_equal(array, straight.state.params[name])
    assert model.config.vocabulary_size == ByteTokenizer(multiple_of=128).size == 384
    narrow, _ = load_export(straight.folder / "export", attention="int8", dtype="bfloat16")
    assert narrow.config.attention == "int8"
    assert (
        card["corpus"]
        == open_documents(config(None, text), ByteTokenizer()).part("train", 0.2).digest
    )


def test_stopping_and_resuming_gives_the_same_bits(straight, text, tmp_path):
    def interrupt(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    part = run(tmp_path, text, on_row=interrupt)
    assert part.stopped == "SIGTERM"
    assert 2 < part.step < STEPS
    resumed = run(tmp_path, text)
    assert (resumed.step, resumed.stopped) == (STEPS, "finished")
    for one, other in zip(
        jax.tree.leaves(resumed.state), jax.tree.leaves(straight.state), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert losses(resumed) == losses(straight)


@pytest.mark.parametrize(
    "changes", [{"accumulate": 2}, {"devices": 2, "fsdp": 2}, {"devices": 2, "accumulate": 2}]
)
def test_parts_of_a_batch_and_devices_change_no_loss(short, text, tmp_path, changes):
    result = run(tmp_path, text, validate_every=0, steps=3, **changes)
    # Parts with a few more tokens that count weigh as much as others.
    tolerance = 2e-3 if "accumulate" in changes else 1e-5
    np.testing.assert_allclose(losses(result), losses(short), rtol=tolerance)


def test_int8_attention_trains_alike(short, text, tmp_path):
    result = run(tmp_path, text, attention="int8", validate_every=0, steps=3)
    np.testing.assert_allclose(losses(result), losses(short), rtol=0.01)
    assert losses(result) != losses(short)


def test_tokens_see_the_documents_before_theirs_only_if_asked(short, text, tmp_path):
    across = run(tmp_path, text, validate_every=0, steps=3, across_documents=True)
    assert abs(losses(short)[0] - losses(across)[0]) > 1e-4


def test_an_export_that_is_stale_or_not_whole_is_made_again(text, tmp_path):
    options = {"steps": 3, "validate_every": 5}  # validates at the end only

    def again(**changes):
        result = run(tmp_path, text, **options, **changes)
        assert (result.step, result.stopped) == (3, "finished")
        return load_export(tmp_path / "export")[1]

    assert run(tmp_path, text, **options, time_limit=0).stopped == "time limit"
    stop = lambda row: row["step"] == 2 and signal.raise_signal(signal.SIGTERM)
    last = run(tmp_path, text, **options, on_row=stop)
    assert (last.step, last.stopped) == (3, "SIGTERM")
    assert load_export(tmp_path / "export")[1]["steps"] == 1
    card = again()
    assert (card["steps"], card["validation"]["step"]) == (3, 3)
    path = tmp_path / "export" / "card.json"
    path.unlink()
    assert again()["validation"] == card["validation"]
    assert again(export_dtype="bfloat16")["config"]["export_dtype"] == "bfloat16"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluation": 1}))
    assert again(export_dtype="bfloat16")["evaluation"] == 1


@pytest.mark.parametrize("option", ["validate_every", "statistics_every"])
def test_too_few_documents_to_hold_out_are_refused_at_the_start(tmp_path, option):
    (tmp_path / "one.txt").write_text("a single document " * 30)
    changes = {"validate_every": 0, option: 1000}
    message = "none of 1 documents is for validation .*: give more documents or a larger --held-out"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", tmp_path / "one.txt", **changes)
    assert not list((tmp_path / "run").iterdir())


def test_a_context_longer_than_all_text_is_refused(text, tmp_path):
    message = r"must not exceed the tokens to learn from, got context=100000 and \d+ tokens"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, text, context=100_000)


def test_time_counts_from_before_the_text_is_encoded(text, tmp_path, monkeypatch):
    seen = {}

    def encode(*arguments):
        seen["encoding"] = time.monotonic()
        return open_documents(*arguments)

    monkeypatch.setattr(language_model, "open_documents", encode)
    monkeypatch.setattr(language_model, "carry_out", lambda *_, **options: seen.update(options))
    with pytest.raises(AttributeError):  # of what was to be returned
        run(tmp_path, text)
    assert seen["started"] <= seen["encoding"]


def test_another_text_is_refused_when_resuming(straight, text, tmp_path):
    run(tmp_path / "run", text, steps=2, validate_every=0)
    other = tmp_path / "other"
    other.mkdir()
    for number in range(20):
        (other / f"{number}.txt").write_text(f"something else {number} " * 9)
    with pytest.raises(ConfigChangedError, match="data: "):
        run(tmp_path / "run", other, steps=2, validate_every=0)
    (text / "41.txt").write_text("more of it " * 50)
    try:
        with pytest.raises(ValueError, match="cannot go on in other batches: corpus="):
            run(tmp_path / "run", text, steps=2, validate_every=0)
    finally:
        (text / "41.txt").unlink()


def test_command_line_round_trip(text):
    original = Config(
        data=text, model="325m", attention="int8", remat="keep_attention", accumulate=8,
        across_documents=True, qk_norm=False, betas=(0.8, 0.9), batch_size=64,
    )  # fmt: skip
    words = shlex.split(original.command())
    assert words[:3] == ["python", "-m", "train.language_model"]
    assert tyro.cli(Config, args=words[3:]) == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2"}, "model must be one of 10m, .*, tiny, got 'gpt2'"),
        ({"remat": "all"}, "remat must be one of .*'keep_products'"),
        ({"accumulate": 3}, "accumulate must divide batch_size, got accumulate=3"),
        ({"held_out": 1.0}, "held_out must be less than 1"),
        ({"held_out": 0.0}, "validation needs held_out above 0"),
        ({"context": 0}, "context must be at least 1, got context=0"),
    ],
)
def test_refuses_configurations(changes, message, text):
    with pytest.raises(ValueError, match=message):
        config("unused", text, **changes)


def test_refuses_batches_that_devices_and_parts_do_not_divide(text, tmp_path):
    with pytest.raises(ValueError, match="got batch_size=4, 2 devices and accumulate=4"):
        run(tmp_path, text, devices=2, accumulate=4)
