"""What the quantization kernel needs beyond Pallas: a maximum over a tile, and transposed bytes.

All functions work on arrays of one warpgroup: 64 rows in the layout WGMMA. There a lane holds rows
g and g + 8 of every 16 (g = lane / 4) and columns 2t and 2t + 1 of every 8 (t = lane mod 4).
"""

# pyright: reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels_pallas.mosaic.products import MAGIC, ROW, WGMMA, permute
from kernels_pallas.mosaic.registers import element, permute_bytes, ptx, row_array, tree


def largest_of_tile(
    parts: Sequence[Callable[[], jax.Array]], scratch: Any, *, interpret: bool
) -> jax.Array:
    """Returns the largest magnitude of several float32 arrays as a scalar; NaN if there is one.

    Args:
        parts: functions that return the arrays (64, n), so that not all have to live at once.
        scratch: shared memory, float32 (4,).
        interpret: whether the kernel runs in the interpreter.
    """
    maximum = None
    for part in parts:
        values = jnp.abs(part())
        found = values.max() if interpret else _largest_of_lane(values)
        maximum = found if maximum is None else jnp.maximum(maximum, found)
    if interpret:
        return maximum

    @plgpu.inline_mgpu(
        arg_types=(ROW, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=None),
    )
    def over_lanes(ctx, array, memory):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        value = element(array.registers.flat[0], 0)
        for distance in (1, 2, 4, 8, 16):
            other = mgpu_utils.shfl_bfly(value, distance)
            value = ptx("max.NaN.f32 $0, $1, $2;", value, other, result=f32)
        warp = arith.remui(mgpu_utils.warp_idx(), arith.constant(i32, 4))
        start = mgpu_utils.memref_ptr(memory)
        at = lambda index: llvm.getelementptr(
            start.type, start, [index], [-(2**31)], f32, llvm.GEPNoWrapFlags.none
        )
        llvm.store(value, at(warp))
        mgpu_utils.warpgroup_barrier()
        values = [llvm.load(f32, at(arith.constant(i32, i))) for i in range(4)]
        largest = tree(lambda x, y: ptx("max.NaN.f32 $0, $1, $2;", x, y, result=f32), values)
        return fa.FragmentedArray.splat(largest, ())

    return over_lanes(maximum, scratch)


def _largest_of_lane(values: jax.Array) -> jax.Array:
    """The largest of what a lane holds, in the layout ROW: the rows of a lane are all the same."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(values.shape[:1], jnp.float32, layout=ROW),
    )
    def find(ctx, array):
        del ctx
        f32 = ir.F32Type.get()
        numbers = [element(pair, i) for pair in array.registers.flat for i in (0, 1)]
        largest = tree(lambda x, y: ptx("max.NaN.f32 $0, $1, $2;", x, y, result=f32), numbers)
        return row_array([largest, largest])

    return find(values)


def round_to_codes(values: jax.Array, *, interpret: bool) -> jax.Array:
    """Rounds float32 of magnitude at most 127, ties to even, to the low byte of int32.

    NaN becomes anything.
    """
    if interpret:
        return jnp.round(jnp.where(jnp.isnan(values), 0.0, values)).astype(jnp.int32)
    return lax.bitcast_convert_type(values + MAGIC, jnp.int32)


def store_transposed(codes: jax.Array, target: Any, part: int, *, interpret: bool) -> None:
    """Writes int8 codes transposed, their rows permuted by `permute`.

    Two lanes with neighboring rows exchange halves, so each has four bytes of a column in a row.

    Args:
        codes: int32 (64, n) in the layout WGMMA, from `round_to_codes`.
        target: shared memory (n, tokens), described by `tile`.
        part: which 64 of the tokens these are.
        interpret: whether the kernel runs in the interpreter.
    """
    if interpret:
        target[:, pl.ds(part * 64, 64)] = permute(codes.astype(jnp.int8).T)
        return
    n, tokens = target.shape
    transforms = plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(transforms)))
    def store(ctx, array, memory):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        constant = lambda x: arith.constant(i32, x)
        thread = arith.remui(mgpu_utils.thread_idx(), constant(128))
        lane, warp = (op(thread, constant(32)) for op in (arith.remui, arith.divui))
        t, g = (op(lane, constant(4)) for op in (arith.remui, arith.divui))
        odd, pair = (op(g, constant(2)) for op in (arith.remui, arith.divui))
        is_odd = arith.cmpi(arith.CmpIPredicate.ne, odd, constant(0))
        selector = arith.select(is_odd, constant(0x1504), constant(0x5140))
        # Bytes of a row of 128 tokens are swizzled: 16 at a time, by the row modulo 8.
        column = arith.addi(arith.muli(t, constant(2)), odd)  # modulo 8
        token = arith.addi(
            arith.addi(arith.muli(warp, constant(16)), arith.muli(pair, constant(4))),
            constant(part * 64 % 128),
        )
        swizzled = arith.xori(token, arith.muli(column, constant(16)))
        offset = arith.addi(arith.muli(column, constant(128)), swizzled)
        start = mgpu_utils.memref_ptr(memory)
        i8 = ir.IntegerType.get_signless(8)
        for j in range(n // 8):
            low, high = (array.registers[0, j, :, :, row].item() for row in (0, 1))
            first, second = (
                permute_bytes(element(low, i), element(high, i), 0x0040) for i in (0, 1)
            )
            mine = arith.select(is_odd, second, first)
            other = mgpu_utils.shfl_bfly(arith.select(is_odd, first, second), 4)
            word = ptx("prmt.b32 $0, $1, $2, $3;", mine, other, selector)
            block = constant((j * (tokens // 128) + part * 64 // 128) * 1024)
            at = llvm.getelementptr(
                start.type, start, [arith.addi(offset, block)], [-(2**31)], i8,
                llvm.GEPNoWrapFlags.none,
            )  # fmt: skip
            llvm.store(word, at)

    store(codes, target)
