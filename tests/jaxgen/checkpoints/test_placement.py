import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.checkpoints import export_flat, export_mmdit, flat_shapes, load_flat, load_mmdit
from jaxgen.models import MMDIT_PRESETS, MMDiT, TextEncoder, TextEncoderConfig

CONFIG = MMDIT_PRESETS["tiny"]
TEXT = TextEncoderConfig(vocabulary_size=8, width=8, hidden_dim=4, pooled_dim=4)


class _Reader:
    """An array that is made when it is used, and that says how many bytes live."""

    live = peak = reads = 0

    def __init__(self, array):
        self.shape, self.dtype, self._array = array.shape, array.dtype, array

    def __array__(self, dtype=None, copy=None):
        array = np.array(self._array, dtype)
        _Reader.reads += 1
        _Reader.live += array.nbytes
        _Reader.peak = max(_Reader.peak, _Reader.live)
        weakref.finalize(array, self._release, array.nbytes)
        return array

    @staticmethod
    def _release(size):
        _Reader.live -= size


@pytest.fixture
def weights():
    """Random weights of a small model, each behind a reader."""
    arrays = export_mmdit(MMDiT(CONFIG, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    arrays = {k: random.normal(size=v.shape).astype(np.float32) for k, v in arrays.items()}
    _Reader.live = _Reader.peak = _Reader.reads = 0
    return {key: _Reader(array) for key, array in arrays.items()}


def _mesh(*shape):
    axes = tuple("xy"[: len(shape)])
    return jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def _check(model, weights):
    for key, array in export_mmdit(model).items():
        np.testing.assert_array_equal(array, weights[key]._array, err_msg=key)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_array_is_read_at_a_time(weights, sharded):
    sharding = NamedSharding(_mesh(4), PartitionSpec()) if sharded else None
    model = load_mmdit(CONFIG, weights, sharding=sharding)
    assert _Reader.reads == len(weights)
    assert _Reader.live == 0
    assert _Reader.peak == max(reader._array.nbytes for reader in weights.values())
    _check(model, weights)


def test_nothing_is_read_before_all_is_checked(weights):
    del weights["proj_out.bias"]
    with pytest.raises(ValueError, match="missing"):
        load_mmdit(CONFIG, weights)
    assert _Reader.reads == 0


def test_one_sharding_for_all(weights):
    sharding = NamedSharding(_mesh(4), PartitionSpec())
    model = load_mmdit(CONFIG, weights, sharding=sharding)
    assert {array.sharding for array in jax.tree.leaves(nnx.state(model))} == {sharding}
    _check(model, weights)


def test_a_sharding_for_each(weights):
    mesh, seen = _mesh(2, 2), {}

    def choose(path, shape):
        seen[path] = shape
        if path.endswith("up.kernel"):
            return NamedSharding(mesh, PartitionSpec("x", "y"))
        if path.endswith("down.kernel"):
            return NamedSharding(mesh, PartitionSpec(None, "y"))
        return None if path.endswith("bias") else NamedSharding(mesh, PartitionSpec())

    model = load_mmdit(CONFIG, weights, sharding=choose)
    mlp = model.blocks[0].image_mlp
    assert seen["blocks.0.image_mlp.up.kernel"] == (32, 128)
    assert seen == {key: array.shape for key, array in export_flat(model).items()}
    assert mlp.up.kernel[...].addressable_shards[3].data.shape == (16, 64)
    assert mlp.down.kernel[...].sharding.spec == PartitionSpec(None, "y")
    assert len(mlp.up.bias[...].sharding.device_set) == 1
    _check(model, weights)


def test_other_models_profit():
    create = lambda: TextEncoder(TEXT, rngs=nnx.Rngs(0))
    arrays, calls = export_flat(create()), []
    sharding = NamedSharding(_mesh(4), PartitionSpec())
    report = lambda *numbers: calls.append(numbers)
    model = load_flat(create, arrays, sharding=sharding, progress=report)
    assert {array.sharding for array in jax.tree.leaves(nnx.state(model))} == {sharding}
    total = sum(array.nbytes for array in arrays.values())
    assert calls[-1] == (total, total)
    on_device = {key: jnp.asarray(array) for key, array in arrays.items()}
    again = load_flat(create, on_device, sharding=sharding)
    for key, array in export_flat(again).items():
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)


@pytest.mark.parametrize("spec", [("x",), (None, None, "x")])
def test_shardings_that_do_not_fit_are_refused_before_reading(weights, spec):
    # 128 values are no multiple of three, and have no third axis.
    mesh = _mesh(3)

    def choose(path, shape):
        wrong = path == "blocks.0.image_mlp.up.bias"
        return NamedSharding(mesh, PartitionSpec(*spec) if wrong else PartitionSpec())

    with pytest.raises(ValueError, match=r"^here: the sharding of .* does not fit its shape"):
        load_mmdit(CONFIG, weights, "here", sharding=choose)
    assert _Reader.reads == 0


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ("cpu", "here: sharding must be a jax.sharding.Sharding, got 'cpu'"),
        (lambda path, shape: 3, "sharding must return a jax.sharding.Sharding, got 3 for blocks"),
    ],
)
def test_what_is_no_sharding_is_refused_before_reading(weights, sharding, message):
    with pytest.raises(TypeError, match=message):
        load_mmdit(CONFIG, weights, "here", sharding=sharding)
    assert _Reader.reads == 0


def test_loaded_arrays_do_not_share_memory_with_their_source():
    create = lambda: TextEncoder(TEXT, rngs=nnx.Rngs(0))
    arrays = {key: np.array(array) for key, array in export_flat(create()).items()}
    before = {key: array.copy() for key, array in arrays.items()}
    for sharding in (None, NamedSharding(_mesh(4), PartitionSpec())):
        model = load_flat(create, arrays, sharding=sharding)
        for array in arrays.values():
            array[...] += 1
        for key, array in export_flat(model).items():
            np.testing.assert_array_equal(array, before[key], err_msg=key)
        arrays = {key: array.copy() for key, array in before.items()}


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_changes_of_a_writable_mapping_survive(mode, tmp_path):
    create = lambda: TextEncoder(TEXT, rngs=nnx.Rngs(0))
    shapes = flat_shapes(create)
    arrays = {}
    for number, (key, shape) in enumerate(shapes.items()):
        np.zeros(shape.shape, shape.dtype).tofile(tmp_path / str(number))
        mapped = np.memmap(tmp_path / str(number), shape.dtype, mode, shape=shape.shape)
        mapped[...] = number
        arrays[key] = mapped.view(np.ndarray)
    for _ in range(2):
        for number, array in enumerate(export_flat(load_flat(create, arrays)).values()):
            assert (array == number).all()


def test_progress_counts_bytes(weights):
    calls = []
    load_mmdit(CONFIG, weights, progress=lambda *numbers: calls.append(numbers))
    total = sum(reader._array.nbytes for reader in weights.values())
    assert len(calls) == len(weights)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_progress_can_be_a_bar(weights, capsys):
    load_mmdit(CONFIG, weights, progress=True)
    output = capsys.readouterr()
    assert "weights: 100%" in output.err
    assert output.out == ""
    load_mmdit(CONFIG, weights, progress=False)
    assert capsys.readouterr().err == ""
