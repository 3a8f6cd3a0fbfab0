"""Stable Diffusion 3 and 3.5, from the folder of a released model to pictures.

A second, smaller transformer can share the steps with the first: `small` and `policy` (HybridStitch
and its baselines, see `jaxgen.sampling.stitching`).
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, UInt8

from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.layers import AttentionName
from jaxgen.models import Autoencoder, MMDiT, SD3Text
from jaxgen.pipelines import sd3_folder
from jaxgen.pipelines.arguments import (
    as_captions,
    as_patch_scores,
    as_two_guidances,
    seeds_and_indices,
)
from jaxgen.pipelines.noise import draw_normal
from jaxgen.pipelines.sd3_folder import Tokenizers
from jaxgen.pipelines.stitched import Preview
from jaxgen.pipelines.text_to_image import to_pixels
from jaxgen.sampling import (
    Alone,
    Conditioning,
    FlowMatchingSchedule,
    Guided,
    HybridStitch,
    Policy,
    SkipLayers,
    stitch,
)
from jaxgen.sampling.devices import home_of, meet


class StableDiffusion3:
    """A model of Stable Diffusion 3 that is ready to use, alone or with a smaller one.

    Text, seeds, guidance and the boundaries of stages are inputs of compiled programs and change
    freely; another size, number of pictures or number of steps compiles again.

    Args:
        transformer: Predicts velocities of latents.
        autoencoder: Turns latents into pictures.
        text: The text encoders; None once they were released.
        tokenizers: Turn prompts into their ids.
        schedule: Noise levels of the sampler.
        small: A smaller transformer for the same latents and text.

    Raises:
        ValueError: Parts that do not fit together.
    """

    def __init__(
        self,
        transformer: MMDiT,
        autoencoder: Autoencoder,
        text: SD3Text,
        tokenizers: Tokenizers,
        schedule: FlowMatchingSchedule | None = None,
        small: MMDiT | None = None,
    ):
        self.transformer: MMDiT | None = transformer
        self.small = small
        self.autoencoder = autoencoder
        self.text: SD3Text | None = text
        self.tokenizers = tokenizers
        self.schedule = FlowMatchingSchedule() if schedule is None else schedule
        self._check_fit()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        small: str | os.PathLike | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        attention: AttentionName = "exact",
        scan: bool = False,
        with_t5: bool = True,
        t5_tokens: int = 256,
        sharding: Placement = None,
        small_sharding: Placement = None,
        progress: Progress = None,
    ) -> "StableDiffusion3":
        """Load a folder as diffusers' `StableDiffusion3Pipeline` writes it.

        Args:
            folder: Holds `model_index.json`, `transformer`, `vae`, `text_encoder`,
                `text_encoder_2`, `text_encoder_3`, their tokenizers and `scheduler`.
            small: Folder of another such pipeline, of which only the transformer is read.
            dtype: Floating dtype of weights and computation.
            attention: Arithmetic of the transformers' attention, "exact" or "int8".
            scan: Compile one block of each kind of the transformers and loop over the weights of
                all: the first picture comes sooner, and the weights are in memory twice.
            with_t5: False leaves T5 out, more than half of the weights of SD3-Medium's folder; the
                models were trained to do without it now and then.
            t5_tokens: Tokens of T5 in the context, up to 512.
            sharding: Where the transformer's weights go, as for
                `jaxgen.checkpoints.load_mmdit_folder`; the default device if None.
            small_sharding: Where those of the small one go, `sharding` if None. On a device of its
                own (`jax.sharding.SingleDeviceSharding(jax.devices()[1])`) it predicts while the
                large one does.
            progress: Called with the bytes loaded and those of all, for each transformer; True for
                a bar on stderr.

        Raises:
            FileNotFoundError: No such folder, or files are missing from it.
            ValueError: Another kind of pipeline, a damaged file, or weights that do not fit.
            ImportError: The package `tokenizers` is not installed.
        """
        parts = sd3_folder.load(
            folder,
            small=small,
            dtype=dtype,
            attention=attention,
            scan=scan,
            with_t5=with_t5,
            t5_tokens=t5_tokens,
            sharding=sharding,
            small_sharding=small_sharding,
            progress=progress,
        )
        return cls(**parts)

    def save_pretrained(
        self, folder: str | os.PathLike, *, max_shard_bytes: int | None = None
    ) -> None:
        """Write a folder as diffusers does, without the small transformer.

        Args:
            folder: Made if it does not exist; files in it are replaced one by one.
            max_shard_bytes: Most bytes of weights in one file; None: one file a model.

        Raises:
            ValueError: A part was released.
        """
        if self.transformer is None or self.text is None:
            raise ValueError("parts of this pipeline were released; load it again to save it")
        names = ("transformer", "autoencoder", "text", "tokenizers", "schedule")
        parts = {name: getattr(self, name) for name in names}
        sd3_folder.save(folder, parts, max_shard_bytes=max_shard_bytes)

    def encode(
        self, prompts: Sequence[str], negative_prompts: Sequence[str]
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts and what guidance leads away from; of as many rows each.

        Raises:
            ValueError: The text encoders were released.
        """
        if self.text is None:
            raise ValueError("the text encoders were released; load the pipeline again")
        tokens = self.tokenizers.encode([*prompts, *negative_prompts], self.text.t5 is not None)
        context, pooled = _encode(self.text, *(jnp.asarray(ids) for ids in tokens))
        halves = zip(jnp.split(context, 2), jnp.split(pooled, 2), strict=True)
        conditional, unconditional = (Conditioning(*half) for half in halves)
        return conditional, unconditional

    def __call__(
        self, prompts: str | Sequence[str], **options: Any
    ) -> UInt8[np.ndarray, "batch height width 3"]:
        """Draw one picture for each prompt; options as for `stream`."""
        *_, last = self.stream(prompts, **options)
        return last.pictures

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompts: str | Sequence[str] = "",
        height: int = 1024,
        width: int = 1024,
        steps: int = 28,
        guidance_scale: float | tuple[float, float] = 4.5,
        seed: int | Sequence[int] = 0,
        policy: Policy | None = None,
        skip_layers: SkipLayers | None = None,
        scores: ArrayLike | None = None,
        latents: ArrayLike | None = None,
        every: int = 0,
        tiled: bool = False,
        release: bool = False,
    ) -> Iterator[Preview]:
        """Draw pictures and yield them on the way, the finished ones last.

        Args:
            prompts: A single string counts as a list of one.
            negative_prompts: What guidance leads away from; one for all, or one for each.
            height: Of the pictures, in pixels; a multiple of 16 for the released models.
            width: Likewise.
            steps: Euler steps.
            guidance_scale: Of both transformers, or of the first and of the small one.
            seed: From 0 to 2**32 - 1. With one seed, the noise of picture i depends on it and i
                only; with one for each prompt, on its own only.
            policy: Who predicts which step; `HybridStitch()` with a small transformer,
                `Alone()` without.
            skip_layers: Skip-layer guidance of the first transformer, as SD3.5-Medium has it.
            scores: Of patches (batch, rows, columns), for `HybridStitch(score="user")`.
            latents: Where sampling starts, (batch, height / 8, width / 8, channels); drawn from
                `seed` if None.
            every: Yield after so many steps of a stage; 0: at the end of stages.
            tiled: Decode in tiles, with less memory; for large pictures.
            release: Drop text encoders and transformers when they are needed no more. The pipeline
                then draws nothing else.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of range or of the wrong shape, or a part was released.
        """
        prompts = as_captions(prompts)
        count = len(prompts)
        negative = as_captions(negative_prompts)
        if len(negative) not in (1, count):
            raise ValueError(
                f"there must be one negative prompt, or one for each prompt, got {len(negative)} "
                f"and {count} prompts"
            )
        if self.transformer is None:
            raise ValueError("the transformer was released; load the pipeline again")
        if policy is None:
            policy = Alone() if self.small is None else HybridStitch()
        sigmas, shape = self.schedule.sigmas(steps), self._shape(height, width)
        seeds, indices = seeds_and_indices(seed, count)
        if latents is None:
            start = draw_normal(seeds, indices, shape=shape)
        else:
            start = jnp.asarray(latents, jnp.float32)
            if start.shape != (count, *shape):
                raise ValueError(f"latents must have shape {(count, *shape)}, got {start.shape}")
        scales = as_two_guidances(guidance_scale)
        patch = self.transformer.config.patch_size
        grid = shape[0] // patch, shape[1] // patch
        given = as_patch_scores(scores, (count, *grid))
        halves = self.encode(prompts, negative * (count // len(negative)))
        models = [
            model and Guided.of(model, *halves, scale, skip)
            for model, scale, skip in (
                (self.transformer, scales[0], skip_layers),
                (self.small, scales[1], None),
            )
        ]
        if release:
            self.text = None

        def let_go(name: str) -> None:
            setattr(self, {"large": "transformer", "small": "small"}[name], None)

        # The sampler must hold the only reference to what it is to release.
        sampler = stitch(
            models.pop(0),
            models.pop(0),
            policy,
            start,
            sigmas,
            every=every,
            scores=given,
            release=let_go if release else None,
        )
        for progress in sampler:
            mask = progress.mask
            yield Preview(
                progress.step,
                progress.stage,
                np.asarray(self.decode(progress.estimate, tiled=tiled)),
                None if mask is None else np.asarray(mask).reshape(count, *grid),
            )

    def decode(
        self, latents: Float[Array, "batch height width channels"], *, tiled: bool = False
    ) -> UInt8[Array, "batch height width 3"]:
        """Turn latents into pictures, uint8; `tiled` needs less memory."""
        latents = meet(latents, home_of(nnx.state(self.autoencoder)))
        return (_decode_tiled if tiled else _decode)(self.autoencoder, latents)

    def _shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of the latents of one picture."""
        assert self.transformer is not None
        config = self.transformer.config
        factor = self.autoencoder.config.downscale
        unit = factor * config.patch_size
        most = unit * config.pos_embed_max_size
        for name, side in (("height", height), ("width", width)):
            if isinstance(side, bool) or not isinstance(side, int | np.integer):
                raise TypeError(f"{name} must be an int, got {side!r}")
            if side % unit or not 0 < side <= most:
                raise ValueError(
                    f"{name} must be a multiple of {unit} and at most {most}, got {side}"
                )
        return int(height) // factor, int(width) // factor, config.in_channels

    def _check_fit(self) -> None:
        assert self.transformer is not None
        assert self.text is not None
        sizes = {
            "joint_attention_dim and the text's hidden_dim": self.text.hidden_dim,
            "pooled_projection_dim and the text's": self.text.clip_l.config.projection_dim
            + self.text.clip_g.config.projection_dim,
            "in_channels and latent_channels": self.autoencoder.config.latent_channels,
        }
        for role, model in (("transformer", self.transformer), ("small", self.small)):
            if model is None:
                continue
            config = model.config
            ours = config.joint_attention_dim, config.pooled_projection_dim, config.in_channels
            wrong = [
                f"{names}: {one} and {other}"
                for (names, other), one in zip(sizes.items(), ours, strict=True)
                if one != other
            ]
            if wrong:
                raise ValueError(f"{role} does not fit, these must be equal: {'; '.join(wrong)}")


@jax.jit
def _encode(text: SD3Text, *tokens: Array) -> tuple[Array, ...]:
    return tuple(text(*tokens))


@jax.jit
def _decode(autoencoder: Autoencoder, latents: Array) -> Array:
    return to_pixels(autoencoder.decode(latents))


@jax.jit
def _decode_tiled(autoencoder: Autoencoder, latents: Array) -> Array:
    return to_pixels(autoencoder.decode_tiled(latents))
