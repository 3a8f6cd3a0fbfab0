"""The quantization kernel for Hopper: INT8 codes of tiles, as they are, transposed, or both.

A block of threads owns a tile, each warpgroup 64 of its tokens. They find the largest entry, meet,
round, and write. So every number is read from global memory once, and the transposed and permuted
copy that 8-bit products need on their right costs no pass of its own.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import dataclasses
import functools
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
        products: float32 (2, batch, heads, tokens), for each token the sum of the products of its
            entries with those of another tensor, and with themselves; or None.
    """

    plain: Any
    transposed: Any
    scale: jax.Array
    products: Any


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
        self,
        x: jax.Array,
        *,
        mean: jax.Array | None = None,
        lengths: jax.Array | None = None,
        other: jax.Array | None = None,
    ) -> Codes:
        """Quantizes a tensor; arithmetic as in `quantize.quantize`.

        Args:
            x: (batch, tokens, heads, head_dim), any float dtype; tokens a multiple of 8, head_dim
                64 or 128.
            mean: float32 (batch, heads, head_dim), subtracted from tokens below the lengths.
            lengths: int32 (batch,), tokens at or beyond it become zero.
            other: like `x`: what `products` are asked for with.
        """
        batch, tokens, heads, dim = x.shape
        tiles = -(-tokens // self.block)
        padded = tiles * self.block
        masked = lengths is not None or (mean is not None and padded != tokens)
        if masked and lengths is None:
            lengths = jnp.full((batch,), tokens, jnp.int32)
        operands = {"x": x, "mean": mean, "end": lengths, "other": other}
        operands = {name: array for name, array in operands.items() if array is not None}
        warpgroups, float32, int8 = self.block // ROWS, jnp.float32, jnp.int8
        outputs = {"scale": jax.ShapeDtypeStruct((batch, heads, tiles), float32)}
        if self.plain:
            outputs["plain"] = jax.ShapeDtypeStruct((batch, heads, padded, dim), int8)
        if self.transposed:
            outputs["transposed"] = jax.ShapeDtypeStruct((batch, heads, dim, padded), int8)
        if other is not None:
            outputs["products"] = jax.ShapeDtypeStruct((2, batch, heads, padded), float32)

        def kernel(refs, memory, barriers):
            ref = dict(zip((*operands, *outputs), refs, strict=True))
            x_sm, other_sm, plain_sm, transposed_sm, products_sm, scratch, largest_sm = memory
            arrived, met = barriers
            b, h, block = (lax.axis_index(name) for name in ("batch", "heads", "block"))
            wg = lax.axis_index("wg")
            here, rows = pl.ds(block * self.block, self.block), pl.ds(wg * ROWS, ROWS)
            start = block * self.block + wg * ROWS

            def meet():
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)

            def fetch(name, target):
                source = ref[name].at[b, pl.ds(start, ROWS), h]
                plgpu.copy_gmem_to_smem(source, target.at[rows], arrived.at[wg])

            fetch("x", x_sm)
            if other is not None:
                fetch("other", other_sm)
            if mean is not None:
                offset = plgpu.load(ref["mean"].at[b, h], layout=COLUMN, optimized=False)
            plgpu.barrier_wait(arrived.at[wg])
            values = plgpu.load(x_sm.at[rows], layout=WGMMA).astype(float32)
            if mean is not None:
                values -= columns(offset, values.shape)
            if masked:
                row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA)
                values = jnp.where(row < ref["end"][b] - start, values, 0.0)

            largest_sm[wg] = largest_of_tile(values, scratch.at[wg], interpret=self.interpret)
            if other is not None:
                others = plgpu.load(other_sm.at[rows], layout=WGMMA).astype(float32)
                for i, factor in enumerate((others, values)):
                    products_sm.at[i, rows][...] = jnp.sum(values * factor, axis=1)
            meet()
            found = [largest_sm[i] for i in range(warpgroups)]
            scale = functools.reduce(jnp.maximum, found) * (1.0 / 127.0)
            scale = jnp.where(scale < jnp.inf, jnp.maximum(scale, _TINY), jnp.nan)
            codes = round_to_codes(values * (1.0 / scale), interpret=self.interpret)
            if self.plain:
                plain_sm[rows] = codes.astype(int8)
            if self.transposed:
                store_transposed(codes, transposed_sm, wg, interpret=self.interpret)
            plgpu.commit_smem()
            meet()

            @pl.when(wg == 0)
            def _():
                if self.plain:
                    plgpu.copy_smem_to_gmem(plain_sm, ref["plain"].at[b, h, here])
                if self.transposed:
                    plgpu.copy_smem_to_gmem(transposed_sm, ref["transposed"].at[b, h, :, here])
                if other is not None:
                    for i in range(2):
                        target = ref["products"].at[i, b, h, here]
                        plgpu.copy_smem_to_gmem(products_sm.at[i], target)
                ref["scale"][b, h, block] = scale
                plgpu.wait_smem_to_gmem(0)

        def entry(*refs):
            nothing = plgpu.SMEM((8,), int8)
            pl.run_scoped(
                functools.partial(kernel, refs),
                (
                    tile((self.block, dim), x.dtype),
                    nothing if other is None else tile((self.block, dim), other.dtype),
                    tile((self.block, dim), int8) if self.plain else nothing,
                    tile((dim, self.block), int8) if self.transposed else nothing,
                    nothing if other is None else plgpu.SMEM((2, self.block), float32),
                    plgpu.SMEM((warpgroups, 4), float32),
                    plgpu.SMEM((warpgroups,), float32),
                ),
                (
                    plgpu.Barrier(num_arrivals=1 if other is None else 2, num_barriers=warpgroups),
                    plgpu.Barrier(num_arrivals=warpgroups),
                ),
                collective_axes="wg",
            )

        results = plgpu.kernel(
            entry,
            out_type=tuple(outputs.values()),
            grid=(batch, heads, tiles),
            grid_names=("batch", "heads", "block"),
            num_threads=warpgroups,
            thread_name="wg",
            compiler_params=COMPILER_PARAMS,
        )(*operands.values())
        found = dict(zip(outputs, results, strict=True))
        return Codes(
            found.get("plain"), found.get("transposed"), found["scale"], found.get("products")
        )
