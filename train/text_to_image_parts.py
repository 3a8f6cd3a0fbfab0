"""What a text-to-image run is made of: pictures, models, loss, grids of samples, the card."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from jaxgen.models.mmdit import MMDIT_PRESETS, MMDiT
from jaxgen.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxgen.pictures import image_grid
from jaxgen.pipelines import TextToImage
from jaxgen.sampling import LogitNormal, flow_matching_loss, timestep_of
from jaxgen.text import WordTokenizer
from train import openmoji, run_folder
from train.metrics import Row, final_loss
from train.state import Arrays, Loss, Skeleton, take_apart
from train.text_to_image_config import Config


class Models(nnx.Module):
    """The two models that are trained together."""

    def __init__(self, transformer: MMDiT, text_encoder: TextEncoder):
        self.transformer = transformer
        self.text_encoder = text_encoder


def load_pictures(config: Config, emojis: openmoji.Emojis | None = None) -> openmoji.Emojis:
    """Load OpenMoji at the model's resolution; below 32 pixels by averaging blocks.

    Args:
        config: The experiment.
        emojis: Data to use instead, which must have the model's resolution.

    Raises:
        ValueError: `emojis` has another resolution.
    """
    size = MMDIT_PRESETS[config.model].sample_size
    if emojis is None:
        emojis = openmoji.load(64 if size > 32 else 32, limit=config.pictures)
        if config.subset == "people":
            emojis = emojis.select(emojis.composed)
        factor = emojis.images.shape[1] // size
        if factor == 1:
            return emojis
        blocks = emojis.images.reshape(len(emojis), size, factor, size, factor, 3)
        averaged = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
        return dataclasses.replace(emojis, images=averaged)
    if emojis.images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"{config.model} draws pictures of shape {(size, size, 3)}, got data of shape "
            f"{emojis.images.shape[1:]}"
        )
    return emojis


def assemble(
    config: Config, tokenizer: WordTokenizer, borrowed: TextToImage | None
) -> tuple[Skeleton, Callable[[], Models], Arrays]:
    """Decide what is trained.

    Args:
        config: The experiment.
        tokenizer: Decides the vocabulary of a new text encoder.
        borrowed: Where to take the text encoder from, if not from `config`.

    Returns:
        The skeleton of the models, a function that makes them with new weights, and the arrays
        to use instead of new ones, which are not trained.
    """
    transformer_config = dataclasses.replace(
        MMDIT_PRESETS[config.model],
        attention=config.attention,
        remat=config.remat,
        dtype=config.precision,
    )
    given: Arrays = {}
    if borrowed:
        encoder_config = dataclasses.replace(borrowed.text_encoder.config, dtype=config.precision)
        _, arrays = take_apart(borrowed.text_encoder)
        given = {f"text_encoder.{name}": array for name, array in arrays.items()}
    else:
        encoder_config = TextEncoderConfig(
            vocabulary_size=tokenizer.size,
            max_tokens=tokenizer.max_tokens,
            hidden_dim=transformer_config.joint_attention_dim,
            pooled_dim=transformer_config.pooled_projection_dim,
            dtype=config.precision,
        )

    def build() -> Models:
        rngs = nnx.Rngs(config.seed)
        return Models(MMDiT(transformer_config, rngs=rngs), TextEncoder(encoder_config, rngs=rngs))

    skeleton, _ = take_apart(nnx.eval_shape(build))
    return skeleton, build, given


def make_loss(config: Config, skeleton: Skeleton) -> Loss:
    """Return the mean flow matching loss of a batch of uint8 pictures and token ids."""
    levels = LogitNormal(config.sigma_mean, config.sigma_std, config.sigma_shift)

    def loss(params, frozen, batch, key):
        models = skeleton.join(params | frozen)
        context, pooled = models.text_encoder(batch["tokens"])

        def velocity(noisy, sigma):
            return models.transformer(noisy, timestep_of(sigma), context, pooled)

        pictures = batch["image"].astype(jnp.float32) / 127.5 - 1
        return jnp.mean(flow_matching_loss(velocity, pictures, key, levels))

    return loss


def choose_captions(emojis: openmoji.Emojis, count: int = 8) -> tuple[str, ...]:
    """Return evenly spaced captions, `count` from training and `count` held out if there are."""
    chosen: list[str] = []
    for part in (emojis.train, emojis.test):
        places = np.linspace(0, len(part) - 1, min(count, len(part))).astype(int)
        chosen += [part.captions[place] for place in places]
    return tuple(chosen)


def draw_grid(pipeline: TextToImage, captions: Sequence[str], config: Config) -> Image.Image:
    """Draw the captions with the first seed."""
    pictures = pipeline(captions, steps=config.sample_steps, guidance_scale=config.guidance_scale)
    return image_grid(pictures, captions, columns=min(8, len(captions)))


def make_card(
    config: Config,
    emojis: openmoji.Emojis,
    rows: list[Row],
    step: int,
    seconds: float,
    devices: int,
) -> dict[str, Any]:
    """Return the model card: what was trained on what, how, how long, and the loss it reached."""
    return {
        "name": config.model,
        "task": "text-to-image",
        "data": "OpenMoji",
        "attribution": openmoji.ATTRIBUTION,
        "pictures_trained_on": len(emojis.train),
        "pictures_held_out": len(emojis.test),
        "steps": step,
        "command": config.command(),
        "config": run_folder.to_json(config),
        "final_loss": final_loss(rows),
        "updates_skipped": rows[-1]["skipped"] if rows else 0,
        "hardware": f"{devices} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "seconds": round(seconds, 1),
    }
