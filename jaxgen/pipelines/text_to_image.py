"""Captions in, pictures out: text encoder, guidance, Euler sampling and pixels in one program."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from jaxgen.layers import AttentionName
from jaxgen.models.mmdit import MMDiT
from jaxgen.models.text_encoder import TextEncoder
from jaxgen.pipelines import folder as model_folder
from jaxgen.pipelines.arguments import as_captions, as_guidance, seeds_and_indices
from jaxgen.pipelines.noise import draw_normal
from jaxgen.sampling import (
    Conditioning,
    FlowMatchingSchedule,
    classifier_free_guidance,
    euler_sample,
)
from jaxgen.text import WordTokenizer


class TextToImage:
    """A text-to-image model that is ready to use.

    Calling it compiles one program for each batch size and number of steps; captions, seeds and
    guidance are inputs of that program and change freely.

    Args:
        transformer: Predicts velocities.
        text_encoder: Encodes token ids for the transformer.
        tokenizer: Turns captions into token ids.
        card: What the model was trained on and how, as JSON can hold it.
        schedule: Noise levels of the sampler.

    Raises:
        ValueError: Text encoder, transformer and tokenizer do not fit together.
    """

    def __init__(
        self,
        transformer: MMDiT,
        text_encoder: TextEncoder,
        tokenizer: WordTokenizer,
        card: Mapping[str, Any] | None = None,
        schedule: FlowMatchingSchedule | None = None,
    ):
        _check_fit(transformer, text_encoder, tokenizer)
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.schedule = FlowMatchingSchedule() if schedule is None else schedule
        self._card = dict(card or {})

    @property
    def card(self) -> dict[str, Any]:
        """A copy of the model card: data, configuration, steps, command, metrics."""
        return dict(self._card)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        attention: AttentionName = "exact",
        dtype: DTypeLike = jnp.float32,
    ) -> "TextToImage":
        """Load a folder that `save_pretrained` or a training run wrote.

        Args:
            folder: Holds `card.json`, `tokenizer.json`, and `config.json` with
                `model.safetensors` in each of `transformer` and `text_encoder`.
            attention: Arithmetic of the transformer's attention.
            dtype: Floating dtype of weights and computation.

        Raises:
            FileNotFoundError: No such folder, or files are missing from it; all are named.
            ValueError: A damaged file, or weights that do not fit their configuration.
        """
        transformer, text_encoder, tokenizer, card = model_folder.load(folder, attention, dtype)
        return cls(transformer, text_encoder, tokenizer, card)

    def save_pretrained(self, folder: str | os.PathLike, dtype: DTypeLike = jnp.bfloat16) -> None:
        """Write the folder that `from_pretrained` loads, as safetensors and JSON.

        Args:
            folder: Made if it does not exist; files in it are replaced one by one.
            dtype: Floating dtype of the weights on disk.
        """
        parts = (self.transformer, self.text_encoder, self.tokenizer, self._card)
        model_folder.save(folder, *parts, dtype=dtype)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 28,
        guidance_scale: float = 4.0,
        seed: int | Sequence[int] = 0,
    ) -> UInt8[np.ndarray, "batch height width 3"]:
        """Draw one picture for each caption.

        Args:
            prompts: Captions; a single string counts as a list of one.
            steps: Euler steps, each one forward pass over 2 * batch pictures.
            guidance_scale: 1 follows the caption as trained, larger values more literally.
            seed: From 0 to 2**32 - 1. With one seed, the noise of picture i depends on the seed
                and i only, so a longer list of captions starts with the same noise. With one
                seed for each caption, a picture's noise depends on its own seed only, and equals
                that of picture 0 under this seed.

        Returns:
            Pictures of the size that the transformer was trained on.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: No prompts, `steps` below 1, a guidance scale that is not finite, or seeds
                out of range or of the wrong number.
        """
        captions = as_captions(prompts)
        seeds, indices = seeds_and_indices(seed, len(captions))
        sigmas = self.schedule.sigmas(steps)
        guidance = as_guidance(guidance_scale)
        transformer, text_encoder = nnx.split(self.transformer), nnx.split(self.text_encoder)
        pictures = _generate(
            (transformer[1], text_encoder[1]),
            jnp.asarray(self.tokenizer.encode(captions)),
            seeds,
            indices,
            guidance,
            sigmas,
            graphdefs=(transformer[0], text_encoder[0]),
        )
        return np.asarray(pictures)


@functools.partial(jax.jit, static_argnames="graphdefs")
def _generate(
    weights: tuple[Any, Any],
    tokens: Int32[Array, "batch tokens"],
    seeds: UInt32[Array, "batch"],
    indices: UInt32[Array, "batch"],
    guidance_scale: Float[Array, ""],
    sigmas: Float[Array, "steps+1"],
    *,
    graphdefs: tuple[Any, Any],
) -> UInt8[Array, "batch height width 3"]:
    """Everything from token ids to bytes, in one program."""
    transformer, text_encoder = map(nnx.merge, graphdefs, weights)
    conditional, unconditional = encode_captions(text_encoder, tokens)
    velocity = classifier_free_guidance(transformer, conditional, unconditional, guidance_scale)
    config = transformer.config
    shape = (config.sample_size, config.sample_size, config.in_channels)
    return to_pixels(euler_sample(velocity, draw_normal(seeds, indices, shape=shape), sigmas))


def encode_captions(
    text_encoder: TextEncoder, tokens: Int32[Array, "batch tokens"]
) -> tuple[Conditioning, Conditioning]:
    """Encode captions and, once for all of them, the empty caption.

    Returns:
        The conditional and the unconditional half of classifier-free guidance, of equal shapes.
    """
    context, pooled = text_encoder(jnp.concatenate([tokens, jnp.zeros_like(tokens[:1])]))
    conditional = Conditioning(context[:-1], pooled[:-1])
    unconditional = Conditioning(
        jnp.broadcast_to(context[-1:], conditional.context.shape),
        jnp.broadcast_to(pooled[-1:], conditional.pooled.shape),
    )
    return conditional, unconditional


def to_pixels(
    pictures: Float[Array, "batch height width 3"],
) -> UInt8[Array, "batch height width 3"]:
    """Map [-1, 1] to 0..255, rounding and cutting off what lies outside."""
    return jnp.round(jnp.clip(127.5 * (pictures + 1), 0, 255)).astype(jnp.uint8)


def _check_fit(transformer: MMDiT, text_encoder: TextEncoder, tokenizer: WordTokenizer) -> None:
    """Compare the sizes that the three parts share."""
    images, text = transformer.config, text_encoder.config
    pairs = {
        "joint_attention_dim and hidden_dim": (images.joint_attention_dim, text.hidden_dim),
        "pooled_projection_dim and pooled_dim": (images.pooled_projection_dim, text.pooled_dim),
        "vocabulary_size and tokenizer.size": (text.vocabulary_size, tokenizer.size),
        "max_tokens of encoder and tokenizer": (text.max_tokens, tokenizer.max_tokens),
        "in_channels and out_channels": (images.in_channels, images.out_channels),
        "in_channels and RGB": (images.in_channels, 3),
    }
    wrong = [f"{names}: {one} and {other}" for names, (one, other) in pairs.items() if one != other]
    if wrong:
        raise ValueError("parts do not fit together, these must be equal: " + "; ".join(wrong))
