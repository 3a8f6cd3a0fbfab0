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

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.products import (
    COLUMN,
    MAGIC,
    ROW,
    WGMMA,
    Sum,
    accumulate,
    columns,
    full,
    pack_int8,
    rows,
    tile,
)
from kernels_pallas.sage_attention.problem import (
    COMPILER_PARAMS,
    COMPUTE_WARPGROUPS,
    LARGEST_SCALE,
    ROWS,
    Problem,
)

_LOG2_E = math.log2(math.e)
_SQUARE = (ROWS, ROWS)
_TINY = 1e-36  # 127 divided by it is still finite


class Operands(NamedTuple):
    """What both kernels read.

    Attributes:
        query: int8 (batch, heads, queries, head_dim), padded to a multiple of 128 queries.
        query_transposed: int8 (batch, heads, head_dim, queries), permuted along the queries.
        query_scale: float32 (batch, heads, queries / 64).
        key: int8 (batch, kv_heads, keys, head_dim), padded to a multiple of 128 keys.
        key_transposed: int8 (batch, kv_heads, head_dim, keys), permuted along the keys.
        key_scale: float32 (batch, kv_heads, keys / 64).
        value: `problem.key_shape`, 16 bits.
        d_out: `problem.query_shape`, 16 bits.
        d_out_transposed: int8 like `query_transposed`.
        d_out_scale: float32 (batch, heads, queries / 64).
        statistics: float32 (batch, heads, queries / 64, 2, 64), for each row its log-sum-exp in
            units of log 2 (infinite for rows that attend to nothing) and D = rowsum(dO * O).
        query_length: int32 (batch,), queries that attend to something.
        key_length: int32 (batch,), keys that are attended to.
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
    statistics: jax.Array
    query_length: jax.Array
    key_length: jax.Array


def query_gradient(problem: Problem, operands: Operands, *, stages: int) -> jax.Array:
    """Returns dQ, `problem.query_shape`.

    Args:
        problem: what is computed.
        operands: see there.
        stages: tiles of keys in flight.
    """
    head_dim, interpret = problem.head_dim, problem.interpret
    score_scale = problem.scale * _LOG2_E

    def compute(refs, fixed_sm, moving_sm, barriers, position):
        x, (dq,) = refs
        (q_sm, do_sm, out_sm), ((k_sm, v_sm), (kt_sm,)) = fixed_sm, moving_sm
        b, h, kv_head, row, used, span = position
        wg = lax.axis_index("wg")
        here, block = pl.ds(row, ROWS), lax.div(row, jnp.int32(ROWS))
        plgpu.copy_gmem_to_smem(x.query.at[b, h, here], q_sm.at[wg], barriers.fixed.at[wg])
        plgpu.copy_gmem_to_smem(x.d_out.at[b, here, h], do_sm.at[wg], barriers.fixed.at[wg])
        sq = x.query_scale[b, h, block] * score_scale
        lse, delta = (
            plgpu.load(x.statistics.at[b, h, block, i], layout=ROW, optimized=False) for i in (0, 1)
        )
        plgpu.barrier_wait(barriers.fixed.at[wg])

        def visit(step, dq, *, masked):
            slot = barriers.slot(step - span.first)
            sk = x.key_scale[b, kv_head, step]
            plgpu.barrier_wait(barriers.arrived[0].at[slot])

            def ds(s_sum, dp_sum):
                s_sum.add(q_sm.at[wg], k_sm.at[slot])
                dp_sum.add(do_sm.at[wg], v_sm.at[slot])
                c = jnp.minimum(sq * sk, LARGEST_SCALE)
                p = jnp.exp2(s_sum.read(1) * c - rows(lse + MAGIC * c, _SQUARE))
                ds = p * (dp_sum.read() - rows(delta, _SQUARE))
                if masked:
                    ds = jnp.where(problem.visible(_SQUARE, row, step * ROWS, used[1]), ds, 0.0)
                return _quantize_rows(ds, interpret)

            ds8, ds_scale = accumulate(
                ds, [Sum(_SQUARE, True), Sum(_SQUARE, False)], _quantized(), interpret=interpret
            )
            plgpu.barrier_wait(barriers.arrived[1].at[slot])
            dq = _add_products(dq, ds8, kt_sm.at[slot], ds_scale * sk, interpret)
            plgpu.barrier_arrive(barriers.free.at[slot])
            return dq

        zeros = tuple(full(_SQUARE, 0.0) for _ in range(head_dim // ROWS))
        for i, total in enumerate(span.fold(visit, zeros)):
            part = pl.ds(i * ROWS, ROWS)
            out_sm.at[wg, :, part][...] = (total * problem.scale).astype(problem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_sm.at[wg], dq.at[b, here, h])
        plgpu.wait_smem_to_gmem(0)

    def position(x, index):
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        first = problem.longest_first(index, problem.query_blocks) * (COMPUTE_WARPGROUPS * ROWS)
        used = x.query_length[b], x.key_length[b]
        span = problem.keys_seen(first, COMPUTE_WARPGROUPS * ROWS, *used, ROWS)
        row = first + lax.axis_index("wg") * ROWS
        return b, h, lax.div(h, jnp.int32(problem.group)), row, used, span

    def fetch(x, position, step):
        b, _, kv_head, _, _, span = position
        at = pl.ds((span.first + step) * ROWS, ROWS)
        return (
            (x.key.at[b, kv_head, at], x.value.at[b, at, kv_head]),
            (x.key_transposed.at[b, kv_head, :, at],),
        )

    here, moving = (COMPUTE_WARPGROUPS, ROWS, head_dim), (stages, ROWS, head_dim)
    (result,) = _launch(
        problem,
        operands,
        _Kernel(compute, fetch, position, lambda position: position[5].last - position[5].first),
        fixed=(
            tile(here, jnp.int8),
            tile(here, operands.d_out.dtype),
            tile(here, problem.dtype),
        ),
        moving=(
            (tile(moving, jnp.int8), tile(moving, operands.value.dtype)),
            (tile((stages, head_dim, ROWS), jnp.int8),),
        ),
        stages=stages,
        out_type=[jax.ShapeDtypeStruct(problem.query_shape, problem.dtype)],
        heads=problem.heads,
        blocks=problem.query_blocks,
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
    score_scale = problem.scale * _LOG2_E

    def compute(refs, fixed_sm, moving_sm, barriers, position):
        x, (dk, dv) = refs
        (k_sm, v_sm, out_sm), ((q_sm, do_sm, rows_sm), (dot_sm,), (qt_sm,)) = fixed_sm, moving_sm
        b, kv_head, row, used, span = position
        wg = lax.axis_index("wg")
        here, block = pl.ds(row, ROWS), lax.div(row, jnp.int32(ROWS))
        plgpu.copy_gmem_to_smem(x.key.at[b, kv_head, here], k_sm.at[wg], barriers.fixed.at[wg])
        plgpu.copy_gmem_to_smem(x.value.at[b, here, kv_head], v_sm.at[wg], barriers.fixed.at[wg])
        sk = x.key_scale[b, kv_head, block] * score_scale
        plgpu.barrier_wait(barriers.fixed.at[wg])
        tiles = span.last - span.first

        def head(g, carry):
            h = kv_head * problem.group + g

            def visit(step, carry, *, masked):
                dk, dv = carry
                slot = barriers.slot(g * tiles + step - span.first)
                sq, sdo = x.query_scale[b, h, step], x.d_out_scale[b, h, step]
                plgpu.barrier_wait(barriers.arrived[0].at[slot])

                def p_and_ds(s_sum, dp_sum):
                    s_sum.add(k_sm.at[wg], q_sm.at[slot])
                    dp_sum.add(v_sm.at[wg], do_sm.at[slot])
                    c = jnp.minimum(sk * sq, LARGEST_SCALE)
                    lse = plgpu.load(rows_sm.at[slot, 0], layout=COLUMN)
                    p = jnp.exp2(s_sum.read(1) * c - columns(lse + MAGIC * c, _SQUARE))
                    if masked:
                        seen = problem.visible_transposed(_SQUARE, row, step * ROWS)
                        p = jnp.where(seen, p, 0.0)
                    # Registers are short: what follows must not be started before this is done.
                    p, *p8 = lax.optimization_barrier((p, *_quantize_rows(p, interpret)))
                    delta = plgpu.load(rows_sm.at[slot, 1], layout=COLUMN)
                    ds = p * (dp_sum.read() - columns(delta, _SQUARE))
                    return *p8, *_quantize_rows(ds, interpret)

                p8, p_scale, ds8, ds_scale = accumulate(
                    p_and_ds,
                    [Sum(_SQUARE, True), Sum(_SQUARE, False)],
                    [*_quantized(), *_quantized()],
                    interpret=interpret,
                )
                plgpu.barrier_wait(barriers.arrived[1].at[slot])
                dv = _add_products(dv, p8, dot_sm.at[slot], p_scale * sdo, interpret)
                plgpu.barrier_wait(barriers.arrived[2].at[slot])
                dk = _add_products(dk, ds8, qt_sm.at[slot], ds_scale * sq, interpret)
                plgpu.barrier_arrive(barriers.free.at[slot])
                return dk, dv

            return span.fold(visit, carry)

        zeros = tuple(full(_SQUARE, 0.0) for _ in range(head_dim // ROWS))
        d_key, d_value = lax.fori_loop(0, problem.group, head, (zeros, zeros))
        for totals, scale, out in ((d_key, problem.scale, dk), (d_value, 1.0, dv)):
            for i, total in enumerate(totals):
                if problem.ragged_keys:
                    inside = plgpu.broadcasted_iota(jnp.int32, _SQUARE, 0, layout=WGMMA)
                    total = jnp.where(inside < used[1] - row, total, 0.0)
                part = pl.ds(i * ROWS, ROWS)
                out_sm.at[wg, :, part][...] = (total * scale).astype(problem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_sm.at[wg], out.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

    def position(x, index):
        b, kv_head = lax.axis_index("batch"), lax.axis_index("heads")
        first = index * (COMPUTE_WARPGROUPS * ROWS)  # with a causal mask the first see the most
        used = x.query_length[b], x.key_length[b]
        span = problem.queries_seeing(first, COMPUTE_WARPGROUPS * ROWS, *used, ROWS)
        return b, kv_head, first + lax.axis_index("wg") * ROWS, used, span

    def fetch(x, position, step):
        b, kv_head, _, _, span = position
        tiles = span.last - span.first
        h = kv_head * problem.group + lax.div(step, tiles)
        block = span.first + lax.rem(step, tiles)
        at = pl.ds(block * ROWS, ROWS)
        return (
            (x.query.at[b, h, at], x.d_out.at[b, at, h], x.statistics.at[b, h, block]),
            (x.d_out_transposed.at[b, h, :, at],),
            (x.query_transposed.at[b, h, :, at],),
        )

    here, moving = (COMPUTE_WARPGROUPS, ROWS, head_dim), (stages, ROWS, head_dim)
    transposed = tile((stages, head_dim, ROWS), jnp.int8)
    steps = lambda position: (position[4].last - position[4].first) * problem.group
    dk, dv = _launch(
        problem,
        operands,
        _Kernel(compute, fetch, position, steps),
        fixed=(
            tile(here, jnp.int8),
            tile(here, operands.value.dtype),
            tile(here, problem.dtype),
        ),
        moving=(
            (
                tile(moving, jnp.int8),
                tile(moving, operands.d_out.dtype),
                plgpu.SMEM((stages, 2, ROWS), jnp.float32),
            ),
            (transposed,),
            (transposed,),
        ),
        stages=stages,
        out_type=[jax.ShapeDtypeStruct(problem.key_shape, problem.dtype)] * 2,
        heads=problem.kv_heads,
        blocks=problem.key_blocks,
    )
    return dk, dv


def _quantize_rows(x: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Returns a tile in int8, as the left operand of a product, and the scale of each row."""
    largest = jnp.maximum(jnp.abs(x).max(axis=1), _TINY)
    codes = x * rows(127.0 / largest, x.shape) + MAGIC
    return pack_int8(codes, interpret=interpret), largest * (1.0 / 127.0)


