"""Folders of an MMDiT as diffusers writes them, the `transformer` of Stable Diffusion 3 and 3.5.

A folder holds `config.json`, the configuration of an SD3Transformer2DModel, and
`diffusion_pytorch_model.safetensors`, or shards of it with an index. The keys are in
`jaxgen.checkpoints.mmdit`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from jaxgen.checkpoints.files import parse_json_object
from jaxgen.checkpoints.mmdit import load_mmdit, stream_mmdit
from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.checkpoints.safetensors_files import load_safetensors, save_model_folder
from jaxgen.layers import AttentionName
from jaxgen.models.mmdit import MMDiT, MMDiTConfig

_CLASS = "SD3Transformer2DModel"
_FIELDS = {
    "sample_size": "sample_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "num_layers": "num_layers",
    "attention_head_dim": "head_dim",
    "num_attention_heads": "num_heads",
    "joint_attention_dim": "joint_attention_dim",
    "pooled_projection_dim": "pooled_projection_dim",
    "out_channels": "out_channels",
    "pos_embed_max_size": "pos_embed_max_size",
    "dual_attention_layers": "dual_attention_layers",
    "qk_norm": "qk_norm",
}
_WIDTH = "caption_projection_dim"
# What diffusers takes if a field is absent; it would also take a size for those that are missing
# here, but not one of a released model.
_ABSENT = {
    "patch_size": 2,
    "in_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "dual_attention_layers": [],
    "qk_norm": None,
}
_QK_NORMS = {None: False, "rms_norm": True}
_LARGEST = 2**20  # far beyond every size of a model; counting to a damaged one would not end
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_mmdit_folder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    attention: AttentionName = "exact",
    remat: bool = False,
    scan: bool = False,
    sharding: Placement = None,
    progress: Progress = None,
) -> MMDiT:
    """Loads a model from a folder that diffusers wrote, or `save_mmdit_folder`.

    Names and shapes are checked first. Then every array is read, converted and put in its place
    before the next one: next to the model itself, the host holds about one array.

    Args:
        folder: the folder of the transformer, or that of a pipeline with `transformer` in it.
        dtype: computation dtype.
        param_dtype: dtype of the parameters; `dtype` if None.
        attention: "exact" or "int8".
        remat: recompute each block in the backward pass.
        scan: compile one block of each kind and loop over the weights of all.
        sharding: where the parameters go: a `jax.sharding.Sharding` for all, or a function from
            the dotted path (`blocks.0.image_mlp.up.kernel`) and our shape of a parameter to one;
            the default device if None.
        progress: called with the bytes loaded and those of all after each array; True for a bar
            on stderr.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        ValueError: another kind of model, a damaged file, weights that do not fit, or a sharding
            that does not.
        TypeError: a `sharding` that is none.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    path, weights = folder / "config.json", folder / _WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    config = dataclasses.replace(
        mmdit_config_from_json(path.read_bytes(), str(path)),
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
        attention=attention,
        remat=remat,
        scan=scan,
    )
    arrays = load_safetensors(weights)
    source = str(weights if weights.exists() else f"{weights}.index.json")
    check_size(config, arrays, f"{path}, {source}")
    return load_mmdit(config, arrays, source, sharding=sharding, progress=progress)


def save_mmdit_folder(
    folder: str | os.PathLike, model: MMDiT, *, max_shard_bytes: int | None = None
) -> None:
    """Writes a model as diffusers does, so that its `from_pretrained` loads it.

    Next to the model, the host holds about one array.

    Args:
        folder: the folder of the transformer, made if it does not exist.
        model: the model; the dtype of its parameters is that of the file.
        max_shard_bytes: most bytes of arrays in one file.
    """
    folder, text = Path(folder), mmdit_config_to_json(model.config)
    save_model_folder(folder, _WEIGHTS, stream_mmdit(model), text, max_shard_bytes=max_shard_bytes)


def mmdit_config_to_json(config: MMDiTConfig) -> str:
    """Returns the architecture in the words of diffusers, as the `config.json` of a transformer.

    How to compute (dtypes, attention, remat, scan) is left to whoever loads it.
    """
    values: dict[str, Any] = {"_class_name": _CLASS, _WIDTH: config.width}
    values |= {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    values["qk_norm"] = "rms_norm" if config.qk_norm else None
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def mmdit_config_from_json(text: str | bytes, source: str = "config") -> MMDiTConfig:
    """Reads a `config.json` of diffusers; what a model has in common with SD3 may be absent.

    Args:
        text: the JSON document.
        source: what to call it in an error, for example its path.

    Raises:
        ValueError: no JSON object, another class of model, unknown or missing fields, a
            `caption_projection_dim` that is not the width, or a value that `MMDiTConfig` refuses.
    """
    values = parse_json_object(text, source)
    if values.get("_class_name", _CLASS) != _CLASS:
        raise ValueError(f"{source}: _class_name must be {_CLASS!r}, got {values['_class_name']!r}")
    given = {name for name in values if not name.startswith("_")}
    unknown = sorted(given - _FIELDS.keys() - {_WIDTH})
    missing = sorted((_FIELDS.keys() | {_WIDTH}) - _ABSENT.keys() - given)
    if unknown or missing:
        raise ValueError(
            f"{source}: the fields are not those of {_CLASS}; "
            f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        )
    values = _ABSENT | {name: values[name] for name in given}
    for name, value in values.items():
        if isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"{source}: {name} must be at most {_LARGEST}, got {value}")
    dual, norm = values["dual_attention_layers"], values["qk_norm"]
    if not isinstance(dual, list) or not all(type(number) is int for number in dual):
        raise ValueError(f"{source}: dual_attention_layers must be a list of ints, got {dual!r}")
    if not isinstance(norm, str | None) or norm not in _QK_NORMS:
        raise ValueError(f"{source}: qk_norm must be None or 'rms_norm', got {norm!r}")
    options = {ours: values[theirs] for theirs, ours in _FIELDS.items()}
    options |= {"qk_norm": _QK_NORMS[norm], "dual_attention_layers": tuple(dual)}
    try:
        config = MMDiTConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    if values[_WIDTH] != config.width or type(values[_WIDTH]) is not int:
        raise ValueError(
            f"{source}: {_WIDTH} must be num_attention_heads*attention_head_dim={config.width}, "
            f"got {values[_WIDTH]!r}"
        )
    return config


def check_size(config: MMDiTConfig, arrays: Mapping[str, Any], source: str) -> None:
    """Refuses a configuration beside which the arrays are tiny, before its shapes are computed.

    That would take forever with a damaged number of layers, and overflow with a damaged width.

    Raises:
        ValueError: the model has far more blocks or parameters than the arrays.
    """
    width, side = config.width, config.pos_embed_max_size
    least = config.num_layers * 23 * width**2 + side**2 * width
    least += width * (config.joint_attention_dim + config.pooled_projection_dim + config.patch_dim)
    least += width * config.in_channels * config.patch_size**2
    held = sum(math.prod(array.shape) for array in arrays.values())
    if least > 16 * held or config.num_layers > max(2, len(arrays) // 8):
        raise ValueError(
            f"{source}: the weights do not fit the model; it has {config.num_layers} blocks and "
            f"more than {least} parameters, there are {len(arrays)} arrays of {held} values"
        )
