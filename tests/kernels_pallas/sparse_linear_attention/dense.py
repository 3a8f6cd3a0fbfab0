"""Sparse-linear attention with arrays of queries x keys, for comparison; JAX differentiates it."""

import jax
import jax.numpy as jnp


def expand(blocks, queries, keys, block_q, block_k):
    """Repeats what belongs to blocks for their queries and keys."""
    return jnp.repeat(jnp.repeat(blocks, block_q, axis=-2), block_k, axis=-1)[..., :queries, :keys]


def attention(query, key, value, alpha, weights, *, block_q, block_k, smooth_features=True):
    """What the operation means.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        alpha: (heads, query_blocks).
        weights: (batch, heads, query_blocks, key_blocks), 1 for blocks with softmax attention, 0
            for those with linear attention, or between.
    """
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    queries, keys, dim = query.shape[2], key.shape[2], query.shape[3]
    weights = expand(weights, queries, keys, block_q, block_k)
    alpha = jnp.repeat(alpha, block_q, axis=1)[None, :, :queries, None]
    smooth = key - key.mean(axis=2, keepdims=True)
    scores = query @ jnp.swapaxes(smooth, 2, 3) / dim**0.5
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True)) * weights
    sparse = exponentials / exponentials.sum(axis=-1, keepdims=True) @ value
    features = jax.nn.softmax(smooth if smooth_features else key, axis=-1)
    products = jax.nn.softmax(query, axis=-1) @ jnp.swapaxes(features, 2, 3) * (1 - weights)
    total = products.sum(axis=-1, keepdims=True)
    linear = products / jnp.where(total == 0, 1.0, total) @ value
    out = jnp.where(total == 0, sparse, alpha * sparse + (1 - alpha) * linear)
    return jnp.swapaxes(out, 1, 2)
