"""The mesh of a training run, and which array lies where on it.

Its axes are `data`, `fsdp`, `tensor` and `context`, of which `jaxgen.layers.MESH_AXES` says what
they divide. A batch is split over `data` and `fsdp`, and its tokens over `context`. Parameters,
their average and the optimizer's state are split over `fsdp` and `tensor` and repeated over the
others; XLA inserts the gathers and reductions. One device is a mesh of one, and nothing else
changes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

type Place = Callable[[str, tuple[int, ...]], NamedSharding]
"""From the dotted name and the shape of a parameter to where it lies."""

AXES = ("data", "fsdp", "tensor", "context")
_ROWS = ("data", "fsdp")


def make_mesh(
    fsdp: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh with automatic partitioning; devices not asked for elsewhere go to `data`.

    Args:
        fsdp: Devices that share one copy of the state.
        tensor: Devices that share the heads and the hidden units.
        context: Devices that share the tokens of a sequence.
        devices: The `jax.Device`s to use, all by default.

    Raises:
        ValueError: The three do not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = fsdp * tensor * context
    if min(fsdp, tensor, context) < 1 or len(devices) % asked:
        raise ValueError(
            "fsdp x tensor x context must divide the number of devices, got "
            f"fsdp={fsdp}, tensor={tensor}, context={context} and {len(devices)} devices"
        )
    shape = (len(devices) // asked, fsdp, tensor, context)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def rows_shared(mesh: Mesh) -> int:
    """Return between how many groups of devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in _ROWS)


def largest_axis(mesh: Mesh) -> Place:
    """Split the largest axis that `fsdp` divides (the first of equals); repeat if there is none."""
    fsdp = mesh.shape["fsdp"]

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(shape) if size and size % fsdp == 0]
        if fsdp == 1 or not divisible:
            return NamedSharding(mesh, jax.P())
        largest = max(divisible, key=lambda axis: shape[axis])
        return NamedSharding(mesh, jax.P(*(None,) * largest, "fsdp"))

    return place


def state_shardings(abstract_state: Any, mesh: Mesh, place: Place | None = None) -> Any:
    """Return a NamedSharding for each leaf.

    Args:
        abstract_state: A tree in which parameters, and whatever has their shapes, have dotted names
            as keys of dictionaries.
        mesh: The mesh.
        place: Where a parameter lies; `largest_axis` by default.
    """
    place = largest_axis(mesh) if place is None else place

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return place(names[-1] if names else "", leaf.shape)

    return jax.tree.map_with_path(sharding, abstract_state)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return how an array of a batch lies: rows over `data` and `fsdp`, tokens over `context`."""
    tokens = ("context",) if ndim > 1 and mesh.shape["context"] > 1 else ()
    return NamedSharding(mesh, jax.P(_ROWS, *tokens))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Send this process's rows to its devices, without waiting for the copy."""
    if jax.process_count() == 1:
        return jax.device_put(batch, {n: batch_sharding(mesh, x.ndim) for n, x in batch.items()})
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)
        for name, rows in batch.items()
    }


def gather(tree: Any, mesh: Mesh) -> Any:
    """Return every leaf whole, as numpy arrays, on each process."""
    everywhere = NamedSharding(mesh, jax.P())
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=everywhere)(tree))
