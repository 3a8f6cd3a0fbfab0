"""Two processes train one model: they agree when to stop, die together, and go on where they were.

One run is stopped by a signal, then broken by a SIGKILL, then finished; its losses are those of one
process.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.train import commands
from train import distributed
from train.checkpoint import CheckpointError
from train.language_model import train
from train.language_model_config import Config
from train.loop import STOP_REASONS, stop_flag
from train.metrics import read_rows
from train.run import as_command, mesh_of

STEPS = 160
PATIENCE = 120.0  # seconds; the machine may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    commands.write_text(folder / "text")
    return folder


def options(folder, output):
    return Config(
        output=folder / output, data=folder / "text", model="tiny", precision="float32",
        context=32, batch_size=8, steps=STEPS, warmup_steps=2, learning_rate=3e-3, held_out=0.2,
        log_every=5, save_every=20, validate_every=80, validation_batches=2, fsdp=2,
    )  # fmt: skip


class Pair:
    """The command in two processes of two devices each."""

    def __init__(self, folder, output):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        words = options(folder, output).command().split()[1:]
        environment = commands.environment(folder) | {"JAX_NUM_CPU_DEVICES": "2"}
        together = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
        self.metrics = folder / output / "metrics.jsonl"
        self.processes = [
            subprocess.Popen(
                [sys.executable, *words, *together, str(number)],
                cwd=commands.ROOT, env=environment, stderr=subprocess.PIPE, text=True,
            )
            for number in range(2)
        ]  # fmt: skip

    def wait_for_step(self, step):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.metrics.exists() and any(r["step"] >= step for r in read_rows(self.metrics)):
                return
            assert all(process.poll() is None for process in self.processes), self.messages()
            time.sleep(0.02)
        pytest.fail(f"step {step} was not reached in {PATIENCE} s")

    def codes(self, timeout=PATIENCE):
        self.printed = [process.communicate(timeout=timeout)[1] for process in self.processes]
        return [process.returncode for process in self.processes]

    def messages(self):
        for process in self.processes:
            process.kill()
        return [process.communicate()[1][-2000:] for process in self.processes]


def test_two_processes_stop_die_and_finish_together(folder):
    # A signal to one of them stops both after the same step, which is saved.
    pair = Pair(folder, "two")
    pair.wait_for_step(20)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.codes() == [128 + signal.SIGTERM] * 2
    stopped = commands.saved_steps(folder / "two")[-1]
    assert 20 <= stopped < STEPS
    assert f"stopped (SIGTERM) at step {stopped}" in pair.printed[0]
    assert pair.printed[1].count("stopped") == 0  # one of them talks
    rows = read_rows(folder / "two" / "metrics.jsonl")
    assert rows[-1]["step"] == stopped
    assert not (folder / "two" / "export").exists()

    # One is killed: the other says so and ends within a minute.
    pair = Pair(folder, "two")
    pair.wait_for_step(stopped + 10)
    pair.processes[1].kill()
    killed = time.monotonic()
    code, _ = pair.codes()
    assert time.monotonic() - killed < 60
    assert code not in (0, 128 + signal.SIGTERM)
    assert "resuming" in pair.printed[0]
    assert "another task died" in pair.printed[0] or "another process went away" in pair.printed[0]

    # The same command again finishes the run.
    pair = Pair(folder, "two")
    assert pair.codes() == [0, 0], pair.printed
    assert (folder / "two" / "export" / "card.json").exists()

    one = train(options(folder, "one"), show_progress=False)
    assert (one.step, one.devices) == (STEPS, 4)
    losses = {row["step"]: row["loss"] for row in read_rows(folder / "two" / "metrics.jsonl")}
    expected = {row["step"]: row["loss"] for row in one.rows}
    # Rows after a stop are means over fewer steps.
    whole = [step for step in expected if step - stopped not in range(1, 5)]
    assert len(whole) >= STEPS // 5 - 1
    np.testing.assert_allclose(
        [losses[step] for step in whole], [expected[step] for step in whole], rtol=1e-4, atol=1e-4
    )
    checks = [read_rows(folder / name / "validation.jsonl") for name in ("two", "one")]
    assert [row["step"] for row in checks[0]] == [80, 160]
    np.testing.assert_allclose(checks[0][-1]["validation"], checks[1][-1]["validation"], atol=1e-3)


def test_stop_flags_name_every_reason():
    batch = {"tokens": np.zeros((3, 8), np.int32)}
    for reason in STOP_REASONS:
        flag = stop_flag(reason, batch)
        assert flag.shape == (3,)
        assert STOP_REASONS[flag.max()] == reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 2}, "need --coordinator HOST:PORT.*got processes=2, process=0 and none"),
        ({"process": 1}, "got processes=1, process=1 and none"),
        (
            {"coordinator": "localhost:1", "processes": 2, "process": 2},
            "process must be from 0 to processes - 1, got process=2 and processes=2",
        ),
    ],
)
def test_refuses_processes(changes, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(Config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 3}, "must divide the number of devices, got fsdp=1, tensor=3, context=1 and 4"),
        ({"batch_size": 6, "tensor": 1}, "got batch_size=6 and 4 devices"),
    ],
)
def test_refuses_meshes(changes, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(Config(**changes))
    assert mesh_of(Config(batch_size=6, tensor=2)).shape["data"] == 2


def test_a_context_of_which_devices_get_unequal_parts_is_refused(folder):
    config = Config(
        output=folder / "odd", data=folder / "text", context=33, context_parallel=2, devices=2
    )
    with pytest.raises(ValueError, match="got context=33 and context_parallel=2"):
        train(config, show_progress=False)


class EndedError(Exception):
    pass


def of_a_peer():
    """A save that failed because another process is gone."""
    error = CheckpointError("cannot save step 5")
    error.__cause__ = jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection reset")
    return error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo: Connection closed by peer [::1]:1"),
            distributed.PEER_FAILED,
            "process 0 of 2: another process went away.*newest checkpoint",
        ),
        (ValueError("some fault"), 1, "Traceback.*: some fault\nprocess 0 of 2 failed"),
        (CheckpointError("disk full"), 1, "^disk full\nprocess 0 of 2 failed"),
        (of_a_peer(), distributed.PEER_FAILED, "another process went away"),
    ],
)
def test_a_failing_process_does_not_wait_for_the_others(monkeypatch, capsys, error, code, words):
    def leave(code):
        raise EndedError(code)

    def fail():
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(EndedError) as ended:
        as_command(fail)
    assert ended.value.args == (code,)
    assert re.search(words, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize("what", ["options", "data", None])
def test_processes_with_other_options_or_data_are_refused(monkeypatch, what):
    asked = iter(["options", "data"])
    gather = lambda number: np.stack([number, number + np.uint32(next(asked) == what)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    call = lambda: distributed.require_alike({"seed": 0, "process": 1}, {"corpus": "a"})
    if what:
        with pytest.raises(ValueError, match=f"the same {what}, got different ones"):
            call()
    else:
        call()


def test_alone_what_is_true_here_is_true_everywhere():
    assert distributed.everywhere(True)
    assert not distributed.everywhere(False)


def test_alone_errors_are_raised_as_they_are():
    def fail():
        raise ValueError("some fault")

    with pytest.raises(ValueError, match="some fault"):
        distributed.ending_together(fail)
