"""Sudokus with one solution each, made from scratch, and an exact check of answers.

    prompt    81 characters, row by row without separators: digits, and "." for an empty cell
    solution  the filled grid, 81 digits in the same order

A level is a number of empty cells; how far ahead one must think varies within it.

**Making one.** Three random boxes on the diagonal are completed by a search that tries digits in
random order; not all grids are equally likely. (To permute the rows, columns and digits of one grid
is faster, and always the same grid in disguise.) Then random cells are emptied, all at once. As
long as the solver finds a second solution, one cell in which it differs gets its digit back for
good, and another is emptied.

**Split.** Permuting rows in a band, bands, columns in a stack, stacks or digits, and transposing,
turns a grid into others, up to 1.2e12 in all. `family` is the same for all of them and decides the
split: training sees no grid of the test split, in no disguise either.
"""

import functools
import itertools
import operator
from collections.abc import Sequence

import numpy as np

from train.problems.sudoku_solver import (
    BOXES,
    COLUMNS,
    DIGITS,
    ROWS,
    Planes,
    bits,
    solutions,
    write_grid,
)
from train.problems.vocabulary import Problem, Verdict, check_request, split_of

LEVELS = {1: 20, 2: 30, 3: 40, 4: 46, 5: 50}
"""The levels, and how many cells of the prompt are empty."""

_UNITS = {"row": ROWS, "column": COLUMNS, "box": BOXES}


def sudoku(level: int, number: int, seed: int = 0, split: str = "train") -> Problem:
    """Makes one Sudoku, a function of its arguments and of nothing else.

    Args:
        level: One of `LEVELS`.
        number: Which Sudoku, from 0.
        seed: Not negative; another seed gives other Sudokus of the same split.
        split: One of `SPLITS`. Validation and test take longer: most grids belong to training.

    Returns:
        The problem; its solution is the only one.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_request(level, LEVELS, number, seed, split)
    generator = np.random.default_rng((seed, level, number))
    while True:
        grid = _random_grid(generator)
        solution = write_grid(grid)
        if split_of(family(solution)) == split:
            empty = _choose_empty(grid, LEVELS[level], generator)
            if empty is not None:
                prompt = write_grid([plane & ~empty for plane in grid])
                return Problem("sudoku", level, prompt, solution)


def verify(prompt: str, answer: str) -> Verdict:
    """Checks an answer exactly; garbage raises nothing.

    Args:
        prompt: A grid with empty cells, not necessarily one that `sudoku` makes.
        answer: 81 digits. Any solution is right if the prompt has several.

    Returns:
        `correct` if the answer keeps the givens, and every row, column and box holds 1 to 9.
        There are no steps, so `steps_correct` says the same.
    """
    reason = _find_mistake(prompt, answer)
    return Verdict(not reason, not reason, reason)


def family(solution: str) -> str:
    """Describes a grid by what permuting and transposing cannot change.

    Two rows of a band are a permutation of the digits: what stands in one row goes to what stands
    below it in the other. Its cycle lengths do not depend on the names of digits, the order of
    columns, or which of the rows is first. They are collected over bands, and over stacks likewise.

    Args:
        solution: A filled grid, 81 digits.

    Returns:
        A text. Grids that are the same in disguise have the same text; others nearly always differ.

    Raises:
        ValueError: If the grid is not a solved Sudoku.
    """
    if reason := _find_mistake("." * 81, solution):
        raise ValueError(f"solution must be a solved Sudoku: {reason}")
    sides = []
    for lines in (ROWS, COLUMNS):
        texts = [[solution[cell] for cell in line] for line in lines]
        bands = (texts[:3], texts[3:6], texts[6:])
        sides.append(
            sorted(
                sorted(_cycles(*pair) for pair in itertools.combinations(band, 2)) for band in bands
            )
        )
    return str(sorted(sides))


def _cycles(first: Sequence[str], second: Sequence[str]) -> str:
    """Sorted cycle lengths of the permutation that takes one row to another."""
    following = dict(zip(first, second, strict=True))
    lengths = []
    while following:
        start, current = following.popitem()
        length = 1
        while current != start:
            current = following.pop(current)
            length += 1
        lengths.append(str(length))
    return "".join(sorted(lengths))


def _find_mistake(prompt: str, answer: str) -> str:
    """What is wrong with an answer first; empty if nothing is."""
    for name, text, allowed in (("prompt", prompt, DIGITS + "."), ("answer", answer, DIGITS)):
        if len(text) != 81 or not set(text) <= set(allowed):
            return f"the {name} must be 81 characters of {allowed!r}, got {text[:81]!r}"
    for cell, (given, digit) in enumerate(zip(prompt, answer, strict=True)):
        if given not in (".", digit):
            row, column = divmod(cell, 9)
            return f"row {row + 1}, column {column + 1} must stay {given}, got {digit}"
    for kind, units in _UNITS.items():
        for number, unit in enumerate(units, 1):
            if len({answer[cell] for cell in unit}) != 9:
                return f"{kind} {number} must hold 1 to 9 once each"
    return ""


def _random_grid(generator: np.random.Generator) -> Planes:
    """A filled grid."""
    orders = generator.permuted(np.tile(np.arange(9), (81, 1)), axis=1).tolist()
    given = [0] * 9
    for box in (BOXES[0], BOXES[4], BOXES[8]):  # no two of them share a row or column
        for digit, cell in zip(orders[box[0]], box, strict=True):
            given[digit] |= 1 << cell
    return next(solutions(given, orders))


def _choose_empty(solution: Planes, count: int, generator: np.random.Generator) -> int | None:
    """Cells to empty such that one solution remains; None if the search ends without them."""
    cells = generator.permutation(81).tolist()
    empty, spare = bits(cells[:count]), cells[count:]
    while True:
        found = itertools.islice(solutions([plane & ~empty for plane in solution]), 2)
        other = next((planes for planes in found if planes != solution), None)
        if other is None:
            return empty
        if not spare:
            return None
        differing = functools.reduce(
            operator.or_, (plane ^ twin for plane, twin in zip(solution, other, strict=True))
        )
        back = next(cell for cell in cells if differing >> cell & 1)
        empty ^= 1 << back | 1 << spare.pop()
