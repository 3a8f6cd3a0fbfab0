import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import (
    clip_text_config_from_json,
    clip_text_config_to_json,
    clip_text_shapes,
    config_from_json,
    config_to_json,
    export_clip_text,
    export_t5,
    load_clip_text,
    load_clip_text_folder,
    load_safetensors,
    load_t5,
    load_t5_folder,
    read_safetensors_header,
    save_clip_text_folder,
    save_t5_folder,
    t5_config_from_json,
    t5_config_to_json,
    t5_shapes,
)
from jaxgen.models import CLIP_TEXT_PRESETS, T5_PRESETS

GOLDENS = Path(__file__).parents[2] / "goldens/text_encoders"
CLIPS, T5S = ("clip_l", "clip_g"), ("t5", "umt5")
POSITIONS = "text_model.embeddings.position_ids"
COPY = "encoder.embed_tokens.weight"

_load_folder = {
    **dict.fromkeys(CLIPS, load_clip_text_folder),
    **dict.fromkeys(T5S, load_t5_folder),
}
_save_folder = {
    **dict.fromkeys(CLIPS, save_clip_text_folder),
    **dict.fromkeys(T5S, save_t5_folder),
}
_export = {**dict.fromkeys(CLIPS, export_clip_text), **dict.fromkeys(T5S, export_t5)}


def _example(name):
    return load_safetensors(GOLDENS / name / "example.safetensors")


def _weights(name):
    return load_safetensors(GOLDENS / name / "model.safetensors")


def _config(name):
    text = (GOLDENS / name / "config.json").read_text()
    return (clip_text_config_from_json if name in CLIPS else t5_config_from_json)(text)


@nnx.jit
def _run(model, tokens, *mask):
    return model(tokens, *mask)


def _error(got, want):
    """The largest difference relative to the largest value."""
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


def _distance(got, want):
    return np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", CLIPS)
def test_clip_agrees_with_transformers(name, scan):
    example = _example(name)
    output = _run(load_clip_text_folder(GOLDENS / name, scan=scan), jnp.asarray(example["tokens"]))
    for field, values in output._asdict().items():
        assert values.shape == example[field].shape
        assert _error(values, example[field]) <= 2e-6, field


@pytest.mark.parametrize("name", CLIPS)
def test_clip_pools_where_transformers_does_with_the_other_end(name):
    example = _example(name)
    about = read_safetensors_header(GOLDENS / name / "example.safetensors").metadata["about"]
    other = json.loads(about)["other_eos_token_id"]
    config = dataclasses.replace(_config(name), eos_token_id=other)
    assert config != _config(name)
    tokens = jnp.asarray(example["other_tokens"])
    pooled = _run(load_clip_text(config, _weights(name)), tokens).pooled
    assert _error(pooled, example["other_pooled"]) <= 2e-6
    as_before = _run(load_clip_text(_config(name), _weights(name)), tokens).pooled
    assert _error(as_before, example["other_pooled"]) > 1e-2


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", T5S)
def test_t5_agrees_with_transformers(name, scan):
    example = _example(name)
    model, tokens = load_t5_folder(GOLDENS / name, scan=scan), jnp.asarray(example["tokens"])
    assert tokens.shape[1] > model.config.max_distance
    assert _error(_run(model, tokens), example["output"]) <= 3e-6
    masked = _run(model, tokens, jnp.asarray(example["mask"]))
    assert _error(masked, example["output_masked"]) <= 3e-6
    assert _error(masked, example["output"]) > 0.1


@pytest.mark.parametrize("name", [*CLIPS, *T5S])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(name):
    example = _example(name)
    model = _load_folder[name](GOLDENS / name, dtype=jnp.bfloat16)
    # JAX's own attention cannot run in bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        if name in CLIPS:
            outputs = _run(model, jnp.asarray(example["tokens"]))._asdict()
            theirs = {field: example[f"{field}_bfloat16"] for field in outputs}
            exact = {field: example[field] for field in outputs}
        else:
            outputs = {"output": _run(model, jnp.asarray(example["tokens"])[:, :40])}
            theirs = {"output": example["output_bfloat16"]}
            exact = {"output": example["output_short"]}
    for field, ours in outputs.items():
        assert ours.dtype == jnp.bfloat16
        error, reference = (_distance(values, exact[field]) for values in (ours, theirs[field]))
        assert 0.0 < error < 1.5 * reference, field


@pytest.mark.parametrize("name", [*CLIPS, *T5S])
def test_how_to_compute_is_an_argument(name):
    model = _load_folder[name](GOLDENS / name, param_dtype=jnp.bfloat16, scan=True)
    assert model.config.scan
    assert (model.config.dtype, model.config.param_dtype) == (jnp.float32, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}


