import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.layers import rotate, video_axis_dims, video_rotary


@pytest.mark.parametrize(
    ("head_dim", "dims"), [(6, (2, 2, 2)), (8, (4, 2, 2)), (64, (24, 20, 20)), (128, (44, 42, 42))]
)
def test_axes_share_a_head(head_dim, dims):
    assert video_axis_dims(head_dim) == dims


@pytest.mark.parametrize("head_dim", [0, 4, 9])
def test_heads_that_cannot_be_shared_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim must be an even number, .* got {head_dim}"):
        video_axis_dims(head_dim)
    with pytest.raises(ValueError, match=f"head_dim must be an even number, .* got {head_dim}"):
        video_rotary(1, 1, 1, head_dim)


def test_angles_are_those_of_frame_row_and_column():
    rotary = video_rotary(3, 4, 5, 14, max_period=100.0)  # 6, 4 and 4 channels
    assert rotary.cos.shape == rotary.sin.shape == (60, 7)
    assert rotary.cos.dtype == rotary.sin.dtype == jnp.float32
    for frame, row, column in [(0, 0, 0), (2, 1, 3), (1, 3, 4)]:
        angles = [frame * 100.0 ** (-i / 3) for i in range(3)]
        angles += [row * 100.0 ** (-i / 2) for i in range(2)]
        angles += [column * 100.0 ** (-i / 2) for i in range(2)]
        token = (frame * 4 + row) * 5 + column
        np.testing.assert_allclose(rotary.cos[token], np.cos(angles), atol=1e-7)
        np.testing.assert_allclose(rotary.sin[token], np.sin(angles), atol=1e-7)


def test_distant_positions_keep_their_digits():
    # In float32 the angle alone would be off by 6e-5 at position 1023.
    rotary = video_rotary(1024, 1, 1, 64)
    angle = 1023 * 10_000.0 ** (-2 / 24)
    np.testing.assert_allclose(rotary.cos[1023, 1], np.cos(angle), atol=1e-7)
    np.testing.assert_allclose(rotary.sin[1023, 1], np.sin(angle), atol=1e-7)


def test_neighboring_channels_turn_as_complex_numbers():
    rotary = video_rotary(2, 3, 2, 10)
    x = jax.random.normal(jax.random.key(0), (2, 12, 3, 10))
    turns = np.asarray(rotary.cos) + 1j * np.asarray(rotary.sin)
    expected = (np.asarray(x[..., 0::2]) + 1j * np.asarray(x[..., 1::2])) * turns[:, None, :]
    turned = rotate(x, rotary)
    np.testing.assert_allclose(turned[..., 0::2], expected.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=1e-6)


def test_products_depend_on_differences_of_positions():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 12))
    grid = (4, 4, 4)
    rotary = video_rotary(*grid, 12)
    everywhere = [rotate(jnp.broadcast_to(x, (1, 64, 1, 12)), rotary) for x in (query, key)]
    queries, keys = (np.asarray(x).reshape(*grid, 12) for x in everywhere)

    def product(first, second):
        return queries[first] @ keys[second]

    np.testing.assert_allclose(product((0, 1, 2), (1, 0, 2)), product((2, 3, 3), (3, 2, 3)), 1e-4)
    assert abs(product((0, 1, 2), (1, 0, 2)) - product((0, 1, 2), (1, 1, 2))) > 1e-2


def test_16_bit_values_are_rounded_once():
    rotary = video_rotary(2, 2, 2, 8)
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 8), jnp.bfloat16)
    turned = rotate(x, rotary)
    assert turned.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), rotary).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned, exact)


@pytest.mark.parametrize("shape", [(1, 7, 2, 8), (1, 8, 2, 6), (8, 2, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 8, heads, 8\), got \("):
        rotate(jnp.zeros(shape), video_rotary(2, 2, 2, 8))
