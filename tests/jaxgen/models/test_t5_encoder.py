import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import T5_PRESETS, T5Encoder, T5EncoderConfig
from jaxgen.models.t5_encoder import relative_buckets

TINY = T5EncoderConfig(
    num_layers=2,
    num_heads=3,
    width=16,
    ffn_dim=24,
    head_dim=6,
    vocabulary_size=30,
    num_buckets=8,
    max_distance=6,
)
OWN = dataclasses.replace(TINY, shared_positions=False)
TOKENS = jnp.array([[5, 3, 4, 9, 1, 0, 0], [5, 9, 8, 7, 6, 29, 1]])


def _perturbed(config=TINY):
    """An encoder in which no parameter has its initial one, and scores are not small."""
    random = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        values *= variable.shape[0] ** -0.5 if path[-1] == "kernel" else 1.0
        values = 1.0 + 0.3 * values if path[-1] == "scale" else values
        return variable.replace(jnp.asarray(values, variable.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@nnx.jit
def _run(model, tokens, mask=None):
    return model(tokens, mask)


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [("t5-xxl", 4_762_310_656, 219), ("umt5-xxl", 5_680_910_336, 242)],
)
def test_parameter_counts_are_those_of_transformers(name, parameters, keys):
    model = nnx.eval_shape(lambda: T5Encoder(T5_PRESETS[name], rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert len(leaves) == len(jax.tree.leaves(nnx.state(model))) == keys


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 50), (8, 3), (4, 9)])
def test_buckets_are_single_distances_then_logarithmic(num_buckets, max_distance):
    buckets = relative_buckets(300, num_buckets, max_distance)
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.arange(300)
    ratio = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    far = np.minimum(half - 1, exact + np.floor(ratio * (half - exact) + 1e-9))
    expected = np.where(distance < exact, distance, far)
    np.testing.assert_array_equal(buckets[:, 0], expected)  # keys before the query
    np.testing.assert_array_equal(buckets[0, 1:], expected[1:] + half)
    diagonals = [np.unique(np.diagonal(buckets, offset)).size for offset in range(-299, 300)]
    assert set(diagonals) == {1}


def test_buckets_of_released_models():
    buckets = relative_buckets(600, 32, 128)
    some = {0: 0, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 31: 11, 32: 12, 63: 13, 64: 14}
    some |= {90: 14, 91: 15, 127: 15, 128: 15, 599: 15}
    assert {distance: int(buckets[distance, 0]) for distance in some} == some


@pytest.mark.parametrize("config", [TINY, OWN])
def test_only_relative_positions_count(config):
    model = _perturbed(config)
    mask = TOKENS != 0
    moved = jnp.pad(TOKENS, ((0, 0), (4, 0)))
    plain = _run(model, TOKENS, mask)
    shifted = _run(model, moved, moved != 0)[:, 4:]
    np.testing.assert_allclose(plain, shifted, atol=2e-5)
    reversed_twice = _run(model, TOKENS[:, ::-1], mask[:, ::-1])[:, ::-1]
    assert jnp.abs(plain - reversed_twice).max() > 1e-2


def test_masked_tokens_are_not_attended_to():
    model, mask = _perturbed(), TOKENS != 0
    base = _run(model, TOKENS, mask)
    changed = _run(model, TOKENS.at[0, 5:].set(17), mask)
    np.testing.assert_array_equal(base[0, :5], changed[0, :5])
    assert jnp.abs(base[0, 5:] - changed[0, 5:]).min() > 0.0
    np.testing.assert_allclose(base[0, :5], _run(model, TOKENS[:1, :5])[0], atol=2e-5)
    assert jnp.abs(base[0, :5] - _run(model, TOKENS)[0, :5]).max() > 1e-2


def test_scores_are_not_scaled():
    block = _perturbed().blocks[0]
    x = jax.random.normal(jax.random.key(0), (1, 5, 16))
    bias = jax.random.normal(jax.random.key(1), (1, 3, 5, 5))
    query, key, value = (
        layer(x)[0].reshape(5, 3, 6)
        for layer in (block.attention.query, block.attention.key, block.attention.value)
    )
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, key) + bias[0], axis=-1)
    expected = block.attention.output(jnp.einsum("hqk,khd->qhd", weights, value).reshape(5, -1))
    np.testing.assert_allclose(block.attention(x, bias, None)[0], expected, atol=1e-5)


