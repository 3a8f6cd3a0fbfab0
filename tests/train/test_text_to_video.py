"""Training of a tiny video model on moving squares."""

import dataclasses
import functools
import json
import shlex
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from jaxgen.sampling import LogitNormal
from jaxgen.text import PADDING_ID
from tests.train.video_fixtures import CLIPS, FRAMES, SIZE, TOKENIZER, Squares
from train import text_to_video, text_to_video_parts
from train.clips import ClipBatches
from train.metrics import read_rows
from train.moving_emoji import MovingEmoji
from train.run_folder import ConfigChangedError
from train.state import take_apart
from train.text_to_video import train
from train.text_to_video_config import MODELS, Config
from train.text_to_video_parts import (
    Validation,
    choose_captions,
    load_export,
    make_models,
    make_tokenizer,
    predict,
    to_floats,
)

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(tmp_path_factory):
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # of tests before, which had none
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        tiny = dataclasses.replace(MODELS["tiny"], num_layers=1)
        patch.setattr(text_to_video_parts, "MODELS", {"tiny": tiny})
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def config(folder, **changes):
    settings = {
        "output": folder, "model": "tiny", "precision": "float32", "frames": FRAMES, "size": SIZE,
        "batch_size": 4, "workers": 0, "steps": STEPS, "warmup_steps": 2, "learning_rate": 3e-3,
        "devices": 1, "log_every": 1, "save_every": 4, "validate_every": 3, "validation_clips": 5,
        "validation_levels": 2, "sample_every": 0, "sample_steps": 2, "export_dtype": "float32",
    }  # fmt: skip
    return Config(**(settings | changes))


def run(folder, clips=CLIPS, on_row=None, **changes):
    return train(
        config(folder, **changes),
        clips=clips,
        tokenizer=TOKENIZER,
        on_row=on_row,
        show_progress=False,
    )


def losses(result):
    return [row["loss"] for row in result.rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"), sample_every=STEPS)


def test_a_run_leaves_its_folder(straight):
    folder = straight.folder
    assert (straight.step, straight.stopped) == (STEPS, "finished")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(STEPS)]
    assert read_rows(folder / "metrics.jsonl") == straight.rows
    assert losses(straight)[-1] < losses(straight)[0]
    rows = read_rows(folder / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0].keys() == {"step", "validation", "held_out"}
    assert rows[1]["validation"] < rows[0]["validation"] < 3
    with Image.open(folder / "samples" / f"{STEPS:07d}.gif") as animation:
        assert animation.n_frames == FRAMES
    with Image.open(folder / "samples" / f"{STEPS:07d}.png") as sheet:
        assert sheet.height > 8 * 64
    card = json.loads((folder / "export" / "card.json").read_text())
    assert card["steps"] == STEPS
    assert card["validation"] == rows[1]
    assert card["final_loss"] == pytest.approx(np.mean(losses(straight)))


def test_the_export_is_the_average(straight):
    models, tokenizer, _ = load_export(straight.folder / "export", precision="float32")
    assert tokenizer == TOKENIZER
    _, arrays = take_apart(models)
    assert arrays.keys() == straight.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, straight.arrays[name])
        assert array.dtype == np.float32


