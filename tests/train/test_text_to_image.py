"""Whole runs of the training script on the tiny model, with made-up pictures."""

import dataclasses
import json
import shlex
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from jaxgen.models.mmdit import MMDIT_PRESETS
from jaxgen.pipelines import TextToImage
from train import openmoji, text_to_image, text_to_image_parts
from train.run_folder import ConfigChangedError, claim
from train.text_to_image import train
from train.text_to_image_config import Config
from train.text_to_image_parts import choose_captions, load_pictures

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "gray": (90, 90, 90)}
SHAPES = ("top", "bottom", "left", "right")
STEPS = 6


def make_emojis():
    """Half-planes of a color on white, 16 pixels; "blue left" is held out."""
    images, captions = [], []
    for color, value in COLORS.items():
        for shape in SHAPES:
            image = np.full((16, 16, 3), 255, np.uint8)
            half = slice(0, 8) if shape in ("top", "left") else slice(8, 16)
            image[(half, slice(None)) if shape in ("top", "bottom") else (slice(None), half)] = (
                value
            )
            images.append(image)
            captions.append(f"{color} {shape}")
    zeros = np.zeros(len(captions), np.int32)
    held_out = np.array([caption == "blue left" for caption in captions])
    names = (("thing",), ("none",), ("none",))
    return openmoji.Emojis(np.stack(images), tuple(captions), zeros, zeros, zeros, *names, held_out)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(tmp_path_factory):
    """One block; and runs that differ in nothing that is compiled share what XLA made of it."""
    preset = dataclasses.replace(MMDIT_PRESETS["tiny"], num_layers=1)
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_to_image_parts, "MMDIT_PRESETS", {"tiny": preset})
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # of tests before, which had none
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def config(folder, **changes):
    settings = {
        "output": folder,
        "model": "tiny",
        "precision": "float32",
        "batch_size": 8,
        "steps": STEPS,
        "warmup_steps": 2,
        "devices": 1,
        "log_every": 1,
        "save_every": 4,
        "sample_every": 0,
        "sample_steps": 2,
    }
    return Config(**(settings | changes))


def run(folder, **changes):
    on_row = changes.pop("on_row", None)
    return train(
        config(folder, **changes), emojis=make_emojis(), on_row=on_row, show_progress=False
    )


