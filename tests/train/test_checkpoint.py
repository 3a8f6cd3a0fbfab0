import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.checkpoint import Checkpoints, abstract
from train.sharding import make_mesh, state_shardings
from train.state import create_state


def make_state(value, mesh):
    params = {"a.kernel": jnp.full((4, 8), value), "a.bias": jnp.arange(8.0)}
    state = create_state(params, {"table": jnp.ones(3)}, optax.adamw(0.1))
    shardings = state_shardings(state, mesh)
    return jax.device_put(state, shardings), abstract(state, shardings)


@pytest.fixture
def mesh():
    return make_mesh(2, jax.devices()[:2])


def damage(folder):
    """Cut every file of a checkpoint's arrays in half."""
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_round_trip_keeps_bits_and_shardings(tmp_path, mesh):
    state, shapes = make_state(1.5, mesh)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(shapes) is None
        checkpoints.save(7, state, {"data": {"next_index": 3}, "seconds": 1.25})
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [7]
        restored = checkpoints.restore(shapes)
    assert restored is not None
    assert restored[1] == {"data": {"next_index": 3}, "seconds": 1.25}
    assert jax.tree.structure(restored[0]) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state), strict=True):
        assert new.dtype == old.dtype
        assert new.sharding == old.sharding
        np.testing.assert_array_equal(new, old)


def test_restores_onto_another_mesh(tmp_path, mesh):
    state, _ = make_state(1.5, mesh)
    _, shapes = make_state(0.0, make_mesh(4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored = checkpoints.restore(shapes)
    assert restored is not None
    kernel = restored[0].params["a.kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 2)
    np.testing.assert_array_equal(kernel, 1.5)


def test_keeps_the_newest(tmp_path, mesh):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make_state(step, mesh)[0], {})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_unreadable_newest_falls_back_with_a_warning(tmp_path, mesh):
    _, shapes = make_state(0.0, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step, mesh)[0], {"step": step})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="cannot read checkpoint .*2: "):
            restored = checkpoints.restore(shapes)
        assert restored is not None
        assert restored[1] == {"step": 1}
        np.testing.assert_array_equal(restored[0].params["a.kernel"], 1)
        assert (tmp_path / "2.unreadable").is_dir()
        checkpoints.save(2, make_state(5.0, mesh)[0], {"step": 2})  # its place is free again
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(shapes)[1] == {"step": 2}


def test_only_unreadable_checkpoints_are_an_error(tmp_path, mesh):
    state, shapes = make_state(0.0, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    damage(tmp_path / "1")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.warns(UserWarning, match="cannot read"),
        pytest.raises(RuntimeError, match=r"no readable checkpoint:\n  .*1: "),
    ):
        checkpoints.restore(shapes)
    assert (tmp_path / "1").is_dir()


def test_another_model_is_not_restored(tmp_path, mesh):
    state, shapes = make_state(0.0, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        other = jax.ShapeDtypeStruct(
            (4, 9), jnp.float32, sharding=shapes.params["a.kernel"].sharding
        )
        shapes.params["a.kernel"] = other
        with pytest.warns(UserWarning, match="cannot read"), pytest.raises(RuntimeError):
            checkpoints.restore(shapes)


def test_refuses_to_keep_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least 1 checkpoint must be kept, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_that_was_damaged_before_can_be_damaged_again(tmp_path, mesh):
    state, shapes = make_state(1.5, mesh)
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            for step in (1, 2):
                if step not in checkpoints.steps():
                    checkpoints.save(step, state, {"step": step})
        damage(tmp_path / "2")
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.warns(UserWarning, match="cannot read checkpoint"):
                restored = checkpoints.restore(shapes)
            assert restored is not None
            assert restored[1] == {"step": 1}
            assert checkpoints.steps() == [1]
    assert {"2.unreadable", "2.unreadable-2"} <= {path.name for path in tmp_path.iterdir()}
