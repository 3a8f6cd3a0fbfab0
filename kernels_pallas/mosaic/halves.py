"""Float16 on its way to int8: two numbers an instruction.

All functions work on arrays of one warpgroup: 64 rows in the layout WGMMA. With `interpret` they
compute the same by definition.
"""

# Pallas' decorators and transforms are typed more narrowly than they work.
# pyright: reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels_pallas.mosaic.products import ROW, WGMMA, permute
from kernels_pallas.mosaic.registers import (
    element,
    halves,
    permute_bytes,
    ptx,
    reciprocal,
    row_array,
    tree,
    words_of_rows,
)
from kernels_pallas.mosaic.rounding import sum_eights

_HALF_MAGIC_BITS = 0x66006600
_LARGEST_INVERSE = 65504.0


def to_half(values: jax.Array, *, interpret: bool) -> jax.Array:
    """Rounds float32 (64, n) in the layout WGMMA to float16, two numbers an instruction."""
    if interpret:
        return values.astype(jnp.float16)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.float16, layout=WGMMA),
    )
    def convert(ctx, array):
        del ctx
        i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.F16Type.get())

        def round_pair(register):
            first, second = (element(register, i) for i in (0, 1))
            word = ptx("cvt.rn.f16x2.f32 $0, $2, $1;", first, second, result=i32)
            return mgpu_utils.bitcast(word, pair)

        registers = np.vectorize(round_pair, otypes=[object])(array.registers)
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return convert(values)


def largest_of_rows(values: jax.Array, *, interpret: bool) -> jax.Array:
    """Returns the largest of each row of float32 (64, n), none negative and none NaN.

    Such numbers are ordered like their bits, and the maximum of three integers is one instruction.
    """
    if interpret:
        return values.max(axis=1)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(values.shape[:1], jnp.float32, layout=ROW),
    )
    def find(ctx, array):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        maxima = []
        for row in (0, 1):
            pairs = array.registers[:, :, :, :, row].flat
            words = [element(pair, i) for pair in pairs for i in (0, 1)]
            words = [arith.bitcast(i32, word) for word in words]
            word = tree(arith.maxsi, words, ways=3)
            for distance in (1, 2):
                word = arith.maxsi(word, mgpu_utils.shfl_bfly(word, distance))
            maxima.append(arith.bitcast(f32, word))
        return row_array(maxima)

    return find(values)


def sum_half(values: jax.Array, *, interpret: bool) -> jax.Array:
    """Sums the rows of a float16 array (64, n) as `sum_eights` does; n a multiple of 64.

    Returns:
        float32 (64,).
    """
    if interpret:
        return sum_eights(values.astype(jnp.float32))[:, 0]

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(values.shape[:1], jnp.float32, layout=ROW),
    )
    def add(ctx, array):
        del ctx
        sums = []
        for words in words_of_rows(array):
            add_half = lambda x, y: ptx("add.rn.f16x2 $0, $1, $2;", x, y)
            words = [tree(add_half, words[i : i + 8]) for i in range(0, len(words), 8)]
            total = tree(arith.addf, list(itertools.chain(*map(halves, words))))
            for distance in (1, 2):
                total = arith.addf(total, mgpu_utils.shfl_bfly(total, distance))
            sums.append(total)
        return row_array(sums)

    return add(values)


