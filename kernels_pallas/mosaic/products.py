"""Products of 8-bit integers on Hopper's tensor cores, with their results as float32 at no cost.

Three tricks carry the INT8 kernels; see also `docs/sage_attention.md`.

1.  **Magic accumulators.** 0x4B400000 is the bit pattern of the float MAGIC = 1.5 * 2**23. An int32
    accumulator that starts there is, read as float32, MAGIC + x, exactly, while |x| < 2**22: the
    subtraction of MAGIC takes the place of a conversion, and often disappears in a fused multiply.
2.  **Magic rounding.** p + MAGIC rounds p to the nearest integer, ties to even; the low byte of the
    sum is that integer. Three byte permutations pack four of them.
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
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
"""Layouts of one number a row, and one a column, of an array in the layout WGMMA."""

MAGIC = 12582912.0
_MAGIC_BITS = 0x4B400000


def permute(x: jax.Array) -> jax.Array:
    """Permutes the last axis, a multiple of 16 long, as `pack_int8` permutes columns.

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
    """An accumulator to come: rows and columns, and whether it adds products of int8."""

    shape: tuple[int, int]
    integer: bool


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
    wait) and returns float32. Sums of int8 products come with MAGIC added.

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

    zero: dict[bool, tuple[float, Any]] = {
        True: (_MAGIC_BITS, jnp.int32),
        False: (0.0, jnp.float32),
    }
    start = [plgpu.ACC.init(full(s.shape, *zero[s.integer])) for s in sums]
    return pl.run_state(run)((*start, *results))[len(sums) :]


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
        return self._value.astype(jnp.float32) + (MAGIC if self._integer else 0.0)


def pack_int8(values: jax.Array, *, interpret: bool) -> jax.Array:
    """Packs integers plus MAGIC into bytes, the left operand of a product.

    Args:
        values: float32 (64, n) in the layout WGMMA; MAGIC plus integers of at most 127.
        interpret: whether the kernel runs in the interpreter.

    Returns:
        int8 (64, n) in the layout WGMMA_8BIT, its columns permuted as by `permute`.
    """
    if interpret:
        return permute((values - MAGIC).astype(jnp.int8))

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def pack(ctx, array):
        del ctx
        i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)

        def words(register):
            for i in range(2):
                at = ir.DenseI64ArrayAttr.get([i])
                yield arith.bitcast(
                    i32, vector.extract(register, dynamic_position=[], static_position=at)
                )

        def low_bytes(register):
            first, second = words(register)
            return mgpu_utils.prmt(first, second, arith.constant(i32, 0x0040))

        out = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(values.shape), dtype=object)
        for index in np.ndindex(out.shape):
            pair = [array.registers[(index[0], 2 * index[1] + i, *index[2:])] for i in (0, 1)]
            word = mgpu_utils.prmt(*map(low_bytes, pair), arith.constant(i32, 0x5410))
            out[index] = mgpu_utils.bitcast(word, ir.VectorType.get((4,), i8))
        return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=True)

    return pack(values)


def tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Describes shared memory for tiles that tensor cores read: the last axis is contiguous."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(shape[-1] * size, 128)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
