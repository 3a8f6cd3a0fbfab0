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
    config_from_json,
    config_to_json,
    export_wan,
    load_safetensors,
    load_wan,
    load_wan_folder,
    read_safetensors_header,
    save_safetensors,
    save_wan_folder,
    wan_config_from_json,
    wan_config_to_json,
    wan_shapes,
)
from jaxgen.layers import SLA1Attention, SparseLinearAttention
from jaxgen.models import WAN_PRESETS, Wan, WanConfig

GOLDENS = Path(__file__).parents[2] / "goldens"
FOLDER = GOLDENS / "wan_folder"


def _golden(name):
    """Configuration, weights, inputs and output that goldens/write_wan.py wrote."""
    path = GOLDENS / f"wan_{name}.safetensors"
    config = wan_config_from_json(read_safetensors_header(path).metadata["config"])
    arrays = load_safetensors(path)

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    return config, part("weights."), part("input."), arrays["output"]


def _run(model, inputs):
    """The velocity in float32, channels first as in diffusers."""
    velocity = nnx.jit(lambda model, *inputs: model(*inputs))(
        model,
        jnp.moveaxis(jnp.asarray(inputs["latents"]), 1, -1),
        jnp.asarray(inputs["timestep"]),
        jnp.asarray(inputs["context"]),
    )
    return np.moveaxis(np.asarray(velocity.astype(jnp.float32)), -1, 1)


def _error(velocity, output):
    return np.linalg.norm(velocity - output) / np.linalg.norm(output)


@pytest.mark.parametrize("name", ["plain", "patches"])
def test_agrees_with_diffusers(name):
    config, weights, inputs, output = _golden(name)
    velocity = _run(load_wan(config, weights), inputs)
    assert velocity.shape == output.shape
    assert _error(velocity, output) <= 3e-6
    np.testing.assert_allclose(velocity, output, atol=3e-5)


@pytest.mark.parametrize("folder", [FOLDER, str(FOLDER / "transformer")])
def test_a_folder_that_diffusers_wrote_gives_the_outputs_of_diffusers(folder):
    example = load_safetensors(FOLDER / "example.safetensors")
    model = load_wan_folder(folder)
    assert model.config.dtype == model.config.param_dtype == jnp.float32
    assert _error(_run(model, example), example["output"]) <= 3e-6


def test_bfloat16_is_as_close_to_float32_as_that_of_diffusers():
    example = load_safetensors(FOLDER / "example.safetensors")
    model = load_wan_folder(FOLDER, dtype=jnp.bfloat16)
    # JAX's own attention cannot run in bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        ours = _run(model, example)
    theirs = example["output_bfloat16"]
    assert 0.0 < _error(ours, example["output"]) < 1.5 * _error(theirs, example["output"])
    assert _error(ours, theirs) < 0.01


def test_how_to_compute_is_an_argument():
    options = {"param_dtype": jnp.bfloat16, "attention": "int8", "remat": True}
    model = load_wan_folder(FOLDER, **options)
    for name, value in options.items():
        assert getattr(model.config, name) == value
    assert model.config.dtype == jnp.float32
    assert model.blocks[0].mlp.up.kernel.dtype == jnp.bfloat16
    assert model.blocks[0].table.dtype == jnp.float32


@pytest.mark.parametrize("name", ["plain", "patches"])
def test_round_trip_is_exact(name, tmp_path):
    config, weights, _, _ = _golden(name)
    path = tmp_path / "model.safetensors"
    save_safetensors(path, export_wan(load_wan(config, weights)), max_shard_bytes=20_000)
    again = load_safetensors(path, wan_shapes(config))
    assert again.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


