"""The learnable router: which blocks of keys a block of queries attends to exactly.

SLA2 (arXiv 2602.12675), section 3 and Algorithm 2, equation 16: the means of blocks of queries and
of keys, each projected, are compared. With identity projections this is the router of SLA. The
scores are those of the equation times 1/sqrt(head_dim), without a softmax over them: the hard
choice does not change, and SoftTop-k would hardly choose among softmaxed scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.quantize import float_einsum, wide_dtype
from kernels_pallas.sparse_linear_attention.blocks import Blocks


class Means(NamedTuple):
    """Means over blocks and over all tokens, float32.

    Attributes:
        query: (batch, heads, query_blocks, head_dim).
        key: (batch, heads, key_blocks, head_dim).
        keys: of all keys, (batch, heads, head_dim).
    """

    query: jax.Array
    key: jax.Array
    keys: jax.Array


class Routing(NamedTuple):
    """The choice, for blocks of queries i and of keys j.

    Attributes:
        chosen: int32 (batch, heads, query_blocks, kept), ascending ids of the chosen blocks of
            keys.
        mask: bool (batch, heads, query_blocks, key_blocks), which are chosen.
        key_mean: float32 (batch, heads, head_dim), the mean of all keys.
    """

    chosen: jax.Array
    mask: jax.Array
    key_mean: jax.Array


def block_means(blocks: Blocks, query: jax.Array, key: jax.Array) -> Means:
    """Returns means of blocks; the padding of the last ones does not count."""

    def mean(x, inside):
        count = jnp.asarray(inside.sum(axis=1), x.dtype)
        return jnp.sum(x, axis=3) / count[None, None, :, None]

    wide = lambda x: x.astype(wide_dtype(x.dtype))
    by_query = mean(wide(blocks.split_queries(query)), blocks.query_inside())
    by_key = mean(wide(blocks.split_keys(key)), blocks.key_inside())
    return Means(by_query, by_key, mean_of_means(blocks, by_key))


def mean_of_means(blocks: Blocks, by_key: jax.Array) -> jax.Array:
    """Returns the mean of all keys from those of the blocks."""
    share = jnp.asarray(blocks.key_inside().sum(axis=1) / blocks.keys, by_key.dtype)
    return jnp.sum(by_key * share[None, None, :, None], axis=2)


def block_scores(
    means: Means, query_router: jax.Array | None, key_router: jax.Array | None
) -> jax.Array:
    """Returns the scores of blocks, (batch, heads, query_blocks, key_blocks).

    Args:
        means: of the blocks. The mean of the keys is taken away first; without it a row of scores
            differs by a constant only, which no choice among its entries sees.
        query_router: (head_dim, head_dim) or (heads, head_dim, head_dim), x @ router; None: the
            identity.
        key_router: likewise.
    """

    def project(x, router):
        if router is None:
            return x
        return float_einsum("bhnd,de->bhne" if router.ndim == 2 else "bhnd,hde->bhne", x, router)

    query = project(means.query, query_router)
    key = project(means.key - means.keys[:, :, None], key_router)
    return float_einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5


def choose(blocks: Blocks, scores: jax.Array, key_mean: jax.Array) -> Routing:
    """Returns the hard choice, without a gradient; of equal scores the smaller id wins."""
    scores, key_mean = lax.stop_gradient((scores, key_mean))
    if blocks.dense:
        chosen = jnp.broadcast_to(
            jnp.arange(blocks.key_blocks, dtype=jnp.int32), (*scores.shape[:3], blocks.key_blocks)
        )
        return Routing(chosen, jnp.ones(scores.shape, jnp.bool_), key_mean)
    # NaN compares as the largest, so it is chosen and seen.
    chosen = jnp.sort(lax.top_k(scores, blocks.kept)[1].astype(jnp.int32), axis=-1)
    ids = lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, blocks.key_blocks), 4)
    mask = jnp.any(chosen[..., None] == ids, axis=-2)
    return Routing(chosen, mask, key_mean)
