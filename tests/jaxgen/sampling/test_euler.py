import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import FlowMatchingSchedule, euler_sample

SHAPE = (3, 4, 4, 2)


@pytest.mark.parametrize("steps", [1, 5, 28])
def test_velocity_towards_a_point_reaches_it(steps):
    target = jax.random.normal(jax.random.key(0), SHAPE)
    noise = jax.random.normal(jax.random.key(1), SHAPE)
    # All paths to one point are straight: v = (x - target) / sigma is exact for any step.
    result = euler_sample(
        lambda x, sigma: (x - target) / sigma, noise, FlowMatchingSchedule().sigmas(steps)
    )
    np.testing.assert_allclose(result, target, atol=2e-6)


def test_converges_to_a_gaussian_at_first_order():
    mean, std = 0.7, 0.3
    noise = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))

    def velocity(x, sigma):
        # Exact for data N(mean, std^2): x_sigma is N((1 - sigma) mean, variance).
        variance = sigma**2 + ((1 - sigma) * std) ** 2
        centered = (x - (1 - sigma) * mean) / variance
        expected_noise = sigma * centered
        expected_picture = mean + (1 - sigma) * std**2 * centered
        return expected_noise - expected_picture

    # The flow between Gaussians is affine: noise z must end at mean + std * z.
    exact = mean + std * noise
    errors = []
    for steps in (20, 40, 80):
        result = euler_sample(velocity, noise, FlowMatchingSchedule(1.0).sigmas(steps))
        errors.append(float(jnp.abs(result - exact).max()))
    assert errors[2] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.3)


def test_state_is_float32_whatever_the_model_computes_in():
    noise = jnp.ones(SHAPE, jnp.bfloat16)

    def velocity(x, sigma):
        assert x.dtype == jnp.float32
        assert sigma.dtype == jnp.float32
        assert sigma.shape == ()
        return jnp.ones(SHAPE, jnp.bfloat16)

    result = euler_sample(velocity, noise, FlowMatchingSchedule().sigmas(28))
    assert result.dtype == jnp.float32
    # 28 steps rounded to bfloat16 would not add up to 1 so closely.
    np.testing.assert_allclose(result, 0, atol=1e-6)


def test_program_does_not_grow_with_steps():
    def size(steps):
        sample = lambda noise, sigmas: euler_sample(lambda x, sigma: x * sigma, noise, sigmas)
        return len(str(jax.make_jaxpr(sample)(jnp.ones(SHAPE), jnp.ones(steps + 1))))

    assert size(100) <= size(10) + 50


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_refuses_what_is_no_schedule(shape):
    with pytest.raises(ValueError, match="at least 2 noise levels, got shape"):
        euler_sample(lambda x, sigma: x, jnp.ones(SHAPE), jnp.ones(shape))
