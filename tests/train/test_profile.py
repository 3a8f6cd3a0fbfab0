"""Traces of training steps, memory in the rows, and both in a run of `train.language_model`."""

import gzip
import json
import re
import shlex
from types import SimpleNamespace

import jax
import pytest
import tyro

from tests.train.test_loop import run
from train.language_model import train
from train.language_model_config import Config
from train.loop import _summary
from train.metrics import read_rows
from train.profile import Profiler, peak_memory


@pytest.fixture
def events(monkeypatch):
    """What happens to JAX's profiler."""
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    return happened


@pytest.mark.parametrize(
    ("steps", "first", "last", "expected"),
    [
        ((3, 5), 0, 9, "1 2 start 3 4 5 stop 6 7 8 9"),
        ((1, 1), 0, 3, "start 1 stop 2 3"),
        ((3, 5), 4, 7, "start 5 stop 6 7"),  # resumed in between
        ((3, 5), 5, 7, "6 7"),  # resumed after them
        ((3, 5), 0, 4, "1 2 start 3 4 stop"),  # stopped in between
        (None, 0, 3, "1 2 3"),
    ],
)
def test_a_trace_spans_the_steps(events, tmp_path, steps, first, last, expected):
    profiler = Profiler(tmp_path, steps)
    profiler.switch(first)
    for done in range(first + 1, last + 1):
        events.append(str(done))
        before = len(events)
        due = profiler.due(done)
        profiler.switch(done)
        assert due == (len(events) > before)
    profiler.close()
    profiler.close()
    assert " ".join(events) == expected


def traced_steps(folder):
    """The numbers of the steps that a trace names."""
    (path,) = folder.rglob("*.trace.json.gz")
    trace = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = [event for event in trace if event.get("name") == "train"]
    return sorted({int(event["args"]["step_num"]) for event in named})


def test_the_loop_traces_some_steps(tmp_path):
    profiler = Profiler(tmp_path / "profile", (4, 5))
    with_trace, _, rows, _ = run(tmp_path / "one", profiler=profiler)
    assert traced_steps(tmp_path / "profile") == [4, 5]
    without, _, _, _ = run(tmp_path / "two")
    assert (with_trace.params["w"] == without.params["w"]).all()
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert peak_memory() == {}  # the CPU does not tell
    stats = [{"peak_bytes_in_use": 3 * 2**30}, None, {"peak_bytes_in_use": 5 * 2**30}, {}]
    devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == {"memory_gib": 5.0}


def test_memory_is_in_the_rows_and_the_progress_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.peak_memory", lambda: {"memory_gib": 1.25})
    _, _, rows, _ = run(tmp_path)
    assert [row["memory_gib"] for row in rows] == [1.25] * 5
    assert _summary(rows[0])["memory"] == "1.2 GiB"


def test_a_run_leaves_its_trace_and_its_statistics(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"{number} " * 40)
    config = Config(
        tmp_path / "run", data=text, model="tiny", precision="float32", context=32, batch_size=2,
        steps=4, warmup_steps=1, devices=1, held_out=0.2, validate_every=0, statistics_every=2,
        profile_steps=(3, 3),
    )  # fmt: skip
    assert {"statistics_every", "profile_steps"} <= config.may_change  # when a run is resumed
    folder = train(config, show_progress=False).folder
    assert traced_steps(folder / "profile") == [3]
    rows = read_rows(folder / "attention.jsonl")
    assert [(row["step"], row["layer"]) for row in rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert rows[0]["sigma_q"] != rows[2]["sigma_q"]
    assert 0 < rows[0]["ds_error"] < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile_steps": (5, 4)}, "from 1, got profile_steps=(5, 4)"),
        ({"profile_steps": (0, 4)}, "from 1, got profile_steps=(0, 4)"),
        ({"statistics_every": 5, "held_out": 0.0, "validate_every": 0}, "statistics need held_out"),
        ({"statistics_every": -1}, "statistics_every must be at least 0"),
    ],
)
def test_refuses_options(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**changes)


def test_the_options_survive_the_command_line():
    original = Config(profile_steps=(10, 12), statistics_every=500)
    assert tyro.cli(Config, args=shlex.split(original.command())[3:]) == original


def test_a_process_that_does_not_write_reads_at_the_same_steps(tmp_path):
    writes, reads = Profiler(tmp_path / "a", (3, 4)), Profiler(tmp_path / "b", (3, 4), write=False)
    for done in range(6):
        assert reads.due(done) == writes.due(done)
        writes.switch(done)
        reads.switch(done)
    assert (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
