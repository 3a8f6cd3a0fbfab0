"""Training objective of a rectified flow, as in Stable Diffusion 3 (arXiv:2403.03206)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxgen.sampling.schedules import shift_sigma

TIMESTEPS = 1000
"""Models are told the noise level as a timestep from 0 to 1000."""


def timestep_of(sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the timestep that a model is given for a noise level: 1000 * sigma, not rounded."""
    return TIMESTEPS * sigma


def add_noise(
    pictures: Float[Array, "batch height width channels"],
    noise: Float[Array, "batch height width channels"],
    sigma: Float[Array, "batch"],
) -> Float[Array, "batch height width channels"]:
    """Return the point of the straight path: `sigma * noise + (1 - sigma) * pictures`."""
    sigma = sigma[:, None, None, None]
    return sigma * noise + (1 - sigma) * pictures


@dataclass(frozen=True)
class LogitNormal:
    """Noise levels to train on: the sigmoid of a normal variable (arXiv:2403.03206, eq. 19).

    Attributes:
        mean: Mean of the normal variable; positive trains more on noisy pictures.
        std: Its standard deviation, positive.
        shift: Ratio of `shift_sigma`, applied to each level; 1 changes nothing.

    Raises:
        ValueError: `mean` is not finite, or `std` or `shift` is not a positive finite number.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        if not np.isfinite(self.mean):
            raise ValueError(f"mean must be a finite number, got mean={self.mean}")
        for name in ("std", "shift"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, got {name}={value}")

    def sample(self, key: PRNGKeyArray, count: int) -> Float[Array, "count"]:
        """Draw `count` float32 noise levels in (0, 1)."""
        normal = jax.random.normal(key, (count,), dtype=jnp.float32)
        return shift_sigma(jax.nn.sigmoid(self.mean + self.std * normal), self.shift)

    def quantile(self, share: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the noise levels below which so large a share, in (0, 1), of samples lies."""
        normal = jax.scipy.special.ndtri(share)
        return shift_sigma(jax.nn.sigmoid(self.mean + self.std * normal), self.shift)


def flow_matching_loss(
    velocity: Callable[[Array, Array], Array],
    pictures: Float[Array, "batch height width channels"],
    key: PRNGKeyArray,
    levels: LogitNormal | None = None,
) -> Float[Array, "batch"]:
    """Return the mean squared error of the predicted velocity, one value per picture.

    The target is `noise - pictures` at `add_noise(pictures, noise, sigma)`, with standard normal
    noise and one noise level per picture. Everything outside the model is float32.

    Args:
        velocity: `velocity(noisy pictures, sigma)` with float32 sigma of shape (batch,).
        pictures: Clean pictures or latents, about [-1, 1] or of unit variance.
        key: Random key; the same key draws the same noise.
        levels: Distribution of the noise levels; `LogitNormal()` by default.

    Returns:
        float32 losses.
    """
    levels = LogitNormal() if levels is None else levels
    sigma_key, noise_key = jax.random.split(key)
    pictures = pictures.astype(jnp.float32)
    sigma = levels.sample(sigma_key, pictures.shape[0])
    noise = jax.random.normal(noise_key, pictures.shape, dtype=jnp.float32)
    predicted = velocity(add_noise(pictures, noise, sigma), sigma).astype(jnp.float32)
    return jnp.mean(jnp.square(predicted - (noise - pictures)), axis=(1, 2, 3))
