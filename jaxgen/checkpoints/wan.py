"""The Wan transformer in the key and folder layout of the diffusers library.

There a linear weight is (out, in), ours (in, out); the patch embedding is a convolution
(out, channels, frames, rows, columns), ours a matrix from (frame, row, column, channel); a table
of the modulation is (1, rows, width), ours (rows, width). A folder holds `config.json` and
`diffusion_pytorch_model.safetensors`, or shards of it with an index.

Parameters of a module that was plugged in as self-attention (`attend` of `Wan`) are ours alone:
they are stored as they are, below `blocks.N.attn1.attend`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxgen.checkpoints.files import parse_json_object
from jaxgen.checkpoints.flat import check_settings, export_flat, flat_shapes
from jaxgen.checkpoints.safetensors_files import (
    check_arrays,
    load_safetensors,
    save_model_folder,
)
from jaxgen.checkpoints.stored_attention import is_plugged, stored_attention
from jaxgen.layers import AttentionName
from jaxgen.models.wan import Attend, Wan, WanConfig

_MODEL_KEYS = {
    "patch_embedding": "patch_embedding",
    "conditioning.timestep.hidden": "condition_embedder.time_embedder.linear_1",
    "conditioning.timestep.output": "condition_embedder.time_embedder.linear_2",
    "conditioning.projection": "condition_embedder.time_proj",
    "conditioning.text_hidden": "condition_embedder.text_embedder.linear_1",
    "conditioning.text_output": "condition_embedder.text_embedder.linear_2",
    "final_projection": "proj_out",
}
_BLOCK_KEYS = {
    "self_attention.query": "attn1.to_q",
    "self_attention.key": "attn1.to_k",
    "self_attention.value": "attn1.to_v",
    "self_attention.query_norm": "attn1.norm_q",
    "self_attention.key_norm": "attn1.norm_k",
    "self_attention.output": "attn1.to_out.0",
    "cross_attention.query": "attn2.to_q",
    "cross_attention.key": "attn2.to_k",
    "cross_attention.value": "attn2.to_v",
    "cross_attention.query_norm": "attn2.norm_q",
    "cross_attention.key_norm": "attn2.norm_k",
    "cross_attention.output": "attn2.to_out.0",
    "cross_norm": "norm2",
    "mlp.up": "ffn.net.0.proj",
    "mlp.down": "ffn.net.2",
}
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_PATCH_KERNEL = "patch_embedding.kernel"
_PLUGGED_PATH, _PLUGGED = ".self_attention.attend.", ".attn1.attend."

_CLASS = "WanTransformer3DModel"
_FIELDS = {
    "patch_size": "patch_size",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
    "rope_max_seq_len": "rope_max_seq_len",
}
_TOKEN_CUBE = "_token_cube"  # ours; diffusers passes over names that begin so
# What else a configuration of diffusers says, with the only value that is a text-to-video model.
_FIXED = {
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def wan_shapes(config: WanConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the diffusers keys of a model with their shapes; nothing is allocated."""
    return _expected(flat_shapes(lambda: Wan(config, rngs=nnx.Rngs(0))), config)


def export_wan(model: Wan) -> dict[str, np.ndarray]:
    """Returns the weights of a model by diffusers key, in the dtypes of its parameters."""
    arrays = export_flat(model)
    return {
        _diffusers_key(path): _to_diffusers(path, array, model.config)
        for path, array in arrays.items()
    }


def load_wan(
    config: WanConfig,
    arrays: Mapping[str, Any],
    source: str = "arrays",
    *,
    attend: Callable[[int], Attend] | None = None,
) -> Wan:
    """Makes a model from weights in the diffusers layout.

    Args:
        config: the model's configuration; floats are converted to the dtypes of its parameters.
        arrays: the weights by diffusers key.
        source: what to call the arrays in an error, for example the path of their file.
        attend: makes the self-attention of a block from its number, as for `Wan`. The parameters
            of such modules stay as they are made if `arrays` holds none of them, which is how a
            released model is converted; otherwise `arrays` must hold all. None: what the arrays
            were trained with, see `stored_attention`.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed; or settings that such modules
            record (`jaxgen.layers.Settings`) and that are not theirs.
    """
    model = nnx.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    attend = stored_attention(arrays, source) if attend is None else attend
    if attend is not None:
        for number, block in enumerate(model.blocks):
            made = attend(number)
            block.self_attention.attend = nnx.data(made) if isinstance(made, nnx.Module) else made
    graph, state = nnx.split(model)
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    wanted = dict(flat)
    if not any(map(is_plugged, arrays)):
        wanted = {path: entry for path, entry in flat.items() if _PLUGGED_PATH not in path}
    shapes = {path: variable.get_raw_value() for path, (_, variable) in wanted.items()}
    check_arrays(arrays, _expected(shapes, config), source)
    for path, (position, variable) in wanted.items():
        key = _diffusers_key(path)
        check_settings(variable, arrays[key], f"{source}: {key}")
        array = _from_diffusers(path, np.asarray(arrays[key]), config)
        flat[path] = position, variable.replace(jnp.array(array, variable.dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat.values()))


