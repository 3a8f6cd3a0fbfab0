"""Weights in safetensors files, one or several: strict reading, writing that mixes no two models.

Files of the `safetensors` package and ours are interchangeable. The format is in
`safetensors_format`; here are the sets of files with an index, and what a model expects.
"""

import errno
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.checkpoints.files import parse_json_object, write_atomically, write_json
from jaxgen.checkpoints.safetensors_format import (
    DTYPE_NAMES,
    MAX_HEADER_BYTES,
    Header,
    num_bytes,
    read_layout,
    serialize,
)


def read_safetensors_header(path: str | os.PathLike) -> Header:
    """Reads names, shapes, dtypes and metadata of a safetensors file without its arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or a header that contradicts itself or the file's size.
    """
    return read_layout(Path(path)).header


def load_safetensors(
    path: str | os.PathLike, expected: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, np.ndarray]:
    """Loads all arrays of a file or, through its index, of a sharded set of files.

    Args:
        path: the file; if it does not exist but `<path>.index.json` does, the files that the
            index names, which must lie in the same folder.
        expected: the keys and shapes that the arrays must have, no more and no fewer. A float
            may have another float dtype than expected: it is not converted.

    Returns:
        Read-only arrays in the dtypes of the file, mapped from the disk rather than copied.

    Raises:
        FileNotFoundError: no such file, or a file of the index is missing.
        ValueError: a damaged file, an index that does not match its files, or arrays other than
            expected: one message lists all missing, unused and misshapen keys.
    """
    path = Path(path)
    index = _index_path(path)
    sharded = index.is_file() and not path.exists()
    arrays = _load_shards(index) if sharded else _load_file(path)
    if expected is not None:
        check_arrays(arrays, expected, source=str(path))
    return arrays


def check_arrays(
    arrays: Mapping[str, Any],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    source: str = "arrays",
) -> None:
    """Checks that `arrays` has exactly the expected keys, shapes and kinds of dtype.

    Raises:
        ValueError: it has not; the message lists everything missing, unused and misshapen.
    """
    missing = sorted(expected.keys() - arrays.keys())
    unused = sorted(arrays.keys() - expected.keys())
    wrong = [
        f"{key} (expected {_describe(want)}, got {_describe(arrays[key])})"
        for key, want in sorted(expected.items())
        if key in arrays and not _fits(arrays[key], want)
    ]
    found = {"missing": missing, "unused": unused, "wrong shape or dtype": wrong}
    if any(found.values()):
        lists = [f"{name} ({len(keys)}): {_shorten(keys)}" for name, keys in found.items() if keys]
        raise ValueError(f"{source}: the weights do not fit the model; " + "; ".join(lists))