def test_umt5_has_a_table_in_each_block():
    model = _perturbed(OWN)
    assert model.positions is None
    base = _run(model, TOKENS)
    for block in model.blocks:
        kept = block.attention.positions.table[...]
        block.attention.positions.table[...] = kept[::-1]
        assert jnp.abs(_run(model, TOKENS) - base).max() > 1e-2
        block.attention.positions.table[...] = kept


@pytest.mark.parametrize("config", [TINY, OWN])
def test_scan_changes_nothing_but_compilation(config):
    loop = _perturbed(dataclasses.replace(config, scan=True))
    mask = TOKENS != 0
    graph, state = nnx.split(loop)
    program = str(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(TOKENS, mask))(state))
    assert "scan" in program
    plain = _run(_perturbed(config), TOKENS, mask)
    np.testing.assert_allclose(plain, _run(loop, TOKENS, mask), atol=2e-5)


def test_bfloat16_is_close_to_float32():
    exact = _run(_perturbed(), TOKENS)
    # JAX's own attention cannot run in bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        half = _run(_perturbed(dataclasses.replace(TINY, dtype=jnp.bfloat16)), TOKENS)
    assert half.dtype == jnp.bfloat16
    error = jnp.linalg.norm(half.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0.0 < error < 0.03


def test_bfloat16_holds_what_float16_does_not():
    config = dataclasses.replace(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = _perturbed(config)
    block = model.blocks[0]
    for layer in (block.mlp.gate, block.mlp.up):
        layer.kernel[...] = layer.kernel[...] * jnp.bfloat16(1000.0)
    x = block.mlp_norm(model.token_embedding(TOKENS))
    hidden = jax.nn.gelu(block.mlp.gate(x), approximate=True) * block.mlp.up(x)
    assert float(jnp.abs(hidden).max()) > float(jnp.finfo(jnp.float16).max)
    with jax.numpy_dtype_promotion("standard"):
        assert jnp.isfinite(_run(model, TOKENS)).all()


def test_parameters_may_be_float16():
    config = dataclasses.replace(TINY, param_dtype=jnp.float16)
    model = _perturbed(config)
    assert model.blocks[0].mlp.up.kernel.dtype == model.positions.table.dtype == jnp.float16
    assert _run(model, TOKENS).dtype == jnp.float32


@pytest.mark.parametrize("config", [TINY, OWN])
def test_gradients_are_finite_and_reach_every_parameter(config):
    graph, parameters = nnx.split(_perturbed(dataclasses.replace(config, scan=True)))
    loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(TOKENS) - 1.0))
    for path, leaf in nnx.to_flat_state(jax.jit(jax.grad(loss))(parameters)):
        assert jnp.isfinite(leaf[...]).all(), path
        assert jnp.abs(leaf[...]).max() > 1e-6, path


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (jnp.zeros((3,), int), None, r"tokens must have shape \(batch, tokens\), got \(3,\)"),
        (jnp.zeros((2, 0), int), None, r"tokens must have shape \(batch, tokens\), got \(2, 0\)"),
        (jnp.zeros((2, 3)), None, "tokens must be integers, got float32"),
        (TOKENS, jnp.ones((2, 6), bool), r"mask must be bool of shape \(2, 7\), got bool of \(2"),
        (TOKENS, jnp.ones((2, 7), int), r"mask must be bool of shape \(2, 7\), got int32 of"),
    ],
)
def test_wrong_inputs_are_refused(tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: T5Encoder(TINY, rngs=nnx.Rngs(0))(tokens, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive int, got num_layers=0"),
        ({"head_dim": None}, "head_dim must be a positive int, got head_dim=None"),
        ({"num_buckets": 6}, "num_buckets must be a multiple of 4 .*, got num_buckets=6 and max"),
        ({"max_distance": 2}, "max_distance above a quarter .* num_buckets=8 and max_distance=2"),
        ({"eps": 1}, "eps must be a float between 0 and 1, got eps=1"),
        ({"shared_positions": 0}, "shared_positions must be True or False, got 0"),
        ({"dtype": "float16"}, "dtype must not be float16, .* overflows, .* use bfloat16"),
        ({"dtype": "int8"}, "dtype must be a float dtype such as bfloat16, got 'int8'"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