def test_t5_is_not_computed_in_float16():
    with pytest.raises(ValueError, match=r"dtype must not be float16, .* use bfloat16"):
        load_t5_folder(GOLDENS / "t5", dtype=jnp.float16)
    stored = load_t5_folder(GOLDENS / "t5", param_dtype=jnp.float16)
    assert stored.token_embedding.embedding.dtype == jnp.float16


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("name", [*CLIPS, *T5S])
def test_folders_round_trip(name, limit, tmp_path):
    model = _load_folder[name](GOLDENS / name)
    _save_folder[name](tmp_path / "new", model, max_shard_bytes=limit)
    assert (tmp_path / "new/model.safetensors").exists() == (limit is None)
    again = _load_folder[name](tmp_path / "new")
    assert again.config == model.config
    weights, saved = _weights(name), _export[name](again)
    assert saved.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(saved[key], array, err_msg=key)
    theirs, ours = (
        json.loads((folder / "config.json").read_text())
        for folder in (GOLDENS / name, tmp_path / "new")
    )
    assert ours == {field: theirs[field] for field in ours}


def test_extras_of_older_files_are_accepted_by_name():
    weights = _weights("clip_l") | {POSITIONS: np.arange(77)[None]}
    load_clip_text(_config("clip_l"), weights)
    with pytest.raises(ValueError, match=rf"unused \(1\): {POSITIONS}x"):
        load_clip_text(_config("clip_l"), weights | {POSITIONS + "x": np.arange(77)})
    weights = _weights("t5")
    embedding = weights["shared.weight"]
    load_t5(_config("t5"), weights | {COPY: embedding.copy()})
    with pytest.raises(ValueError, match=rf"^here: {COPY} must be a copy of shared\.weight"):
        load_t5(_config("t5"), weights | {COPY: embedding + 1.0}, source="here")
    del weights["shared.weight"]
    model = load_t5(_config("t5"), weights | {COPY: embedding})
    np.testing.assert_array_equal(model.token_embedding.embedding[...], embedding)
    with pytest.raises(ValueError, match=r"missing \(1\): shared\.weight"):
        load_t5(_config("t5"), weights)


@pytest.mark.parametrize(
    ("load", "name", "kernel", "other"),
    [
        (load_clip_text, "clip_l", "text_projection.weight", "vision_model.x"),
        (load_t5, "t5", "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.x"),
    ],
)
def test_wrong_weights_are_all_listed(load, name, kernel, other):
    weights = _weights(name)
    wrong = weights[kernel]
    norm = next(key for key in weights if "final" in key)
    weights |= {kernel: wrong.T, other: weights.pop(norm)}
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        load(_config(name), weights, source="some/file")
    expected, got = list(wrong.shape), list(wrong.T.shape)
    assert str(caught.value) == (
        f"some/file: the weights do not fit the model; missing (1): {norm}; unused (1): {other}; "
        f"wrong shape or dtype (1): {kernel} (expected float32{expected}, got float32{got})"
    )


@pytest.mark.parametrize(("shared", "name"), [(False, "t5"), (True, "umt5")])
def test_tables_of_positions_must_be_where_the_configuration_says(shared, name):
    config = dataclasses.replace(_config(name), shared_positions=shared)
    with pytest.raises(ValueError, match=r"block\.1\.layer\.0\.SelfAttention\.relative_attention"):
        load_t5(config, _weights(name))


