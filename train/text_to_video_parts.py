"""What a text-to-video run is made of: models, data, loss, validation, samples, the export."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt8

from jaxgen.models import TextEncoder, TextEncoderConfig, Wan
from jaxgen.models.wan import Attend
from jaxgen.pictures import image_grid
from jaxgen.pipelines import TextToVideo
from jaxgen.sampling import (
    LogitNormal,
    add_noise,
    flow_matching_loss,
    timestep_of,
)
from jaxgen.text import WordTokenizer
from train.clips import Clips, render
from train.state import Arrays, Loss, Skeleton
from train.text_to_video_config import MODELS, Config

_MAX_TOKENS = 24  # the longest caption has so many words
_VALIDATION_SEED = 2024
_VALIDATION_BATCH = 16
_SHEET_COLUMNS = 8


class Models(nnx.Module):
    """The two models that are trained together."""

    def __init__(self, transformer: Wan, text_encoder: TextEncoder):
        self.transformer = transformer
        self.text_encoder = text_encoder


def open_clips(config: Config) -> dict[str, Clips]:
    """Return the data set by split."""
    from train.moving_emoji import SPLITS, MovingEmoji

    options = {"frames": config.frames, "size": config.size, "limit": config.figures}
    return {split: MovingEmoji(split=split, **options) for split in SPLITS}


def clips_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the clips that a model was trained on: frames, size and figures."""
    return {name: card["config"][name] for name in ("frames", "size", "figures")}


def make_tokenizer() -> WordTokenizer:
    """Return the tokenizer of the captions' grammar, the same whatever the figures."""
    from train.moving_emoji_scenes import VOCABULARY

    return WordTokenizer(VOCABULARY, _MAX_TOKENS)


def make_models(config: Config, tokenizer: WordTokenizer) -> Models:
    """Return new models."""
    transformer = dataclasses.replace(
        MODELS[config.model],
        attention=config.attention,
        remat=config.remat,
        dtype=config.precision,
    )
    encoder = TextEncoderConfig(
        vocabulary_size=tokenizer.size,
        max_tokens=tokenizer.max_tokens,
        hidden_dim=transformer.text_dim,
        pooled_dim=1,  # the transformer reads tokens only
        dtype=config.precision,
    )
    rngs = nnx.Rngs(config.seed)
    models = Models(Wan(transformer, rngs=rngs), TextEncoder(encoder, rngs=rngs))
    for block in models.transformer.blocks:
        for norm in (block.self_attention.query_norm, block.self_attention.key_norm):
            if norm is not None:
                norm.scale[...] *= config.qk_gain
    return models


def predict(
    models: Models,
    noisy: Float[Array, "batch frames height width 3"],
    sigma: Float[Array, "batch"],
    tokens: Int32[Array, "batch tokens"],
) -> Float[Array, "batch frames height width 3"]:
    """Return the velocity that the models predict, in their dtype."""
    context, _ = models.text_encoder(tokens)
    return models.transformer(noisy, timestep_of(sigma), context)


