"""Logits in float32 and their gradients, against JAX's own rule and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.layers import float32_logits

SHAPES = {(4, 8): "tokens", (2, 3, 8): "rows of tokens", (8,): "a token"}


def drawn(shape, dtype, axis):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(11, 8) if axis else (8, 11))
    return jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(table, jnp.float32)


def reference(hidden, table, axis):
    numbers = (((hidden.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(hidden, table, numbers)


def gradients(function, hidden, table, axis):
    loss = lambda hidden, table: jnp.sum(jnp.sin(function(hidden, table, axis)))
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, table)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPES.get)
def test_is_the_product_of_jax(shape, axis):
    arrays = drawn(shape, jnp.float32, axis)
    np.testing.assert_allclose(
        float32_logits(*arrays, axis), reference(*arrays, axis), rtol=1e-6, atol=1e-6
    )
    for found, wanted in zip(
        gradients(float32_logits, *arrays, axis), gradients(reference, *arrays, axis), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPES.get)
def test_narrow_tokens_cost_a_rounding(shape, axis):
    hidden, table = drawn(shape, jnp.bfloat16, axis)
    table = table.astype(jnp.bfloat16).astype(jnp.float32)
    wide = hidden.astype(jnp.float32)
    logits = float32_logits(hidden, table, axis)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference(wide, table, axis), rtol=1e-5, atol=1e-5)
    found = gradients(float32_logits, hidden, table, axis)
    assert [gradient.dtype for gradient in found] == [jnp.bfloat16, jnp.float32]
    for one, other in zip(found, gradients(reference, wide, table, axis), strict=True):
        one, other = (np.asarray(array, np.float64) for array in (one, other))
        assert np.linalg.norm(one - other) < 2**-7 * np.linalg.norm(other)


@pytest.mark.parametrize("axis", [0, 1])
def test_all_products_are_of_narrow_numbers(axis):
    hidden, table = drawn((4, 8), jnp.bfloat16, axis)
    loss = lambda hidden, table: jnp.sum(jnp.sin(float32_logits(hidden, table, axis)))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3
    for line in products:
        operands = line.split(" : (")[1].split(") ->")[0]
        assert operands.count("bf16") == 2, line


def test_inside_shard_map_the_table_may_be_whole_and_tokens_divided():
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    hidden, table = drawn((4, 8), jnp.bfloat16, 1)
    inside = lambda hidden, table, axis: jax.shard_map(
        lambda hidden, table: float32_logits(hidden, table, axis),
        mesh=mesh,
        in_specs=(jax.P("x"), jax.P()),
        out_specs=jax.P("x"),
    )(hidden, table)
    for found, wanted in zip(
        gradients(inside, hidden, table, 1),
        gradients(float32_logits, hidden, table, 1),
        strict=True,
    ):
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=1e-2, atol=1e-3
        )