def _quantized() -> tuple[jax.Array, jax.Array]:
    """Places for what `_quantize_rows` returns."""
    codes = plgpu.layout_cast(jnp.zeros(_SQUARE, jnp.int8), plgpu.Layout.WGMMA_8BIT)
    return codes, full((ROWS,), 0.0, layout=ROW)


def _product(left: jax.Array, right: Any, interpret: bool) -> jax.Array:
    """Returns left · rightᵀ plus MAGIC, for a `right` of 64 rows."""

    def body(total):
        total.add(left, right)
        return (total.read(),)

    return accumulate(body, [Sum(_SQUARE, True)], [full(_SQUARE, 0.0)], interpret=interpret)[0]


def _add_products(
    sums: Sequence[jax.Array], left: jax.Array, right: Any, gain: jax.Array, interpret: bool
) -> tuple[jax.Array, ...]:
    """Adds gain · left · rightᵀ to sums of 64 columns each; the gain is one number a row.

    Registers are short, so the product is made 64 columns at a time.
    """
    parts = [_product(left, right.at[pl.ds(i * ROWS, ROWS)], interpret) for i in range(len(sums))]
    pairs = zip(sums, parts, strict=True)
    return tuple(total + (part - MAGIC) * rows(gain, _SQUARE) for total, part in pairs)