def to_floats(video: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Map 0..255 to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1


def as_pictures(video: Array) -> Array:
    """Put the frames of each clip below each other, (batch, frames*height, width, channels)."""
    return video.reshape(len(video), -1, *video.shape[3:])


def make_loss(skeleton: Skeleton, levels: LogitNormal) -> Loss:
    """Return the mean flow matching loss of a batch of clips and token ids."""

    def loss(params, frozen, batch, key):
        models, clips = skeleton.join(params | frozen), to_floats(batch["video"])

        def velocity(noisy, sigma):
            predicted = predict(models, noisy.reshape(clips.shape), sigma, batch["tokens"])
            return as_pictures(predicted)

        return jnp.mean(flow_matching_loss(velocity, as_pictures(clips), key, levels))

    return loss


class Validation:
    """The flow matching loss on fixed clips, noise and noise levels: it compares models.

    Noise depends on the number of the clip and of the level only, and the levels are spread evenly
    over the quantiles of those trained on: the expected loss of training, with little variance.

    Args:
        clips: The data sets to validate on, by name.
        tokenizer: Encodes the captions.
        count: The first so many clips of each are used.
        levels: Noise levels a clip.
        distribution: Of the noise levels.
    """

    def __init__(
        self,
        clips: Mapping[str, Clips],
        tokenizer: WordTokenizer,
        *,
        count: int,
        levels: int,
        distribution: LogitNormal,
    ):
        self._levels = levels, distribution
        self._sets = {}
        for name, source in clips.items():
            videos, captions = render(source, range(min(count, len(source))))
            self._sets[name] = videos, tokenizer.encode(captions)

    def __call__(self, skeleton: Skeleton, arrays: Arrays) -> dict[str, float]:
        """Return the mean loss by name of the data set."""
        arrays = jax.device_put({name: arrays[name] for name in skeleton.names})
        means = {}
        for name, (videos, tokens) in self._sets.items():
            total = 0.0
            for start in range(0, len(videos), _VALIDATION_BATCH):
                part = slice(start, start + _VALIDATION_BATCH)
                numbers = np.arange(start, start + len(videos[part]), dtype=np.uint32)
                batch = videos[part], tokens[part], numbers
                total += float(_validation_losses(skeleton, *self._levels, arrays, *batch))
            means[name] = total / len(videos)
        return means


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _validation_losses(
    skeleton: Skeleton, levels: int, distribution: LogitNormal, arrays, video, tokens, numbers
) -> Array:
    """Return the sum over clips of the mean loss over levels."""
    models, clips = skeleton.join(arrays), to_floats(video)

    def noise_of(number: Array, level: Array) -> Array:
        key: PRNGKeyArray = jax.random.fold_in(jax.random.key(_VALIDATION_SEED), number)
        return jax.random.normal(jax.random.fold_in(key, level), video.shape[1:], jnp.float32)

    def at_level(total, level):
        # Multiples of the golden ratio, modulo 1, are spread evenly however many are taken.
        place = (numbers * levels + level + 1).astype(jnp.float32)
        sigma = distribution.quantile(jnp.clip(place * 0.6180339887 % 1, 0.001, 0.999))
        noise = as_pictures(jax.vmap(noise_of, (0, None))(numbers, level))
        noisy = add_noise(as_pictures(clips), noise, sigma).reshape(clips.shape)
        predicted = as_pictures(predict(models, noisy, sigma, tokens)).astype(jnp.float32)
        error = jnp.square(predicted - (noise - as_pictures(clips)))
        return total + jnp.sum(jnp.mean(error, axis=(1, 2, 3))) / levels, None

    return jax.lax.scan(at_level, jnp.float32(0), jnp.arange(levels, dtype=jnp.uint32))[0]


def draw_clips(
    config: Any,
    models: Models,
    tokenizer: WordTokenizer,
    captions: Sequence[str],
    shape: tuple[int, int, int],
) -> UInt8[np.ndarray, "captions frames height width 3"]:
    """Return one clip a caption.

    Args:
        config: Holds `sample_steps` and `guidance_scale`.
        models: Draw them.
        tokenizer: Encodes the captions.
        captions: What to draw.
        shape: Frames, height and width.
    """
    frames, height, width = shape
    return TextToVideo(models.transformer, models.text_encoder, tokenizer)(
        captions,
        frames=frames,
        height=height,
        width=width,
        steps=config.sample_steps,
        guidance_scale=config.guidance_scale,
    )


def choose_captions(clips: Mapping[str, Clips], count: int = 4) -> tuple[str, ...]:
    """Return the captions of the first clips of the splits validation and held_out."""
    return tuple(
        clips[split][number]["caption"]
        for split in ("validation", "held_out")
        for number in range(min(count, len(clips[split])))
    )


def save_samples(videos: np.ndarray, captions: Sequence[str], path: Path) -> None:
    """Write clips beside each other as an animation, and some of their frames as a sheet.

    Args:
        videos: uint8 (captions, frames, size, size, 3).
        captions: Written below the clips.
        path: Without a suffix; `.gif` and `.png` are added.
    """
    from train.moving_emoji import save_gif

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(4, len(videos))
    grids = [image_grid(frame, captions, columns=columns) for frame in videos.swapaxes(0, 1)]
    save_gif(np.stack([np.asarray(grid) for grid in grids]), path.with_suffix(".gif"))
    shown = np.linspace(0, videos.shape[1] - 1, min(_SHEET_COLUMNS, videos.shape[1])).astype(int)
    frames = videos[:, shown].reshape(-1, *videos.shape[2:])
    image_grid(frames, columns=len(shown), picture_size=64).save(path.with_suffix(".png"))


def save_export(
    folder: Path, models: Models, tokenizer: WordTokenizer, card: Mapping[str, Any], dtype: str
) -> None:
    """Write models as safetensors and JSON; parameters of plugged-in attention stay float32."""
    pipeline = TextToVideo(models.transformer, models.text_encoder, tokenizer, card)
    pipeline.save_pretrained(folder, dtype)


def load_export(
    folder: Path,
    *,
    precision: str,
    remat: bool = False,
    attend: Callable[[int], Attend] | None = None,
) -> tuple[Models, WordTokenizer, dict[str, Any]]:
    """Read what `save_export` wrote, with float32 parameters.

    Args:
        folder: The folder `export` of a run.
        precision: Dtype of the computation.
        remat: Recompute each block in the backward pass.
        attend: Makes the self-attention of a block from its number; full attention if None.

    Returns:
        The models, the tokenizer and the card.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A damaged file, weights that do not fit, or no text encoder of ours.
    """
    pipeline = TextToVideo.from_pretrained(
        folder,
        attention=attend or "exact",
        dtype=precision,
        param_dtype=jnp.float32,
        remat=remat,
    )
    if pipeline.text_encoder is None or pipeline.tokenizer is None:
        raise ValueError(f"{folder} is a released model, without a text encoder of ours")
    models = Models(pipeline.transformer, pipeline.text_encoder)
    return models, pipeline.tokenizer, pipeline.card
