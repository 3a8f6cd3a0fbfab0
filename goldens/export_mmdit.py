"""Exports a random tiny MMDiT in the folder layout of diffusers, with an example of its output.

Usage: export_mmdit.py FOLDER, with jaxgen's own Python; `goldens/check_export.py` reads it.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxgen.checkpoints import export_mmdit, save_safetensors
from jaxgen.models import MMDIT_PRESETS, MMDiT


def export(folder: Path) -> None:
    """Writes config.json, the weights and example.safetensors."""
    config = dataclasses.replace(MMDIT_PRESETS["tiny"], num_layers=3, dual_attention_layers=(0,))
    model = MMDiT(config, rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(1)
    for variable in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=_is_variable):
        noise = jax.random.normal(rngs(), variable.shape, variable.dtype)
        variable.set_value(variable[...] + 0.1 * noise)
    inputs = {
        "latents": jax.random.normal(rngs(), (2, 12, 16, config.in_channels)),
        "timestep": jax.random.uniform(rngs(), (2,)) * 1000.0,
        "context": jax.random.normal(rngs(), (2, 7, config.joint_attention_dim)),
        "pooled": jax.random.normal(rngs(), (2, config.pooled_projection_dim)),
    }
    example = inputs | {"output": model(**inputs)}
    for name in ("latents", "output"):
        example[name] = np.moveaxis(np.asarray(example[name]), -1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_safetensors(weights, export_mmdit(model), {"format": "pt"})
    save_safetensors(folder / "example.safetensors", example, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(diffusers_config(config), indent=2) + "\n")


def diffusers_config(config) -> dict:
    """The same configuration in the words of diffusers."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "caption_projection_dim": config.width,
        "joint_attention_dim": config.joint_attention_dim,
        "pooled_projection_dim": config.pooled_projection_dim,
        "pos_embed_max_size": config.pos_embed_max_size,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "dual_attention_layers": list(config.dual_attention_layers),
    }


def _is_variable(value) -> bool:
    return isinstance(value, nnx.Variable)


if __name__ == "__main__":
    export(Path(sys.argv[1]))
