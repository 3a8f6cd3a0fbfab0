"""LLaDA and SDAR in the keys and folders of the released models."""

import dataclasses
import json
import math
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import (
    decoder_sharding,
    diffusion_lm_shapes,
    export_diffusion_lm,
    export_flat,
    load_diffusion_lm,
    load_diffusion_lm_folder,
    load_safetensors,
    save_diffusion_lm_folder,
    save_safetensors,
)
from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLM
from tests.jaxgen.checkpoints.diffusion_lm_files import (
    EMBEDDINGS,
    EXAMPLES,
    FILES,
    HEADS,
    NAMES,
    WEIGHTS,
    config_of,
    copy_golden,
    error_of,
    load_golden,
    logits_of,
    mesh_of,
    weights_of,
)


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_models_agree_with_transformers(name, example):
    found, wanted = logits_of(name, example, load_golden(name))
    assert found.dtype == jnp.float32
    assert error_of(found, wanted) <= 3e-6  # measured: 0.5e-6 to 1.0e-6


def test_a_scanned_model_agrees_with_transformers():
    found, wanted = logits_of("sdar", "blocks", load_golden("sdar", scan=True))
    assert error_of(found, wanted) <= 3e-6


def test_how_to_compute_is_an_argument():
    options = {"param_dtype": jnp.bfloat16, "attention": "int8", "remat": True, "scan": True}
    model = load_golden("llada", **options)
    for name, value in options.items():
        assert getattr(model.config, name) == value
    assert model.config.dtype == jnp.float32
    for key, array in export_diffusion_lm(model).items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, weights_of("llada")[key].astype(jnp.bfloat16))
    assert load_golden("llada", dtype=jnp.bfloat16).config.param_dtype == jnp.bfloat16


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
    config = dataclasses.replace(config_of(name), dtype=dtype, param_dtype=dtype)
    weights = {key: array.astype(dtype) for key, array in weights_of(name).items()}
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
    model = load_golden(name)
    save_diffusion_lm_folder(tmp_path / "new", model, max_shard_bytes=limit)
    assert (tmp_path / "new" / WEIGHTS).exists() == (limit is None)
    again = load_diffusion_lm_folder(tmp_path / "new", dtype=jnp.float32)
    assert again.config == model.config
    theirs, ours = weights_of(name), load_safetensors(tmp_path / "new" / WEIGHTS)
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
    config = dataclasses.replace(config_of("llada"), head_dim=16)
    model = nnx.eval_shape(lambda: DiffusionLM(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"needs num_heads\*head_dim to be width=32, got 4\*16"):
        save_diffusion_lm_folder(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"max_tokens": 2**20 + 1}, {"rope_theta": 1e30}])
def test_models_that_would_not_load_are_not_saved(change, tmp_path):
    config = dataclasses.replace(config_of("sdar"), **change)
    model = nnx.eval_shape(lambda: DiffusionLM(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^config: (max_position_embeddings|rope_theta) must be"):
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
    readers = {key: _Reader(array) for key, array in weights_of(name).items()}
    told = []
    model = load_diffusion_lm(
        config_of(name),
        readers,
        sharding=decoder_sharding(mesh_of(fsdp=2, tensor=2)) if sharded else None,
        progress=lambda *numbers: told.append(numbers),
    )
    assert _Reader.reads == len(readers) == len(told)
    assert _Reader.live == 0
    assert _Reader.peak == max(reader._array.nbytes for reader in readers.values())
    total = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))
    assert told[-1] == (total, total)
    del readers[HEADS[name]]
    with pytest.raises(ValueError, match=rf"^here: .* missing \(1\): {HEADS[name]}$"):
        load_diffusion_lm(config_of(name), readers, "here")
    assert _Reader.reads == len(told)


def test_the_host_holds_about_one_array_more_than_the_model(tmp_path):
    sizes = {"width": 512, "ffn_dim": 512, "num_heads": 64, "num_kv_heads": 64}
    config = dataclasses.replace(config_of("sdar"), **sizes)
    draw = np.random.default_rng(0)
    weights = {
        key: draw.normal(size=shape.shape).astype(np.float32)
        for key, shape in diffusion_lm_shapes(config).items()
    }
    # Saved from several devices: what lies on one CPU device needs no copy on the host.
    sharding = decoder_sharding(mesh_of(fsdp=2, tensor=2))
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
        assert peak < total / 3  # JAX lets go of what it copied a little later


@pytest.mark.parametrize("name", ["sdar", "llada"])
def test_the_head_of_a_tied_model_may_be_there_as_a_copy(name):
    config = dataclasses.replace(config_of(name), tied=True)
    head, embedding = HEADS[name], EMBEDDINGS[name]
    weights = weights_of(name)
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
        load_diffusion_lm(config_of(name), weights)


def test_wrong_weights_are_all_listed(tmp_path):
    folder = copy_golden("sdar", tmp_path / "new")
    arrays = dict(weights_of("sdar"))
    arrays["extra"] = arrays.pop("model.norm.weight")
    kernel = "model.layers.0.mlp.up_proj.weight"
    arrays[kernel] = arrays[kernel].T
    save_safetensors(folder / WEIGHTS, arrays)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_golden("sdar", folder)
    assert str(caught.value) == (
        f"{folder / WEIGHTS}: the weights do not fit the model; missing (1): model.norm.weight; "
        f"unused (1): extra; wrong shape or dtype (1): {kernel} "
        "(expected float32[40, 24], got float32[24, 40])"
    )
