"""The backward kernels for Hopper: four products in INT8, dP = dO·Vᵀ in 16 bits.

Two kernels, so that every sum is made by one warpgroup in one order: two runs give the same bits.
`query_gradient` gives each warpgroup 64 queries and visits tiles of keys; `key_value_gradients`
gives it 64 keys, computes Sᵀ and dPᵀ and visits tiles of queries. Both recompute P from the
log-sum-exp. Algorithm 2 of SageBwd (arXiv 2603.02170), but with one scale of P and dS for each row
of a tile instead of one for the tile: what is a row here never is the axis summed over, so the
scale leaves the product, and its maximum needs no other warp.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.halves import quantize_half, to_half
from kernels_pallas.mosaic.pipeline import Kernel, launch
from kernels_pallas.mosaic.products import (
    COLUMN,
    MAGIC,
    ROW,
    WGMMA,
    Sum,
    accumulate,
    columns,
    full,
    join,
    rows,
    tile,
)
from kernels_pallas.mosaic.team import ROWS
from kernels_pallas.sage_attention.problem import TILE, Limits, Problem, team_for
from kernels_pallas.sage_attention.segments import Segments
from kernels_pallas.sage_attention.tiling import scale_of_scores

HALF_EXPONENT = 12
"""P goes through float16 multiplied by 2**12, so that rows as small as 2**-21 keep 7 bits."""

DP_EXPONENT = 3
"""dP - D goes through float16 as a part of its bound, multiplied by 2**3; dS then stays finite."""

_LOG2_E = math.log2(math.e)


class Operands(NamedTuple):
    """What both kernels read.

    Attributes:
        query: int8 (batch, heads, queries, head_dim), padded to a multiple of 128 queries.
        query_transposed: int8 (batch, heads, head_dim, queries), permuted along the queries.
        query_scale: float32 (batch, heads, queries / 128).
        key: int8 (batch, kv_heads, keys, head_dim), padded to a multiple of 128 keys.
        key_transposed: int8 (batch, kv_heads, head_dim, keys), permuted along the keys.
        key_scale: float32 (batch, kv_heads, keys / a multiple of 128).
        value: `problem.key_shape`, 16 bits.
        d_out: `problem.query_shape`, 16 bits.
        d_out_transposed: int8 like `query_transposed`.
        d_out_scale: float32 (batch, heads, queries / 128).
        bound: float32 (batch, heads), powers of two: |dP - D| does not exceed them times
            2**DP_EXPONENT.
        tile_bound: the same for each tile of queries, (batch, heads, queries / 128).
        statistics: float32 (batch, heads, queries / 128, 2, 128), for each row its log-sum-exp in
            units of log 2 (infinite for rows that attend to nothing) less HALF_EXPONENT, and
            D = rowsum(dO * O) divided by `bound`.
        query_length: int32 (batch,), queries that attend to something.
        key_length: int32 (batch,), keys that are attended to.
        segments: if queries see keys of their own segment only.
    """

    query: jax.Array
    query_transposed: jax.Array
    query_scale: jax.Array
    key: jax.Array
    key_transposed: jax.Array
    key_scale: jax.Array
    value: jax.Array
    d_out: jax.Array
    d_out_transposed: jax.Array
    d_out_scale: jax.Array
    bound: jax.Array
    tile_bound: jax.Array
    statistics: jax.Array
    query_length: jax.Array
    key_length: jax.Array
    segments: Segments | None = None

    @property
    def keys_per_scale(self) -> int:
        """Keys that share a scale."""
        return self.key.shape[2] // self.key_scale.shape[2]


def query_gradient(problem: Problem, operands: Operands, *, stages: int) -> jax.Array:
    """Returns dQ, `problem.query_shape`.

    Args:
        problem: what is computed.
        operands: see there.
        stages: tiles of keys in flight.
    """
    head_dim, interpret = problem.head_dim, problem.interpret
    team = team_for(head_dim)
    last_tile, last_block = operands.key_scale.shape[2] - 1, operands.query_scale.shape[2] - 1
    steps_per_scale = operands.keys_per_scale // TILE
    score_scale = problem.scale * _LOG2_E
    # Registers are short where three warpgroups compute: half of a tile at a time.
    shape = (ROWS, TILE if team.size == 2 else TILE // 2)
    parts = [pl.ds(i, shape[1]) for i in range(0, TILE, shape[1])]

    def limits(x, b, row, rows):
        return Limits.of(x.segments.keys, b, row, rows) if x.segments else None

    def compute(refs, fixed_sm, moving_sm, barriers, position):
        x, (dq,) = refs
        (q_sm, do_sm, out_sm), ((k_sm, v_sm, kt_sm),) = fixed_sm, moving_sm
        b, h, kv_head, row, used, span = position
        wg = lax.axis_index("wg")
        # The last warpgroups may own rows beyond the padding, of which nothing is written.
        here, block = pl.ds(row, ROWS), jnp.minimum(lax.div(row, jnp.int32(TILE)), last_block)
        inside = pl.ds(lax.rem(row, jnp.int32(TILE)), ROWS)
        plgpu.copy_gmem_to_smem(x.query.at[b, h, here], q_sm.at[wg], barriers.fixed.at[wg])
        plgpu.copy_gmem_to_smem(x.d_out.at[b, here, h], do_sm.at[wg], barriers.fixed.at[wg])
        sq = x.query_scale[b, h, block] * score_scale
        bound = x.tile_bound[b, h, block]
        inverse_bound = 1.0 / bound
        lse, delta = (
            plgpu.load(x.statistics.at[b, h, block, i, inside], layout=ROW, optimized=False)
            for i in (0, 1)
        )
        delta *= x.bound[b, h] * inverse_bound
        if x.segments:
            q_ids = plgpu.load(x.segments.query_ids.at[b, here], layout=ROW, optimized=False)
        tile_of = lambda step: jnp.minimum(lax.div(step, jnp.int32(steps_per_scale)), last_tile)
        scale_of = lambda step: x.key_scale[b, kv_head, tile_of(step)]
        plgpu.barrier_wait(barriers.fixed.at[wg])

        def visit(step, carry, *, masked):
            dq, excess, sk = carry
            slot, sign = barriers.slot(step - span.first), _alternating(step)
            next_sk = scale_of(step + 1)
            barriers.wait(0, slot)
            c = scale_of_scores(sq, sk)

            def scores(part, s_sum, dp_sum):
                s_sum.add(q_sm.at[wg], k_sm.at[slot, part])
                dp_sum.add(do_sm.at[wg], v_sm.at[slot, part])
                p = jnp.exp2(s_sum.read(1) * c - rows(lse + MAGIC * c, shape))
                if masked:
                    ids, first = None, step * TILE + part.start
                    if x.segments:
                        k_ids = x.segments.key_ids.at[b, pl.ds(first, shape[1])]
                        ids = q_ids, plgpu.load(k_ids, layout=COLUMN, optimized=False)
                    seen = problem.visible(shape, row, first, used[1], TILE, ids)
                    p = jnp.where(seen, p, 0.0)
                p = to_half(p, interpret=interpret)
                dp = dp_sum.read() * inverse_bound - rows(delta, shape)
                return (p * to_half(dp, interpret=interpret),)

            ds = []
            for part in parts:
                ds += accumulate(
                    functools.partial(scores, part),
                    [Sum(shape, True), Sum(shape, False)],
                    [full(shape, 0.0, jnp.float16)],
                    interpret=interpret,
                )
            ds8, ds_scale = quantize_half(ds, sign, interpret=interpret)
            gain = ds_scale * (sk * bound * 2.0**-HALF_EXPONENT)
            (dq,) = _add_products((dq,), ds8, kt_sm.at[slot], gain, sign, interpret)
            barriers.done(0, slot)
            return dq, excess + gain * (jnp.float32(sign) * MAGIC), next_sk

        own = span
        if problem.windowed:
            own = problem.keys_seen(row, ROWS, *used, TILE, limits(x, b, row, ROWS)).within(span)
        start = full((ROWS, head_dim), 0.0), full((ROWS,), 0.0, layout=ROW), scale_of(own.first)
        if not interpret:
            team.fan_out(wg, problem.stagger)
        total, excess, _ = barriers.fold(span, own, visit, start)
        total = (total - rows(excess, total.shape)) * problem.scale
        out_sm.at[wg][...] = total.astype(problem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_sm.at[wg], dq.at[b, here, h])
        plgpu.wait_smem_to_gmem(0)

    def position(x, index):
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        first = problem.longest_first(index, team.blocks(problem.queries)) * team.rows
        used = x.query_length[b], x.key_length[b]
        found = limits(x, b, first, team.rows)
        span = problem.keys_seen(first, team.rows, *used, TILE, found)
        row = first + lax.axis_index("wg") * ROWS
        return b, h, lax.div(h, jnp.int32(problem.group)), row, used, span

    def fetch(x, position, step):
        b, _, kv_head, _, _, span = position
        at = pl.ds((span.first + step) * TILE, TILE)
        return (
            (
                x.key.at[b, kv_head, at],
                x.value.at[b, at, kv_head],
                x.key_transposed.at[b, kv_head, :, at],
            ),
        )

    here, moving = (team.size, ROWS, head_dim), (stages, TILE, head_dim)
    (result,) = launch(
        operands,
        Kernel(compute, fetch, position, lambda position: position[5].last - position[5].first),
        fixed=(
            tile(here, jnp.int8),
            tile(here, operands.d_out.dtype),
            tile(here, problem.dtype),
        ),
        moving=(
            (
                tile(moving, jnp.int8),
                tile(moving, operands.value.dtype),
                tile((stages, head_dim, TILE), jnp.int8),
            ),
        ),
        stages=stages,
        out_type=[jax.ShapeDtypeStruct(problem.query_shape, problem.dtype)],
        team=team,
        grid=(problem.batch, problem.heads, team.blocks(problem.queries)),
        name="sage_attention_query_gradient",
    )
    return result


def key_value_gradients(
    problem: Problem, operands: Operands, *, stages: int
) -> tuple[jax.Array, jax.Array]:
    """Returns dK and dV, `problem.key_shape`, summed over the query heads of a group.

    Args:
        problem: what is computed.
        operands: see there.
        stages: tiles of queries in flight.
    """
    head_dim, interpret = problem.head_dim, problem.interpret
    team = team_for(head_dim)
    last_tile, last_block = operands.query_scale.shape[2] - 1, operands.key_scale.shape[2] - 1
    score_scale = problem.scale * _LOG2_E
    # Registers are short: half of a tile at a time, S before dP, and few columns of dK and dV.
    shape, width = (ROWS, TILE // 2), ROWS if team.size == 2 else ROWS // 2
    parts = [pl.ds(i, shape[1]) for i in range(0, TILE, shape[1])]

    def limits(x, b, row, rows):
        return Limits.of(x.segments.queries, b, row, rows) if x.segments else None

    def compute(refs, fixed_sm, moving_sm, barriers, position):
        x, (dk, dv) = refs
        (k_sm, v_sm, *out_sm), ((q_sm, lse_sm, dot_sm), (do_sm, delta_sm, qt_sm)) = (
            fixed_sm,
            moving_sm,
        )
        b, kv_head, row, used, span = position
        wg = lax.axis_index("wg")
        # The last warpgroups may own rows beyond the padding, of which nothing is written.
        here, block = pl.ds(row, ROWS), lax.div(row, jnp.int32(operands.keys_per_scale))
        block = jnp.minimum(block, last_block)
        plgpu.copy_gmem_to_smem(x.key.at[b, kv_head, here], k_sm.at[wg], barriers.fixed.at[wg])
        plgpu.copy_gmem_to_smem(x.value.at[b, here, kv_head], v_sm.at[wg], barriers.fixed.at[wg])
        sk = x.key_scale[b, kv_head, block] * score_scale
        plgpu.barrier_wait(barriers.fixed.at[wg])
        tiles = span.last - span.first
        own = span
        if problem.windowed:
            found = limits(x, b, row, ROWS)
            own = problem.queries_seeing(row, ROWS, *used, TILE, found).within(span)
        if x.segments:
            k_ids = plgpu.load(x.segments.key_ids.at[b, here], layout=ROW, optimized=False)

        def head(g, carry):
            h = kv_head * problem.group + g
            scale_of = lambda step: x.query_scale[b, h, jnp.minimum(step, last_tile)]
            bound = x.bound[b, h]
            inverse_bound = 1.0 / bound

            def visit(step, carry, *, masked):
                dk, dv, excess, sq = carry
                slot, sign = barriers.slot(g * tiles + step - span.first), _alternating(step)
                next_sq, sdo = scale_of(step + 1), x.d_out_scale[b, h, step]
                barriers.wait(0, slot)
                c = scale_of_scores(sq, sk)

                def probabilities(part, s_sum):
                    s_sum.add(k_sm.at[wg], q_sm.at[slot, part])
                    lse = plgpu.load(lse_sm.at[slot, part], layout=COLUMN)
                    p = jnp.exp2(s_sum.read() * c - columns(lse + MAGIC * c, shape))
                    if masked:
                        ids, first = None, step * TILE + part.start
                        if x.segments:
                            q_ids = x.segments.query_ids.at[b, pl.ds(first, shape[1])]
                            ids = k_ids, plgpu.load(q_ids, layout=COLUMN, optimized=False)
                        seen = problem.visible_transposed(shape, row, first, ids)
                        p = jnp.where(seen, p, 0.0)
                    return (to_half(p, interpret=interpret),)

                def score_gradients(part, p, dp_sum):
                    dp_sum.add(v_sm.at[wg], do_sm.at[slot, part])
                    delta = plgpu.load(delta_sm.at[slot, part], layout=COLUMN)
                    dp = dp_sum.read() * inverse_bound - columns(delta, shape)
                    return (p * to_half(dp, interpret=interpret),)

                def multiply(body, *arguments, integer):
                    return accumulate(
                        functools.partial(body, *arguments),
                        [Sum(shape, integer)],
                        [full(shape, 0.0, jnp.float16)],
                        interpret=interpret,
                    )

                ps, ds = [], []
                for part in parts:
                    ps += multiply(probabilities, part, integer=True)
                p8, p_scale = quantize_half(ps, sign, interpret=interpret)
                p_gain = p_scale * (sdo * 2.0**-HALF_EXPONENT)
                dv = _add_products(dv, p8, dot_sm.at[slot], p_gain, sign, interpret)
                barriers.done(0, slot)
                barriers.wait(1, slot)
                for part, p in zip(parts, ps, strict=True):
                    ds += multiply(score_gradients, part, p, integer=False)
                ds8, ds_scale = quantize_half(ds, sign, interpret=interpret)
                ds_gain = ds_scale * (sq * bound * 2.0**-HALF_EXPONENT)
                dk = _add_products(dk, ds8, qt_sm.at[slot], ds_gain, sign, interpret)
                barriers.done(1, slot)
                excess = [
                    e + g * (jnp.float32(sign) * MAGIC)
                    for e, g in zip(excess, (ds_gain, p_gain), strict=True)
                ]
                return dk, dv, excess, next_sq

            carry = *carry, scale_of(own.first)
            return barriers.fold(span, own, visit, carry, step=g * tiles)[:3]

        zeros = tuple(full((ROWS, width), 0.0) for _ in range(head_dim // width))
        none = [full((ROWS,), 0.0, layout=ROW) for _ in "kv"]
        if not interpret:
            team.fan_out(wg, problem.stagger)
        *totals, excess = lax.fori_loop(0, problem.group, head, (zeros, zeros, none))
        (out_sm,) = out_sm or [v_sm]
        for total, more, scale, out in zip(
            totals, excess, (problem.scale, 1.0), (dk, dv), strict=True
        ):
            total = (join(total, interpret=interpret) - rows(more, (ROWS, head_dim))) * scale
            if problem.ragged_keys:
                inside = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=WGMMA)
                total = jnp.where(inside < used[1] - row, total, 0.0)
            out_sm.at[wg][...] = total.astype(problem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_sm.at[wg], out.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

    def position(x, index):
        b, kv_head = lax.axis_index("batch"), lax.axis_index("heads")
        first = index * team.rows  # with a causal mask the first see the most
        used = x.query_length[b], x.key_length[b]
        found = limits(x, b, first, team.rows)
        span = problem.queries_seeing(first, team.rows, *used, TILE, found)
        return b, kv_head, first + lax.axis_index("wg") * ROWS, used, span

    def fetch(x, position, step):
        b, kv_head, _, _, span = position
        tiles = span.last - span.first
        h = kv_head * problem.group + lax.div(step, tiles)
        block = span.first + lax.rem(step, tiles)
        at = pl.ds(block * TILE, TILE)
        return (
            (
                x.query.at[b, h, at],
                x.statistics.at[b, h, block, 0],
                x.d_out_transposed.at[b, h, :, at],
            ),
            (
                x.d_out.at[b, at, h],
                x.statistics.at[b, h, block, 1],
                x.query_transposed.at[b, h, :, at],
            ),
        )

    here, moving = (team.size, ROWS, head_dim), (stages, TILE, head_dim)
    transposed = tile((stages, head_dim, TILE), jnp.int8)
    row = plgpu.SMEM((stages, TILE), jnp.float32)
    # Results in 16 bits leave through the memory of V.
    staging = () if problem.dtype == operands.value.dtype else (tile(here, problem.dtype),)
    steps = lambda position: (position[4].last - position[4].first) * problem.group
    dk, dv = launch(
        operands,
        Kernel(compute, fetch, position, steps),
        fixed=(tile(here, jnp.int8), tile(here, operands.value.dtype), *staging),
        moving=(
            (tile(moving, jnp.int8), row, transposed),
            (tile(moving, operands.d_out.dtype), row, transposed),
        ),
        stages=stages,
        out_type=[jax.ShapeDtypeStruct(problem.key_shape, problem.dtype)] * 2,
        team=team,
        grid=(problem.batch, problem.kv_heads, team.blocks(problem.keys)),
        name="sage_attention_key_value_gradients",
    )
    return dk, dv


def _alternating(step: jax.Array) -> jax.Array:
    """Returns 1 for even steps and -1 for odd ones: see `Sum`."""
    return 1 - 2 * lax.rem(step, jnp.int32(2))


def _add_products(
    sums: Sequence[jax.Array],
    left: jax.Array,
    right: Any,
    gain: jax.Array,
    sign: jax.Array,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Adds gain · (left · rightᵀ + sign · MAGIC) to sums, which share the columns.

    Registers are short, so the product is made for one sum at a time.

    Args:
        sums: float32 (64, columns / number of sums).
        left: int8, `sign` included.
        right: int8 (columns, contracted), in shared memory.
        gain: a number for each row.
        sign: see `Sum`.
        interpret: whether the kernel runs in the interpreter.
    """
    shape, width = (left.shape[0], right.shape[0] // len(sums)), right.shape[0] // len(sums)

    def body(i, part):
        part.add(left, right.at[pl.ds(i * width, width)])
        return (sums[i] + part.read() * rows(gain, shape),)

    return tuple(
        accumulate(
            functools.partial(body, i), [Sum(shape, True, sign)], [total], interpret=interpret
        )[0]
        for i, total in enumerate(sums)
    )
