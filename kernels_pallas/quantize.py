"""Symmetric INT8 quantization with one float32 scale per tile, and smoothing of keys and values.

The quantizer is psi of SageBwd (arXiv 2603.02170, Algorithm 1): `scale = max|x| / 127` over a tile
and `codes = round(x / scale)`, to nearest, so codes lie in [-127, 127]. A product of two quantized
tiles is an exact integer product, multiplied by the two scales afterwards, because each scale is
constant over the contraction.

Every function takes `enabled`. With `enabled=False` the codes are the float32 values themselves and
the scales are one: the surrounding code then computes exact attention by the same path, which
separates mistakes in the algorithm from quantization error.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.mosaic.rounding import to_half

INT8_MAX = 127.0


class Quantized(NamedTuple):
    """A tensor as integer codes times scales: `x ≈ codes * scale`.

    Attributes:
        codes: int8 (float32 where quantization is switched off), the shape of x.
        scale: float32, broadcastable to `codes`; size one along the axes of a tile.
    """

    codes: jax.Array
    scale: jax.Array


def quantize(
    x: jax.Array, *, tile_axes: tuple[int, ...], enabled: bool = True, half_scales: bool = False
) -> Quantized:
    """Quantize x with one scale per tile; a tile spans `tile_axes` and is one entry of the others.

    With `half_scales` the inverse of a scale has the 11 bits of float16.

    An all-zero tile gets the smallest normal float32 as its scale and codes of zero, never 0/0. A
    tile that holds NaN or infinity gets NaN as its scale: int8 codes cannot carry either, and a
    training loop must see them.
    """
    x = x.astype(jnp.float32)
    if not enabled:
        return Quantized(x, jnp.ones_like(jnp.max(x, axis=tile_axes, keepdims=True)))
    largest = jnp.max(jnp.abs(x), axis=tile_axes, keepdims=True)
    scale = jnp.maximum(largest / INT8_MAX, jnp.finfo(jnp.float32).tiny)
    finite = jnp.all(jnp.isfinite(x), axis=tile_axes, keepdims=True)
    scale = jnp.where(finite, scale, jnp.nan)
    if half_scales:
        inverse = to_half(1.0 / scale)
        x, scale = x * inverse, 1.0 / inverse
    else:
        x = x / scale
    return Quantized(jnp.clip(jnp.round(x), -INT8_MAX, INT8_MAX).astype(jnp.int8), scale)


def integer_einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply two arrays of codes; the result is float32.

    int8 codes are multiplied into int32, exactly. The conversion to float32 is exact up to a
    contraction of 1040 values (127² · 1040 < 2²⁴).
    """
    if x.dtype == jnp.int8:
        product = jnp.einsum(subscripts, x, y, preferred_element_type=jnp.int32)
        return product.astype(jnp.float32)
    return float_einsum(subscripts, x, y)


def float_einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply in the dtype of the inputs and accumulate in float32, or float64 if they have it."""
    return jnp.einsum(
        subscripts,
        x,
        y,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide_dtype(x.dtype),
    )


def wide_dtype(dtype: Any) -> jnp.dtype:
    """Returns the dtype in which sums of numbers of a float dtype are made."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def subtract_mean(
    x: jax.Array, attended: jax.Array, *, token_axes: tuple[int, ...], enabled: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Subtract the mean over the attended tokens and zero all others.

    Of keys: one vector less in every key shifts each row of the scores by a constant, which softmax
    ignores, and the channel bias no longer uses up the range of int8 (SageBwd section 6; arXiv
    2410.02367). Of values: the output is smaller by the mean, which is added back. Tokens nobody
    attends to neither enter the mean nor raise a tile's maximum, whatever they hold (NaN included).

    Args:
        x: (..., tokens, head_dim), any float dtype.
        attended: bool, broadcastable to `x`, with head_dim of size one.
        token_axes: the axes of `x` that hold tokens.
        enabled: False takes the mean to be zero.

    Returns:
        The smoothed tokens and their mean, both float32; the mean keeps `token_axes` at size one.
    """
    x = jnp.where(attended, x.astype(jnp.float32), 0.0)
    count = jnp.sum(attended.astype(jnp.float32), axis=token_axes, keepdims=True)
    mean = jnp.sum(x, axis=token_axes, keepdims=True) / jnp.maximum(count, 1.0)
    mean = mean if enabled else jnp.zeros_like(mean)
    return jnp.where(attended, x - mean, 0.0), mean
