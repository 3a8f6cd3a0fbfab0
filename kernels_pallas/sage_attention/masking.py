"""Which query may attend to which key, one tile of keys at a time.

The semantics are those of `jax.nn.dot_product_attention`: all conditions are combined with "and",
causal masks align the first query with the first key, and a local window `(left, right)` keeps the
keys from `t - left` to `t + right` of query t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.varying import varying_like


class Structure(NamedTuple):
    """The static half of a mask: what is known when a program is compiled."""

    is_causal: bool
    local_window_size: tuple[int, int] | None


class Masking(NamedTuple):
    """The traced half of a mask.

    Attributes:
        mask: bool (batch|1, heads|1, queries|1, keys|1), True where attention is allowed, or None.
        query_lengths: int32 (batch|1,), rows at or beyond it attend to nothing.
        key_lengths: int32 (batch|1,), keys at or beyond it are attended by nobody.
        segments: None, or int32 (batch, queries) and (batch, keys): a query attends to keys of
            its own number only.
    """

    mask: jax.Array | None
    query_lengths: jax.Array
    key_lengths: jax.Array
    segments: tuple[jax.Array, jax.Array] | None = None


def tile_of_keys(array: jax.Array, start: jax.Array, block: int) -> jax.Array:
    """Cut `block` keys out of the last axis of a (possibly broadcast) mask or bias."""
    if array.shape[-1] == 1:
        return array
    return lax.dynamic_slice_in_dim(array, start, block, axis=-1)


def visible(
    masking: Masking, structure: Structure, start: jax.Array, queries: int, block: int
) -> jax.Array:
    """Compute the mask of all queries against the keys from `start` to `start + block`.

    Returns:
        bool (batch|1, heads|1, queries, block).
    """
    row = jnp.arange(queries, dtype=jnp.int32)[None, None, :, None]
    column = (start + jnp.arange(block, dtype=jnp.int32))[None, None, None, :]
    allowed = column < masking.key_lengths[:, None, None, None]
    allowed &= row < masking.query_lengths[:, None, None, None]
    if structure.is_causal:
        allowed &= column <= row
    if structure.local_window_size is not None:
        left, right = structure.local_window_size
        allowed &= (column >= row - left) & (column <= row + right)
    if masking.mask is not None:
        allowed &= tile_of_keys(masking.mask, start, block)
    if masking.segments is not None:
        of_query, of_key = masking.segments
        of_tile = lax.dynamic_slice_in_dim(of_key, start, block, axis=1)
        allowed &= of_query[:, None, :, None] == of_tile[:, None, None, :]
    return allowed


def coverage(
    masking: Masking, structure: Structure, queries: int, keys: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """Find the queries that attend to anything and the keys that anybody attends to.

    Without an explicit mask or segments, what a query sees is an interval of keys, and the answer
    is a formula.

    Args:
        masking: the traced half of the mask, padded to `queries` and `keys`.
        structure: the static half.
        queries: number of queries, padding included.
        keys: number of keys, padding included; a multiple of `block`.
        block: keys examined at a time.

    Returns:
        bool (batch|1, heads|1, queries) and bool (batch|1, heads|1, keys).
    """
    if masking.mask is None and masking.segments is None:
        return _seen(masking, structure, queries, keys)

    def examine(attending, start):
        allowed = visible(masking, structure, start, queries, block)
        return attending | jnp.any(allowed, axis=-1), jnp.any(allowed, axis=-2)

    shape = jax.eval_shape(lambda: visible(masking, structure, jnp.int32(0), queries, block)).shape
    attending = varying_like(masking, jnp.zeros(shape[:-1], bool))
    starts = jnp.arange(0, keys, block, dtype=jnp.int32)
    attending, attended = lax.scan(examine, attending, starts)
    return attending, jnp.moveaxis(attended, 0, -2).reshape(*shape[:2], keys)


def _seen(
    masking: Masking, structure: Structure, queries: int, keys: int
) -> tuple[jax.Array, jax.Array]:
    """Find which intervals of keys, one a query, and of queries, one a key, are not empty."""
    row = jnp.arange(queries, dtype=jnp.int32)[None, None, :]
    column = jnp.arange(keys, dtype=jnp.int32)[None, None, :]
    last_query = masking.query_lengths[:, None, None] - 1
    last_key = masking.key_lengths[:, None, None] - 1
    left, right = queries + keys, queries + keys  # wider than everything
    if structure.local_window_size is not None:
        left, right = structure.local_window_size
    if structure.is_causal:
        right = 0
    first_seen, last_seen = jnp.maximum(row - left, 0), jnp.minimum(row + right, last_key)
    first_seer, last_seer = jnp.maximum(column - right, 0), jnp.minimum(column + left, last_query)
    attending = (first_seen <= last_seen) & (row <= last_query)
    attended = (first_seer <= last_seer) & (column <= last_key)
    return attending, attended
