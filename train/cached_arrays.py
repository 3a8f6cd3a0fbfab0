"""Arrays that take long to make, kept on disk for the next time."""

import contextlib
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def cache_folder(cache_dir: Path | None) -> Path:
    """The folder of the caches: the one given, else JAXGEN_CACHE, else `~/.cache/jaxgen`."""
    return Path(cache_dir or os.environ.get("JAXGEN_CACHE") or "~/.cache/jaxgen").expanduser()


def read_cache[T](path: Path, recipe: str, build: Callable[[dict[str, np.ndarray]], T]) -> T | None:
    """Reads what `write_cache` wrote.

    Args:
        path: The archive.
        recipe: Everything that the content must depend on.
        build: Makes the result of the arrays by name; it raises if they do not fit.

    Returns:
        The result; None if the archive is absent, of another recipe, or damaged.

    Warns:
        UserWarning: If the archive is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if str(archive["recipe"]) != recipe:
                return None
            return build({name: archive[name] for name in archive.files})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # Damage shows in many ways, and building again cures all of them.
        warnings.warn(f"the cache {path} cannot be used and is built again: {error}", stacklevel=3)
        return None


def write_cache(path: Path, recipe: str, content: Mapping[str, Any]) -> None:
    """Writes a cache in one step, so that processes building at once never see half a file.

    Args:
        path: The archive to write or replace.
        recipe: Everything that the content depends on.
        content: Arrays, or what NumPy makes arrays of, by name.

    Warns:
        UserWarning: If the archive cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            np.savez(file, allow_pickle=False, recipe=np.array(recipe), **content)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"cannot write the cache {path}, it is built again next time: {error}",
            stacklevel=3,
        )
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
