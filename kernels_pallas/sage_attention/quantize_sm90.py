"""The quantization kernel for Hopper: INT8 codes of tiles, as they are, transposed, or both.

One warpgroup reads a tile into shared memory, finds its largest entry, rounds, and writes. So every
number is read from global memory once, and the transposed and permuted copy that 8-bit products
need on their right costs no pass of its own.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.products import COLUMN, WGMMA, columns, tile
from kernels_pallas.mosaic.tiles import largest_of_tile, round_to_codes, store_transposed
from kernels_pallas.sage_attention.problem import COMPILER_PARAMS, ROWS

_TINY = float(jnp.finfo(jnp.float32).tiny)


class Codes(NamedTuple):
    """A tensor in INT8, tokens padded with zeros to whole tiles.

    Attributes:
        plain: int8 (batch, heads, tokens, head_dim), or None.
        transposed: int8 (batch, heads, head_dim, tokens), tokens permuted by
            `mosaic.products.permute`, or None.
        scale: float32 (batch, heads, tiles).
    """

    plain: Any
    transposed: Any
    scale: jax.Array


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """What the kernel does.

    Attributes:
        block: tokens that share a scale, a multiple of 64.
        plain: whether the codes are wanted as they are.
        transposed: whether they are wanted transposed.
        interpret: whether the kernel runs in the interpreter.
    """

    block: int
    plain: bool
    transposed: bool
    interpret: bool

    def __call__(
        self, x: jax.Array, *, mean: jax.Array | None = None, lengths: jax.Array | None = None
    ) -> Codes:
        """Quantizes a tensor; arithmetic as in `quantize.quantize`.

        Args:
            x: (batch, tokens, heads, head_dim), any float dtype; tokens a multiple of 8, head_dim
                64 or 128.
            mean: float32 (batch, heads, head_dim), subtracted from tokens below the lengths.
            lengths: int32 (batch,), tokens at or beyond it become zero.
        """
        batch, tokens, heads, dim = x.shape
        tiles = -(-tokens // self.block)
        padded = tiles * self.block
        ends = jnp.full((batch,), tokens, jnp.int32) if lengths is None else lengths
        masked = lengths is not None or (mean is not None and padded != tokens)
        offsets = jnp.zeros((batch, heads, dim), jnp.float32) if mean is None else mean

        def kernel(x_ref, offset_ref, end_ref, *outputs_and_scratch):
            *outputs, scale_ref, x_sm, plain_sm, transposed_sm, scratch, arrived = (
                outputs_and_scratch
            )
            b, h, block = (lax.axis_index(name) for name in ("batch", "heads", "block"))
            here = pl.ds(block * self.block, self.block)
            plgpu.copy_gmem_to_smem(x_ref.at[b, here, h], x_sm, arrived)
            if mean is not None:
                offset = plgpu.load(offset_ref.at[b, h], layout=COLUMN, optimized=False)
            end = end_ref[b] - block * self.block
            plgpu.barrier_wait(arrived)
            parts = range(self.block // ROWS)

            def read(part):
                rows_here = pl.ds(part * ROWS, ROWS)
                values = plgpu.load(x_sm.at[rows_here], layout=WGMMA).astype(jnp.float32)
                if mean is not None:
                    values -= columns(offset, values.shape)
                if masked:
                    row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA)
                    values = jnp.where(row < end - part * ROWS, values, 0.0)
                return values

            largest = largest_of_tile(
                [lambda part=part: read(part) for part in parts], scratch, interpret=self.interpret
            )
            scale = jnp.maximum(largest * (1.0 / 127.0), _TINY)
            scale = jnp.where(largest < jnp.inf, scale, jnp.nan)
            inverse = 1.0 / scale
            for part in parts:
                codes = round_to_codes(read(part) * inverse, interpret=self.interpret)
                rows_here = pl.ds(part * ROWS, ROWS)
                if self.plain:
                    plain_sm[rows_here] = codes.astype(jnp.int8)
                if self.transposed:
                    store_transposed(codes, transposed_sm, part, interpret=self.interpret)
            plgpu.commit_smem()
            outputs = iter(outputs)
            if self.plain:
                plgpu.copy_smem_to_gmem(plain_sm, next(outputs).at[b, h, here])
            if self.transposed:
                plgpu.copy_smem_to_gmem(transposed_sm, next(outputs).at[b, h, :, here])
            scale_ref[b, h, block] = scale
            plgpu.wait_smem_to_gmem(0)

        int8 = jnp.int8
        shapes = [(batch, heads, padded, dim)] * self.plain
        shapes += [(batch, heads, dim, padded)] * self.transposed
        nothing = plgpu.SMEM((8,), int8)
        *codes, scale = plgpu.kernel(
            kernel,
            out_type=(
                *(jax.ShapeDtypeStruct(shape, int8) for shape in shapes),
                jax.ShapeDtypeStruct((batch, heads, tiles), jnp.float32),
            ),
            scratch_types=(
                tile((self.block, dim), x.dtype),
                tile((self.block, dim), int8) if self.plain else nothing,
                tile((dim, self.block), int8) if self.transposed else nothing,
                plgpu.SMEM((4,), jnp.float32),
                plgpu.Barrier(),
            ),
            grid=(batch, heads, tiles),
            grid_names=("batch", "heads", "block"),
            compiler_params=COMPILER_PARAMS,
        )(x, offsets, ends)
        codes = iter(codes)
        plain = next(codes) if self.plain else None
        return Codes(plain, next(codes) if self.transposed else None, scale)
