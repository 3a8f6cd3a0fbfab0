import dataclasses
import functools
import json
import math
import random
import shutil
import tracemalloc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.checkpoints import (
    config_from_json,
    config_to_json,
    diffusion_lm_config_from_json,
    diffusion_lm_config_to_json,
    diffusion_lm_shapes,
    diffusion_lm_sharding,
    export_diffusion_lm,
    export_flat,
    flat_shapes,
    load_diffusion_lm,
    load_diffusion_lm_folder,
    load_safetensors,
    save_diffusion_lm_folder,
    save_safetensors,
)
from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLM, DiffusionLMConfig

FILES = Path(__file__).parents[2] / "goldens/language_models"
NAMES = ["sdar", "qwen3_tied", "llada"]
EXAMPLES = [("sdar", "blocks"), ("sdar", "doubled"), ("qwen3_tied", "blocks")]
EXAMPLES += [("qwen3_tied", "padded"), ("llada", "full"), ("llada", "padded")]
MASKS = {"qwen3_tied": 60}
WEIGHTS = "model.safetensors"
HEADS = {"sdar": "lm_head.weight", "llada": "model.transformer.ff_out.weight"}
EMBEDDINGS = {"sdar": "model.embed_tokens.weight", "llada": "model.transformer.wte.weight"}


def _load(name, folder=None, **options):
    """Loads a golden, or a changed copy of it."""
    options = {"dtype": jnp.float32, "mask_id": MASKS.get(name)} | options
    return load_diffusion_lm_folder(FILES / name if folder is None else folder, **options)


def _weights(name):
    return load_safetensors(FILES / name / WEIGHTS)


@functools.cache
def _config(name):
    text = (FILES / name / "config.json").read_text()
    return diffusion_lm_config_from_json(text, mask_id=MASKS.get(name))


def _copy(name, folder):
    """A copy of a golden that may be changed."""
    shutil.copytree(FILES / name, folder, ignore=shutil.ignore_patterns("example.*"))
    return folder


@nnx.jit
def _run(model, tokens, positions, mask):
    return model(tokens, positions, mask)


def _error(found, wanted):
    """The largest difference relative to the largest value."""
    return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


def _logits(name, example, model):
    """The logits of a model on an example, and those of transformers."""
    arrays = load_safetensors(FILES / name / "example.safetensors")
    tokens, positions, mask, logits = (
        arrays[f"{example}.{field}"] for field in ("tokens", "positions", "mask", "logits")
    )
    # Of one shape, so that two examples share what is compiled.
    positions = np.broadcast_to(positions, tokens.shape)
    mask = np.broadcast_to(mask, (*tokens.shape, tokens.shape[1]))
    return _run(model, *map(jnp.asarray, (tokens, positions, mask))), logits


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_models_agree_with_transformers(name, example):
    found, wanted = _logits(name, example, _load(name))
    assert found.dtype == jnp.float32
    assert _error(found, wanted) <= 3e-6  # measured: 0.5e-6 to 1.0e-6


def test_a_scanned_model_agrees_with_transformers():
    found, wanted = _logits("sdar", "blocks", _load("sdar", scan=True))
    assert _error(found, wanted) <= 3e-6


def test_how_to_compute_is_an_argument():
    options = {"param_dtype": jnp.bfloat16, "attention": "int8", "remat": True, "scan": True}
    model = _load("llada", **options)
    for name, value in options.items():
        assert getattr(model.config, name) == value
    assert model.config.dtype == jnp.float32
    for key, array in export_diffusion_lm(model).items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, _weights("llada")[key].astype(jnp.bfloat16))
    assert _load("llada", dtype=jnp.bfloat16).config.param_dtype == jnp.bfloat16


