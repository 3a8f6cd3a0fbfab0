import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import exact_attention, rotate_halves, text_rotary
from jaxgen.models import DiffusionLM, DiffusionLMConfig

TINY = DiffusionLMConfig(
    num_layers=2,
    width=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=28,
    vocabulary_size=53,
    mask_id=52,
    qk_norm=True,
    rope_theta=100.0,
    eps=1e-3,
)
BATCH, TOKENS, BLOCK = 2, 12, 4
IDS = jax.random.randint(jax.random.key(0), (BATCH, TOKENS), 0, TINY.vocabulary_size, jnp.int32)
BLOCKS = np.arange(TOKENS) // BLOCK
BLOCK_CAUSAL = jnp.asarray(BLOCKS[:, None] >= BLOCKS[None, :])[None]


@functools.cache
def _model(**changes):
    """A model in which no parameter has its initial value; nothing is compiled for it.

    Values are drawn as float32, so that they are the same in every dtype but for rounding.
    """
    config = dataclasses.replace(TINY, **changes)
    random = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: DiffusionLM(config, rngs=nnx.Rngs(0))))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        values *= variable.shape[0] ** -0.5 if path[-1] == "kernel" else 0.5
        values += 1.0 if path[-1] == "scale" else 0.0
        return variable.replace(jnp.asarray(values.astype(np.float32), variable.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@nnx.jit
def _run(model, inputs, positions=None, mask=None):
    return model(inputs, positions, mask)


@nnx.jit
def _cached(model, inputs, rows, cache, mask):
    hidden, cache = model.cached(inputs, rows, cache, mask)
    return model.logits(hidden), cache


def _distance(found, wanted):
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
def test_angles_are_those_of_double_precision(theta):
    positions = np.array([[0, 1, 2, 77, 4095], [5, 5, 300, 8191, 32767]])
    rotary = text_rotary(jnp.asarray(positions), 16, max_period=theta)
    assert rotary.cos.shape == rotary.sin.shape == (2, 5, 8)
    assert rotary.cos.dtype == rotary.sin.dtype == jnp.float32
    angles = positions[..., None] * theta ** (-np.arange(8) / 8)
    # Angle and frequency are rounded to 24 bits, as in the code of the released models.
    tolerance = 1e-6 + 2.0**-23 * angles
    assert (np.abs(rotary.cos - np.cos(angles)) <= tolerance).all()
    assert (np.abs(rotary.sin - np.sin(angles)) <= tolerance).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_halves_of_a_head_turn_as_complex_numbers(rows):
    x = jax.random.normal(jax.random.key(1), (2, 5, 3, 10))
    positions = np.arange(5)[None] if rows == 1 else np.array([[0, 1, 2, 3, 4], [7, 0, 3, 3, 90]])
    angles = positions[..., None] * 100.0 ** (-np.arange(5) / 5)
    numbers = np.asarray(x[..., :5], np.float64) + 1j * np.asarray(x[..., 5:], np.float64)
    wanted = numbers * np.exp(1j * angles)[:, :, None, :]
    turned = rotate_halves(x, text_rotary(jnp.asarray(positions), 10, max_period=100.0))
    np.testing.assert_allclose(turned[..., :5], wanted.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 5:], wanted.imag, atol=1e-5)


def test_halves_are_turned_in_float32():
    x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8), jnp.bfloat16)
    rotary = text_rotary(jnp.arange(100, 105)[None], 8)
    turned = rotate_halves(x, rotary)
    wanted = rotate_halves(x.astype(jnp.float32), rotary)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, wanted.astype(jnp.bfloat16))


@pytest.mark.parametrize("head_dim", [0, 7, -2])
def test_odd_heads_have_no_halves(head_dim):
    with pytest.raises(ValueError, match=f"must be a positive even number, got {head_dim}"):
        text_rotary(jnp.arange(3)[None], head_dim)


def test_only_differences_of_positions_matter():
    positions = jnp.arange(TOKENS)[None]
    everywhere = jnp.ones((1, TOKENS, TOKENS), bool)
    plain = _run(_model(), IDS, positions, everywhere)
    np.testing.assert_allclose(_run(_model(), IDS, positions + 29, everywhere), plain, atol=2e-5)
    assert _distance(_run(_model(), IDS, 2 * positions, everywhere), plain) > 0.02
    np.testing.assert_allclose(_run(_model(), IDS), plain, atol=1e-5)  # what is assumed if not said


def test_the_mask_says_who_sees_whom():
    base = _run(_model(), IDS, jnp.arange(TOKENS)[None], BLOCK_CAUSAL)
    other = IDS.at[0, 6].set((IDS[0, 6] + 1) % TINY.vocabulary_size)
    changed = _run(_model(), other, jnp.arange(TOKENS)[None], BLOCK_CAUSAL)
    difference = np.abs(changed - base).max(axis=-1)
    assert (difference[0, BLOCK:] > 1e-4).all()
    assert difference[0, :BLOCK].max() < 1e-6
    assert difference[1].max() < 1e-6  # the other row