@pytest.mark.parametrize("limit", [None, 20_000])
def test_folders_round_trip(limit, tmp_path):
    model = load_wan_folder(FOLDER)
    save_wan_folder(tmp_path / "new", model, max_shard_bytes=limit)
    weights = export_wan(load_wan_folder(tmp_path / "new"))
    for key, array in load_safetensors(
        FOLDER / "transformer/diffusion_pytorch_model.safetensors"
    ).items():
        np.testing.assert_array_equal(weights[key], array, err_msg=key)
    theirs, ours = (
        json.loads((folder / "config.json").read_text())
        for folder in (FOLDER / "transformer", tmp_path / "new")
    )
    del theirs["_diffusers_version"]
    assert ours == theirs


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_wan_folder(tmp_path)
    shutil.copy(FOLDER / "transformer/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        load_wan_folder(tmp_path)


def test_released_key_layout():
    shapes = wan_shapes(WAN_PRESETS["wan2.1-t2v-1.3b"])
    assert len(shapes) == 825
    some = {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "condition_embedder.time_embedder.linear_1.weight": (1536, 256),
        "condition_embedder.time_proj.weight": (9216, 1536),
        "condition_embedder.text_embedder.linear_1.weight": (1536, 4096),
        "condition_embedder.text_embedder.linear_2.bias": (1536,),
        "scale_shift_table": (1, 2, 1536),
        "proj_out.weight": (64, 1536),
        "blocks.0.scale_shift_table": (1, 6, 1536),
        "blocks.0.attn1.norm_q.weight": (1536,),
        "blocks.0.norm2.bias": (1536,),
        "blocks.29.attn2.to_out.0.weight": (1536, 1536),
        "blocks.29.ffn.net.0.proj.weight": (8960, 1536),
        "blocks.29.ffn.net.2.weight": (1536, 8960),
    }
    assert {key: shapes[key].shape for key in some} == some


def test_wrong_weights_are_all_listed():
    config, weights, _, _ = _golden("plain")
    weights["proj_out.weight"] = weights["proj_out.weight"].T
    weights["head.modulation"] = weights.pop("scale_shift_table")
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        load_wan(config, weights, source="some/file")
    assert str(caught.value) == (
        "some/file: the weights do not fit the model; missing (1): scale_shift_table; "
        "unused (1): head.modulation; wrong shape or dtype (1): proj_out.weight "
        "(expected float32[16, 28], got float32[28, 16])"
    )


class _Scaled(nnx.Module):
    """Exact attention with a trained factor in front of the logits."""

    def __init__(self, factor):
        self.factor = nnx.Param(jnp.full((1, 1, 1, 1), factor))

    def __call__(self, query, key, value):
        return jax.nn.dot_product_attention(query * self.factor[...], key, value)


def test_released_weights_load_with_new_self_attention():
    config, weights, inputs, output = _golden("plain")
    made = [_Scaled(1.0), _Scaled(1.0)]
    model = load_wan(config, weights, attend=made.__getitem__)
    assert _error(_run(model, inputs), output) <= 3e-6
    changed = load_wan(config, weights, attend=lambda number: _Scaled(2.0))
    assert _error(_run(changed, inputs), output) > 1e-3
    function = load_wan(config, weights, attend=lambda number: lambda query, key, value: value)
    assert _error(_run(function, inputs), output) > 1e-3


def test_parameters_of_self_attention_are_saved_and_all_or_none_are_loaded():
    config, weights, inputs, _ = _golden("plain")
    model = load_wan(config, weights, attend=lambda number: _Scaled(2.0 + number))
    saved = export_wan(model)
    extra = [f"blocks.{number}.attn1.attend.factor" for number in (0, 1)]
    assert sorted(saved.keys() - weights.keys()) == extra
    again = load_wan(config, saved, attend=lambda number: _Scaled(0.0))
    np.testing.assert_array_equal(_run(again, inputs), _run(model, inputs))
    with pytest.raises(ValueError, match=r"block 0 has the parameters factor; it must be Sparse"):
        load_wan(config, saved)
    del saved[extra[0]]
    with pytest.raises(ValueError, match=rf"missing \(1\): {extra[0]}"):
        load_wan(config, saved, attend=lambda number: _Scaled(0.0))


@pytest.mark.parametrize("kind", ["sla2", "sla2 a head", "sla1"])
def test_what_a_model_was_trained_with_is_found_in_its_weights(kind, tmp_path):
    config, weights, inputs, output = _golden("plain")
    tokens = int(np.prod(inputs["latents"].shape[-3:])) // config.patch_pixels

    def attend(number):
        cut = {"kept_fraction": 0.3, "block_q": 4, "block_k": 2}
        if kind == "sla1":
            return SLA1Attention(config.head_dim, complement=number == 0, feature_map="elu", **cut)
        own = {"per_head_ratio": True, "per_head_routers": True, "learn_basis": True}
        own = own if kind == "sla2 a head" else {}
        length = None if own else tokens
        return SparseLinearAttention(config.num_heads, config.head_dim, length, **own, **cut)

    made = load_wan(config, weights, attend=attend)
    save_wan_folder(tmp_path, made)
    found = load_wan_folder(tmp_path)
    for block, other in zip(found.blocks, made.blocks, strict=True):
        layers = block.self_attention.attend, other.self_attention.attend
        assert type(layers[0]) is type(layers[1])
        graphs = [nnx.split(layer)[0] for layer in layers]
        assert graphs[0] == graphs[1]
    np.testing.assert_allclose(_run(found, inputs), _run(made, inputs), atol=1e-6)
    assert _error(_run(found, inputs), output) > 1e-3
    assert _error(_run(load_wan_folder(tmp_path, attention="exact"), inputs), output) <= 3e-6


def test_self_attention_that_weights_do_not_tell():
    config, weights, _, _ = _golden("plain")
    make = lambda number: SparseLinearAttention(config.num_heads, config.head_dim, 64)
    saved = export_wan(load_wan(config, weights, attend=make))
    name = "blocks.1.attn1.attend.settings"
    for settings, message in (
        ([50_000, 128, 64], r"settings must be kept_fraction, .*, got shape \(3,\)"),
        ([0, 128, 64, 1], "kept_fraction must be more than 0 and at most 1, got 0"),
        ([50_000, 128, 0, 1], "block_k must be at least 1, got 0"),
        ([50_000, 128, 64, 0], "features of unsmoothed keys are those of SLA"),
    ):
        with pytest.raises(ValueError, match=f"arrays: self-attention of block 1: {message}"):
            load_wan(config, saved | {name: np.array(settings, np.int32)})
    flat = {"blocks.1.attn1.attend.mixing_logits": np.zeros((), np.float32)}
    with pytest.raises(ValueError, match="mixing_logits must have one or two axes"):
        load_wan(config, saved | flat)
    del saved[name]
    with pytest.raises(ValueError, match="block 1 has the parameters key_router, mixing_logits"):
        load_wan(config, saved)


@pytest.mark.parametrize("config", WAN_PRESETS.values())
def test_configurations_round_trip(config):
    assert wan_config_from_json(wan_config_to_json(config)) == config
    computed = dataclasses.replace(config, dtype=jnp.bfloat16, attention="int8", remat=True)
    assert wan_config_from_json(wan_config_to_json(computed)) == config
    assert config_from_json(WanConfig, config_to_json(computed)) == computed


def _document(**changes):
    values = json.loads((FOLDER / "transformer/config.json").read_text()) | changes
    return json.dumps({name: value for name, value in values.items() if value != "absent"})


def test_fields_with_a_default_may_be_absent():
    document = json.loads(_document(eps="absent", qk_norm="absent", patch_size="absent"))
    assert wan_config_from_json(json.dumps(document)) == wan_config_from_json(_document())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name must be 'WanTransformer3DModel'"),
        ({"image_dim": 1280}, r"^here: image_dim must be None \(Wan text-to-video\), got 1280$"),
        ({"added_kv_proj_dim": 8}, "added_kv_proj_dim must be None .*, got 8"),
        ({"qk_norm": None}, "qk_norm must be 'rms_norm_across_heads' .*, got None"),
        ({"window": 3}, "WanTransformer3DModel; unknown: window; missing: none$"),
        ({"num_layers": "absent"}, "unknown: none; missing: num_layers$"),
        ({"ffn_dim": 0}, "^here: ffn_dim must be a positive int, got ffn_dim=0$"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        wan_config_from_json(_document(**changes), source="here")


def test_models_without_qk_norm_have_no_diffusers_configuration(tmp_path):
    config = dataclasses.replace(_golden("plain")[0], qk_norm=False)
    with pytest.raises(ValueError, match="needs qk_norm=True, got qk_norm=False"):
        wan_config_to_json(config)
    with pytest.raises(ValueError, match="needs qk_norm=True, got qk_norm=False"):
        save_wan_folder(tmp_path / "new", Wan(config, rngs=nnx.Rngs(0)))
    assert not (tmp_path / "new").exists()
