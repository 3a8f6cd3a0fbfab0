import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import CLIP_TEXT_PRESETS, CLIPText, CLIPTextConfig

TINY = CLIPTextConfig(
    num_layers=3,
    num_heads=2,
    width=16,
    ffn_dim=24,
    projection_dim=10,
    vocabulary_size=30,
    max_tokens=8,
)
TOKENS = jnp.array([[5, 3, 4, 29, 29, 0], [5, 9, 8, 7, 6, 29]])


def _perturbed(config=TINY):
    """A model in which no parameter has its initial zero or one."""
    random = np.random.default_rng(0)
    create = lambda: CLIPText(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(create))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        values *= variable.shape[0] ** -0.5 if path[-1] == "kernel" else 0.3
        values += 1.0 if path[-1] == "scale" else 0.0
        return variable.replace(jnp.asarray(values, variable.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@nnx.jit
def _run(model, tokens):
    return model(tokens)


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [("clip-l", 123_650_304, 197), ("clip-g", 694_659_840, 517)],
)
def test_parameter_counts_are_those_of_transformers(name, parameters, keys):
    model = nnx.eval_shape(lambda: CLIPText(CLIP_TEXT_PRESETS[name], rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert len(leaves) == len(jax.tree.leaves(nnx.state(model))) == keys


def test_shapes_of_a_released_model():
    config = CLIP_TEXT_PRESETS["clip-g"]
    tokens = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    create = lambda tokens: CLIPText(config, rngs=nnx.Rngs(0))(tokens)
    penultimate, last, pooled = nnx.eval_shape(create, tokens)
    assert penultimate.shape == last.shape == (2, 77, 1280)
    assert pooled.shape == (2, 1280)


def test_a_token_reaches_only_what_follows_it():
    model = _perturbed()
    base, changed = _run(model, TOKENS), _run(model, TOKENS.at[:, 2].set(1))
    for before, after in zip(base[:2], changed[:2], strict=True):
        difference = jnp.abs(before - after).max(axis=(0, 2))
        assert difference[:2].max() == 0.0
        assert difference[2:].min() > 1e-3


def test_padding_does_not_reach_the_pooled_vector():
    model = _perturbed()
    base = _run(model, TOKENS)
    longer = jnp.concatenate([TOKENS, jnp.full((2, 2), 29)], axis=1)
    other = _run(model, longer.at[0, 4:].set(0))
    np.testing.assert_allclose(base.pooled, other.pooled, atol=1e-6)


@pytest.mark.parametrize(("eos_token_id", "places"), [(2, (3, 5)), (29, (3, 5)), (7, (0, 3))])
def test_the_pooled_vector_is_where_the_text_ends(eos_token_id, places):
    model = _perturbed(dataclasses.replace(TINY, eos_token_id=eos_token_id))
    output = _run(model, TOKENS)
    expected = model.projection(output.last[jnp.arange(2), jnp.array(places)])
    np.testing.assert_allclose(output.pooled, expected, atol=1e-6)


def test_the_penultimate_state_is_what_the_last_block_reads():
    model = _perturbed()
    output = model(TOKENS)
    positions = jnp.arange(TOKENS.shape[1])
    mask = (positions[:, None] >= positions[None, :])[None, None]
    last = model.final_norm(model.blocks[-1](output.penultimate, mask))
    np.testing.assert_allclose(output.last, last, atol=1e-6)
    single = _perturbed(dataclasses.replace(TINY, num_layers=1, scan=True))
    embedded = single.token_embedding(TOKENS) + single.position_embedding(positions)[None]
    np.testing.assert_array_equal(single(TOKENS).penultimate, embedded)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_activations(activation):
    block = _perturbed(dataclasses.replace(TINY, activation=activation)).blocks[0]
    x = jax.random.normal(jax.random.key(0), (1, 4, 16))
    mask = jnp.ones((1, 1, 4, 4), bool)
    attended = x + block.attention(block.attention_norm(x), mask)
    hidden = block.up(block.mlp_norm(attended))
    if activation == "gelu":
        hidden = 0.5 * hidden * (1.0 + jax.lax.erf(hidden / 2**0.5))
    else:
        hidden = hidden / (1.0 + jnp.exp(-1.702 * hidden))
    np.testing.assert_allclose(block(x, mask), attended + block.down(hidden), atol=1e-5)


def test_scan_changes_nothing_but_compilation():
    plain, loop = _perturbed(), _perturbed(dataclasses.replace(TINY, scan=True))
    graph, state = nnx.split(loop)
    program = str(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(TOKENS))(state))
    assert "scan" in program
    for ours, theirs in zip(_run(plain, TOKENS), _run(loop, TOKENS), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_is_close_to_float32():
    exact = _run(_perturbed(), TOKENS)
    # JAX's own attention cannot run in bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        half = _run(_perturbed(dataclasses.replace(TINY, dtype=jnp.bfloat16)), TOKENS)
    for got, want in zip(half, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert 0.0 < error < 0.02


def test_gradients_are_finite_and_reach_every_parameter():
    graph, parameters = nnx.split(_perturbed(dataclasses.replace(TINY, scan=True)))

    @jax.jit
    @jax.grad
    def gradient(parameters):
        output = nnx.merge(graph, parameters)(TOKENS)
        return sum(jnp.mean(jnp.square(values - 1.0)) for values in output)

    for path, leaf in nnx.to_flat_state(gradient(parameters)):
        assert jnp.isfinite(leaf[...]).all(), path
        # A bias of the keys adds the same to all scores of a query.
        assert (jnp.abs(leaf[...]).max() > 1e-6) != (path[-2:] == ("key", "bias")), path


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros((2, 9), int), r"shape \(batch, 1 to 8\), got \(2, 9\)"),
        (jnp.zeros((2, 0), int), r"shape \(batch, 1 to 8\), got \(2, 0\)"),
        (jnp.zeros((3,), int), r"shape \(batch, 1 to 8\), got \(3,\)"),
        (jnp.zeros((2, 3)), "tokens must be integers, got float32"),
    ],
)
def test_wrong_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: CLIPText(TINY, rngs=nnx.Rngs(0))(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive int, got num_layers=0"),
        ({"max_tokens": 7.5}, "max_tokens must be a positive int, got max_tokens=7.5"),
        ({"num_heads": 3}, "num_heads must divide width, got num_heads=3 and width=16"),
        ({"activation": "relu"}, "activation must be one of 'quick_gelu', 'gelu', got 'relu'"),
        ({"eos_token_id": -1}, "eos_token_id must be an int from 0 on, got -1"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id must be an int from 0 on, got \[2, 3\]"),
        ({"eps": 0.0}, "eps must be a float between 0 and 1, got eps=0.0"),
        ({"scan": 1}, "scan must be True or False, got 1"),
        ({"dtype": "int8"}, "dtype must be a float dtype such as bfloat16, got 'int8'"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
