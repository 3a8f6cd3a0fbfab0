"""Several devices beside one: some cases on fake CPU devices, the others with made-up times."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from train import scaling_cases
from train.configs.stitching_speed import Speed
from train.scaling import compiling_once, main, measure, measured, save, table
from train.scaling_cases import Scaling

TINY = {
    "small_model": "tiny", "small_context": 64, "precision": "float32", "long_context": 256,
    "heads": 2, "head_dim": 16,
}  # fmt: skip


def test_a_long_sequence_and_a_run_that_changes_its_devices(tmp_path):
    scaling = Scaling(cases=("context", "resume"), output=tmp_path / "new" / "x.json", **TINY)
    found = {}
    for case, records in measure(scaling):
        found[case] = records
        save(scaling, found)
    one, exact, int8 = found["context"]
    assert one["error"] == 0
    assert exact["error"] < 1e-5 < 1e-3 < int8["error"] < 0.05
    (run,) = found["resume"]
    assert len(run["losses"]) == 18
    first, second = run["changed_after"]
    assert 6 <= first < second < 18  # results are read a few steps late
    assert 0 <= run["difference"] < 1e-4
    assert run["losses"][-1] < run["losses"][0] - 0.1
    assert json.loads(scaling.output.read_text())["cases"] == found
    more = dataclasses.replace(scaling, cases=("context", "losses", "resume"))
    assert measured(more) == found  # whatever else is asked for
    assert [case for case, _ in measure(more, {*found, "losses"})] == []
    with pytest.raises(ValueError, match=r"x.json was measured with heads = 2; choose another"):
        measured(dataclasses.replace(scaling, heads=4))
    assert measured(dataclasses.replace(scaling, output=tmp_path / "none.json")) == {}
    assert scaling.output.with_suffix(".png").stat().st_size > 5_000
    assert len(table(found).splitlines()) == 2 + 3 + 1


def test_a_record_is_continued_only_where_it_was_measured_alike(tmp_path):
    scaling = Scaling(output=tmp_path / "x.json", **TINY)
    stitching = dataclasses.replace(scaling.stitching, runs=1)
    faster = dataclasses.replace(scaling, stitching=stitching)
    save(scaling, {"context": []})
    assert list(measured(faster)) == ["context"]  # which has no diffusion models
    save(scaling, {"context": [], "hybrid": []})
    with pytest.raises(ValueError, match="measured with stitching = "):
        measured(faster)
    record = json.loads(scaling.output.read_text())
    scaling.output.write_text(json.dumps(record | {"device": "abacus"}))
    with pytest.raises(ValueError, match="measured with device = abacus; choose another"):
        measured(scaling)
    for text, message in (("{}", "no record of train.scaling"), ("{", "x.json")):
        scaling.output.write_text(text)
        with pytest.raises(ValueError, match=message):
            measured(scaling)


def test_speeds_and_losses_are_compared_with_one_device(monkeypatch):
    seen = []

    def train(config, on_row, show_progress):
        seen.append(config)
        speed = 100 if config.devices == 1 else 190 - 10 * config.fsdp
        loss = 2.0 + (config.tensor - 1) / 100 - (config.context_parallel - 1) / 1000
        row = {"step": 1, "tokens_per_second": speed, "mfu": 0.5, "loss": loss}
        row["gradient_norm"] = 5.0 * config.tensor
        for found in (row, row | {"loss": loss / 2, "step": config.steps}):
            on_row(found)
        raise AssertionError("saves what is not needed")

    monkeypatch.setattr(scaling_cases, "train", train)
    found = dict(measure(Scaling(cases=("weak", "losses"))))
    assert [record["of_ideal"] for record in found["weak"]] == [1.0, 0.9, 0.85]
    assert [config.batch_size for config in seen[:3]] == [8, 16, 16]
    assert [config.model for config in seen] == ["325m"] * 3 + ["10m"] * 3
    differences = [record["difference"] for record in found["losses"]]
    assert differences == pytest.approx([0, 0.01, 0.001])
    assert [record["later"] for record in found["losses"]] == pytest.approx([0, 0.005, 0.0005])
    assert [record["gradient_difference"] for record in found["losses"]] == [0, 1, 0]
    rows = table(found).splitlines()[2:]
    assert rows[1] == (
        "| as many rows a device | data parallel | 2 | 180 tokens/s, 90.0% of devices x one |"
    )
    assert rows[4].endswith(
        "| tensor parallel | 2 | first loss differs by 1.0e-02, its gradient's norm by 1.0e+00 of "
        "it, five updates later 5.0e-03 |"
    )


def test_the_small_model_moves_to_another_device(monkeypatch):
    seen, known = [], []

    def measure_speed(speed, alone):
        seen.append(speed)
        known.append(alone)
        for method in ("alone", "HybridStitch"):
            yield {"method": method, "seconds_a_picture": 3.0 - speed.small_device,
                   "seconds_of_stages": {"small": 1.0}, "seconds_compiling": 9.0,
                   "speed_up": 1.5, "steps": {}, "gib": None}  # fmt: skip

    monkeypatch.setattr(scaling_cases.stitching_speed, "measure", measure_speed)
    found = dict(measure(Scaling(cases=("hybrid",))))
    assert [record["seconds_a_picture"] for record in found["hybrid"]] == [3.0, 2.0]
    assert [speed.small_device for speed in seen] == [0, 1]
    assert known == [None, 3.0]  # the large model alone is where it was
    assert seen[0].policies == Speed(policies=("large", "hybridstitch")).policies
    assert (
        table(found).splitlines()[3]
        == "| two diffusion models | a device each | 2 | 2.00 s a picture |"
    )


@pytest.fixture
def no_cache():
    """No folder of programs, and none too small for one; as it was afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (None, 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.mark.usefixtures("no_cache")
def test_programs_are_kept_for_the_time_being(tmp_path, recwarn):
    jax.jit(lambda x: x - 1)(1.0)  # without a folder
    with compiling_once():
        folder = Path(jax.config.jax_compilation_cache_dir)
        counts = []
        for _ in range(2):
            jax.jit(lambda x: jnp.sin(x) + 2)(1.0)  # another function, the same program
            counts.append(len(list(folder.glob("*-cache"))))
        assert counts[0] == counts[1] > 0
    assert jax.config.jax_compilation_cache_dir is None
    assert not folder.exists()
    jax.jit(lambda x: x - 3)(1.0)
    assert not recwarn.list
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    with compiling_once():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ("strong",)}, r"cases must be among weak, losses, .*, got \['strong'\]"),
        ({"devices": 1}, "devices must be from 2 to the 4 of this machine, got 1"),
        ({"devices": 9}, "devices must be from 2 to the 4 of this machine, got 9"),
        ({"small_model": "9m"}, "model must be one of 10m, .*, got '9m'"),
        ({"devices": 4}, "devices must divide the key heads of small_model=10m, 6, got 4"),
        ({"long_context": 255}, "devices must divide long_context=255 and 8 rows, got 2"),
        ({"output": Path("x.png")}, "output must not be a .png, which the plot is, got x.png"),
        ({"stitching": Speed(policies=("large",))}, r"stitching must draw by one .*, got 0"),
        ({"stitching": Speed(splits=())}, r"stitching must draw by one .*, got 2"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**changes)


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "x.json")
    monkeypatch.setattr("sys.argv", ["scaling", "--cases", "context", "--output", output])
    monkeypatch.setattr("train.scaling.measure", lambda *_: pytest.fail("runs"))
    with pytest.raises(SystemExit, match=r"train.scaling: .*file"):
        main()
