"""Products of 8-bit integers on Hopper's tensor cores, with their results as float32 at no cost.

Three tricks carry the INT8 kernels; see also `docs/sage_attention.md`.

1.  **Magic accumulators.** 0x4B400000 is the bit pattern of the float MAGIC = 1.5 * 2**23. An int32
    accumulator that starts there is, read as float32, MAGIC + x, exactly, while |x| < 2**22: the
    subtraction of MAGIC takes the place of a conversion, and often disappears in a fused multiply.
2.  **Magic rounding** (`mosaic.halves`). In float16, p + 1536 rounds p to the nearest integer, ties
    to even; the low byte of the sum is that integer. Two numbers fit in a word, so one fused
    multiply-add scales and rounds both, and one byte permutation packs four codes.
3.  **The permutation.** Accumulators hold columns 2t and 2t + 1 of every 8 in lane t, the 8-bit
    left operand wants four neighbors there. Regrouping the registers of two neighboring blocks of
    8 columns costs nothing and equals a permutation of every 16 columns; the right operand is
    stored with the same permutation along the contracted axis (`permute`).

All functions work on arrays of one warpgroup: 64 rows in the layout WGMMA.
"""

# Pallas' decorators and transforms are typed more narrowly than they work.
# pyright: reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false

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

from kernels_pallas.mosaic.magic import MAGIC

WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
"""Layouts of one number a row, and one a column, of an array in the layout WGMMA."""

_MAGIC_BITS = 0x4B400000


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
        start: what a sum that is not of int8 begins with; None: zeros.
    """

    shape: tuple[int, int]
    integer: bool
    sign: jax.Array | None = None
    start: jax.Array | None = None


def accumulate(
    body: Callable[..., Sequence[jax.Array]],
    sums: Sequence[Sum],
    results: Sequence[jax.Array],
    *,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs `body(*accumulators)`, which adds products to them and returns arrays.

    An accumulator has `add(left, right)`, which starts adding left · rightᵀ (left: an array in the
    layout of an 8-bit operand or, of 16 bits, WGMMA, or a reference to shared memory; right: a
    reference), and `read(in_flight)`, which waits until at most so many products are under way
    (None: does not wait) and returns float32. Sums of int8 products come with MAGIC added, see
    `Sum`. In 16 bits, `add_rows(left, right)` adds left · right, and with `transposed=True`
    leftᵀ · right of a reference left.

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
        return full(description.shape, 0.0) if description.start is None else description.start
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

    def add_rows(self, left, right, *, transposed: bool = False):
        plgpu.wgmma(self._ref, left.transpose((1, 0)) if transposed else left, right)

    def read(self, in_flight: int | None = 0):
        value = plgpu.wgmma_accumulator_load(self._ref, wait_n=in_flight)
        return lax.bitcast_convert_type(value, jnp.float32) if self._integer else value


class _Simulated:
    """The same, by definition."""

    def __init__(self, description: Sum):
        self._integer = description.integer
        self._sign = jnp.float32(1 if description.sign is None else description.sign)
        self._value = jnp.zeros(description.shape, jnp.int32 if self._integer else jnp.float32)
        if description.start is not None:
            self._value += description.start

    def add(self, left, right):
        self._contract(left, right, 1, 1)

    def add_rows(self, left, right, *, transposed: bool = False):
        self._contract(left, right, 0 if transposed else 1, 0)

    def _contract(self, left, right, left_axis, right_axis):
        self._value += lax.dot_general(
            left[...],
            right[...],
            (((left_axis,), (right_axis,)), ((), ())),
            preferred_element_type=self._value.dtype,
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


def split(array: jax.Array, width: int, *, interpret: bool) -> list[jax.Array]:
    """Cuts an array in the layout WGMMA into parts of so many columns, at no cost."""
    height, size = array.shape
    if interpret:
        return [array[:, i : i + width] for i in range(0, size, width)]
    part = plgpu.ShapeDtypeStruct((height, width), array.dtype, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=(part,) * (size // width))
    def cut(ctx, whole):
        del ctx
        registers = np.split(whole.registers, size // width, axis=1)
        make = lambda x: fa.FragmentedArray(_registers=x, _layout=fa.WGMMA_LAYOUT, _is_signed=None)
        return tuple(map(make, registers))

    return list(cut(array))


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
