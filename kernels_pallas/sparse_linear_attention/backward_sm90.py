"""The backward kernels for Hopper, in the precision of the inputs.

`query_gradient` gives a block of threads 128 queries and visits the chosen blocks of keys; it also
returns the gradients of H_i and Z_i. `key_value_gradients` gives it a block of 64 keys, whose two
warpgroups each take half of the queries of every block that chose it, and add up in the end. Every
sum is made in one order: two runs give the same bits.

Keys are read as they are, not less their mean: what the mean adds to a row of scores goes into its
log-sum-exp, and what it would take from dQ is known from the sum of the row of dS.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.pipeline import Kernel, launch
from kernels_pallas.mosaic.products import (
    COLUMN,
    ROW,
    WGMMA,
    Sum,
    accumulate,
    columns,
    full,
    join,
    rows,
    split,
    tile,
)
from kernels_pallas.mosaic.team import ROWS, SHARED_MEMORY, Team
from kernels_pallas.sparse_linear_attention.forward_sm90 import LOG2_E, add_product
from kernels_pallas.sparse_linear_attention.head_groups import pick
from kernels_pallas.sparse_linear_attention.prepare_sm90 import features_of
from kernels_pallas.varying import varying_axes

TEAM = Team(2, 232)
_EXCHANGED = 32


class QueryOperands(NamedTuple):
    """What `query_gradient` reads; arrays of 16 bits have tokens in multiples of 8.

    Attributes:
        query: (batch, tokens, heads, head_dim).
        key: likewise, tokens of the keys.
        value: like `key`.
        d_out: like `query`.
        chosen: int32 (batch, heads, query_blocks, kept), ascending.
        logsumexp: in units of log 2, float32 (batch, heads, query_blocks * 128).
        sparse_delta: rowsum(dO * O_s) of the sparse branch, like `logsumexp`.
        linear_delta: 1 - alpha times rowsum(dO * O_l) of the linear branch.
        alpha: float32 (heads, query_blocks).
        key_mean: float32 (batch, heads, head_dim).
        h: sums over the blocks not chosen, 16 bits (batch, heads, query_blocks, dim, dim), in
            groups of heads.
        z: likewise, float32 (batch, heads, query_blocks, head_dim).
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    d_out: jax.Array
    chosen: jax.Array
    logsumexp: jax.Array
    sparse_delta: jax.Array
    linear_delta: jax.Array
    alpha: jax.Array
    key_mean: jax.Array
    h: tuple[jax.Array, ...]
    z: jax.Array


class QueryGradients(NamedTuple):
    """What `query_gradient` returns.

    Attributes:
        d_query: like the query.
        logsumexp: of the scores with keys that still have their mean, like that of the operands.
        d_z: in two parts, float32 (batch, heads, query_blocks, 2, head_dim).
        d_h: like `h`.
    """

    d_query: jax.Array
    logsumexp: jax.Array
    d_z: jax.Array
    d_h: tuple[jax.Array, ...]


