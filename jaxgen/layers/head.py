"""The product with the head of a language model: float32 logits, gradients by 16-bit products."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.varying import varying_like


def float32_logits(
    hidden: Float[Array, "*batch width"], table: Float[Array, "first second"], axis: int
) -> Float[Array, "*batch vocabulary"]:
    """Returns the products of tokens and a table, which are not rounded.

    The gradient of the logits is rounded to the dtype of `hidden` like that of any other layer.
    JAX's own rule would multiply it in float32, at half the speed or less of 16 bits. There is no
    forward-mode derivative.

    Args:
        hidden: any float dtype; the table is rounded to it.
        table: any float dtype, which its gradient has, too, rounded once.
        axis: which of its axes is the width: 1 for embeddings, 0 for the kernel of a layer.
    """
    hidden, table = varying_like((hidden, table), (hidden, table))
    return _logits(hidden, table, axis)


def logits_gradients(
    slope: Float[Array, "*batch vocabulary"],
    hidden: Float[Array, "*batch width"],
    table: Float[Array, "first second"],
    axis: int,
) -> tuple[Float[Array, "*batch width"], Float[Array, "first second"]]:
    """Returns the gradients of tokens, in their dtype, and of the table, in float32.

    Args:
        slope: gradient of the logits; rounded to the dtype of `hidden`.
        hidden: as for `float32_logits`.
        table: likewise.
        axis: likewise.
    """
    slope, batch = slope.astype(hidden.dtype), tuple(range(hidden.ndim - 1))
    to_hidden = _product(slope, table.astype(hidden.dtype), (hidden.ndim - 1,), (1 - axis,))
    pair = (slope, hidden) if axis else (hidden, slope)
    return to_hidden.astype(hidden.dtype), _product(*pair, batch, batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _logits(hidden: Array, table: Array, axis: int) -> Array:
    return _product(hidden, table.astype(hidden.dtype), (hidden.ndim - 1,), (axis,))


def _forward(hidden: Array, table: Array, axis: int) -> tuple[Array, tuple[Array, Array]]:
    return _logits(hidden, table, axis), (hidden, table)


def _backward(axis: int, kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    hidden, table = kept
    to_hidden, to_table = logits_gradients(slope, hidden, table, axis)
    return to_hidden, to_table.astype(table.dtype)


_logits.defvjp(_forward, _backward)


def _product(x: Array, y: Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]) -> Array:
    numbers = ((x_axes, y_axes), ((), ()))
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)
