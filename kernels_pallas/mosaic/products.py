"""Products of 8-bit integers on Hopper's tensor cores, with their results as float32 at no cost.

Three tricks carry the INT8 kernels; see also `docs/sage_attention.md`.

1.  **Magic accumulators.** 0x4B400000 is the bit pattern of the float MAGIC = 1.5 * 2**23. An int32
    accumulator that starts there is, read as float32, MAGIC + x, exactly, while |x| < 2**22: the
    subtraction of MAGIC takes the place of a conversion, and often disappears in a fused multiply.
2.  **Magic rounding.** In float16, p + 1536 rounds p to the nearest integer, ties to even; the low
    byte of the sum is that integer. Two numbers fit in a word, so one fused multiply-add scales
    and rounds both, and one byte permutation packs four codes.
3.  **The permutation.** Accumulators hold columns 2t and 2t + 1 of every 8 in lane t, the 8-bit
    left operand wants four neighbors there. Regrouping the registers of two neighboring blocks of
    8 columns costs nothing and equals a permutation of every 16 columns; the right operand is
    stored with the same permutation along the contracted axis (`permute`).

All functions work on arrays of one warpgroup: 64 rows in the layout WGMMA.
"""

# Pallas' decorators and transforms are typed more narrowly than they work.
# pyright: reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
"""Layouts of one number a row, and one a column, of an array in the layout WGMMA."""

MAGIC = 12582912.0
_MAGIC_BITS = 0x4B400000
_HALF_MAGIC_BITS = 0x66006600
_LARGEST_INVERSE = 65504.0


def permute(x: jax.Array) -> jax.Array:
    """Permutes the last axis, a multiple of 16 long, as `round_half` permutes columns.

    Column 8h + 2t + i of every 16 (lane t, half h) moves to 4t + 2h + i.
    """
    parts = x.reshape(*x.shape[:-1], -1, 2, 4, 2)
    return parts.swapaxes(-3, -2).reshape(x.shape)


def full(shape: tuple[int, ...], value: float, dtype: Any = jnp.float32, layout: Any = WGMMA):
    """Returns a constant array in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one number a row."""
    return lax.broadcast_in_dim(vector, shape, [0])


def columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one number a column."""
    return lax.broadcast_in_dim(vector, shape, [1])


class Sum(NamedTuple):
    """An accumulator to come.

    Attributes:
        shape: rows and columns.
        integer: whether it adds products of int8.
        sign: int32 scalar, 1 or -1. Sums of int8 products, of a left operand that has this factor
            too, come out with `sign * MAGIC` added: float32 is sign and magnitude, so integers
            added below zero count downwards. Alternating signs keep what is added in excess small.
    """

    shape: tuple[int, int]
    integer: bool
    sign: jax.Array | None = None


def accumulate(
    body: Callable[..., Sequence[jax.Array]],
    sums: Sequence[Sum],
    results: Sequence[jax.Array],
    *,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs `body(*accumulators)`, which adds products to them and returns arrays.

    An accumulator has `add(left, right)`, which starts adding left · rightᵀ (left: an array in the
    layout of an 8-bit operand, or a reference to shared memory; right: a reference), and
    `read(in_flight)`, which waits until at most so many products are under way (None: does not
    wait) and returns float32. Sums of int8 products come with MAGIC added, see `Sum`.

    Args:
        body: called once while tracing.
        sums: the accumulators.
        results: arrays of shape, dtype and layout of what `body` returns.
        interpret: whether the kernel runs in the interpreter.
    """
    if interpret:
        return body(*(_Simulated(s) for s in sums))

    def run(refs):
        out = body(*(_Accumulator(ref, s) for ref, s in zip(refs, sums, strict=False)))
        for ref, value in zip(refs[len(sums) :], out, strict=True):
            ref[...] = value

    start = [plgpu.ACC.init(_start(s)) for s in sums]
    return pl.run_state(run)((*start, *results))[len(sums) :]


def _start(description: Sum) -> jax.Array:
    if not description.integer:
        return full(description.shape, 0.0)
    if description.sign is None:
        return full(description.shape, _MAGIC_BITS, jnp.int32)
    bits = _MAGIC_BITS + lax.bitwise_and(description.sign, jnp.int32(-(2**31)))
    return plgpu.layout_cast(lax.broadcast(bits, description.shape), WGMMA)


class _Accumulator:
    """Registers that a warpgroup's products are added to."""

    def __init__(self, ref, description: Sum):
        self._ref, self._integer = ref, description.integer

    def add(self, left, right):
        plgpu.wgmma(self._ref, left, right.transpose((1, 0)))

    def read(self, in_flight: int | None = 0):
        value = plgpu.wgmma_accumulator_load(self._ref, wait_n=in_flight)
        return lax.bitcast_convert_type(value, jnp.float32) if self._integer else value


class _Simulated:
    """The same, by definition."""

    def __init__(self, description: Sum):
        self._integer = description.integer
        self._sign = jnp.float32(1 if description.sign is None else description.sign)
        self._value = jnp.zeros(description.shape, jnp.int32 if self._integer else jnp.float32)

    def add(self, left, right):
        left, right = left[...], right[...]
        self._value += lax.dot_general(
            left, right, (((1,), (1,)), ((), ())), preferred_element_type=self._value.dtype
        )

    def read(self, in_flight: int | None = 0):
        del in_flight
        # Tensor cores read through the asynchronous proxy, like copies. The reads above did not,
        # and would count as racing with the copy that reuses the memory.
        plgpu.commit_smem()
        if not self._integer:
            return self._value
        return self._sign * (self._value.astype(jnp.float32) + MAGIC)


