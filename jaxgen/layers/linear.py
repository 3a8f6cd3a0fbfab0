"""Linear layers whose biases have gradients summed in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Linear):
    """`nnx.Linear`, except that a bias's gradient, a sum over all tokens, is float32 on its way.

    XLA sums 16 bits in 16 bits: over 65,536 tokens a CPU gets a mean wrong by half of it. Results
    are those of `nnx.Linear`, whose arguments it takes.
    """

    def __call__(
        self, inputs: Float[Array, "*batch in_features"], out_sharding: Any = None
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layer to the last axis."""
        inputs, kernel = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        out = self.dot_general(
            inputs,
            kernel,
            (((inputs.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
            out_sharding=out_sharding,
        )
        return out if self.bias is None else add_bias(out, self.bias[...])


@jax.custom_vjp
def add_bias(
    x: Float[Array, "*batch features"], bias: Float[Array, " features"]
) -> Float[Array, "*batch features"]:
    """Returns x + bias in the dtype of `x`; the bias's gradient is summed in float32."""
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), jnp.zeros((0,), bias.dtype)


def _backward(like: Array, gradient: Array) -> tuple[Array, Array]:
    summed = jnp.sum(gradient.astype(jnp.float32), axis=range(gradient.ndim - 1))
    return gradient, summed.astype(like.dtype)


add_bias.defvjp(_forward, _backward)
