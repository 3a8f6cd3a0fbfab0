"""What inline code does with the registers of a lane.

An array (64, n) in the layout WGMMA gives a lane rows g and g + 8 of every 16 (g = lane / 4) and
columns 2t and 2t + 1 of every 8 (t = lane mod 4).
"""

# Pallas' decorators and transforms are typed more narrowly than they work.
# pyright: reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector


def reciprocal(x: ir.Value) -> ir.Value:
    """One divided by a float32, to within its last bit."""
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


def halves(word: ir.Value) -> list[ir.Value]:
    """The two float16 of a word as float32."""
    f32 = ir.F32Type.get()
    code = "{{.reg .f16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {};}}"
    return [ptx(code.format(half), word, result=f32) for half in "lh"]


def words_of_rows(array: fa.FragmentedArray) -> list[list[ir.Value]]:
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
