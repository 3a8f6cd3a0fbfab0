"""The safetensors format: one checked header, then the bytes of the arrays without gaps.

A file is 8 bytes of header length (little endian), the header (a JSON object that gives each
array its dtype, shape and byte range), and the arrays. Nothing in it is ever executed. No number
of the header is trusted before it has been checked against the size of the file. bfloat16 and
float8 are those of `ml_dtypes`.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.checkpoints.files import parse_json_object

MAX_HEADER_BYTES = 100_000_000
"""Longest header accepted, the limit of the format."""

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_DTYPES = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""What the format calls each dtype that it can hold."""


class Header(NamedTuple):
    """What a safetensors file says about itself: its arrays and its metadata."""

    arrays: dict[str, jax.ShapeDtypeStruct]
    metadata: dict[str, str]


class Layout(NamedTuple):
    """A checked header, and where the bytes of each array begin in the file."""

    header: Header
    starts: dict[str, int]


def read_layout(path: Path) -> Layout:
    """Reads and checks the header of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or a header that contradicts itself or the file's size.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path}: not a safetensors file or truncated: {size} bytes cannot hold a header "
                f"of {length} bytes (at most {MAX_HEADER_BYTES} are allowed)"
            )
        entries = parse_json_object(file.read(length), f"{path} (header)")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    parsed = {key: _parse_entry(path, key, entry) for key, entry in entries.items()}
    position = 0
    for key, (_, begin, end) in sorted(parsed.items(), key=lambda item: item[1][1:]):
        if begin != position:
            raise ValueError(f"{path}: {key!r} begins at byte {begin}, expected {position}")
        position = end
    if 8 + length + position != size:
        raise ValueError(
            f"{path}: truncated or damaged: the header promises {8 + length + position} bytes, "
            f"the file has {size}"
        )
    arrays = {key: array for key, (array, _, _) in parsed.items()}
    starts = {key: 8 + length + begin for key, (_, begin, _) in parsed.items()}
    return Layout(Header(arrays, metadata), starts)


def _parse_entry(path: Path, key: str, entry: Any) -> tuple[jax.ShapeDtypeStruct, int, int]:
    """Checks one entry of a header; returns shape and dtype, and the range of bytes."""
    natural = lambda value: type(value) is int and value >= 0
    match entry:
        case {"dtype": str(name), "shape": list(shape), "data_offsets": [begin, end], **rest}:
            numbers_fit = all(map(natural, [*shape, begin, end])) and len(shape) <= 64
            if not rest and numbers_fit and name in _DTYPES:
                dtype = _DTYPES[name]
                if math.prod(shape) * dtype.itemsize == end - begin:
                    return jax.ShapeDtypeStruct(tuple(shape), dtype), begin, end
    raise ValueError(
        f"{path}: the header entry of {key!r} is not a dtype of {', '.join(_DTYPES)} with a shape "
        f"and data_offsets of its size: {str(entry)[:200]}"
    )


def serialize(arrays: Mapping[str, Any], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file, one array at a time; every dtype is in `DTYPE_NAMES`."""
    # Wide dtypes first: every array then begins at a multiple of its item size.
    ordered = sorted(arrays.items(), key=lambda item: (-np.dtype(item[1].dtype).itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for key, array in ordered:
        end = position + num_bytes(array)
        name = DTYPE_NAMES[np.dtype(array.dtype)]
        header[key] = {"dtype": name, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, array in ordered:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def num_bytes(array: Any) -> int:
    """Bytes of an array or of a shape with dtype."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize
