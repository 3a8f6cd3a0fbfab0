"""Normalizations whose statistics are float32 in every computation dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def layer_norm(
    x: Float[Array, "*batch dim"], *, epsilon: float = 1e-6
) -> Float[Array, "*batch dim"]:
    """Normalizes the last axis to mean 0 and variance 1, without trained parameters.

    The two-pass variance keeps its digits where the mean is large, and the result stays float32,
    so that a modulation that follows is rounded once, not twice.

    Args:
        x: values of any float dtype.
        epsilon: added to the variance.

    Returns:
        The normalized values, always float32.
    """
    x = x.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + epsilon)


class LayerNorm(nnx.Module):
    """Layer normalization with a trained scale and bias.

    Args:
        dim: size of the last axis.
        epsilon: added to the variance.
        param_dtype: dtype of scale and bias.
    """

    def __init__(self, dim: int, *, epsilon: float = 1e-6, param_dtype: DTypeLike = jnp.float32):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Normalizes `x`; the result has the dtype of `x`."""
        values = layer_norm(x, epsilon=self.epsilon)
        return (values * _along(self.scale, x) + _along(self.bias, x)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last axis, then scales each channel.

    SD3.5 applies it per head to queries and keys (Esser et al. 2024, arXiv:2403.03206, 5.3.2).

    Args:
        dim: size of the last axis.
        epsilon: added to the mean square.
        param_dtype: dtype of the scale.
    """

    def __init__(
        self,
        dim: int,
        *,
        epsilon: float = 1e-6,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Normalizes `x`; the result has the dtype of `x`."""
        values = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(values), axis=-1, keepdims=True)
        scaled = values * jax.lax.rsqrt(mean_square + self.epsilon) * _along(self.scale, x)
        return scaled.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalizes groups of channels over a whole picture (Wu & He 2018, arXiv:1803.08494).

    Args:
        dim: number of channels, the last axis.
        groups: number of groups; divides `dim`.
        epsilon: added to the variance.
        param_dtype: dtype of scale and bias.

    Raises:
        ValueError: `groups` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        *,
        epsilon: float = 1e-6,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide dim, got groups={groups} and dim={dim}")
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))

    def __call__(
        self, x: Float[Array, "batch height width dim"]
    ) -> Float[Array, "batch height width dim"]:
        """Normalizes `x`; the result has the dtype of `x`."""
        values = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        centered = values - jnp.mean(values, axis=(1, 2, 4), keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=(1, 2, 4), keepdims=True)
        values = (centered * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (values * _along(self.scale, x) + _along(self.bias, x)).astype(x.dtype)


def _along(parameter: nnx.Param, x: Array) -> Array:
    """A vector as float32 of the rank of `x`, along its last axis."""
    return parameter[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
