"""Rows of an embedding table by number, with gradients that are sums in float32."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

_SMALL = 1024
"""Up to so many rows, gradients are a product; adding row by row, as XLA does it, would have
thousands of tokens wait for their turn at one row."""


def look_up(
    table: Float[Array, "vocabulary width"],
    ids: Int[Array, "*batch"],
    dtype: DTypeLike,
) -> Float[Array, "*batch width"]:
    """Returns rows of a table.

    A token that occurs often has the sum of many gradients, which 16 bits would not hold: after a
    few hundred addends of one sign, the next is rounded away.

    Args:
        table: one row a token, any float dtype.
        ids: numbers of rows; those that do not exist give NaN, as in `jnp.take`.
        dtype: of the result.
    """
    return _look_up(table, ids, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table: Array, ids: Array, dtype: jnp.dtype) -> Array:
    return jnp.take(table.astype(dtype), ids, axis=0)


def _forward(table: Array, ids: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    empty = jnp.zeros((len(table), 0), table.dtype)  # carries size and dtype
    return _look_up(table, ids, dtype), (ids, empty)


def _backward(dtype: jnp.dtype, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    ids, empty = kept
    size, width = len(empty), gradient.shape[-1]
    if size <= _SMALL:
        # Not flattened: the devices may divide rows and tokens.
        chosen = jax.nn.one_hot(ids, size, dtype=dtype)
        over = tuple(range(ids.ndim))
        summed = jax.lax.dot_general(
            chosen, gradient, ((over, over), ((), ())), preferred_element_type=jnp.float32
        )
    else:
        summed = jnp.zeros((size, width), jnp.float32).at[ids].add(gradient.astype(jnp.float32))
    return summed.astype(empty.dtype), None


_look_up.defvjp(_forward, _backward)
