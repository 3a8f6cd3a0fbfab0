import dataclasses
import json
import shutil
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import (
    export_mmdit,
    load_mmdit,
    load_mmdit_folder,
    load_safetensors,
    mmdit_config_from_json,
    mmdit_config_to_json,
    save_mmdit_folder,
    save_safetensors,
)
from jaxgen.models import MMDIT_PRESETS, MMDiT, MMDiTConfig

FILES = Path(__file__).parents[2] / "goldens/sd3_files"
NAMES = ["plain", "qk_norm", "dual"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
# About 90 MB in float32, of which the largest array is one and a half.
LARGE = MMDiTConfig(
    sample_size=8,
    num_layers=10,
    num_heads=4,
    pos_embed_max_size=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
)
LARGEST = 6 * 256 * 256 * 4


def _load(folder, **options):
    return load_mmdit_folder(folder, **{"dtype": jnp.float32} | options)


def _copy(name, folder):
    """A copy of a golden transformer that may be damaged."""
    return Path(shutil.copytree(FILES / name / "transformer", folder / "transformer"))


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_diffusers_give_the_outputs_of_diffusers(name):
    example = load_safetensors(FILES / name / "example.safetensors")
    velocity = nnx.jit(lambda model, *inputs: model(*inputs))(
        _load(FILES / name),
        jnp.moveaxis(example["latents"], 1, -1),
        *(jnp.asarray(example[key]) for key in ("timestep", "context", "pooled")),
    )
    velocity, output = np.moveaxis(np.asarray(velocity), -1, 1), example["output"]
    # Measured: 3.0e-6, 1.3e-6, 0.7e-6 in the norm, at most 4.2e-6 of the largest value.
    assert np.linalg.norm(velocity - output) <= 1e-5 * np.linalg.norm(output)
    assert np.abs(velocity - output).max() <= 1e-4 * np.abs(output).max()


@pytest.mark.parametrize("folder", [FILES / "dual", str(FILES / "dual/transformer")])
def test_the_folder_may_be_that_of_the_pipeline(folder):
    model = _load(folder)
    config = model.config
    assert (config.num_layers, config.num_heads, config.head_dim) == (3, 2, 4)
    assert config.dual_attention_layers == (0, 1)
    assert config.qk_norm
    assert config.dtype == config.param_dtype == jnp.float32


def test_how_to_compute_is_an_argument():
    options = {"param_dtype": jnp.bfloat16, "attention": "int8", "remat": True, "scan": True}
    model = _load(FILES / "plain", **options)
    for name, value in options.items():
        assert getattr(model.config, name) == value
    assert model.config.dtype == jnp.float32
    weights = load_safetensors(FILES / "plain/transformer" / WEIGHTS)
    for key, array in export_mmdit(model).items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, weights[key].astype(jnp.bfloat16), err_msg=key)
    assert _load(FILES / "plain", dtype=jnp.bfloat16).config.param_dtype == jnp.bfloat16


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact(name, limit, tmp_path):
    theirs = load_safetensors(FILES / name / "transformer" / WEIGHTS)
    dtype = next(iter(theirs.values())).dtype
    save_mmdit_folder(tmp_path / "new", _load(FILES / name, dtype=dtype), max_shard_bytes=limit)
    ours = load_safetensors(tmp_path / "new" / WEIGHTS)
    assert (tmp_path / "new" / WEIGHTS).exists() == (limit is None)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
    configs = [
        json.loads((folder / "config.json").read_text())
        for folder in (FILES / name / "transformer", tmp_path / "new")
    ]
    del configs[0]["_diffusers_version"]
    assert configs[0] | {"dual_attention_layers": []} == configs[1] | {"dual_attention_layers": []}
    assert [*(configs[0]["dual_attention_layers"] or [])] == configs[1]["dual_attention_layers"]


def test_the_host_holds_about_one_array_more_than_the_model(tmp_path):
    model = MMDiT(LARGE, rngs=nnx.Rngs(0))
    total = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))
    assert total > 80e6
    _load(FILES / "plain")  # what is imported and cached with the first one is not counted
    mmdit_config_to_json(LARGE)
    for run in (
        lambda: save_mmdit_folder(tmp_path, model),
        lambda: _load(tmp_path),
        lambda: _load(tmp_path, param_dtype=jnp.bfloat16),
    ):
        tracemalloc.start()
        try:
            run()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        print(f"{peak / 1e6:.1f} MB of {total / 1e6:.1f} MB, largest {LARGEST / 1e6:.1f} MB")
        # JAX lets go of what it copied a little later: up to eight arrays on a busy machine.
        assert peak < 16 * LARGEST < total / 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_the_file_do_not_stay_in_memory(tmp_path):
    model = MMDiT(LARGE, rngs=nnx.Rngs(0))
    save_mmdit_folder(tmp_path, model)
    arrays = load_safetensors(tmp_path / WEIGHTS)
    total = sum(array.nbytes for array in arrays.values())
    assert sum(float(array.sum()) for array in arrays.values()) != 0
    assert _resident(tmp_path / WEIGHTS) >= total
    loaded = load_mmdit(LARGE, arrays)
    assert _resident(tmp_path / WEIGHTS) < total / 10
    for key, array in export_mmdit(loaded).items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)


