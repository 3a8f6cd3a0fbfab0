"""The forward kernel for Hopper: softmax over chosen blocks of keys, linear branch, mixture.

A block of threads works on 128 queries of one head: two warpgroups of 64 queries compute, a third
one copies the chosen blocks of keys and values to them, in the order of their ids. Q is quantized
here, since its features are made here too. Scores come from INT8 products; P·V is in 16 bits.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.magic import MAGIC
from kernels_pallas.mosaic.pipeline import Kernel, launch
from kernels_pallas.mosaic.products import (
    COLUMN,
    ROW,
    WGMMA,
    Sum,
    accumulate,
    columns,
    full,
    rows,
    tile,
)
from kernels_pallas.mosaic.team import ROWS, SHARED_MEMORY, Team
from kernels_pallas.mosaic.tiles import round_to_codes
from kernels_pallas.sparse_linear_attention.head_groups import pick
from kernels_pallas.sparse_linear_attention.prepare_sm90 import features_of

LOG2_E = math.log2(math.e)
LOWEST = -1e30
TEAM = Team(2, 232)
_MOST_STAGES = 4


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
        query: 16 bits (batch, tokens, heads, head_dim), tokens a multiple of 8.
        query_scale: of the codes of 128 queries, float32 (batch, heads, query_blocks), or None.
        key: int8 (batch, heads, key_blocks * 64, head_dim); where nothing is quantized the keys
            themselves, 16 bits (batch, tokens, heads, head_dim).
        key_scale: of the chosen blocks, float32 (batch, heads, query_blocks, kept), or None.
        value: 16 bits (batch, tokens, heads, head_dim).
        chosen: int32 (batch, heads, query_blocks, kept), ascending.
        h: sums over the blocks not chosen, 16 bits (batch, heads, query_blocks, dim, dim), in
            groups of heads.
        z: likewise, float32 (batch, heads, query_blocks, head_dim).
        alpha: float32 (heads, query_blocks).
    """

    query: jax.Array
    query_scale: jax.Array | None
    key: jax.Array
    key_scale: jax.Array | None
    value: jax.Array
    chosen: jax.Array
    h: tuple[jax.Array, ...]
    z: jax.Array
    alpha: jax.Array


def add_product(start: jax.Array, left: Any, right: Any, *, interpret: bool) -> jax.Array:
    """Returns start + left · right, of 16 bits; left may be in registers."""

    def body(total):
        total.add_rows(left, right)
        return (total.read(),)

    height, width = start.shape
    sums = [Sum((height, width), False, start=start)]
    return accumulate(body, sums, [start], interpret=interpret)[0]


