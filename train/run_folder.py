"""The folder of a run: for one configuration, kept in `config.json`, and one start at a time."""

import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from jaxgen.checkpoints import parse_json_object, write_atomically, write_json
from train import distributed
from train.metrics import writing
from train.options import Options

_LOCK = ".train.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_OF_EVERY_RUN = frozenset(
    ("batch_size", "learning_rate", "log_every", "save_every", "seed", "steps", "warmup_steps")
)
_WRITTEN = (
    "attention.jsonl", "checkpoints", "export", "metrics.jsonl", "samples", "validation.jsonl",
)  # fmt: skip


class FolderError(ValueError):
    """A folder that this run cannot use."""


class ConfigChangedError(FolderError):
    """A folder holds a run with another configuration."""


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if there is none.

    The lock ends with this process, however it ends. Where the file system has no locks, nothing
    keeps other runs out.

    Raises:
        FolderError: Another run has the folder, or some process of this one sees another folder;
            in every process.
        OutputError: The folder cannot be written.
    """
    lock, free = None, True
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if distributed.first():
            lock = _locked(folder / _LOCK)
            free = lock is not None
    try:
        if not distributed.everywhere(free):
            raise FolderError(
                f"another run is at work in {folder}; wait for its end, or choose another --output"
            )
        with writing(folder):
            shared = distributed.shared(folder)
        if not shared:
            raise FolderError(
                f"processes see different folders, this one {folder}; --output must be a folder "
                "that all of them share"
            )
        yield
    finally:
        if lock:
            (folder / _LOCK).unlink(missing_ok=True)  # while it is locked: see `_locked`
            lock.close()


def _locked(path: Path) -> BinaryIO | None:
    """Return a file that nobody else has locked until it is closed; None if somebody has."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return file
            file.close()
            raise
        file.close()  # whoever had it has removed it since it was opened


def claim(config: Options, *, write: bool = True) -> Path:
    """Make the run's folder, or check that the run in it had the same configuration.

    Options in `config.may_change` may differ; the file then holds the new ones. An option that the
    file does not name, being newer, had its default. A run that never made a step binds nobody.

    Args:
        config: The options.
        write: Whether to write the file; one process of several does.

    Returns:
        The folder.

    Raises:
        ConfigChangedError: An option that decides the updates differs; the message lists old and
            new values.
        FolderError: `config.json` is not that of a run, or is missing beside what a run writes.
    """
    folder, path = config.output, config.output / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    new = to_json(config)
    if path.exists():
        try:
            old = parse_json_object(path.read_bytes(), str(path))
        except ValueError as error:
            raise FolderError(f"{folder} cannot be resumed: {error}") from error
        if not old.keys() >= _OF_EVERY_RUN:
            raise FolderError(
                f"{folder} holds a config.json that is not that of a run; choose another --output"
            )
        fixed = sorted((old.keys() | new.keys()) - config.may_change)
        was = _defaults(config) | old
        differing = [
            name for name in fixed if _made_steps(folder) and was.get(name) != new.get(name)
        ]
        if differing:
            lines = [
                f"  {name}: {was.get(name, '(absent)')!r} before, {new.get(name, '(absent)')!r} now"
                for name in differing
            ]
            raise ConfigChangedError(
                f"{folder} holds a run with another configuration:\n"
                + "\n".join(lines)
                + "\nrepeat its options to resume it, or choose another --output"
            )
    elif found := [name for name in _WRITTEN if _holds_something(folder / name)]:
        raise FolderError(
            f"{folder} holds {' and '.join(found)} but no config.json, so it is not a run of this "
            "script; choose another --output"
        )
    if write:
        write_json(path, new)
    return folder


def _made_steps(folder: Path) -> bool:
    """Whether there is anything in the folder that a new run could damage."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return any(checkpoints.glob("[0-9]*")) or (metrics.is_file() and metrics.stat().st_size > 0)


def _holds_something(path: Path) -> bool:
    """Whether there is a file that is not empty, or a folder that is not."""
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def steps_of_hooks(folder: Path, count: int) -> list[int]:
    """Return after which step each of so many hooks last ran; 0 where that is not known.

    All processes get the same, whatever they see.
    """
    path = folder / "hooks.json"
    try:
        steps = parse_json_object(path.read_bytes(), str(path))["steps"]
    except (OSError, ValueError, KeyError):
        steps = []
    same = distributed.alike(steps)  # in every process, whatever it sees
    return steps if same and isinstance(steps, list) and len(steps) == count else [0] * count


def write_steps_of_hooks(folder: Path, steps: Sequence[int]) -> None:
    """Write what `steps_of_hooks` returns.

    Raises:
        OutputError: The file cannot be written.
    """
    with writing(folder / "hooks.json"):
        write_atomically(folder / "hooks.json", [(json.dumps({"steps": steps}) + "\n").encode()])


def to_json(config: Options) -> dict[str, Any]:
    """Return the configuration without its folder, as JSON can hold it."""
    values = dataclasses.asdict(config)  # pyright: ignore[reportArgumentType]
    del values["output"]
    return {name: _plain(value) for name, value in values.items()}


def _defaults(config: Options) -> dict[str, Any]:
    """Return the defaults of options that have one, as JSON can hold them."""
    fields = dataclasses.fields(config)  # pyright: ignore[reportArgumentType]
    return {f.name: _plain(f.default) for f in fields if f.default is not dataclasses.MISSING}


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return value.as_posix()
        case tuple():
            return list(value)
        case _:
            return value
