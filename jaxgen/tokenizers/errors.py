"""Errors of the library as short ones of ours."""

import contextlib
from collections.abc import Iterator
from typing import Any

_MOST_LETTERS = 200


@contextlib.contextmanager
def refusing(source: str, problem: str) -> Iterator[None]:
    """Turns what the library raises, also where it panics, into a short ValueError."""
    try:
        yield
    except BaseException as error:
        # The library raises nothing more specific than Exception, and a panic is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{source}: {problem}: {short(error)}") from error


def short(value: Any) -> str:
    """What an error shows of a value."""
    text = str(value) if isinstance(value, BaseException) else repr(value)
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 3] + "..."
