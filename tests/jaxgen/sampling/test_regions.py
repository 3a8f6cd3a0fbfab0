"""Scores of patches, and masks made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import active_count
from jaxgen.sampling.regions import as_mask, highest, patch_scores, place


def test_scores_are_means_over_patches():
    difference = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    scores = patch_scores(difference, 2)
    assert scores.shape == (2, 6)
    np.testing.assert_allclose(scores[1, 4], jnp.abs(difference[1, 2:4, 2:4]).mean(), rtol=1e-6)
    assert patch_scores(difference.astype(jnp.bfloat16), 2).dtype == jnp.float32


def test_an_opening_removes_what_is_small_and_keeps_what_is_not():
    image = np.zeros((1, 9, 9, 1), np.float32)
    image[0, 1, 1] = 5.0  # a spot
    image[0, 4:7, 5:8] = 1.0  # a square of three
    opened = patch_scores(jnp.asarray(image), 1, opening=3).reshape(9, 9)
    wanted = image[0, ..., 0].copy()
    wanted[1, 1] = 0.0
    np.testing.assert_array_equal(opened, wanted)
    np.testing.assert_array_equal(patch_scores(jnp.asarray(image), 1, opening=1)[0], image.ravel())


def test_the_highest_scores_win_and_lower_numbers_among_equal_ones():
    scores = jnp.array([[1.0, 3.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    rows = highest(scores, 3)
    np.testing.assert_array_equal(rows, [[1, 2, 3], [0, 1, 2]])
    np.testing.assert_array_equal(highest(scores, 4), [[1, 2, 3, 4], [0, 1, 2, 3]])
    np.testing.assert_array_equal(
        as_mask(rows, 5), [[False, True, True, True, False], [True, True, True, False, False]]
    )


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((4096, 0.3), 1229),
        ((4096, 0.3, 128), 1280),
        ((100, 0.07), 7),
        ((100, 0.5, 64), 64),
        ((100, 1.0, 64), 100),
        ((10, 0.01), 1),
        ((10, 0.0), 0),
    ],
)
def test_how_many_patches_a_share_is(arguments, count):
    assert active_count(*arguments) == count


def test_place_replaces_some_patches_wholly_or_in_part():
    everywhere, parts = jnp.zeros((1, 4, 2)), jnp.ones((1, 2, 2), jnp.bfloat16)
    rows = jnp.array([[1, 3]], jnp.int32)
    np.testing.assert_array_equal(place(everywhere, rows, parts)[0, :, 0], [0, 1, 0, 1])
    weight = jnp.array([[0.3, 0.25, 0.7, 1.0]])
    np.testing.assert_array_equal(place(everywhere, rows, parts, weight)[0, :, 1], [0, 0.25, 0, 1])


@pytest.mark.parametrize("opening", [-1, 2])
def test_refuses_openings(opening):
    with pytest.raises(ValueError, match=f"opening must be 0 or an odd number .*, got {opening}"):
        patch_scores(jnp.zeros((1, 4, 4, 1)), 2, opening=opening)
