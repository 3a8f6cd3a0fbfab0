"""What is fed back, against dense arithmetic in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import (
    Residual,
    ResidualContext,
    mix_residual,
    no_residual,
    quantized_table,
    residual_context,
)
from tests.jaxgen.sampling.language_models import entropy, softmax

TILE = residual_context._TILE
MASK = 7
WEIGHTINGS = (
    "entropy", "confidence", "fixed", "one", "one_minus_entropy", "one_minus_confidence",
)  # fmt: skip


def table_of(vocabulary, width=5, dtype=np.float32):
    return np.random.default_rng(vocabulary).normal(size=(vocabulary, width)).astype(dtype)


def logits_of(*shape, scale=3.0, dtype=np.float32):
    """NumPy arrays, which nothing is compiled for."""
    return (scale * np.random.default_rng(1).normal(size=shape)).astype(dtype)


def changed(array, *places, to):
    """A copy with other values at some places."""
    array = array.copy()
    for place in places:
        array[place] = to
    return array


def dense(context, logits, table, mask_id=MASK):
    """Weight and vector, with all probabilities in an array."""
    logits, table = logits.astype(np.float64), table.astype(np.float64)
    if context.skip_mask_token:
        logits = np.where(np.arange(len(table)) == mask_id, -np.inf, logits)
    plain, tempered = softmax(logits), softmax(logits / context.temperature)
    vector = (tempered if context.temper_vector else plain) @ table
    if context.source == "top1":
        vector = table[logits.argmax(axis=-1)]
    share, sure = entropy(tempered) / np.log(len(table)), tempered.max(axis=-1)
    weights = {
        "entropy": share, "one_minus_entropy": 1 - share, "confidence": sure,
        "one_minus_confidence": 1 - sure, "one": np.ones_like(share),
        "fixed": np.full_like(share, context.fixed_weight),
    }  # fmt: skip
    return weights[context.weighting], vector


@jax.jit
def residual(context, logits, table):
    return context.residual(logits, table, MASK)


def compare(context, logits, table, atol=1e-5, **options):
    found = residual(context, logits, table)
    weight, vector = dense(context, logits, table)
    assert found.weight.dtype == found.vector.dtype == jnp.float32
    assert found.weight.shape == logits.shape[:-1]
    assert found.vector.shape == (*logits.shape[:-1], table.shape[1])
    np.testing.assert_allclose(found.weight, weight, atol=1e-5, err_msg="weight", **options)
    np.testing.assert_allclose(found.vector, vector, atol=atol, err_msg="vector", **options)
    return found


@pytest.mark.parametrize("vocabulary", [50, TILE - 1, TILE, TILE + 9, 2 * TILE, 2 * TILE + 37])
def test_tiles_add_up_to_the_dense_arithmetic(vocabulary):
    logits, table = logits_of(6, vocabulary), table_of(vocabulary)
    # The likeliest token may be anywhere.
    for place in {0, vocabulary // 2, vocabulary - 1}:
        found = compare(ResidualContext(), changed(logits, (1, place), to=20.0), table)
        np.testing.assert_allclose(found.vector[1], table[place], atol=2e-2)


@pytest.mark.parametrize("scale", [0.0, 0.1, 30.0])
@pytest.mark.parametrize("temper_vector", [False, True])
@pytest.mark.parametrize("temperature", [0.25, 0.92, 1.7])
def test_the_temperature_softens_the_weight_and_if_asked_the_vector(
    temperature, temper_vector, scale
):
    context = ResidualContext(temperature, temper_vector=temper_vector)
    compare(context, logits_of(6, 50, scale=scale), table_of(50))


@pytest.mark.parametrize("vocabulary", [50, TILE + 9])
def test_huge_and_impossible_logits(vocabulary):
    logits, table = logits_of(6, vocabulary), table_of(vocabulary)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] *= 1e4
    logits[3, :-2] = -np.inf
    logits[4, 5:] = -np.inf
    logits[5] = -np.inf
    logits[5, 4] = 0.0
    for temperature in (0.5, 1.0, 2.0):
        found = compare(ResidualContext(temperature), logits, table, atol=3e-5)
        assert found.weight[5] == 0.0  # one token is possible
        np.testing.assert_allclose(found.vector[5], table[4], rtol=1e-6)


def test_nothing_is_lost_at_large_offsets_but_by_the_logits_themselves():
    """Shifting logits by what leaves them multiples of 1/64 changes nothing at all."""
    logits = np.round(logits_of(6, 50) * 64) / 64
    found = residual(ResidualContext(0.7), logits + np.float32(8192), table_of(50))
    wanted = residual(ResidualContext(0.7), logits, table_of(50))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("vocabulary", "dtypes"),
    [
        (40, (jnp.bfloat16, np.float32)),
        (40, (np.float32, jnp.bfloat16)),
        (TILE + 9, (jnp.bfloat16, jnp.bfloat16)),
    ],
)
def test_half_precision_is_summed_in_float32(dtypes, vocabulary):
    logits = logits_of(6, vocabulary, dtype=dtypes[0])
    table = table_of(vocabulary, dtype=dtypes[1])
    compare(ResidualContext(1.3), logits, table, atol=1e-5 if dtypes[1] == np.float32 else 4e-3)
    # All probabilities equal: a sum in bfloat16 would stop growing at 256 tokens.
    flat = compare(ResidualContext(), np.zeros_like(logits), np.abs(table), atol=1e-4)
    np.testing.assert_allclose(flat.weight, 1.0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 1, 3)])
def test_positions_come_in_any_shape_even_none(shape):
    compare(ResidualContext(), logits_of(*shape, TILE + 9), table_of(TILE + 9))


@jax.jit
def fed(table, found):
    """What positions get that are all masked."""
    rows = len(found.weight)
    masks = jnp.broadcast_to(table[MASK], (rows, table.shape[1]))
    return mix_residual(masks, jnp.ones(rows, bool), found)


@pytest.mark.parametrize("token", [0, 3, MASK, 29])
def test_a_sure_prediction_feeds_nothing_back_whatever_its_token(token):
    """Not the embedding of that token: the position stays at the mask."""
    table = table_of(50)
    for floor in (-np.inf, -1e4):
        logits = changed(np.full((6, 50), floor, np.float32), (slice(None), token), to=3.0)
        found = residual(ResidualContext(), logits, table)
        np.testing.assert_array_equal(found.weight, 0.0)
        np.testing.assert_allclose(found.vector, np.tile(table[token], (6, 1)), rtol=1e-6)
        np.testing.assert_array_equal(fed(table, found), np.tile(table[MASK], (6, 1)))


@pytest.mark.parametrize("vocabulary", [50, 2 * TILE])
def test_an_even_prediction_is_the_average_embedding(vocabulary):
    table = table_of(vocabulary)
    found = residual(ResidualContext(), np.full((6, vocabulary), -5.0, np.float32), table)
    np.testing.assert_allclose(found.weight, 1.0, rtol=1e-6)
    mean = table.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(fed(table, found), np.tile(mean, (6, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("likely", "share", "rest", "wanted"),
    [
        (2, 1.0, 0, 0.058),
        (10, 1.0, 0, 0.193),
        (100, 1.0, 0, 0.386),
        (1, 0.85, 20, 0.073),
        (1, 0.10, 20, 0.25),
    ],
)
def test_weights_of_the_specification_at_the_vocabulary_of_sdar(likely, share, rest, wanted):
    logits = np.full((1, 151_936), -np.inf, np.float32)
    logits[0, :likely] = np.log(share / likely)
    if rest:
        logits[0, likely : likely + rest] = np.log((1 - share) / rest)
    found = residual(ResidualContext(), logits, np.zeros((151_936, 1), np.float32))
    assert float(found.weight[0]) == pytest.approx(wanted, abs=0.006)


def test_more_temperature_is_more_residual_and_the_vector_stays():
    logits, table = logits_of(6, 50), table_of(50)
    temperatures = [1e-30, 1e-6, 0.1, 0.5, 0.92, 1.0, 1.5, 4.0, 100.0, 1e6, 1e30]
    found = [residual(ResidualContext(value), logits, table) for value in temperatures]
    for cooler, warmer in itertools.pairwise(found):
        assert (np.asarray(warmer.weight) >= np.asarray(cooler.weight) - 1e-6).all()
        np.testing.assert_array_equal(warmer.vector, cooler.vector)
    for cooler, warmer in itertools.pairwise(found[2:-2]):
        assert (np.asarray(warmer.weight) > np.asarray(cooler.weight)).all()
    np.testing.assert_array_equal(found[0].weight, 0.0)
    np.testing.assert_allclose(found[-1].weight, 1.0, rtol=1e-6)


def test_cold_ties_keep_their_entropy():
    logits = changed(logits_of(6, 50), (slice(None), [3, 40, 41]), to=30.0)
    found = residual(ResidualContext(1e-6), logits, table_of(50))
    np.testing.assert_allclose(found.weight, np.log(3) / np.log(50), rtol=1e-5)


@pytest.mark.parametrize(
    ("weighting", "source", "skip"),
    [
        *((weighting, "full", False) for weighting in WEIGHTINGS),
        ("entropy", "top1", False),
        ("confidence", "top1", True),
        ("one_minus_confidence", "full", True),
    ],
)
def test_every_weighting_and_source(weighting, source, skip):
    context = ResidualContext(1.4, 0.15, weighting=weighting, source=source, skip_mask_token=skip)
    # The mask is the likeliest in two of them, and some tokens are impossible in two.
    logits = changed(logits_of(6, 50), (slice(2), MASK), to=9.0)
    logits[1:3, 20:] = -np.inf
    found = compare(context, logits, table_of(50))
    assert ((np.asarray(found.weight) >= 0) & (np.asarray(found.weight) <= 1)).all()


@pytest.mark.parametrize(("vocabulary", "dtype"), [(50, np.float32), (TILE + 9, jnp.bfloat16)])
def test_the_mask_token_can_be_left_out(vocabulary, dtype):
    logits, table = logits_of(6, vocabulary, dtype=dtype), table_of(vocabulary)
    logits[0, MASK] = 8.0
    without = ResidualContext(skip_mask_token=True)
    found = compare(without, logits, table)
    assert np.abs(found.vector - residual(ResidualContext(), logits, table).vector).max() > 1e-2
    # Neither its logit nor its embedding counts, and an even prediction is not quite 1.
    other = changed(logits, (slice(None), MASK), to=-4.0)
    jax.tree.map(np.testing.assert_array_equal, residual(without, other, table), found)
    moved = residual(without, logits, changed(table, MASK, to=1e3))
    np.testing.assert_array_equal(moved.vector, found.vector)
    even = residual(without, np.zeros_like(logits), table)
    np.testing.assert_allclose(even.weight, np.log(vocabulary - 1) / np.log(vocabulary), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_known_positions_are_their_embeddings_bit_for_bit(dtype):
    embeddings = table_of(12, dtype=dtype).reshape(2, 6, 5)
    masked = np.array([[True, False, False, True, False, True]] * 2)
    weight, vector = np.full((2, 6), 0.3, np.float32), table_of(12).reshape(2, 6, 5)[::-1].copy()
    vector[~masked] = np.nan
    mixed = np.asarray(jax.jit(mix_residual)(embeddings, masked, Residual(weight, vector)))
    assert mixed.dtype == dtype
    np.testing.assert_array_equal(mixed[~masked], embeddings[~masked])
    wanted = 0.7 * embeddings[masked].astype(np.float64) + 0.3 * vector[masked]
    tolerance = 1e-6 if dtype == np.float32 else 1e-2
    np.testing.assert_allclose(
        mixed[masked].astype(np.float64), wanted, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_cold_start_is_the_mask_bit_for_bit(dtype):
    embeddings = table_of(6, dtype=dtype).reshape(2, 3, 5)
    start = no_residual((2, 3), 5)
    assert start.weight.shape == (2, 3)
    assert start.vector.shape == (2, 3, 5)
    mixed = jax.jit(mix_residual)(embeddings, np.ones((2, 3), bool), start)
    np.testing.assert_array_equal(mixed, embeddings)


def test_other_numbers_do_not_compile_again():
    logits, table = logits_of(6, 50), table_of(50)
    run = jax.jit(lambda *arguments: ResidualContext.residual(*arguments, MASK))
    results = []
    for number in (0.5, 0.92, 1.0, 2.0):
        context = ResidualContext(number, number / 4, number, weighting="one_minus_entropy")
        results.append(run(context, logits, table).weight)
    assert run._cache_size() == 1
    assert len({float(weight[0]) for weight in results}) == 4
    run(ResidualContext(weighting="fixed"), logits, table)
    assert run._cache_size() == 2


def test_arrays_are_numbers_too():
    logits, table = logits_of(6, 50), table_of(50)
    found = residual(ResidualContext(jnp.float32(1.5)), logits, table)
    jax.tree.map(
        np.testing.assert_array_equal, found, residual(ResidualContext(1.5), logits, table)
    )
    fixed = ResidualContext(fixed_weight=jnp.float32(0.2), weighting="fixed")
    np.testing.assert_allclose(residual(fixed, logits, table).weight, 0.2, rtol=1e-6)


def test_nothing_is_no_number_on_the_way():
    """With impossible tokens, too: none of the arrays in between may hold NaN."""
    context = ResidualContext(1.2, skip_mask_token=True)
    logits, table = changed(logits_of(6, 50), (0, 3), to=-np.inf), table_of(50)
    with jax.debug_nans(True):
        found = context.residual(jnp.asarray(logits), jnp.asarray(table), MASK)
    np.testing.assert_allclose(found.weight, dense(context, logits, table)[0], atol=1e-5)


def loss_of(context, logits, table):
    """Any function of what the model would get."""
    masked = jnp.arange(logits.shape[0]) % 3 > 0
    embeddings = jnp.broadcast_to(table[MASK], (len(logits), table.shape[1]))
    mixed = mix_residual(embeddings, masked, context.residual(logits, table, MASK))
    return jnp.sum(jnp.sin(mixed) @ jnp.arange(1.0, mixed.shape[1] + 1))


def dense_loss(context, logits, table):
    weight, vector = dense(context, logits, table)
    mixed = (1 - weight)[:, None] * table[MASK] + weight[:, None] * vector
    mixed = np.where((np.arange(len(mixed)) % 3 > 0)[:, None], mixed, table[MASK])
    return np.sum(np.sin(mixed) * np.arange(1, mixed.shape[1] + 1))


CONTEXTS = [
    ResidualContext(),
    ResidualContext(1.3, temper_vector=True),
    ResidualContext(source="top1", weighting="confidence"),
    ResidualContext(skip_mask_token=True, weighting="one"),
]


def differences(loss, array, places, step=1e-4):
    """The gradient at some places, in float64."""
    array = array.astype(np.float64)
    for place in places:
        above, below = (
            loss(changed(array, place, to=array[place] + move)) for move in (step, -step)
        )
        yield (above - below) / (2 * step)


_gradients = jax.jit(jax.grad(loss_of, argnums=(1, 2)))


@pytest.mark.parametrize(
    ("vocabulary", "context"),
    [(50, CONTEXTS[0]), *((2 * TILE + 7, context) for context in CONTEXTS)],
    ids=["untiled", "full", "tempered", "top1", "skip"],
)
def test_gradients_reach_the_table_and_the_logits(context, vocabulary):
    """Those of the logits are for models that see their own predictions while they are trained."""
    logits, table = logits_of(4, vocabulary, scale=1.0), table_of(vocabulary, 3)
    logits[1, vocabulary - 2] = logits[2, 4] = 9.0
    logits[2, 6] = -np.inf
    to_logits, to_table = map(np.asarray, _gradients(context, logits, table))
    assert np.isfinite(to_logits).all()
    assert to_logits[2, 6] == 0.0
    tolerance = {"rtol": 2e-3, "atol": 2e-5}
    places = [(4, 0), (vocabulary - 2, 1), (MASK, 2), (0, 0), (vocabulary - 1, 2), (11, 1)]
    wanted = list(differences(lambda x: dense_loss(context, logits, x), table, places))
    np.testing.assert_allclose([to_table[place] for place in places], wanted, **tolerance)
    assert np.abs(to_table[[4, MASK]]).min() > 1e-3
    places = [(1, vocabulary - 2), (2, 4), (1, 5), (2, 9), (0, 4), (1, MASK)]
    wanted = list(differences(lambda x: dense_loss(context, x, table), logits, places))
    np.testing.assert_allclose([to_logits[place] for place in places], wanted, **tolerance)


def test_probabilities_are_not_kept_for_the_backward_pass():
    rows, vocabulary = 16, 3 * TILE
    logits, table = logits_of(rows, vocabulary), table_of(vocabulary, 3)
    loss = lambda table: jnp.sum(ResidualContext().residual(logits, table, MASK).vector ** 2)
    kept = jax.tree.leaves(jax.vjp(loss, jnp.asarray(table))[1])
    large = [array for array in kept if getattr(array, "size", 0) >= rows * vocabulary]
    assert all((array == logits).all() for array in large)
    assert len(large) <= 1


def expected_entropy(concentration, vocabulary):
    """Of Dirichlet variables, by its closed form."""
    digamma = lambda x: float(jax.scipy.special.digamma(x))
    return digamma(concentration * vocabulary + 1) - digamma(concentration + 1)


@pytest.mark.parametrize(
    ("concentration", "wanted"),
    [(1.0, 0.965), (0.1, 0.84), (0.01, 0.66), (0.001, 0.47), (1 / 151_936, 0.08)],
)
def test_the_closed_form_gives_the_weights_of_the_specification(concentration, wanted):
    weight = expected_entropy(concentration, 151_936) / np.log(151_936)
    assert weight == pytest.approx(wanted, abs=0.006)


@pytest.mark.parametrize("concentration", [0.003, 0.02, 0.1, 1.0, 30.0])
def test_random_predictions_have_the_entropy_of_dirichlet_variables(concentration):
    vocabulary, draws = 64, 500
    context, table = ResidualContext(concentration=concentration), table_of(vocabulary)
    found = random_residual(context, jax.random.key(3), (draws,), table)
    table = table.astype(np.float64)
    wanted = expected_entropy(concentration, vocabulary)
    weights = np.asarray(found.weight, np.float64) * np.log(vocabulary)
    assert abs(weights.mean() - wanted) < 4 * weights.std() / draws**0.5 + 1e-4
    # The expected prediction is the even one, and its variance (1/V)(1-1/V) / (cV+1) a token.
    mean = table.mean(axis=0)
    spread = ((table - mean) ** 2).mean(axis=0) / (concentration * vocabulary + 1)
    vectors = np.asarray(found.vector, np.float64)
    assert (np.abs(vectors.mean(axis=0) - mean) < 5 * (spread / draws) ** 0.5).all()
    np.testing.assert_allclose(vectors.var(axis=0), spread, rtol=0.3)


def test_random_predictions_differ_between_positions_and_keys():
    table = table_of(64)
    found = random_residual(ResidualContext(), jax.random.key(0), (2, 3), table)
    assert found.weight.shape == (2, 3)
    assert found.vector.shape == (2, 3, 5)
    assert len(set(np.asarray(found.weight).ravel().tolist())) == 6
    again = random_residual(ResidualContext(), jax.random.key(0), (2, 3), table)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    other = random_residual(ResidualContext(), jax.random.key(1), (2, 3), table)
    assert (np.asarray(other.weight) != np.asarray(found.weight)).all()


@jax.jit(static_argnums=2)
def random_residual(context, key, shape, table):
    return context.random_residual(key, shape, table, MASK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"concentration": 0.0}, "concentration must be positive and finite, got 0.0"),
        ({"restart": -1}, "restart must be an int of at least 0, got -1"),
        ({"restart": 1.0}, "restart must be an int of at least 0, got 1.0"),
        ({"restart": True}, "restart must be an int of at least 0, got True"),
        ({"fixed_weight": 1.1}, "fixed_weight must be from 0 to 1, got 1.1"),
        ({"fixed_weight": -0.1}, "fixed_weight must be from 0 to 1, got -0.1"),
        ({"weighting": "variance"}, "weighting must be one of entropy, .*, got 'variance'"),
        ({"source": "top2"}, "source must be one of full, top1, got 'top2'"),
        ({"init": "warm"}, "init must be one of zero, self, reference, dirichlet, got 'warm'"),
        ({"init": None}, "init must be one of .*, got None"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualContext(**options)


def test_a_quantized_table_is_rounded_to_the_nearest_by_rows():
    table = table_of(40) * np.geomspace(1e-3, 1e3, 40, dtype=np.float32)[:, None]
    table[3] = 0
    codes, scale = map(np.asarray, quantized_table(jnp.asarray(table)))
    assert codes.dtype == np.int8
    assert np.abs(codes).max() == 127
    assert (np.abs(codes * scale[:, None] - table) <= 0.5001 * scale[:, None]).all()
    assert not codes[3].any()


@pytest.mark.parametrize("vocabulary", [300, TILE + 5])
@pytest.mark.parametrize("options", [{}, {"source": "top1"}, {"skip_mask_token": True}])
def test_a_quantized_table_changes_vectors_by_a_percent_and_weights_not_at_all(vocabulary, options):
    context, table = ResidualContext(**options), table_of(vocabulary, width=64)
    logits = logits_of(6, vocabulary)
    exact, narrow = (
        residual(context, logits, table),
        residual(context, logits, quantized_table(table)),
    )
    np.testing.assert_array_equal(narrow.weight, exact.weight)
    error = np.linalg.norm(narrow.vector - exact.vector) / np.linalg.norm(exact.vector)
    assert 1e-5 < error < 0.01


def test_one_product_gives_what_tiles_give(monkeypatch):
    context, table, logits = ResidualContext(), table_of(2 * TILE + 5), logits_of(3, 2 * TILE + 5)
    tiles = residual(context, logits, table)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where tiles would be copied
    whole = jax.jit(lambda logits, table: context.residual(logits, table, MASK))(logits, table)
    np.testing.assert_allclose(whole.weight, tiles.weight, rtol=1e-5)
    np.testing.assert_allclose(whole.vector, tiles.vector, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("narrow", [False, True])
def test_on_a_gpu(dtype, narrow):
    table = jnp.asarray(table_of(20_000, width=256), dtype)
    logits = jnp.asarray(logits_of(70, 20_000))
    weight, vector = dense(ResidualContext(), np.asarray(logits), np.asarray(table, np.float32))
    given = quantized_table(table) if narrow else table
    found = residual(ResidualContext(), logits, given)
    np.testing.assert_allclose(found.weight, weight, atol=1e-5)
    error = np.linalg.norm(found.vector - vector) / np.linalg.norm(vector)
    assert error < (0.01 if narrow else 0.005)