def round_half(parts: Sequence[jax.Array], gain: jax.Array, *, interpret: bool) -> jax.Array:
    """Rounds a float16 array times a gain to int8, the left operand of a product.

    Two numbers an instruction: the product and the rounding, by adding 1.5 * 2**10, are one fused
    operation, and one byte permutation packs four codes.

    Args:
        parts: float16 (64, n) in the layout WGMMA, which follow each other along the columns.
        gain: float32 (64,), of float16 precision; codes must not pass 127.
        interpret: whether the kernel runs in the interpreter.

    Returns:
        int8 (64, sum of n) in the layout WGMMA_8BIT, its columns permuted as by `permute`.
    """
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    if interpret:
        exact = jnp.concatenate(parts, axis=1).astype(jnp.float32) * gain[:, None]
        return permute(jnp.round(jnp.where(jnp.isnan(exact), 0.0, exact)).astype(jnp.int8))

    @plgpu.inline_mgpu(
        arg_types=(ROW, *(WGMMA,) * len(parts)),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def pack(ctx, gain, *arrays):
        del ctx
        i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        magic = arith.constant(i32, _HALF_MAGIC_BITS)
        gains = [element(register, 0) for register in gain.registers.flat]
        gains = [ptx("cvt.rn.f16x2.f32 $0, $1, $1;", gain) for gain in gains]
        registers = np.concatenate([array.registers for array in arrays], axis=1)
        out = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(shape), dtype=object)
        for index in np.ndindex(out.shape):
            neighbors = (registers[(index[0], 2 * index[1] + i, *index[2:])] for i in (0, 1))
            words = (mgpu_utils.bitcast(register, i32) for register in neighbors)
            rounded = (
                ptx("fma.rn.f16x2 $0, $1, $2, $3;", word, gains[index[4]], magic) for word in words
            )
            out[index] = mgpu_utils.bitcast(
                permute_bytes(*rounded, 0x6420), ir.VectorType.get((4,), i8)
            )
        return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=True)

    return pack(gain, *parts)


def quantize_half(
    parts: Sequence[jax.Array], sign: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Quantizes each row of a float16 array by its largest entry, as `round_half` does.

    Args:
        parts: float16 (64, n) in the layout WGMMA, which follow each other along the columns.
        sign: int32 scalar, 1 or -1: a factor on the codes.
        interpret: whether the kernel runs in the interpreter.

    Returns:
        Codes, int8 (64, sum of n) in the layout WGMMA_8BIT, permuted as by `permute`, and the scale
        of each row, float32 (64,): the codes, without the sign, times it are the values.
    """
    sign = jnp.float32(sign)
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    if interpret:
        values = jnp.concatenate(parts, axis=1).astype(jnp.float32)
        inverse = jnp.minimum(127.0 / jnp.abs(values).max(axis=1), _LARGEST_INVERSE)
        inverse = inverse.astype(jnp.float16).astype(jnp.float32)
        return round_half(parts, inverse * sign, interpret=True), 1.0 / inverse

    row = plgpu.ShapeDtypeStruct(shape[:1], jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(arg_types=(WGMMA,) * len(parts), return_type=(row, row))
    def measure(ctx, *arrays):
        del ctx
        f32 = ir.F32Type.get()
        maximum = lambda x, y: ptx("max.NaN.f16x2 $0, $1, $2;", x, y)
        absolute = lambda x: ptx("abs.f16x2 $0, $1;", x)
        words = [itertools.chain(*words) for words in zip(*map(words_of_rows, arrays), strict=True)]
        upper, lower = (tree(maximum, [absolute(word) for word in row]) for row in words)
        # The two rows of a lane share a word from here on.
        both = maximum(permute_bytes(upper, lower, 0x5410), permute_bytes(upper, lower, 0x7632))
        for distance in (1, 2):
            both = maximum(both, mgpu_utils.shfl_bfly(both, distance))
        inverses = []
        for largest in halves(both):
            inverse = arith.mulf(reciprocal(largest), arith.constant(f32, 127.0))
            limit = arith.constant(f32, _LARGEST_INVERSE)
            inverse = ptx("min.NaN.f32 $0, $1, $2;", inverse, limit, result=f32)
            inverses += halves(ptx("cvt.rn.f16x2.f32 $0, $1, $1;", inverse))[:1]
        return row_array(inverses), row_array([reciprocal(x) for x in inverses])

    inverse, scale = measure(*parts)
    return round_half(parts, inverse * sign, interpret=False), scale
