"""CLIP text models and T5 encoders in the key and folder layout of the transformers library.

There a linear weight is (out, in), ours (in, out); everything else is stored alike. A folder holds
`config.json` and `model.safetensors`, or shards of it with an index. T5 keeps the table of position
biases that all its blocks share in the first of them.

Two tensors of older files are no parameters and are passed over, by name: `position_ids`, which
only counts, and the second copy of T5's token embedding, which must equal the first.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxgen.checkpoints.flat import export_flat, flat_shapes, load_flat
from jaxgen.checkpoints.safetensors_files import check_arrays, load_safetensors, save_model_folder
from jaxgen.checkpoints.text_encoder_configs import (
    clip_text_config_from_json,
    clip_text_config_to_json,
    t5_config_from_json,
    t5_config_to_json,
)
from jaxgen.models.clip_text import CLIPText, CLIPTextConfig
from jaxgen.models.t5_encoder import T5Encoder, T5EncoderConfig

_WEIGHTS = "model.safetensors"
_PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "table": "weight",
    "bias": "bias",
}
_CLIP_MODEL_KEYS = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "position_embedding": "text_model.embeddings.position_embedding",
    "final_norm": "text_model.final_layer_norm",
    "projection": "text_projection",
}
_CLIP_BLOCK_KEYS = {
    "attention_norm": "layer_norm1",
    "attention.heads.query": "self_attn.q_proj",
    "attention.heads.key": "self_attn.k_proj",
    "attention.heads.value": "self_attn.v_proj",
    "attention.heads.output": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_CLIP_POSITIONS = "text_model.embeddings.position_ids"
_T5_MODEL_KEYS = {
    "token_embedding": "shared",
    "positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "final_norm": "encoder.final_layer_norm",
}
_T5_BLOCK_KEYS = {
    "attention_norm": "layer.0.layer_norm",
    "attention.query": "layer.0.SelfAttention.q",
    "attention.key": "layer.0.SelfAttention.k",
    "attention.value": "layer.0.SelfAttention.v",
    "attention.output": "layer.0.SelfAttention.o",
    "attention.positions": "layer.0.SelfAttention.relative_attention_bias",
    "mlp_norm": "layer.1.layer_norm",
    "mlp.gate": "layer.1.DenseReluDense.wi_0",
    "mlp.up": "layer.1.DenseReluDense.wi_1",
    "mlp.down": "layer.1.DenseReluDense.wo",
}
_T5_EMBEDDING, _T5_COPY = "shared.weight", "encoder.embed_tokens.weight"


def clip_text_shapes(config: CLIPTextConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the transformers keys of a model with their shapes; nothing is allocated."""
    return _shapes(lambda: CLIPText(config, rngs=nnx.Rngs(0)), _clip_key)


def t5_shapes(config: T5EncoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the transformers keys of an encoder with their shapes; nothing is allocated."""
    return _shapes(lambda: T5Encoder(config, rngs=nnx.Rngs(0)), _t5_key)


def export_clip_text(model: CLIPText) -> dict[str, np.ndarray]:
    """Returns the weights of a model by transformers key, in the model's parameter dtype."""
    return {_clip_key(path): _turn(path, array) for path, array in export_flat(model).items()}


def export_t5(model: T5Encoder) -> dict[str, np.ndarray]:
    """Returns the weights of an encoder by transformers key, in its parameter dtype."""
    return {_t5_key(path): _turn(path, array) for path, array in export_flat(model).items()}


def load_clip_text(
    config: CLIPTextConfig, arrays: Mapping[str, Any], source: str = "arrays"
) -> CLIPText:
    """Makes a model from weights in the layout of `CLIPTextModelWithProjection`.

    Args:
        config: the model's configuration; floats are converted to its `param_dtype`.
        arrays: the weights by transformers key; `position_ids` may be among them.
        source: what to call the arrays in an error, for example the path of their file.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed.
    """
    weights = {key: array for key, array in arrays.items() if key != _CLIP_POSITIONS}
    return _load(lambda: CLIPText(config, rngs=nnx.Rngs(0)), _clip_key, weights, source)


def load_t5(
    config: T5EncoderConfig, arrays: Mapping[str, Any], source: str = "arrays"
) -> T5Encoder:
    """Makes an encoder from weights in the layout of `T5EncoderModel` or `UMT5EncoderModel`.

    Args:
        config: the encoder's configuration; floats are converted to its `param_dtype`.
        arrays: the weights by transformers key. The token embedding may be there under the name
            that it has in the encoder, instead of the shared one or in addition to it.
        source: what to call the arrays in an error, for example the path of their file.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed; or two token embeddings that
            differ.
    """
    weights = dict(arrays)
    if _T5_COPY in weights:
        copy = weights.pop(_T5_COPY)
        if not np.array_equal(weights.setdefault(_T5_EMBEDDING, copy), copy):
            raise ValueError(
                f"{source}: {_T5_COPY} must be a copy of {_T5_EMBEDDING}, but the two differ"
            )
    return _load(lambda: T5Encoder(config, rngs=nnx.Rngs(0)), _t5_key, weights, source)


def load_clip_text_folder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
) -> CLIPText:
    """Loads a model from a folder that transformers wrote, or `save_clip_text_folder`.

    Args:
        folder: the folder of a `CLIPTextModelWithProjection`: `text_encoder` or `text_encoder_2`
            of SD3.
        dtype: computation dtype.
        param_dtype: dtype of the parameters; `dtype` if None.
        scan: compile one block and loop over the weights of all.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        ValueError: another kind of model, a damaged file, or weights that do not fit.
    """
    path, weights = Path(folder) / "config.json", Path(folder) / _WEIGHTS
    config = clip_text_config_from_json(path.read_text(encoding="utf-8"), str(path))
    param_dtype = dtype if param_dtype is None else param_dtype
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype, scan=scan)
    return load_clip_text(config, load_safetensors(weights), str(weights))