LLADA_KEYS = {
    "embedding.embedding": "model.transformer.wte.weight",
    "blocks.1.attention_norm.scale": "model.transformer.blocks.1.attn_norm.weight",
    "blocks.1.attention.query.kernel": "model.transformer.blocks.1.q_proj.weight",
    "blocks.1.attention.key.kernel": "model.transformer.blocks.1.k_proj.weight",
    "blocks.1.attention.value.kernel": "model.transformer.blocks.1.v_proj.weight",
    "blocks.1.attention.output.kernel": "model.transformer.blocks.1.attn_out.weight",
    "blocks.1.mlp_norm.scale": "model.transformer.blocks.1.ff_norm.weight",
    "blocks.1.mlp.gate.kernel": "model.transformer.blocks.1.ff_proj.weight",
    "blocks.1.mlp.up.kernel": "model.transformer.blocks.1.up_proj.weight",
    "blocks.1.mlp.down.kernel": "model.transformer.blocks.1.ff_out.weight",
    "final_norm.scale": "model.transformer.ln_f.weight",
    "head.kernel": "model.transformer.ff_out.weight",
}
SDAR_KEYS = {
    "embedding.embedding": "model.embed_tokens.weight",
    "blocks.1.attention_norm.scale": "model.layers.1.input_layernorm.weight",
    "blocks.1.attention.query.kernel": "model.layers.1.self_attn.q_proj.weight",
    "blocks.1.attention.key.kernel": "model.layers.1.self_attn.k_proj.weight",
    "blocks.1.attention.value.kernel": "model.layers.1.self_attn.v_proj.weight",
    "blocks.1.attention.query_norm.scale": "model.layers.1.self_attn.q_norm.weight",
    "blocks.1.attention.key_norm.scale": "model.layers.1.self_attn.k_norm.weight",
    "blocks.1.attention.output.kernel": "model.layers.1.self_attn.o_proj.weight",
    "blocks.1.mlp_norm.scale": "model.layers.1.post_attention_layernorm.weight",
    "blocks.1.mlp.gate.kernel": "model.layers.1.mlp.gate_proj.weight",
    "blocks.1.mlp.up.kernel": "model.layers.1.mlp.up_proj.weight",
    "blocks.1.mlp.down.kernel": "model.layers.1.mlp.down_proj.weight",
    "final_norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}


@pytest.mark.parametrize(
    ("name", "keys"), [("llada", LLADA_KEYS), ("sdar", SDAR_KEYS), ("qwen3_tied", SDAR_KEYS)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_array_has_its_place_bit_for_bit(name, keys, dtype):
    config = dataclasses.replace(_config(name), dtype=dtype, param_dtype=dtype)
    weights = {key: array.astype(dtype) for key, array in _weights(name).items()}
    model = load_diffusion_lm(config, weights)
    ours = export_flat(model)
    for path, key in keys.items():
        if path == "head.kernel" and config.tied:
            assert path not in ours
            continue
        array = weights[key].T if path.endswith("kernel") else weights[key]
        np.testing.assert_array_equal(ours[path], array, err_msg=key)
    exported = export_diffusion_lm(model)
    shapes = diffusion_lm_shapes(config)
    assert exported.keys() == weights.keys() == shapes.keys()
    assert len(ours) == len(exported)
    for key, array in weights.items():
        assert exported[key].dtype == shapes[key].dtype == dtype
        assert exported[key].shape == shapes[key].shape
        np.testing.assert_array_equal(exported[key], array, err_msg=key)


@pytest.mark.parametrize(
    ("name", "parameters", "arrays"),
    [
        ("llada-8b", 8_015_581_184, 291),
        ("sdar-1.7b", 2_031_739_904, 311),
        ("sdar-4b", 4_411_424_256, 399),
        ("sdar-8b", 8_190_735_360, 399),
    ],
)
def test_released_models_have_their_keys(name, parameters, arrays):
    shapes = diffusion_lm_shapes(DIFFUSION_LM_PRESETS[name])
    assert len(shapes) == arrays
    assert sum(math.prod(shape.shape) for shape in shapes.values()) == parameters
    last = DIFFUSION_LM_PRESETS[name].num_layers - 1
    keys = LLADA_KEYS if name == "llada-8b" else SDAR_KEYS
    assert {key.replace(".1.", f".{last}.") for key in keys.values()} <= shapes.keys()


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("name", NAMES)
def test_folders_round_trip(name, limit, tmp_path):
    model = _load(name)
    save_diffusion_lm_folder(tmp_path / "new", model, max_shard_bytes=limit)
    assert (tmp_path / "new" / WEIGHTS).exists() == (limit is None)
    again = load_diffusion_lm_folder(tmp_path / "new", dtype=jnp.float32)
    assert again.config == model.config
    theirs, ours = _weights(name), load_safetensors(tmp_path / "new" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
    if name != "qwen3_tied":  # that is written as an SDAR
        old, new = (
            json.loads((folder / "config.json").read_text())
            for folder in (FILES / name, tmp_path / "new")
        )
        assert {field: old[field] for field in new if field != "rope_scaling"} == {
            field: value for field, value in new.items() if field != "rope_scaling"
        }


def test_heads_that_llada_has_no_word_for_are_not_saved(tmp_path):
    config = dataclasses.replace(_config("llada"), head_dim=16)
    model = nnx.eval_shape(lambda: DiffusionLM(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"needs num_heads\*head_dim to be width=32, got 4\*16"):
        save_diffusion_lm_folder(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


class _Reader:
    """An array that is made when it is used, and that says how many bytes live."""

    live = peak = reads = 0

    def __init__(self, array):
        self.shape, self.dtype, self._array = array.shape, array.dtype, array

    def __array__(self, dtype=None, copy=None):
        array = np.array(self._array, dtype)
        _Reader.reads += 1
        _Reader.live += array.nbytes
        _Reader.peak = max(_Reader.peak, _Reader.live)
        weakref.finalize(array, self._release, array.nbytes)
        return array

    @staticmethod
    def _release(size):
        _Reader.live -= size


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["sdar", "llada"])
def test_one_array_is_read_at_a_time(name, sharded):
    _Reader.live = _Reader.peak = _Reader.reads = 0
    readers = {key: _Reader(array) for key, array in _weights(name).items()}
    told = []
    model = load_diffusion_lm(
        _config(name),
        readers,
        sharding=diffusion_lm_sharding(_mesh(fsdp=2, tensor=2)) if sharded else None,
        progress=lambda *numbers: told.append(numbers),
    )
    assert _Reader.reads == len(readers) == len(told)
    assert _Reader.live == 0
    assert _Reader.peak == max(reader._array.nbytes for reader in readers.values())
    total = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))
    assert told[-1] == (total, total)
    del readers[HEADS[name]]
    with pytest.raises(ValueError, match=rf"^here: .* missing \(1\): {HEADS[name]}$"):
        load_diffusion_lm(_config(name), readers, "here")
    assert _Reader.reads == len(told)


def test_the_host_holds_about_one_array_more_than_the_model(tmp_path):
    sizes = {"width": 512, "ffn_dim": 512, "num_heads": 64, "num_kv_heads": 64}
    config = dataclasses.replace(_config("sdar"), **sizes)
    draw = np.random.default_rng(0)
    weights = {
        key: draw.normal(size=shape.shape).astype(np.float32)
        for key, shape in diffusion_lm_shapes(config).items()
    }
    # Saved from several devices: what lies on one CPU device needs no copy on the host.
    sharding = diffusion_lm_sharding(_mesh(fsdp=2, tensor=2))
    model = load_diffusion_lm(config, weights, sharding=sharding)
    total = sum(array.nbytes for array in weights.values())
    largest = max(array.nbytes for array in weights.values())
    # What is imported and cached with the first one is not counted.
    save_diffusion_lm_folder(tmp_path, model)
    for run in (
        lambda: save_diffusion_lm_folder(tmp_path, model),
        lambda: load_diffusion_lm_folder(tmp_path, dtype=jnp.float32),
        lambda: load_diffusion_lm_folder(tmp_path, dtype=jnp.bfloat16),
    ):
        tracemalloc.start()
        try:
            run()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        print(f"{peak / 1e6:.1f} MB of {total / 1e6:.1f} MB, largest {largest / 1e6:.1f} MB")
        assert peak < 6 * largest < total / 3


@pytest.mark.parametrize("name", ["sdar", "llada"])
def test_the_head_of_a_tied_model_may_be_there_as_a_copy(name):
    config = dataclasses.replace(_config(name), tied=True)
    head, embedding = HEADS[name], EMBEDDINGS[name]
    weights = _weights(name)
    del weights[head]
    expected = export_diffusion_lm(load_diffusion_lm(config, weights))
    assert expected.keys() == weights.keys()
    model = load_diffusion_lm(config, weights | {head: weights[embedding].copy()})
    for key, array in export_diffusion_lm(model).items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)
    other = weights[embedding].copy()
    other[-1, -1] += 1e-3
    with pytest.raises(
        ValueError, match=f"^here: .* tied, so {head} must be a copy of {embedding}"
    ):
        load_diffusion_lm(config, weights | {head: other}, "here")
    with pytest.raises(ValueError, match=rf"wrong shape or dtype \(1\): {head} \(expected"):
        load_diffusion_lm(config, weights | {head: other[1:]})
    with pytest.raises(ValueError, match=rf"missing \(1\): {head}$"):
        load_diffusion_lm(_config(name), weights)


def test_wrong_weights_are_all_listed(tmp_path):
    folder = _copy("sdar", tmp_path / "new")
    arrays = dict(_weights("sdar"))
    arrays["extra"] = arrays.pop("model.norm.weight")
    kernel = "model.layers.0.mlp.up_proj.weight"
    arrays[kernel] = arrays[kernel].T
    save_safetensors(folder / WEIGHTS, arrays)
    with pytest.raises(ValueError, match="do not fit") as caught:
        _load("sdar", folder)
    assert str(caught.value) == (
        f"{folder / WEIGHTS}: the weights do not fit the model; missing (1): model.norm.weight; "
        f"unused (1): extra; wrong shape or dtype (1): {kernel} "
        "(expected float32[40, 24], got float32[24, 40])"
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
    configs = [*DIFFUSION_LM_PRESETS.values(), *map(_config, NAMES)]
    configs += [dataclasses.replace(_config("llada"), tied=True, num_kv_heads=2, head_dim=8)]
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
        (SDAR_4B, {"rope_theta": float("inf")}, "rope_theta must be a positive number, got inf$"),
        (SDAR_4B, {"rope_theta": 10**400}, "rope_theta must be a positive number"),
        (SDAR_4B, {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0$"),
        (SDAR_4B, {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a positive number, got '1e-6'$"),
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


def _mesh(**axes):
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embedding.embedding", (80, 32), ("tensor", "fsdp")),
        ("head.kernel", (32, 80), ("fsdp", "tensor")),
        ("blocks.10.attention.query.kernel", (32, 32), ("fsdp", "tensor")),
        ("blocks.10.attention.key.kernel", (32, 16), ("fsdp", "tensor")),
        ("blocks.10.attention.value.kernel", (32, 16), ("fsdp", "tensor")),
        ("blocks.10.attention.output.kernel", (32, 32), ("tensor", "fsdp")),
        ("blocks.10.mlp.gate.kernel", (32, 44), ("fsdp", "tensor")),
        ("blocks.10.mlp.up.kernel", (32, 44), ("fsdp", "tensor")),
        ("blocks.10.mlp.down.kernel", (44, 32), ("tensor", "fsdp")),
        ("blocks.10.attention.query_norm.scale", (8,), ()),
        ("blocks.10.mlp_norm.scale", (32,), ()),
        ("final_norm.scale", (32,), ()),
        ("embedding.embedding", (81, 32), (None, "fsdp")),
        ("blocks.10.mlp.up.kernel", (33, 45), (None, None)),
    ],
)
def test_every_parameter_is_split_where_it_should(path, shape, spec):
    mesh = _mesh(fsdp=2, tensor=2)
    assert diffusion_lm_sharding(mesh)(path, shape) == NamedSharding(mesh, PartitionSpec(*spec))
    # Axes under other names, and a mesh without one of them.
    other = {"fsdp": "data", "tensor": "model", None: None}
    mesh = _mesh(data=2, model=2)
    renamed = PartitionSpec(*(other[axis] for axis in spec))
    assert diffusion_lm_sharding(mesh, fsdp="data", tensor="model")(path, shape).spec == renamed
    only = PartitionSpec(*(axis if axis == "tensor" else None for axis in spec))
    assert diffusion_lm_sharding(_mesh(tensor=2))(path, shape).spec == only
    assert diffusion_lm_sharding(mesh)(path, shape).is_fully_replicated


def test_two_axes_are_needed():
    with pytest.raises(ValueError, match="fsdp and tensor must be two axes, got 'x' for both"):
        diffusion_lm_sharding(_mesh(x=4), fsdp="x", tensor="x")


@functools.cache
def _released_shapes(name):
    config = dataclasses.replace(DIFFUSION_LM_PRESETS[name], param_dtype=jnp.bfloat16)
    return flat_shapes(lambda: DiffusionLM(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("name", ["llada-8b", "sdar-8b"])
def test_four_devices_hold_a_quarter_each(name, axes):
    place, held, total = diffusion_lm_sharding(_mesh(**axes)), 0, 0
    for path, shape in _released_shapes(name).items():
        assert shape.dtype == jnp.bfloat16
        total += 2 * math.prod(shape.shape)
        held += 2 * math.prod(place(path, shape.shape).shard_shape(shape.shape))
    assert 16e9 < total < 16.4e9
    assert total / 4 <= held < total / 4 + 1e6  # the norms


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"tensor": 4}])
def test_a_model_on_four_devices_computes_the_same(axes):
    sharding = diffusion_lm_sharding(_mesh(**axes))
    model = _load("sdar", sharding=sharding)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        wanted = sharding(".".join(map(str, path)), variable.shape)
        assert variable[...].sharding == wanted
    gate = model.blocks[0].mlp.gate.kernel[...]
    assert {piece.data.size for piece in gate.addressable_shards} == {gate.size // 4}
    for key, array in export_diffusion_lm(model).items():
        np.testing.assert_array_equal(array, _weights("sdar")[key], err_msg=key)
    found, wanted = _logits("sdar", "blocks", model)
    assert _error(found, wanted) <= 3e-6


def test_a_sharded_model_is_saved_as_another(tmp_path):
    model = _load("llada", sharding=diffusion_lm_sharding(_mesh(fsdp=2, tensor=2)))
    save_diffusion_lm_folder(tmp_path, model)
    saved = load_safetensors(tmp_path / WEIGHTS)
    for key, array in _weights("llada").items():
        np.testing.assert_array_equal(saved[key], array, err_msg=key)


# Damage, drawn at random: refused with a message that names a file, or harmless and exact.

JUNK = [0, -1, 1, 3, 7, 10**6, 2**31, 2**63, 10**30, 1.5, 1e300, float("nan"), float("inf")]
JUNK += [True, None, "", "x", "8", "\0", "\ud800", [], [1], [[]], {}, {"a": 1}]


def _is_json(path):
    return path.suffix == ".json"


def _choose(folder, dice, json_too=True):
    return dice.choice(
        [path for path in sorted(folder.iterdir()) if json_too or not _is_json(path)]
    )


def _truncate(folder, dice):
    path = _choose(folder, dice)
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: dice.randrange(len(content))])


def _lose(folder, dice):
    _choose(folder, dice).unlink()


def _rewrite(change):
    """Damages an array of one file, which stays a valid file."""

    def damage(folder, dice):
        path = _choose(folder, dice, json_too=False)
        arrays = {key: np.array(array) for key, array in load_safetensors(path).items()}
        change(arrays, dice.choice(sorted(arrays)), dice)
        save_safetensors(path, arrays)

    return damage


def _remove(arrays, key, dice):
    del arrays[key]


def _rename(arrays, key, dice):
    arrays[dice.choice([key + "x", key[:-1], key.upper(), f"module.{key}"])] = arrays.pop(key)


def _reshape(arrays, key, dice):
    array = arrays[key]
    choices = [array[..., None], array[:-1], array[:0], np.concatenate([array, array])]
    choices += [array.reshape(-1)] if array.ndim > 1 else [array.sum()]
    # A square kernel cannot be told from its transpose.
    choices += [array.T] if array.ndim > 1 and len(set(array.shape)) > 1 else []
    arrays[key] = dice.choice(choices)


def _enlarge(folder, dice):
    """A size of the configuration far beyond the weights."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    names = ["num_hidden_layers", "n_layers", "hidden_size", "d_model", "vocab_size", "head_dim"]
    names += ["embedding_size", "intermediate_size", "mlp_hidden_size"]
    name = dice.choice([name for name in names if name in values])
    values[name] = dice.choice([2**12, 2**20, 2**31, 10**30])
    if name == "vocab_size" and "embedding_size" in values:
        values["embedding_size"] = values["vocab_size"]
    path.write_text(json.dumps(values))


def _flip(folder, dice):
    """One bit of a document, or of the header of a file, its length included."""
    path = _choose(folder, dice)
    content = bytearray(path.read_bytes())
    end = len(content) if _is_json(path) else 8 + int.from_bytes(content[:8], "little")
    content[dice.randrange(end)] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _misconfigure(folder, dice):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name in dice.sample(sorted(values), dice.randrange(1, 3)):
        values[name] = dice.choice(JUNK)
    path.write_text(json.dumps(values))


def _misdescribe(folder, dice):
    """One entry of a header."""
    path = _choose(folder, dice, json_too=False)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    entry = entries[dice.choice(sorted(entries.keys() - {"__metadata__"}))]
    field = dice.choice(sorted(entry))
    if isinstance(entry[field], list) and dice.random() < 0.7:
        entry[field][dice.randrange(len(entry[field]))] = dice.choice(JUNK)
    else:
        entry[field] = dice.choice([*JUNK, [0, 2**62, 2**62], [2**70, 0], "F16", "F8_E4M3"])
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


# Those that no folder survives, and those that can be harmless.
FATAL = {
    "truncate": _truncate,
    "lose": _lose,
    "remove": _rewrite(_remove),
    "rename": _rewrite(_rename),
    "reshape": _rewrite(_reshape),
    "enlarge": _enlarge,
}
OTHER = {"flip": _flip, "misconfigure": _misconfigure, "misdescribe": _misdescribe}


@pytest.mark.parametrize("kind", [*FATAL, *OTHER])
def test_damaged_folders_are_refused_or_harmless(kind, tmp_path):
    refused = 0
    for seed in range(24):
        name, dice = NAMES[seed % 3], random.Random(f"{kind} {seed}")
        folder = _copy(name, tmp_path / str(seed))
        (FATAL | OTHER)[kind](folder, dice)
        try:
            model, message = _load(name, folder), ""
        except (ValueError, FileNotFoundError) as error:
            model, message = None, f"{type(error).__name__}: {error}"
        if model is None:
            # Not, for example, UnicodeDecodeError, which is a ValueError.
            assert message.startswith(("ValueError: ", "FileNotFoundError: ")), message
            assert str(folder) in message, message
            assert len(message) < 5000
            refused += 1
            continue
        assert kind in OTHER
        expected, loaded = _weights(name), export_diffusion_lm(model)
        assert loaded.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(loaded[key], array, err_msg=key)
    assert refused == 24 if kind in FATAL else refused >= 12


@pytest.mark.parametrize("name", NAMES)
def test_sizes_far_beyond_the_weights_are_refused_at_once(name, tmp_path):
    path = _copy(name, tmp_path / "new") / "config.json"
    values = json.loads(path.read_text())
    layers = "n_layers" if name == "llada" else "num_hidden_layers"
    path.write_text(json.dumps(values | {layers: 10**6}))
    with pytest.raises(ValueError, match=r"config\.json, .*: the weights .* has 1000000 blocks"):
        _load(name, path.parent)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json"):
        _load("sdar", tmp_path)
    shutil.copy(FILES / "sdar/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        _load("sdar", tmp_path)
    folder = _copy("qwen3_tied", tmp_path / "new")
    with pytest.raises(ValueError, match=r"config\.json: .* missing: mask_token_id; mask_id can"):
        load_diffusion_lm_folder(folder, dtype=jnp.float32)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names .*model-00002-of-00002\.safe"):
        _load("qwen3_tied", folder)
