"""What shares a scale: the one description that the reference and the kernels follow."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp

from kernels_pallas.mosaic.magic import shorten

_LARGEST_SCALE = 2.0**-3

type GradientScales = Literal["tile", "vector"]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How tensors are cut into parts that share one scale.

    Two implementations with the same tiling compute the same function up to the rounding of
    floats, because only these scales, not the order of the work, decide what is rounded to what.

    Attributes:
        block_q: queries that share a scale of Q and of dO, and a tile of P and dS in the backward
            pass.
        block_kv: keys that share a scale of K and of V. P of the forward pass has one scale for
            each query and so many keys.
        gradient_block_kv: keys in a tile of P and dS in the backward pass; divides `block_kv`.
        gradient_scales: scales of such a tile. "tile": one, as printed in SageBwd's Algorithm 2.
            "vector": one for each query where keys are summed over (dQ) and one for each key where
            queries are (dK, dV), which halves the error of the gradients.
        half_precision: P, dP - D and dS are rounded to the 11 bits of float16 on their way to int8,
            and so are the inverses of their scales, sums of eight P (`mosaic.sums`), and what is
            taken away from the scores before exp (`mosaic.magic.beside`). The kernels do it,
            because float16 is twice as fast; a code differs by one now and then.

    Raises:
        ValueError: `gradient_block_kv` does not divide `block_kv`.
    """

    block_q: int = 64
    block_kv: int = 64
    gradient_block_kv: int = 64
    gradient_scales: GradientScales = "vector"
    half_precision: bool = False

    def __post_init__(self):
        if self.block_kv % self.gradient_block_kv:
            raise ValueError(
                "gradient_block_kv must divide block_kv, got "
                f"{self.gradient_block_kv} and {self.block_kv}"
            )

    @classmethod
    def for_lengths(cls, queries: int, keys: int) -> Self:
        """Returns the usual tiling, with smaller tiles for fewer tokens than one tile holds."""
        block_kv = min(64, keys)
        return cls(min(64, queries), block_kv, block_kv)


def scale_of_scores(query_scale: jax.Array, key_scale: jax.Array) -> jax.Array:
    """Returns what one step of an integer score is worth, in units of log 2.

    It is shortened (`mosaic.magic`) and at most 1/8, so that what `mosaic.magic.beside` does stays
    small. Beyond that bound scores are of the order of 1e5, and softmax picks one key anyway.

    Args:
        query_scale: scale of Q times the factor on the scores, in units of log 2.
        key_scale: scale of K.
    """
    return shorten(jnp.minimum(query_scale * key_scale, _LARGEST_SCALE))
