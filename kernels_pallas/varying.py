"""Which devices of a mesh a value differs between: what `jax.shard_map` wants to be told."""

from typing import Any

import jax
from jax import lax


def varying_like(operands: Any, results: Any) -> Any:
    """Inside `jax.shard_map`, says that results differ between devices where any operand does.

    Kernels do not say it of what they return, nor constants that a loop begins with.

    Args:
        operands: arrays, of which some may be None.
        results: arrays.

    Returns:
        The results, unchanged outside of `jax.shard_map`.
    """
    axes = varying_axes(operands)

    def cast(x):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, results)


def varying_axes(operands: Any) -> frozenset[Any]:
    """Returns the axes of a mesh along which any operand differs; none outside `jax.shard_map`."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands))
    )
