"""Adaptive layer normalization: a conditioning vector shifts, scales and gates each branch.

AdaLN-zero (Peebles & Xie 2023, arXiv:2212.09748, section 3.2) computes LN(x)*(1 + scale) + shift
before a branch and multiplies what the branch returns by a gate. Its projection starts at zero,
so that every residual block starts as the identity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxgen.layers.linear import Linear
from jaxgen.layers.norms import layer_norm


class Modulation(NamedTuple):
    """Shift and scale before a branch and the gate after it, None where there is no gate."""

    shift: Float[Array, "batch 1 dim"]
    scale: Float[Array, "batch 1 dim"]
    gate: Float[Array, "batch 1 dim"] | None = None


def modulate(
    x: Float[Array, "batch tokens dim"], modulation: Modulation
) -> Float[Array, "batch tokens dim"]:
    """Returns LN(x)*(1 + scale) + shift, computed in float32, in the dtype of `x`."""
    scale = modulation.scale.astype(jnp.float32)
    shift = modulation.shift.astype(jnp.float32)
    return (layer_norm(x) * (1.0 + scale) + shift).astype(x.dtype)


def add_gated(
    x: Float[Array, "batch tokens dim"],
    branch: Float[Array, "batch tokens dim"],
    modulation: Modulation,
) -> Float[Array, "batch tokens dim"]:
    """Returns x + gate*branch, computed in float32, in the dtype of `x`.

    Raises:
        ValueError: the modulation has no gate.
    """
    if modulation.gate is None:
        raise ValueError("add_gated needs a modulation with a gate, got gate=None")
    gate = modulation.gate.astype(jnp.float32)
    return (x.astype(jnp.float32) + gate * branch.astype(jnp.float32)).astype(x.dtype)


class AdaLNZero(nnx.Module):
    """Projects the conditioning to (shift, scale, gate) of each branch, in this order.

    Two branches (attention, MLP) give the 6*dim form of SD3, three (attention, MLP, second
    attention) the 9*dim form of SD3.5's dual attention blocks.

    Args:
        dim: width of the conditioning and of the tokens.
        branches: how many triples to compute.
        dtype: dtype of the projection.
        param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        branches: int = 2,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.branches = branches
        self.projection = _zero_linear(dim, 3 * branches * dim, dtype, param_dtype, rngs)

    def __call__(self, conditioning: Float[Array, "batch dim"]) -> tuple[Modulation, ...]:
        """Returns one `Modulation` for each branch."""
        values = self.projection(jax.nn.silu(conditioning))[:, None, :]
        parts = jnp.split(values, 3 * self.branches, axis=-1)
        return tuple(Modulation(*parts[i : i + 3]) for i in range(0, len(parts), 3))


class AdaLNScaleShift(nnx.Module):
    """Projects the conditioning to (scale, shift), in this order: the 2*dim form without a gate.

    SD3 uses it in front of the final projection and for the text stream of the last block. The
    order is that of the diffusers weights; the original SD3 files hold (shift, scale).

    Args:
        dim: width of the conditioning and of the tokens.
        dtype: dtype of the projection.
        param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.projection = _zero_linear(dim, 2 * dim, dtype, param_dtype, rngs)

    def __call__(self, conditioning: Float[Array, "batch dim"]) -> tuple[Modulation]:
        """Returns the one `Modulation`, its gate None, in a tuple as `AdaLNZero` does."""
        values = self.projection(jax.nn.silu(conditioning))[:, None, :]
        scale, shift = jnp.split(values, 2, axis=-1)
        return (Modulation(shift, scale),)


def _zero_linear(
    in_dim: int, out_dim: int, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> Linear:
    """A linear layer that starts at zero."""
    zeros = nnx.initializers.zeros_init()
    return Linear(
        in_dim, out_dim, kernel_init=zeros, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
