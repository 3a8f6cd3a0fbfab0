"""Where loaded arrays go: one at a time from their file to their devices, and a word of progress.

Arrays of a safetensors file are mapped from the disk, so nothing is read before it is placed. Each
is converted and copied to its devices before the next one is touched: next to the model itself,
the host holds about one array, or one piece of it if it is sharded.
"""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

_STRIP = 16

type Placement = Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | None
"""A sharding for all parameters; or a function that returns one from the dotted path and the shape
of a parameter. None is the default device."""

type Progress = Callable[[int, int], object] | bool | None
"""What is told after every array: the bytes that are loaded, and how many there are in all, counted
in the dtypes of the parameters. True draws a bar on stderr."""


def choose_sharding(
    sharding: Placement, path: str, shape: tuple[int, ...], source: str
) -> Sharding | None:
    """Returns where a parameter goes, after checking that it can.

    Raises:
        TypeError: neither a sharding nor None.
        ValueError: the sharding does not fit the shape. The messages start with `source`.
    """
    chosen = sharding if sharding is None or isinstance(sharding, Sharding) else None
    if chosen is None and sharding is not None:
        if not callable(sharding):
            raise TypeError(f"{source}: sharding must be a jax.sharding.Sharding, got {sharding!r}")
        chosen = sharding(path, shape)
        if chosen is not None and not isinstance(chosen, Sharding):
            raise TypeError(
                f"{source}: sharding must return a jax.sharding.Sharding, got {chosen!r} for {path}"
            )
    if chosen is not None:
        try:
            chosen.shard_shape(shape)
        except (IndexError, ValueError) as error:  # JAX counts past the end of a short shape
            raise ValueError(
                f"{source}: the sharding of {path} does not fit its shape {shape}: {chosen}"
            ) from error
    return chosen


def place(array: Any, dtype: DTypeLike, sharding: Sharding | None) -> jax.Array:
    """Converts an array and waits until a copy of it is on its devices.

    Args:
        array: a NumPy array, best a view of a mapped file, or a JAX array.
        dtype: the dtype to convert to.
        sharding: the devices, of which those of this process are filled; None for the default one.

    Returns:
        An array that shares no memory with `array`.
    """
    if isinstance(array, jax.Array):
        copy = jnp.array(array, dtype)
        placed = copy if sharding is None else jax.device_put(copy, sharding)
    elif sharding is None:
        placed = jax.device_put(_contiguous(array, dtype), may_alias=False)
    else:
        # Devices that hold the same piece share one copy of it on the host.
        pieces: dict[Any, np.ndarray] = {}

        def piece(index: Any) -> np.ndarray:
            if index not in pieces:
                pieces[index] = _contiguous(array[index], dtype)
            return pieces[index]

        placed = jax.make_array_from_callback(array.shape, sharding, piece)
    # A transfer that is still under way would keep its source on the host.
    placed.block_until_ready()
    if isinstance(array, np.ndarray):
        _release_pages(array)
    return placed


def _contiguous(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Copies an array in C order.

    A transposed matrix is copied in narrow strips, whose lines of memory the cache can hold until
    all of each is read: measured to be three times as fast for bfloat16 weights of 100 MB.
    """
    if array.ndim != 2 or not array.flags.f_contiguous:
        return np.array(array, dtype, order="C")
    copy = np.empty(array.shape, dtype)
    for start in range(0, array.shape[1], _STRIP):
        copy[:, start : start + _STRIP] = array[:, start : start + _STRIP]
    return copy


def _release_pages(array: np.ndarray) -> None:
    """Lets go of the pages of a mapped file that were read, which count as memory of the process.

    They can be read again. Other memory is left alone, also that of mappings that can be written.
    """
    mapped: Any = array
    while isinstance(mapped, np.ndarray) and not isinstance(mapped.base, mmap.mmap):
        mapped = mapped.base
    if not isinstance(mapped, np.memmap) or mapped.mode != "r" or not array.size:
        return
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    file: Any = mapped.base
    origin = np.lib.array_utils.byte_bounds(np.frombuffer(file, np.uint8))[0]
    first, end = (bound - origin for bound in np.lib.array_utils.byte_bounds(array))
    first -= first % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, first, end - first)


@contextlib.contextmanager
def reporting(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the size of every array when it has been loaded.

    Args:
        progress: what is told.
        total: bytes of all arrays.

    Raises:
        ImportError: `progress=True` without the package tqdm.
    """
    if progress is True:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from error
        with tqdm(total=total, desc="weights", unit="B", unit_scale=True) as bar:

            def draw(size: int) -> None:
                bar.update(size)

            yield draw
    elif callable(progress):
        done = 0

        def report(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        yield report
    else:
        yield lambda size: None
