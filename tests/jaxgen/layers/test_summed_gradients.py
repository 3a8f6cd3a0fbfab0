"""Gradients that are sums over all tokens: of embedding tables and of biases, in narrow dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import FeedForward, Linear, add_bias, look_up
from jaxgen.models import LANGUAGE_MODEL_PRESETS, LanguageModel

TOKENS = 20_000


def _drawn(*shape, shift=0.0):
    values = np.random.default_rng(0).normal(size=shape) + shift
    return jnp.asarray(values, jnp.bfloat16)


@pytest.mark.parametrize("vocabulary", [22, 1024, 1025])
def test_frequent_tokens_have_exact_gradients(vocabulary):
    ids = np.random.default_rng(1).zipf(1.4, TOKENS).reshape(4, -1) % vocabulary
    gradient = _drawn(*ids.shape, 8, shift=0.3)
    table = jnp.zeros((vocabulary, 8), jnp.float32)
    _, pull = jax.vjp(lambda table: look_up(table, jnp.asarray(ids), jnp.bfloat16), table)
    found = jax.jit(pull)(gradient)[0]
    wanted = np.zeros((vocabulary, 8))
    np.add.at(wanted, ids, np.asarray(gradient, np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)


def test_looks_up_what_take_does():
    table, ids = jax.random.normal(jax.random.key(0), (6, 3)), jnp.array([[0, 5], [2, 2]])
    for dtype in (jnp.float32, jnp.bfloat16):
        found = look_up(table, ids, dtype)
        np.testing.assert_array_equal(found, jnp.take(table.astype(dtype), ids, axis=0))
        assert found.dtype == dtype
    assert jnp.isnan(look_up(table, jnp.array([6]), jnp.float32)).all()


@pytest.mark.parametrize("layer", [Linear, "embedding"])
def test_inside_shard_map_parameters_may_be_whole_and_tokens_divided(layer):
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    whole, divided = jax.P(), jax.P("x")
    ids = jnp.arange(8) % 3
    if layer == "embedding":
        run = lambda table, ids: look_up(table, ids, jnp.bfloat16)
    else:
        run = lambda bias, ids: add_bias(jnp.ones((len(ids), 5), jnp.bfloat16), bias[0])
    inside = jax.shard_map(run, mesh=mesh, in_specs=(whole, divided), out_specs=divided)
    loss = lambda run: jax.grad(lambda table: jnp.sum(run(table, ids).astype(jnp.float32)))
    table = jnp.ones((3, 5))
    np.testing.assert_array_equal(loss(inside)(table), loss(run)(table))


def test_models_and_layers_sum_in_float32():
    x = jnp.ones((1, TOKENS, 4)) * jnp.linspace(0.5, 1.5, TOKENS)[None, :, None]

    def gradient(dtype):
        layer = FeedForward(4, dtype=dtype, rngs=nnx.Rngs(0))
        loss = lambda layer: jnp.mean(layer(x.astype(dtype)).astype(jnp.float32))
        return np.asarray(nnx.jit(nnx.grad(loss))(layer).down.bias[...])

    np.testing.assert_allclose(gradient(jnp.bfloat16), gradient(jnp.float32), rtol=1e-2)

    def of_table(dtype):
        model = LanguageModel(
            dataclasses.replace(LANGUAGE_MODEL_PRESETS["10m"], num_layers=1, dtype=dtype),
            rngs=nnx.Rngs(0),
        )
        weights = jnp.asarray(model.embedding.embedding[...])
        embed = lambda table: _embedded(model, table, jnp.full((1, TOKENS), 7))
        return np.asarray(
            jax.jit(jax.grad(lambda t: jnp.sum(embed(t).astype(jnp.float32))))(weights)
        )

    np.testing.assert_array_equal(of_table(jnp.bfloat16), of_table(jnp.float32))


def _embedded(model, table, ids):
    graph, state = nnx.split(model)
    state["embedding"]["embedding"] = nnx.Param(table)
    return nnx.merge(graph, state).embed(ids)


def test_the_gradient_of_a_narrow_table_is_as_narrow():
    table, ids = jnp.zeros((6, 3), jnp.bfloat16), jnp.array([1, 1, 4])
    gradient = jax.grad(lambda table: look_up(table, ids, jnp.float32).sum())(table)
    np.testing.assert_array_equal(gradient, np.bincount(ids, minlength=6)[:, None] * np.ones(3))
    assert gradient.dtype == jnp.bfloat16


def test_biases_have_exact_gradients():
    gradient, bias = _drawn(TOKENS, 8, shift=0.3), jnp.zeros(8)
    _, pull = jax.vjp(lambda bias: add_bias(jnp.zeros((TOKENS, 8), jnp.bfloat16), bias), bias)
    found = jax.jit(pull)(gradient)[0]
    np.testing.assert_allclose(found, np.asarray(gradient, np.float64).sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
    ],
)
def test_is_the_linear_layer_of_nnx(options):
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    bias = {} if options.get("use_bias") is False else {"bias_init": nnx.initializers.normal(1.0)}
    ours, theirs = (
        kind(4, 3, **bias, **options, rngs=nnx.Rngs(0)) for kind in (Linear, nnx.Linear)
    )

    def run(layer):
        return nnx.value_and_grad(lambda layer: jnp.sum(jnp.sin(layer(x)).astype(jnp.float32)))(
            layer
        )

    (value, gradients), (expected, wanted) = run(ours), run(theirs)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(ours(x), theirs(x))
    for one, other in zip(*map(jax.tree.leaves, (gradients, wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-2 if options.get("dtype") else 1e-6)


def test_results_may_be_wider_than_the_products():
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    assert Linear(4, 3, **options, rngs=nnx.Rngs(0))(jnp.ones((2, 4))).dtype == jnp.float32
