"""A mesh with the axes `data` and `fsdp`, and which array lies where on it.

Every batch is split over all devices. Parameters, their average and the optimizer's state are
split over `fsdp` and repeated over `data`; XLA inserts the gathers and reductions. One device is
a 1 x 1 mesh, and nothing else changes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

BATCH_SPEC = jax.P(("data", "fsdp"))
"""The first axis of each array in a batch, over all devices."""


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of `len(devices) / fsdp` x `fsdp` devices with automatic partitioning.

    Args:
        fsdp: Devices that share one copy of the state.
        devices: The `jax.Device`s to use, all by default.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"fsdp must divide the number of devices, got fsdp={fsdp} and {len(devices)} devices"
        )
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def parameter_spec(shape: Sequence[int], fsdp: int) -> jax.P:
    """Split the largest axis that `fsdp` divides (the first of equals); repeat if there is none.

    Args:
        shape: Shape of the array.
        fsdp: Size of the mesh axis `fsdp`.
    """
    divisible = [axis for axis, size in enumerate(shape) if size and size % fsdp == 0]
    if fsdp == 1 or not divisible:
        return jax.P()
    largest = max(divisible, key=lambda axis: shape[axis])
    return jax.P(*(None,) * largest, "fsdp")


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding for each leaf, by `parameter_spec`."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(
        lambda leaf: jax.NamedSharding(mesh, parameter_spec(leaf.shape, fsdp)), abstract_state
    )


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Send this process's rows to its devices, without waiting for the copy."""
    sharding = jax.NamedSharding(mesh, BATCH_SPEC)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def gather(tree: Any, mesh: Mesh) -> Any:
    """Return every leaf whole, as numpy arrays, on each process."""
    everywhere = jax.NamedSharding(mesh, jax.P())
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=everywhere)(tree))
