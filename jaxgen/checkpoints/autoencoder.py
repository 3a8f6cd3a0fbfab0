"""The image autoencoder in the layouts in which it is published: diffusers' folders, single files.

In both a convolution is (out, in, rows, columns), ours (rows, columns, in, out), and a linear
weight (out, in), ours (in, out). A folder of diffusers holds `config.json` and
`diffusion_pytorch_model.safetensors`, or shards of it with an index; older ones name the
projections of the attention otherwise. Single files, as of Stable Diffusion 3, hold all parts of
a pipeline, the autoencoder below `first_stage_model.`; there the projections of the attention are
1x1 convolutions, and the levels of the decoder are counted from the highest resolution.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxgen.checkpoints.files import parse_json_object
from jaxgen.checkpoints.flat import export_flat, flat_shapes
from jaxgen.checkpoints.safetensors_files import check_arrays, load_safetensors, save_model_folder
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.autoencoder_config import AUTOENCODER_PRESETS, AutoencoderConfig


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How published weights are named and shaped.

    Attributes:
        places: our paths of layers, blocks and attentions, numbers written #, and their names.
        block: the layers of a residual block.
        attention: the layers of an attention.
        original: the projections of attentions are 1x1 convolutions, and the levels of the
            decoder are counted backwards.
    """

    places: Mapping[str, str]
    block: Mapping[str, str]
    attention: Mapping[str, str]
    original: bool


_SAME = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
_QUANT = {"quant": "quant_conv", "post_quant": "post_quant_conv"}
_BLOCK = {"norm_in": "norm1", "conv_in": "conv1", "norm_out": "norm2", "conv_out": "conv2"}

_DIFFUSERS = _Layout(
    places={name: name for name in _SAME}
    | _QUANT
    | {
        "encoder.levels.#.blocks.#": "encoder.down_blocks.{}.resnets.{}",
        "encoder.levels.#.halve": "encoder.down_blocks.{}.downsamplers.0.conv",
        "encoder.middle.block_in": "encoder.mid_block.resnets.0",
        "encoder.middle.attention": "encoder.mid_block.attentions.0",
        "encoder.middle.block_out": "encoder.mid_block.resnets.1",
        "encoder.norm_out": "encoder.conv_norm_out",
        "decoder.middle.block_in": "decoder.mid_block.resnets.0",
        "decoder.middle.attention": "decoder.mid_block.attentions.0",
        "decoder.middle.block_out": "decoder.mid_block.resnets.1",
        "decoder.levels.#.blocks.#": "decoder.up_blocks.{}.resnets.{}",
        "decoder.levels.#.double": "decoder.up_blocks.{}.upsamplers.0.conv",
        "decoder.norm_out": "decoder.conv_norm_out",
    },
    block=_BLOCK | {"shortcut": "conv_shortcut"},
    attention={
        "norm": "group_norm",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "output": "to_out.0",
    },
    original=False,
)
_ORIGINAL = _Layout(
    places={name: name for name in _SAME}
    | _QUANT
    | {
        "encoder.levels.#.blocks.#": "encoder.down.{}.block.{}",
        "encoder.levels.#.halve": "encoder.down.{}.downsample.conv",
        "encoder.middle.block_in": "encoder.mid.block_1",
        "encoder.middle.attention": "encoder.mid.attn_1",
        "encoder.middle.block_out": "encoder.mid.block_2",
        "encoder.norm_out": "encoder.norm_out",
        "decoder.middle.block_in": "decoder.mid.block_1",
        "decoder.middle.attention": "decoder.mid.attn_1",
        "decoder.middle.block_out": "decoder.mid.block_2",
        "decoder.levels.#.blocks.#": "decoder.up.{}.block.{}",
        "decoder.levels.#.double": "decoder.up.{}.upsample.conv",
        "decoder.norm_out": "decoder.norm_out",
    },
    block=_BLOCK | {"shortcut": "nin_shortcut"},
    attention={"norm": "norm", "query": "q", "key": "k", "value": "v", "output": "proj_out"},
    original=True,
)
_PREFIX = "first_stage_model."
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# What diffusers called the projections of an attention until 2023.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_KEY = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")

