"""Configurations of CLIP text models and T5 encoders in the words of the transformers library.

Reading is strict: a field decides the computation and is ours, decides it and must have the value
that we compute, says nothing about it (`_PASSED_OVER`), or is refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxgen.checkpoints.files import parse_json_object
from jaxgen.models.clip_text import CLIPTextConfig
from jaxgen.models.t5_encoder import T5EncoderConfig

_CLIP_FIELDS = {
    "hidden_size": "width",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "projection_dim": "projection_dim",
    "hidden_act": "activation",
    "vocab_size": "vocabulary_size",
    "max_position_embeddings": "max_tokens",
    "layer_norm_eps": "eps",
    "eos_token_id": "eos_token_id",
}
_CLIP_DEFAULTS = {"eos_token_id": 49407}  # theirs; the other defaults are those of `CLIPTextConfig`
_T5_FIELDS = {
    "d_model": "width",
    "d_ff": "ffn_dim",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "vocab_size": "vocabulary_size",
    "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
}
# What else decides the computation, with the values that we compute.
_CLIP_FIXED = {"model_type": ("clip_text_model",)}
_T5_FIXED = {
    "model_type": ("t5", "umt5"),
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,),
    "is_decoder": (False,),
}
_REQUIRED = {
    "clip": {"model_type", "num_hidden_layers", "num_attention_heads", "projection_dim"}
    | {"hidden_size", "intermediate_size"},
    "t5": {"model_type", "num_layers", "num_heads", "d_model", "d_ff", "feed_forward_proj"}
    | {"vocab_size"},
}
# Training, generation, the decoder that an encoder lacks, and records.
_PASSED_OVER = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("attention_dropout", "classifier_dropout", "dropout", "dropout_rate"),
    *("initializer_factor", "initializer_range", "use_cache", "output_past"),
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "tokenizer_class"),
    *("is_encoder_decoder", "num_decoder_layers", "tie_word_embeddings", "task_specific_params"),
    *("n_positions", "scalable_attention", "scale_decoder_outputs"),
}


def clip_text_config_to_json(config: CLIPTextConfig) -> str:
    """Returns the architecture in the words of transformers, as the `config.json` of a folder.

    How to compute (dtypes, scan) is left to whoever loads it.
    """
    values = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
    values |= {theirs: getattr(config, ours) for theirs, ours in _CLIP_FIELDS.items()}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def t5_config_to_json(config: T5EncoderConfig) -> str:
    """Returns the architecture in the words of transformers, as the `config.json` of a folder.

    How to compute (dtypes, scan) is left to whoever loads it.
    """
    kind = "T5" if config.shared_positions else "UMT5"
    values = {"architectures": [f"{kind}EncoderModel"], "model_type": kind.lower()}
    values |= {"feed_forward_proj": "gated-gelu"}
    values |= {theirs: getattr(config, ours) for theirs, ours in _T5_FIELDS.items()}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def clip_text_config_from_json(text: str, source: str = "config") -> CLIPTextConfig:
    """Reads the `config.json` of a CLIP text model.

    Args:
        text: the JSON document.
        source: what to call it in an error, for example its path.

    Raises:
        ValueError: no JSON object, another kind of model, unknown or missing fields, or a value
            that `CLIPTextConfig` refuses.
    """
    values = _CLIP_DEFAULTS | parse_json_object(text, source)
    _check_fields(values, _CLIP_FIELDS, _CLIP_FIXED, _REQUIRED["clip"], source)
    return _make(CLIPTextConfig, values, _CLIP_FIELDS, source)


def t5_config_from_json(text: str, source: str = "config") -> T5EncoderConfig:
    """Reads the `config.json` of a T5 v1.1 or umT5 model.

    Args:
        text: the JSON document.
        source: what to call it in an error, for example its path.

    Raises:
        ValueError: no JSON object, another kind of model such as the first T5 (`relu`), unknown or
            missing fields, or a value that `T5EncoderConfig` refuses.
    """
    values = parse_json_object(text, source)
    # The id that ends a text is the tokenizer's business here.
    known = _T5_FIELDS | {"eos_token_id": None}
    _check_fields(values, known, _T5_FIXED, _REQUIRED["t5"], source)
    shared = values["model_type"] == "t5"
    return _make(T5EncoderConfig, values, _T5_FIELDS, source, shared_positions=shared)


def _check_fields(
    values: Mapping[str, Any],
    fields: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    required: set[str],
    source: str,
) -> None:
    """Raises ValueError for fields that are missing, unknown, or of another kind of model."""
    for name, allowed in fixed.items():
        if name in values and values[name] not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise ValueError(f"{source}: {name} must be {choice}, got {values[name]!r}")
    unknown = sorted(values.keys() - fields.keys() - fixed.keys() - _PASSED_OVER)
    missing = sorted(required - values.keys())
    if unknown or missing:
        raise ValueError(
            f"{source}: the fields are not those of a {' or '.join(fixed['model_type'])} model; "
            f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        )


def _make[Config](
    kind: type[Config],
    values: Mapping[str, Any],
    fields: Mapping[str, str],
    source: str,
    **options: Any,
) -> Config:
    """Makes a configuration from those fields that are ours."""
    options |= {ours: values[theirs] for theirs, ours in fields.items() if theirs in values}
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
