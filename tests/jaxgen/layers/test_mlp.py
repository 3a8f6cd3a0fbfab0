import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.layers import ConditionEmbedding, FeedForward


def test_feed_forward_uses_tanh_gelu_between_two_linears():
    layer = FeedForward(4, rngs=nnx.Rngs(0))
    assert layer.up.kernel.shape == (4, 16)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    up = np.asarray(layer.up(x), np.float64)
    gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    np.testing.assert_allclose(layer(x), gelu @ layer.down.kernel[...], atol=1e-5)


def test_feed_forward_hidden_dim():
    assert FeedForward(4, 6, rngs=nnx.Rngs(0)).down.kernel.shape == (6, 4)


def test_condition_embedding_uses_silu_and_starts_small():
    layer = ConditionEmbedding(64, 128, rngs=nnx.Rngs(0))
    assert abs(float(layer.hidden.kernel[...].std()) - 0.02) < 0.001
    x = jax.random.normal(jax.random.key(0), (2, 64))
    hidden = layer.hidden(x)
    np.testing.assert_allclose(layer(x), layer.output(hidden / (1 + jnp.exp(-hidden))), atol=1e-6)