def forward(
    operands: Operands, keys: int, scale: float, *, differentiated: bool, interpret: bool
) -> tuple[jax.Array, Any, Any, Any]:
    """Runs the kernel.

    Args:
        operands: see there.
        keys: tokens of the keys that are not padding.
        scale: factor on the scores, not negative.
        differentiated: whether what the backward pass needs is wanted.
        interpret: whether the kernel runs in the interpreter.

    Returns:
        The output like `query`, and, or None: the difference of the branches, like it; the largest
        score of each row in units of log 2 and the sum of exp2(score - largest), float32 (batch,
        heads, query_blocks * 128).
    """
    batch, _, heads, dim = operands.query.shape
    dtype, quantized = operands.query.dtype, operands.query_scale is not None
    blocks, kept = operands.chosen.shape[2:]
    log2_scale = scale * LOG2_E
    multiply = functools.partial(add_product, interpret=interpret)

    def compute(refs, fixed_sm, moving_sm, barriers, position):
        x, (out, *saved) = refs
        q_sm, q8_sm, difference_sm, m_sm, total_sm, h_sm = fixed_sm
        (k_sm,), (v_sm,) = moving_sm
        b, h, i = position
        wg = lax.axis_index("wg")
        here = pl.ds(i * TEAM.rows + wg * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x.query.at[b, here, h], q_sm.at[wg], barriers.fixed.at[wg])
        z = plgpu.load(x.z.at[b, h, i], layout=COLUMN, optimized=False)
        alpha = x.alpha[h, i]
        scale_of = lambda step: jnp.float32(log2_scale)
        if quantized:
            sq = x.query_scale[b, h, i]
            last = jnp.int32(kept - 1)
            scale_of = lambda step: (
                (sq * log2_scale) * x.key_scale[b, h, i, jnp.minimum(step, last)]
            )
        plgpu.barrier_wait(barriers.fixed.at[wg])
        query = plgpu.load(q_sm.at[wg], layout=WGMMA).astype(jnp.float32)
        features = features_of(query, None, dtype)
        denominator = jnp.sum(features.astype(jnp.float32) * columns(z, query.shape), axis=1)
        if quantized:
            codes = round_to_codes(query * (1.0 / sq), interpret=interpret)
            q8_sm.at[wg][...] = codes.astype(jnp.int8)
            q_sm.at[wg][...] = features
        else:
            q8_sm.at[wg][...] = features
        plgpu.commit_smem()
        score_sm, feature_sm = (q8_sm, q_sm) if quantized else (q_sm, q8_sm)

        def scores(slot):
            def body(s):
                s.add(score_sm.at[wg], k_sm.at[slot])
                return (s.read(),)

            shape = (ROWS, ROWS)
            (s,) = accumulate(
                body, [Sum(shape, quantized)], [full(shape, 0.0)], interpret=interpret
            )
            return s - MAGIC if quantized else s

        def visit(step, carry, *, masked):
            acc, m, total, c = carry
            slot = barriers.slot(step)
            next_c = scale_of(step + 1)
            barriers.wait(0, slot)
            s = scores(slot)
            barriers.done(0, slot)
            if masked:
                column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=WGMMA)
                s = jnp.where(column < keys - x.chosen[b, h, i, step] * ROWS, s, LOWEST)
            m_new = jnp.maximum(m, jnp.max(s, axis=1) * c)
            p = jnp.exp2(s * c - rows(m_new, s.shape))
            decay = jnp.exp2(m - m_new)
            total = total * decay + jnp.sum(p, axis=1)
            barriers.wait(1, slot)
            acc = multiply(acc * rows(decay, acc.shape), p.astype(dtype), v_sm.at[slot])
            barriers.done(1, slot)
            return acc, m_new, total, next_c

        carry = (
            full((ROWS, dim), 0.0),
            full((ROWS,), LOWEST, layout=ROW),
            full((ROWS,), 0.0, layout=ROW),
            scale_of(jnp.int32(0)),
        )
        # Only the block with the largest id may be cut off by the number of keys.
        ragged = keys % ROWS != 0
        inner = functools.partial(visit, masked=False)
        carry = lax.fori_loop(0, kept - ragged, inner, carry)
        if ragged:
            carry = visit(jnp.int32(kept - 1), carry, masked=True)
        acc, m, total, _ = carry
        plgpu.barrier_wait(barriers.shared)
        linear = multiply(full((ROWS, dim), 0.0), feature_sm.at[wg], h_sm)
        linear /= rows(denominator, linear.shape)
        difference = acc / rows(total, acc.shape) - linear
        q_sm.at[wg][...] = (linear + difference * alpha).astype(dtype)
        if differentiated:
            difference_sm.at[wg][...] = difference.astype(dtype)
            m_sm.at[wg][...], total_sm.at[wg][...] = m, total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_sm.at[wg], out.at[b, here, h])
        if differentiated:
            plgpu.copy_smem_to_gmem(difference_sm.at[wg], saved[0].at[b, here, h])
            plgpu.copy_smem_to_gmem(m_sm.at[wg], saved[1].at[b, h, here])
            plgpu.copy_smem_to_gmem(total_sm.at[wg], saved[2].at[b, h, here])
        plgpu.wait_smem_to_gmem(0)

    def position(x, index):
        return lax.axis_index("batch"), lax.axis_index("heads"), index

    def fetch(x, position, step):
        b, h, i = position
        at = pl.ds(x.chosen[b, h, i, step] * ROWS, ROWS)
        key = x.key.at[b, h, at] if quantized else x.key.at[b, at, h]
        return (key,), (x.value.at[b, at, h],)

    def share(refs, position, copies):
        b, h, i = position
        pick(refs[0].h, b, h, lambda of_head: copies[0](of_head.at[i]))

    key_size = operands.key.dtype.itemsize
    fixed_bytes = dim * (TEAM.rows * (2 + key_size + 2) + 2 * dim) + 4096
    stages = min(_MOST_STAGES, (SHARED_MEMORY - fixed_bytes) // (ROWS * dim * (key_size + 2)))
    own, moving = (TEAM.size, ROWS, dim), (stages, ROWS, dim)
    statistics = jax.ShapeDtypeStruct((batch, heads, blocks * TEAM.rows), jnp.float32)
    like_query = jax.ShapeDtypeStruct(operands.query.shape, dtype)
    row = plgpu.SMEM((TEAM.size, ROWS), jnp.float32)
    results = launch(
        operands,
        Kernel(compute, fetch, position, lambda position: jnp.int32(kept), share),
        fixed=(
            tile(own, dtype),
            tile(own, jnp.int8 if quantized else dtype),
            tile(own, dtype),
            row,
            row,
        ),
        shared=(tile((dim, dim), dtype),),
        moving=((tile(moving, operands.key.dtype),), (tile(moving, dtype),)),
        stages=stages,
        out_type=[like_query] + [like_query, statistics, statistics] * differentiated,
        team=TEAM,
        grid=(batch, heads, blocks),
        name="sparse_linear_attention_forward",
        fixed_arrivals=1,
    )
    out, *saved = results
    difference, largest, total = saved or [None] * 3
    return out, difference, largest, total
