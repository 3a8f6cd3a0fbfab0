"""Long sequences over several devices: keys and values of all are gathered, as INT8 codes.

Each device keeps its own queries. What travels forward is a byte a number and a float32 scale for
each token and head, about half of what 16 bits take; what INT8 attention makes of the keys and
values then is close to what it makes of the exact ones, since it would round them anyway. Gradients
of keys and values are added up over the devices in the dtype of the arrays.

`attend_on_mesh` trades tokens for heads instead, which moves less from five devices on and divides
the work of causal masks evenly; it needs as many heads of keys as devices. This needs none.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.quantize import quantize

Wire = Literal["int8", "exact"]
"""How keys and values travel: as INT8 codes and scales, or as they are."""


def attend_to_gathered(
    attend: Callable[[Array, Array, Array], Array],
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens key_heads head_dim"],
    value: Float[Array, "batch tokens key_heads head_dim"],
    *,
    axis_name: str = "context",
    wire: Wire = "int8",
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attends from this device's queries to the keys of all devices, inside `jax.shard_map`.

    Every query sees every key: there is no causal mask here.

        attend = functools.partial(attend_to_gathered, sage_attention)
        spec = jax.P(None, "context")
        out = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec)(q, k, v)

    Args:
        attend: full attention of one device, called with queries, all keys and all values.
        query: of this device.
        key: of this device. Before rounding, the mean of all keys is subtracted, which shifts each
            row of scores by a constant.
        value: of this device.
        axis_name: the axis of the mesh that divides the tokens.
        wire: how keys and values travel.

    Raises:
        ValueError: another `wire`.
    """
    if wire not in ("int8", "exact"):
        raise ValueError(f"wire must be int8 or exact, got {wire!r}")
    if wire == "exact":
        gather = functools.partial(lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
        return attend(query, gather(key), gather(value))
    mean = jnp.mean(key.astype(jnp.float32), axis=1, keepdims=True)
    mean = lax.stop_gradient(lax.pmean(mean, axis_name)).astype(key.dtype)
    return attend(query, _gather_int8(key - mean, axis_name), _gather_int8(value, axis_name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_int8(x: Array, axis_name: str) -> Array:
    """Gathers tokens (axis 1) that are rounded to 8 bits; the gradient passes straight through."""
    codes, scale = quantize(x, tile_axes=(3,))
    codes, scale = (lax.all_gather(part, axis_name, axis=1, tiled=True) for part in (codes, scale))
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)


def _forward(x, axis_name):
    return _gather_int8(x, axis_name), None


def _backward(axis_name, _, gradient):
    return (lax.psum_scatter(gradient, axis_name, scatter_dimension=1, tiled=True),)


_gather_int8.defvjp(_forward, _backward)