def test_embeddings_are_inputs_like_ids():
    model = _model()
    embeddings = model.embed(IDS)
    assert embeddings.shape == (BATCH, TOKENS, TINY.width)
    positions = jnp.arange(TOKENS)[None]
    np.testing.assert_allclose(
        _run(model, embeddings, positions, BLOCK_CAUSAL),
        _run(model, IDS, positions, BLOCK_CAUSAL),
        atol=1e-6,
    )


def test_attention_can_be_replaced():
    attend = functools.partial(exact_attention, mask=BLOCK_CAUSAL[:, None])
    found = nnx.jit(lambda model, ids: model(ids, attend=attend))(_model(), IDS)
    wanted = _run(_model(), IDS, jnp.arange(TOKENS)[None], BLOCK_CAUSAL)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="give either mask or attend, got both"):
        _model()(IDS, mask=BLOCK_CAUSAL, attend=attend)


@pytest.mark.parametrize("size", [1, BLOCK])
def test_a_cache_gives_what_a_full_pass_gives(size):
    """Token by token and block by block, under the mask of either."""
    model, parts = _model(), np.arange(TOKENS) // size
    mask = jnp.asarray(parts[:, None] >= parts[None, :])[None]
    wanted = _run(model, IDS, jnp.arange(TOKENS)[None], mask)
    cache = model.empty_cache(BATCH, TOKENS)
    for start in range(0, TOKENS, size):
        rows = jnp.tile(jnp.arange(start, start + size, dtype=jnp.int32), (BATCH, 1))
        seen = mask[:, start : start + size]
        # What a slot held before does not matter once it is written.
        _, cache = _cached(model, IDS[:, ::-1][:, start : start + size], rows, cache, seen)
        found, cache = _cached(model, IDS[:, start : start + size], rows, cache, seen)
        np.testing.assert_allclose(found, wanted[:, start : start + size], atol=2e-5)
    assert {array.shape for array in jax.tree.leaves(cache)} == {(BATCH, TOKENS, 2, 8)}


def test_rows_of_a_cache_may_be_anywhere():
    """Embeddings at positions that differ from row to row, and one beyond the cache."""
    model = _model()
    everywhere = jnp.ones((1, TOKENS, TOKENS), bool)
    wanted = _run(model, IDS, jnp.arange(TOKENS)[None], everywhere)
    all_rows = jnp.tile(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, 1))
    _, cache = _cached(model, IDS, all_rows, model.empty_cache(BATCH, TOKENS), everywhere)
    rows = jnp.array([[0, 3, 7], [2, 10, TOKENS]], jnp.int32)
    ids = jnp.take_along_axis(IDS, jnp.minimum(rows, TOKENS - 1), axis=1)
    found, after = _cached(model, model.embed(ids), rows, cache, everywhere[:, :3])
    picked = jnp.take_along_axis(wanted, jnp.minimum(rows, TOKENS - 1)[..., None], axis=1)
    np.testing.assert_allclose(found[0], picked[0], atol=2e-5)
    np.testing.assert_allclose(found[1, :2], picked[1, :2], atol=2e-5)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-5)


def test_a_cache_may_have_another_dtype():
    cache = _model().empty_cache(3, 7, jnp.bfloat16)
    assert len(cache) == TINY.num_layers
    for array in jax.tree.leaves(cache):
        assert (array.shape, array.dtype) == ((3, 7, 2, 8), jnp.bfloat16)
        assert not array.any()
    assert _model().empty_cache(1, 1)[0].key.dtype == jnp.float32


@functools.cache
def _value_and_gradient(remat, scan):
    """Loss and logits, and the gradient of the loss."""
    graph, parameters = nnx.split(_model(remat=remat, scan=scan))

    def loss(parameters):
        logits = nnx.merge(graph, parameters)(IDS, mask=BLOCK_CAUSAL)
        return jnp.mean(jnp.square(jax.nn.log_softmax(logits)[..., 3] + 1.0)), logits

    text = str(jax.make_jaxpr(loss)(parameters))
    assert ("remat" in text, "scan" in text) == (remat, scan)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)


@pytest.mark.parametrize(("remat", "scan"), [(True, False), (True, True)])
def test_remat_and_scan_change_nothing_but_cost(remat, scan):
    jax.tree.map(
        lambda plain, other: np.testing.assert_allclose(plain, other, rtol=1e-4, atol=1e-5),
        _value_and_gradient(False, False),
        _value_and_gradient(remat, scan),
    )


def test_gradients_are_finite_and_reach_every_parameter():
    _, gradient = _value_and_gradient(False, False)
    for path, leaf in nnx.to_flat_state(gradient):
        assert jnp.isfinite(leaf[...]).all(), path
        assert jnp.abs(leaf[...]).max() > 1e-6, path