class _Barriers(NamedTuple):
    """The barriers of a kernel.

    Attributes:
        fixed: for each warpgroup, its own two tiles have arrived.
        arrived: for each slot, the operands of S and dP have arrived; those of the next product;
            and so on.
        free: for each slot, all warpgroups are done with it.
        stages: number of slots.
    """

    fixed: Any
    arrived: Sequence[Any]
    free: Any
    stages: int

    def slot(self, step: jax.Array) -> jax.Array:
        """Returns the slot of a step."""
        return lax.rem(step, jnp.int32(self.stages))


class _Kernel(NamedTuple):
    """The parts in which the two kernels differ.

    Attributes:
        compute: what a computing warpgroup does.
        fetch: the sources of the tiles of a step, a group for each barrier.
        position: where in the problem a block of threads is.
        steps: number of steps there.
    """

    compute: Callable[..., None]
    fetch: Callable[..., Sequence[Sequence[Any]]]
    position: Callable[..., Any]
    steps: Callable[[Any], jax.Array]


def _launch(
    problem: Problem,
    operands: Operands,
    kernel: _Kernel,
    *,
    fixed: Sequence[Any],
    moving: Sequence[Sequence[Any]],
    stages: int,
    out_type: Sequence[jax.ShapeDtypeStruct],
    heads: int,
    blocks: int,
) -> Sequence[jax.Array]:
    """Runs a kernel of two computing warpgroups and one that keeps `stages` steps in flight."""

    def body(*refs):
        x, outputs = Operands(*refs[: len(operands)]), refs[len(operands) :]

        def scoped(fixed_sm, moving_sm, *barriers):
            barriers = _Barriers(*barriers, stages)
            wg = lax.axis_index("wg")
            position = kernel.position(x, lax.axis_index("block"))

            @pl.when(wg < COMPUTE_WARPGROUPS)
            def _():
                plgpu.set_max_registers(232, action="increase")
                kernel.compute((x, outputs), fixed_sm, moving_sm, barriers, position)

            @pl.when(wg == COMPUTE_WARPGROUPS)
            def _():
                plgpu.set_max_registers(40, action="decrease")
                steps = kernel.steps(position)

                def issue(step, slot):
                    sources = kernel.fetch(x, position, step)
                    groups = zip(sources, moving_sm, barriers.arrived, strict=True)
                    for source, target, barrier in groups:
                        for gmem, smem in zip(source, target, strict=True):
                            plgpu.copy_gmem_to_smem(gmem, smem.at[slot], barrier.at[slot])

                for i in range(stages):
                    pl.when(i < steps)(lambda i=i: issue(jnp.int32(i), i))

                @pl.loop(stages, steps)
                def _(step):
                    slot = barriers.slot(step)
                    plgpu.barrier_wait(barriers.free.at[slot])
                    issue(step, slot)

        pl.run_scoped(
            scoped,
            tuple(fixed),
            tuple(moving),
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
            tuple(plgpu.Barrier(num_arrivals=len(g), num_barriers=stages) for g in moving),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            collective_axes="wg",
        )

    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=(problem.batch, heads, blocks),
        grid_names=("batch", "heads", "block"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=COMPILER_PARAMS,
    )(*operands)
