import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import (
    export_mmdit,
    load_mmdit,
    load_safetensors,
    mmdit_shapes,
    read_safetensors_header,
    save_safetensors,
)
from jaxgen.models import MMDIT_PRESETS, MMDiT, MMDiTConfig

GOLDENS = Path(__file__).parents[2] / "goldens"


def _golden(name):
    """Configuration, weights, inputs and output that goldens/write_mmdit.py wrote."""
    path = GOLDENS / f"mmdit_{name}.safetensors"
    theirs = json.loads(read_safetensors_header(path).metadata["config"])
    arrays = load_safetensors(path)
    config = MMDiTConfig(
        sample_size=theirs["sample_size"],
        patch_size=theirs["patch_size"],
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"],
        num_layers=theirs["num_layers"],
        num_heads=theirs["num_attention_heads"],
        head_dim=theirs["attention_head_dim"],
        joint_attention_dim=theirs["joint_attention_dim"],
        pooled_projection_dim=theirs["pooled_projection_dim"],
        pos_embed_max_size=theirs["pos_embed_max_size"],
        qk_norm=theirs.get("qk_norm") == "rms_norm",
        dual_attention_layers=tuple(theirs.get("dual_attention_layers", ())),
    )

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    return config, part("weights."), part("input."), arrays["output"]


@pytest.mark.parametrize("name", ["plain", "qk_norm", "dual", "pixels"])
def test_agrees_with_diffusers(name):
    config, weights, inputs, output = _golden(name)
    model = load_mmdit(config, weights)
    velocity = nnx.jit(lambda model, *inputs: model(*inputs))(
        model,
        jnp.moveaxis(inputs["latents"], 1, -1),
        jnp.asarray(inputs["timestep"]),
        jnp.asarray(inputs["context"]),
        jnp.asarray(inputs["pooled"]),
    )
    velocity = np.moveaxis(np.asarray(velocity), -1, 1)
    assert np.linalg.norm(velocity - output) <= 1e-5 * np.linalg.norm(output)
    np.testing.assert_allclose(velocity, output, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "dual", "pixels"])
def test_round_trip_is_exact(name, tmp_path):
    config, weights, _, _ = _golden(name)
    path = tmp_path / "model.safetensors"
    save_safetensors(path, export_mmdit(load_mmdit(config, weights)), max_shard_bytes=20_000)
    again = load_safetensors(path, mmdit_shapes(config))
    assert again.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


def test_bfloat16_files_load_into_float32_models():
    config = MMDIT_PRESETS["tiny"]
    model = MMDiT(config, rngs=nnx.Rngs(0))
    half = {key: array.astype(jnp.bfloat16) for key, array in export_mmdit(model).items()}
    loaded = export_mmdit(load_mmdit(config, half))
    for key, array in half.items():
        assert loaded[key].dtype == np.float32
        np.testing.assert_array_equal(loaded[key], array.astype(np.float32))


def test_released_key_layout():
    shapes = mmdit_shapes(MMDIT_PRESETS["sd3.5-medium"])
    assert len(shapes) == 909
    some = {
        "pos_embed.pos_embed": (1, 384**2, 1536),
        "pos_embed.proj.weight": (1536, 16, 2, 2),
        "time_text_embed.text_embedder.linear_1.weight": (1536, 2048),
        "context_embedder.weight": (1536, 4096),
        "norm_out.linear.weight": (3072, 1536),
        "proj_out.bias": (64,),
        "transformer_blocks.0.norm1.linear.weight": (9 * 1536, 1536),
        "transformer_blocks.12.attn2.norm_k.weight": (64,),
        "transformer_blocks.13.norm1.linear.bias": (6 * 1536,),
        "transformer_blocks.23.norm1_context.linear.weight": (3072, 1536),
        "transformer_blocks.23.ff.net.0.proj.weight": (6144, 1536),
    }
    assert {key: shapes[key].shape for key in some} == some
    assert "transformer_blocks.13.attn2.to_q.weight" not in shapes
    assert "transformer_blocks.23.attn.to_add_out.weight" not in shapes
    assert "transformer_blocks.23.ff_context.net.2.weight" not in shapes


def test_wrong_weights_are_all_listed():
    config, weights, _, _ = _golden("pixels")
    weights["proj_out.weight"] = weights["proj_out.weight"].T
    weights["pos_embed.pos_embed"] = weights["pos_embed.pos_embed"][:, :-1]
    weights["x_embedder.proj.bias"] = weights.pop("pos_embed.proj.bias")
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        load_mmdit(config, weights, source="some/file")
    assert str(caught.value) == (
        "some/file: the weights do not fit the model; missing (1): pos_embed.proj.bias; "
        "unused (1): x_embedder.proj.bias; wrong shape or dtype (2): "
        "pos_embed.pos_embed (expected float32[1, 36, 8], got float32[1, 35, 8]), "
        "proj_out.weight (expected float32[48, 8], got float32[8, 48])"
    )


def test_loading_never_computes_initial_values(monkeypatch):
    config, weights, _, _ = _golden("pixels")
    ran = []
    monkeypatch.setattr(
        "jaxgen.layers.embeddings.position_table",
        lambda side, dim: (
            ran.append(isinstance(jnp.zeros(()), jax.core.Tracer)) or jnp.zeros((side, side, dim))
        ),
    )
    load_mmdit(config, weights)
    assert ran
    assert all(ran)
