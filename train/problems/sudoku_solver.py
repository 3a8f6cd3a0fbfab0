"""A Sudoku solver on bits, for making Sudokus fast: it finds one solution, or counts them.

For each digit, the cells that may hold it are the bits of one integer, so that a few operations
find all cells with one candidate. They are filled together; only if there are none, the candidates
of a cell are tried.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence

DIGITS = "123456789"
ROWS = tuple(tuple(range(first, first + 9)) for first in range(0, 81, 9))
COLUMNS = tuple(zip(*ROWS, strict=True))
BOXES = tuple(
    tuple(cell for row in ROWS[top : top + 3] for cell in row[left : left + 3])
    for top, left in itertools.product((0, 3, 6), repeat=2)
)
"""The cells, 0 to 80 row by row, of each row, column and box."""

type Planes = list[int]
"""For each digit, the cells that hold it or may hold it, as bits."""

_ALL = 2**81 - 1
_IN_ORDER = (range(9),) * 81


def bits(cells: Iterable[int]) -> int:
    """Writes a set of cells as the bits of an integer.

    Args:
        cells: From 0 to 80, in any order, also repeatedly.

    Returns:
        The integer.
    """
    return functools.reduce(operator.or_, (1 << cell for cell in cells), 0)


def _stays(cell: int) -> int:
    """The cells that may hold a digit once it is placed in a cell: all but the cell's 20 peers."""
    units = (unit for unit in (*ROWS, *COLUMNS, *BOXES) if cell in unit)
    return _ALL ^ bits(peer for unit in units for peer in unit if peer != cell)


_STAYS = tuple(_stays(cell) for cell in range(81))


def parse_grid(text: str) -> Planes:
    """Reads a grid.

    Args:
        text: 81 characters row by row, digits from 1 and ".".

    Returns:
        For each digit, the cells that hold it.

    Raises:
        ValueError: If the text is no such grid.
    """
    if len(text) != 81 or not set(text) <= {*DIGITS, "."}:
        raise ValueError(f"a grid must be 81 characters from 1 to 9 and '.', got {text[:90]!r}")
    return [bits(cell for cell in range(81) if text[cell] == digit) for digit in DIGITS]


def write_grid(planes: Planes) -> str:
    """Writes a grid as `parse_grid` reads it.

    Args:
        planes: For each digit, the cells that hold it.

    Returns:
        81 characters.
    """
    characters = ["."] * 81
    for digit, plane in zip(DIGITS, planes, strict=True):
        while plane:
            characters[_lowest(plane)] = digit
            plane &= plane - 1
    return "".join(characters)


def solutions(given: Planes, orders: Sequence[Sequence[int]] = _IN_ORDER) -> Iterator[Planes]:
    """Finds all solutions, one after the other.

    Args:
        given: For each digit, the cells that hold it.
        orders: For each cell, the order in which digits (from 0) are tried where that is needed.

    Yields:
        For each digit, the 9 cells that hold it.
    """
    planes = [_common_stays(plane) for plane in given]
    if any(held & ~plane for held, plane in zip(given, planes, strict=True)):
        return  # two peers hold one digit
    yield from _search(planes, _ALL ^ functools.reduce(operator.or_, given), orders)


def count_solutions(grid: str, limit: int = 2) -> int:
    """Counts the solutions of a Sudoku.

    Args:
        grid: As for `parse_grid`.
        limit: Where to stop counting.

    Returns:
        The number of solutions, or `limit` if there are more.

    Raises:
        ValueError: If the grid cannot be read.
    """
    return sum(1 for _ in itertools.islice(solutions(parse_grid(grid)), limit))


def _search(planes: Planes, empty: int, orders: Sequence[Sequence[int]]) -> Iterator[Planes]:
    """Fills the empty cells in all ways; `planes` holds candidates and is overwritten.

    A filled cell may stay in the planes of other digits: once a row is full, all its digits are
    placed, and each has left the other cells of the row.
    """
    while empty:
        one = two = three = four = 0  # cells with at least so many candidates
        for plane in planes:
            four |= three & plane
            three |= two & plane
            two |= one & plane
            one |= plane
        if empty & ~one:
            return
        single = empty & ~two
        if not single:
            break
        for digit, plane in enumerate(planes):
            if fits := single & plane:
                plane &= _common_stays(fits)
                if fits & ~plane:  # two peers have this one candidate
                    return
                planes[digit] = plane
        empty ^= single
    else:
        yield planes
        return
    cell = _lowest(empty & ~three or empty & ~four or empty)
    bit = 1 << cell
    for digit in orders[cell]:
        if planes[digit] & bit:
            branch = planes.copy()
            branch[digit] &= _STAYS[cell]
            yield from _search(branch, empty ^ bit, orders)


def _common_stays(cells: int) -> int:
    """The cells that may hold a digit once it is placed in all of these."""
    result = _ALL
    while cells:
        result &= _STAYS[_lowest(cells)]
        cells &= cells - 1
    return result


def _lowest(cells: int) -> int:
    """The first cell of a set."""
    return (cells & -cells).bit_length() - 1
