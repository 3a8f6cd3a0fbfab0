"""Euler's method for the ordinary differential equation of a rectified flow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

type VelocityFunction = Callable[
    [Float[Array, "batch height width channels"], Float[Array, ""]],
    Float[Array, "batch height width channels"],
]
"""`velocity(latents, sigma)`: the model's estimate of noise - picture at one noise level."""


def euler_sample(
    velocity: VelocityFunction,
    noise: Float[Array, "batch height width channels"],
    sigmas: Float[Array, "steps+1"],
) -> Float[Array, "batch height width channels"]:
    """Follow the velocity from noise to pictures: `x += (sigma_next - sigma) * velocity`.

    One `jax.lax.scan`, so the program's size does not grow with the number of steps. The state
    stays in float32 whatever the model computes in: the steps near sigma = 0 are small and
    bfloat16 would round them away.

    Args:
        velocity: Called once a step with float32 latents and a float32 scalar sigma; returns an
            array of the latents' shape in any floating dtype.
        noise: Start of the path at `sigmas[0]`; standard normal if that is 1.
        sigmas: Falling noise levels, as `FlowMatchingSchedule.sigmas` returns them.

    Returns:
        float32 latents at `sigmas[-1]`.

    Raises:
        ValueError: `sigmas` is not a vector of at least two levels.
    """
    if sigmas.ndim != 1 or sigmas.shape[0] < 2:
        raise ValueError(
            f"sigmas must be a vector of at least 2 noise levels, got shape {sigmas.shape}"
        )
    sigmas = sigmas.astype(jnp.float32)

    def step(latents, levels):
        sigma, sigma_next = levels
        towards_noise = velocity(latents, sigma).astype(jnp.float32)
        return latents + (sigma_next - sigma) * towards_noise, None

    latents, _ = jax.lax.scan(step, noise.astype(jnp.float32), (sigmas[:-1], sigmas[1:]))
    return latents
