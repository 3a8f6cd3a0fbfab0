"""What the kernels for Hopper need of keys and queries beforehand: two passes over memory.

`block_sums` adds up the tokens of blocks, for the router and the mean of the keys: a product with a
matrix of ones on the tensor cores, whose float32 sums are exact enough and cost no time beside the
loads. `prepare_keys` quantizes a block of keys, and multiplies its features with its values.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.products import COLUMN, WGMMA, Sum, accumulate, columns, full, rows, tile
from kernels_pallas.mosaic.team import COMPILER_PARAMS, ROWS
from kernels_pallas.mosaic.tiles import largest_of_tile, round_to_codes
from kernels_pallas.sparse_linear_attention.head_groups import cut, pick

_TINY = float(jnp.finfo(jnp.float32).tiny)
_SUMMED = 128


def block_sums(x: jax.Array, block: int, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Sums the tokens of blocks, and finds the largest magnitude of every 128 tokens.

    Args:
        x: 16 bits (batch, tokens, heads, head_dim), tokens a multiple of 8, head_dim 64 or 128.
        block: tokens in a block, 64 or 128.
        interpret: whether the kernel runs in the interpreter.

    Returns:
        The sums, float32 (batch, heads, blocks, head_dim), where the last block may hold fewer
        tokens, and the largest magnitudes, float32 (batch, heads, tokens / 128).
    """
    batch, tokens, heads, dim = x.shape
    steps, per_step = -(-tokens // _SUMMED), _SUMMED // block

    def sparse_linear_attention_block_sums(x_gm, ones_gm, out_gm, largest_gm):
        def scoped(x_sm, ones_sm, out_sm, scratch, arrived):
            b, h, step = (lax.axis_index(name) for name in ("batch", "heads", "block"))
            here = pl.ds(step * _SUMMED, _SUMMED)
            plgpu.copy_gmem_to_smem(ones_gm, ones_sm, arrived)
            plgpu.copy_gmem_to_smem(x_gm.at[b, here, h], x_sm, arrived)
            plgpu.barrier_wait(arrived)

            def body(total):
                total.add_rows(ones_sm, x_sm)
                return (total.read(),)

            shape = (ROWS, dim)
            (total,) = accumulate(
                body, [Sum(shape, False)], [full(shape, 0.0)], interpret=interpret
            )
            out_sm[...] = total
            plgpu.commit_smem()
            largest = []
            for i in range(_SUMMED // ROWS):
                part = plgpu.load(x_sm.at[pl.ds(i * ROWS, ROWS)], layout=WGMMA)
                largest.append(
                    largest_of_tile(part.astype(jnp.float32), scratch.at[i], interpret=interpret)
                )
            largest_gm[b, h, step] = jnp.maximum(*largest)
            for i in range(per_step):
                target = out_gm.at[b, h, pl.ds(step * per_step + i, 1)]
                plgpu.copy_smem_to_gmem(out_sm.at[pl.ds(i, 1)], target)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            tile((_SUMMED, dim), x.dtype),
            tile((ROWS, _SUMMED), x.dtype),
            plgpu.SMEM((ROWS, dim), jnp.float32),
            plgpu.SMEM((_SUMMED // ROWS, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        )

    # Row i adds up the block i of those that are loaded at once.
    ones = jnp.arange(ROWS)[:, None] == jnp.arange(_SUMMED)[None] // block
    sums, largest = plgpu.kernel(
        sparse_linear_attention_block_sums,
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, steps * per_step, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, steps), jnp.float32),
        ),
        grid=(batch, heads, steps),
        grid_names=("batch", "heads", "block"),
        compiler_params=COMPILER_PARAMS,
    )(x, ones.astype(x.dtype))
    return sums[:, :, : -(-tokens // block)], largest


class Keys(NamedTuple):
    """What `prepare_keys` returns.

    Attributes:
        z: sums of the features, float32 (batch, heads, key_blocks, head_dim).
        h: the features, transposed, times the values, 16 bits (batch, heads, key_blocks, head_dim,
            head_dim), in groups of heads.
        codes: int8 (batch, heads, key_blocks * 64, head_dim) of the keys less their mean; None
            unless asked for.
        scale: of the codes, float32 (batch, heads, key_blocks); None unless asked for.
    """

    z: jax.Array
    h: tuple[jax.Array, ...]
    codes: Any = None
    scale: Any = None


def features_of(x: jax.Array, inside: jax.Array | None, dtype: Any) -> jax.Array:
    """Returns phi of float32 rows in registers; rows that are not inside become zero."""
    largest = jnp.max(x, axis=1)
    p = jnp.exp(x - rows(largest, x.shape))
    inverse = 1.0 / jnp.sum(p, axis=1)
    p *= rows(inverse, x.shape)
    return (p if inside is None else jnp.where(inside, p, 0.0)).astype(dtype)


def prepare_keys(
    key: jax.Array,
    value: jax.Array,
    mean: jax.Array,
    keys: int,
    *,
    quantize: bool,
    smooth_features: bool,
    interpret: bool,
) -> Keys:
    """Runs the kernel.

    Args:
        key: 16 bits (batch, tokens, heads, head_dim), tokens a multiple of 8, head_dim 64 or 128.
        value: like `key`.
        mean: of the keys, float32 (batch, heads, head_dim).
        keys: tokens that are not padding.
        quantize: whether codes are wanted.
        smooth_features: whether phi sees the keys less their mean.
        interpret: whether the kernel runs in the interpreter.
    """
    batch, tokens, heads, dim = key.shape
    blocks, dtype = -(-tokens // ROWS), key.dtype
    groups = cut(heads, batch * heads * blocks * dim * dim * dtype.itemsize)

    def sparse_linear_attention_prepare_keys(key_gm, value_gm, mean_gm, *outputs):
        (z_gm, *h_gm), codes_gm = outputs[: 1 + len(groups)], outputs[1 + len(groups) :]

        def scoped(k_sm, v_sm, f_sm, h_sm, z_sm, codes_sm, scratch, arrived):
            b, h, j = (lax.axis_index(name) for name in ("batch", "heads", "block"))
            here = pl.ds(j * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(key_gm.at[b, here, h], k_sm, arrived)
            plgpu.copy_gmem_to_smem(value_gm.at[b, here, h], v_sm, arrived)
            offset = plgpu.load(mean_gm.at[b, h], layout=COLUMN, optimized=False)
            plgpu.barrier_wait(arrived)
            raw = plgpu.load(k_sm, layout=WGMMA).astype(jnp.float32)
            smooth = raw - columns(offset, raw.shape)
            inside = None
            if keys % ROWS:
                row = plgpu.broadcasted_iota(jnp.int32, raw.shape, 0, layout=WGMMA)
                inside = row < keys - j * ROWS
                smooth = jnp.where(inside, smooth, 0.0)
            features = features_of(smooth if smooth_features else raw, inside, dtype)
            f_sm[...] = features
            if quantize:
                largest = largest_of_tile(smooth, scratch, interpret=interpret)
                scale = largest * (1.0 / 127.0)
                scale = jnp.where(scale < jnp.inf, jnp.maximum(scale, _TINY), jnp.nan)
                codes = round_to_codes(smooth * (1.0 / scale), interpret=interpret)
                codes_sm[...] = codes.astype(jnp.int8)
                codes_gm[1][b, h, j] = scale
            plgpu.commit_smem()
            if quantize:
                plgpu.copy_smem_to_gmem(codes_sm, codes_gm[0].at[b, h, here])
            # In float32 the features' rounding to 16 bits stays, as in the product.
            z_sm[...] = jnp.sum(features.astype(jnp.float32), axis=0)

            for half in range(dim // ROWS):
                part = pl.ds(half * ROWS, ROWS)

                def body(total, part=part):
                    total.add_rows(f_sm.at[:, part], v_sm, transposed=True)
                    return (total.read(),)

                shape = (ROWS, dim)
                (total,) = accumulate(
                    body, [Sum(shape, False)], [full(shape, 0.0)], interpret=interpret
                )
                h_sm[part] = total.astype(dtype)
            plgpu.commit_smem()
            pick(h_gm, b, h, lambda of_head: plgpu.copy_smem_to_gmem(h_sm, of_head.at[j]))
            plgpu.copy_smem_to_gmem(z_sm, z_gm.at[b, h, j])
            plgpu.wait_smem_to_gmem(0)

        wide = tile((ROWS, dim), dtype)
        pl.run_scoped(
            scoped,
            wide,
            wide,
            wide,
            tile((dim, dim), dtype),
            plgpu.SMEM((dim,), jnp.float32),
            tile((ROWS, dim), jnp.int8),
            plgpu.SMEM((4,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        )

    out_type = [
        jax.ShapeDtypeStruct((batch, heads, blocks, dim), jnp.float32),
        *(jax.ShapeDtypeStruct((batch, len(group), blocks, dim, dim), dtype) for group in groups),
    ]
    if quantize:
        out_type += [
            jax.ShapeDtypeStruct((batch, heads, blocks * ROWS, dim), jnp.int8),
            jax.ShapeDtypeStruct((batch, heads, blocks), jnp.float32),
        ]
    z, *rest = plgpu.kernel(
        sparse_linear_attention_prepare_keys,
        out_type=tuple(out_type),
        grid=(batch, heads, blocks),
        grid_names=("batch", "heads", "block"),
        compiler_params=COMPILER_PARAMS,
    )(key, value, mean)
    return Keys(z, tuple(rest[: len(groups)]), *rest[len(groups) :])