@pytest.mark.parametrize("name", ["clip_l", "t5"])
def test_incomplete_folders_are_refused(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        _load_folder[name](tmp_path)
    shutil.copy(GOLDENS / name / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        _load_folder[name](tmp_path)


def test_released_key_layout():
    clip, t5, umt5 = (
        clip_text_shapes(CLIP_TEXT_PRESETS["clip-g"]),
        *(t5_shapes(T5_PRESETS[name]) for name in ("t5-xxl", "umt5-xxl")),
    )
    assert (len(clip), len(t5), len(umt5)) == (517, 219, 242)
    positions = "layer.0.SelfAttention.relative_attention_bias.weight"
    some = {
        "text_model.embeddings.token_embedding.weight": (49408, 1280),
        "text_model.embeddings.position_embedding.weight": (77, 1280),
        "text_model.encoder.layers.31.self_attn.out_proj.weight": (1280, 1280),
        "text_model.encoder.layers.0.self_attn.q_proj.bias": (1280,),
        "text_model.encoder.layers.0.layer_norm2.bias": (1280,),
        "text_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280),
        "text_model.encoder.layers.0.mlp.fc2.bias": (1280,),
        "text_model.final_layer_norm.weight": (1280,),
        "text_projection.weight": (1280, 1280),
    }
    assert {key: clip[key].shape for key in some} == some
    some = {
        "shared.weight": (32128, 4096),
        f"encoder.block.0.{positions}": (32, 64),
        "encoder.block.23.layer.0.SelfAttention.o.weight": (4096, 4096),
        "encoder.block.23.layer.0.layer_norm.weight": (4096,),
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": (4096, 10240),
        "encoder.block.0.layer.1.layer_norm.weight": (4096,),
        "encoder.final_layer_norm.weight": (4096,),
    }
    assert {key: t5[key].shape for key in some} == some
    assert umt5.keys() - t5.keys() == {f"encoder.block.{i}.{positions}" for i in range(1, 24)}


CLIP_L_OF_SD3 = {
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "vocab_size": 49408,
}
T5_XXL_OF_SD3 = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}


def test_documents_like_those_of_released_models_are_the_presets():
    clip_g = CLIP_L_OF_SD3 | {"hidden_act": "gelu", "hidden_size": 1280, "projection_dim": 1280}
    clip_g |= {"intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    umt5 = T5_XXL_OF_SD3 | {"model_type": "umt5", "vocab_size": 256384, "scalable_attention": True}
    read = lambda read, document: read(json.dumps(document))
    assert read(clip_text_config_from_json, CLIP_L_OF_SD3) == CLIP_TEXT_PRESETS["clip-l"]
    assert read(clip_text_config_from_json, clip_g) == CLIP_TEXT_PRESETS["clip-g"]
    assert read(t5_config_from_json, T5_XXL_OF_SD3) == T5_PRESETS["t5-xxl"]
    assert read(t5_config_from_json, umt5) == T5_PRESETS["umt5-xxl"]


def test_configurations_round_trip():
    for config in CLIP_TEXT_PRESETS.values():
        assert clip_text_config_from_json(clip_text_config_to_json(config)) == config
    for config in T5_PRESETS.values():
        assert t5_config_from_json(t5_config_to_json(config)) == config
        computed = dataclasses.replace(config, dtype=jnp.bfloat16, scan=True)
        assert t5_config_from_json(t5_config_to_json(computed)) == config
        assert config_from_json(type(config), config_to_json(computed)) == computed


def test_fields_with_a_default_may_be_absent():
    document = json.dumps({k: v for k, v in CLIP_L_OF_SD3.items() if k != "eos_token_id"})
    config = clip_text_config_from_json(document)
    assert config.eos_token_id == 49407  # the default of transformers, not ours
    few = ("model_type", "num_layers", "num_heads", "d_model", "d_ff", "vocab_size")
    document = {field: T5_XXL_OF_SD3[field] for field in (*few, "feed_forward_proj")}
    assert t5_config_from_json(json.dumps(document)) == T5_PRESETS["t5-xxl"]


@pytest.mark.parametrize(
    ("read", "changes", "message"),
    [
        ("clip", {"model_type": "clip"}, "^here: model_type must be 'clip_text_model', got 'clip'"),
        ("clip", {"hidden_act": "relu"}, "^here: activation must be one of .*, got 'relu'"),
        ("clip", {"width": 3}, "clip_text_model model; unknown: width; missing: none"),
        ("clip", {"projection_dim": "absent"}, "unknown: none; missing: projection_dim"),
        ("clip", {"num_attention_heads": 7}, "num_heads must divide width, got num_heads=7 and"),
        ("t5", {"model_type": "mt5"}, "model_type must be 't5' or 'umt5', got 'mt5'"),
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj must be 'gated-gelu', got 'relu'"),
        ("t5", {"feed_forward_proj": "absent"}, "missing: feed_forward_proj"),
        ("t5", {"dense_act_fn": "silu"}, "dense_act_fn must be 'gelu_new', got 'silu'"),
        ("t5", {"is_decoder": True}, "is_decoder must be False, got True"),
        ("t5", {"experts": 3}, "t5 or umt5 model; unknown: experts; missing: none"),
        ("t5", {"d_ff": 0}, "^here: ffn_dim must be a positive int, got ffn_dim=0"),
    ],
)
def test_wrong_configurations_are_refused(read, changes, message):
    document = (CLIP_L_OF_SD3 if read == "clip" else T5_XXL_OF_SD3) | changes
    text = json.dumps({name: value for name, value in document.items() if value != "absent"})
    function = clip_text_config_from_json if read == "clip" else t5_config_from_json
    with pytest.raises(ValueError, match=message):
        function(text, source="here")