def load_t5_folder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
) -> T5Encoder:
    """Loads an encoder from a folder that transformers wrote, or `save_t5_folder`.

    Args:
        folder: the folder of a `T5EncoderModel` (`text_encoder_3` of SD3) or a `UMT5EncoderModel`
            (`text_encoder` of Wan).
        dtype: computation dtype, any but float16.
        param_dtype: dtype of the parameters; `dtype` if None.
        scan: compile one block and loop over the weights of all.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        ValueError: another kind of model, a damaged file, or weights that do not fit.
    """
    path, weights = Path(folder) / "config.json", Path(folder) / _WEIGHTS
    config = t5_config_from_json(path.read_text(encoding="utf-8"), str(path))
    param_dtype = dtype if param_dtype is None else param_dtype
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype, scan=scan)
    return load_t5(config, load_safetensors(weights), str(weights))


def save_clip_text_folder(
    folder: str | os.PathLike, model: CLIPText, *, max_shard_bytes: int | None = None
) -> None:
    """Writes a model as transformers does, so that its `from_pretrained` loads it.

    Args:
        folder: the folder, made if it does not exist.
        model: the model; the dtypes of its parameters are those of the file.
        max_shard_bytes: most bytes of arrays in one file.
    """
    arrays, text = export_clip_text(model), clip_text_config_to_json(model.config)
    save_model_folder(Path(folder), _WEIGHTS, arrays, text, max_shard_bytes=max_shard_bytes)


def save_t5_folder(
    folder: str | os.PathLike, model: T5Encoder, *, max_shard_bytes: int | None = None
) -> None:
    """Writes an encoder as transformers does, so that its `from_pretrained` loads it.

    Args:
        folder: the folder, made if it does not exist.
        model: the encoder; the dtypes of its parameters are those of the file.
        max_shard_bytes: most bytes of arrays in one file.
    """
    arrays, text = export_t5(model), t5_config_to_json(model.config)
    save_model_folder(Path(folder), _WEIGHTS, arrays, text, max_shard_bytes=max_shard_bytes)


def _shapes(
    create: Callable[[], nnx.Module], key_of: Callable[[str], str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Translates the keys and shapes of our variables."""
    return {
        key_of(path): jax.ShapeDtypeStruct(_turn(path, shape.shape), shape.dtype)
        for path, shape in flat_shapes(create).items()
    }


def _load[Module: nnx.Module](
    create: Callable[[], Module],
    key_of: Callable[[str], str],
    arrays: Mapping[str, Any],
    source: str,
) -> Module:
    """Makes a module from weights in the transformers layout."""
    check_arrays(arrays, _shapes(create, key_of), source)
    ours = {path: _turn(path, np.asarray(arrays[key_of(path)])) for path in flat_shapes(create)}
    return load_flat(create, ours, source)


def _clip_key(path: str) -> str:
    """Translates the dotted path of one of our variables of a `CLIPText`."""
    return _key(path, "text_model.encoder.layers", _CLIP_MODEL_KEYS, _CLIP_BLOCK_KEYS)


def _t5_key(path: str) -> str:
    """Translates the dotted path of one of our variables of a `T5Encoder`."""
    return _key(path, "encoder.block", _T5_MODEL_KEYS, _T5_BLOCK_KEYS)


def _key(path: str, blocks: str, model: Mapping[str, str], block: Mapping[str, str]) -> str:
    """Translates a dotted path by tables for the model and for a block."""
    layer, _, parameter = path.rpartition(".")
    if layer.startswith("blocks."):
        _, number, part = layer.split(".", 2)
        return f"{blocks}.{number}.{block[part]}.{_PARAMETERS[parameter]}"
    return f"{model[layer]}.{_PARAMETERS[parameter]}"


def _turn(path: str, array: Any) -> Any:
    """Turns an array, or a shape, into the other layout: kernels are transposed."""
    if not path.endswith(".kernel"):
        return array
    return array[::-1] if isinstance(array, tuple) else array.T
