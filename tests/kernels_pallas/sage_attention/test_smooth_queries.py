"""Smoothed queries compute the same attention, and help where queries have a large mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import sage_attention
from kernels_pallas.sage_attention import reference, vjp
from kernels_pallas.sage_attention.masking import Masking, Structure
from kernels_pallas.sage_attention.reference import Options

SHAPES = {"query": (2, 150, 4, 32), "key": (2, 140, 2, 32), "value": (2, 140, 2, 32)}


def draw(shift=0.0):
    keys = iter(jax.random.split(jax.random.key(0), 6))
    query, key, value = (jax.random.normal(next(keys), shape) for shape in SHAPES.values())
    query += shift * jax.random.normal(next(keys), (2, 1, 4, 32))
    return query, key, value, jax.random.normal(next(keys), query.shape), next(keys)


def both(arrays, d_out, attend):
    """Output, log-sum-exp and gradients, also through the log-sum-exp."""
    result, pull = jax.vjp(attend, *arrays)
    out, logsumexp = result
    return [out, logsumexp, *pull((d_out, jnp.cos(jnp.arange(logsumexp.size, dtype=jnp.float32))
                                   .reshape(logsumexp.shape)))]  # fmt: skip


def relative(found, wanted):
    return [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_quantization_nothing_changes(is_causal):
    *arrays, d_out, key = draw(3.0)
    bias = jax.random.normal(key, (1, 4, 150, 140))
    lengths = (jnp.array([150, 90]), jnp.array([140, 77]))
    masking = Masking(None, *lengths, None)

    def attend(smooth, query, key, value, bias):
        options = Options(0.2, Structure(is_causal, None), quantize=False, smooth_queries=smooth)
        return vjp.attention(reference, options, query, key, value, bias, masking)

    found, wanted = (
        both((*arrays, bias), d_out, functools.partial(attend, smooth)) for smooth in (True, False)
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5 * float(jnp.abs(other).max()))


def test_queries_with_a_large_mean_are_quantized_better():
    errors = {}
    for shift in (0.0, 8.0):
        *arrays, d_out, _ = draw(shift)
        out, pull = jax.vjp(jax.nn.dot_product_attention, *arrays)
        wanted = [out, *pull(d_out)]
        for smooth in (False, True):
            attend = functools.partial(sage_attention, smooth_queries=smooth, implementation="xla")
            out, pull = jax.vjp(attend, *arrays)
            errors[shift, smooth] = np.array(relative([out, *pull(d_out)], wanted))
    assert np.all(errors[0.0, True] < 1.05 * errors[0.0, False])
    assert np.all(1.5 * errors[8.0, True] < errors[8.0, False])


def test_kernels_do_not_and_say_so():
    *arrays, _, _ = draw()
    with pytest.raises(NotImplementedError, match="it does not smooth queries"):
        sage_attention(*arrays, smooth_queries=True, implementation="mosaic_gpu")
