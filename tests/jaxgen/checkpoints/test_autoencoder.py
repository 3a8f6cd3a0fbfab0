import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import (
    autoencoder_config_from_json,
    autoencoder_config_to_json,
    autoencoder_from_single_file,
    autoencoder_shapes,
    config_from_json,
    config_to_json,
    export_autoencoder,
    load_autoencoder,
    load_autoencoder_folder,
    load_safetensors,
    read_safetensors_header,
    save_autoencoder_folder,
)
from jaxgen.models import AUTOENCODER_PRESETS, AutoencoderConfig

GOLDENS = Path(__file__).parents[2] / "goldens"
FOLDER = GOLDENS / "autoencoder_folder"
WEIGHTS = FOLDER / "vae/diffusion_pytorch_model.safetensors"
SINGLE_FILE = FOLDER / "single_file.safetensors"
QUANT = GOLDENS / "autoencoder_quant.safetensors"
RELEASED = AUTOENCODER_PRESETS["stable-diffusion-3"]


def _quant():
    """Configuration, weights and examples of the model with quant convolutions."""
    arrays, prefix = load_safetensors(QUANT), "weights."
    config = autoencoder_config_from_json(read_safetensors_header(QUANT).metadata["config"])
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return config, weights, arrays


def _config():
    """Configuration of the model in the folder."""
    return autoencoder_config_from_json((FOLDER / "vae/config.json").read_text())


def _last(array):
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


@nnx.jit
def _run(model, images, latents):
    return *model.encode(images), model.decode(latents)


def _outputs(model, examples, number):
    """Mean, log-variance and pictures, channels first as in diffusers."""
    names = ("images", "latents")
    outputs = _run(model, *(_last(examples[f"{number}.{name}"]) for name in names))
    return [np.moveaxis(np.asarray(array), -1, 1) for array in outputs]


def _error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def _agrees(model, examples, numbers):
    for number in numbers:
        for name, found in zip(
            ("mean", "logvar", "decoded"), _outputs(model, examples, number), strict=True
        ):
            wanted = examples[f"{number}.{name}"]
            assert found.shape == wanted.shape
            assert _error(found, wanted) <= 3e-6, (number, name)
            assert np.abs(found - wanted).max() <= 5e-6 * np.abs(wanted).max(), (number, name)


def _same_weights(first, second):
    arrays = [dict(nnx.to_flat_state(nnx.state(model))) for model in (first, second)]
    assert arrays[0].keys() == arrays[1].keys()
    for path, variable in arrays[0].items():
        np.testing.assert_array_equal(variable[...], arrays[1][path][...], err_msg=str(path))


def test_a_folder_that_diffusers_wrote_gives_the_outputs_of_diffusers():
    model = load_autoencoder_folder(FOLDER)
    assert model.config.dtype == model.config.param_dtype == jnp.float32
    _agrees(model, load_safetensors(FOLDER / "examples.safetensors"), (0, 1))
    _same_weights(load_autoencoder_folder(str(FOLDER / "vae")), model)


def test_quant_convolutions_and_other_channels_agree_with_diffusers():
    config, weights, examples = _quant()
    assert config.use_quant_conv
    assert config.use_post_quant_conv
    assert config.shift_factor == 0.0
    _agrees(load_autoencoder(config, weights), examples, (1,))


def test_bfloat16_is_as_close_to_float32_as_that_of_diffusers():
    examples = load_safetensors(FOLDER / "examples.safetensors")
    model = load_autoencoder_folder(FOLDER, dtype=jnp.bfloat16)
    assert model.config.param_dtype == model.decoder.conv_in.kernel.dtype == jnp.bfloat16
    exact, theirs = examples["0.decoded"], examples["0.decoded_bfloat16"]
    decode = nnx.jit(lambda model, latents: model.decode(latents))
    ours = np.moveaxis(np.asarray(decode(model, _last(examples["0.latents"]))), -1, 1)
    assert 0.0 < _error(ours, exact) < 1.5 * _error(theirs, exact)
    assert _error(ours, theirs) < 0.03


