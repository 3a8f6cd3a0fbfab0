"""The goldens of language models, and what transformers made of them."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.checkpoints import (
    diffusion_lm_config_from_json,
    load_diffusion_lm_folder,
    load_safetensors,
)

FILES = Path(__file__).parents[2] / "goldens/language_models"
NAMES = ["sdar", "qwen3_tied", "llada"]
EXAMPLES = [("sdar", "blocks"), ("sdar", "doubled"), ("qwen3_tied", "blocks")]
EXAMPLES += [("qwen3_tied", "padded"), ("llada", "full"), ("llada", "padded")]
MASKS = {"qwen3_tied": 60}
WEIGHTS = "model.safetensors"
HEADS = {"sdar": "lm_head.weight", "llada": "model.transformer.ff_out.weight"}
EMBEDDINGS = {"sdar": "model.embed_tokens.weight", "llada": "model.transformer.wte.weight"}


def load_golden(name, folder=None, **options):
    """Loads a golden, or a changed copy of it."""
    options = {"dtype": jnp.float32, "mask_id": MASKS.get(name)} | options
    return load_diffusion_lm_folder(FILES / name if folder is None else folder, **options)


def weights_of(name):
    return load_safetensors(FILES / name / WEIGHTS)


@functools.cache
def config_of(name):
    text = (FILES / name / "config.json").read_text()
    return diffusion_lm_config_from_json(text, mask_id=MASKS.get(name))


def copy_golden(name, folder):
    """A copy of a golden that may be changed."""
    shutil.copytree(FILES / name, folder, ignore=shutil.ignore_patterns("example.*"))
    return folder


@nnx.jit
def run(model, tokens, positions, mask):
    return model(tokens, positions, mask)


def error_of(found, wanted):
    """The largest difference relative to the largest value."""
    return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


def logits_of(name, example, model):
    """The logits of a model on an example, and those of transformers."""
    arrays = load_safetensors(FILES / name / "example.safetensors")
    tokens, positions, mask, logits = (
        arrays[f"{example}.{field}"] for field in ("tokens", "positions", "mask", "logits")
    )
    # Of one shape, so that two examples share what is compiled.
    positions = np.broadcast_to(positions, tokens.shape)
    mask = np.broadcast_to(mask, (*tokens.shape, tokens.shape[1]))
    return run(model, *map(jnp.asarray, (tokens, positions, mask))), logits


def mesh_of(**axes):
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
