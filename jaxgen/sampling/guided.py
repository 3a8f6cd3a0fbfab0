"""A diffusion transformer together with its text and its classifier-free guidance."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxgen.layers import with_stacks
from jaxgen.models.mmdit import MMDiT, MMDiTConfig
from jaxgen.models.mmdit_region import Cache, Region
from jaxgen.sampling.devices import home_of, meet
from jaxgen.sampling.flow_matching import timestep_of
from jaxgen.sampling.guidance import Conditioning

type Latents = Float[Array, "batch height width channels"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: away from what a model without some blocks predicts for the caption.

    SD3.5-Medium is sampled so. `scale * (conditional - conditional without these blocks)` is added
    in the steps between the bounds, at the price of half a step.

    Attributes:
        scale: How far.
        after: Steps whose number is larger.
        before: And smaller.
        blocks: Numbers of the blocks to leave out.
    """

    scale: Float[Array, ""] | float = 2.8
    after: Float[Array, ""] | float = 0.0
    before: Float[Array, ""] | float = 0.0
    blocks: tuple[int, ...] = field(default=(7, 8, 9), metadata={"static": True})

    @classmethod
    def of(
        cls,
        steps: int,
        *,
        blocks: tuple[int, ...] = (7, 8, 9),
        scale: float = 2.8,
        start: float = 0.01,
        stop: float = 0.2,
    ) -> "SkipLayers":
        """Return it for a number of steps.

        Args:
            steps: Of the run.
            blocks: To leave out.
            scale: How far.
            start: Share of the steps after which it begins.
            stop: Share of the steps before which it ends.
        """
        first, last = jnp.float32(start * steps), jnp.float32(stop * steps)
        return cls(jnp.float32(scale), first, last, tuple(blocks))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guided:
    """A diffusion transformer with its text and guidance; a pytree.

    Attributes:
        weights: Its state.
        text: Conditional half first, then the unconditional one.
        scale: Of classifier-free guidance; 1 still computes both halves.
        skip: Skip-layer guidance, or None.
        graph: Its structure.
    """

    weights: Any
    text: Conditioning
    scale: Float[Array, ""]
    skip: SkipLayers | None
    graph: Any = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        model: MMDiT,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: float | Float[Array, ""],
        skip: SkipLayers | None = None,
    ) -> "Guided":
        """Take a model apart and put both halves of its text together, on its devices.

        Raises:
            ValueError: `skip` names blocks that the model does not have.
        """
        if skip and not set(skip.blocks) <= set(range(model.config.num_layers)):
            raise ValueError(
                f"skip-layer guidance must leave out blocks below {model.config.num_layers}, "
                f"got {skip.blocks}"
            )
        graph, weights = nnx.split(model)
        text = jax.tree.map(lambda *halves: jnp.concatenate(halves), conditional, unconditional)
        text, scale = meet((text, jnp.asarray(scale, jnp.float32)), home_of(weights))
        return cls(weights, text, scale, skip, graph)

    def ready(self) -> "Guided":
        """Return the same for a loop over steps: of a model that scans, the blocks are stacked."""
        return _stacked(self) if self.config.scan else self

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return len(self.text.pooled) // 2

    @property
    def config(self) -> MMDiTConfig:
        """The model's configuration."""
        return nnx.merge(self.graph, self.weights).config

    @property
    def patch_size(self) -> int:
        """Side of a patch in latent pixels."""
        return self.config.patch_size

    def velocity(
        self, latents: Latents, sigma: Float[Array, ""], step: Int32[Array, ""] | None = None
    ) -> Latents:
        """Return the guided velocity, float32; skip-layer guidance needs the step's number."""
        halves = self._call(MMDiT.__call__, latents, sigma)
        return self._guided(halves) + self._skipped(halves, latents, sigma, step)

    def velocity_and_cache(
        self, latents: Latents, sigma: Float[Array, ""], step: Int32[Array, ""] | None = None
    ) -> tuple[Latents, Cache]:
        """Return the guided velocity, and keys and values of both halves."""
        halves, cache = self._call(MMDiT.with_cache, latents, sigma)
        return self._guided(halves) + self._skipped(halves, latents, sigma, step), cache

    def region(
        self, rows: Int32[Array, "batch active"], cache: Cache, *, keep_text: bool = False
    ) -> Region:
        """Return what masked passes need for some patches; both halves have the same ones."""
        model = nnx.merge(self.graph, self.weights)
        return model.region(jnp.concatenate([rows, rows]), cache, keep_text=keep_text)

    def masked(
        self, latents: Latents, sigma: Float[Array, ""], region: Region
    ) -> tuple[Float[Array, "batch active values"], Region]:
        """Return the guided velocity of a region's patches."""
        halves, region = self._call(MMDiT.masked, latents, sigma, region)
        return self._guided(halves), region

    def _call(self, method: Callable[..., Any], latents: Latents, sigma: Array, *rest: Any) -> Any:
        model = nnx.merge(self.graph, self.weights)
        timestep = jnp.broadcast_to(timestep_of(sigma), (2 * len(latents),))
        doubled = jnp.concatenate([latents, latents])
        return method(model, doubled, timestep, self.text.context, self.text.pooled, *rest)

    def _skipped(
        self, halves: Array, latents: Latents, sigma: Array, step: Array | None
    ) -> Array | float:
        """Return what skip-layer guidance adds."""
        skip = self.skip
        if skip is None or step is None:
            return 0.0
        text = jax.tree.map(lambda both: jnp.split(both, 2)[0], self.text)

        def direction():
            model = nnx.merge(self.graph, self.weights)
            timestep = jnp.broadcast_to(timestep_of(sigma), (len(latents),))
            without = model(latents, timestep, text.context, text.pooled, skip.blocks)
            conditional = jnp.split(halves.astype(jnp.float32), 2)[0]
            distance = conditional - without.astype(jnp.float32)
            return jnp.asarray(skip.scale, jnp.float32) * distance

        number = step.astype(jnp.float32)
        active = (number > skip.after) & (number < skip.before)
        return jax.lax.cond(active, direction, lambda: jnp.zeros_like(latents))

    def _guided(self, halves: Array) -> Array:
        conditional, unconditional = jnp.split(halves.astype(jnp.float32), 2)
        return unconditional + self.scale * (conditional - unconditional)


@jax.jit
def _stacked(model: Guided) -> Guided:
    """Stack blocks; a program, since outside of one that takes half a second for deep models."""
    graph, weights = nnx.split(with_stacks(nnx.merge(model.graph, model.weights)))
    return replace(model, graph=graph, weights=weights)
