import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.checkpoints import decoder_sharding
from train.sharding import (
    batch_sharding,
    gather,
    largest_axis,
    make_mesh,
    place_batch,
    rows_shared,
    state_shardings,
)
from train.state import create_state, make_train_step


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((8, 6), 1, jax.P()),
        ((8, 6), 2, jax.P("fsdp")),
        ((6, 8), 2, jax.P(None, "fsdp")),
        ((6, 9), 2, jax.P("fsdp")),
        ((9, 5, 4), 4, jax.P(None, None, "fsdp")),
        ((8, 8), 4, jax.P("fsdp")),
        ((7, 5), 2, jax.P()),
        ((), 2, jax.P()),
        ((0, 3), 2, jax.P()),
    ],
)
def test_largest_divisible_axis_is_split(shape, fsdp, spec):
    mesh = make_mesh(fsdp, devices=jax.devices()[:4])
    assert largest_axis(mesh)("weight", shape).spec == spec


def test_mesh_shapes():
    assert dict(make_mesh().shape) == {"data": 4, "fsdp": 1, "tensor": 1, "context": 1}
    assert dict(make_mesh(2, 1, 2).shape) == {"data": 1, "fsdp": 2, "tensor": 1, "context": 2}
    assert make_mesh(devices=jax.devices()[:1]).size == 1
    assert rows_shared(make_mesh(2, 2)) == 2


@pytest.mark.parametrize("asked", [(0, 1, 1), (3, 1, 1), (8, 1, 1), (2, 2, 2), (1, 3, 1)])
def test_refuses_meshes(asked):
    fsdp, tensor, context = asked
    message = f"got fsdp={fsdp}, tensor={tensor}, context={context} and 4 devices"
    with pytest.raises(ValueError, match=message):
        make_mesh(*asked)


def test_batches_are_split_over_all_devices():
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = place_batch({"x": rows}, make_mesh(2))["x"]
    assert len(placed.addressable_shards) == 4
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, rows)


def test_tokens_are_split_over_context_alone():
    mesh = make_mesh(1, 1, 2)
    batch = {"tokens": np.arange(8 * 6).reshape(8, 6), "stop": np.zeros(8, np.int32)}
    placed = place_batch(batch, mesh)
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(4, 3)}
    assert {shard.data.shape for shard in placed["stop"].addressable_shards} == {(4,)}
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_state_follows_the_names_of_parameters():
    mesh = make_mesh(2, 2)
    params = {
        name: jnp.zeros((6, 4)) for name in ("blocks.0.mlp.up.kernel", "blocks.0.mlp.down.kernel")
    } | {"blocks.0.mlp_norm.scale": jnp.zeros(6)}
    state = create_state(params, {}, optax.adamw(0.1))
    shardings = state_shardings(jax.eval_shape(lambda: state), mesh, decoder_sharding(mesh))
    mu = optax.tree_utils.tree_get(shardings.optimizer, "mu")
    for tree in (shardings.params, shardings.ema, mu):
        assert tree["blocks.0.mlp.up.kernel"].spec == jax.P("fsdp", "tensor")
        assert tree["blocks.0.mlp.down.kernel"].spec == jax.P("tensor", "fsdp")
        assert tree["blocks.0.mlp_norm.scale"].spec == jax.P()
    assert shardings.step.spec == jax.P()


def test_gather_brings_everything_back():
    mesh = make_mesh(4)
    whole = {"a": np.arange(16.0).reshape(8, 2), "b": np.float32(3)}
    split = jax.device_put(whole, state_shardings(whole, mesh))
    assert split["a"].addressable_shards[0].data.shape == (2, 2)
    for name, array in gather(split, mesh).items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, whole[name])


def train(mesh, steps=5):
    """A small regression; returns losses and the last state."""
    optimizer = optax.adamw(0.1)

    def loss(params, frozen, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        noise = 0.1 * jax.random.normal(key, (8, 2))
        return jnp.mean(jnp.square(hidden @ params["out"] - batch["y"] + noise))

    keys = jax.random.split(jax.random.key(0), 4)
    params = {"in": jax.random.normal(keys[0], (6, 16)), "out": jax.random.normal(keys[1], (16, 2))}
    state = create_state(params, {}, optimizer)
    shardings = state_shardings(state, mesh)
    step = jax.jit(
        make_train_step(loss, optimizer, learning_rate=lambda n: 0.1, ema_decay=0.9),
        in_shardings=(shardings, batch_sharding(mesh, 2)),
        out_shardings=(shardings, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )
    state = jax.device_put(state, shardings)
    batch = {"x": jax.random.normal(keys[2], (8, 6)), "y": jax.random.normal(keys[3], (8, 2))}
    losses = []
    for _ in range(steps):
        state, metrics = step(state, place_batch(jax.device_get(batch), mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    return train(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(("devices", "fsdp"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_every_mesh_trains_alike(one_device, devices, fsdp):
    losses, state = train(make_mesh(fsdp, devices=jax.devices()[:devices]))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert losses[-1] < losses[0]
    mu = optax.tree_utils.tree_get(state.optimizer, "mu")
    for split in (state.params["in"], state.ema["in"], mu["in"]):
        assert split.sharding.spec == (jax.P(None, "fsdp") if fsdp > 1 else jax.P())
        assert split.addressable_shards[0].data.shape == (6, 16 // fsdp)
