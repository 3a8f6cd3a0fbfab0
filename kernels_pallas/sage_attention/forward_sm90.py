"""The forward kernel for Hopper: softmax(Q·Kᵀ)·V with both products in INT8.

A block of threads works on 128 queries of one head, then on others (`schedule`). Two warpgroups of
64 queries compute, a third one keeps copies of keys and values in flight. The two take turns, so
that one multiplies while the other exponentiates: at head_dim 128 with the tensor cores, at 64,
where exponentials take longer than products, with the units that make those.

Algorithm 1 of SageBwd (arXiv 2603.02170), with P scaled by the largest entry of its own row in the
tile.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.halves import largest_of_rows, round_half, sum_half, to_half
from kernels_pallas.mosaic.magic import MAGIC
from kernels_pallas.mosaic.products import (
    COLUMN,
    ROW,
    WGMMA,
    Sum,
    accumulate,
    full,
    rows,
    tile,
)
from kernels_pallas.mosaic.team import COMPILER_PARAMS, ROWS, Team
from kernels_pallas.sage_attention.problem import TILE, Limits, Problem, Span
from kernels_pallas.sage_attention.schedule import Schedule
from kernels_pallas.sage_attention.segments import Segments
from kernels_pallas.sage_attention.tiling import scale_of_scores

_LOG2_E = math.log2(math.e)
_LOG2_127 = math.log2(127.0)
# Less than every sum of products plus MAGIC: what masked scores become.
_LOWEST = MAGIC - 2.0**22
# The logarithm of the weight of a row that has seen no key.
EMPTY_MAXIMUM = -1e30
TEAM = Team(2, 232)


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Shared memory of the kernel.

    Attributes:
        block_kv: keys in a tile, which share one scale.
        stages: tiles of keys and values in flight.
    """

    block_kv: int = 256
    stages: int = 2


class _Place(NamedTuple):
    """What a block of threads works on.

    Attributes:
        batch, head, kv_head: which.
        first_row: the first of 128 queries.
        used: queries that attend to something, keys that are attended to.
        span: the tiles of keys that the queries see.
    """

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    first_row: jax.Array
    used: tuple[jax.Array, jax.Array]
    span: Span


