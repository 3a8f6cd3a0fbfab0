"""The losses of masked diffusion language models, against sums written out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import block_diffusion_mask
from jaxgen.models import DiffusionLM, DiffusionLMConfig
from jaxgen.sampling import (
    MaskedDiffusion,
    ResidualContext,
    diffusion_lm_loss,
    mask_tokens,
    masked_diffusion,
)

MASK = 12
CONFIG = DiffusionLMConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=16,
    vocabulary_size=13,
    mask_id=MASK,
    qk_norm=True,
)
TOKENS = jax.random.randint(jax.random.key(0), (3, 10), 0, MASK)
MASKABLE = jnp.arange(10)[None] >= jnp.array([4, 0, 7])[:, None]
KEY = jax.random.key(5)


def over_seeds(count, run):
    """What `run` returns for the keys of so many seeds, in one compiled program."""
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    results = jax.jit(lambda keys: jax.lax.map(run, keys))(keys)
    return [jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf[seed]), results)
            for seed in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def models():
    model = DiffusionLM(CONFIG, rngs=nnx.Rngs(1))
    reference = DiffusionLM(dataclasses.replace(CONFIG, width=8), rngs=nnx.Rngs(2))
    for module in (model, reference):  # far from uniform predictions
        state = nnx.state(module)
        nnx.update(module, jax.tree.map(lambda a: 8 * a if a.ndim == 2 else a, state))
    return model, reference


@functools.partial(jax.jit, static_argnums=(1, 3))
def _value_and_grad(state, graph, other, training):
    reference = None if other is None else nnx.merge(*other)

    def loss(state):
        model = nnx.merge(graph, state)
        return diffusion_lm_loss(KEY, model, TOKENS, MASKABLE, training, reference=reference)

    return jax.value_and_grad(loss)(state)


def loss_of(model, training, reference=None):
    graph, state = nnx.split(model)
    if reference is None:
        return _value_and_grad(state, graph, None, training)
    run = functools.partial(diffusion_lm_loss, KEY, training=training, reference=reference)
    loss = lambda model: run(model, TOKENS, MASKABLE)
    return nnx.jit(nnx.value_and_grad(loss))(model)


def _cross_entropy(logits, targets):
    logits = np.asarray(logits, np.float64)
    right = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - right


def _weights(noised):
    return np.asarray(noised.masked) / np.asarray(noised.rate)


def test_rates_are_spread_evenly_and_masks_follow_them():
    tokens = jnp.zeros((64, 4096), jnp.int32)
    noised = mask_tokens(jax.random.key(0), tokens, jnp.ones(tokens.shape, bool), MASK)
    rates = np.asarray(noised.rate[:, 0])
    assert (noised.rate == noised.rate[:, :1]).all()
    assert rates.min() >= 1e-3
    assert rates.max() <= 1
    # One in each 64th of the range, in random order.
    np.testing.assert_allclose(np.diff(np.sort(rates)), 0.999 / 64, atol=1e-5)
    assert (np.diff(rates) > 0).sum() not in (0, 63)
    np.testing.assert_allclose(noised.masked.mean(axis=1), rates, atol=0.04)
    np.testing.assert_array_equal(noised.tokens == MASK, noised.masked)


def test_each_block_can_have_a_rate_of_its_own():
    tokens = jnp.zeros((3, 11), jnp.int32)
    noised = mask_tokens(KEY, tokens, jnp.ones((3, 11), bool), MASK, block_length=4)
    rates = np.asarray(noised.rate)
    blocks = [rates[:, :4], rates[:, 4:8], rates[:, 8:]]
    assert all((block == block[:, :1]).all() for block in blocks)
    assert len(np.unique(rates)) == 9


def test_what_may_not_be_masked_stays():
    noised = mask_tokens(KEY, TOKENS, MASKABLE, MASK)
    np.testing.assert_array_equal(noised.tokens[~noised.masked], TOKENS[~noised.masked])
    assert not (noised.masked & ~MASKABLE).any()
    assert noised.masked.any()


@pytest.mark.parametrize("average", ["row", "token"])
def test_bidirectional_loss_is_the_weighted_sum(models, average):
    model, _ = models
    training = MaskedDiffusion(sight="bidirectional", average=average)
    noised = mask_tokens(KEY, TOKENS, MASKABLE, MASK)
    terms = _cross_entropy(model(noised.tokens), TOKENS) * _weights(noised)
    counts = np.asarray(MASKABLE).sum(axis=1)
    expected = (
        (terms.sum(axis=1) / counts).mean() if average == "row" else terms.sum() / counts.sum()
    )
    np.testing.assert_allclose(loss_of(model, training)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("per_block", [False, True])
def test_block_causal_loss_sees_the_noisy_and_the_clean_half(models, per_block):
    model, _ = models
    training = MaskedDiffusion(block_length=4, rate_per_block=per_block)
    noised = mask_tokens(KEY, TOKENS, MASKABLE, MASK, block_length=4 if per_block else None)
    both = jnp.concatenate([noised.tokens, TOKENS], axis=1)
    positions = jnp.tile(jnp.arange(10), 2)[None]
    logits = model(both, positions, block_diffusion_mask(20, 4)[None])[:, :10]
    terms = _cross_entropy(logits, TOKENS) * _weights(noised)
    expected = terms.sum() / np.asarray(MASKABLE).sum()
    np.testing.assert_allclose(loss_of(model, training)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("cold_share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("sight", ["bidirectional", "block_causal"])
def test_residual_loss_mixes_what_the_reference_predicts(models, sight, cold_share):
    model, reference = models
    training = MaskedDiffusion(
        sight=sight, block_length=4, residual=ResidualContext(), cold_share=cold_share
    )
    noised = mask_tokens(KEY, TOKENS, MASKABLE, MASK)
    ids, options = noised.tokens, {}
    if sight == "block_causal":
        ids = jnp.concatenate([ids, TOKENS], axis=1)
        options["positions"] = jnp.tile(jnp.arange(10), 2)[None]
        options["mask"] = block_diffusion_mask(20, 4)[None]
    logits = np.asarray(reference(ids, **options)[:, :10], np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    weight = -(shares * np.log(shares)).sum(axis=-1) / np.log(13)
    cold = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, 1), (3, 1))) < cold_share
    assert cold.any() == (cold_share > 0)
    assert cold.all() == (cold_share == 1)
    weight = np.where(cold, 0, weight)
    table = np.asarray(model.embedding.embedding[...], np.float64)
    inputs = np.array(model.embed(ids), np.float64)
    mixed = (1 - weight[..., None]) * table[MASK] + weight[..., None] * (shares @ table)
    inputs[:, :10] = np.where(noised.masked[..., None], mixed, inputs[:, :10])
    logits = model(jnp.asarray(inputs, jnp.float32), **options)[:, :10]
    terms = _cross_entropy(logits, TOKENS) * _weights(noised)
    expected = terms.sum() / np.asarray(MASKABLE).sum()
    loss, _ = loss_of(model, training, reference)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    plain, _ = loss_of(model, dataclasses.replace(training, residual=None))
    assert (abs(loss - plain) > 1e-3) == (cold_share < 1)


@pytest.mark.parametrize("sight", ["bidirectional", "block_causal"])
def test_the_reference_does_not_know_what_was_settled_last(models, sight, monkeypatch):
    model, reference = models
    training = MaskedDiffusion(sight=sight, block_length=4, residual=ResidualContext())
    stale = dataclasses.replace(training, stale_share=0.8)
    seen = {}

    def watch(self, inputs, *args, **options):
        seen[inputs.ndim] = inputs  # ids of the reference, embeddings of the model
        return jnp.zeros((*inputs.shape[:2], self.config.width))

    monkeypatch.setattr(DiffusionLM, "hidden", watch)

    def run(key):
        diffusion_lm_loss(key, model, TOKENS, MASKABLE, stale, reference=reference)
        return mask_tokens(key, TOKENS, MASKABLE, MASK), dict(seen)

    earlier, unmasked = [], []
    for noised, inputs in over_seeds(40, run):
        ids = inputs[2]
        if sight == "block_causal":
            np.testing.assert_array_equal(ids[:, 10:], TOKENS)
        ids, known = ids[:, :10], np.asarray(MASKABLE & ~noised.masked)
        np.testing.assert_array_equal(ids[~known], np.asarray(noised.tokens)[~known])
        assert ((ids == TOKENS) | (ids == MASK))[known].all()
        # The model itself sees every token that is known.
        table = np.asarray(model.embedding.embedding[...])
        plain = ~np.asarray(noised.masked)
        np.testing.assert_array_equal(inputs[3][:, :10][plain], table[np.asarray(TOKENS)[plain]])
        unmasked.append(known.sum())
        earlier.append((ids == MASK)[known].sum())
    assert sum(earlier) / sum(unmasked) == pytest.approx(0.4, abs=0.1)  # half of 0.8


def test_the_reference_gets_no_gradient(models):
    model, reference = models
    training = MaskedDiffusion(sight="bidirectional", residual=ResidualContext())

    @nnx.jit
    def gradient(reference):
        loss = lambda other: diffusion_lm_loss(
            KEY, model, TOKENS, MASKABLE, training, reference=other
        )
        return nnx.grad(loss)(reference)

    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient(reference)))


@pytest.mark.parametrize("sight", ["bidirectional", "block_causal"])
def test_its_own_residual_is_that_of_a_frozen_copy(models, sight):
    model, _ = models
    training = MaskedDiffusion(
        sight=sight, block_length=4, residual=ResidualContext(), cold_share=0.2, stale_share=0.8
    )
    loss, gradient = loss_of(model, training, model)
    own = dataclasses.replace(training, own_passes=1)
    own_loss, own_gradient = loss_of(model, own)
    assert own_loss == loss
    jax.tree.map(np.testing.assert_array_equal, own_gradient, gradient)


@pytest.mark.parametrize("sight", ["bidirectional", "block_causal"])
def test_every_pass_can_learn(models, sight):
    model, _ = models
    own = MaskedDiffusion(
        sight=sight, block_length=4, residual=ResidualContext(), own_passes=1, stale_share=0.0
    )
    first, first_gradient = loss_of(model, dataclasses.replace(own, own_passes=0, residual=None))
    last, last_gradient = loss_of(model, own)
    loss, gradient = loss_of(model, dataclasses.replace(own, learn_every_pass=True))
    assert abs(first - last) > 1e-3
    np.testing.assert_allclose(loss, (first + last) / 2, rtol=1e-6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first_gradient, last_gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, mean
    )


def test_what_an_earlier_pass_learns_counts_by_the_rate_of_its_masks(models, monkeypatch):
    model, _ = models
    training = MaskedDiffusion(
        sight="bidirectional",
        average="row",
        residual=ResidualContext(),
        own_passes=2,
        learn_every_pass=True,
        stale_share=1.0,
    )
    seen = []
    monkeypatch.setattr(
        DiffusionLM, "hidden", lambda self, x, **_: jnp.zeros((*x.shape[:2], self.config.width))
    )

    def watch(states, table, tokens, weights, **_):
        seen.append(weights)
        return jnp.float32(len(seen))

    monkeypatch.setattr(masked_diffusion, "weighted_cross_entropy", watch)

    def run(key):
        seen.clear()
        return diffusion_lm_loss(key, model, TOKENS, MASKABLE, training), list(seen)

    totals = []
    for loss, every in over_seeds(300, run):
        assert loss == pytest.approx(2.0)  # the mean of 1, 2 and 3
        masked = [weights > 0 for weights in every]
        assert not (masked[1] & ~masked[0]).any()  # each pass knows some tokens more
        assert not (masked[2] & ~masked[1]).any()
        totals.append([weights.sum() for weights in every])
    # A token counts 1 on the average, in each pass; rows of 1 add up to 1.
    np.testing.assert_allclose(np.mean(totals, axis=0), 1.0, atol=0.1)


def test_own_passes_follow_one_another(models, monkeypatch):
    model, _ = models
    training = MaskedDiffusion(
        sight="bidirectional",
        residual=ResidualContext(),
        own_passes=2,
        cold_share=0.25,
        stale_share=1.0,
    )
    table = np.asarray(model.embedding.embedding[...], np.float64)
    seen = []

    def states(inputs):  # in the place of the transformer, which would take long
        return jnp.tanh(model.embed(inputs) if inputs.ndim == 2 else inputs)

    def watch(self, inputs, *args, **options):
        seen.append(inputs)
        return states(inputs)

    monkeypatch.setattr(DiffusionLM, "hidden", watch)

    def run(key):
        seen.clear()
        diffusion_lm_loss(key, model, TOKENS, MASKABLE, training)
        return mask_tokens(key, TOKENS, MASKABLE, MASK).masked, list(seen)

    depths, hidden_shares = [], []
    for masked, (first, *later) in over_seeds(30, run):
        later = [inputs.astype(np.float64) for inputs in later]
        unknown = [first == MASK, *((x != table[np.asarray(TOKENS)]).any(-1) for x in later)]
        # What a pass does not know, the passes before it did not know either.
        np.testing.assert_array_equal(unknown[2], masked)
        assert (unknown[0] >= unknown[1]).all()
        assert (unknown[1] >= unknown[2]).all()
        known = np.asarray(MASKABLE) & ~masked
        hidden_shares.append([(u & known).sum() / max(known.sum(), 1) for u in unknown])
        # Each pass is fed what the one before it predicts, from where the row begins.
        given = np.where(unknown[0], MASK, TOKENS)
        warm = []
        for inputs, blank in zip(later, unknown[1:], strict=True):
            logits = np.asarray(model.logits(states(jnp.asarray(given))), np.float64)
            shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
            weight = (-(shares * np.log(shares)).sum(axis=-1) / np.log(13))[..., None]
            mixed = (1 - weight) * table[MASK] + weight * (shares @ table)
            cold = np.where(blank[..., None], table[MASK], table[np.asarray(TOKENS)])
            mixed = np.where(blank[..., None], mixed, cold)
            far = lambda other, inputs=inputs: np.abs(inputs - other).max(axis=(1, 2))
            assert (np.minimum(far(mixed), far(cold)) < 1e-5).all()
            warm.append(far(mixed) < far(cold))
            given = jnp.asarray(inputs, jnp.float32)
        for row in range(3):
            if masked[row].any():
                depths.append(int(warm[0][row]) + int(warm[1][row]))
                assert warm[1][row] or not warm[0][row]
    counts = np.bincount(depths, minlength=3) / len(depths)
    np.testing.assert_allclose(counts, [0.25, 0.375, 0.375], atol=0.15)
    np.testing.assert_allclose(np.mean(hidden_shares, axis=0), [0.5, 0.25, 0.0], atol=0.1)


def test_the_vector_passes_a_gradient_to_the_embeddings_unless_stopped(models):
    model, reference = models
    training = MaskedDiffusion(sight="bidirectional", residual=ResidualContext())
    rows = {}
    for stop in (False, True):
        stopped = dataclasses.replace(training, stop_vector=stop)
        rows[stop] = loss_of(model, stopped, reference)[1]["embedding"]["embedding"][...]
    noised = mask_tokens(KEY, TOKENS, MASKABLE, MASK)
    unseen = np.setdiff1d(np.arange(13), np.asarray(noised.tokens))
    assert unseen.size, "the test needs a token that no input holds"
    assert not rows[True][unseen].any()
    assert (np.abs(rows[False][unseen]).max(axis=1) > 1e-6).all()


def test_refuses_a_reference_without_residual_and_the_reverse(models):
    model, reference = models
    with pytest.raises(ValueError, match=r"residual=None with own_passes=0 takes no reference"):
        diffusion_lm_loss(KEY, model, TOKENS, MASKABLE, MaskedDiffusion(), reference=reference)
    training = MaskedDiffusion(residual=ResidualContext())
    with pytest.raises(ValueError, match="with own_passes=0 needs a reference"):
        diffusion_lm_loss(KEY, model, TOKENS, MASKABLE, training)
    training = dataclasses.replace(training, own_passes=1)
    with pytest.raises(ValueError, match="with own_passes=1 takes no reference"):
        diffusion_lm_loss(KEY, model, TOKENS, MASKABLE, training, reference=reference)


def test_refuses_what_does_not_fit_the_model(models):
    model, reference = models
    training = MaskedDiffusion(residual=ResidualContext())
    other = DiffusionLM(dataclasses.replace(CONFIG, mask_id=3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"mask_id of the model, \(13, 12\), got \(13, 3\)"):
        diffusion_lm_loss(KEY, model, TOKENS, MASKABLE, training, reference=other)
    with pytest.raises(ValueError, match=r"shape \(3, 10\), got \(1, 10\)"):
        diffusion_lm_loss(KEY, model, TOKENS, MASKABLE[:1], training, reference=reference)
    narrow = DiffusionLM(dataclasses.replace(CONFIG, attention="int8"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="is exact, got a model with attention='int8'"):
        diffusion_lm_loss(KEY, narrow, TOKENS, MASKABLE, MaskedDiffusion())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sight": "causal"}, "sight must be one of block_causal, bidirectional, got 'causal'"),
        ({"learn_every_pass": True}, "learn_every_pass=True needs own_passes of at least 1, got 0"),
        ({"own_passes": 1}, "own_passes=1 decides whose predictions are fed back, got residual=No"),
        ({"own_passes": -1}, "own_passes must be an int of at least 0, got -1"),
        ({"stale_share": 2.0}, "stale_share must be from 0 to 1, got 2.0"),
        ({"cold_share": -0.1}, "cold_share must be from 0 to 1, got -0.1"),
        ({"average": "batch"}, "average must be one of row, token, got 'batch'"),
        ({"block_length": 0}, "block_length must be a positive int, got block_length=0"),
        ({"chunk": 1.5}, "chunk must be a positive int, got chunk=1.5"),
        (
            {"residual": ResidualContext(table="int8")},
            "training reads the exact table, got residual.table='int8'",
        ),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusion(**options)
