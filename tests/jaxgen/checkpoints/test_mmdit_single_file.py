from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.checkpoints import (
    export_mmdit,
    load_mmdit_folder,
    load_mmdit_single_file,
    load_safetensors,
    mmdit_from_single_file,
    mmdit_shapes,
    save_safetensors,
)
from jaxgen.models import MMDIT_PRESETS

FILES = Path(__file__).parents[2] / "goldens/sd3_files"
NAMES = ["plain", "qk_norm", "dual"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PREFIX = {"plain": "model.diffusion_model.", "qk_norm": "", "dual": "model.diffusion_model."}


def _single(name):
    return load_safetensors(FILES / name / "single_file.safetensors")


def _load(path, **options):
    # Without norms of the heads, nothing tells that these are smaller than the released ones.
    return load_mmdit_single_file(path, **{"dtype": jnp.float32, "head_dim": 4} | options)


@pytest.mark.parametrize("name", NAMES)
def test_single_files_hold_the_weights_of_the_folders(name):
    config, arrays = mmdit_from_single_file(_single(name), head_dim=4, sample_size=12)
    theirs = load_safetensors(FILES / name / WEIGHTS)
    assert arrays.keys() == theirs.keys()
    for key, array in theirs.items():
        assert arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)
    assert config == load_mmdit_folder(FILES / name, dtype=jnp.float32).config


@pytest.mark.parametrize("name", NAMES)
def test_models_are_those_of_the_folders_bit_for_bit(name):
    options = {"dtype": jnp.bfloat16, "attention": "int8", "remat": True, "scan": True}
    model = _load(FILES / name / "single_file.safetensors", sample_size=12, **options)
    folder = load_mmdit_folder(FILES / name, **options)
    assert model.config == folder.config
    arrays = export_mmdit(model)
    for key, array in export_mmdit(folder).items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)


def test_sharding_and_progress_work_as_for_folders():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    calls, sharding = [], NamedSharding(mesh, PartitionSpec())
    model = _load(
        FILES / "dual/single_file.safetensors",
        param_dtype=jnp.bfloat16,
        sharding=lambda path, shape: sharding,
        progress=lambda *numbers: calls.append(numbers),
    )
    assert model.blocks[0].image_mlp.up.kernel[...].sharding == sharding
    total = sum(array.nbytes for array in export_mmdit(model).values())
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("name", NAMES)
def test_the_trap(name):
    """Two modulations give the shift first, and only these two."""
    original = _single(name)
    _, arrays = mmdit_from_single_file(original, head_dim=4)
    last = 1 if name == "qk_norm" else 2
    swapped = {"norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"}
    layers = {"final_layer": "norm_out"}
    for number in range(last + 1):
        layers[f"joint_blocks.{number}.x_block"] = f"transformer_blocks.{number}.norm1"
        layers[f"joint_blocks.{number}.context_block"] = (
            f"transformer_blocks.{number}.norm1_context"
        )
    for old, new in layers.items():
        for kind in ("weight", "bias"):
            source = original[f"{PREFIX[name]}{old}.adaLN_modulation.1.{kind}"]
            first, second = np.split(source, 2)
            turned = np.concatenate([second, first])
            assert not np.array_equal(source, turned)
            expected = turned if f"{new}.linear" in swapped else source
            np.testing.assert_array_equal(arrays[f"{new}.linear.{kind}"], expected, err_msg=new)
    # Everything else, in whichever block, is as it was or a third of it.
    memory = {key for key, array in arrays.items() if _shares(array, original.values())}
    assert arrays.keys() - memory == {
        f"{layer}.{kind}" for layer in swapped for kind in ("weight", "bias")
    }


def _shares(array, others):
    return any(np.shares_memory(array, other) for other in others)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_its_place(name):
    """Marking one original array changes only the arrays made of it."""
    original = _single(name)
    _, before = mmdit_from_single_file(original, head_dim=4)
    changed = {}
    for key, array in original.items():
        _, after = mmdit_from_single_file(original | {key: array + array.dtype.type(1)}, head_dim=4)
        changed[key] = {new for new in after if not np.array_equal(after[new], before[new])}
    counts = {key: len(new) for key, new in changed.items()}
    assert sorted(new for found in changed.values() for new in found) == sorted(before)
    for key, count in counts.items():
        other = key.startswith(("first_stage_model.", "text_encoders."))
        assert count == (0 if other else 3 if ".qkv." in key else 1)


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_released_models_are_detected(name):
    config = MMDIT_PRESETS[name]
    arrays = {
        f"model.diffusion_model.{key}": np.broadcast_to(ml_dtypes.bfloat16(0), shape)
        for key, shape in _released(config).items()
    }
    detected, found = mmdit_from_single_file(arrays)
    assert detected == config
    shapes = mmdit_shapes(config)
    assert {key: array.shape for key, array in found.items()} == {
        key: shape.shape for key, shape in shapes.items()
    }