def query_gradient(
    operands: QueryOperands, keys: int, scale: float, *, smoothed: bool, interpret: bool
) -> QueryGradients:
    """Runs the kernel.

    Args:
        operands: see there.
        keys: tokens of the keys that are not padding.
        scale: factor on the scores.
        smoothed: whether the log-sum-exp is that of scores of keys less their mean.
        interpret: whether the kernel runs in the interpreter.
    """
    batch, _, heads, dim = operands.query.shape
    dtype = operands.query.dtype
    blocks, kept = operands.chosen.shape[2:]
    shape, multiply = (ROWS, ROWS), functools.partial(add_product, interpret=interpret)

    def compute(refs, fixed_sm, moving_sm, barriers, position):
        x, (dq_gm, lse_gm, dz_gm, *dh_gm) = refs
        q_sm, do_sm, lse_sm, dz_sm, h_sm = fixed_sm
        ((k_sm, v_sm),) = moving_sm
        b, h, i = position
        wg = lax.axis_index("wg")
        here = pl.ds(i * TEAM.rows + wg * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x.query.at[b, here, h], q_sm.at[wg], barriers.fixed.at[wg])
        plgpu.copy_gmem_to_smem(x.d_out.at[b, here, h], do_sm.at[wg], barriers.fixed.at[wg])
        mean, z = (
            plgpu.load(ref, layout=COLUMN, optimized=False)
            for ref in (x.key_mean.at[b, h], x.z.at[b, h, i])
        )
        lse, sparse_delta = (
            plgpu.load(ref.at[b, h, here], layout=ROW, optimized=False)
            for ref in (x.logsumexp, x.sparse_delta)
        )
        alpha = x.alpha[h, i]
        plgpu.barrier_wait(barriers.fixed.at[wg])
        if smoothed:
            query = plgpu.load(q_sm.at[wg], layout=WGMMA).astype(jnp.float32)
            along_mean = jnp.sum(query * columns(mean, query.shape), axis=1)
            lse += along_mean * (scale * LOG2_E)
        lse_sm.at[wg][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_sm.at[wg], lse_gm.at[b, h, here])

        def visit(step, carry, *, masked):
            dq, excess = carry
            slot = barriers.slot(step)
            left = keys - x.chosen[b, h, i, step] * ROWS if masked else jnp.int32(ROWS)
            barriers.wait(0, slot)

            def score_gradients(s_sum, dp_sum):
                s_sum.add(q_sm.at[wg], k_sm.at[slot])
                dp_sum.add(do_sm.at[wg], v_sm.at[slot])
                p = jnp.exp2(s_sum.read(1) * (scale * LOG2_E) - rows(lse, shape))
                if masked:
                    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
                    p = jnp.where(column < left, p, 0.0)
                dp = dp_sum.read() - rows(sparse_delta, shape)
                return ((p * (alpha * dp)).astype(dtype),)

            sums = [Sum(shape, False), Sum(shape, False)]
            (ds,) = accumulate(
                score_gradients, sums, [full(shape, 0.0, dtype)], interpret=interpret
            )
            dq = multiply(dq, ds, k_sm.at[slot])
            barriers.done(0, slot)
            return dq, excess + jnp.sum(ds.astype(jnp.float32), axis=1)

        carry = full((ROWS, dim), 0.0), full((ROWS,), 0.0, layout=ROW)
        ragged = keys % ROWS != 0
        inner = functools.partial(visit, masked=False)
        carry = lax.fori_loop(0, kept - ragged, inner, carry)
        if ragged:
            carry = visit(jnp.int32(kept - 1), carry, masked=True)
        dq, excess = carry
        mean = plgpu.load(x.key_mean.at[b, h], layout=COLUMN, optimized=False)
        dq = (dq - rows(excess, dq.shape) * columns(mean, dq.shape)) * scale

        # The linear branch.
        query = plgpu.load(q_sm.at[wg], layout=WGMMA).astype(jnp.float32)
        features = features_of(query, None, dtype).astype(jnp.float32)
        linear_delta = plgpu.load(x.linear_delta.at[b, h, here], layout=ROW, optimized=False)
        z = columns(z, query.shape)
        inverse = 1.0 / jnp.sum(features * z, axis=1)
        weighted = (features * rows(inverse, query.shape)).astype(dtype)
        q_sm.at[wg][...] = weighted

        # Sums over rows share their scratch memory, so the warpgroups make them one after the
        # other.
        def sum_dz():
            weighted = plgpu.load(q_sm.at[wg], layout=WGMMA).astype(jnp.float32)
            dz_sm.at[wg][...] = jnp.sum(weighted * rows(-linear_delta, weighted.shape), axis=0)

        pl.when(wg == 0)(sum_dz)
        plgpu.barrier_wait(barriers.shared)

        def toward_features(total):
            total.add(do_sm.at[wg], h_sm)
            return (total.read(),)

        (toward,) = accumulate(
            toward_features,
            [Sum((ROWS, dim), False)],
            [full(query.shape, 0.0)],
            interpret=interpret,
        )
        toward = toward * (1.0 - alpha) - rows(linear_delta, query.shape) * z
        toward *= rows(inverse, query.shape)
        along = jnp.sum(features * toward, axis=1)
        dq += features * (toward - rows(along, query.shape))
        plgpu.commit_smem()
        barriers.meet()

        @pl.when(wg < dim // ROWS)
        def _():
            part = pl.ds(wg * ROWS, ROWS)

            def body(total):
                for i in range(TEAM.size):
                    total.add_rows(q_sm.at[i, :, part], do_sm.at[i], transposed=True)
                return (total.read(),)

            (dh,) = accumulate(
                body, [Sum((ROWS, dim), False)], [full((ROWS, dim), 0.0)], interpret=interpret
            )
            h_sm[part] = (dh * (1.0 - alpha)).astype(dtype)
            plgpu.commit_smem()
            store = lambda d_h: plgpu.copy_smem_to_gmem(h_sm.at[part], d_h.at[i, part])
            pick(dh_gm, b, h, store)

        pl.when(wg == 1)(sum_dz)
        barriers.meet()
        q_sm.at[wg][...] = dq.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_sm.at[wg], dq_gm.at[b, here, h])
        plgpu.copy_smem_to_gmem(dz_sm.at[wg], dz_gm.at[b, h, i, wg])
        plgpu.wait_smem_to_gmem(0)

    def position(x, index):
        return lax.axis_index("batch"), lax.axis_index("heads"), index

    def fetch(x, position, step):
        b, h, i = position
        at = pl.ds(x.chosen[b, h, i, step] * ROWS, ROWS)
        return ((x.key.at[b, at, h], x.value.at[b, at, h]),)

    def share(refs, position, copies):
        b, h, i = position
        pick(refs[0].h or refs[1][3:], b, h, lambda of_head: copies[0](of_head.at[i]))

    fixed_bytes = 2 * dim * (2 * TEAM.rows + dim) + 4096
    stages = (SHARED_MEMORY - fixed_bytes) // (ROWS * dim * 4)
    own, moving = (TEAM.size, ROWS, dim), (min(stages, 4), ROWS, dim)
    # dH_i takes the place of H_i, which nobody else reads. JAX has no state that varies over the
    # axes of a mesh: inside `jax.shard_map` it gets memory of its own.
    in_place = not varying_axes(operands.h)
    results = launch(
        operands._replace(h=()) if in_place else operands,
        Kernel(compute, fetch, position, lambda position: jnp.int32(kept), share),
        fixed=(
            tile(own, dtype),
            tile(own, dtype),
            plgpu.SMEM((TEAM.size, ROWS), jnp.float32),
            plgpu.SMEM((TEAM.size, dim), jnp.float32),
        ),
        shared=(tile((dim, dim), dtype),),
        moving=((tile(moving, dtype),) * 2,),
        stages=moving[0],
        out_type=[
            jax.ShapeDtypeStruct(operands.query.shape, dtype),
            jax.ShapeDtypeStruct(operands.logsumexp.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, blocks, TEAM.size, dim), jnp.float32),
            *([] if in_place else (jax.ShapeDtypeStruct(h.shape, dtype) for h in operands.h)),
        ],
        into=operands.h if in_place else (),
        team=TEAM,
        grid=(batch, heads, blocks),
        name="sparse_linear_attention_query_gradient",
        meets=True,
    )
    d_query, logsumexp, d_z, *d_h = results
    return QueryGradients(d_query, logsumexp, d_z, tuple(d_h))


