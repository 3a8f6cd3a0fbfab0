"""Injected faults of a training run: signals, hanging, full disks, folders that are read-only."""

import json
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import commands
from train import language_model, loop
from train.checkpoint import Checkpoints
from train.distributed import PEER_FAILED
from train.language_model_config import Config
from train.metrics import JsonLines, Meter, OutputError, read_rows
from train.run_folder import ConfigChangedError
from train.state import create_state, make_train_step

# Until the limit is lifted no file may grow beyond it, as if the disk were full: writing fails with
# EFBIG where a full disk gives ENOSPC. That of metrics and of what lies beside the arrays is small.
FULL_DISK = """
import os, resource, signal
from train.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpoints.save
def fill(self, step, state, extra):
    self.wait()
    if step == 8:
        limit = resource.RLIM_INFINITY if os.environ["LIMIT"] == "0" else int(os.environ["LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(self, step, state, extra)
Checkpoints.save = fill
from train.language_model import main
main()
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of text and one of caches."""
    folder = tmp_path_factory.mktemp("shared")
    return commands.write_text(folder / "text"), folder


def run_command(output, shared, command=commands.PROGRAM, **changes):
    text, cache = shared
    return commands.run(command, commands.arguments(output, text, **changes), cache)


def last_line(printed):
    return printed.strip().splitlines()[-1]


# --- signals ---


def test_sigterm_saves_and_the_exit_code_is_143(shared, tmp_path):
    text, cache = shared
    words = commands.arguments(tmp_path, text, steps=3000, save_every=3000)
    process = commands.start(commands.PROGRAM, words, cache)
    end = time.monotonic() + 120
    while len(read_rows(tmp_path / "metrics.jsonl")) < 5:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM == 143, printed
    (saved,) = commands.saved_steps(tmp_path)
    assert 5 <= saved < 3000
    assert f"stopped (SIGTERM) at step {saved} " in printed
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["step"] == saved


# --- hanging ---


def loss(params, frozen, batch, key):
    return jnp.sum(jnp.square(params["w"] - batch["x"]))


OPTIMIZER = optax.sgd(0.1)


class Numbers:
    """Batch number n is the number n; making one of them may take time."""

    def __init__(self, slow=None, seconds=0.0):
        self.position, self.slow, self.seconds = 0, slow, seconds

    def __next__(self):
        self.position += 1
        if self.position == self.slow:
            time.sleep(self.seconds)
        return {"x": np.float32(self.position)}

    def get_state(self):
        return {"position": self.position}


def train(folder, batches, loss=loss, **options):
    step = make_train_step(loss, OPTIMIZER, learning_rate=lambda n: 0.1, ema_decay=0.0)
    limits = loop.Limits(
        steps=8, save_every=100, skips_in_a_row=3, hung_after=options.pop("hung_after", 1.5)
    )
    with Checkpoints(folder) as checkpoints:
        return loop.run(
            create_state({"w": jnp.ones(3)}, {}, OPTIMIZER),
            jax.jit(step),
            batches,
            jax.device_put,
            limits=limits,
            checkpoints=checkpoints,
            meter=Meter(1, 1),
            show_progress=False,
            **options,
        )


def reports(printed):
    """Step, seconds of each report of a step that hangs."""
    line = r"step (\d+), or one queued .*: no result since [-\d]+ [:\d]+, for ([.\d]+) s"
    found = re.findall(line, printed)
    return [(int(step), float(seconds)) for step, seconds in found]


def test_a_step_that_hangs_on_the_device_is_reported(tmp_path, capfd):
    def sleep(x):
        if x == 4:
            time.sleep(5.0)
        return x

    def hanging(params, frozen, batch, key):
        x = jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.float32), batch["x"])
        return loss(params, frozen, {"x": jax.lax.stop_gradient(x)}, key)

    state, reason = train(tmp_path, Numbers(), hanging)
    assert (reason, int(state.step)) == ("finished", 8)  # one process only reports
    printed = capfd.readouterr().err
    found = reports(printed)
    # Every 1.5 s of the five; the device may be as many steps ahead as are in flight.
    assert len(found) >= 2
    assert {step for step, _ in found} <= {2, 3, 4}
    assert 1.5 <= found[0][1] < found[1][1]
    assert found[1][1] >= 3.0
    assert "in sleep" in printed
    assert "loop.py" in printed
    assert "ending this process" not in printed


def test_data_that_does_not_come_is_reported(tmp_path, capfd):
    train(tmp_path, Numbers(slow=5, seconds=3.0))
    printed = capfd.readouterr().err
    assert reports(printed)[0][0] in (3, 4, 5)
    assert "in __next__" in printed


def test_compiling_hooks_and_saving_are_not_hanging(tmp_path, capfd):
    slowly = loop.Hook(3, lambda step, state: time.sleep(2.5))
    train(tmp_path, Numbers(slow=1, seconds=2.5), hooks=[slowly])
    assert not reports(capfd.readouterr().err)


def test_nothing_is_reported_when_switched_off(tmp_path, capfd):
    train(tmp_path, Numbers(slow=5, seconds=0.7), hung_after=None)
    assert not reports(capfd.readouterr().err)


def test_one_of_several_processes_that_hangs_ends(tmp_path):
    program = """
        import sys, time
        from pathlib import Path
        import jax
        from tests.train.test_faults import Numbers, train
        from train import watchdog

        class Pretended:
            process_count = staticmethod(lambda: 2)

        watchdog.jax = Pretended
        train(Path(sys.argv[1]), Numbers(slow=4, seconds=60), hung_after=0.5)
    """
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path],
        env=commands.environment(tmp_path),
        cwd=commands.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == PEER_FAILED == 75
    assert time.monotonic() - begun < 50
    first, second = reports(ended.stderr)
    assert 0.5 <= first[1] < second[1]
    assert second[1] >= 1.0
    assert ended.stderr.count("; ending this process; the stack of every thread:") == 1


