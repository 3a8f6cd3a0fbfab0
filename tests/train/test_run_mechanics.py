"""What surrounds the steps of a run: its folder, its lock, its hooks, its clock, its export."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import distributed, run_folder
from train.language_model_config import Config
from train.metrics import OutputError
from train.run import Hook, Plan, as_command, carry_out, needs_export
from train.run_folder import FolderError, claim, reserved, steps_of_hooks, write_steps_of_hooks

STEPS = 4
LOCKING = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


class Numbers:
    """Batch number n is the number n."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return {"x": np.full(4, self.position, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


PLAN = Plan(
    title="three numbers",
    skeleton=None,
    shapes={"w": jax.ShapeDtypeStruct((3,), jnp.float32)},
    make=lambda: {"w": jnp.ones(3)},
    trained=frozenset({"w"}),
    loss=lambda params, frozen, batch, key: jnp.sum(params["w"] ** 2) * jnp.mean(batch["x"]),
    optimizer=optax.sgd,
)


def config(folder, **changes):
    settings = {
        "output": folder, "steps": STEPS, "warmup_steps": 0, "batch_size": 4, "devices": 1,
        "log_every": 1, "save_every": 2,
    }  # fmt: skip
    return Config(**(settings | changes))


def run(folder, hooks=(), on_row=None, started=None, **changes):
    return carry_out(
        config(folder, **changes),
        PLAN,
        Numbers(),
        hooks=[Hook(every, hook) for every, hook in hooks],
        on_row=on_row,
        started=started,
        show_progress=False,
    )


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


# --- one run at a time ---


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path, capsys):
    def meet(row):
        with pytest.raises(FolderError, match=f"another run is at work in {tmp_path}; wait for"):
            run(tmp_path)
        raise RuntimeError("met")

    with pytest.raises(RuntimeError, match="met"):
        run(tmp_path, on_row=meet)
    assert run(tmp_path).stopped == "finished"
    assert names(tmp_path).count(".train.lock") == 0
    with reserved(tmp_path), pytest.raises(SystemExit, match="another run is at work"):
        as_command(lambda: run(tmp_path).stopped)


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    lock = tmp_path / ".train.lock"
    command = [sys.executable, "-c", LOCKING, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(FolderError, match="another run"), reserved(tmp_path):
            pytest.fail("two at once")
        other.kill()
        other.wait()
    assert lock.exists()
    with reserved(tmp_path):
        pass
    assert not names(tmp_path)


def test_a_lock_that_its_owner_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    lock, flock, calls = tmp_path / ".train.lock", fcntl.flock, []

    def late(file, how):
        calls.append(how)
        if len(calls) < 3:
            lock.unlink()
        if len(calls) == 2:
            lock.write_bytes(b"")  # a third run made its own
        flock(file, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with reserved(tmp_path):
        assert len(calls) == 3
        monkeypatch.undo()
        with pytest.raises(FolderError, match="another run"), reserved(tmp_path):
            pytest.fail("two at once")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch, number):
    def unsupported(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.fcntl, "flock", unsupported)
    with reserved(tmp_path):
        pass
    assert not names(tmp_path)


def test_other_errors_of_locking_are_reported(tmp_path, monkeypatch):
    def fail(file, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_folder.fcntl, "flock", fail)
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}: Input"), reserved(tmp_path):
        pytest.fail("no lock")


# --- folders of others ---


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"model_type": "llama", "hidden_size": 4096}'}, "is not that of a run"),
        ({"config.json": '{"seed": 1, "steps": 9}', "model.safetensors": "x"}, "choose another"),
        ({"config.json": "{}", "checkpoints/5/state": "x"}, "config.json that is not"),
        ({"config.json": "["}, "cannot be resumed: .*config.json: not valid JSON"),
        ({"export/model.safetensors": "x"}, "holds export but no config.json"),
        ({"samples/1.png": "x", "validation.jsonl": "x"}, "samples and validation.jsonl but no"),
        ({"metrics.jsonl": "x"}, "holds metrics.jsonl but no config.json"),
    ],
)
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = names(tmp_path)
    with pytest.raises(FolderError, match=message):
        run(tmp_path)
    assert names(tmp_path) == before
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_empty_folders_and_a_run_that_made_no_step_are_taken(tmp_path):
    (tmp_path / "samples").mkdir()
    claim(config(tmp_path, seed=1))
    claim(config(tmp_path, seed=2))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2


# --- folders that processes do not share ---


class Peer:
    """Pretends to be one of two processes; `sees` is whether the other one sees a file."""

    def __init__(self, monkeypatch, index, sees):
        self.sees = sees
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(distributed.multihost_utils, "process_allgather", self.gather)
        monkeypatch.setattr(distributed.multihost_utils, "sync_global_devices", lambda name: None)

    def gather(self, number):
        if number.dtype != np.bool_:
            return np.stack([number, number])
        self.asked = getattr(self, "asked", 0) + 1  # first whether the folder is free
        return np.stack([number, np.bool_(self.sees or self.asked == 1)])


