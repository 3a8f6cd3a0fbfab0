import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.state import (
    SPIKE_WARMUP,
    create_state,
    make_optimizer,
    make_train_step,
    take_apart,
)

RATE = 0.125


class Buffer(nnx.Variable):
    """Stored, not trained."""


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.table = Buffer(jnp.arange(3.0))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def quadratic(params, frozen, batch, key):
    return jnp.sum(jnp.square(params["weight"] - batch["target"])) + frozen["offset"]


def start(loss=quadratic, optimizer=None, ema_decay=0.5):
    optimizer = optax.sgd(RATE) if optimizer is None else optimizer
    params = {"weight": jnp.zeros((2, 3)), "bias": jnp.ones(3)}
    state = create_state(params, {"offset": jnp.float32(10)}, optimizer)
    step = make_train_step(loss, optimizer, learning_rate=lambda count: RATE, ema_decay=ema_decay)
    return state, jax.jit(step)


def batch(value):
    return {"target": jnp.full((2, 3), value)}


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


def test_modules_come_apart_and_together():
    model = Model(nnx.Rngs(0))
    skeleton, arrays = take_apart(model)
    layers = {f"layers.{i}.{part}" for i in (0, 1) for part in ("kernel", "bias")}
    assert skeleton.trained == layers
    assert set(skeleton.names) == set(arrays) == layers | {"table"}
    assert arrays["layers.0.kernel"].shape == (3, 4)
    again = skeleton.join(arrays)
    np.testing.assert_array_equal(again(jnp.ones((1, 3))), model(jnp.ones((1, 3))))
    again = skeleton.join(arrays | {"layers.1.bias": jnp.full(2, 7.0)})
    np.testing.assert_array_equal(again.layers[1].bias[...], [7, 7])
    assert hash(skeleton) == hash(take_apart(Model(nnx.Rngs(1)))[0])


def test_abstract_modules_have_the_same_skeleton():
    abstract, shapes = take_apart(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    skeleton, arrays = take_apart(Model(nnx.Rngs(0)))
    assert abstract == skeleton
    assert {n: s.shape for n, s in shapes.items()} == {n: a.shape for n, a in arrays.items()}


def test_one_update():
    state, step = start()
    new, metrics = step(state, batch(1.0))
    np.testing.assert_allclose(new.params["weight"], 2 * RATE)  # gradient: 2 * (0 - 1)
    np.testing.assert_array_equal(new.params["bias"], state.params["bias"])
    np.testing.assert_array_equal(new.frozen["offset"], 10)
    assert int(new.step) == 1
    assert metrics["loss"] == 16  # 6 squares of 1, and the offset
    assert metrics["gradient_norm"] == pytest.approx(np.sqrt(6 * 4), rel=1e-6)
    assert metrics["learning_rate"] == RATE
    assert metrics["skipped"] == 0


def test_average_warms_up():
    state, step = start(ema_decay=0.15)
    expected = np.zeros((2, 3))
    for number in range(3):
        state, _ = step(state, batch(1.0))
        decay = min(0.15, (1 + number) / (10 + number))  # 0.1, then 0.15
        expected = decay * expected + (1 - decay) * np.asarray(state.params["weight"])
        np.testing.assert_allclose(state.ema["weight"], expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_updates_that_are_not_finite_are_skipped_and_counted(bad):
    state, step = start(optimizer=make_optimizer(lambda count: RATE))
    state, _ = step(state, batch(1.0))
    skipped, metrics = step(state, batch(bad))
    assert_same(
        (skipped.params, skipped.ema, skipped.optimizer),
        (state.params, state.ema, state.optimizer),
    )
    assert not np.isfinite(metrics["loss"])
    assert [int(skipped.step), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])] == [
        2,
        1,
        1,
    ]
    skipped, metrics = step(skipped, batch(bad))
    assert [int(metrics["skipped"]), int(metrics["skipped_in_a_row"])] == [2, 2]
    good, metrics = step(skipped, batch(1.0))
    assert [int(metrics["skipped"]), int(metrics["skipped_in_a_row"])] == [2, 0]
    assert not np.array_equal(good.params["weight"], skipped.params["weight"])


def test_finite_loss_with_a_gradient_that_is_not_finite_is_skipped():
    def root(params, frozen, batch, key):
        return jnp.sum(jnp.sqrt(params["weight"]))  # 0, with an infinite slope

    state, step = start(root)
    new, metrics = step(state, batch(0.0))
    assert metrics["loss"] == 0
    assert metrics["skipped"] == 1
    np.testing.assert_array_equal(new.params["weight"], 0)


