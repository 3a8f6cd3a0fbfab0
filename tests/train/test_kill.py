"""SIGKILL at 20 moments of checkpointing runs changes no bit of where they end.

Four runs of the real command are killed five times each and started again, two at a time. The
moments are drawn from a seed: four within the start (imports, restoring, compiling), eight at some
time after some step, and eight while a checkpoint is being written.
"""

import hashlib
import json
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.train import commands

STEPS = 48
KILLS = ("step", "save", "start", "save", "step")  # of each run, in an order of its own
RUNS = 4
FORGETFUL = """
import train.corpus
train.corpus.Batches.set_state = lambda self, state: None
from train.language_model import main
main()
"""


def state_hash(output):
    """SHA-256 over all arrays of the last checkpoint in the order of their names."""
    step = commands.saved_steps(output)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(output / "checkpoints" / str(step) / "state")
    digest, arrays = hashlib.sha256(), dict(named(state))
    assert len(arrays) > 80
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return step, digest.hexdigest()


def named(tree, prefix=""):
    """Every array of nested dictionaries and lists by its path."""
    if not isinstance(tree, dict | list | tuple):
        return [] if tree is None else [(prefix, np.asarray(tree))]
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [pair for key, part in parts for pair in named(part, f"{prefix}/{key}")]


def losses(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of text and one of caches."""
    folder = tmp_path_factory.mktemp("shared")
    return commands.write_text(folder / "text"), folder


@pytest.fixture(scope="module")
def undisturbed(shared, tmp_path_factory):
    """Where a run is that was never killed; it fills the caches."""
    text, cache = shared
    output = tmp_path_factory.mktemp("undisturbed")
    code, printed = commands.run(commands.PROGRAM, words(output, text), cache)
    assert code == 0, printed
    return output


def words(output, text):
    return commands.arguments(output, text, steps=STEPS)


class Victim:
    """A run that is killed and started again."""

    def __init__(self, output, shared, generator):
        self.output, (self.text, self.cache) = output, shared
        self.generator = generator

    def kill(self, moment, steps=None):
        """Start, kill at a moment of this kind, some steps on; return whether it was writing."""
        begun, before = time.monotonic(), self.rows_file()
        process = commands.start(commands.PROGRAM, words(self.output, self.text), self.cache)
        if moment == "start":
            end = begun + self.generator.uniform(0, 4)
            wait_for(process, lambda: time.monotonic() > end)
        else:
            first = max(commands.saved_steps(self.output), default=0)
            wait_for(process, lambda: self.rows_file() not in (before, None))
            steps = steps or self.generator.randint(3, 10)
            wait_for(process, lambda: self.rows() >= first + steps)
            if moment == "save":
                wait_for(process, self.unfinished)
            time.sleep(self.generator.uniform(0, 0.04))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        return bool(self.unfinished())

    def finish(self):
        """Start, let it finish, and return where it ended."""
        program = commands.PROGRAM
        code, printed = commands.run(program, words(self.output, self.text), self.cache)
        assert code == 0, printed
        return state_hash(self.output)

    def rows_file(self):
        """Which file the rows are in: each start writes a new one."""
        path = self.output / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def rows(self):
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def unfinished(self):
        return [*(self.output / "checkpoints").glob("*.orbax-checkpoint-tmp")]


def wait_for(process, condition):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.002)


def test_killed_runs_end_with_the_same_bits(undisturbed, shared, tmp_path):
    def attack(number):
        victim = Victim(tmp_path / str(number), shared, random.Random(number))
        moments = victim.generator.sample(KILLS, len(KILLS))
        log = [victim.kill(moment) for moment in moments]
        return log, victim.finish(), losses(victim.output)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(attack, range(RUNS)))
    while_writing = [writing for log, _, _ in results for writing in log]
    assert len(while_writing) == 20
    assert sum(while_writing) >= 5  # these left a folder that is no checkpoint
    expected, expected_losses = state_hash(undisturbed), losses(undisturbed)
    assert expected[0] == STEPS
    assert [end for _, end, _ in results] == [expected] * RUNS
    assert [rows for _, _, rows in results] == [expected_losses] * RUNS
    for number in range(RUNS):  # a start removes what the killed ones left
        assert not Victim(tmp_path / str(number), shared, None).unfinished()


def test_a_run_that_forgets_its_place_in_the_data_ends_elsewhere(undisturbed, shared, tmp_path):
    text, cache = shared
    victim = Victim(tmp_path / "killed", shared, random.Random(0))
    victim.kill("step", steps=9)
    assert commands.saved_steps(victim.output)[-1] in (4, 8)
    shutil.copytree(victim.output, tmp_path / "forgetful")
    program = (sys.executable, "-c", FORGETFUL)
    code, printed = commands.run(program, words(tmp_path / "forgetful", text), cache)
    assert code == 0, printed
    step, digest = state_hash(tmp_path / "forgetful")
    expected = state_hash(undisturbed)
    assert step == expected[0]
    assert digest != expected[1]
    assert victim.finish() == expected  # as it does where it does not forget
