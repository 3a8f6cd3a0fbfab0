"""Damaged data: refused by name and number, or handed to a function that may pass over it."""

from collections.abc import Callable


class DamagedDataError(ValueError):
    """A file, line or row that holds no text; the message names it."""


type OnDamage = Callable[[DamagedDataError], object]


def refuse(error: DamagedDataError) -> None:
    """Raises the error."""
    raise error


def not_utf8(name: str, error: UnicodeDecodeError) -> DamagedDataError:
    """Describes bytes that are no UTF-8, and guesses the encodings that give themselves away."""
    start = bytes(error.object[:4])
    marks = {
        "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
        "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
    }
    guess = next((name for name, mark in marks.items() if start.startswith(mark)), None)
    hint = f"; it looks like {guess}" if guess else ""
    return DamagedDataError(f"{name} is not UTF-8: {error.reason} at byte {error.start}{hint}")