# --- a full disk ---


@pytest.mark.parametrize("limit", [60_000, 3000])
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(shared, tmp_path, monkeypatch, limit):
    command = (sys.executable, "-c", FULL_DISK)
    monkeypatch.setenv("LIMIT", str(limit))
    options = {"steps": 16, "log_every": 100}
    code, printed = run_command(tmp_path / "run", shared, command, **options)
    assert code == 1, printed
    message = (
        f"cannot save step 8 in {tmp_path / 'run' / 'checkpoints'}: File too large; the newest "
        "complete checkpoint is step 4, from which the same command goes on when the cause is "
        "removed"
    )
    assert message in printed.splitlines()
    assert "Traceback" not in printed
    assert commands.saved_steps(tmp_path / "run") == [4]
    monkeypatch.setenv("LIMIT", "0")
    code, printed = run_command(tmp_path / "run", shared, command, **options)
    assert code == 0, printed
    assert "at step 4 of 16" in printed
    assert commands.saved_steps(tmp_path / "run") == [12, 16]
    # What the failed save had written is gone.
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"12", "16"}


def test_metrics_that_cannot_be_written_are_a_clear_error(tmp_path):
    rows = JsonLines(tmp_path / "metrics.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rows.write({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*metrics.jsonl: File too large"):
            rows.write({"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        rows.close()


# --- folders that cannot be written ---


def occupied(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file", "File exists"


def inside_a_device(tmp_path):
    return "/dev/null/run", "Not a directory"


def without_checkpoints(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    return tmp_path / "run", "File exists"


def without_metrics(tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    return tmp_path / "run", "Is a directory"


@pytest.mark.parametrize(
    "prepare", [occupied, inside_a_device, without_checkpoints, without_metrics]
)
def test_a_folder_that_cannot_be_written_is_one_line(shared, tmp_path, prepare):
    output, reason = prepare(tmp_path)
    code, printed = run_command(output, shared)
    assert code == 1
    assert "Traceback" not in printed
    assert re.fullmatch(
        rf"cannot write {output}.*: {reason}; make room or give permission there, or choose "
        "another --output",
        last_line(printed),
    )


# --- damaged checkpoints, through the command ---


def test_a_run_of_which_all_checkpoints_are_damaged_says_so(shared, tmp_path):
    code, printed = run_command(tmp_path, shared, steps=8)
    assert code == 0, printed
    assert commands.saved_steps(tmp_path) == [4, 8]
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    before = (tmp_path / "metrics.jsonl").read_text()
    code, printed = run_command(tmp_path, shared, steps=8)
    assert code == 1
    assert "Traceback" not in printed
    assert "no readable checkpoint:" in printed
    assert [line.strip().split(": ")[0] for line in printed.splitlines()[-2:]] == [
        str(tmp_path / "checkpoints" / step) for step in ("8", "4")
    ]
    assert commands.saved_steps(tmp_path) == [4, 8]
    assert (tmp_path / "metrics.jsonl").read_text() == before


# --- through `train.language_model.train` ---


@pytest.fixture
def pretrain(tmp_path, monkeypatch, shared):
    """Train a tiny model in a folder of this name."""
    text, cache = shared
    monkeypatch.setenv("JAXGEN_CACHE", str(cache / "text"))

    def run(name, stop_at=None, **changes):
        config = Config(
            output=tmp_path / name, data=text, model="tiny", precision="float32", context=32,
            batch_size=4, warmup_steps=2, held_out=0.2, log_every=1, save_every=100,
            validate_every=0, **changes,
        )  # fmt: skip
        stop = lambda row: row["step"] == stop_at and signal.raise_signal(signal.SIGTERM)
        return language_model.train(config, on_row=stop, show_progress=False)

    return run


def test_another_number_of_devices_goes_on_alike(pretrain):
    straight = pretrain("straight", steps=8, devices=1)
    part = pretrain("parts", stop_at=2, steps=8, devices=1)
    assert 2 < part.step < 8
    resumed = pretrain("parts", steps=8, devices=2, fsdp=2)
    assert (resumed.first_step, resumed.step, resumed.devices) == (part.step, 8, 2)
    losses = [[row["loss"] for row in result.rows] for result in (resumed, straight)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    largest = max(resumed.state.params.values(), key=lambda array: array.size)
    assert largest.addressable_shards[0].data.size * 2 == largest.size
    recorded = json.loads((resumed.folder / "config.json").read_text())
    assert (recorded["devices"], recorded["fsdp"]) == (2, 2)


def test_options_reach_the_loop(pretrain, monkeypatch):
    seen, run_loop = [], loop.run
    remember = lambda *args, limits, **options: (
        seen.append(limits.hung_after) or run_loop(*args, limits=limits, **options)
    )
    monkeypatch.setattr(loop, "run", remember)
    assert pretrain("run", steps=3, devices=1, spike_factor=1.5).state.average_norm > 0
    pretrain("run", steps=3, devices=1, spike_factor=1.5, hung_after=None)  # may be changed
    assert seen == [600.0, None]
    with pytest.raises(ConfigChangedError, match=r"spike_factor: 1.5 before, 0.0 now"):
        pretrain("run", steps=3, devices=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spike_factor": -1.0}, "spike_factor must be at least 0"),
        ({"spike_factor": 0.9}, "spike_factor must be more than 1, or 0, got spike_factor=0.9"),
        ({"spike_factor": np.inf}, "spike_factor must be finite"),
        ({"hung_after": 0.5}, "hung_after must be at least 1"),
    ],
)
def test_refuses_options(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
