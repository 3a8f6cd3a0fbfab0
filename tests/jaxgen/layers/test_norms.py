import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.layers import GroupNorm, LayerNorm, RMSNorm, layer_norm


def _values(*shape, mean=0.0, dtype=jnp.float32):
    return (jax.random.normal(jax.random.key(0), shape) + mean).astype(dtype)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_layer_norm_matches_float64_even_far_from_zero(mean):
    x = _values(3, 5, 64, mean=mean)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x), exact, atol=1e-5 if mean == 0.0 else 2e-4)


def test_layer_norm_keeps_float32_precision_for_bfloat16_input():
    x = _values(3, 64, dtype=jnp.bfloat16)
    assert layer_norm(x).dtype == jnp.float32
    np.testing.assert_allclose(layer_norm(x), layer_norm(x.astype(jnp.float32)), atol=0)


def test_trained_layer_norm_scales_and_shifts():
    norm = LayerNorm(8)
    norm.scale.set_value(jnp.arange(8.0))
    norm.bias.set_value(jnp.full((8,), 3.0))
    x = _values(2, 5, 8)
    expected = np.asarray(layer_norm(x)) * np.arange(8.0) + 3.0
    np.testing.assert_allclose(norm(x), expected, atol=1e-6)


def test_rms_norm_matches_the_formula_and_keeps_the_dtype():
    norm = RMSNorm(8)
    norm.scale.set_value(jnp.linspace(0.5, 2.0, 8))
    x = _values(2, 3, 4, 8, mean=2.0)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x), exact * np.linspace(0.5, 2.0, 8), rtol=1e-5)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_group_norm_normalizes_each_group_of_each_picture():
    x = _values(2, 4, 6, 8, mean=5.0).at[1].multiply(10.0)
    groups = GroupNorm(8, 2)(x).reshape(2, 24, 2, 4)
    np.testing.assert_allclose(groups.mean((1, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(groups.std((1, 3)), 1.0, atol=1e-3)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups must divide dim, got groups=3 and dim=8"):
        GroupNorm(8, 3)