def test_a_tied_head_is_the_embedding():
    model = _model(tied=True)
    assert model.head is None
    hidden = jax.random.normal(jax.random.key(3), (2, 3, TINY.width))
    table = model.embedding.embedding[...]
    np.testing.assert_allclose(model.logits(hidden), hidden @ table.T, atol=1e-5)
    np.testing.assert_allclose(model.logits(hidden[0, 0]), table @ hidden[0, 0], atol=1e-5)


def test_bfloat16_is_close_to_float32_and_its_logits_are_float32():
    positions = jnp.arange(TOKENS)[None]
    exact = _run(_model(), IDS, positions, BLOCK_CAUSAL)
    model = _model(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    half = _run(model, IDS, positions, BLOCK_CAUSAL)
    assert half.dtype == jnp.float32
    assert 0.0 < _distance(half, exact) < 0.03
    # Not float32 that was rounded: that would have no more than eight digits.
    assert (half != half.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    assert model.embed(IDS).dtype == jnp.bfloat16
    assert model.empty_cache(1, 1)[0].value.dtype == jnp.bfloat16


def test_float16_is_close_to_float32():
    positions = jnp.arange(TOKENS)[None]
    exact = _run(_model(), IDS, positions, BLOCK_CAUSAL)
    model = _model(dtype=jnp.float16, param_dtype=jnp.float16)
    half = _run(model, IDS, positions, BLOCK_CAUSAL)
    assert half.dtype == jnp.float32
    assert 0.0 < _distance(half, exact) < 0.004


def test_int8_attention_is_close_to_exact():
    positions = jnp.arange(TOKENS)[None]
    exact = _run(_model(), IDS, positions, BLOCK_CAUSAL)
    quantized = _run(_model(attention="int8"), IDS, positions, BLOCK_CAUSAL)
    assert 0.0 < _distance(quantized, exact) < 0.03


@pytest.mark.parametrize(
    "inputs",
    [
        jnp.zeros((2, 3)),
        jnp.zeros((3,), jnp.int32),
        jnp.zeros((2, 3, 19)),
        jnp.zeros((1, 2, 3, 20)),
    ],
)
def test_wrong_inputs_are_refused(inputs):
    with pytest.raises(ValueError, match=r"inputs must be ids .* tokens, 20\), got .* of shape"):
        nnx.eval_shape(lambda: DiffusionLM(TINY, rngs=nnx.Rngs(0))(inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive int, got num_layers=0"),
        ({"width": 2.0}, "width must be a positive int, got width=2.0"),
        ({"num_heads": True}, "num_heads must be a positive int, got num_heads=True"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got num_kv_heads=3 and"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"head_dim": "8"}, "head_dim must be a positive int, got head_dim='8'"),
        ({"ffn_dim": -1}, "ffn_dim must be a positive int, got ffn_dim=-1"),
        ({"vocabulary_size": None}, "vocabulary_size must be a positive int"),
        ({"max_tokens": 0}, "max_tokens must be a positive int"),
        ({"mask_id": 53}, "mask_id must be a token, below vocabulary_size=53, got 53"),
        ({"mask_id": -1}, "mask_id must be a token, below vocabulary_size=53, got -1"),
        ({"mask_id": None}, "mask_id must be an int, got None"),
        ({"mask_id": True}, "mask_id must be an int, got True"),
        ({"qk_norm": 1}, "qk_norm must be True or False, got 1"),
        ({"tied": "no"}, "tied must be True or False, got 'no'"),
        ({"remat": None}, "remat must be True or False, got None"),
        ({"scan": 0}, "scan must be True or False, got 0"),
        ({"rope_theta": 0}, "rope_theta must be a positive finite number, got 0"),
        ({"eps": float("nan")}, "eps must be a positive finite number, got nan"),
        ({"eps": "1e-6"}, "eps must be a positive finite number, got '1e-6'"),
        ({"attention": "flash"}, "attention must be one of 'exact', 'int8', got 'flash'"),
        ({"dtype": "int8"}, "dtype must be a float dtype such as bfloat16, got 'int8'"),
        ({"param_dtype": "float99"}, "param_dtype must be a float dtype .*, got 'float99'"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize(
    "value", [None, "float64", float, np.dtype(">f4"), "float8_e4m3fn", jnp.float8_e5m2, "float4"]
)
def test_dtypes_that_models_do_not_compute_in_are_refused(name, value):
    allowed = "bfloat16, float16, float32 and, with jax_enable_x64, float64$"
    with pytest.raises(ValueError, match=f"^{name} must be a float .*; allowed are {allowed}"):
        dataclasses.replace(TINY, **{name: value})


def test_float64_is_allowed_where_jax_has_it():
    with jax.enable_x64(True):
        config = dataclasses.replace(TINY, dtype="float64", param_dtype=np.float64)
        with pytest.raises(ValueError, match=r"^dtype must be a float dtype .*, got None"):
            dataclasses.replace(TINY, dtype=None)
    assert config.dtype == config.param_dtype == np.float64


def test_equal_configurations_compare_and_hash_equal():
    named = dataclasses.replace(TINY, dtype="bfloat16")
    typed = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    assert named == typed
    assert hash(named) == hash(typed)
