"""Diffusion language models in the key and folder layouts of LLaDA and of SDAR, which is Qwen3's.

A model with `qk_norm` is stored as SDAR, one without as LLaDA. In both a linear weight is
(out, in), ours (in, out); everything else is stored alike. In a block of LLaDA `ff_proj` is the
gate, `up_proj` what it multiplies and `ff_out` leads back; the head is called `ff_out`, too.

A folder holds `config.json` and `model.safetensors`, or shards of it with an index. A tied model
has no head of its own; older files hold a copy of the embedding in its place, which is passed over.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxgen.checkpoints.diffusion_lm_configs import (
    diffusion_lm_config_from_json,
    diffusion_lm_config_to_json,
)
from jaxgen.checkpoints.flat import UnreadArray, export_flat, fill, flat_shapes
from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.checkpoints.safetensors_files import check_arrays, load_safetensors, save_model_folder
from jaxgen.layers import AttentionName
from jaxgen.models.diffusion_lm import DiffusionLM, DiffusionLMConfig

_WEIGHTS = "model.safetensors"
_ROWS = 1024


class _Layout(NamedTuple):
    """The keys of one kind of model, without the `.weight` with which all of them end.

    Attributes:
        blocks: what comes before the number of a block.
        model: keys of the layers outside of the blocks, by our path.
        block: keys of the layers of a block, by our path.
    """

    blocks: str
    model: Mapping[str, str]
    block: Mapping[str, str]


_LLADA = _Layout(
    blocks="model.transformer.blocks",
    model={
        "embedding": "model.transformer.wte",
        "final_norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
    },
    block={
        "attention_norm": "attn_norm",
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "attention.output": "attn_out",
        "mlp_norm": "ff_norm",
        "mlp.gate": "ff_proj",
        "mlp.up": "up_proj",
        "mlp.down": "ff_out",
    },
)
_SDAR = _Layout(
    blocks="model.layers",
    model={
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    block={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
)


def diffusion_lm_shapes(config: DiffusionLMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the keys of a model, as released ones have, with their shapes.

    Nothing is allocated.
    """
    return dict(_shapes(config))


