"""Configurations of diffusion language models as the `config.json` of LLaDA, SDAR and Qwen3.

Reading is strict: a field is ours, decides the computation and must have the value that we compute,
says nothing about it (`_PASSED_OVER`), or is refused. What may be absent means what their code
takes it for.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxgen.checkpoints.files import parse_json_object
from jaxgen.models.diffusion_lm import DiffusionLMConfig

type _Table[Value] = Mapping[str, Mapping[str, Value]]

_FIELDS: _Table[str] = {
    "llada": {
        "n_layers": "num_layers",
        "d_model": "width",
        "n_heads": "num_heads",
        "n_kv_heads": "num_kv_heads",
        "mlp_hidden_size": "ffn_dim",
        "embedding_size": "vocabulary_size",
        "mask_token_id": "mask_id",
        "weight_tying": "tied",
        "rope_theta": "rope_theta",
        "max_sequence_length": "max_tokens",
        "rms_norm_eps": "eps",
    },
    "sdar": {
        "num_hidden_layers": "num_layers",
        "hidden_size": "width",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "intermediate_size": "ffn_dim",
        "vocab_size": "vocabulary_size",
        "mask_token_id": "mask_id",
        "tie_word_embeddings": "tied",
        "rope_theta": "rope_theta",
        "max_position_embeddings": "max_tokens",
        "rms_norm_eps": "eps",
    },
}
# What else decides the computation, with the values that we compute; the first is written.
_FIXED: _Table[tuple[Any, ...]] = {
    "llada": {
        "activation_type": ("silu",),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False, None),  # None: as include_bias
        "block_type": ("llama",),
        "include_bias": (False,),
        "include_qkv_bias": (False,),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "multi_query_attention": (None,),
        "rope": (True,),
        "rope_full_precision": (True,),
        "rope_scaling": (None,),
        "scale_logits": (False,),
    },
    "sdar": {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
    },
}
# What may be absent of the fields that are ours. The mask of SDAR is that of its tokenizers: the
# configurations that were released first do not name it.
_QWEN3_ABSENT = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_ABSENT: _Table[Any] = {
    "llada": {"n_kv_heads": None, "max_sequence_length": 1024, "rms_norm_eps": 1e-5},
    "sdar": _QWEN3_ABSENT | {"mask_token_id": 151669},
    "qwen3": _QWEN3_ABSENT,
}
# What is fixed but means something else where it is absent, or what a field of ours may refer to.
_NEEDED = {
    "llada": {"activation_type", "block_type", "layer_norm_type", "rope", "vocab_size"},
    "sdar": set[str](),
}
# Training, generation, records, and what only counts with a field that is fixed. The list of layer
# types is checked on its own; whether LLaDA is tied is in another field.
_PASSED_OVER = {
    *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version"),
    *("dtype", "torch_dtype", "precision", "init_device", "use_cache"),
    *("attn_implementation", "_attn_implementation", "flash_attention", "flash_attn_varlen"),
    *("attention_dropout", "embedding_dropout", "residual_dropout"),
    *("initializer_range", "init_cutoff_factor", "init_fn", "init_std"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "block_size"),
    *("alibi_bias_max", "attention_layer_norm_with_affine", "block_group_size", "mlp_ratio"),
    *("debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint", "use_deepep"),
    *("max_window_layers", "sliding_window", "layer_types", "tie_word_embeddings"),
}
# What LLaDA's code drops unless told otherwise.
_DROPOUTS = ("attention_dropout", "embedding_dropout", "residual_dropout")
_NUMBERS = {"rope_theta", "rms_norm_eps"}
_SIZES = {name for fields in _FIELDS.values() for name in fields} - _NUMBERS
_SIZES -= {"mask_token_id", "weight_tying", "tie_word_embeddings"}  # the configuration checks these
_LARGEST = 2**20  # far beyond every size of a model; counting to a damaged one would not end
_ENDLESS = 1e30  # still finite in float32


def diffusion_lm_config_to_json(config: DiffusionLMConfig) -> str:
    """Returns the architecture as the `config.json` of SDAR if it has `qk_norm`, else of LLaDA.

    How to compute (dtypes, attention, remat, scan) is left to whoever loads it.

    Raises:
        ValueError: a model without `qk_norm` whose heads together are not as wide as its tokens,
            for which LLaDA has no word; or a value that `diffusion_lm_config_from_json` refuses.
    """
    layout = "sdar" if config.qk_norm else "llada"
    values: dict[str, Any] = {"model_type": layout}
    values |= {name: allowed[0] for name, allowed in _FIXED[layout].items()}
    values |= {theirs: getattr(config, ours) for theirs, ours in _FIELDS[layout].items()}
    for name in _FIELDS[layout]:
        _checked(values, name, "config")
    if config.qk_norm:
        values["architectures"] = ["SDARForCausalLM"]
    else:
        if config.num_heads * config.head_dim != config.width:
            raise ValueError(
                "without qk_norm the layout is LLaDA's, which needs num_heads*head_dim to be "
                f"width={config.width}, got {config.num_heads}*{config.head_dim}"
            )
        values |= {"architectures": ["LLaDAModelLM"], "vocab_size": config.vocabulary_size}
        values |= dict.fromkeys(_DROPOUTS, 0.0)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def diffusion_lm_config_from_json(
    text: str | bytes, source: str = "config", *, mask_id: int | None = None
) -> DiffusionLMConfig:
    """Reads the `config.json` of a LLaDA, an SDAR or a Qwen3.

    The base of the rotary angles may be `rope_theta` or, as transformers 5 writes it, in
    `rope_parameters`. LLaDA's `embedding_size`, the rows of its tables, is our vocabulary.

    Args:
        text: the JSON document.
        source: what to call it in an error, for example its path.
        mask_id: the token that stands for one not known yet, instead of `mask_token_id`. A Qwen3
            has none of its own; an SDAR whose configuration names none has 151669.

    Raises:
        ValueError: no JSON object, another kind of model, unknown or missing fields, no mask, or a
            value that is out of range.
    """
    values = parse_json_object(text, source)
    kind = values.get("model_type")
    if kind not in list(_ABSENT):  # a list: what cannot be hashed is refused, too
        raise ValueError(
            f"{source}: model_type must be {' or '.join(map(repr, _ABSENT))}, got {kind!r}"
        )
    layout = "llada" if kind == "llada" else "sdar"
    if mask_id is not None:
        values["mask_token_id"] = mask_id
    elif values.get("mask_token_id", 0) is None:
        del values["mask_token_id"]
    values = {**_ABSENT[kind], **_with_theta(values, source)}
    _check_fields(values, layout, source)
    if layout == "llada":
        values = _with_llada_sizes(values, source)
    options = {ours: _checked(values, theirs, source) for theirs, ours in _FIELDS[layout].items()}
    if layout == "llada":
        width, heads = options["width"], options["num_heads"]
        if width % heads:
            raise ValueError(
                f"{source}: n_heads must divide d_model, got n_heads={heads} and d_model={width}"
            )
        options["head_dim"] = width // heads
    try:
        return DiffusionLMConfig(**options, qk_norm=layout == "sdar")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _with_theta(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the fields with `rope_theta` instead of the `rope_parameters` of transformers 5."""
    values = dict(values)
    given = values.pop("rope_parameters", None)
    if given is None:
        return values
    if (
        not isinstance(given, dict)
        or not {"rope_theta"} <= given.keys() <= {"rope_theta", "rope_type"}
        or given.get("rope_type", "default") != "default"
    ):
        raise ValueError(
            f"{source}: rope_parameters must hold rope_theta and rope_type='default', got {given!r}"
        )
    theta = given["rope_theta"]
    if values.setdefault("rope_theta", theta) != theta:
        raise ValueError(
            f"{source}: rope_theta must be that of rope_parameters, got {values['rope_theta']!r} "
            f"and {theta!r}"
        )
    return values


