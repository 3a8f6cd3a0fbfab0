import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import TextEncoder, TextEncoderConfig

CONFIG = TextEncoderConfig(vocabulary_size=11, max_tokens=6, width=16, hidden_dim=12, pooled_dim=10)
TOKENS = jnp.array([[3, 5, 0, 0, 0, 0], [2, 2, 7, 10, 4, 1], [0, 0, 0, 0, 0, 0]])


def _encoder(config=CONFIG):
    return TextEncoder(config, rngs=nnx.Rngs(0))


@nnx.jit
def _encode(encoder, tokens):
    return encoder(tokens)


def test_shapes_and_finite_outputs_for_the_empty_caption():
    context, pooled = _encode(_encoder(), TOKENS)
    assert context.shape == (3, 6, 12)
    assert pooled.shape == (3, 10)
    assert jnp.isfinite(context).all()
    assert jnp.isfinite(pooled).all()


def test_padding_is_invisible_to_words():
    encoder = _encoder()
    context, pooled = _encode(encoder, TOKENS[:1])
    short_context, short_pooled = _encode(encoder, TOKENS[:1, :2])
    np.testing.assert_allclose(context[:, :2], short_context, atol=1e-6)
    np.testing.assert_allclose(pooled, short_pooled, atol=1e-6)


def test_every_word_and_the_order_matter():
    encoder = _encoder()
    _, pooled = _encode(encoder, jnp.array([[3, 5], [3, 6], [5, 3]]))
    distances = jnp.abs(pooled[:, None] - pooled[None, :]).max(-1)
    assert jnp.all(distances + jnp.eye(3) > 1e-5)


def test_attention_is_bidirectional():
    encoder = _encoder()
    context, _ = _encode(encoder, jnp.array([[3, 5], [3, 6]]))
    assert jnp.abs(context[0, 0] - context[1, 0]).max() > 1e-6


def test_gradients_are_finite_with_an_empty_caption_in_the_batch():
    graph, state = nnx.split(_encoder())

    def loss(state):
        context, pooled = nnx.merge(graph, state)(TOKENS)
        return jnp.sum(jnp.sin(context)) + jnp.sum(jnp.sin(pooled))

    for path, leaf in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        assert jnp.isfinite(leaf[...]).all(), path
        if path[-2:] != ("key", "bias"):  # softmax ignores a constant added to all keys
            assert jnp.abs(leaf[...]).max() > 1e-7, path


def test_bfloat16_is_close_to_float32():
    exact, _ = _encode(_encoder(), TOKENS)
    with jax.numpy_dtype_promotion("standard"):
        half, pooled = _encode(_encoder(dataclasses.replace(CONFIG, dtype="bfloat16")), TOKENS)
    assert half.dtype == pooled.dtype == jnp.bfloat16
    assert jnp.linalg.norm(half.astype(jnp.float32) - exact) < 0.03 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros((2, 7), int), r"shape \(batch, 1 to 6\), got \(2, 7\)"),
        (jnp.zeros((2, 0), int), r"shape \(batch, 1 to 6\), got \(2, 0\)"),
        (jnp.zeros((3,), int), r"shape \(batch, 1 to 6\), got \(3,\)"),
        (jnp.zeros((2, 3)), "tokens must be integers, got float32"),
    ],
)
def test_wrong_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        _encoder()(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_size": 0}, "vocabulary_size must be a positive int"),
        ({"num_heads": 3}, "num_heads must divide width, got num_heads=3 and width=16"),
        ({"dtype": "int32"}, "dtype must be a float dtype"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
