"""The feed-forward branch of a transformer block, and the small MLP that embeds conditions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxgen.layers.linear import Linear

_XAVIER = nnx.initializers.xavier_uniform()


class FeedForward(nnx.Module):
    """Linear, GELU (tanh approximation), Linear.

    Args:
        dim: width of input and output.
        hidden_dim: width in between; 4*dim if None.
        dtype: computation dtype.
        param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.up = Linear(dim, hidden_dim, kernel_init=_XAVIER, **dtypes, rngs=rngs)
        self.down = Linear(hidden_dim, dim, kernel_init=_XAVIER, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Applies the branch to each token."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class ConditionEmbedding(nnx.Module):
    """Linear, SiLU, Linear: embeds one conditioning vector. Weights start at N(0, 0.02).

    Args:
        in_dim: size of the vector.
        dim: width of the embedding.
        dtype: computation dtype.
        param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(0.02)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.hidden = Linear(in_dim, dim, kernel_init=init, **dtypes, rngs=rngs)
        self.output = Linear(dim, dim, kernel_init=init, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch in_dim"]) -> Float[Array, "batch dim"]:
        """Embeds each row."""
        return self.output(jax.nn.silu(self.hidden(x)))
