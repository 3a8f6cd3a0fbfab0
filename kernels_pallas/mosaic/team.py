"""A block of threads of the kernels: how many warpgroups compute, with how many registers."""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.products import sleep

ROWS = 64
"""Rows of a product that a warpgroup owns."""


SHARED_MEMORY = 227 * 1024
"""Bytes that a block of threads may have."""

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,  # the interpreter finds no races
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
)
"""How the kernels are compiled."""


class Team(NamedTuple):
    """The warpgroups of a block that compute, 64 rows each.

    Attributes:
        size: how many.
        registers: how many each thread of them has.
    """

    size: int
    registers: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.size * ROWS

    def blocks(self, tokens: int) -> int:
        """Blocks for so many rows."""
        return -(-tokens // self.rows)

    def fan_out(self, warpgroup: jax.Array, nanoseconds: int) -> None:
        """Lets warpgroups start one after the other, the last one so much after the first."""
        for i in range(1, self.size):
            pl.when(warpgroup == i)(lambda i=i: sleep(nanoseconds * i // (self.size - 1)))
