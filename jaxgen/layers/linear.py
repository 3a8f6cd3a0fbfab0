"""Linear layers whose biases have gradients summed in float32."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Linear):
    """`nnx.Linear`, except that a bias's gradient, a sum over all tokens, is float32 on its way.

    XLA sums 16 bits in 16 bits. Results are those of `nnx.Linear`, whose arguments it takes.
    """

    def __call__(
        self, inputs: Float[Array, "*batch in_features"], out_sharding: Any = None
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layer to the last axis."""
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, _ = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        options: dict[str, Any] = {"precision": self.precision, "out_sharding": out_sharding}
        if self.preferred_element_type is not None:
            options["preferred_element_type"] = self.preferred_element_type
        out = self.dot_general(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ())), **options)
        return out if bias is None else add_bias(out, bias)


def add_bias(
    x: Float[Array, "*batch features"], bias: Float[Array, " features"]
) -> Float[Array, "*batch features"]:
    """Returns x + bias in the dtype of `x`; the bias's gradient is summed in float32."""
    wide = bias.astype(jnp.float32) if bias.dtype.itemsize < 4 else bias
    # Rounded after it is spread, so that gradients are widened before they are summed.
    spread = jnp.broadcast_to(wide.reshape((1,) * (x.ndim - 1) + (-1,)), x.shape)
    return x + spread.astype(x.dtype)