def _resident(path):
    """Bytes of a mapped file in the memory of this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    raise AssertionError(f"{path} is not mapped")


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large", "openmoji-small"])
def test_configurations_round_trip(name):
    config = MMDIT_PRESETS[name]
    text = mmdit_config_to_json(config)
    assert json.loads(text)["caption_projection_dim"] == config.width
    assert mmdit_config_from_json(text) == config
    computed = dataclasses.replace(config, dtype=jnp.bfloat16, attention="int8", remat=True)
    assert mmdit_config_to_json(computed) == text


def _document(**changes):
    values = json.loads((FILES / "dual/transformer/config.json").read_text()) | changes
    return json.dumps({name: value for name, value in values.items() if value != "absent"})


def test_fields_with_a_default_may_be_absent():
    """The configuration of SD3-Medium has neither qk_norm nor dual_attention_layers."""
    absent = dict.fromkeys(["qk_norm", "dual_attention_layers", "in_channels"], "absent")
    config = mmdit_config_from_json(_document(**absent, _name_or_path="somewhere"))
    expected = dataclasses.replace(
        mmdit_config_from_json(_document()), qk_norm=False, dual_attention_layers=()
    )
    assert config == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "^here: _class_name must be 'SD3Transformer2D"),
        ({"window": 3}, "^here: .* SD3Transformer2DModel; unknown: window; missing: none$"),
        ({"num_layers": "absent"}, "unknown: none; missing: num_layers$"),
        ({"caption_projection_dim": "absent"}, "missing: caption_projection_dim$"),
        ({"caption_projection_dim": 16}, "caption_projection_dim must be .*=8, got 16$"),
        ({"caption_projection_dim": 8.0}, "caption_projection_dim must be .*=8, got 8.0$"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be None or 'rms_norm', got 'layer_norm'$"),
        ({"qk_norm": ["rms_norm"]}, "qk_norm must be None or 'rms_norm'"),
        ({"dual_attention_layers": 2}, "dual_attention_layers must be a list of ints, got 2$"),
        ({"dual_attention_layers": [0.0]}, "dual_attention_layers must be a list of ints"),
        ({"dual_attention_layers": [3]}, "^here: dual_attention_layers must be increasing"),
        ({"pooled_projection_dim": 0}, "^here: pooled_projection_dim must be a positive int"),
        ({"in_channels": True}, "^here: in_channels must be a positive int"),
        ({"num_layers": 10**9}, "^here: num_layers must be at most 1048576, got 1000000000$"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mmdit_config_from_json(_document(**changes), source="here")


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        _load(tmp_path)
    shutil.copy(FILES / "plain/transformer/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        _load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    folder = _copy("dual", tmp_path)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names .*model-00002-of-00002\.safe"):
        _load(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", 3])
def test_an_index_cannot_point_outside_the_folder(name, tmp_path):
    index = _copy("dual", tmp_path) / f"{WEIGHTS}.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["proj_out.bias"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"index\.json: 'proj_out.bias' must name .* same folder"):
        _load(tmp_path)


def test_truncated_files_are_refused(tmp_path):
    weights = _copy("plain", tmp_path) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors: truncated"):
        _load(tmp_path)


def test_wrong_weights_are_all_listed(tmp_path):
    weights = _copy("plain", tmp_path) / WEIGHTS
    arrays = load_safetensors(weights)
    arrays["extra"] = arrays.pop("proj_out.bias")
    arrays["norm_out.linear.weight"] = arrays["norm_out.linear.weight"].T
    save_safetensors(weights, arrays)
    with pytest.raises(ValueError, match="do not fit") as caught:
        _load(tmp_path)
    assert str(caught.value) == (
        f"{weights}: the weights do not fit the model; missing (1): proj_out.bias; unused (1): "
        "extra; wrong shape or dtype (1): norm_out.linear.weight "
        "(expected float32[16, 8], got float32[8, 16])"
    )


@pytest.mark.parametrize("change", [{"num_layers": 10**6}, {"pos_embed_max_size": 10**6}])
def test_sizes_far_beyond_the_weights_are_refused_at_once(change, tmp_path):
    path = _copy("plain", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"config\.json, .*\.safetensors: the weights do not fit"):
        _load(tmp_path)