def linear(params, frozen, batch, key):
    return jnp.sum(params["weight"] * batch["target"])  # the gradient is the batch


def start_looking_for_spikes(factor=3.0):
    optimizer = make_optimizer(lambda count: RATE)
    state = create_state({"weight": jnp.zeros((2, 3))}, {}, optimizer)
    step = make_train_step(
        linear, optimizer, learning_rate=lambda count: RATE, ema_decay=0.5, spike_factor=factor
    )
    return state, jax.jit(step)


def norms(count):
    return np.random.default_rng(0).uniform(1, 2, count).astype(np.float32)


def with_norm(norm):
    return {"target": jnp.full((2, 3), norm / np.sqrt(6), jnp.float32)}


def test_updates_whose_gradient_norm_spikes_are_skipped_and_counted():
    state, step = start_looking_for_spikes()
    for norm in norms(SPIKE_WARMUP):
        state, _ = step(state, with_norm(norm))
    weights = 0.99 ** np.arange(SPIKE_WARMUP)[::-1]
    average = (weights * norms(SPIKE_WARMUP)).sum() / weights.sum()
    skipped, metrics = step(state, with_norm(3.001 * average))
    assert [int(metrics[name]) for name in ("skipped", "skipped_in_a_row")] == [1, 1]
    assert np.isfinite(metrics["loss"])
    assert_same(
        (skipped.params, skipped.ema, skipped.optimizer, skipped.average_norm),
        (state.params, state.ema, state.optimizer, state.average_norm),
    )
    accepted, metrics = step(skipped, with_norm(2.999 * average))
    assert [int(metrics[name]) for name in ("skipped", "skipped_in_a_row")] == [1, 0]
    assert not np.array_equal(accepted.params["weight"], state.params["weight"])
    corrected = float(accepted.average_norm) / (1 - 0.99 ** (SPIKE_WARMUP + 1))
    weights = 0.99 ** np.arange(SPIKE_WARMUP + 1)[::-1]
    expected = (weights * np.append(norms(SPIKE_WARMUP), 2.999 * average)).sum() / weights.sum()
    assert corrected == pytest.approx(expected, rel=1e-5)


def test_spikes_are_not_looked_for_before_enough_updates_were_made():
    state, step = start_looking_for_spikes()
    for number in range(SPIKE_WARMUP - 1):
        bad = number in (7, 30)  # steps that are skipped are no updates
        state, _ = step(state, with_norm(np.nan if bad else 1.0))
    state, metrics = step(state, with_norm(1000.0))
    assert int(metrics["skipped"]) == 2
    assert np.isfinite(state.average_norm)


def test_looking_for_spikes_changes_no_update_that_is_made():
    (plain, plain_step), (state, step) = start_looking_for_spikes(0), start_looking_for_spikes()
    for norm in norms(SPIKE_WARMUP + 10):
        plain, _ = plain_step(plain, with_norm(norm))
        state, _ = step(state, with_norm(norm))
    assert_same((plain.params, plain.ema, plain.skipped), (state.params, state.ema, state.skipped))
    assert plain.average_norm == 0
    plain, metrics = plain_step(plain, with_norm(1e6))
    assert metrics["skipped"] == 0


def test_each_step_has_its_own_key():
    def noise(params, frozen, batch, key):
        return jax.random.normal(key) + 0 * jnp.sum(params["weight"])

    state, step = start(noise)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch(0.0))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    again, step = start(noise)
    assert float(step(again, batch(0.0))[1]["loss"]) == losses[0]


def test_only_matrices_decay():
    optimizer = make_optimizer(lambda count: 0.1, weight_decay=0.5)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    no_gradients = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(no_gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["vector"], 0)


def test_gradients_are_clipped_before_adam():
    def first_moment(scale):
        optimizer = make_optimizer(lambda count: 0.1, gradient_clip=1.0)
        params = {"vector": jnp.zeros(4)}
        with jax.numpy_dtype_promotion("standard"):
            _, state = optimizer.update(
                {"vector": jnp.full(4, scale)}, optimizer.init(params), params
            )
        return optax.tree_utils.tree_get(state, "mu")["vector"]

    np.testing.assert_allclose(first_moment(5.0), 0.05, rtol=1e-5)  # norm 10 becomes 1
    np.testing.assert_allclose(first_moment(0.1), 0.01, rtol=1e-5)  # norm 0.2 stays