def test_stopping_and_resuming_gives_the_same_bits(straight, tmp_path):
    def interrupt(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    part = run(tmp_path, on_row=interrupt)
    assert part.stopped == "SIGTERM"
    assert 2 < part.step < STEPS
    assert not (tmp_path / "export").exists()
    resumed = run(tmp_path)
    assert (resumed.step, resumed.stopped) == (STEPS, "finished")
    ours, theirs = jax.tree.leaves(resumed.state), jax.tree.leaves(straight.state)
    assert len(ours) == len(theirs) > 80
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses(resumed) == losses(straight)
    last = [read_rows(r.folder / "validation.jsonl")[-1] for r in (resumed, straight)]
    assert last[0] == last[1]


def test_two_devices_with_fsdp_have_the_same_losses(straight, tmp_path):
    result = run(tmp_path, devices=2, fsdp=2, validate_every=0)
    np.testing.assert_allclose(losses(result), losses(straight), rtol=1e-4)


def test_a_time_limit_stops_and_exports_in_bfloat16(tmp_path):
    result = run(tmp_path, time_limit=0, validate_every=0, export_dtype="bfloat16")
    assert (result.stopped, result.step) == ("time limit", 1)
    _, arrays = take_apart(load_export(tmp_path / "export", precision="float32")[0])
    for name, array in arrays.items():
        np.testing.assert_allclose(array, result.arrays[name], rtol=0.004)
    stored = sum(file.stat().st_size for file in tmp_path.glob("export/*/*.safetensors"))
    assert stored < 0.6 * sum(array.nbytes for array in arrays.values())


def test_a_run_can_start_from_an_export(straight, tmp_path):
    again = run(
        tmp_path,
        start_from=straight.folder / "export",
        steps=1,
        warmup_steps=0,
        learning_rate=0.0,
        validate_every=1,
    )
    for name, array in straight.arrays.items():
        np.testing.assert_allclose(again.arrays[name], array, rtol=1e-6)
    rows = [read_rows(r.folder / "validation.jsonl")[-1] for r in (again, straight)]
    assert rows[0]["held_out"] == pytest.approx(rows[1]["held_out"], rel=1e-5)


def test_validation_is_fixed_and_sees_the_caption_and_the_clip(straight):
    models, _, _ = load_export(straight.folder / "export", precision="float32")
    skeleton, arrays = take_apart(models)
    made = functools.partial(Validation, tokenizer=TOKENIZER, count=5, distribution=LogitNormal())
    loss = lambda clips, levels: made(clips, levels=levels)(skeleton, arrays)
    one = {"validation": CLIPS["validation"]}
    first = loss(one, 2)
    assert first == loss(one, 2) == {"validation": loss(CLIPS, 2)["validation"]}
    assert first["validation"] != loss({"validation": CLIPS["train"]}, 2)["validation"]
    # The loss of a model that predicts zero is 1 + mean square at any level.
    zero = {
        name: 0 * array if "final_projection" in name else array for name, array in arrays.items()
    }
    video = np.stack([CLIPS["validation"][i]["video"] for i in range(5)]) / 127.5 - 1
    assert made(one, levels=3)(skeleton, zero)["validation"] == pytest.approx(
        1 + np.mean(video**2), rel=0.02
    )


def test_validation_is_at_the_levels_that_are_trained_on(straight):
    models, _, _ = load_export(straight.folder / "export", precision="float32")
    skeleton, arrays = take_apart(models)
    one = {"validation": CLIPS["validation"]}
    made = functools.partial(Validation, one, TOKENIZER, count=4)
    found, expected = [], []
    for sigma in (0.1, 0.9):
        mean, clips = np.log(sigma / (1 - sigma)), [CLIPS["validation"][i] for i in range(4)]
        # Nearly all levels are one, so the loss is that of the level.
        narrow = LogitNormal(mean, 1e-3)
        found.append(made(levels=2, distribution=narrow)(skeleton, arrays)["validation"])
        videos = to_floats(np.stack([clip["video"] for clip in clips]))
        tokens = TOKENIZER.encode([clip["caption"] for clip in clips])
        for seed in range(4):
            noise = jax.random.normal(jax.random.key(seed), videos.shape)
            noisy = (1 - sigma) * videos + sigma * noise
            velocity = predict(models, noisy, jnp.full(4, sigma), tokens)
            expected.append(float(jnp.mean(jnp.square(velocity - (noise - videos)))))
    expected = np.reshape(expected, (2, 4)).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert abs(found[0] / found[1] - 1) > 0.05


def test_queries_and_keys_may_start_with_a_gain():
    config = Config(model="tiny", qk_gain=1.7)
    for block in make_models(config, TOKENIZER).transformer.blocks:
        for norm in (block.self_attention.query_norm, block.self_attention.key_norm):
            np.testing.assert_allclose(norm.scale[...], 1.7, rtol=1e-6)
    with pytest.raises(ValueError, match=r"qk_gain must be .*, got qk_gain=0"):
        Config(qk_gain=0.0)


def test_a_changed_configuration_is_refused(straight):
    with pytest.raises(ConfigChangedError, match=r"\n  batch_size: 4 before, 8 now\n"):
        run(straight.folder, batch_size=8)
    again = run(straight.folder, workers=3, time_limit=1e6, validate_every=1)
    assert losses(again) == losses(straight)


def test_refuses_clips_of_another_shape_and_batches_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(8, 16, 16, 3\), got \(4, 16, 16, 3\)"):
        run(tmp_path, frames=8)
    with pytest.raises(ValueError, match="got batch_size=4 and 3 devices"):
        run(tmp_path, devices=3)
    with pytest.raises(ValueError, match="there are 4 devices, got devices=8"):
        run(tmp_path, devices=8)
    assert not list(tmp_path.iterdir())


def test_sample_captions_come_from_both_splits():
    captions = choose_captions(CLIPS, count=2)
    assert len(captions) == 4
    assert captions[-1] == "a blue square moves right"


def batches(clips=CLIPS["train"], **options):
    settings = {"batch_size": 6, "seed": 3, "caption_dropout": 0.5}
    return ClipBatches(clips, TOKENIZER, **(settings | options))


def test_batches_are_a_function_of_seed_and_step():
    stream = batches()
    taken = [next(stream) for _ in range(12)]
    assert stream.get_state() == {"step": 12}
    assert taken[0]["video"].shape == (6, FRAMES, SIZE, SIZE, 3)
    dropped = [np.all(batch["tokens"] == PADDING_ID, axis=1) for batch in taken]
    assert 0.3 < np.mean(dropped) < 0.7
    np.testing.assert_array_equal(taken[1]["video"][0], CLIPS["train"][6]["video"])
    np.testing.assert_array_equal(taken[11]["video"][0], CLIPS["train"][66 % 64]["video"])
    stream.set_state({"step": 3})
    for batch in taken[3:5]:
        again = next(stream)
        for name, array in batch.items():
            np.testing.assert_array_equal(again[name], array)
    other = next(batches(seed=4))
    np.testing.assert_array_equal(other["video"], taken[0]["video"])
    assert np.any(other["tokens"] != taken[0]["tokens"])


def test_other_processes_render_the_same():
    clips = MovingEmoji(frames=8, size=32, limit=12)
    here = ClipBatches(clips, make_tokenizer(), batch_size=3, seed=0)
    with ClipBatches(clips, make_tokenizer(), batch_size=3, seed=0, workers=2, ahead=1) as there:
        for _ in range(3):
            ours, theirs = next(here), next(there)
            for name, array in ours.items():
                np.testing.assert_array_equal(theirs[name], array)
        there.set_state({"step": 0})
        np.testing.assert_array_equal(next(there)["video"][0], clips[0]["video"])


def test_the_tokenizer_knows_every_caption():
    tokens = make_tokenizer().encode([MovingEmoji(limit=12)[i]["caption"] for i in range(20)])
    assert tokens.shape == (20, 24)
    assert not np.any(tokens == 1)


def test_command_line_round_trip():
    original = Config(
        model="tiny", attention="int8", remat=True, figures=5, sample_captions=("a b", "c"),
        time_limit=12.5, validate_every=0,
    )  # fmt: skip
    words = shlex.split(original.command())
    assert words[:3] == ["python", "-m", "train.text_to_video"]
    assert tyro.cli(Config, args=words[3:]) == original


def test_main_exits_with_the_signal_and_prints_a_changed_configuration(monkeypatch, straight):
    result = dataclasses.replace(straight, stopped="SIGTERM")
    monkeypatch.setattr(text_to_video, "train", lambda config: result)
    monkeypatch.setattr("sys.argv", ["text_to_video", "--model", "tiny"])
    with pytest.raises(SystemExit) as caught:
        text_to_video.main()
    assert caught.value.code == 143

    def refuse(config):
        raise ConfigChangedError("seed: 5 before")

    monkeypatch.setattr(text_to_video, "train", refuse)
    with pytest.raises(SystemExit, match="seed: 5 before"):
        text_to_video.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "wan"}, "model must be one of moving-emoji, tiny, got 'wan'"),
        ({"attention": "sparse"}, r"attention must be one of \('exact', 'int8'\), got 'sparse'"),
        ({"size": 66}, "patches of 1 frames and 4 x 4 pixels must fill the clip, got .*size=66"),
        ({"workers": -1}, "workers must be at least 0, got workers=-1"),
        ({"sigma_shift": 0.0}, "sigma_shift must be positive, got sigma_shift=0.0"),
    ],
)
def test_refuses_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(output=Path("unused"), **changes)


def test_squares_differ():
    videos = [Squares(0, 3)[index]["video"] for index in range(2)]
    assert np.any(videos[0] != videos[1])
