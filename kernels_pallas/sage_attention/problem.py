"""What the kernels are asked to compute, and which tiles of keys or queries that concerns.

Without an explicit mask, a query t sees an interval of keys: from t - left to t + right, cut off at
the number of keys. So every mask is two bounds, tiles outside of them are skipped, and only tiles
on the edge have to be masked, element by element. Segments narrow the bounds (`segments`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.products import WGMMA, columns, rows
from kernels_pallas.mosaic.team import ROWS, Team
from kernels_pallas.sage_attention.segments import CHUNK

TILE = 128
"""Queries that share a scale, and tokens that a step of the backward kernels sums over."""


def team_for(head_dim: int) -> Team:
    """Three warpgroups hide each other's waits better than two, where registers suffice."""
    return Team(3, 160) if head_dim <= ROWS else Team(2, 240)


class Span(NamedTuple):
    """A range of tiles, of which those from `inner_first` to `inner_last` need no mask.

    Whether there can be any that do, before or after those, is known to the compiler.
    """

    first: jax.Array
    inner_first: jax.Array
    inner_last: jax.Array
    last: jax.Array
    masked_before: bool
    masked_after: bool

    def within(self, outer: "Span") -> "Span":
        """Cuts the range off where another one begins and ends."""
        cut = lambda tile: jnp.clip(tile, outer.first, outer.last)
        return self._replace(
            first=cut(self.first),
            inner_first=cut(self.inner_first),
            inner_last=cut(self.inner_last),
            last=cut(self.last),
        )

    def fold(self, visit: Callable[..., Any], carry: Any) -> Any:
        """Folds `visit(tile, carry, masked=...)` over the tiles, in order."""
        masked = functools.partial(visit, masked=True)
        if self.masked_before:
            carry = lax.fori_loop(self.first, self.inner_first, masked, carry)
        inner = functools.partial(visit, masked=False)
        carry = lax.fori_loop(self.inner_first, self.inner_last, inner, carry)
        if self.masked_after:
            carry = lax.fori_loop(self.inner_last, self.last, masked, carry)
        return carry


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and options that are known when a kernel is compiled.

    Attributes:
        batch: number of sequences.
        queries: tokens of the query.
        keys: tokens of key and value.
        heads: heads of the query.
        kv_heads: heads of key and value, a divisor of `heads`.
        head_dim: 64 or 128.
        dtype: of the output, and of the operands of dO·Vᵀ.
        scale: factor on the scores.
        left: how far a query looks back, None: without limit.
        right: how far it looks ahead; 0 if causal.
        ragged_queries: whether lengths given when the program runs cut queries off.
        ragged_keys: the same for keys.
        segmented: whether queries see keys of their own segment only.
        interpret: whether the kernels run in the interpreter.
        stagger: see `tuning.Tuning`.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    scale: float
    left: int | None = None
    right: int | None = None
    ragged_queries: bool = False
    ragged_keys: bool = False
    segmented: bool = False
    interpret: bool = False
    stagger: int = 0

    @property
    def group(self) -> int:
        """Query heads that share a head of keys."""
        return self.heads // self.kv_heads

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output, dO and dQ: copies need tokens in multiples of 8."""
        return self.batch, round_up(self.queries, 8), self.heads, self.head_dim

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """Shape of value, dK and dV."""
        return self.batch, round_up(self.keys, 8), self.kv_heads, self.head_dim

    @property
    def windowed(self) -> bool:
        """Whether it depends on a query which keys it sees."""
        return self.left is not None or self.right is not None or self.segmented

    @property
    def later_see_more(self) -> bool:
        """Whether later queries see more keys."""
        return self.right is not None and self.left is None

    def longest_first(self, index: jax.Array, count: int) -> jax.Array:
        """Reverses the order of blocks of queries where later ones see more keys."""
        return count - 1 - index if self.later_see_more else index

    def keys_seen(
        self,
        row: jax.Array,
        rows: int,
        queries: jax.Array,
        keys: jax.Array,
        block_kv: int,
        limits: "Limits | None" = None,
    ) -> Span:
        """Returns the tiles of keys that the queries from `row` to `row + rows` see.

        Args:
            row: the first query.
            rows: number of queries.
            queries: queries that attend to anything; known when the kernel runs, as are `keys`.
            keys: keys that are attended to.
            block_kv: keys in a tile.
            limits: those of the rows, if there are segments.
        """
        end, cut = jnp.minimum(row + rows, queries), self._cuts_keys(block_kv)
        return _span(row, end, self.left, self.right, keys, block_kv, limits, masks_limit=cut)

    def queries_seeing(
        self,
        column: jax.Array,
        columns: int,
        queries: jax.Array,
        keys: jax.Array,
        block_q: int,
        limits: "Limits | None" = None,
    ) -> Span:
        """Returns the tiles of queries that see the keys from `column` to `column + columns`.

        Queries and keys beyond their lengths need no mask here: the former have an infinite
        log-sum-exp, the gradients of the latter are cut off at the end.
        """
        end = jnp.minimum(column + columns, keys)
        return _span(
            column, end, self.right, self.left, queries, block_q, limits, masks_limit=False
        )

    def visible(
        self,
        shape: tuple[int, ...],
        row: jax.Array,
        column: jax.Array,
        keys: jax.Array,
        block_kv: int,
        ids: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Returns which queries (rows) see which keys (columns), in a part of a masked tile.

        Args:
            shape: of the part.
            row: its first query.
            column: its first key.
            keys: keys that are attended to.
            block_kv: keys in the tile, as `keys_seen` was told.
            ids: of the rows and of the columns, if there are segments.
        """
        r, c = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=WGMMA) for i in (0, 1))
        conditions = _same(ids, shape)
        if self._cuts_keys(block_kv):
            conditions.append(c < keys - column)
        if self.right is not None:
            conditions.append(c <= r + (row + self.right - column))
        if self.left is not None:
            conditions.append(c >= r + (row - self.left - column))
        return functools.reduce(jnp.logical_and, conditions)

    def visible_transposed(
        self,
        shape: tuple[int, ...],
        column: jax.Array,
        row: jax.Array,
        ids: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Returns which keys of a tile (its rows) are seen by which queries (columns)."""
        s, t = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=WGMMA) for i in (0, 1))
        conditions = _same(ids, shape)
        if self.right is not None:
            conditions.append(s <= t + (row + self.right - column))
        if self.left is not None:
            conditions.append(s >= t + (row - self.left - column))
        return functools.reduce(jnp.logical_and, conditions)

    def _cuts_keys(self, block_kv: int) -> bool:
        return self.ragged_keys or self.keys % block_kv != 0


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple


class Limits(NamedTuple):
    """Which tokens some tokens see at most, and which all of them see; see `Segments.keys`."""

    first: jax.Array
    inner_first: jax.Array
    inner_last: jax.Array
    last: jax.Array

    @classmethod
    def of(cls, chunks: Any, batch: jax.Array, row: jax.Array, rows: int) -> "Limits":
        """Reads those of the rows from `row` to `row + rows`, multiples of 64."""
        start, end = lax.div(row, jnp.int32(CHUNK)), chunks.shape[1] - 1
        ways = jnp.minimum, jnp.maximum, jnp.minimum, jnp.maximum
        indices = [jnp.minimum(start + i, end) for i in range(rows // CHUNK)]
        return cls(
            *(
                functools.reduce(way, [chunks[batch, index, i] for index in indices])
                for i, way in enumerate(ways)
            )
        )


def _same(ids: tuple[jax.Array, jax.Array] | None, shape: tuple[int, ...]) -> list[jax.Array]:
    """Returns the condition that rows and columns have the same id, if there are ids."""
    return [] if ids is None else [rows(ids[0], shape) == columns(ids[1], shape)]


def _span(start, end, left, right, limit, block, limits, *, masks_limit) -> Span:
    """Tiles that [start, end) reaches, where t reaches from t - left to t + right below `limit`."""
    lowest = lambda t: jnp.int32(0) if left is None else jnp.maximum(t - left, 0)
    highest = lambda t: limit if right is None else jnp.minimum(t + right + 1, limit)
    # What the first token and the last one reach bounds what any of them and all of them do.
    outer, inner = (lowest(start), highest(end - 1)), (lowest(end - 1), highest(start))
    before, after = left is not None, right is not None or masks_limit
    if limits is not None:
        before = after = True
        outer = jnp.maximum(outer[0], limits.first), jnp.minimum(outer[1], limits.last)
        inner = jnp.maximum(inner[0], limits.inner_first), jnp.minimum(inner[1], limits.inner_last)
    last = jnp.where(end > start, _ceil_div(outer[1], block), 0)
    first = lax.div(outer[0], jnp.int32(block))
    if limits is not None:
        first = jnp.minimum(first, last)
    last = jnp.maximum(first, last)
    inner_first, inner_last = first, last
    if before:
        inner_first = jnp.clip(_ceil_div(inner[0], block), first, last)
    if after:
        inner_last = jnp.clip(lax.div(inner[1], jnp.int32(block)), inner_first, last)
    return Span(first, inner_first, inner_last, last, before, after)


def _ceil_div(x, y: int):
    return lax.div(jnp.int32(x) + jnp.int32(y - 1), jnp.int32(y))
