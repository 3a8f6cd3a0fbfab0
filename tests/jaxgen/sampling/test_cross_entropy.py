"""Weighted cross entropies and their gradients, against float64; how they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import weighted_cross_entropy

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 10, 16, 13


def drawn(dtype=jnp.float32, *, axis=1, scale=1.0):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH))
    table = rng.normal(size=(VOCABULARY, WIDTH))
    weights = rng.uniform(size=(ROWS, LENGTH)) * (rng.uniform(size=(ROWS, LENGTH)) < 0.6) * scale
    targets = rng.integers(0, VOCABULARY, (ROWS, LENGTH))
    table = table if axis else table.T
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(table, jnp.float32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def by_hand(hidden, table, targets, weights, axis=1):
    """The sum and its gradients in float64."""
    hidden, table, weights = (np.asarray(a, np.float64) for a in (hidden, table, weights))
    table = table if axis else table.T
    logits = hidden @ table.T
    total = np.exp(logits).sum(axis=-1, keepdims=True)
    entropies = -np.take_along_axis(
        logits - np.log(total), np.asarray(targets)[..., None], axis=-1
    )[..., 0]
    slope = weights[..., None] * (np.exp(logits) / total - np.eye(table.shape[0])[targets])
    to_table = np.einsum("btv,btw->vw", slope, hidden)
    return np.sum(weights * entropies), (
        slope @ table,
        to_table if axis else to_table.T,
        entropies,
    )


def run(hidden, table, targets, weights, **options):
    def total(hidden, table, weights):
        return weighted_cross_entropy(hidden, table, targets, weights, **options)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(hidden, table, weights)


def apart(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("chunk", [1, 7, 30, 31, 1000])
def test_value_and_gradients_are_those_of_float64(chunk, axis):
    arrays = drawn(axis=axis)
    value, gradients = run(*arrays, chunk=chunk, axis=axis)
    expected, wanted = by_hand(*arrays, axis=axis)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for found, gradient in zip(gradients, wanted, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-6)
    alone = weighted_cross_entropy(*arrays, chunk=chunk, axis=axis)
    np.testing.assert_allclose(alone, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(jnp.bfloat16, 1.0), (jnp.bfloat16, 1e-6), (jnp.float16, 1.0)],
)
def test_narrow_tokens_cost_a_rounding(dtype, scale):
    hidden, table, targets, weights = drawn(dtype, scale=scale)
    table = table.astype(dtype).astype(jnp.float32)
    value, gradients = run(hidden, table, targets, weights, chunk=7)
    expected, wanted = by_hand(hidden, table, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert [gradient.dtype for gradient in gradients] == [dtype, jnp.float32, jnp.float32]
    for found, gradient in zip(gradients, wanted, strict=True):
        assert apart(found, gradient) < float(jnp.finfo(dtype).eps)


def test_small_gradients_of_half_precision_survive_until_they_are_scaled():
    hidden, table, targets, weights = drawn(jnp.float16, scale=1e-6)
    loss = lambda table: 1e6 * weighted_cross_entropy(hidden, table, targets, weights)
    wanted = by_hand(hidden, table.astype(jnp.float16), targets, weights)[1][1]
    assert apart(jax.jit(jax.grad(loss))(table), 1e6 * wanted) < 1e-3


def test_many_tokens_are_summed_in_float32():
    count = 4_000
    hidden = jnp.ones((1, count, 1), jnp.bfloat16)
    table, targets = jnp.zeros((2, 1), jnp.bfloat16), jnp.zeros((1, count), jnp.int32)
    weights = jnp.ones((1, count))
    gradient = jax.grad(
        lambda table: weighted_cross_entropy(hidden, table, targets, weights, chunk=1)
    )(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient, [[-count / 2], [count / 2]], rtol=2**-8)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32])
def test_targets_may_be_narrow(dtype):
    hidden, _, targets, weights = drawn()
    table = jnp.asarray(np.random.default_rng(1).normal(size=(300, WIDTH)), jnp.float32)
    value, gradients = run(hidden, table, targets.astype(dtype), weights)
    expected, wanted = by_hand(hidden, table, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[1], wanted[1], rtol=1e-5, atol=1e-6)


def test_without_weight_nothing_is_learned():
    hidden, table, targets, _ = drawn()
    value, gradients = run(hidden, table, targets, jnp.zeros((ROWS, LENGTH)))
    assert value == 0
    assert not np.any(gradients[0])
    assert not np.any(gradients[1])


def test_a_weight_that_is_no_number_is_not_hidden():
    hidden, table, targets, weights = drawn()
    value, _ = run(hidden, table, targets, weights.at[1, 2].set(jnp.nan))
    assert np.isnan(value)


def _products_and_largest(jaxpr, count=1):
    """Products with the vocabulary, loops counted; the size of the largest array."""
    products, largest = 0, 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(variable.aval.size for variable in equation.outvars)])
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general" and any(VOCABULARY in s for s in shapes):
            products += count
        times = count * equation.params.get("length", 1)
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found, size = _products_and_largest(inner, times)
                products, largest = products + found, max(largest, size)
    return products, largest


def test_logits_are_made_once_and_never_all():
    hidden, table, targets, weights = drawn()
    hidden, table = hidden[..., :4], table[:, :4]

    def total(hidden, table):
        return weighted_cross_entropy(hidden, table, targets, weights, chunk=6)

    traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, table)
    products, largest = _products_and_largest(traced.jaxpr)
    assert products == 3 * 5
    assert largest == hidden.size  # 120; all logits would be 390, those of a part are 78
    assert _products_and_largest(jax.make_jaxpr(total)(hidden, table).jaxpr)[0] == 5


def test_inside_shard_map_the_table_may_be_whole_and_tokens_divided():
    mesh = jax.make_mesh((3,), ("x",), (jax.sharding.AxisType.Auto,))
    whole, rows = jax.P(), jax.P("x")

    def total(*arrays):
        return jax.lax.psum(weighted_cross_entropy(*arrays, chunk=2), "x")

    divided = jax.shard_map(total, mesh=mesh, in_specs=(rows, whole, rows, rows), out_specs=whole)
    hidden, table, targets, weights = drawn()
    find = lambda run: jax.value_and_grad(lambda *a: run(*a, targets, weights), argnums=(0, 1))(
        hidden, table
    )
    found, wanted = find(divided), find(weighted_cross_entropy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
