"""Files to texts, one at a time, each with its name: plain text, JSON lines, Parquet."""

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgen.checkpoints import parse_json_object
from train.corpus.damage import DamagedDataError, OnDamage, not_utf8

_ROWS_AT_ONCE = 64  # of Parquet: few, because a row may be a book
_BUFFER = 2**20  # bytes; without one pyarrow reads whole columns of row groups


def read_text(path: Path, name: str, on_damage: OnDamage) -> Iterator[tuple[str, str]]:
    """Reads a file that is one text, in UTF-8, perhaps with a byte order mark.

    Args:
        path: the file.
        name: what to call it.
        on_damage: gets a `DamagedDataError`, and may raise it.

    Yields:
        The name and the text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        on_damage(DamagedDataError(f"{name} cannot be read: {error}"))
    except UnicodeDecodeError as error:
        on_damage(not_utf8(name, error))
    else:
        yield name, text


def read_json_lines(
    path: Path, name: str, field: str, on_damage: OnDamage
) -> Iterator[tuple[str, str]]:
    """Reads a file with a JSON object a line, in UTF-8. Blank lines are passed over.

    Args:
        path: the file.
        name: what to call it.
        field: the field of the objects that has the text.
        on_damage: gets a `DamagedDataError` for every line without text, and may raise it.

    Yields:
        The name with the number of the line, from 1, and the text.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{name}, line {number}"
                try:
                    text = _field(line, place, field, first=number == 1)
                except DamagedDataError as error:
                    on_damage(error)
                else:
                    yield place, text
    except OSError as error:
        on_damage(DamagedDataError(f"{name} cannot be read: {error}"))


def read_parquet(
    path: Path, name: str, column: str, on_damage: OnDamage
) -> Iterator[tuple[str, str]]:
    """Reads a column of a Parquet file.

    Changed bytes inside a text are noticed if the file was written with checksums of its pages.

    Args:
        path: the file.
        name: what to call it.
        column: the column that has the text.
        on_damage: gets a `DamagedDataError` for every row without text, or for the rest of the
            file, and may raise it.

    Yields:
        The name with the number of the row, from 0, and the text.

    Raises:
        ImportError: pyarrow is not installed.
    """
    cells = _cells(path, name, column)
    for row in itertools.count():
        try:
            cell = next(cells, None)
        except DamagedDataError as error:
            on_damage(error)
            return
        if cell is None:
            return
        place = f"{name}, row {row}"
        try:
            text = _cell_text(cell, place)
        except DamagedDataError as error:
            on_damage(error)
        else:
            yield place, text


def pyarrow_library() -> Any:
    """Returns the module `pyarrow`, with `pyarrow.parquet` loaded.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(
            'reading Parquet needs the package pyarrow: pip install "jaxgen[parquet]"'
        ) from error


def _field(line: bytes, place: str, field: str, first: bool) -> str:
    """The text in a line."""
    try:
        decoded = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from error
    try:
        values = parse_json_object(decoded, place)
    except ValueError as error:
        raise DamagedDataError(str(error)) from error
    if field not in values:
        raise DamagedDataError(f"{place} has no field {field!r}, only {', '.join(values)}")
    return _checked(values[field], place)


def _cells(path: Path, name: str, column: str) -> Iterator[Any]:
    """The cells of a column, as pyarrow's scalars; a damaged file raises when that shows."""
    library, row = pyarrow_library(), 0
    try:
        with library.parquet.ParquetFile(
            path, buffer_size=_BUFFER, page_checksum_verification=True
        ) as file:
            columns = file.schema_arrow.names
            if column not in columns:
                raise DamagedDataError(
                    f"{name} has no column {column!r}, only {', '.join(columns)}"
                )
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
                for cell in batch.column(0):
                    yield cell
                    row += 1
    except DamagedDataError:
        raise
    except (OSError, ValueError, library.ArrowException) as error:
        raise DamagedDataError(f"{name} cannot be read from row {row} on: {error}") from error


def _cell_text(cell: Any, place: str) -> str:
    """The text in a cell."""
    try:
        return _checked(cell.as_py(), place)
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from error


def _checked(value: Any, place: str) -> str:
    """A value that must be a text."""
    if not isinstance(value, str):
        raise DamagedDataError(f"{place} must hold a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell such a half: "\ud800"
        raise DamagedDataError(
            f"{place} holds half of a surrogate pair at letter {error.start}"
        ) from error
    return value