def forward(
    problem: Problem,
    tiles: ForwardTiles,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scales: tuple[jax.Array, jax.Array, jax.Array],
    lengths: tuple[jax.Array, jax.Array],
    segments: Segments | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
        problem: what is computed.
        tiles: how.
        query: int8 (batch, heads, queries, head_dim), queries padded to a multiple of 128.
        key: int8 (batch, kv_heads, keys, head_dim), keys padded to a multiple of `block_kv`.
        value: int8 (batch, kv_heads, head_dim, keys), permuted along the keys.
        scales: of query (batch, heads, queries / 128), key and value (batch, kv_heads, tiles).
        lengths: int32 (batch,) queries that attend to something, keys that are attended to.
        segments: if queries see keys of their own segment only.

    Returns:
        Output, `problem.query_shape`; for each row (batch, heads, padded queries) the
        largest score and the sum of exp2(score - largest), float32, in units of log 2. Rows of
        the last two beyond the queries' length hold anything.
    """
    block_q, block_kv, stages = ROWS, tiles.block_kv, tiles.stages
    head_dim, interpret = problem.head_dim, problem.interpret
    log2_scale = problem.scale * _LOG2_E
    turns_to_exponentiate = head_dim < 2 * ROWS
    schedule = Schedule.of(problem, TEAM.blocks(problem.queries))

    def kernel(refs, scratch):
        (q, k, v, q_scale, k_scale, v_scale, q_length, kv_length), refs = refs[:8], refs[8:]
        *packed, out, m_out, total_out = refs
        packed = Segments(*packed) if packed else None
        tiles_sm, (k_full, v_full, q_full), (k_free, v_free), turn = scratch
        q_sm, k_sm, v_sm, o_sm, m_sm, total_sm, zero_sm, sink_sm = tiles_sm
        wg, worker = lax.axis_index("wg"), lax.axis_index("worker")
        items = schedule.rounds(worker)

        def place_of(item):
            b, h, block = schedule.place(item, worker)
            first_row, used = block * TEAM.rows, (q_length[b], kv_length[b])
            limits = Limits.of(packed.keys, b, first_row, TEAM.rows) if packed else None
            span = problem.keys_seen(first_row, TEAM.rows, *used, block_kv, limits)
            return _Place(b, h, lax.div(h, jnp.int32(problem.group)), first_row, used, span)

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def fetch_query(item):
            place = place_of(item)
            here = pl.ds(place.first_row + wg * block_q, block_q)
            plgpu.copy_gmem_to_smem(q.at[place.batch, place.head, here], q_sm.at[wg], q_full.at[wg])

        def attend(item, done):
            """Computes an item after `done` tiles of keys; returns the new number of those."""
            b, h, kv_head, first_row, used, span = place_of(item)
            row = first_row + wg * block_q
            here = pl.ds(row, block_q)
            slot_of = lambda step: lax.rem(done + step - span.first, jnp.int32(stages))
            if packed:
                q_ids = plgpu.load(packed.query_ids.at[b, here], layout=ROW, optimized=False)
            plgpu.barrier_wait(q_full.at[wg])
            sq = q_scale[b, h, lax.div(row, jnp.int32(TILE))] * log2_scale

            @pl.when(span.first < span.last)
            def _():
                plgpu.barrier_wait(k_full.at[slot_of(span.first)])

            def scores(slot):
                def body(s):
                    s.add(q_sm.at[wg], k_sm.at[slot])
                    if not turns_to_exponentiate:
                        take_turns()
                    return (s.read(),)

                shape = (block_q, block_kv)
                return accumulate(
                    body, [Sum(shape, integer=True)], [full(shape, 0.0)], interpret=interpret
                )[0]

            def weighted_values(p8, slot, step):
                def body(o):
                    o.add(p8, v_sm.at[slot])

                    @pl.when(step + 1 < span.last)
                    def _():
                        plgpu.barrier_wait(k_full.at[slot_of(step + 1)])

                    return (o.read(),)

                shape = (block_q, head_dim)
                return accumulate(
                    body, [Sum(shape, integer=True)], [full(shape, 0.0)], interpret=interpret
                )[0]

            def visit(step, carry, *, masked):
                acc, m, total = carry
                slot = slot_of(step)
                s_scale = scale_of_scores(sq, k_scale[b, kv_head, step])
                v_s = v_scale[b, kv_head, step]
                s = scores(slot)
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    ids, first = None, step * block_kv
                    if packed:
                        k_ids = packed.key_ids.at[b, pl.ds(first, block_kv)]
                        ids = q_ids, plgpu.load(k_ids, layout=COLUMN, optimized=False)
                    visible = problem.visible(s.shape, row, first, used[1], block_kv, ids)
                    s = jnp.where(visible, s, _LOWEST)
                largest = largest_of_rows(s, interpret=interpret)
                m_tile = (largest - MAGIC) * s_scale
                if masked:
                    m_tile = jnp.where(largest == _LOWEST, EMPTY_MAXIMUM, m_tile)
                m_new = jnp.maximum(m, m_tile)
                alpha, beta = jnp.exp2(m - m_new), jnp.exp2(m_tile - m_new)
                shift = (m_tile - _LOG2_127) + MAGIC * s_scale
                if turns_to_exponentiate:
                    plgpu.barrier_wait(turn)
                    take_turns()
                    # No instruction that needs what is read here can be moved to before the wait.
                    shift += plgpu.load(zero_sm.at[wg], layout=ROW, optimized=False)
                p = jnp.exp2(s * s_scale - rows(shift, s.shape))  # 127 P
                # The shift is rounded: the row's largest P is off 1 by a factor that is known, all
                # of the row is. Without the correction codes could pass 127 and wrap around.
                correction = jnp.exp2(shift - largest * s_scale + _LOG2_127)
                correction = correction.astype(jnp.float16).astype(jnp.float32)
                if masked:
                    p = jnp.where(s == _LOWEST, 0.0, p)
                p = to_half(p, interpret=interpret)
                p_sum = sum_half(p, interpret=interpret)
                if turns_to_exponentiate:
                    sink_sm.at[wg][...] = p_sum  # needs every exponential, before the arrival
                    plgpu.barrier_arrive(turn)
                p8 = round_half([p], correction, interpret=interpret)
                total = total * alpha + p_sum * (beta * correction)
                gain = beta * v_s
                # What the next product has in excess is taken away before, in the same operation.
                acc = acc * rows(alpha, acc.shape) - rows(gain * MAGIC, acc.shape)
                acc, total, m_new, p8, gain = lax.optimization_barrier(
                    (acc, total, m_new, p8, gain)
                )
                if not turns_to_exponentiate:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                if not turns_to_exponentiate:
                    plgpu.barrier_wait(turn)
                o = weighted_values(p8, slot, step)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc + o * rows(gain, o.shape), m_new, total

            carry = (
                full((block_q, head_dim), 0.0),
                full((block_q,), EMPTY_MAXIMUM, layout=ROW),
                full((block_q,), 0.0, layout=ROW),
            )
            acc, m, total = span.fold(visit, carry)
            # All threads are done with the query, and what was written before is gone.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(item + 1 < items)(lambda: fetch_query(item + 1))
            safe = jnp.where(total == 0.0, 1.0, total)
            result = acc / rows(safe, acc.shape)
            if problem.ragged_queries:
                inside = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=WGMMA)
                result = jnp.where(inside < used[0] - row, result, 0.0)
            if packed:  # What a row without keys has added up is the rounding of MAGIC.
                result = jnp.where(rows(total, acc.shape) == 0.0, 0.0, result)
            o_sm.at[wg][...] = result.astype(problem.dtype)
            m_sm.at[wg][...], total_sm.at[wg][...] = m, total * (1.0 / 127.0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_sm.at[wg], out.at[b, here, h])
            plgpu.copy_smem_to_gmem(m_sm.at[wg], m_out.at[b, h, here])
            plgpu.copy_smem_to_gmem(total_sm.at[wg], total_out.at[b, h, here])
            return done + span.last - span.first

        def supply(item, done):
            """Fetches the keys and values of an item."""
            place = place_of(item)
            b, kv_head, span = place.batch, place.kv_head, place.span

            @pl.loop(span.first, span.last)
            def _(step):
                count = done + step - span.first
                slot, at = lax.rem(count, jnp.int32(stages)), pl.ds(step * block_kv, block_kv)

                @pl.when(count >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])

                plgpu.copy_gmem_to_smem(k.at[b, kv_head, at], k_sm.at[slot], k_full.at[slot])
                plgpu.copy_gmem_to_smem(v.at[b, kv_head, :, at], v_sm.at[slot], v_full.at[slot])

            return done + span.last - span.first

        @pl.when(wg < TEAM.size)
        def compute():
            plgpu.set_max_registers(TEAM.registers, action="increase")
            zero_sm.at[wg][...] = full((block_q,), 0.0, layout=ROW)
            fetch_query(jnp.int32(0))
            pl.when(wg == 1)(take_turns)
            if turns_to_exponentiate:
                plgpu.barrier_arrive(turn)
            lax.fori_loop(0, items, attend, jnp.int32(0))
            if turns_to_exponentiate:
                plgpu.barrier_wait(turn)
            pl.when(wg == 0)(take_turns)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == TEAM.size)
        def copy():
            plgpu.set_max_registers(40, action="decrease")
            lax.fori_loop(0, items, supply, jnp.int32(0))

    def sage_attention_forward(*refs):
        two = TEAM.size
        pl.run_scoped(
            lambda *scratch: kernel(refs, scratch),
            (
                tile((two, block_q, head_dim), jnp.int8),
                tile((stages, block_kv, head_dim), jnp.int8),
                tile((stages, head_dim, block_kv), jnp.int8),
                tile((two, block_q, head_dim), problem.dtype),
                *(plgpu.SMEM((two, block_q), jnp.float32),) * 4,
            ),
            (
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=two),
            ),
            (plgpu.Barrier(num_arrivals=two, num_barriers=stages),) * 2,
            plgpu.Barrier(num_arrivals=two),
            collective_axes="wg",
        )

    statistics = jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
    return plgpu.kernel(
        sage_attention_forward,
        out_type=(
            jax.ShapeDtypeStruct(problem.query_shape, problem.dtype),
            statistics,
            statistics,
        ),
        grid=(schedule.workers,),
        grid_names=("worker",),
        num_threads=TEAM.size + 1,
        thread_name="wg",
        compiler_params=COMPILER_PARAMS,
    )(query, key, value, *scales, *lengths, *(segments or ()))