def test_processes_that_share_a_folder_use_it(tmp_path, monkeypatch):
    Peer(monkeypatch, 0, sees=True)
    with reserved(tmp_path):
        assert names(tmp_path) == [".train.lock"]
    assert not names(tmp_path)


@pytest.mark.parametrize(("index", "sees"), [(0, False), (1, True)])
def test_processes_that_do_not_share_a_folder_are_refused(tmp_path, monkeypatch, index, sees):
    Peer(monkeypatch, index, sees)  # as process 1 it does not see what process 0 has written
    message = "must be a folder that all of them share"
    with pytest.raises(FolderError, match=message), reserved(tmp_path):
        pytest.fail("not shared")
    assert not names(tmp_path)


# --- hooks ---


def test_a_hook_that_failed_after_a_save_runs_when_resuming(tmp_path):
    seen = []

    def fail(step, arrays):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, [(1, lambda step, arrays: seen.append(("a", step))), (2, fail)])
    assert seen == [("a", 1), ("a", 2)]
    note = lambda name: lambda step, arrays: seen.append((name, step))
    hooks = [(1, note("a")), (2, note("b"))]
    assert run(tmp_path, hooks).first_step == 2
    assert seen[2:] == [("b", 2), ("a", 3), ("a", 4), ("b", 4)]
    run(tmp_path, hooks)
    assert len(seen) == 6  # a finished run does nothing more


def test_a_hook_that_failed_at_the_end_gets_the_last_weights(tmp_path):
    def fail(step, arrays):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, [(3, lambda step, arrays: step < STEPS or fail(step, arrays))])
    seen = []
    result = run(tmp_path, [(3, lambda step, arrays: seen.append((step, arrays["w"])))])
    assert (result.stopped, result.first_step) == ("finished", STEPS)
    ((step, weights),) = seen
    assert step == STEPS
    np.testing.assert_array_equal(weights, result.arrays["w"])


def test_a_signal_at_the_last_step_only_delays_the_last_hooks(tmp_path):
    seen = []
    stop = lambda row: row["step"] == 1 and signal.raise_signal(signal.SIGTERM)
    hooks = [(5, lambda step, arrays: seen.append(step))]
    first = run(tmp_path, hooks, on_row=stop, steps=2)
    assert (first.step, first.stopped, seen) == (2, "SIGTERM", [])
    assert run(tmp_path, hooks, steps=2).stopped == "finished"
    assert seen == [2]


def test_the_record_of_hooks_is_for_as_many_as_there_are(tmp_path, monkeypatch):
    assert steps_of_hooks(tmp_path, 2) == [0, 0]
    write_steps_of_hooks(tmp_path, [4, 2])
    assert steps_of_hooks(tmp_path, 2) == [4, 2]
    assert steps_of_hooks(tmp_path, 1) == [0]
    monkeypatch.setattr(distributed, "alike", lambda value: False)
    assert steps_of_hooks(tmp_path, 2) == [0, 0]
    monkeypatch.undo()
    (tmp_path / "hooks.json").write_text('{"steps": [4')
    assert steps_of_hooks(tmp_path, 2) == [0, 0]


# --- the clock ---


def test_time_counts_from_where_the_program_says(tmp_path):
    earlier = time.monotonic() - 1000
    result = run(tmp_path, started=earlier, time_limit=999)
    assert (result.step, result.stopped) == (1, "time limit")
    assert result.seconds > 1000


# --- the export ---


@pytest.mark.parametrize(
    ("card", "stopped", "first_step", "needed"),
    [
        ({"steps": 8, "config": {"export_dtype": "float32"}, "more": 1}, "finished", 8, False),
        ({"steps": 8}, "finished", 8, False),
        ({"steps": 8}, "time limit", 8, False),
        ({"steps": 8}, "finished", 7, True),  # its steps were made again
        ({"steps": 8, "config": {"export_dtype": "bfloat16"}}, "finished", 8, True),
        ({"steps": 7, "config": {"export_dtype": "float32"}}, "finished", 8, True),
        ({}, "finished", 8, True),
        (None, "finished", 8, True),
        (None, "SIGTERM", 8, False),
    ],
)
def test_an_export_is_made_if_it_is_not_there_whole(tmp_path, card, stopped, first_step, needed):
    result = SimpleNamespace(folder=tmp_path, step=8, first_step=first_step, stopped=stopped)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"")
    path = tmp_path / "export" / "card.json"
    if card is not None:
        path.write_text(json.dumps(card))
    assert needs_export(config(tmp_path), result) == needed
    path.write_text('{"steps": 8,')
    assert needs_export(config(tmp_path), result) == (stopped != "SIGTERM")