def _released(config):
    """The keys and shapes of the original code, written by hand."""
    width, depth = config.width, config.num_layers
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 2048),
        "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, 4096),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (64, width),
        "x_embedder.proj": (width, 16, 2, 2),
    }
    norms = []
    for i in range(depth):
        dual = i in config.dual_attention_layers
        for stream in ("x_block", "context_block"):
            block, only_attended = (
                f"joint_blocks.{i}.{stream}",
                (i, stream)
                == (
                    depth - 1,
                    "context_block",
                ),
            )
            attentions = ["attn", "attn2"] if dual and stream == "x_block" else ["attn"]
            chunks = 2 if only_attended else 9 if len(attentions) == 2 else 6
            linears[f"{block}.adaLN_modulation.1"] = (chunks * width, width)
            for attention in attentions:
                linears[f"{block}.{attention}.qkv"] = (3 * width, width)
                if not only_attended:
                    linears[f"{block}.{attention}.proj"] = (width, width)
                if config.qk_norm:
                    norms += [f"{block}.{attention}.ln_{letter}.weight" for letter in "qk"]
            if not only_attended:
                linears[f"{block}.mlp.fc1"] = (4 * width, width)
                linears[f"{block}.mlp.fc2"] = (width, 4 * width)
    return (
        {"pos_embed": (1, config.pos_embed_max_size**2, width)}
        | {f"{key}.weight": shape for key, shape in linears.items()}
        | {f"{key}.bias": shape[:1] for key, shape in linears.items()}
        | dict.fromkeys(norms, (64,))
    )


def _refusal(arrays, **options):
    with pytest.raises(ValueError, match=r"^here: ") as caught:
        mmdit_from_single_file(arrays, "here", **{"head_dim": 4} | options)
    return str(caught.value)


def test_wrong_keys_are_all_listed_with_their_original_names():
    arrays, prefix = _single("dual"), PREFIX["dual"]
    del arrays[f"{prefix}joint_blocks.1.x_block.attn.qkv.bias"]
    key = f"{prefix}joint_blocks.0.x_block.attn2.qkv.weight"
    arrays[key] = arrays[key][:-1]
    arrays[f"{prefix}joint_blocks.7.stranger"] = np.zeros(3)
    arrays["model_ema.decay"] = np.zeros(3)
    arrays["x_embedder.proj.bias"] = np.zeros(3)
    assert _refusal(arrays) == (
        f"here: the weights do not fit the model; "
        f"missing (1): {prefix}joint_blocks.1.x_block.attn.qkv.bias; "
        f"unused (3): {prefix}joint_blocks.7.stranger, model_ema.decay, x_embedder.proj.bias; "
        f"wrong shape or dtype (1): {key} (expected float32[24, 8], got float32[23, 8])"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_key_is_named(name):
    original = _single(name)
    for key in original:
        if not key.startswith(("first_stage_model.", "text_encoders.")):
            rest = {other: array for other, array in original.items() if other != key}
            assert f"missing (1): {key}" in _refusal(rest)


@pytest.mark.parametrize("name", NAMES)
def test_every_renamed_key_is_named(name):
    original = _single(name)
    for key in original:
        renamed = {k + "_" if k == key else k: array for k, array in original.items()}
        if key.startswith(("first_stage_model.", "text_encoders.")):
            mmdit_from_single_file(renamed, head_dim=4)
        else:
            assert key in _refusal(renamed)


@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_shape_or_dtype_is_named(name):
    original = _single(name)
    for key, array in original.items():
        if not key.startswith(("first_stage_model.", "text_encoders.")):
            assert key in _refusal(original | {key: array.astype(np.int32)})
            message = _refusal(original | {key: array[..., None]})
            assert key in message


def test_the_size_of_heads_must_be_told_without_norms():
    assert "width of 8, which is no multiple of head_dim=64" in _refusal(
        _single("plain"), head_dim=None
    )
    config, _ = mmdit_from_single_file(_single("dual"))
    assert (config.num_heads, config.head_dim, config.sample_size) == (2, 4, 14)


def test_other_files_are_refused(tmp_path):
    assert "in the original layout are missing (5): pos_embed, x_emb" in _refusal({})
    folder = load_safetensors(FILES / "dual" / WEIGHTS)
    assert "missing (4): pos_embed, x_embedder.proj.weight" in _refusal(folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        _load(tmp_path / "nowhere.safetensors")
    path = tmp_path / "model.safetensors"
    save_safetensors(path, _single("plain") | {"denoiser.sigmas": np.zeros(3)})
    with pytest.raises(ValueError, match=r"model\.safetensors: .* unused \(1\): denoiser.sigmas$"):
        _load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        _load(path)
