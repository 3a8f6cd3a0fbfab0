import re
import resource
import shutil
import time
import warnings
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.checkpoint import CheckpointError, Checkpoints, abstract, fingerprints
from train.sharding import make_mesh, state_shardings
from train.state import create_state


def make_state(value, mesh):
    params = {"a.kernel": jnp.full((4, 8), value, jnp.float32), "a.bias": jnp.arange(8.0)}
    state = create_state(params, {"table": jnp.ones(3)}, optax.adamw(0.1))
    shardings = state_shardings(state, mesh)
    return jax.device_put(state, shardings), abstract(state, shardings)


@pytest.fixture
def mesh():
    return make_mesh(2, devices=jax.devices()[:2])


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
        pytest.raises(CheckpointError, match=r"no readable checkpoint:\n  .*1: ") as found,
    ):
        checkpoints.restore(shapes)
    assert "KeyError" not in str(found.value)  # but what was wrong with the files
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


def noise(value, mesh):
    """A state whose numbers do not compress, so that most bits on disk are bits of numbers."""
    generator = np.random.default_rng(0)
    params = {"a.kernel": jnp.asarray(value * generator.normal(size=(64, 32)), jnp.float32)}
    state = create_state(params, {}, optax.adamw(0.1))
    shardings = state_shardings(state, mesh)
    return jax.device_put(state, shardings), abstract(state, shardings)


def flip(path, *places):
    """Flip bits, of which places from 0 to 1 are given; some by default, as one may be unused."""
    content = bytearray(path.read_bytes())
    for place in places or (0.07, 0.39, 0.61, 0.83):
        bit = int(8 * len(content) * place)
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore:cannot read checkpoint")
@pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.unlink()])
def test_damage_to_any_file_is_harmless_or_noticed(tmp_path, mesh, harm):
    """Whatever file is hit: the state is that of step 2, bit for bit, or that of step 1."""
    with Checkpoints(tmp_path / "good") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, noise(step, mesh)[0], {"step": step})
    files = sorted((tmp_path / "good" / "2").rglob("*"))
    files = [path.relative_to(tmp_path / "good") for path in files if path.is_file()]
    noticed = []
    for number, path in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        harm(folder / path)
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(noise(0, mesh)[1])
        assert restored is not None
        step = restored[1]["step"]
        assert step in (1, 2)
        for one, other in zip(
            jax.tree.leaves(restored[0]), jax.tree.leaves(noise(step, mesh)[0]), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        if step == 1:
            noticed.append(path)
    names = {path.as_posix() for path in noticed}
    assert "2/extra/metadata" in names
    largest = max(files, key=lambda path: (tmp_path / "good" / path).stat().st_size)
    assert largest in noticed


def test_a_flipped_bit_of_a_number_is_named(tmp_path, mesh):
    state, shapes = noise(1, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    messages = []
    for place in np.linspace(0.1, 0.9, 9):
        flip(largest, place)
        with Checkpoints(tmp_path) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                np.testing.assert_array_equal(
                    checkpoints.restore(shapes)[0].params["a.kernel"], state.params["a.kernel"]
                )
            except CheckpointError as error:
                messages.append(str(error))
        flip(largest, place)
    # Orbax notices only what damages the format.
    message = r"/1: ValueError: arrays have changed since they were saved: (ema|params)\.a\.kernel"
    assert [text for text in messages if re.search(message, text)]
    assert len(messages) >= 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32", "bool"])
def test_fingerprints_see_every_bit_and_no_sharding(mesh, dtype):
    values = np.random.default_rng(0).integers(0, 2, (4, 6)).astype(dtype)

    def fingerprint(values, mesh=mesh):
        state = create_state({"w": jnp.asarray(values)}, {}, optax.sgd(0.1))
        return fingerprints(jax.device_put(state, state_shardings(state, mesh)))["params.w"]

    expected = fingerprint(values)
    assert fingerprint(values, make_mesh(4)) == expected
    assert fingerprint(values[::-1]) != expected  # the same numbers elsewhere
    seen = {expected}
    for place in range(values.size):
        other = values.copy()
        if dtype == "bool":
            other.flat[place] ^= True
        else:
            raw = other.view(np.uint8).reshape(-1)
            raw[place * other.itemsize + place % other.itemsize] ^= 1 << place % 8
        seen.add(fingerprint(other))
    assert len(seen) == values.size + 1


@contextmanager
def small_files(largest=3000):
    """Writing more into a file fails with EFBIG, as it does with ENOSPC where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))  # Python ignores SIGXFSZ.
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("finish", ["save", "wait", "exit"])
def test_a_save_that_fails_in_the_background_is_an_error_of_what_follows(tmp_path, mesh, finish):
    state, shapes = noise(1.5, mesh)
    message = f"cannot save step 2 in {tmp_path}: File too large; the newest complete .* is step 1,"

    def save_three():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {"step": 1})
            checkpoints.wait()
            with small_files():
                checkpoints.save(2, state, {"step": 2})  # returns, as writing goes on
                time.sleep(0.3)
            if finish == "save":
                checkpoints.save(3, state, {"step": 3})
            elif finish == "wait":
                checkpoints.wait()

    with pytest.raises(CheckpointError, match=message):
        save_three()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(shapes)[1] == {"step": 1}
        checkpoints.save(2, state, {"step": 2})
    # Threads of the save that failed may have made its folder again after the second one opened.
    with Checkpoints(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(tmp_path, mesh):
    state, _ = noise(1.5, mesh)

    def fail():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
            raise FloatingPointError("not finite")

    with small_files(), pytest.raises(FloatingPointError, match="not finite") as caught:
        fail()
    assert "cannot save step 1" in caught.value.__notes__[0]
    assert "no checkpoint is complete" in caught.value.__notes__[0]


def test_refuses_a_folder_that_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        Checkpoints("/dev/null/checkpoints")
