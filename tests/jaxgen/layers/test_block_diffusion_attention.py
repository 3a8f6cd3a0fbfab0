import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.layers import block_diffusion_attention, block_diffusion_mask, exact_attention


def _visible(query, key, half, block_length):
    """The rules of section 6.2 of the specification, one pair at a time."""
    query_noisy, key_noisy = query < half, key < half
    query_block, key_block = (query % half) // block_length, (key % half) // block_length
    if query_noisy == key_noisy and query_block == key_block:
        return True
    if query_noisy and not key_noisy:
        return query_block > key_block
    return not query_noisy and not key_noisy and query_block >= key_block


@pytest.mark.parametrize(("half", "block_length"), [(8, 2), (9, 4), (5, 1), (6, 6), (3, 8)])
def test_mask_follows_the_three_rules(half, block_length):
    tokens = 2 * half
    expected = [[_visible(q, k, half, block_length) for k in range(tokens)] for q in range(tokens)]
    np.testing.assert_array_equal(block_diffusion_mask(tokens, block_length), expected)


@pytest.mark.parametrize(("half", "block_length", "chunk"), [(12, 3, 6), (11, 4, 4), (6, 8, 1)])
def test_agrees_with_one_dense_mask_in_output_and_gradients(half, block_length, chunk):
    shapes = [(2, 2 * half, heads, 8) for heads in (4, 2, 2)]
    arrays = [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]
    weights = jax.random.normal(jax.random.key(3), shapes[0])
    mask = block_diffusion_mask(2 * half, block_length)[None, None]
    chunked = functools.partial(block_diffusion_attention, block_length=block_length, chunk=chunk)
    dense = functools.partial(exact_attention, mask=mask)

    def run(attend):
        loss = lambda *arrays: (jnp.sum(weights * attend(*arrays)), attend(*arrays))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    gradients, output = run(chunked)
    wanted, expected = run(dense)
    np.testing.assert_allclose(output, expected, atol=2e-6)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-5)


def test_no_array_of_all_pairs():
    shape = (1, 8192, 1, 8)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    attend = functools.partial(block_diffusion_attention, block_length=32, chunk=256)
    loss = lambda *arrays: jnp.sum(attend(*arrays))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    pairs = 4 * shape[1] ** 2
    assert compiled.memory_analysis().temp_size_in_bytes < pairs / 4


def test_refuses_an_odd_number_of_tokens_and_empty_blocks():
    odd, even = jnp.zeros((1, 5, 1, 4)), jnp.zeros((1, 4, 1, 4))
    with pytest.raises(ValueError, match="got 5"):
        block_diffusion_attention(odd, odd, odd, block_length=2)
    with pytest.raises(ValueError, match="block_length and chunk must be positive, got 0 and"):
        block_diffusion_attention(even, even, even, block_length=0)
