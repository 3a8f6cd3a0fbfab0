"""Files that are either the old ones or the new ones, never half written; JSON that is strict."""

import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file beside `path` and renames it when it is complete and on the disk.

    Args:
        path: the file to create or replace; its folder must exist.
        chunks: the content, in order.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON in one step, and the folder if it is missing.

    Args:
        path: the file to create or replace.
        value: what the module `json` can write.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, [text.encode()])


def parse_json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Parses one JSON object; no key may occur twice at any depth.

    Args:
        text: the document.
        source: what to call it in an error, for example its path.

    Raises:
        ValueError: no JSON, no object, or a repeated key; the message names `source`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key {key!r} occurs twice")
            result[key] = value
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value
