"""Generated problems as rows of tokens, a table that is made once.

What takes long to make is kept in the cache on disk (`JAXGEN_CACHE`, or else `~/.cache/jaxgen`):
200,000 Sudokus take 12 minutes of a processor core.

A row is a prompt, padded with spaces to the longest of its task and levels, then the solution, then
the end of the text up to the end of the row. All prompts are so equally long, and answers begin at
one place. Models that see blocks learn whole ones: they answer whole ones, too.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Self

import numpy as np
from jaxtyping import Int32

from train.cached_arrays import cache_folder, read_cache, write_cache
from train.problems import EOS, Problem, Verdict, Vocabulary, arithmetic, sudoku
from train.rows import Rows

TASKS = ("arithmetic", "sudoku")
_SUDOKU_CELLS = 81
_CHUNK = 64
_WORTH_A_FILE = 10.0
"""Seconds of making from which on problems are kept on disk."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many tokens a task takes.

    Attributes:
        prompt: tokens of a prompt, padded.
        answer: tokens of an answer with the end of the text.
    """

    prompt: int
    answer: int

    @classmethod
    def of(cls, task: str, levels: Sequence[int], block_length: int = 1) -> Self:
        """Returns the layout that fits all problems of these levels.

        Args:
            task: "arithmetic" or "sudoku".
            levels: of the task.
            block_length: rows are whole blocks of so many tokens.

        Raises:
            ValueError: an unknown task, a level that it does not have, or one twice.
        """
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        known = arithmetic.LEVELS if task == "arithmetic" else sudoku.LEVELS
        wrong = [level for level in levels if level not in known]
        if wrong or not levels:
            allowed = ", ".join(map(str, known))
            raise ValueError(f"levels of {task} must be some of {allowed}, got {tuple(levels)}")
        if len(set(levels)) < len(levels):
            raise ValueError(f"levels must be different ones, got {tuple(levels)}")
        if task == "sudoku":
            prompt = answer = _SUDOKU_CELLS
        else:
            prompt, answer = 5 * max(levels) + 1, 18 * max(levels) + 6
        return cls(prompt, answer + -(prompt + answer) % block_length)


@dataclasses.dataclass(frozen=True)
class Table:
    """Problems and their rows.

    Attributes:
        problems: of one task, perhaps of several levels.
        layout: where prompts end.
        tokens: the rows.
    """

    problems: Sequence[Problem]
    layout: Layout
    tokens: Int32[np.ndarray, "problems tokens"]

    @property
    def prompts(self) -> Int32[np.ndarray, "problems prompt"]:
        """The padded prompts."""
        return self.tokens[:, : self.layout.prompt]

    def rows(self) -> Rows:
        """Returns what to learn from: the answers and the end of the text after them."""
        count, length = self.tokens.shape
        answer = np.broadcast_to(np.arange(length) >= self.layout.prompt, self.tokens.shape)
        return Rows(self.tokens, answer, np.full(count, length, np.int32))


def make_table(
    task: str,
    levels: Sequence[int],
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    workers: int = 0,
    block_length: int = 1,
) -> Table:
    """Makes problems, equally many of each level; short ones may occur more than once.

    Args:
        task: "arithmetic" or "sudoku".
        levels: of the task; problems take turns.
        count: number of problems.
        split: "train", "validation" or "test"; no problem is in two.
        seed: other seeds make other problems of the split.
        workers: processes; 0 makes them in this one.
        block_length: rows are whole blocks of so many tokens.

    Raises:
        ValueError: an argument out of range.
    """
    return _table(task, tuple(levels), count, split, seed, workers, block_length)


@functools.lru_cache(maxsize=4)  # an experiment trains many models on the same problems
def _table(
    task: str,
    levels: tuple[int, ...],
    count: int,
    split: str,
    seed: int,
    workers: int,
    block_length: int,
) -> Table:
    """Makes a table, or returns the one that was made before."""
    layout = Layout.of(task, levels, block_length)
    if count < 1:
        raise ValueError(f"count must be positive, got {count}")
    problems = _problems(task, levels, count, split, seed, workers)
    return Table(problems, layout, rows_of(problems, layout))


def _problems(
    task: str, levels: tuple[int, ...], count: int, split: str, seed: int, workers: int
) -> list[Problem]:
    """Returns problems, from the disk if making them took long before."""
    name = "-".join(map(str, ("problems", task, *levels, split, seed, count)))
    path = cache_folder(None) / f"{name}.npz"
    recipe = json.dumps({"numpy": np.__version__, "code": _code()})
    found = read_cache(path, recipe, functools.partial(_from_arrays, task, count))
    if found is not None:
        return found
    started = time.monotonic()
    make = functools.partial(_make, task, levels, split, seed)
    if workers:
        # Not forked: JAX has threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            problems = list(pool.map(make, range(count), chunksize=_CHUNK))
    else:
        problems = [make(number) for number in range(count)]
    if time.monotonic() - started > _WORTH_A_FILE:
        texts = {
            name: np.array([getattr(problem, name).encode() for problem in problems])
            for name in ("prompt", "solution")
        }
        levels_of = np.array([problem.level for problem in problems], np.uint8)
        write_cache(path, recipe, {"level": levels_of} | texts)
    return problems


def _from_arrays(task: str, count: int, arrays: Mapping[str, np.ndarray]) -> list[Problem]:
    """Returns the problems of a cache."""
    columns = [arrays[name].tolist() for name in ("level", "prompt", "solution")]
    if {len(column) for column in columns} != {count}:
        raise ValueError(f"it does not hold {count} problems")
    return [
        Problem(task, level, prompt.decode(), solution.decode())
        for level, prompt, solution in zip(*columns, strict=True)
    ]


@functools.cache
def _code() -> str:
    """Returns a digest of the code that makes problems: what other code made is not taken."""
    files = importlib.resources.files("train.problems").iterdir()
    sources = {file.name: file.read_bytes() for file in files if file.name.endswith(".py")}
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()


def rows_of(problems: Sequence[Problem], layout: Layout) -> Int32[np.ndarray, "problems tokens"]:
    """Returns problems as rows of tokens."""
    vocabulary = Vocabulary()
    rows = np.full((len(problems), layout.prompt + layout.answer), EOS, np.int32)
    for row, problem in zip(rows, problems, strict=True):
        text = problem.prompt.ljust(layout.prompt) + problem.solution
        row[: len(text)] = vocabulary.encode(text)
    return rows


def verdict(problem: Problem, answer: np.ndarray) -> Verdict:
    """Checks the tokens of an answer."""
    verify = arithmetic.verify if problem.task == "arithmetic" else sudoku.verify
    return verify(problem.prompt, Vocabulary().decode(answer))


def _make(task: str, levels: tuple[int, ...], split: str, seed: int, number: int) -> Problem:
    """Makes one problem of a table."""
    make = arithmetic.arithmetic if task == "arithmetic" else sudoku.sudoku
    turn, place = divmod(number, len(levels))
    return make(levels[place], turn, seed, split)
