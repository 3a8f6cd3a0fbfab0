import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.tiles import blend_weights, map_tiles, tile_starts

AXES = [(8, 8, 0), (9, 8, 3), (16, 8, 0), (17, 8, 0), (100, 8, 7), (61, 8, 4), (1000, 64, 16)]


@pytest.mark.parametrize(("size", "tile", "overlap"), AXES)
def test_tiles_cover_an_axis_and_overlap_as_asked(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert (starts[0], starts[-1]) == (0, size - tile)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= tile - overlap).all()
    assert not len(steps) or steps.max() - steps.min() <= 1


@pytest.mark.parametrize(("size", "tile", "overlap"), AXES)
@pytest.mark.parametrize("unit", [1, 8])
def test_weights_add_up_to_one(size, tile, overlap, unit):
    starts, tile, overlap = tile_starts(size, tile, overlap) * unit, tile * unit, overlap * unit
    weights = blend_weights(starts, tile, overlap)
    total = np.zeros(size * unit)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert weights.min() >= 0.0
    blended = np.count_nonzero((weights > 0.0) & (weights < 1.0), axis=1)
    assert blended.max() <= 2 * overlap or overlap == 0


def test_neighbors_are_blended_linearly_in_the_middle_of_what_they_share():
    weights = blend_weights(np.array([0, 4]), 10, 4)
    # They share the columns 4..10, and are blended over 5..9.
    first = [1.0] * 5 + [0.875, 0.625, 0.375, 0.125, 0.0]
    np.testing.assert_allclose(weights, [first, first[::-1]])


@pytest.mark.parametrize("shape", [(2, 9, 20, 3), (1, 8, 30, 1), (1, 3, 30, 1), (1, 25, 26, 2)])
def test_what_does_not_depend_on_surroundings_is_the_same(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    double = lambda x: jnp.repeat(jnp.repeat(jnp.sin(x), 2, axis=1), 2, axis=2)
    tiled = jax.jit(lambda x: map_tiles(double, x, tile=8, overlap=3, scales=(1, 2)))(x)
    np.testing.assert_allclose(tiled, double(x), atol=1e-6)
    # And back: of four pixels one.
    half = lambda x: x[:, ::2, ::2]
    tiled = jax.jit(lambda x: map_tiles(half, x, tile=8, overlap=3, scales=(2, 1)))(double(x))
    np.testing.assert_allclose(tiled, jnp.sin(x), atol=1e-6)


def test_gradients_pass_through_tiles():
    x = jax.random.normal(jax.random.key(0), (1, 9, 20, 2))
    run = lambda x: map_tiles(jnp.sin, x, tile=8, overlap=3, scales=(1, 1))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(run(x)))))(x)
    np.testing.assert_allclose(gradient, jnp.sin(2.0 * x), atol=1e-6)


def test_every_tile_has_the_same_size():
    seen = []

    def run(x):
        seen.append(x.shape)
        return x

    jax.jit(lambda x: map_tiles(run, x, tile=8, overlap=2, scales=(1, 1)))(jnp.zeros((1, 31, 5, 2)))
    assert set(seen) == {(1, 8, 5, 2)}


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (0, 0, "tile must be positive, .*, got tile=0 and overlap=0"),
        (8, 8, "below tile, got tile=8 and overlap=8"),
        (8, -1, "overlap not negative .*, got tile=8 and overlap=-1"),
        (8.0, 1, "tile must be an int, got tile=8.0"),
        (8, True, "overlap must be an int, got overlap=True"),
    ],
)
def test_wrong_tiles_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        map_tiles(jnp.sin, jnp.zeros((1, 4, 4, 1)), tile=tile, overlap=overlap, scales=(1, 1))