@functools.lru_cache(maxsize=8)
def _shapes(config: DiffusionLMConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Makes the model abstractly, which takes a second for the largest."""
    shapes = flat_shapes(lambda: DiffusionLM(config, rngs=nnx.Rngs(0)))
    return MappingProxyType(
        {
            _key(path, config): jax.ShapeDtypeStruct(_turn(path, shape.shape), shape.dtype)
            for path, shape in shapes.items()
        }
    )


def export_diffusion_lm(model: DiffusionLM) -> dict[str, np.ndarray]:
    """Returns the weights of a model by key, (out, in) and in the model's parameter dtype.

    All are on the host then; `save_diffusion_lm_folder` copies one after the other.
    """
    return {
        _key(path, model.config): _turn(path, array) for path, array in export_flat(model).items()
    }


def load_diffusion_lm(
    config: DiffusionLMConfig,
    arrays: Mapping[str, Any],
    source: str = "arrays",
    *,
    sharding: Placement = None,
    progress: Progress = None,
) -> DiffusionLM:
    """Makes a model from weights by the keys of LLaDA or SDAR, reading one after the other.

    Args:
        config: the model's configuration, of which `qk_norm` says whose keys; floats are converted
            to its `param_dtype`.
        arrays: the weights, a linear one (out, in). Beside a tied model there may be a head that
            equals the embedding.
        source: what to call the arrays in an error, for example the path of their file.
        sharding: where the parameters go: a sharding for all, or a function from our dotted path
            and shape of a parameter to one, see `decoder_sharding`; the default device if
            None.
        progress: called with the bytes loaded and those of all; True for a bar on stderr.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed; a head of a tied model that is
            not its embedding; or a sharding that does not fit. No model has been made then.
    """
    expected = diffusion_lm_shapes(config)
    embedding, head = (_key(f"{name}.x", config) for name in ("embedding", "head"))
    copied = config.tied and head in arrays
    if copied:
        expected[head] = expected[embedding]
    check_arrays(arrays, expected, source)
    if copied and not _equal(arrays[embedding], arrays[head]):
        raise ValueError(
            f"{source}: the model is tied, so {head} must be a copy of {embedding}, but the two "
            "differ"
        )
    return fill(
        nnx.eval_shape(lambda: DiffusionLM(config, rngs=nnx.Rngs(0))),
        lambda path: _turn(path, np.asarray(arrays[_key(path, config)])),
        source,
        sharding=sharding,
        progress=progress,
    )


def load_diffusion_lm_folder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    mask_id: int | None = None,
    attention: AttentionName = "exact",
    remat: bool = False,
    scan: bool = False,
    sharding: Placement = None,
    progress: Progress = None,
) -> DiffusionLM:
    """Loads a model from a folder of a released LLaDA, SDAR or Qwen3, or a saved one.

    Names and shapes are checked first. Then every array is read, converted and put in its place
    before the next one: next to the model itself, the host holds about one array.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards of it with an index.
        dtype: computation dtype.
        param_dtype: dtype of the parameters; `dtype` if None.
        mask_id: the token that stands for one not known yet, instead of the `mask_token_id` of the
            configuration; a Qwen3 has none of its own.
        attention: "exact" or "int8".
        remat: recompute each block in the backward pass.
        scan: compile one block and loop over the weights of all.
        sharding: where the parameters go: a `jax.sharding.Sharding` for all, or a function from
            the dotted path (`blocks.0.mlp.up.kernel`) and our shape of a parameter to one, see
            `decoder_sharding`; the default device if None.
        progress: called with the bytes loaded and those of all after each array; True for a bar
            on stderr.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        ValueError: another kind of model, no mask, a damaged file, weights that do not fit, or a
            sharding that does not.
        TypeError: a `sharding` that is none.
    """
    path, weights = Path(folder) / "config.json", Path(folder) / _WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    config = dataclasses.replace(
        diffusion_lm_config_from_json(path.read_bytes(), str(path), mask_id=mask_id),
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
        attention=attention,
        remat=remat,
        scan=scan,
    )
    arrays = load_safetensors(weights)
    source = str(weights if weights.exists() else f"{weights}.index.json")
    _check_size(config, arrays, f"{path}, {source}")
    return load_diffusion_lm(config, arrays, source, sharding=sharding, progress=progress)


def save_diffusion_lm_folder(
    folder: str | os.PathLike, model: DiffusionLM, *, max_shard_bytes: int | None = None
) -> None:
    """Writes a model as LLaDA or, if it has `qk_norm`, SDAR is published.

    Next to the model, the host holds about one array. The code that their `from_pretrained` runs is
    not written: it comes with the released folders.

    Args:
        folder: the folder, made if it does not exist.
        model: the model; the dtype of its parameters is that of the file.
        max_shard_bytes: most bytes of arrays in one file.

    Raises:
        ValueError: a configuration that LLaDA has no word for; nothing is written then.
    """
    folder, text = Path(folder), diffusion_lm_config_to_json(model.config)
    variables = nnx.to_flat_state(nnx.state(model))
    paths = {".".join(map(str, position)): variable for position, variable in variables}
    turn = lambda path: lambda array: _turn(path, array)
    arrays = {
        _key(path, model.config): UnreadArray(variable, _turn(path, variable.shape), turn(path))
        for path, variable in paths.items()
    }
    save_model_folder(folder, _WEIGHTS, arrays, text, max_shard_bytes=max_shard_bytes)


def _key(path: str, config: DiffusionLMConfig) -> str:
    """Translates the dotted path of one of our variables."""
    layout = _SDAR if config.qk_norm else _LLADA
    layer = path.rpartition(".")[0]
    if layer.startswith("blocks."):
        _, number, part = layer.split(".", 2)
        return f"{layout.blocks}.{number}.{layout.block[part]}.weight"
    return f"{layout.model[layer]}.weight"


def _turn(path: str, array: Any) -> Any:
    """Turns an array, or a shape, into the other layout: kernels are transposed."""
    if not path.endswith(".kernel"):
        return array
    return array[::-1] if isinstance(array, tuple) else array.T


def _equal(first: Any, second: Any) -> bool:
    """Whether two matrices are equal, without an array of all comparisons."""
    first, second = np.asarray(first), np.asarray(second)
    starts = range(0, first.shape[0], _ROWS)
    return all(np.array_equal(first[i : i + _ROWS], second[i : i + _ROWS]) for i in starts)


def _check_size(config: DiffusionLMConfig, arrays: Mapping[str, Any], source: str) -> None:
    """Refuses a configuration beside which the arrays are tiny, before its shapes are computed.

    That would take forever with a damaged number of layers, and overflow with a damaged width.

    Raises:
        ValueError: the model has far more blocks or parameters than the arrays.
    """
    heads = 2 * config.head_dim * (config.num_heads + config.num_kv_heads)
    least = config.num_layers * config.width * (heads + 3 * config.ffn_dim)
    least += config.width * config.vocabulary_size
    held = sum(math.prod(array.shape) for array in arrays.values())
    if least > 16 * held or config.num_layers > max(2, len(arrays) // 8):
        raise ValueError(
            f"{source}: the weights do not fit the model; it has {config.num_layers} blocks and "
            f"more than {least} parameters, there are {len(arrays)} arrays of {held} values"
        )