def save_wan_folder(
    folder: str | os.PathLike, model: Wan, *, max_shard_bytes: int | None = None
) -> None:
    """Writes a model as diffusers does, so that its `from_pretrained` loads it.

    Args:
        folder: the folder of the transformer, made if it does not exist.
        model: the model; the dtypes of its parameters are those of the file.
        max_shard_bytes: most bytes of arrays in one file.

    Raises:
        ValueError: a configuration that diffusers does not know (`qk_norm=False`).
    """
    folder, text = Path(folder), wan_config_to_json(model.config)
    save_model_folder(folder, _WEIGHTS, export_wan(model), text, max_shard_bytes=max_shard_bytes)


def load_wan_folder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    attention: AttentionName | None = None,
    remat: bool = False,
    scan: bool = False,
    attend: Callable[[int], Attend] | None = None,
) -> Wan:
    """Loads a model from a folder that diffusers wrote, or `save_wan_folder`.

    Args:
        folder: the folder of the transformer, or that of a pipeline with `transformer` in it.
        dtype: computation dtype.
        param_dtype: dtype of the parameters; `dtype` if None.
        attention: "exact" or "int8", full attention even where the folder also holds parameters of
            sparse attention; None: sparse as it was trained with these, otherwise exact.
        remat: recompute each block in the backward pass.
        scan: compile one block and loop over the weights of all; the blocks must be alike.
        attend: as for `load_wan`.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        ValueError: another kind of model, a damaged file, or weights that do not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    path = folder / "config.json"
    config = dataclasses.replace(
        wan_config_from_json(path.read_text(encoding="utf-8"), str(path)),
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
        attention="exact" if attention is None else attention,
        remat=remat,
        scan=scan,
    )
    weights = folder / _WEIGHTS
    arrays = load_safetensors(weights)
    if attention is not None and attend is None:
        arrays = {key: array for key, array in arrays.items() if not is_plugged(key)}
    return load_wan(config, arrays, str(weights), attend=attend)


def wan_config_to_json(config: WanConfig) -> str:
    """Returns the architecture in the words of diffusers, as the `config.json` of a transformer.

    How to compute (dtypes, attention, remat, scan) is left to whoever loads it.

    Raises:
        ValueError: `qk_norm=False`, for which diffusers has no word.
    """
    if not config.qk_norm:
        raise ValueError("the diffusers layout needs qk_norm=True, got qk_norm=False")
    values = {"_class_name": _CLASS, **_FIXED}
    values |= {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    if max(config.token_cube) > 1:
        values[_TOKEN_CUBE] = config.token_cube
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def wan_config_from_json(text: str, source: str = "config") -> WanConfig:
    """Reads a `config.json` of diffusers; fields that `WanConfig` has a default for may be absent.

    Args:
        text: the JSON document.
        source: what to call it in an error, for example its path.

    Raises:
        ValueError: no JSON object, another class of model, one that also takes images, unknown or
            missing fields, or a value that `WanConfig` refuses.
    """
    values = parse_json_object(text, source)
    fixed = {"_class_name": _CLASS, **_FIXED}
    for name, allowed in fixed.items():
        if values.get(name, allowed) != allowed:
            raise ValueError(
                f"{source}: {name} must be {allowed!r} (Wan text-to-video), got {values[name]!r}"
            )
    given = {name for name in values if not name.startswith("_")}
    unknown = sorted(given - _FIELDS.keys() - _FIXED.keys())
    missing = sorted({"num_layers", "num_attention_heads", "ffn_dim"} - given)
    if unknown or missing:
        raise ValueError(
            f"{source}: the fields are not those of {_CLASS}; "
            f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        )
    options = {_FIELDS[name]: values[name] for name in sorted(given & _FIELDS.keys())}
    if _TOKEN_CUBE in values:
        options["token_cube"] = values[_TOKEN_CUBE]
    try:
        return WanConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _expected(shapes: Mapping[str, Any], config: WanConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Translates the keys and shapes of our variables."""
    return {
        _diffusers_key(path): jax.eval_shape(
            lambda array, path=path: _to_diffusers(path, array, config), shape
        )
        for path, shape in shapes.items()
    }


def _diffusers_key(path: str) -> str:
    """Translates the dotted path of one of our variables."""
    layer, _, parameter = path.rpartition(".")
    if _PLUGGED_PATH in path:
        return path.replace(_PLUGGED_PATH, _PLUGGED, 1)
    if parameter == "table":
        return f"{layer}.scale_shift_table".lstrip(".")
    if layer.startswith("blocks."):
        _, number, part = layer.split(".", 2)
        return f"blocks.{number}.{_BLOCK_KEYS[part]}.{_PARAMETERS[parameter]}"
    return f"{_MODEL_KEYS[layer]}.{_PARAMETERS[parameter]}"


def _to_diffusers(path: str, array: Any, config: WanConfig) -> Any:
    """Turns one of our arrays into the diffusers layout."""
    if _PLUGGED_PATH in path:
        return array
    if path == _PATCH_KERNEL:
        kernel = array.reshape(*config.patch_size, config.in_channels, config.width)
        return kernel.transpose(4, 3, 0, 1, 2)
    if path.endswith("table"):
        return array[None]
    return array.T if path.endswith(".kernel") else array


def _from_diffusers(path: str, array: np.ndarray, config: WanConfig) -> np.ndarray:
    """Turns an array of the diffusers layout into ours."""
    if _PLUGGED_PATH in path:
        return array
    if path == _PATCH_KERNEL:
        return array.transpose(2, 3, 4, 1, 0).reshape(-1, config.width)
    if path.endswith("table"):
        return array[0]
    return array.T if path.endswith(".kernel") else array
