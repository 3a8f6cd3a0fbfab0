"""Configurations of LLaDA and SDAR in the words of the released ones."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.checkpoints import (
    config_from_json,
    config_to_json,
    diffusion_lm_config_from_json,
    diffusion_lm_config_to_json,
)
from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLMConfig
from tests.jaxgen.checkpoints.diffusion_lm_files import (
    NAMES,
    config_of,
)

# The fields of released models.
LLADA_8B = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
SDAR_4B = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
    "bos_token_id": 151643,
    "debug": False,
    "eos_token_id": 151643,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SDAR_8B = {"hidden_size": 4096, "intermediate_size": 12288}
SDAR_1_7B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
SDAR_1_7B |= {"num_attention_heads": 16, "mask_token_id": 151669, "block_size": 4}


def _read(document, **changes):
    values = {name: value for name, value in (document | changes).items() if value != "absent"}
    return diffusion_lm_config_from_json(json.dumps(values), "here")


def test_documents_like_those_of_released_models_are_the_presets():
    assert _read(LLADA_8B) == DIFFUSION_LM_PRESETS["llada-8b"]
    assert _read(SDAR_4B) == DIFFUSION_LM_PRESETS["sdar-4b"]
    assert _read(SDAR_4B | SDAR_8B) == DIFFUSION_LM_PRESETS["sdar-8b"]
    assert _read(SDAR_4B | SDAR_1_7B) == DIFFUSION_LM_PRESETS["sdar-1.7b"]


def test_configurations_round_trip():
    layouts = {"llada": "LLaDAModelLM", "sdar": "SDARForCausalLM"}
    configs = [*DIFFUSION_LM_PRESETS.values(), *map(config_of, NAMES)]
    configs += [dataclasses.replace(config_of("llada"), tied=True, num_kv_heads=2, head_dim=8)]
    for config in configs:
        text = diffusion_lm_config_to_json(config)
        assert diffusion_lm_config_from_json(text) == config
        values = json.loads(text)
        assert values["model_type"] == ("sdar" if config.qk_norm else "llada")
        assert values["architectures"] == [layouts[values["model_type"]]]
        computed = dataclasses.replace(
            config, dtype=jnp.bfloat16, attention="int8", remat=True, scan=True
        )
        assert diffusion_lm_config_to_json(computed) == text
        assert config_from_json(DiffusionLMConfig, config_to_json(computed)) == computed


@pytest.mark.parametrize("name", ["llada", "sdar"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 2**20 + 1}, "must be an int from 1 to 1048576, got 1048577$"),
        ({"ffn_dim": 2**20 + 1}, "must be an int from 1 to 1048576, got 1048577$"),
        ({"rope_theta": 1e30}, r"rope_theta must be a positive number below 1e\+30, got 1e\+30$"),
        ({"rope_theta": 10**400}, r"rope_theta must be a positive number below 1e\+30, got 10"),
        ({"eps": 1e31}, r"rms_norm_eps must be a positive number below 1e\+30, got 1e\+31$"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(name, changes, message):
    config = dataclasses.replace(config_of(name), **changes)
    with pytest.raises(ValueError, match=f"^config: .*{message}"):
        diffusion_lm_config_to_json(config)


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_the_largest_numbers_are_read_back(name):
    largest = {"max_tokens": 2**20, "rope_theta": np.float64(9e29), "eps": np.float64(1e-3)}
    config = dataclasses.replace(config_of(name), **largest)
    assert diffusion_lm_config_from_json(diffusion_lm_config_to_json(config)) == config


def test_the_base_of_the_angles_may_be_where_transformers_5_writes_it():
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    for document in (SDAR_4B, LLADA_8B | {"rope_theta": 1e6}):
        wanted = _read(document)
        assert _read(document, rope_theta="absent", rope_parameters=rope) == wanted
        assert _read(document, rope_parameters={"rope_theta": 1_000_000}) == wanted
        assert _read(document, rope_parameters=None) == wanted


def test_fields_that_may_be_absent():
    absent = dict.fromkeys(["max_position_embeddings", "rms_norm_eps", "rope_scaling"], "absent")
    absent |= dict.fromkeys(["tie_word_embeddings", "use_sliding_window", "head"], "absent")
    assert _read(SDAR_4B, **absent) == DIFFUSION_LM_PRESETS["sdar-4b"]
    config = _read(LLADA_8B, n_kv_heads=None, embedding_size=None, rms_norm_eps="absent")
    assert config == DIFFUSION_LM_PRESETS["llada-8b"]
    # There is more of the tables than tokens.
    assert _read(LLADA_8B, vocab_size=126349).vocabulary_size == 126464
    assert _read(LLADA_8B, n_kv_heads=8).num_kv_heads == 8


def test_the_mask_is_that_of_the_caller_the_file_or_sdar():
    read = lambda changes, mask_id=None: diffusion_lm_config_from_json(
        json.dumps(SDAR_4B | changes), "here", mask_id=mask_id
    )
    for document in ({}, {"mask_token_id": None}):
        assert read(document).mask_id == 151669
        assert read(document, 7).mask_id == 7
    assert read({"mask_token_id": 8}).mask_id == 8
    assert read({"mask_token_id": 8}, 7).mask_id == 7
    qwen3 = {"model_type": "qwen3"}
    assert read(qwen3, 7).mask_id == 7
    assert read(qwen3 | {"mask_token_id": 8}).mask_id == 8
    with pytest.raises(ValueError, match="missing: mask_token_id; mask_id can be given by the cal"):
        read(qwen3)
    with pytest.raises(ValueError, match=r"^here: mask_id must be a token, below vocab"):
        read({"vocab_size": 1000})


@pytest.mark.parametrize(
    ("document", "changes", "message"),
    [
        (SDAR_4B, {"model_type": "llama"}, "model_type must be 'llada' or .*, got 'llama'$"),
        (SDAR_4B, {"model_type": ["sdar"]}, "model_type must be"),
        (SDAR_4B, {"model_type": "absent"}, "model_type must be .*, got None$"),
        (SDAR_4B, {"num_experts": 8}, "not those of a sdar model; unknown: num_experts; missing"),
        (SDAR_4B, {"block_causal_prompt": True}, "unknown: block_causal_prompt; missing: none$"),
        (SDAR_4B, {"head_dim": "absent"}, "unknown: none; missing: head_dim$"),
        (SDAR_4B, {"rope_theta": "absent"}, "unknown: none; missing: rope_theta$"),
        (SDAR_4B, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'$"),
        (SDAR_4B, {"attention_bias": True}, "attention_bias must be False, got True$"),
        (SDAR_4B, {"use_sliding_window": True}, "use_sliding_window must be False, got True$"),
        (SDAR_4B, {"rope_scaling": {"type": "yarn"}}, "rope_scaling must be None, got"),
        (SDAR_4B, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters must hold"),
        (SDAR_4B, {"rope_parameters": 1e6}, "rope_parameters must hold .*, got 1000000.0$"),
        (
            SDAR_4B,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "rope_parameters must hold rope_theta and rope_type='default', got",
        ),
        (
            SDAR_4B,
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "rope_parameters must hold",
        ),
        (
            SDAR_4B,
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta must be that of rope_parameters, got 1000000 and 10000.0$",
        ),
        (SDAR_4B, {"layer_types": ["sliding_attention"]}, "layer_types must all be 'full_attenti"),
        (SDAR_4B, {"layer_types": 3}, "layer_types must all be 'full_attention', got 3$"),
        (SDAR_4B, {"num_hidden_layers": 10**9}, "num_hidden_layers must be an int from 1 to 10485"),
        (SDAR_4B, {"hidden_size": 2560.0}, "hidden_size must be an int from 1 to .*, got 2560.0$"),
        (SDAR_4B, {"num_attention_heads": True}, "num_attention_heads must be an int .*, got True"),
        (SDAR_4B, {"num_key_value_heads": None}, "num_key_value_heads must be an int .*, got None"),
        (SDAR_4B, {"num_key_value_heads": 5}, "num_kv_heads must divide num_heads"),
        (SDAR_4B, {"head_dim": 127}, "head_dim must be even, got 127$"),
        (
            SDAR_4B,
            {"rope_theta": float("inf")},
            "rope_theta must be a positive number below 1e\\+30, got inf$",
        ),
        (SDAR_4B, {"rope_theta": 10**400}, "rope_theta must be a positive number"),
        (SDAR_4B, {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number .*, got 0$"),
        (
            SDAR_4B,
            {"rms_norm_eps": "1e-6"},
            "rms_norm_eps must be a positive number .*, got '1e-6'$",
        ),
        (SDAR_4B, {"tie_word_embeddings": 1}, "tied must be True or False, got 1$"),
        (SDAR_4B, {"mask_token_id": "<|MASK|>"}, "mask_id must be an int, got '<|MASK|>'$"),
        (LLADA_8B, {"include_bias": True}, "include_bias must be False, got True$"),
        (LLADA_8B, {"bias_for_layer_norm": True}, "bias_for_layer_norm must be False or None, got"),
        (LLADA_8B, {"alibi": True}, "alibi must be False, got True$"),
        (LLADA_8B, {"rope": False}, "rope must be True, got False$"),
        (LLADA_8B, {"rope": "absent"}, "not those of a llada model; unknown: none; missing: rope$"),
        (LLADA_8B, {"block_type": "sequential"}, "block_type must be 'llama', got 'sequential'$"),
        (LLADA_8B, {"layer_norm_type": "default"}, "layer_norm_type must be 'rms', got 'default'$"),
        (LLADA_8B, {"activation_type": "absent"}, "missing: activation_type$"),
        (LLADA_8B, {"attention_layer_norm": True}, "attention_layer_norm must be False, got True$"),
        (LLADA_8B, {"scale_logits": True}, "scale_logits must be False, got True$"),
        (LLADA_8B, {"weight_tying": "absent"}, "missing: weight_tying$"),
        (LLADA_8B, {"mask_token_id": None}, "missing: mask_token_id; mask_id can be given"),
        (
            LLADA_8B,
            {"n_heads": 33},
            "n_heads must divide d_model, got n_heads=33 and d_model=4096$",
        ),
        (LLADA_8B, {"n_heads": 0}, "n_heads must be an int from 1 to 1048576, got 0$"),
        (
            LLADA_8B,
            {"vocab_size": 126465},
            "embedding_size must be at least vocab_size, got 126464",
        ),
        (LLADA_8B, {"hidden_size": 4096}, "unknown: hidden_size; missing: none$"),
    ],
)
def test_wrong_configurations_are_refused(document, changes, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        _read(document, **changes)
