"""A diffusion transformer together with its text and its classifier-free guidance."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxgen.models.mmdit import Cache, MMDiT
from jaxgen.sampling.flow_matching import timestep_of
from jaxgen.sampling.guidance import Conditioning

type Latents = Float[Array, "batch height width channels"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guided:
    """A diffusion transformer with its text and guidance; a pytree.

    Attributes:
        weights: Its state.
        text: Conditional half first, then the unconditional one.
        scale: Of classifier-free guidance; 1 still computes both halves.
        graph: Its structure.
    """

    weights: Any
    text: Conditioning
    scale: Float[Array, ""]
    graph: Any = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        model: MMDiT,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: float | Float[Array, ""],
    ) -> "Guided":
        """Take a model apart and put both halves of its text together."""
        graph, weights = nnx.split(model)
        text = jax.tree.map(lambda *halves: jnp.concatenate(halves), conditional, unconditional)
        return cls(weights, text, jnp.asarray(scale, jnp.float32), graph)

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return len(self.text.pooled) // 2

    @property
    def patch_size(self) -> int:
        """Side of a patch in latent pixels."""
        return nnx.merge(self.graph, self.weights).config.patch_size

    def velocity(self, latents: Latents, sigma: Float[Array, ""]) -> Latents:
        """Return the guided velocity, float32."""
        return self._guided(self._call(MMDiT.__call__, latents, sigma))

    def velocity_and_cache(
        self, latents: Latents, sigma: Float[Array, ""]
    ) -> tuple[Latents, Cache]:
        """Return the guided velocity, and keys and values of both halves."""
        halves, cache = self._call(MMDiT.with_cache, latents, sigma)
        return self._guided(halves), cache

    def masked(
        self,
        latents: Latents,
        sigma: Float[Array, ""],
        rows: Int32[Array, "batch active"],
        cache: Cache,
    ) -> tuple[Float[Array, "batch active values"], Cache]:
        """Return the guided velocity of some patches; both halves have the same ones."""
        both = jnp.concatenate([rows, rows])
        halves, cache = self._call(MMDiT.masked, latents, sigma, both, cache)
        return self._guided(halves), cache

    def _call(self, method: Callable[..., Any], latents: Latents, sigma: Array, *rest: Any) -> Any:
        model = nnx.merge(self.graph, self.weights)
        timestep = jnp.broadcast_to(timestep_of(sigma), (2 * len(latents),))
        doubled = jnp.concatenate([latents, latents])
        return method(model, doubled, timestep, self.text.context, self.text.pooled, *rest)

    def _guided(self, halves: Array) -> Array:
        conditional, unconditional = jnp.split(halves.astype(jnp.float32), 2)
        return unconditional + self.scale * (conditional - unconditional)
