"""The MMDiT in the key layout of the diffusers library, in which SD3 and SD3.5 are published.

There a linear weight is (out, in), ours (in, out); the patch embedding is a convolution
(out, channels, rows, columns), ours a matrix from (row, column, channel); the position table is
(1, side*side, width), ours (side, side, width).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxgen.checkpoints.flat import UnreadArray, export_flat, fill, flat_shapes
from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.checkpoints.safetensors_files import check_arrays
from jaxgen.models.mmdit import MMDiT, MMDiTConfig

_MODEL_KEYS = {
    "patch_embedding.projection": "pos_embed.proj",
    "conditioning.timestep.hidden": "time_text_embed.timestep_embedder.linear_1",
    "conditioning.timestep.output": "time_text_embed.timestep_embedder.linear_2",
    "conditioning.pooled.hidden": "time_text_embed.text_embedder.linear_1",
    "conditioning.pooled.output": "time_text_embed.text_embedder.linear_2",
    "text_embedding": "context_embedder",
    "final_modulation.projection": "norm_out.linear",
    "final_projection": "proj_out",
}
_BLOCK_KEYS = {
    "image_modulation.projection": "norm1.linear",
    "text_modulation.projection": "norm1_context.linear",
    "attention.image.query": "attn.to_q",
    "attention.image.key": "attn.to_k",
    "attention.image.value": "attn.to_v",
    "attention.image.query_norm": "attn.norm_q",
    "attention.image.key_norm": "attn.norm_k",
    "attention.image.output": "attn.to_out.0",
    "attention.text.query": "attn.add_q_proj",
    "attention.text.key": "attn.add_k_proj",
    "attention.text.value": "attn.add_v_proj",
    "attention.text.query_norm": "attn.norm_added_q",
    "attention.text.key_norm": "attn.norm_added_k",
    "attention.text.output": "attn.to_add_out",
    "image_attention.heads.query": "attn2.to_q",
    "image_attention.heads.key": "attn2.to_k",
    "image_attention.heads.value": "attn2.to_v",
    "image_attention.heads.query_norm": "attn2.norm_q",
    "image_attention.heads.key_norm": "attn2.norm_k",
    "image_attention.heads.output": "attn2.to_out.0",
    "image_mlp.up": "ff.net.0.proj",
    "image_mlp.down": "ff.net.2",
    "text_mlp.up": "ff_context.net.0.proj",
    "text_mlp.down": "ff_context.net.2",
}
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_PATCH_KERNEL = "patch_embedding.projection.kernel"
_TABLE = "patch_embedding.table"


def mmdit_shapes(config: MMDiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the diffusers keys of a model with their shapes; nothing is allocated."""
    return dict(_shapes(config))


@functools.lru_cache(maxsize=8)
def _shapes(config: MMDiTConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Makes the model abstractly, which takes a second for the largest."""
    shapes = flat_shapes(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    turned = {
        path: jax.eval_shape(lambda array, path=path: _to_diffusers(path, array, config), shape)
        for path, shape in shapes.items()
    }
    return {_diffusers_key(path): shape for path, shape in turned.items()}


def export_mmdit(model: MMDiT) -> dict[str, np.ndarray]:
    """Returns the weights of a model by diffusers key, in the model's parameter dtype."""
    arrays = export_flat(model)
    return {
        _diffusers_key(path): _to_diffusers(path, array, model.config)
        for path, array in arrays.items()
    }


def stream_mmdit(model: MMDiT) -> dict[str, UnreadArray]:
    """Returns what `export_mmdit` returns, to be copied to the host one array after the other."""
    shapes = mmdit_shapes(model.config)
    variables = nnx.to_flat_state(nnx.state(model))
    paths = {".".join(map(str, position)): variable for position, variable in variables}
    turn = lambda path: lambda array: _to_diffusers(path, array, model.config)
    return {
        key: UnreadArray(variable, shapes[key].shape, turn(path))
        for path, variable in paths.items()
        for key in (_diffusers_key(path),)
    }


def load_mmdit(
    config: MMDiTConfig,
    arrays: Mapping[str, Any],
    source: str = "arrays",
    *,
    sharding: Placement = None,
    progress: Progress = None,
) -> MMDiT:
    """Makes a model from weights in the diffusers layout, reading one array after the other.

    Args:
        config: the model's configuration; floats are converted to its `param_dtype`.
        arrays: the weights by diffusers key.
        source: what to call the arrays in an error, for example the path of their file.
        sharding: where the parameters go: a sharding for all, or a function from our dotted path
            and shape of a parameter to one; the default device if None.
        progress: called with the bytes loaded and those of all; True for a bar on stderr.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed; or a sharding that does not
            fit. Nothing has been read then.
    """
    check_arrays(arrays, mmdit_shapes(config), source)
    return fill(
        nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))),
        lambda path: _from_diffusers(path, np.asarray(arrays[_diffusers_key(path)]), config),
        source,
        sharding=sharding,
        progress=progress,
    )


def _diffusers_key(path: str) -> str:
    """Translates the dotted path of one of our variables."""
    if path == _TABLE:
        return "pos_embed.pos_embed"
    layer, _, parameter = path.rpartition(".")
    if layer.startswith("blocks."):
        _, number, part = layer.split(".", 2)
        return f"transformer_blocks.{number}.{_BLOCK_KEYS[part]}.{_PARAMETERS[parameter]}"
    return f"{_MODEL_KEYS[layer]}.{_PARAMETERS[parameter]}"


def _to_diffusers(path: str, array: Any, config: MMDiTConfig) -> Any:
    """Turns one of our arrays into the diffusers layout."""
    if path == _TABLE:
        return array.reshape(1, -1, config.width)
    if path == _PATCH_KERNEL:
        kernel = array.reshape(config.patch_size, config.patch_size, config.in_channels, -1)
        return kernel.transpose(3, 2, 0, 1)
    return array.T if path.endswith(".kernel") else array


def _from_diffusers(path: str, array: np.ndarray, config: MMDiTConfig) -> np.ndarray:
    """Turns an array of the diffusers layout into ours."""
    if path == _TABLE:
        return array.reshape(config.pos_embed_max_size, config.pos_embed_max_size, -1)
    if path == _PATCH_KERNEL:
        return array.transpose(2, 3, 1, 0).reshape(-1, config.width)
    return array.T if path.endswith(".kernel") else array