def _check_fields(values: dict[str, Any], layout: str, source: str) -> None:
    """Raises ValueError for fields that are missing, unknown, or of another kind of model."""
    for name, allowed in _FIXED[layout].items():
        if name in values and values[name] not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise ValueError(f"{source}: {name} must be {choice}, got {values[name]!r}")
    layers = values.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)
    ):
        raise ValueError(f"{source}: layer_types must all be 'full_attention', got {layers!r}")
    needed = _FIELDS[layout].keys() | _NEEDED[layout]
    unknown = sorted(values.keys() - needed - _FIXED[layout].keys() - _PASSED_OVER)
    missing = sorted(needed - values.keys())
    if unknown or missing:
        hint = "; mask_id can be given by the caller" if "mask_token_id" in missing else ""
        raise ValueError(
            f"{source}: the fields are not those of a {values['model_type']} model; "
            f"unknown: {', '.join(unknown) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}{hint}"
        )


def _with_llada_sizes(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the fields of a LLaDA with those sizes that may be null: they repeat another."""
    values = dict(values)
    for name, other in (("n_kv_heads", "n_heads"), ("embedding_size", "vocab_size")):
        if values[name] is None:
            values[name] = values[other]
    rows, used = (_checked(values, name, source) for name in ("embedding_size", "vocab_size"))
    if used > rows:
        raise ValueError(
            f"{source}: embedding_size must be at least vocab_size, got {rows} and {used}"
        )
    return values


def _checked(values: Mapping[str, Any], name: str, source: str) -> Any:
    """Returns a field of theirs after checking its range, if it is a size or a number."""
    value = values[name]
    if name in _SIZES and (type(value) is not int or not 1 <= value <= _LARGEST):
        raise ValueError(f"{source}: {name} must be an int from 1 to {_LARGEST}, got {value!r}")
    if name in _NUMBERS:
        # An int of any size is a number of JSON, and so is infinity to Python.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < _ENDLESS:
            raise ValueError(
                f"{source}: {name} must be a positive number below {_ENDLESS:g}, got {value!r}"
            )
        return float(value)
    return value