def test_parameters_may_have_another_dtype():
    model = load_autoencoder_folder(FOLDER, param_dtype=jnp.bfloat16)
    assert model.config.dtype == jnp.float32
    assert model.encoder.norm_out.scale.dtype == jnp.bfloat16


def test_the_original_single_file_holds_the_same_model():
    arrays, wanted = load_safetensors(SINGLE_FILE), load_autoencoder_folder(FOLDER)
    assert arrays["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    _same_weights(autoencoder_from_single_file(arrays, _config()), wanted)
    prefix = "first_stage_model."
    alone = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    _same_weights(autoencoder_from_single_file(alone, _config()), wanted)
    half = dataclasses.replace(_config(), param_dtype="bfloat16")
    loaded = autoencoder_from_single_file(arrays, half)
    assert loaded.decoder.norm_out.scale.dtype == jnp.bfloat16


def _with_old_names(weights):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, array in weights.items():
        for name, former in names.items():
            key = key.replace(f".{name}.", f".{former}.")
        old[key] = array
    assert len(old.keys() - weights.keys()) == 16
    return old


def test_old_names_of_the_attention_are_read():
    weights = load_safetensors(WEIGHTS)
    model = load_autoencoder(_config(), _with_old_names(weights))
    _same_weights(model, load_autoencoder_folder(FOLDER))


def test_old_names_beside_the_present_ones_are_refused():
    weights = load_safetensors(WEIGHTS)
    key = "encoder.mid_block.attentions.0.query.bias"
    weights[key] = weights["encoder.mid_block.attentions.0.to_q.bias"]
    with pytest.raises(ValueError, match=rf"unused \(1\): {re.escape(key)}$"):
        load_autoencoder(_config(), weights)


@pytest.mark.parametrize("name", ["folder", "quant"])
def test_round_trip_is_exact(name):
    config, weights, _ = _quant()
    if name == "folder":
        config, weights = _config(), load_safetensors(WEIGHTS)
    again = export_autoencoder(load_autoencoder(config, weights))
    assert again.keys() == weights.keys() == autoencoder_shapes(config).keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


@pytest.mark.parametrize("limit", [None, 20_000])
def test_folders_round_trip(limit, tmp_path):
    save_autoencoder_folder(
        tmp_path / "new", load_autoencoder_folder(FOLDER), max_shard_bytes=limit
    )
    weights = export_autoencoder(load_autoencoder_folder(tmp_path / "new"))
    for key, array in load_safetensors(WEIGHTS).items():
        np.testing.assert_array_equal(weights[key], array, err_msg=key)
    theirs, ours = (
        json.loads((folder / "config.json").read_text())
        for folder in (FOLDER / "vae", tmp_path / "new")
    )
    del theirs["_diffusers_version"]
    assert ours == theirs


def test_models_without_attention_round_trip(tmp_path):
    config = dataclasses.replace(_config(), mid_block_add_attention=False)
    weights = load_safetensors(WEIGHTS)
    model = load_autoencoder(config, {k: v for k, v in weights.items() if "attentions" not in k})
    save_autoencoder_folder(tmp_path, model)
    _same_weights(load_autoencoder_folder(tmp_path), model)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_autoencoder_folder(tmp_path)
    shutil.copy(FOLDER / "vae/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        load_autoencoder_folder(tmp_path)


def test_released_key_layout():
    shapes = autoencoder_shapes(RELEASED)
    assert len(shapes) == 244
    some = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.down_blocks.2.downsamplers.0.conv.bias": (512,),
        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid_block.resnets.1.norm2.weight": (512,),
        "decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
        "decoder.up_blocks.3.resnets.0.conv1.weight": (128, 256, 3, 3),
        "decoder.conv_norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {key: shapes[key].shape for key in some} == some


def test_wrong_weights_are_all_listed():
    weights = load_safetensors(WEIGHTS)
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :3]
    weights["quant_conv.bias"] = weights.pop("encoder.conv_out.bias")
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        load_autoencoder(_config(), weights, source="some/file")
    assert str(caught.value) == (
        "some/file: the weights do not fit the model; missing (1): encoder.conv_out.bias; "
        "unused (1): quant_conv.bias; wrong shape or dtype (1): decoder.conv_in.weight "
        "(expected float32[8, 4, 3, 3], got float32[8, 3, 3, 3])"
    )


def test_wrong_weights_of_single_files_are_listed_by_their_own_names():
    arrays, prefix = load_safetensors(SINGLE_FILE), "first_stage_model."
    name = f"{prefix}decoder.mid.attn_1.q.weight"
    arrays[name] = arrays[name][:, :, 0, 0]
    arrays[f"{prefix}loss.logvar"] = arrays.pop(f"{prefix}decoder.up.2.upsample.conv.bias")
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        autoencoder_from_single_file(arrays, _config(), source="some/file")
    assert str(caught.value) == (
        f"some/file: the weights do not fit the model; missing (1): "
        f"{prefix}decoder.up.2.upsample.conv.bias; unused (1): {prefix}loss.logvar; "
        f"wrong shape or dtype (1): {name} (expected float32[8, 8, 1, 1], got float32[8, 8])"
    )


def test_single_files_are_those_of_stable_diffusion_3_unless_told_otherwise():
    key = "first_stage_model.encoder.conv_in.weight"
    with pytest.raises(ValueError, match=r"missing \(243\): first_stage_model\.decoder\.conv_in"):
        autoencoder_from_single_file({key: jax.ShapeDtypeStruct((128, 3, 3, 3), jnp.float32)})
    with pytest.raises(ValueError, match=r"missing \(244\): decoder\.conv_in\.bias.*unused \(1\)"):
        autoencoder_from_single_file({"model.diffusion_model.x": np.zeros(1)})


@pytest.mark.parametrize("config", [RELEASED, _quant()[0], _config()])
def test_configurations_round_trip(config):
    assert autoencoder_config_from_json(autoencoder_config_to_json(config)) == config
    computed = dataclasses.replace(config, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert autoencoder_config_from_json(autoencoder_config_to_json(computed)) == config
    assert config_from_json(AutoencoderConfig, config_to_json(computed)) == computed


def _document(**changes):
    values = json.loads((FOLDER / "vae/config.json").read_text()) | changes
    return json.dumps({name: value for name, value in values.items() if value != "absent"})


def test_what_old_configurations_leave_out_is_what_diffusers_assumes():
    names = ("scaling_factor", "shift_factor", "force_upcast", "use_quant_conv", "latents_mean")
    names += ("use_post_quant_conv", "mid_block_add_attention", "latents_std", "sample_size")
    config = autoencoder_config_from_json(_document(**dict.fromkeys(names, "absent")))
    assert config == dataclasses.replace(
        _config(),
        scaling_factor=0.18215,
        shift_factor=0.0,
        use_quant_conv=True,
        use_post_quant_conv=True,
        sample_size=32,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name must be 'AutoencoderKL', got 'Autoencod"),
        ({"act_fn": "gelu"}, "^here: act_fn must be 'silu', got 'gelu'$"),
        ({"latents_mean": [0.0]}, r"latents_mean must be None, got \[0.0\]"),
        ({"latents_std": [1.0]}, r"latents_std must be None, got \[1.0\]"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types must be .* got"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types must be .* got"),
        ({"window": 3}, "^here: .* AutoencoderKL; unknown: window; missing: none$"),
        ({"latent_channels": "absent"}, "unknown: none; missing: latent_channels$"),
        ({"block_out_channels": "absent"}, "unknown: none; missing: block_out_channels$"),
        ({"block_out_channels": [4, 8, 9]}, "^here: block_out_channels must be .* multiples of"),
        ({"block_out_channels": 4, "up_block_types": [], "down_block_types": []}, "^here: block_"),
        ({"layers_per_block": 0}, "^here: layers_per_block must be a positive int"),
        ({"scaling_factor": None}, "^here: scaling_factor must be a finite number"),
        ({"sample_size": [8, 8]}, "^here: sample_size must be a positive int"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_config_from_json(_document(**changes), source="here")