def join(parts: Sequence[jax.Array], *, interpret: bool) -> jax.Array:
    """Concatenates the columns of arrays in the layout WGMMA, at no cost."""
    if interpret:
        return jnp.concatenate(parts, axis=1)
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    result = plgpu.ShapeDtypeStruct(shape, parts[0].dtype, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA,) * len(parts), return_type=result)
    def concatenate(ctx, *arrays):
        del ctx
        registers = np.concatenate([array.registers for array in arrays], axis=1)
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return concatenate(*parts)


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
    """Sums the rows of a float16 array (64, n), the first eight numbers at a time in float16.

    Returns:
        float32 (64,).
    """
    if interpret:
        return values.astype(jnp.float32).sum(axis=1)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(values.shape[:1], jnp.float32, layout=ROW),
    )
    def add(ctx, array):
        del ctx
        sums = []
        for words in _words_of_rows(array):
            add_half = lambda x, y: ptx("add.rn.f16x2 $0, $1, $2;", x, y)
            words = [tree(add_half, words[i : i + 8]) for i in range(0, len(words), 8)]
            total = tree(arith.addf, list(itertools.chain(*map(_halves, words))))
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
    parts: Sequence[jax.Array], sign: jax.Array | None = None, *, interpret: bool
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
    sign = jnp.float32(1 if sign is None else sign)
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
        words = [
            itertools.chain(*words) for words in zip(*map(_words_of_rows, arrays), strict=True)
        ]
        upper, lower = (tree(maximum, [absolute(word) for word in row]) for row in words)
        # The two rows of a lane share a word from here on.
        both = maximum(permute_bytes(upper, lower, 0x5410), permute_bytes(upper, lower, 0x7632))
        for distance in (1, 2):
            both = maximum(both, mgpu_utils.shfl_bfly(both, distance))
        inverses = []
        for largest in _halves(both):
            inverse = arith.mulf(_reciprocal(largest), arith.constant(f32, 127.0))
            limit = arith.constant(f32, _LARGEST_INVERSE)
            inverse = ptx("min.NaN.f32 $0, $1, $2;", inverse, limit, result=f32)
            inverses += _halves(ptx("cvt.rn.f16x2.f32 $0, $1, $1;", inverse))[:1]
        return row_array(inverses), row_array([_reciprocal(x) for x in inverses])

    inverse, scale = measure(*parts)
    return round_half(parts, inverse * sign, interpret=False), scale


def _reciprocal(x: ir.Value) -> ir.Value:
    return ptx("rcp.approx.ftz.f32 $0, $1;", x, result=ir.F32Type.get())


def ptx(code: str, *operands: ir.Value, result: ir.Type | None = None) -> ir.Value:
    """One instruction; the result is a word unless said otherwise."""
    return mgpu_utils.inline_ptx(
        code, *operands, result_types=result or ir.IntegerType.get_signless(32)
    )


def permute_bytes(first: ir.Value, second: ir.Value, selector: int) -> ir.Value:
    """Picks bytes of two words; `prmt` of Mosaic."""
    i32 = ir.IntegerType.get_signless(32)
    return mgpu_utils.prmt(first, second, arith.constant(i32, selector))


def element(register: ir.Value, position: int) -> ir.Value:
    """Element of a vector."""
    at = ir.DenseI64ArrayAttr.get([position])
    return vector.extract(register, dynamic_position=[], static_position=at)


def _halves(word: ir.Value) -> list[ir.Value]:
    """The two float16 of a word as float32."""
    f32 = ir.F32Type.get()
    code = "{{.reg .f16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {};}}"
    return [ptx(code.format(half), word, result=f32) for half in "lh"]


def _words_of_rows(array: fa.FragmentedArray) -> list[list[ir.Value]]:
    """For each of the two rows of a lane, its words of two float16."""
    i32 = ir.IntegerType.get_signless(32)
    rows_of_lane = (array.registers[:, :, :, :, row].flat for row in (0, 1))
    return [[mgpu_utils.bitcast(register, i32) for register in row] for row in rows_of_lane]


def row_array(values: Sequence[ir.Value]) -> fa.FragmentedArray:
    """An array (64,) in the layout ROW, of the float32 of a lane's two rows."""
    registers = np.empty(fa.WGMMA_ROW_LAYOUT.registers_shape((64,)), dtype=object)
    for index, value in zip(np.ndindex(registers.shape), values, strict=True):
        registers[index] = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_ROW_LAYOUT, _is_signed=None)


def tree(operation: Callable[[Any, Any], Any], values: Sequence[Any], ways: int = 2) -> Any:
    """Combines values, `ways` at a time."""
    while len(values) > 1:
        groups = [values[i : i + ways] for i in range(0, len(values), ways)]
        values = [functools.reduce(operation, group) for group in groups]
    return values[0]


def sleep(nanoseconds: int) -> None:
    """Lets the calling threads rest for about so long."""

    @plgpu.inline_mgpu()
    def rest(ctx):
        del ctx
        mgpu_utils.inline_ptx(f"nanosleep.u32 {nanoseconds};", has_side_effects=True)

    rest()


def tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Describes shared memory for tiles that tensor cores read: the last axis is contiguous."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(shape[-1] * size, 128)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
