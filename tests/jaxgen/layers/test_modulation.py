import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import AdaLNScaleShift, AdaLNZero, Modulation, add_gated, layer_norm, modulate


def _random(module):
    kernel = module.projection.kernel
    kernel.set_value(jax.random.normal(jax.random.key(0), kernel.shape))
    return module


@pytest.mark.parametrize("branches", [2, 3])
def test_adaln_zero_orders_shift_scale_gate(branches):
    module = _random(AdaLNZero(4, branches, rngs=nnx.Rngs(0)))
    conditioning = jax.random.normal(jax.random.key(1), (2, 4))
    raw = module.projection(jax.nn.silu(conditioning))
    modulations = module(conditioning)
    assert len(modulations) == branches
    for number, part in enumerate(part for modulation in modulations for part in modulation):
        np.testing.assert_array_equal(part[:, 0], raw[:, 4 * number : 4 * number + 4])


def test_adaln_scale_shift_orders_scale_first():
    module = _random(AdaLNScaleShift(4, rngs=nnx.Rngs(0)))
    conditioning = jax.random.normal(jax.random.key(1), (2, 4))
    raw = module.projection(jax.nn.silu(conditioning))
    (modulation,) = module(conditioning)
    np.testing.assert_array_equal(modulation.scale[:, 0], raw[:, :4])
    np.testing.assert_array_equal(modulation.shift[:, 0], raw[:, 4:])
    assert modulation.gate is None


@pytest.mark.parametrize("kind", [AdaLNZero, AdaLNScaleShift])
def test_modulation_starts_at_zero(kind):
    module = kind(4, rngs=nnx.Rngs(0))
    parts = jax.tree.leaves(module(jnp.ones((2, 4))))
    assert all(not part.any() for part in parts)


def test_modulate_and_gate_follow_the_formula():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    shift, scale, gate = jax.random.normal(jax.random.key(1), (3, 2, 1, 4))
    modulation = Modulation(shift, scale, gate)
    np.testing.assert_allclose(
        modulate(x, modulation), layer_norm(x) * (1 + scale) + shift, atol=1e-6
    )
    np.testing.assert_allclose(add_gated(x, 2 * x, modulation), x + gate * 2 * x, atol=1e-6)


def test_bfloat16_modulation_rounds_once():
    x = (jax.random.normal(jax.random.key(0), (2, 3, 64)) + 4.0).astype(jnp.bfloat16)
    parts = jax.random.normal(jax.random.key(1), (3, 2, 1, 64)).astype(jnp.bfloat16)
    modulation, wide = Modulation(*parts), Modulation(*parts.astype(jnp.float32))
    exact = modulate(x.astype(jnp.float32), wide)
    result = modulate(x, modulation)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, exact.astype(jnp.bfloat16))


def test_add_gated_needs_a_gate():
    x = jnp.zeros((1, 1, 4))
    with pytest.raises(ValueError, match="needs a modulation with a gate, got gate=None"):
        add_gated(x, x, Modulation(x, x))