class KeyOperands(NamedTuple):
    """What `key_value_gradients` reads, beside what is as in `QueryOperands`.

    Attributes:
        query, key, value, d_out, sparse_delta, key_mean: as there.
        logsumexp: that of `QueryGradients`.
        order: int32 (batch, heads, key_blocks), blocks of keys in the order of the work.
        start: int32 (batch, heads, key_blocks + 1), where in `choosing` those of a block are.
        choosing: int32 (batch, heads, query_blocks * kept), for each block of keys the blocks of
            queries that chose it.
        alpha: of those, float32 like `choosing`.
        d_z: gradient of z_j, float32 (batch, heads, key_blocks, head_dim).
        d_h: gradient of h_j, 16 bits (batch, heads of the call, key_blocks, dim, dim).
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    d_out: jax.Array
    sparse_delta: jax.Array
    key_mean: jax.Array
    logsumexp: jax.Array
    order: jax.Array
    start: jax.Array
    choosing: jax.Array
    alpha: jax.Array
    d_z: jax.Array
    d_h: jax.Array


def key_value_gradients(
    operands: KeyOperands,
    keys: int,
    scale: float,
    *,
    heads: range,
    into: Sequence[jax.Array],
    smooth_features: bool,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs the kernel for some heads.

    Args:
        operands: see there.
        keys: tokens of the keys that are not padding.
        scale: factor on the scores.
        heads: which ones.
        into: results of a call for other heads, to be completed.
        smooth_features: whether phi sees the keys less their mean.
        interpret: whether the kernel runs in the interpreter.

    Returns:
        The gradient of the keys less their mean (plus, unless `smooth_features`, that of the keys
        themselves) and of the values, like those, and, of what belongs to the keys less their mean,
        the sums of blocks, float32 (batch, heads, key_blocks, head_dim).
    """
    batch, _, all_heads, dim = operands.key.shape
    dtype, blocks = operands.key.dtype, operands.order.shape[2]
    shape, multiply = (ROWS, ROWS), functools.partial(add_product, interpret=interpret)
    wide = (ROWS, dim)

    def compute(refs, fixed_sm, moving_sm, barriers, position):
        x, (dk_gm, dv_gm, sum_gm) = refs
        k_sm, v_sm, exchange_sm, sum_sm, dh_sm = fixed_sm
        (q_sm, lse_sm), (do_sm, delta_sm) = moving_sm
        b, h, j, first, count = position
        wg = lax.axis_index("wg")
        here, half = pl.ds(j * ROWS, ROWS), pl.ds(wg * ROWS, ROWS)

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(x.key.at[b, here, h], k_sm, barriers.fixed.at[0])
            plgpu.copy_gmem_to_smem(x.value.at[b, here, h], v_sm, barriers.fixed.at[1])

        for i in range(TEAM.size):
            plgpu.barrier_wait(barriers.fixed.at[i])

        def visit(step, carry):
            dk, dv = carry
            slot = barriers.slot(step)
            alpha = x.alpha[b, h, first + step]
            barriers.wait(0, slot)

            # Registers are short: S before dP, and P in 16 bits in between.
            def probabilities(s_sum):
                s_sum.add(k_sm, q_sm.at[slot, half])
                lse = plgpu.load(lse_sm.at[slot, half], layout=COLUMN)
                p = jnp.exp2(s_sum.read() * (scale * LOG2_E) - columns(lse, shape))
                return ((p * alpha).astype(dtype),)

            def score_gradients(p, dp_sum):
                dp_sum.add(v_sm, do_sm.at[slot, half])
                delta = plgpu.load(delta_sm.at[slot, half], layout=COLUMN)
                dp = dp_sum.read() - columns(delta, shape)
                return ((p.astype(jnp.float32) * dp).astype(dtype),)

            def find(body):
                start = [full(shape, 0.0, dtype)]
                return accumulate(body, [Sum(shape, False)], start, interpret=interpret)[0]

            p = find(probabilities)
            barriers.wait(1, slot)
            dv = multiply(dv, p, do_sm.at[slot, half])
            ds = find(functools.partial(score_gradients, p))
            barriers.done(1, slot)
            dk = multiply(dk, ds, q_sm.at[slot, half])
            barriers.done(0, slot)
            return dk, dv

        dk, dv = lax.fori_loop(0, count, visit, (full(wide, 0.0), full(wide, 0.0)))
        dk *= scale
        # The first warpgroup gets all of dV, the other all of dK; what else they add is not used.
        totals = []
        for parts in zip(
            *(split(x, _EXCHANGED, interpret=interpret) for x in (dk, dv)), strict=True
        ):
            for i, part in enumerate(parts):
                pl.when(wg == i)(functools.partial(exchange_sm.at[i].__setitem__, ..., part))
            barriers.meet()
            other = plgpu.load(exchange_sm.at[1 - wg], layout=WGMMA)
            totals.append([part + other for part in parts])
            barriers.meet()
        dk, dv = (join(parts, interpret=interpret) for parts in zip(*totals, strict=True))

        def features_here():
            x_f32, inside = plgpu.load(k_sm, layout=WGMMA).astype(jnp.float32), None
            if smooth_features:
                mean = plgpu.load(x.key_mean.at[b, h], layout=COLUMN, optimized=False)
                x_f32 -= columns(mean, wide)
            if keys % ROWS:
                row = plgpu.broadcasted_iota(jnp.int32, wide, 0, layout=WGMMA)
                inside = row < keys - j * ROWS
            return features_of(x_f32, inside, dtype), inside

        # Nobody needs the queries any more, so there is room for the first warpgroup.
        feature_sm, result_sm = q_sm.at[wg, half], q_sm.at[wg, pl.ds((wg + 1) * ROWS, ROWS)]
        plgpu.barrier_wait(barriers.shared)

        @pl.when(wg == 0)
        def _():
            feature_sm[...] = features_here()[0]
            plgpu.commit_smem()
            result_sm[...] = multiply(dv, feature_sm, dh_sm).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result_sm, dv_gm.at[b, here, h])

        @pl.when(wg == 1)
        def _():
            def body(total):
                total.add(v_sm, dh_sm)
                return (total.read(),)

            (toward,) = accumulate(body, [Sum(wide, False)], [full(wide, 0.0)], interpret=interpret)
            dz = plgpu.load(x.d_z.at[b, h, j], layout=COLUMN, optimized=False)
            toward += columns(dz, wide)
            features, inside = features_here()
            p = features.astype(jnp.float32)
            through = p * (toward - rows(jnp.sum(p * toward, axis=1), wide))
            sparse = dk if inside is None else jnp.where(inside, dk, 0.0)
            d_key = sparse + through
            sum_sm[...] = jnp.sum(d_key if smooth_features else sparse, axis=0)
            v_sm[...] = d_key.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v_sm, dk_gm.at[b, here, h])
            plgpu.copy_smem_to_gmem(sum_sm, sum_gm.at[b, h, j])

        plgpu.wait_smem_to_gmem(0)

    def position(x, index):
        b, h = lax.axis_index("batch"), heads.start + lax.axis_index("heads")
        j = x.order[b, h, index]
        first = x.start[b, h, j]
        return b, h, j, first, x.start[b, h, j + 1] - first

    def fetch(x, position, step):
        b, h, _, first, _ = position
        at = pl.ds(x.choosing[b, h, first + step] * TEAM.rows, TEAM.rows)
        return (
            (x.query.at[b, at, h], x.logsumexp.at[b, h, at]),
            (x.d_out.at[b, at, h], x.sparse_delta.at[b, h, at]),
        )

    def share(refs, position, copies):
        b, _, j = position[:3]
        copies[0](refs[0].d_h.at[b, lax.axis_index("heads"), j])

    stages = 2
    moving = tile((stages, TEAM.rows, dim), dtype), plgpu.SMEM((stages, TEAM.rows), jnp.float32)
    return launch(
        operands,
        Kernel(compute, fetch, position, lambda position: position[4], share),
        fixed=(
            tile(wide, dtype),
            tile(wide, dtype),
            tile((TEAM.size, ROWS, _EXCHANGED), jnp.float32),
            plgpu.SMEM((dim,), jnp.float32),
        ),
        shared=(tile((dim, dim), dtype),),
        moving=(moving, moving),
        stages=stages,
        out_type=()
        if into
        else (
            jax.ShapeDtypeStruct(operands.key.shape, dtype),
            jax.ShapeDtypeStruct(operands.key.shape, dtype),
            jax.ShapeDtypeStruct((batch, all_heads, blocks, dim), jnp.float32),
        ),
        into=into,
        team=TEAM,
        grid=(batch, len(heads), blocks),
        name="sparse_linear_attention_key_value_gradients",
        fixed_arrivals=1,
        meets=True,
    )