def save_safetensors(
    path: str | os.PathLike,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_bytes: int | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Saves arrays to one file or, above `max_shard_bytes`, to several and an index.

    New files never load together with older ones. All are first written beside those, which needs
    room for both: what fails until then leaves the older ones. A single file then takes its place
    at once. For several, or if `texts` change, the older weights go first and what makes the new
    ones load comes last; an interruption between leaves weights that are refused as missing. Shards
    that the older index names are removed in the end.

    Args:
        path: the file, for example `model.safetensors`; shards are then
            `model-00001-of-00002.safetensors` and the index `model.safetensors.index.json`.
        arrays: NumPy or JAX arrays by key.
        metadata: strings to store with them.
        max_shard_bytes: most bytes of arrays in one file; a larger array gets its own file.
        texts: by name, other files of the folder that belong to these arrays: a `config.json`.

    Raises:
        OSError: the folder does not exist, cannot be written or is full.
        ValueError: an empty key, a reserved one, a dtype without a name in the format, metadata
            that are not strings, or a `max_shard_bytes` below 1.
    """
    path = Path(path)
    metadata, texts = dict(metadata or {}), dict(texts or {})
    _check_savable(arrays, metadata, max_shard_bytes)
    older = _older_shards(_index_path(path))
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent, ignore_cleanup_errors=True
    ) as made:
        new = Path(made)
        names = _write_weights(new / path.name, arrays, metadata, max_shard_bytes)
        changed = [name for name, text in texts.items() if not _holds(path.with_name(name), text)]
        for name in changed:
            write_atomically(new / name, [texts[name].encode()])
        _put_in_place(new, path, [*changed, *names])
    for name in older.difference(names):
        path.with_name(name).unlink(missing_ok=True)


def save_model_folder(
    folder: Path,
    name: str,
    arrays: Mapping[str, Any],
    config: str,
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes weights in the layout of PyTorch, and their configuration, into one folder.

    Args:
        folder: made if it does not exist.
        name: of the weights.
        arrays: as for `save_safetensors`.
        config: text of `config.json`.
        max_shard_bytes: as for `save_safetensors`.

    Raises:
        OSError: the folder cannot be written or is full.
        ValueError: as `save_safetensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(
        folder / name,
        arrays,
        {"format": "pt"},
        max_shard_bytes=max_shard_bytes,
        texts={"config.json": config},
    )


def _write_weights(
    path: Path, arrays: Mapping[str, Any], metadata: dict[str, str], limit: int | None
) -> list[str]:
    """Writes one file, or shards and their index; returns the names, what loads the others last."""
    shards = _shard(arrays, limit)
    if len(shards) == 1:
        write_atomically(path, serialize(arrays, metadata))
        return [path.name]
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
        chosen = {key: arrays[key] for key in keys}
        write_atomically(path.with_name(name), serialize(chosen, metadata))
        weight_map |= dict.fromkeys(keys, name)
    total = sum(num_bytes(array) for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(_index_path(path), index)
    return [*dict.fromkeys(weight_map.values()), _index_path(path).name]


def _put_in_place(new: Path, path: Path, names: list[str]) -> None:
    """Moves files out of the folder `new` beside `path`, in order; the last one loads the weights.

    Older weights are removed before the first one, unless a single file replaces them at once.
    """
    if len(names) > 1:
        _index_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # after the index, which it hides from the loader
    for name in names:
        (new / name).replace(path.with_name(name))
    if names[-1] == path.name:
        _index_path(path).unlink(missing_ok=True)


def _holds(path: Path, text: str) -> bool:
    """Whether a file has this content."""
    return path.is_file() and path.read_bytes() == text.encode()


def _older_shards(index: Path) -> set[str]:
    """Returns the files that an index names; none if it is not there or would be refused."""
    try:
        return set(_read_index(index).values())
    except (OSError, ValueError):
        return set()


def _index_path(path: Path) -> Path:
    """Where the index of the sharded form of `path` is."""
    return path.with_name(path.name + ".index.json")


def _load_file(path: Path) -> dict[str, np.ndarray]:
    """Maps the arrays of one file."""
    if not os.path.isfile(path):  # a name that no file can have, or a folder, raises otherwise
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    header, starts = read_layout(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    arrays = {}
    for key, array in header.arrays.items():
        content = data[starts[key] : starts[key] + num_bytes(array)]
        try:
            arrays[key] = content.view(np.ndarray).view(array.dtype).reshape(array.shape)
        except (ValueError, OverflowError) as error:  # empty, but with sides beyond all numbers
            raise ValueError(f"{path}: no array can have the shape of {key!r}: {error}") from error
    return arrays


def _read_index(index: Path) -> dict[str, str]:
    """Returns the file of each key, one of the same folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, no index, or names something else than such a file.
    """
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{index}: an index of more than {MAX_HEADER_BYTES} bytes is refused")
    weight_map = parse_json_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be a non-empty object")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(
                f"{index}: {key!r} must name a .safetensors file of the same folder, got {name!r}"
            )
    return weight_map


def _load_shards(index: Path) -> dict[str, np.ndarray]:
    """Loads the files that an index names, after checking their names and their keys."""
    weight_map = _read_index(index)
    arrays: dict[str, np.ndarray] = {}
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not os.path.isfile(index.with_name(name))]
    if missing:
        raise FileNotFoundError(f"{index} names files that are not there: {_shorten(missing)}")
    for name in names:
        shard = _load_file(index.with_name(name))
        promised = {key for key, owner in weight_map.items() if owner == name}
        if shard.keys() != promised:
            different = _shorten(sorted(shard.keys() ^ promised))
            raise ValueError(f"{index}: the keys of {name} are not those of the index: {different}")
        arrays |= shard
    return arrays


def _check_savable(arrays: Mapping[str, Any], metadata: Mapping[str, str], limit: int | None):
    """Raises ValueError for what a safetensors file cannot hold."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"max_shard_bytes must be a positive int, got {limit!r}")
    for key, array in arrays.items():
        if not isinstance(key, str) or key in ("", "__metadata__"):
            raise ValueError(f"{key!r} cannot be the key of an array")
        if np.dtype(array.dtype) not in DTYPE_NAMES:
            raise ValueError(
                f"{key}: dtype {array.dtype} is none of {', '.join(DTYPE_NAMES.values())}"
            )
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"metadata must map strings to strings, got {metadata}")


def _shard(arrays: Mapping[str, Any], limit: int | None) -> list[list[str]]:
    """Splits the keys into files of at most `limit` bytes, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, array in arrays.items():
        size = num_bytes(array)
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _fits(array: Any, want: jax.ShapeDtypeStruct) -> bool:
    """Whether the shape is the expected one and the dtype of the same kind."""
    floats = [jnp.issubdtype(dtype, jnp.floating) for dtype in (array.dtype, want.dtype)]
    same_kind = all(floats) or array.dtype == want.dtype
    return tuple(array.shape) == tuple(want.shape) and same_kind


def _describe(array: Any) -> str:
    """Shape and dtype for a message."""
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _shorten(names: list[str], limit: int = 20) -> str:
    """Joins names, the first `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
