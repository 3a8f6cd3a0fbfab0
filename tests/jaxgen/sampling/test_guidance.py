import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import Conditioning, classifier_free_guidance

LATENTS = jnp.zeros((2, 4, 4, 3))
SIGMA = jnp.float32(0.25)


def conditioning(value, batch=2):
    return Conditioning(jnp.full((batch, 5, 6), value), jnp.full((batch, 7), value))


def model(latents, timestep, context, pooled):
    """Answers with the mean of its conditioning, so that the halves can be told apart."""
    assert latents.shape == (4, 4, 4, 3)
    assert timestep.shape == (4,)
    value = jnp.mean(context, (1, 2)) + jnp.mean(pooled, 1)
    return latents + value[:, None, None, None]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 2.0), (1.0, 6.0), (4.0, 18.0), (-1.0, -2.0)])
def test_extrapolates_from_unconditional_to_conditional(scale, expected):
    velocity = classifier_free_guidance(model, conditioning(3.0), conditioning(1.0), scale)
    np.testing.assert_allclose(velocity(LATENTS, SIGMA), expected, rtol=1e-6)


def test_model_sees_the_timestep():
    seen = []

    def record(latents, timestep, context, pooled):
        seen.append(timestep)
        return latents

    classifier_free_guidance(record, conditioning(1.0), conditioning(1.0), 2.0)(LATENTS, SIGMA)
    np.testing.assert_allclose(seen[0], [250] * 4)


def test_combines_in_float32():
    def low_precision(latents, timestep, context, pooled):
        return model(latents, timestep, context, pooled).astype(jnp.bfloat16)

    velocity = classifier_free_guidance(low_precision, conditioning(3.0), conditioning(1.0), 1.01)
    result = velocity(LATENTS, SIGMA)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, 2 + 1.01 * 4, rtol=1e-6)


def test_scale_is_traced():
    traces = []

    @jax.jit
    def guided(scale, conditional, unconditional):
        traces.append(scale)
        return classifier_free_guidance(model, conditional, unconditional, scale)(LATENTS, SIGMA)

    for scale in (1.0, 2.0, 5.0):
        result = guided(jnp.float32(scale), conditioning(3.0), conditioning(1.0))
        np.testing.assert_allclose(result, 2 + scale * 4, rtol=1e-6)
    assert len(traces) == 1


def test_refuses_halves_of_different_shapes():
    with pytest.raises(ValueError, match=r"context must have one shape, got \(2, 5, 6\) and \(1,"):
        classifier_free_guidance(model, conditioning(1.0), conditioning(1.0, batch=1), 1.0)