_CLASS = "AutoencoderKL"
_REQUIRED = ("block_out_channels", "latent_channels", "layers_per_block")
# The other fields, with what diffusers takes if they are absent.
_OPTIONAL = {
    "in_channels": 3,
    "out_channels": 3,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def autoencoder_shapes(config: AutoencoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the diffusers keys of a model with their shapes; nothing is allocated."""
    shapes = flat_shapes(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    return {
        _key(path, config, _DIFFUSERS): _shape(path, shape, _DIFFUSERS)
        for path, shape in shapes.items()
    }


def export_autoencoder(model: Autoencoder) -> dict[str, np.ndarray]:
    """Returns the weights of a model by diffusers key, in the dtype of its parameters."""
    return {
        _key(path, model.config, _DIFFUSERS): _from_ours(path, array, _DIFFUSERS)
        for path, array in export_flat(model).items()
    }


def load_autoencoder(
    config: AutoencoderConfig, arrays: Mapping[str, Any], source: str = "arrays"
) -> Autoencoder:
    """Makes a model from weights in the diffusers layout.

    Args:
        config: the model's configuration; floats are converted to its `param_dtype`.
        arrays: the weights by diffusers key; those of the attention may have the names of old
            files (`query`, `key`, `value`, `proj_attn`).
        source: what to call the arrays in an error, for example the path of their file.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed.
    """
    renamed = {_modern(key, arrays): array for key, array in arrays.items()}
    return _load(config, renamed, source, _DIFFUSERS)


def autoencoder_from_single_file(
    arrays: Mapping[str, Any],
    config: AutoencoderConfig = AUTOENCODER_PRESETS["stable-diffusion-3"],
    source: str = "arrays",
) -> Autoencoder:
    """Makes a model from weights in the layout of the original single files.

    Args:
        arrays: the weights by original key. If keys start with `first_stage_model.`, those are
            the autoencoder and all others are passed over; if none does, all are.
        config: the model's configuration, which such files do not tell; floats are converted to
            its `param_dtype`.
        source: what to call the arrays in an error, for example the path of their file.

    Raises:
        ValueError: missing, unused or misshapen arrays of the autoencoder, all listed.
    """
    chosen = {key: array for key, array in arrays.items() if key.startswith(_PREFIX)}
    if chosen:
        return _load(config, chosen, source, _ORIGINAL, _PREFIX)
    return _load(config, arrays, source, _ORIGINAL)


def save_autoencoder_folder(
    folder: str | os.PathLike, model: Autoencoder, *, max_shard_bytes: int | None = None
) -> None:
    """Writes a model as diffusers does, so that its `from_pretrained` loads it.

    Args:
        folder: the folder of the autoencoder, made if it does not exist.
        model: the model; the dtype of its parameters is that of the file.
        max_shard_bytes: most bytes of arrays in one file.
    """
    folder, text = Path(folder), autoencoder_config_to_json(model.config)
    save_model_folder(
        folder, _WEIGHTS, export_autoencoder(model), text, max_shard_bytes=max_shard_bytes
    )


def load_autoencoder_folder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
) -> Autoencoder:
    """Loads a model from a folder that diffusers wrote, or `save_autoencoder_folder`.

    Args:
        folder: the folder of the autoencoder, or that of a pipeline with `vae` in it.
        dtype: computation dtype; see `force_upcast` of `AutoencoderConfig` for float16.
        param_dtype: dtype of the parameters; `dtype` if None.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        ValueError: another kind of model, a damaged file, or weights that do not fit.
    """
    folder = Path(folder)
    # The configuration of a pipeline is model_index.json.
    if not (folder / "config.json").exists() and (folder / "vae").is_dir():
        folder = folder / "vae"
    path, weights = folder / "config.json", folder / _WEIGHTS
    config = dataclasses.replace(
        autoencoder_config_from_json(path.read_text(encoding="utf-8"), str(path)),
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
    )
    return load_autoencoder(config, load_safetensors(weights), str(weights))


def autoencoder_config_to_json(config: AutoencoderConfig) -> str:
    """Returns the architecture in the words of diffusers, as the `config.json` of a `vae` folder.

    How to compute (the dtypes) is left to whoever loads it.
    """
    values = _fixed(len(config.block_out_channels))
    values |= {name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def autoencoder_config_from_json(text: str, source: str = "config") -> AutoencoderConfig:
    """Reads a `config.json` of diffusers; what older versions left out is what diffusers assumes.

    Args:
        text: the JSON document.
        source: what to call it in an error, for example its path.

    Raises:
        ValueError: no JSON object, another class of model or kind of level, normalization of
            latents by channel, unknown or missing fields, or a value that `AutoencoderConfig`
            refuses.
    """
    values = parse_json_object(text, source)
    levels = values.get("block_out_channels")
    fixed = _fixed(len(levels) if isinstance(levels, list) else 0)
    if values.get("_class_name", _CLASS) != _CLASS:
        raise ValueError(f"{source}: _class_name must be {_CLASS!r}, got {values['_class_name']!r}")
    given = {name for name in values if not name.startswith("_")}
    unknown = sorted(given - fixed.keys() - _OPTIONAL.keys() - {*_REQUIRED})
    missing = sorted({*_REQUIRED} - given)
    if unknown or missing:
        raise ValueError(
            f"{source}: the fields are not those of {_CLASS}; "
            f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        )
    for name, allowed in fixed.items():
        if values.get(name, allowed) != allowed:
            raise ValueError(f"{source}: {name} must be {allowed!r}, got {values[name]!r}")
    options = _OPTIONAL | {name: values[name] for name in given - fixed.keys()}
    if options["shift_factor"] is None:
        options["shift_factor"] = 0.0
    try:
        return AutoencoderConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _fixed(levels: int) -> dict[str, Any]:
    """What else a configuration of diffusers says, with the only value that is this model."""
    return {
        "_class_name": _CLASS,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
    }


def _load(
    config: AutoencoderConfig,
    arrays: Mapping[str, Any],
    source: str,
    layout: _Layout,
    prefix: str = "",
) -> Autoencoder:
    """Makes a model from arrays of this layout, whose keys start with `prefix`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))
    variables = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    keys = {path: prefix + _key(path, config, layout) for path in variables}
    expected = {
        keys[path]: _shape(path, variable.get_raw_value(), layout)
        for path, (_, variable) in variables.items()
    }
    check_arrays(arrays, expected, source)
    filled = []
    for path, (position, variable) in variables.items():
        array = _to_ours(path, np.asarray(arrays[keys[path]]), layout)
        filled.append((position, variable.replace(jnp.array(array, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _shape(path: str, ours: Any, layout: _Layout) -> jax.ShapeDtypeStruct:
    """Shape and dtype that one of our arrays has in a layout."""
    empty = np.broadcast_to(np.zeros((), ours.dtype), ours.shape)  # takes no memory
    return jax.ShapeDtypeStruct(_from_ours(path, empty, layout).shape, ours.dtype)


def _key(path: str, config: AutoencoderConfig, layout: _Layout) -> str:
    """Translates the dotted path of one of our variables."""
    layer, _, parameter = path.rpartition(".")
    place, name = re.sub(r"\d+", "#", layer), ""
    if place not in layout.places:
        place, _, name = place.rpartition(".")
        names = layout.attention if place.endswith("attention") else layout.block
        name = f".{names[name]}"
    numbers = [int(number) for number in re.findall(r"\d+", layer)]
    if layout.original and place.startswith("decoder.levels"):
        numbers[0] = len(config.block_out_channels) - 1 - numbers[0]
    return f"{layout.places[place].format(*numbers)}{name}.{_PARAMETERS[parameter]}"


def _modern(key: str, arrays: Mapping[str, Any]) -> str:
    """The present name of a key of an old file, unless the file also has that."""
    old = _OLD_KEY.fullmatch(key)
    if old is None:
        return key
    renamed = f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}"
    return key if renamed in arrays else renamed


def _from_ours(path: str, array: Any, layout: _Layout) -> Any:
    """Turns one of our arrays into those of a layout."""
    if not path.endswith(".kernel"):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T[:, :, None, None] if layout.original else array.T


def _to_ours(path: str, array: np.ndarray, layout: _Layout) -> np.ndarray:
    """Turns an array of a layout into ours."""
    if not path.endswith(".kernel"):
        return array
    if ".attention." in path:
        return array[:, :, 0, 0].T if layout.original else array.T
    return array.transpose(2, 3, 1, 0)
