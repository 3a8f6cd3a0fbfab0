"""Captions or text features in, clips or latents out: one program from text to result."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int32, UInt8

from jaxgen.layers import AttentionName, with_stacks
from jaxgen.models.text_encoder import TextEncoder
from jaxgen.models.wan import Attend, Wan
from jaxgen.pipelines import video_folder
from jaxgen.pipelines.arguments import as_guidance, seeds_and_indices
from jaxgen.pipelines.noise import draw_normal
from jaxgen.pipelines.text_to_image import encode_captions, to_pixels
from jaxgen.pipelines.video_arguments import (
    as_captions_alone,
    as_conditionings,
    as_noise,
    check_fit,
    clip_sizes,
    refuse_prompts,
    trained_sizes,
)
from jaxgen.sampling import (
    Conditioning,
    FlowMatchingSchedule,
    classifier_free_guidance,
    euler_sample,
)
from jaxgen.text import WordTokenizer


class TextToVideo:
    """A text-to-video model that is ready to use.

    With a text encoder of ours it turns captions into clips of pixels. Without one it is the
    transformer of a released Wan model: the caller gives features of its text encoder, umT5, and
    gets latents. Decoding these with Wan's VAE is not part of jaxgen yet.

    Calling it compiles one program for each shape of clips and text and number of steps; text,
    seeds, noise and guidance are inputs of that program and change freely.

    Args:
        transformer: Predicts velocities.
        text_encoder: Encodes token ids for the transformer, if it has an encoder of ours.
        tokenizer: Turns captions into token ids; given with `text_encoder`.
        card: What the model was trained on and how, as JSON can hold it. `config.frames` and
            `config.size` in it are the default size of clips.
        schedule: Noise levels of the sampler.

    Raises:
        ValueError: The parts do not fit together.
    """

    def __init__(
        self,
        transformer: Wan,
        text_encoder: TextEncoder | None = None,
        tokenizer: WordTokenizer | None = None,
        card: Mapping[str, Any] | None = None,
        schedule: FlowMatchingSchedule | None = None,
    ):
        check_fit(transformer, text_encoder, tokenizer)
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.schedule = FlowMatchingSchedule() if schedule is None else schedule
        self._card = dict(card or {})

    @property
    def card(self) -> dict[str, Any]:
        """A copy of the model card, empty for a released model."""
        return dict(self._card)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        attention: AttentionName | Callable[[int], Attend] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        remat: bool = False,
        scan: bool = False,
    ) -> "TextToVideo":
        """Load a model with a text encoder of ours, or the transformer of a released model.

        Args:
            folder: What `save_pretrained` or a training run wrote (`card.json`, `tokenizer.json`,
                `transformer` and `text_encoder`); or what diffusers' `WanPipeline` wrote
                (`model_index.json`), of which only `transformer` and the scheduler's shift are
                read; or such a `transformer` alone, with its `config.json` directly inside.
            attention: Self-attention of the transformer: None is what the model was trained with,
                sparse-linear where the weights hold its parameters and exact otherwise; "exact"
                or "int8" is full attention in any case; or a function that makes it from the
                number of a block, as `attend` of `Wan`.
            dtype: Floating dtype of the computation.
            param_dtype: Floating dtype of the weights in memory; `dtype` if None.
            remat: Recompute each block of the transformer in a backward pass.
            scan: Compile one block and loop over the weights of all, for deep transformers.

        Raises:
            FileNotFoundError: No such folder, or files are missing from it; all are named.
            ValueError: A damaged file, weights that do not fit their configuration, or another
                kind of pipeline.
        """
        parts = video_folder.load(
            folder,
            attention,
            dtype=dtype,
            param_dtype=dtype if param_dtype is None else param_dtype,
            remat=remat,
            scan=scan,
        )
        return cls(**vars(parts))

    def save_pretrained(self, folder: str | os.PathLike, dtype: DTypeLike = jnp.bfloat16) -> None:
        """Write the folder that `from_pretrained` loads, as safetensors and JSON.

        Without a text encoder it is one of diffusers' `WanPipeline`, to whose `from_pretrained`
        text encoder, tokenizer and VAE must then be passed. With one, it does not hold the
        schedule.

        Args:
            folder: Made if it does not exist; files in it are replaced one by one.
            dtype: Floating dtype of the weights on disk. Parameters of self-attention that was
                plugged in stay as they are.

        Raises:
            FileExistsError: The folder holds a model of the other kind.
            ValueError: `dtype` is no floating dtype.
        """
        parts = (self.transformer, self.text_encoder, self.tokenizer, self._card, self.schedule)
        video_folder.save(folder, video_folder.Parts(*parts), dtype)

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        context: ArrayLike | None = None,
        negative_context: ArrayLike | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 28,
        guidance_scale: float = 4.0,
        seed: int | Sequence[int] = 0,
        noise: ArrayLike | None = None,
    ) -> (
        UInt8[np.ndarray, "batch frames height width 3"]
        | Float[np.ndarray, "batch frames height width channels"]
    ):
        """Draw one clip for each caption, or latents for each row of text features.

        Frames, height and width are those of the result. For a released model they count latents:
        the VAE of Wan2.1 makes frames = 4 * (latent frames - 1) + 1, and 8 * 8 pixels of a latent
        pixel. Its 81 frames of 480 x 832 pixels are frames=21, height=60, width=104.

        Args:
            prompts: Captions, for a model with a text encoder; a string counts as a list of one.
            context: Float (batch, tokens, text_dim), features of the text encoder that a released
                model was trained with: the last hidden state of umT5, as 512 tokens with zeros
                behind the text.
            negative_context: Features of what guidance leads away from, often those of the empty
                text, of the same shape as `context`, or with batch 1. Needed unless
                `guidance_scale` is 1. With prompts it is the empty caption always.
            frames: Of a clip; what the model was trained on if its card tells.
            height: Likewise.
            width: Likewise.
            steps: Euler steps, each one forward pass over 2 * batch clips.
            guidance_scale: 1 follows the text as trained, larger values more literally.
            seed: From 0 to 2**32 - 1. With one seed, the noise of clip i depends on the seed and i
                only; with one for each clip, on its own seed only, as that of clip 0.
            noise: Float (batch, frames, height, width, channels), where sampling starts; drawn
                from `seed` if None. Clips then have its size.

        Returns:
            Clips, uint8; or latents as the transformer was trained on, float32, channels last.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: Text in the form that the model does not take, arrays that do not fit it or
                each other, sizes that are unknown or that patches do not fill, `steps` below 1, a
                guidance scale that is not finite, or seeds out of range or of the wrong number.
        """
        sigmas, guidance = self.schedule.sigmas(steps), as_guidance(guidance_scale)
        config = self.transformer.config
        features = {"context": context, "negative_context": negative_context}
        if self.tokenizer is None:
            refuse_prompts(prompts, features, config.text_dim)
            text = as_conditionings(context, negative_context, guidance, config.text_dim)
            count = len(text[0].context)
        else:
            text = jnp.asarray(self.tokenizer.encode(as_captions_alone(prompts, features)))
            count = len(text)
        given = {"frames": frames, "height": height, "width": width}
        seeds, indices = seeds_and_indices(seed, count)
        if noise is None:
            shape = (*clip_sizes(given, trained_sizes(self._card)), config.in_channels)
            start = draw_normal(seeds, indices, shape=shape)
        else:
            start = as_noise(noise, given, count, config.in_channels)
        graph, weights = nnx.split((self.transformer, self.text_encoder))
        return np.asarray(_generate(weights, text, start, guidance, sigmas, graph=graph))


@functools.partial(jax.jit, static_argnames="graph")
def _generate(
    weights: Any,
    text: Int32[Array, "batch tokens"] | tuple[Conditioning, Conditioning],
    noise: Float[Array, "batch frames height width channels"],
    guidance_scale: Float[Array, ""],
    sigmas: Float[Array, "steps+1"],
    *,
    graph: Any,
) -> Array:
    """Everything from token ids to bytes, or from features to latents, in one program."""
    transformer, text_encoder = nnx.merge(graph, weights)
    transformer = with_stacks(transformer)
    halves = text if isinstance(text, tuple) else encode_captions(text_encoder, text)

    def model(pictures, timestep, context, pooled):
        del pooled  # the transformer reads tokens only
        clips = pictures.reshape(-1, *noise.shape[1:])
        return transformer(clips, timestep, context).reshape(pictures.shape)

    velocity = classifier_free_guidance(model, *halves, guidance_scale)
    # The sampler is one for pictures: the frames of a clip lie below each other.
    start = noise.reshape(len(noise), -1, *noise.shape[3:])
    pictures = euler_sample(velocity, start, sigmas)
    result = pictures if text_encoder is None else to_pixels(pictures)
    return result.reshape(noise.shape)
