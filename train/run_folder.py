"""The folder of a run belongs to one configuration, kept in `config.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxgen.checkpoints import parse_json_object, write_atomically
from train.options import Options


class ConfigChangedError(ValueError):
    """A folder holds a run with another configuration."""


def claim(config: Options, *, write: bool = True) -> Path:
    """Make the run's folder, or check that the run in it had the same configuration.

    Options in `config.may_change` may differ; the file then holds the new ones. A run that never
    made a step binds nobody.

    Args:
        config: The options.
        write: Whether to write the file; one process of several does.

    Returns:
        The folder.

    Raises:
        ConfigChangedError: An option that decides the updates differs; the message lists old and
            new values.
        ValueError: `config.json` is no JSON object, or is missing beside metrics or checkpoints.
    """
    folder, path = config.output, config.output / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    new = to_json(config)
    if path.exists():
        try:
            old = parse_json_object(path.read_bytes(), str(path))
        except ValueError as error:
            raise ValueError(f"{folder} cannot be resumed: {error}") from error
        fixed = sorted((old.keys() | new.keys()) - config.may_change)
        differing = [
            name for name in fixed if _made_steps(folder) and old.get(name) != new.get(name)
        ]
        if differing:
            lines = [
                f"  {name}: {old.get(name, '(absent)')!r} before, {new.get(name, '(absent)')!r} now"
                for name in differing
            ]
            raise ConfigChangedError(
                f"{folder} holds a run with another configuration:\n"
                + "\n".join(lines)
                + "\nrepeat its options to resume it, or choose another --output"
            )
    elif _made_steps(folder):
        raise ValueError(
            f"{folder} holds metrics or checkpoints but no config.json, so it is not a run of this "
            "script; choose another --output"
        )
    if write:
        write_atomically(path, [(json.dumps(new, indent=2) + "\n").encode()])
    return folder


def _made_steps(folder: Path) -> bool:
    """Whether there is anything in the folder that a new run could damage."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return any(checkpoints.glob("[0-9]*")) or (metrics.is_file() and metrics.stat().st_size > 0)


def to_json(config: Options) -> dict[str, Any]:
    """Return the configuration without its folder, as JSON can hold it."""
    values = dataclasses.asdict(config)  # pyright: ignore[reportArgumentType]
    del values["output"]
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return value.as_posix()
        case tuple():
            return list(value)
        case _:
            return value
