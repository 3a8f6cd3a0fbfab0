"""Model configurations as JSON: every field by name, dtypes as strings, nothing else allowed."""

import dataclasses
import json
from typing import Any

import numpy as np

from jaxgen.checkpoints.files import parse_json_object


def config_to_json(config: Any) -> str:
    """Returns a frozen configuration as indented JSON, one line a field, with a final newline.

    Args:
        config: a dataclass of numbers, strings, booleans, None, tuples of these and dtypes.

    Raises:
        TypeError: not a dataclass, or a field that JSON cannot hold.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config must be an instance of a dataclass, got {config!r}")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain = {
        name: value.name if isinstance(value, np.dtype) else value for name, value in values.items()
    }
    return json.dumps(plain, indent=2) + "\n"


def config_from_json[Config](kind: type[Config], text: str, source: str = "config") -> Config:
    """Reads what `config_to_json` wrote; fields with a default may be left out.

    Args:
        kind: the dataclass to make.
        text: the JSON document.
        source: what to call it in an error, for example its path.

    Raises:
        ValueError: no JSON object, unknown or missing fields, or a value that `kind` refuses.
    """
    values = parse_json_object(text, source)
    fields = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    problems = {
        "unknown": sorted(values.keys() - {field.name for field in fields}),
        "missing": sorted(required - values.keys()),
    }
    if any(problems.values()):
        found = "; ".join(
            f"{what}: {', '.join(names)}" for what, names in problems.items() if names
        )
        raise ValueError(f"{source}: the fields are not those of {kind.__name__}; {found}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