def losses(result):
    return [row["loss"] for row in result.rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"), sample_every=STEPS)


def test_a_run_leaves_its_folder(straight):
    folder = straight.folder
    assert (straight.step, straight.stopped) == (STEPS, "finished")
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 8
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == straight.rows
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    assert lines[-1].keys() == {
        "step", "steps", "loss", "gradient_norm", "learning_rate", "skipped", "skipped_in_a_row",
        "examples_per_second",
    }  # fmt: skip
    assert 0.5 < lines[0]["loss"] < 3
    assert lines[0]["learning_rate"] == pytest.approx(5e-4 / 3)
    with Image.open(folder / "samples" / f"{STEPS:07d}.png") as grid:
        assert grid.width > 4 * 128


def test_the_export_draws_what_the_run_draws(straight):
    exported = TextToImage.from_pretrained(straight.folder / "export")
    prompts = ["red left", "blue left"]
    ours, theirs = (p(prompts, steps=2).astype(float) for p in (straight.pipeline, exported))
    assert np.abs(ours - theirs).mean() < 3  # bfloat16 on disk
    card = exported.card
    assert card["final_loss"] == pytest.approx(np.mean(losses(straight)))
    assert (card["steps"], card["pictures_trained_on"], card["pictures_held_out"]) == (6, 15, 1)
    assert card["command"].startswith("python -m train.text_to_image --output")
    assert "CC BY-SA" in card["attribution"]
    assert card["config"]["attention"] == "exact"
    assert card["seconds"] > 0


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
    assert len(ours) == len(theirs) > 100
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses(resumed) == losses(straight)
    assert (tmp_path / "export" / "card.json").exists()


def test_two_devices_with_fsdp_have_the_same_losses(straight, tmp_path):
    result = run(tmp_path, devices=2, fsdp=2)
    np.testing.assert_allclose(losses(result), losses(straight), rtol=1e-4)
    kernel = result.state.params["transformer.final_projection.kernel"]
    assert kernel.sharding.spec != jax.P()
    assert kernel.addressable_shards[0].data.size == kernel.size // 2


def test_int8_training_with_a_borrowed_text_encoder(straight, tmp_path):
    result = run(tmp_path, text_encoder_from=straight.folder / "export", attention="int8")
    assert not [name for name in result.state.params if name.startswith("text_encoder.")]
    for name in ("text_encoder/model.safetensors", "tokenizer.json"):
        ours, theirs = (r.folder / "export" / name for r in (result, straight))
        assert ours.read_bytes() == theirs.read_bytes()
    # Before the first update the models differ in the attention only.
    assert losses(result)[0] == pytest.approx(losses(straight)[0], rel=0.01)
    assert (
        TextToImage.from_pretrained(result.folder / "export").card["config"]["attention"] == "int8"
    )


def test_a_changed_configuration_is_refused(straight):
    message = r"another configuration:\n  batch_size: 8 before, 4 now\n  seed: 0 before, 1 now\n"
    with pytest.raises(ConfigChangedError, match=message):
        run(straight.folder, batch_size=4, seed=1)


def test_what_does_not_decide_the_updates_may_change(straight):
    again = run(straight.folder, log_every=3, time_limit=1e6, guidance_scale=2.0)
    assert (again.step, again.stopped) == (STEPS, "finished")
    assert losses(again) == losses(straight)


def test_a_damaged_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be resumed: .*config\.json: not valid JSON"):
        run(tmp_path)


def test_a_time_limit_stops_and_exports(tmp_path):
    result = run(tmp_path, time_limit=0)
    assert result.stopped == "time limit"
    assert result.step == 1
    assert result.pipeline.card["steps"] == result.step
    assert (tmp_path / "export" / "card.json").exists()


def test_refuses_batches_that_do_not_fit_the_devices(tmp_path):
    with pytest.raises(ValueError, match="got batch_size=8 and 3 devices"):
        run(tmp_path, devices=3)


def test_refuses_pictures_of_another_size(tmp_path):
    wrong = dataclasses.replace(make_emojis(), images=np.zeros((16, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(16, 16, 3\), got data of shape \(32, 32, 3\)"):
        train(config(tmp_path), emojis=wrong, show_progress=False)
    assert not (tmp_path / "config.json").exists()


def test_pictures_are_averaged_down_to_the_model(monkeypatch):
    large = dataclasses.replace(
        make_emojis(), images=np.arange(16 * 32 * 32 * 3).reshape(16, 32, 32, 3).astype(np.uint8)
    )
    monkeypatch.setattr(openmoji, "load", lambda resolution, limit: large)
    small = load_pictures(config(Path("unused"))).images
    assert small.shape == (16, 16, 16, 3)
    assert small[0, 0, 0, 0] == round(large.images[0, :2, :2, 0].mean())


def test_sample_captions_come_from_both_parts():
    captions = choose_captions(make_emojis(), count=4)
    assert captions[0] == "red top"
    assert captions[-1] == "blue left"
    assert len(set(captions)) == 5


def test_command_line_round_trip():
    original = Config(
        model="tiny",
        attention="int8",
        remat=True,
        tensorboard=True,
        betas=(0.8, 0.95),
        sample_captions=("red heart", "blue car"),
        text_encoder_from=Path("some/folder"),
        time_limit=12.5,
        learning_rate=1e-3,
    )
    words = shlex.split(original.command())
    assert words[:3] == ["python", "-m", "train.text_to_image"]
    assert tyro.cli(Config, args=words[3:]) == original
    assert Config().command() == "python -m train.text_to_image"


def test_main_exits_with_the_signal(monkeypatch, straight):
    result = dataclasses.replace(straight, stopped="SIGTERM")
    monkeypatch.setattr(text_to_image, "train", lambda config: result)
    monkeypatch.setattr("sys.argv", ["text_to_image", "--model", "tiny"])
    with pytest.raises(SystemExit) as caught:
        text_to_image.main()
    assert caught.value.code == 143


def test_main_prints_a_changed_configuration(monkeypatch, straight):
    command = config(straight.folder, seed=5).command()
    monkeypatch.setattr("sys.argv", shlex.split(command)[2:])
    monkeypatch.setattr(text_to_image, "load_pictures", lambda *_: make_emojis())
    with pytest.raises(SystemExit, match="seed: 0 before, 5 now"):
        text_to_image.main()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_schedules(schedule):
    options = {"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "decay_steps": 30}
    with jax.numpy_dtype_promotion("standard"):
        rate = Config(schedule=schedule, **options).learning_rate_schedule()
        values = [float(rate(np.int32(step))) for step in range(101)]
    assert 0 < values[0] < 0.15
    assert np.all(np.diff(values[:11]) > 0)
    assert values[10] == pytest.approx(1)
    assert values[100] == pytest.approx(0, abs=1e-6)
    assert np.all(np.diff(values[10:]) <= 1e-6)
    middle = 0.5 if schedule == "cosine" else 1.0
    assert values[55] == pytest.approx(middle, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "sd3-medium"},
            "model must be one of openmoji-large, openmoji-small, .*, tiny, got",
        ),
        ({"attention": "fp8"}, r"attention must be one of \('exact', 'int8'\), got 'fp8'"),
        ({"precision": "float16"}, "precision must be one of .* got 'float16'"),
        ({"schedule": "step"}, "schedule must be one of .* got 'step'"),
        ({"steps": 0}, "steps must be at least 1, got steps=0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got batch_size=0"),
        ({"time_limit": -1.0}, "time_limit must be at least 0, got time_limit=-1.0"),
        (
            {"learning_rate": float("nan")},
            "learning_rate must be at least 0, got learning_rate=nan",
        ),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got learning_rate=inf"),
        ({"gradient_clip": -1.0}, "gradient_clip must be positive, got gradient_clip=-1.0"),
        ({"sigma_std": 0.0}, "sigma_std must be positive, got sigma_std=0.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite, got guidance_scale=nan"),
        ({"betas": (0.9, 2.0)}, r"betas must be two numbers in \[0, 1\), got betas=\(0.9, 2.0\)"),
        ({"batch_size": 1.5}, "batch_size must be an int, got batch_size=1.5"),
        ({"caption_dropout": 1.5}, "caption_dropout must be from 0 to 1, got caption_dropout=1.5"),
        ({"ema_decay": -0.1}, "ema_decay must be from 0 to 1, got ema_decay=-0.1"),
        ({"steps": 100}, "got warmup_steps=500, decay_steps=0, steps=100"),
        (
            {"steps": 1000, "schedule": "constant", "decay_steps": 600},
            "decay_steps=600, steps=1000",
        ),
    ],
)
def test_refuses_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_more_devices_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="there are 4 devices, got devices=8"):
        run(tmp_path, devices=8)


def test_a_run_that_never_made_a_step_binds_nobody(tmp_path):
    folder = claim(config(tmp_path / "run", seed=1))
    claim(config(folder, seed=2))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigChangedError, match="seed: 2 before, 3 now"):
        claim(config(folder, seed=3))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"but no config\.json, so it is not a run"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_running_a_finished_run_again_keeps_what_was_added_to_its_card(straight):
    path = straight.folder / "export" / "card.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"evaluation": 1}))
    again = run(straight.folder, sample_every=STEPS)
    assert again.step == STEPS
    assert json.loads(path.read_text())["evaluation"] == 1
    path.write_text(before)
