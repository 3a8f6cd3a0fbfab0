import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import (
    PatchEmbedding,
    PositionTable,
    TimestepTextEmbedding,
    patchify,
    position_table,
    sinusoid,
    unpatchify,
)


def test_sinusoid_has_the_cosines_first_and_does_not_round():
    embedded = sinusoid(jnp.array([0.0, 2.5]), 4)
    expected = [[1, 1, 0, 0], [np.cos(2.5), np.cos(0.025), np.sin(2.5), np.sin(0.025)]]
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 3, -2])
def test_sinusoid_refuses_odd_sizes(dim):
    with pytest.raises(ValueError, match=f"positive even number, got {dim}"):
        sinusoid(jnp.zeros(1), dim)


def test_position_table_encodes_column_then_row():
    table = position_table(5, 8)
    frequencies = np.array([1.0, 0.01])
    for row, column in [(0, 0), (1, 4), (3, 2)]:
        expected = [f(p * frequencies) for p in (column, row) for f in (np.sin, np.cos)]
        np.testing.assert_allclose(table[row, column], np.concatenate(expected), atol=1e-6)


def test_position_table_refuses_widths_that_are_no_multiple_of_4():
    with pytest.raises(ValueError, match="multiple of 4 channels, got dim=6"):
        position_table(3, 6)


def test_patches_are_ordered_row_column_channel():
    image = jnp.arange(4 * 6 * 3.0).reshape(1, 4, 6, 3)
    patches = patchify(image, 2)
    assert patches.shape == (1, 6, 12)
    np.testing.assert_array_equal(patches[0, 4], image[0, 2:4, 2:4].reshape(-1))


def test_unpatchify_inverts_patchify():
    image = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    np.testing.assert_array_equal(unpatchify(patchify(image, 4), 4, 8, 12), image)


def _embedding() -> PatchEmbedding:
    return PatchEmbedding(2, 3, 8, table_size=6, rngs=nnx.Rngs(0))


def test_patch_embedding_adds_the_centered_crop_of_the_table():
    embedding = _embedding()
    tokens = embedding(jnp.zeros((1, 4, 8, 3)))  # 2x4 patches of a 6x6 table
    np.testing.assert_allclose(tokens[0], embedding.table[2:4, 1:5].reshape(8, 8), atol=1e-6)


def test_patch_embedding_is_a_strided_convolution():
    embedding = _embedding()
    image = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    kernel = embedding.projection.kernel[...].reshape(2, 2, 3, 8)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        image, kernel, (2, 2), "VALID", dimension_numbers=numbers
    )
    table = embedding.table[2:4, 2:4]
    np.testing.assert_allclose(embedding(image)[0], (expected[0] + table).reshape(4, 8), atol=1e-5)


def test_the_table_is_stored_but_not_trained():
    embedding = _embedding()
    assert isinstance(embedding.table, PositionTable)
    assert "table" not in nnx.state(embedding, nnx.Param)
    assert "table" in nnx.state(embedding)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 4, 5), r"latents must have 3 channels, got \(1, 4, 4, 5\)"),
        ((1, 4, 5, 3), "patch_size=2 must divide height and width, got 4x5"),
        ((1, 0, 4, 3), "patch_size=2 must divide height and width, got 0x4"),
        ((1, 4, 14, 3), "14 are 2x7 patches, at most 6x6 are allowed"),
    ],
)
def test_patch_embedding_refuses(shape, message):
    with pytest.raises(ValueError, match=message):
        _embedding()(jnp.zeros(shape))


def test_conditioning_depends_on_timestep_and_text():
    embedding = TimestepTextEmbedding(6, 8, rngs=nnx.Rngs(0))
    pooled = jax.random.normal(jax.random.key(0), (2, 6))
    base = embedding(jnp.array([10.0, 10.5]), pooled)
    assert base.shape == (2, 8)
    assert jnp.abs(embedding(jnp.array([10.25, 10.5]), pooled) - base)[0].max() > 1e-6
    assert jnp.abs(embedding(jnp.array([10.0, 10.5]), 2 * pooled) - base).max() > 1e-6
