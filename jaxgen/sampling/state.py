"""Where sampling is: latents on their way."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxgen.sampling.guided import Latents


class State(NamedTuple):
    """Where sampling is; a pytree of float32.

    Attributes:
        latents: Before the next step.
        velocity: That led here; zeros at the start.
        estimate: Of the clean latents, from the same prediction; zeros at the start.
    """

    latents: Latents
    velocity: Latents
    estimate: Latents

    @classmethod
    def start(cls, noise: Latents) -> "State":
        """Return the state before the first step."""
        noise = noise.astype(jnp.float32)
        return cls(noise, jnp.zeros_like(noise), jnp.zeros_like(noise))

    def stepped(self, velocity: Latents, sigmas: Array, i: Array) -> "State":
        """Return the state after an Euler step."""
        latents = self.latents + (sigmas[i + 1] - sigmas[i]) * velocity
        return State(latents, velocity, self.latents - sigmas[i] * velocity)
