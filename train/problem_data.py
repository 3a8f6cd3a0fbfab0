"""Generated problems as rows of tokens: a table that is made once, and endless batches of it.

A row is a prompt, padded with spaces to the longest of its task and levels, then the solution, then
the end of the text up to the end of the row. All prompts are so equally long, and answers begin at
one place.
"""

import dataclasses
import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Self

import numpy as np
from jaxtyping import Int32

from train.problems import EOS, Problem, Verdict, Vocabulary, arithmetic, sudoku

TASKS = ("arithmetic", "sudoku")
_SUDOKU_CELLS = 81
_CHUNK = 64


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
    def of(cls, task: str, levels: Sequence[int]) -> Self:
        """Returns the layout that fits all problems of these levels.

        Raises:
            ValueError: an unknown task, or a level that it does not have.
        """
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        known = arithmetic.LEVELS if task == "arithmetic" else sudoku.LEVELS
        wrong = [level for level in levels if level not in known]
        if wrong or not levels:
            allowed = ", ".join(map(str, known))
            raise ValueError(f"levels of {task} must be some of {allowed}, got {tuple(levels)}")
        if task == "sudoku":
            return cls(_SUDOKU_CELLS, _SUDOKU_CELLS)
        longest = max(levels)
        return cls(5 * longest + 1, 18 * longest + 6)


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


def make_table(
    task: str,
    levels: Sequence[int],
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    workers: int = 0,
) -> Table:
    """Makes problems, equally many of each level.

    Args:
        task: "arithmetic" or "sudoku".
        levels: of the task; problems take turns.
        count: number of problems.
        split: "train", "validation" or "test"; no problem is in two.
        seed: other seeds make other problems of the split.
        workers: processes; 0 makes them in this one.

    Raises:
        ValueError: an argument out of range.
    """
    layout = Layout.of(task, levels)
    if count < 1:
        raise ValueError(f"count must be positive, got {count}")
    make = functools.partial(_make, task, tuple(levels), split, seed)
    if workers:
        # Not forked: JAX has threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            problems = list(pool.map(make, range(count), chunksize=_CHUNK))
    else:
        problems = [make(number) for number in range(count)]
    return Table(problems, layout, rows_of(problems, layout))


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


class TableBatches:
    """An endless iterator of batches, epoch after epoch, each in another order.

    A batch is a function of the seed and its step, so a checkpoint stores one number. Each has
    `tokens`, int32 (batch, tokens), and `maskable`, True for the answer.

    Args:
        table: the problems.
        batch_size: rows of a batch.
        seed: decides the order.

    Raises:
        ValueError: fewer problems than a batch has rows.
    """

    def __init__(self, table: Table, *, batch_size: int, seed: int):
        if len(table.tokens) < batch_size:
            raise ValueError(
                f"batch_size={batch_size} needs more than {len(table.tokens)} problems"
            )
        self._table, self._batch_size, self._seed, self._step = table, batch_size, seed, 0
        self._maskable = np.arange(table.tokens.shape[1]) >= table.layout.prompt
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def __iter__(self) -> Self:
        return self

    def get_state(self) -> dict[str, int]:
        """Returns the position: the number of batches taken."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a position."""
        self._step = state["step"]

    def __next__(self) -> dict[str, np.ndarray]:
        count = len(self._table.tokens)
        epoch, start = divmod(self._step * self._batch_size, count)
        rows = self._order(epoch)[start : start + self._batch_size]
        if len(rows) < self._batch_size:
            rows = np.concatenate([rows, self._order(epoch + 1)[: self._batch_size - len(rows)]])
        self._step += 1
        tokens = self._table.tokens[rows]
        return {"tokens": tokens, "maskable": np.broadcast_to(self._maskable, tokens.shape)}

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._table.tokens))


def _make(task: str, levels: tuple[int, ...], split: str, seed: int, number: int) -> Problem:
    """Makes one problem of a table."""
    make = arithmetic.arithmetic if task == "arithmetic" else sudoku.sudoku
    turn, place = divmod(number, len(levels))
    return make(levels[place], turn, seed, split)
