import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import LogitNormal, add_noise, flow_matching_loss, timestep_of

PICTURES = jax.random.uniform(jax.random.key(9), (6, 4, 4, 3), minval=-1, maxval=1)


def test_path_is_straight():
    noise = jax.random.normal(jax.random.key(0), PICTURES.shape)
    sigma = jnp.array([0.0, 1.0, 0.5, 0.25, 0.75, 0.1])
    noisy = add_noise(PICTURES, noise, sigma)
    np.testing.assert_array_equal(noisy[0], PICTURES[0])
    np.testing.assert_array_equal(noisy[1], noise[1])
    np.testing.assert_allclose(noisy[3], 0.25 * noise[3] + 0.75 * PICTURES[3], rtol=1e-6)


def test_exact_velocity_has_no_loss():
    def velocity(noisy, sigma):
        # Knows the pictures, so noise - picture = (noisy - picture) / sigma.
        return (noisy - PICTURES) / sigma[:, None, None, None]

    losses = flow_matching_loss(velocity, PICTURES, jax.random.key(1))
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses, 0, atol=1e-8)


def test_loss_is_the_mean_square_per_picture():
    zero = flow_matching_loss(lambda x, s: jnp.zeros_like(x), PICTURES, jax.random.key(1))
    offset = flow_matching_loss(
        lambda x, s: (x - PICTURES) / s[:, None, None, None] + 2.0, PICTURES, jax.random.key(1)
    )
    np.testing.assert_allclose(offset, 4, rtol=1e-5)
    # The target noise - picture has variance 1 + 1/3.
    assert float(jnp.mean(zero)) == pytest.approx(4 / 3, abs=0.3)


def test_everything_but_the_model_is_float32():
    def velocity(noisy, sigma):
        assert noisy.dtype == jnp.float32
        assert sigma.dtype == jnp.float32
        return noisy.astype(jnp.bfloat16)

    losses = flow_matching_loss(velocity, PICTURES.astype(jnp.bfloat16), jax.random.key(1))
    assert losses.dtype == jnp.float32


def test_key_decides_the_noise():
    loss = lambda seed: flow_matching_loss(lambda x, s: x, PICTURES, jax.random.key(seed))
    np.testing.assert_array_equal(loss(1), loss(1))
    assert not np.array_equal(loss(1), loss(2))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5)])
def test_levels_are_logit_normal(mean, std):
    sigma = LogitNormal(mean, std).sample(jax.random.key(0), 20_000)
    assert sigma.dtype == jnp.float32
    assert 0 < float(sigma.min()) < float(sigma.max()) < 1
    logit = jnp.log(sigma / (1 - sigma))
    assert float(logit.mean()) == pytest.approx(mean, abs=0.02)
    assert float(logit.std()) == pytest.approx(std, abs=0.02)


def test_shift_adds_its_logarithm_to_the_logit():
    plain = LogitNormal().sample(jax.random.key(0), 100)
    shifted = LogitNormal(shift=3.0).sample(jax.random.key(0), 100)
    logit = lambda sigma: jnp.log(sigma / (1 - sigma))
    np.testing.assert_allclose(logit(shifted) - logit(plain), np.log(3), atol=1e-4)


@pytest.mark.parametrize("levels", [LogitNormal(), LogitNormal(0.7, 0.6, 5.0)])
def test_quantiles_are_those_of_samples(levels):
    shares = jnp.array([0.05, 0.3, 0.5, 0.8])
    sampled = np.quantile(levels.sample(jax.random.key(1), 100_000), shares)
    np.testing.assert_allclose(levels.quantile(shares), sampled, rtol=0.02)


def test_timestep_is_not_rounded():
    np.testing.assert_allclose(timestep_of(jnp.array([0.0, 0.00123, 1.0])), [0, 1.23, 1000])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": float("nan")}, "mean must be a finite number, got mean=nan"),
        ({"std": 0.0}, "std must be a positive finite number, got std=0.0"),
        ({"shift": -1.0}, "shift must be a positive finite number, got shift=-1.0"),
    ],
)
def test_refuses_distributions(fields, message):
    with pytest.raises(ValueError, match=message):
        LogitNormal(**fields)
