"""Packed sequences: which keys have the segment id of a query, and which queries that of a key.

A token finds the tokens of the other side with its own id between a first and a last one. Where
documents lie one after the other, that range holds nobody else, and tiles inside it need no mask.
Any other order is right too: only those tiles have to be masked element by element.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64
# Multiple of the tokens in every kind of block and tile.
_PADDING = 768


class Segments(NamedTuple):
    """What the kernels need.

    Attributes:
        query_ids: int32 (batch, queries), padded so that whole tiles can be read.
        key_ids: int32 (batch, keys), padded.
        keys: int32 (batch, chunks, 4). Queries of a chunk of 64 see keys from the first to before
            the last of these numbers only, and all of those from the second to before the third.
        queries: the same for chunks of keys.
    """

    query_ids: Any
    key_ids: Any
    keys: Any
    queries: Any


class Matches(NamedTuple):
    """For each token, the tokens of the other side with its id.

    Attributes:
        first: the first of them, int32 (batch, tokens); the number of tokens where there is none.
        last: one past the last of them; 0 where there is none.
        solid: whether all between first and last are of them, and there are any.
    """

    first: jax.Array
    last: jax.Array
    solid: jax.Array


def match(
    ids: tuple[jax.Array, jax.Array], lengths: tuple[jax.Array, jax.Array]
) -> tuple[Matches, Matches]:
    """Finds for queries the keys with their id, and for keys the queries.

    Args:
        ids: int32 (batch, queries) and (batch, keys).
        lengths: int32 (batch,) each; tokens at or beyond them match nobody.
    """
    own = [(x, _inside(x.shape[1], length)) for x, length in zip(ids, lengths, strict=True)]
    find = jax.vmap(_match)
    return find(*own[0], *own[1]), find(*own[1], *own[0])


def describe(
    ids: tuple[jax.Array, jax.Array],
    lengths: tuple[jax.Array, jax.Array],
    matches: tuple[Matches, Matches],
) -> Segments:
    """Returns what the kernels need; see `match` for the arguments."""
    limits = (_limits(m, n) for m, n in zip(matches, lengths, strict=True))
    return Segments(*(_pad(x, _PADDING, 0) for x in ids), *limits)


def reached(matches: Matches, before: int | None, after: int | None) -> jax.Array:
    """Whether there is a match from `before` tokens before a token to `after` tokens after it.

    Exact where matches are solid; else it may say so where there is none.

    Args:
        matches: of the tokens.
        before: None: however far.
        after: None: however far.

    Returns:
        bool (batch, tokens).
    """
    index = jnp.arange(matches.first.shape[1], dtype=jnp.int32)[None]
    first, last = matches.first, matches.last
    if before is not None:
        first = jnp.maximum(first, index - before)
    if after is not None:
        last = jnp.minimum(last, index + after + 1)
    return first < last


def _match(ids, inside, other_ids, other_inside) -> Matches:
    index = jnp.arange(other_ids.size, dtype=jnp.int32)
    # Sorted by id, tokens beyond the length after all others.
    _, sorted_ids, position = lax.sort((~other_inside, other_ids, index), num_keys=2)
    count = jnp.sum(other_inside, dtype=jnp.int32)
    sorted_ids = jnp.where(index < count, sorted_ids, jnp.iinfo(jnp.int32).max)
    low = jnp.searchsorted(sorted_ids, ids, side="left").astype(jnp.int32)
    high = jnp.minimum(jnp.searchsorted(sorted_ids, ids, side="right").astype(jnp.int32), count)
    found = inside & (low < high)
    at = lambda i: position[jnp.clip(i, 0, index.size - 1)]
    first = jnp.where(found, at(low), index.size)
    last = jnp.where(found, at(high - 1) + 1, 0)
    return Matches(first, last, found & (last - first == high - low))


def _limits(matches: Matches, lengths: jax.Array) -> jax.Array:
    """Returns `Segments.keys` or `Segments.queries`."""
    everything = jnp.iinfo(jnp.int32).max
    inside = _inside(matches.first.shape[1], lengths)
    # Tokens beyond the length do not matter to the inner limits; those without a match forbid any.
    inner_first = jnp.where(inside, jnp.where(matches.solid, matches.first, 0), 0)
    inner_last = jnp.where(inside, jnp.where(matches.solid, matches.last, 0), everything)
    chunks = lambda x, fill: _pad(x, CHUNK, fill).reshape(x.shape[0], -1, CHUNK)
    return jnp.stack(
        [
            chunks(matches.first, everything).min(axis=2),
            chunks(inner_first, 0).max(axis=2),
            chunks(inner_last, everything).min(axis=2),
            chunks(matches.last, 0).max(axis=2),
        ],
        axis=2,
    )


def _inside(tokens: int, lengths: jax.Array) -> jax.Array:
    return jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]


def _pad(x: jax.Array, multiple: int, fill: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)), constant_values=fill)
