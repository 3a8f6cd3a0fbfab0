"""Attention of a noisy and a clean copy of one text, as block diffusion trains (BD3-LM, SDAR).

The tokens are [noisy ; clean], both halves in blocks of the same length (Arriola et al. 2025,
arXiv:2503.09573, section 3). A noisy token sees its own noisy block and the clean blocks before it;
a clean token sees the clean blocks up to its own. So one pass trains every block as it is decoded.

Three quarters of all pairs are not seen. Queries are taken some blocks at a time, so that neither
the scores nor a mask of all pairs are ever an array; the four quarters of a text are loops of their
own, whose keys end where the quarter does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxgen.layers.attention import exact_attention

_CHUNK = 1024
_EXTENTS = 4


def block_diffusion_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens key_heads head_dim"],
    value: Float[Array, "batch tokens key_heads head_dim"],
    *,
    block_length: int,
    chunk: int = _CHUNK,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attends in both halves. Keys may have fewer heads than queries.

    Args:
        query: [noisy ; clean], any float dtype.
        key: dtype of the query.
        value: like the key.
        block_length: tokens of a block, from the first token of each half on; the last block may
            be shorter.
        chunk: about as many queries of each half are computed at a time; the largest array of
            scores has chunk x (half + chunk) for each head.

    Raises:
        ValueError: an odd number of tokens, or a `block_length` or `chunk` below 1.
    """
    tokens = query.shape[1]
    if tokens % 2:
        raise ValueError(f"tokens must be a noisy and a clean half, got {tokens}")
    if block_length < 1 or chunk < 1:
        raise ValueError(f"block_length and chunk must be positive, got {block_length} and {chunk}")
    half = tokens // 2
    size = min(max(chunk // block_length, 1), -(-half // block_length)) * block_length
    count = -(-half // size)
    missing = ((0, 0), (0, count * size - half), (0, 0), (0, 0))
    noisy, clean = (
        [array[:, part] for array in (query, key, value)]
        for part in (slice(half), slice(half, None))
    )
    # Keys are padded like queries: GPUs are slow where rows of scores have odd sizes.
    noisy, clean = ([jnp.pad(array, missing) for array in arrays] for arrays in (noisy, clean))

    def attend(first: Array, extent: int) -> tuple[Array, Array]:
        """The chunk of both halves that starts at `first`, whose keys end before `extent`."""
        here = first + jnp.arange(size)
        block, known = here // block_length, jnp.arange(extent) // block_length
        cut = lambda array: jax.lax.dynamic_slice_in_dim(array, first, size, axis=1)
        keys, values = (array[:, :extent] for array in clean[1:])
        there = (jnp.arange(extent) < half)[None]
        own = (block[:, None] == block[None]) & (here < half)[None]
        seen = jnp.concatenate([own, block[:, None] > known[None]], axis=1)
        of_noisy = exact_attention(
            cut(noisy[0]),
            jnp.concatenate([cut(noisy[1]), keys], axis=1),
            jnp.concatenate([cut(noisy[2]), values], axis=1),
            mask=seen[None, None],
        )
        seen = (block[:, None] >= known[None]) & there
        return of_noisy, exact_attention(cut(clean[0]), keys, values, mask=seen[None, None])

    parts = []
    for numbers in np.array_split(np.arange(count), min(_EXTENTS, count)):
        extent = (int(numbers[-1]) + 1) * size
        # Scores are computed again in the backward pass rather than kept.
        part = jax.checkpoint(functools.partial(attend, extent=extent))
        parts.append(jax.lax.map(part, jnp.asarray(numbers * size)))
    joined = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
    halves = (_joined(chunks, half) for chunks in joined)
    return jnp.concatenate(list(halves), axis=1)


def _joined(chunks: Float[Array, "chunks batch size heads dim"], half: int) -> Array:
    """Puts chunks of tokens one after the other."""
    whole = jnp.moveaxis(chunks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :half]


def block_diffusion_mask(tokens: int, block_length: int) -> Bool[Array, "tokens tokens"]:
    """Returns which query (first axis) sees which key, for [noisy ; clean]: to look at, and test.

    Args:
        tokens: of both halves together.
        block_length: tokens of a block.
    """
    half = tokens // 2
    block = jnp.tile(jnp.arange(half) // block_length, 2)
    noisy = jnp.arange(tokens) < half
    query, key = block[:, None], block[None]
    from_noisy, to_noisy = noisy[:, None], noisy[None]
    own = (from_noisy == to_noisy) & (query == key)
    return (
        own | (from_noisy & ~to_noisy & (query > key)) | (~from_noisy & ~to_noisy & (query >= key))
    )
