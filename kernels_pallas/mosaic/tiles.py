"""What the quantization kernel needs beyond Pallas: a maximum over a tile, and transposed bytes.

All functions work on arrays of one warpgroup: 64 rows in the layout WGMMA. There a lane holds rows
g and g + 8 of every 16 (g = lane / 4) and columns 2t and 2t + 1 of every 8 (t = lane mod 4).
"""

# pyright: reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false

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

from kernels_pallas.mosaic.magic import MAGIC
from kernels_pallas.mosaic.products import WGMMA, permute
from kernels_pallas.mosaic.registers import element, permute_bytes, ptx, tree


def largest_of_tile(values: jax.Array, scratch: Any, *, interpret: bool) -> jax.Array:
    """Returns the largest magnitude of float32 (64, n) as a scalar; NaN if there is one.

    Args:
        values: the array.
        scratch: shared memory of this warpgroup, float32 (4,).
        interpret: whether the kernel runs in the interpreter.
    """
    if interpret:
        return jnp.abs(values).max()

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=None),
    )
    def find(ctx, array, memory):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        maximum = lambda x, y: ptx("max.NaN.f32 $0, $1, $2;", x, y, result=f32)
        absolute = lambda x: ptx("abs.f32 $0, $1;", x, result=f32)
        numbers = [absolute(element(pair, i)) for pair in array.registers.flat for i in (0, 1)]
        value = tree(maximum, numbers)
        for distance in (1, 2, 4, 8, 16):
            value = maximum(value, mgpu_utils.shfl_bfly(value, distance))
        start = mgpu_utils.memref_ptr(memory)
        at = lambda index: _pointer(start, index, f32)
        llvm.store(value, at(arith.remui(mgpu_utils.warp_idx(), arith.constant(i32, 4))))
        mgpu_utils.warpgroup_barrier()
        found = [llvm.load(f32, at(arith.constant(i32, i))) for i in range(4)]
        return fa.FragmentedArray.splat(tree(maximum, found), ())

    return find(values, scratch)


def round_to_codes(values: jax.Array, *, interpret: bool) -> jax.Array:
    """Rounds float32 of magnitude at most 127, ties to even, to the low byte of int32.

    NaN becomes anything.
    """
    if interpret:
        return jnp.round(jnp.where(jnp.isnan(values), 0.0, values)).astype(jnp.int32)
    return lax.bitcast_convert_type(values + MAGIC, jnp.int32)


def store_transposed(codes: jax.Array, target: Any, second: jax.Array, *, interpret: bool) -> None:
    """Writes int8 codes transposed, their rows permuted by `permute`.

    Two lanes with neighboring rows exchange halves, so each has four bytes of a column in a row.

    Args:
        codes: int32 (64, n) in the layout WGMMA, from `round_to_codes`.
        target: shared memory (n, 128), described by `tile`.
        second: 0 or 1, which 64 of the columns to write: 1 for warpgroups of odd index.
        interpret: whether the kernel runs in the interpreter.
    """
    if interpret:
        target[:, pl.ds(second * 64, 64)] = permute(codes.astype(jnp.int8).T)
        return
    n = target.shape[0]
    transforms = plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(transforms)))
    def store(ctx, array, memory):
        del ctx
        i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        constant = lambda x: arith.constant(i32, x)
        split = lambda x, size: (arith.divui(x, constant(size)), arith.remui(x, constant(size)))
        join = lambda x, size, y: arith.addi(arith.muli(x, constant(size)), y)
        warp, lane = split(arith.remui(mgpu_utils.thread_idx(), constant(256)), 32)
        g, t = split(lane, 4)
        pair, odd = split(g, 2)
        is_odd = arith.cmpi(arith.CmpIPredicate.ne, odd, constant(0))
        selector = arith.select(is_odd, constant(0x1504), constant(0x5140))
        # In a row of 128 tokens, bytes are swizzled 16 at a time, by the column modulo 8.
        token = join(warp, 16, arith.muli(pair, constant(4)))
        column = join(t, 2, odd)
        swizzled = arith.xori(token, arith.muli(column, constant(16)))
        offset = join(column, 128, swizzled)
        start = mgpu_utils.memref_ptr(memory)
        for j in range(n // 8):
            low, high = (array.registers[0, j, :, :, row].item() for row in (0, 1))
            first, second = (
                permute_bytes(element(low, i), element(high, i), 0x0040) for i in (0, 1)
            )
            mine = arith.select(is_odd, second, first)
            other = mgpu_utils.shfl_bfly(arith.select(is_odd, first, second), 4)
            word = ptx("prmt.b32 $0, $1, $2, $3;", mine, other, selector)
            index = arith.addi(offset, constant(j * 1024))
            llvm.store(word, _pointer(start, index, i8))

    store(codes, target)


def _pointer(start: ir.Value, index: ir.Value, element_type: ir.Type) -> ir.Value:
    """The address of an element."""
    return llvm.getelementptr(
        start.type, start, [index], [-(2**31)], element_type, llvm.GEPNoWrapFlags.none
    )
