"""Classifier-free guidance (arXiv:2207.12598) for models of two text inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.sampling.euler import VelocityFunction
from jaxgen.sampling.flow_matching import timestep_of

type Model = Callable[[Array, Array, Array, Array], Array]
"""`model(latents, timestep, context, pooled)`, the signature of `jaxgen.models.mmdit.MMDiT`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """What a text encoder tells a diffusion transformer; a pytree.

    Attributes:
        context: One vector a token.
        pooled: One vector a caption.
    """

    context: Float[Array, "batch tokens dim"]
    pooled: Float[Array, "batch dim"]


def classifier_free_guidance(
    model: Model,
    conditional: Conditioning,
    unconditional: Conditioning,
    scale: Float[Array, ""] | float,
) -> VelocityFunction:
    """Make a velocity function that follows the caption `scale` times as far as the model does.

    `unconditional + scale * (conditional - unconditional)`, from one forward pass over both
    halves of a doubled batch (conditional first). The combination is computed in float32.

    Args:
        model: Called with 2 * batch latents, timesteps in 0..1000, contexts and pooled vectors.
        conditional: Encoded captions.
        unconditional: The encoded empty caption, repeated to the same shapes.
        scale: 1 follows the caption as trained, 0 ignores it. May be a traced scalar: a change
            then needs no recompilation.

    Returns:
        `velocity(latents, sigma)` for `euler_sample`.

    Raises:
        ValueError: The two conditionings differ in shape.
    """
    for name in ("context", "pooled"):
        given, other = getattr(conditional, name).shape, getattr(unconditional, name).shape
        if given != other:
            raise ValueError(
                f"conditional and unconditional {name} must have one shape, got {given} and {other}"
            )
    both = jax.tree.map(lambda *halves: jnp.concatenate(halves), conditional, unconditional)

    def velocity(latents, sigma):
        timestep = jnp.broadcast_to(timestep_of(sigma), (2 * latents.shape[0],))
        doubled = jnp.concatenate([latents, latents])
        halves = model(doubled, timestep, both.context, both.pooled).astype(jnp.float32)
        with_caption, without_caption = jnp.split(halves, 2)
        return without_caption + scale * (with_caption - without_caption)

    return velocity
