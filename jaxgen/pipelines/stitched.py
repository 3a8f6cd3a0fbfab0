"""Captions in, pictures out, with a large and a small model that share the steps."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, UInt8

from jaxgen.models import MMDiTConfig
from jaxgen.models.mmdit_operations import mmdit_operations
from jaxgen.pipelines.arguments import (
    as_captions,
    as_patch_scores,
    as_two_guidances,
    seeds_and_indices,
)
from jaxgen.pipelines.noise import draw_normal
from jaxgen.pipelines.text_to_image import TextToImage, encode_captions, to_pixels
from jaxgen.sampling import (
    Guided,
    HybridStitch,
    Policy,
    Stage,
    active_count,
    relative_cost,
    stitch,
)


class Preview(NamedTuple):
    """A picture on its way.

    Attributes:
        step: Steps done.
        stage: Who predicted the last one.
        pictures: As the last prediction expects them to become, without noise, uint8 (batch,
            height, width, 3); after the last step the result.
        mask: Patches that the large model goes on with, bool (batch, rows, columns), in the hybrid
            stage.
    """

    step: int
    stage: Stage
    pictures: UInt8[np.ndarray, "batch height width 3"]
    mask: Bool[np.ndarray, "batch rows columns"] | None


class StitchedTextToImage:
    """Two text-to-image models that draw one picture together.

    Args:
        large: The better model.
        small: The faster one, for pictures of the same size.

    Raises:
        ValueError: The models are not for the same pictures and noise levels.
    """

    def __init__(self, large: TextToImage, small: TextToImage):
        for name in ("sample_size", "in_channels"):
            one, other = (getattr(model.transformer.config, name) for model in (large, small))
            if one != other:
                raise ValueError(f"large and small must have one {name}, got {one} and {other}")
        if large.schedule != small.schedule:
            raise ValueError(
                f"large and small must have one schedule, got {large.schedule} and {small.schedule}"
            )
        self.large, self.small = large, small

    def cost(self, policy: Policy, steps: int = 50) -> float:
        """Return the operations of a run as a share of the large model's alone."""
        configs = [model.transformer.config for model in (self.large, self.small)]
        rows = (config.sample_size // config.patch_size for config in configs)
        large, small = (side**2 for side in rows)
        return stitched_cost(
            policy,
            steps,
            large=configs[0],
            small=configs[1],
            patches=(large, small),
            text_tokens=self.large.text_encoder.config.max_tokens,
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        policy: Policy | None = None,
        steps: int = 50,
        guidance_scale: float | tuple[float, float] = 4.0,
        seed: int | Sequence[int] = 0,
        scores: ArrayLike | None = None,
    ) -> UInt8[np.ndarray, "batch height width 3"]:
        """Draw one picture for each caption.

        Args:
            prompts: Captions; a single string counts as a list of one.
            policy: Who predicts which step, `HybridStitch()` if None. See
                `jaxgen.sampling.stitching`.
            steps: Euler steps.
            guidance_scale: Of both models, or of the large and of the small one.
            seed: As for `TextToImage`: equal seeds give equal noise in both.
            scores: Of patches (batch, rows, columns), for `HybridStitch(score="user")`.

        Returns:
            Pictures of the size that the models were trained on.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of range, or a policy that does not fit the steps.
        """
        options = {"policy": policy, "steps": steps, "guidance_scale": guidance_scale}
        *_, last = self.stream(prompts, **options, seed=seed, scores=scores)
        return last.pictures

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        policy: Policy | None = None,
        steps: int = 50,
        guidance_scale: float | tuple[float, float] = 4.0,
        seed: int | Sequence[int] = 0,
        scores: ArrayLike | None = None,
        every: int = 0,
        release: Callable[[str], None] | None = None,
    ) -> Iterator[Preview]:
        """Draw pictures and yield them on the way.

        Args:
            prompts: As for a call.
            policy: Likewise.
            steps: Likewise.
            guidance_scale: Likewise.
            seed: Likewise.
            scores: Likewise.
            every: Yield after so many steps of a stage; 0: at the end of stages.
            release: Called with "large" or "small" once that model is needed no more.
        """
        captions = as_captions(prompts)
        seeds, indices = seeds_and_indices(seed, len(captions))
        sigmas = self.large.schedule.sigmas(steps)
        scales = as_two_guidances(guidance_scale)
        models = [
            _guided(model, captions, scale)
            for model, scale in zip((self.large, self.small), scales, strict=True)
        ]
        config = self.large.transformer.config
        side = config.sample_size // config.patch_size
        noise = draw_normal(
            seeds, indices, shape=(config.sample_size, config.sample_size, config.in_channels)
        )
        policy = HybridStitch() if policy is None else policy
        given = as_patch_scores(scores, (len(captions), side, side))
        # The sampler must hold the only reference to what it is to release.
        sampler = stitch(
            models.pop(0),
            models.pop(0),
            policy,
            noise,
            sigmas,
            every=every,
            scores=given,
            release=release,
        )
        for progress in sampler:
            mask = progress.mask
            yield Preview(
                progress.step,
                progress.stage,
                np.asarray(_to_pixels(progress.estimate)),
                None if mask is None else np.asarray(mask).reshape(-1, side, side),
            )


def stitched_cost(
    policy: Policy,
    steps: int,
    *,
    large: MMDiTConfig,
    small: MMDiTConfig,
    patches: tuple[int, int],
    text_tokens: int,
) -> float:
    """Return the operations of all steps as a share of the large model's alone.

    Args:
        policy: Who predicts which step; of an adaptive `SRDiffusion` the latest switch counts.
        steps: Number of steps.
        large: The large model.
        small: The small one.
        patches: Of a picture, in the large and in the small model.
        text_tokens: Of a caption.
    """
    whole = mmdit_operations(large, patches[0], text_tokens)
    masked = 0.0
    if isinstance(policy, HybridStitch):
        active = active_count(patches[0], policy.share, policy.multiple)
        part = mmdit_operations(large, patches[0], text_tokens, active, keep_text=policy.keep_text)
        masked = part / whole
    other = mmdit_operations(small, patches[1], text_tokens) / whole
    return relative_cost(policy, steps, other, masked)


def _guided(model: TextToImage, captions: list[str], scale: Float[Array, ""]) -> Guided:
    tokens = jnp.asarray(model.tokenizer.encode(captions))
    conditional, unconditional = _encode(model.text_encoder, tokens)
    return Guided.of(model.transformer, conditional, unconditional, scale)


_to_pixels = jax.jit(to_pixels)
_encode = jax.jit(encode_captions)
