from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import load_clip_text_folder, load_safetensors, load_t5_folder
from jaxgen.models import (
    CLIPText,
    CLIPTextConfig,
    SD3Text,
    T5Encoder,
    T5EncoderConfig,
    join_sd3_text,
)

GOLDENS = Path(__file__).parents[2] / "goldens/text_encoders"
CLIP = CLIPTextConfig(num_layers=1, num_heads=1, width=8, ffn_dim=8, projection_dim=6)


def _arrays(**changes):
    shapes = {
        "clip_l": (2, 7, 3),
        "clip_l_pooled": (2, 2),
        "clip_g": (2, 7, 5),
        "clip_g_pooled": (2, 4),
        "t5": (2, 6, 10),
    }
    values = {name: jnp.full(shape, i + 1.0) for i, (name, shape) in enumerate(shapes.items())}
    return values | changes


@pytest.mark.parametrize("with_t5", [True, False])
def test_agrees_with_the_pipeline_of_diffusers(with_t5):
    golden = load_safetensors(GOLDENS / "sd3.safetensors")
    t5 = load_t5_folder(GOLDENS / "t5") if with_t5 else None
    clips = (load_clip_text_folder(GOLDENS / name) for name in ("clip_l", "clip_g"))
    model = SD3Text(*clips, t5, hidden_dim=44)
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    tokens = (jnp.asarray(golden[name]) for name in names)
    context, pooled = nnx.jit(lambda model, *tokens: model(*tokens))(model, *tokens)
    end = "" if with_t5 else "_without_t5"
    assert context.shape == (2, 77 + 40, 44)
    np.testing.assert_allclose(context, golden[f"context{end}"], atol=1e-5)
    np.testing.assert_allclose(pooled, golden[f"pooled{end}"], atol=1e-5)
    assert not context[:, :77, 40:].any()
    assert bool(context[:, 77:].any()) == with_t5


def test_places_of_the_parts():
    context, pooled = join_sd3_text(**_arrays())
    assert context.shape == (2, 13, 10)
    np.testing.assert_array_equal(context[0, 0], [1, 1, 1, 3, 3, 3, 3, 3, 0, 0])
    np.testing.assert_array_equal(context[1, 6], context[0, 0])
    np.testing.assert_array_equal(context[:, 7:], jnp.full((2, 6, 10), 5.0))
    np.testing.assert_array_equal(pooled, [[2, 2, 4, 4, 4, 4]] * 2)


def test_without_t5_there_are_zeros():
    context, _ = join_sd3_text(**_arrays(t5=None), t5_tokens=6, hidden_dim=10)
    np.testing.assert_array_equal(context[:, :7], join_sd3_text(**_arrays()).context[:, :7])
    assert not context[:, 7:].any()
    assert join_sd3_text(**_arrays(t5=None)).context.shape == (2, 7 + 256, 4096)


@pytest.mark.parametrize(
    ("clip", "t5", "joined"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "bfloat16", "float32"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_the_dtype_is_that_of_the_encoders_or_float32(clip, t5, joined):
    arrays = {name: value.astype(clip) for name, value in _arrays().items()}
    output = join_sd3_text(**arrays | {"t5": arrays["t5"].astype(t5)})
    assert output.context.dtype == output.pooled.dtype == jnp.dtype(joined)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_l": jnp.zeros((7, 3))}, r"clip_l must have 3 axes, .* got \(7, 3\)"),
        ({"clip_g": jnp.zeros((1, 7, 5))}, r"clip_g must have .* first of 2 prompts, got \(1, 7"),
        ({"clip_g_pooled": jnp.zeros(4)}, r"clip_g_pooled must have 2 axes, .* got \(4,\)"),
        ({"t5": jnp.zeros((3, 6, 10))}, r"t5 must have 3 axes, .* got \(3, 6, 10\)"),
        ({"clip_g": jnp.zeros((2, 6, 5))}, "must have as many tokens, got 7 and 6"),
        ({"t5": jnp.zeros((2, 6, 7))}, "must fit into 7 channels, got 3 and 5"),
        ({"t5": None, "hidden_dim": 7}, "must fit into 7 channels, got 3 and 5"),
        ({"t5": None, "t5_tokens": -1}, "t5_tokens must not be negative, got -1"),
    ],
)
def test_wrong_arrays_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        join_sd3_text(**_arrays(**changes))


def test_released_shapes():
    tokens = jnp.zeros((1, 77), int)
    create = lambda width: CLIPText(
        CLIPTextConfig(num_layers=1, num_heads=4, width=width, ffn_dim=8, projection_dim=width),
        rngs=nnx.Rngs(0),
    )
    run = lambda: SD3Text(create(768), create(1280))(tokens, tokens)
    context, pooled = nnx.eval_shape(run)
    assert context.shape == (1, 333, 4096)
    assert pooled.shape == (1, 2048)


def test_encoders_that_do_not_fit_and_missing_tokens_are_refused():
    t5 = T5EncoderConfig(num_layers=1, num_heads=1, width=15, ffn_dim=8, vocabulary_size=9)
    clip = lambda: CLIPText(CLIP, rngs=nnx.Rngs(0))

    def make(width):
        encoder = T5Encoder(T5EncoderConfig(**vars(t5) | {"width": width}), rngs=nnx.Rngs(0))
        return SD3Text(clip(), clip(), encoder)

    with pytest.raises(ValueError, match="must fit into 15 channels, got 8 and 8"):
        nnx.eval_shape(lambda: make(15))
    with pytest.raises(ValueError, match="must fit into 12 channels, got 8 and 8"):
        nnx.eval_shape(lambda: SD3Text(clip(), clip(), hidden_dim=12))
    tokens = jnp.zeros((1, 5), int)
    with pytest.raises(ValueError, match="t5_tokens must be given: there is a T5 encoder"):
        nnx.eval_shape(lambda: make(16)(tokens, tokens))
