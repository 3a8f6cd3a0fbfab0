"""Draws and the rule of which are settled, against plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import TokenChoice, Unmasking
from tests.jaxgen.sampling.language_models import quota_of, settled_by_hand, softmax

VOCABULARY, MASK, ROWS = 12, 9, 20_000


def logits_of(rows=8, seed=0, scale=2.0):
    shape = (rows, VOCABULARY)
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@jax.jit
def _draw(choice, logits, seed):
    return choice.draw(logits, jax.random.key(seed), MASK)


def draw(choice, logits, seed=0):
    tokens, sure = _draw(choice, logits, seed)
    assert tokens.dtype == jnp.int32
    assert sure.dtype == jnp.float32
    return np.asarray(tokens), np.asarray(sure)


def without(logits, *tokens):
    logits = logits.copy()
    logits[:, list(tokens)] = -np.inf
    return logits


def test_greedy_takes_the_likeliest_token_and_says_how_likely_it_is():
    logits = logits_of(50)
    allowed = without(logits, MASK)
    for confidence in ("max", "raw", "sampled"):
        tokens, sure = draw(TokenChoice(confidence=confidence), logits)
        np.testing.assert_array_equal(tokens, allowed.argmax(axis=1))
        if confidence == "sampled":  # of the distribution that is drawn from
            np.testing.assert_allclose(sure, softmax(allowed).max(axis=1), rtol=1e-5)
        else:
            probabilities = softmax(logits)[range(50), tokens]
            np.testing.assert_allclose(sure, probabilities, rtol=1e-5)


@pytest.mark.parametrize("forbidden", [(), (3, 5)])
def test_how_sure_a_model_is_of_what_may_not_be_drawn_does_not_count(forbidden):
    """A model that is sure of the mask, or of a forbidden token, is not sure of its second best."""
    logits = logits_of(4, scale=0.1)
    logits[:2, MASK] = 9.0
    if forbidden:
        logits[2:, 5] = 9.0
    for confidence in ("max", "raw"):
        tokens, sure = draw(TokenChoice(confidence=confidence, forbidden=forbidden), logits)
        np.testing.assert_allclose(sure, softmax(logits)[range(4), tokens], rtol=1e-5)
    assert (sure[: 4 if forbidden else 2] < 0.01).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.7}])
def test_zero_is_a_temperature(options):
    """Also as a traced value, and no branch divides by it."""
    logits = logits_of()
    logits[0, 1:] = -np.inf
    wanted = without(logits, MASK).argmax(axis=1)
    choice = TokenChoice(jnp.float32(0), confidence="sampled", **options)
    with jax.debug_nans(True):
        tokens, sure = draw(choice, logits)
    np.testing.assert_array_equal(tokens, wanted)
    assert np.isfinite(sure).all()
    # Many rows of one program, as decoding draws them: both branches may be computed.
    many = jax.jit(jax.vmap(lambda choice, logits: _draw(choice, logits, 0), in_axes=(None, 0)))
    tokens, sure = many(choice, logits[None])
    np.testing.assert_array_equal(tokens[0], wanted)
    assert jnp.isfinite(sure).all()
    for temperature in (1e-4, 1e-7, 1e-30, 1e-37):
        cold = TokenChoice(jnp.float32(temperature), confidence="sampled", **options)
        tokens, sure = draw(cold, logits + np.float32(100))
        np.testing.assert_array_equal(tokens, wanted)
        np.testing.assert_allclose(sure, 1.0, rtol=1e-5)


def test_other_temperatures_do_not_compile_again():
    _draw.clear_cache()
    for temperature in (0.0, 0.6, 1.0):
        draw(TokenChoice(temperature, top_p=0.5 + temperature / 2), logits_of())
    assert _draw._cache_size() == 1


def restricted(logits, temperature, top_k, top_p):
    """The probabilities that are drawn from, token by token as one would write it down."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled[MASK] = -np.inf
    order = sorted(range(VOCABULARY), key=lambda token: -scaled[token])
    first = order if top_k is None else order[:top_k]
    kept = [t for t in order if scaled[t] >= scaled[first[-1]]]
    if top_p is not None:
        shares = softmax(scaled[first])
        total, last = 0.0, None
        for token, share in zip(first, shares, strict=True):
            if last is not None and total >= top_p:
                break
            total, last = total + share, token
        kept = [t for t in kept if scaled[t] >= scaled[last]]
    out = np.full(VOCABULARY, -np.inf)
    out[kept] = scaled[kept]
    return softmax(out)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "confidences"),
    [
        (None, None, ["sampled", "raw", "max"]),
        (1, None, ["sampled"]),
        (4, None, ["sampled", "raw"]),
        (None, 0.6, ["sampled"]),
        (4, 0.6, ["sampled", "max"]),
        (50, 1.0, ["sampled"]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(top_k, top_p, confidences, temperature):
    logits = logits_of(1, seed=4)[0]
    logits[MASK] = logits.max() + 1
    wanted = restricted(logits, temperature, top_k, top_p)
    if top_k or top_p:
        assert (wanted > 0).sum() <= min(top_k or 99, 11)
    for confidence in confidences:
        choice = TokenChoice(temperature, top_p, top_k, confidence=confidence)
        tokens, sure = draw(choice, np.tile(logits, (ROWS, 1)), seed=round(10 * temperature))
        frequencies = np.bincount(tokens, minlength=VOCABULARY) / ROWS
        assert (frequencies[wanted == 0] == 0).all()
        error = np.sqrt(wanted * (1 - wanted) / ROWS)
        assert (np.abs(frequencies - wanted) <= 4.5 * error + 1e-9).all()
        full = softmax(logits)
        allowed = np.delete(full, MASK).max()
        sures = {"sampled": wanted[tokens], "raw": full[tokens], "max": np.full(ROWS, allowed)}
        np.testing.assert_allclose(sure, sures[confidence], rtol=1e-4)


def test_equally_likely_tokens_stay_or_go_together():
    """A limit between two equal ones would depend on how a sort breaks ties."""
    logits = np.full((ROWS, VOCABULARY), -5.0, np.float32)
    logits[:, [2, 4, 6, 8]] = 1.0
    logits[:, 11] = 3.0
    top = np.exp(3.0) / (np.exp(3.0) + 4 * np.exp(1.0))
    for options in ({"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.8}):
        tokens, _ = draw(TokenChoice(1.0, **options), logits)
        assert set(tokens) == {2, 4, 6, 8, 11}
        assert np.mean(tokens == 11) == pytest.approx(top, abs=0.02)
    for options in ({"top_k": 1}, {"top_p": 0.1}):
        assert set(draw(TokenChoice(1.0, **options), logits)[0]) == {11}
    flat = np.zeros((ROWS, VOCABULARY), np.float32)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert set(draw(TokenChoice(1.0, **options), flat)[0]) == set(range(VOCABULARY)) - {MASK}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 11, "top_p": 0.99}])
def test_the_mask_and_forbidden_tokens_are_never_drawn(options, temperature):
    logits = logits_of(ROWS, scale=0.5)
    logits[:, [0, MASK]] += 8.0
    choice = TokenChoice(temperature, forbidden=(0, 4), **options)
    tokens, sure = draw(choice, logits)
    assert not np.isin(tokens, [0, 4, MASK]).any()
    assert ((sure >= 0) & (sure <= 1)).all()
    only = TokenChoice(temperature, forbidden=tuple(set(range(VOCABULARY)) - {7}), **options)
    assert (draw(only, logits)[0] == 7).all()
    hidden = np.full((ROWS, VOCABULARY), -np.inf, np.float32)
    hidden[:, [MASK, 3]] = 0.0
    assert (draw(TokenChoice(temperature, **options), hidden)[0] == 3).all()


@pytest.mark.parametrize("confidence", ["max", "raw", "sampled"])
def test_deferred_tokens_are_drawn_but_less_sure_than_any_other(confidence):
    logits = logits_of(200)
    plain = draw(TokenChoice(1.0, confidence=confidence), logits)
    tokens, sure = draw(TokenChoice(1.0, confidence=confidence, deferred=(2, 5)), logits)
    late = np.isin(tokens, [2, 5])
    assert 0 < late.sum() < 200
    np.testing.assert_array_equal(tokens, plain[0])
    np.testing.assert_array_equal(sure[~late], plain[1][~late])
    assert (sure[late] < 0).all()


def test_deferred_tokens_pass_no_threshold_but_cannot_stall():
    masked = np.array([True, True, True, False])
    for inclusive in (False, True):
        rule = Unmasking(0.0, inclusive=inclusive)
        sure = np.array([-1.0, 0.3, -1.0, 0.9], np.float32)
        assert settle(rule, sure, masked).tolist() == [False, True, False, False]
        sure = np.array([-1.0, -1.0, -1.0, 0.9], np.float32)
        assert settle(rule, sure, masked).tolist() == [True, False, False, False]


def test_draws_differ_between_keys_and_positions_and_repeat_with_the_same():
    logits = np.zeros((200, VOCABULARY), np.float32)
    first, again, other = (draw(TokenChoice(1.0), logits, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first == other) < 0.3
    assert len(set(first)) == VOCABULARY - 1


@jax.jit
def _settle(rule, sure, masked, step, total, seed):
    return rule.settle(sure, masked, step, total, jax.random.key(seed))


def settle(rule, sure, masked, step=0, total=None, seed=0):
    total = masked.sum() if total is None else total
    return np.asarray(_settle(rule, sure, masked, np.int32(step), np.int32(total), seed))


@pytest.mark.parametrize("steps", [None, 1, 3, 9])
@pytest.mark.parametrize(("threshold", "inclusive"), [(None, False), (0.5, False), (0.5, True)])
def test_rules_are_what_their_authors_describe(threshold, steps, inclusive):
    random = np.random.default_rng(7)
    rule = Unmasking(threshold, steps, inclusive=inclusive)
    for _ in range(60):
        masked = random.random(11) < random.random()
        # Coarse, so that there are ties and values that equal the threshold.
        sure = (random.integers(0, 9, 11) / 8).astype(np.float32)
        step, total = random.integers(0, steps or 11), masked.sum() + random.integers(0, 4)
        found = settle(rule, sure, masked, step, total)
        np.testing.assert_array_equal(found, settled_by_hand(rule, sure, masked, step, total))
        assert not (found & ~masked).any()
        assert found.any() == masked.any()


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("steps", [None, 1, 3, 5, 100])
def test_a_block_takes_its_steps_and_the_first_ones_settle_more(steps, order):
    random = np.random.default_rng(3)
    for count in (1, 2, 5, 8):
        masked = np.zeros(8, bool)
        masked[random.permutation(8)[:count]] = True
        total, numbers = count, []
        while masked.any():
            sure = random.random(8).astype(np.float32)
            rule = Unmasking(steps=steps, order=order)
            settled = settle(rule, sure, masked, len(numbers), total, seed=len(numbers))
            numbers.append(int(settled.sum()))
            masked &= ~settled
        wanted = min(steps or count, count)
        assert numbers == [quota_of(count, wanted, i) for i in range(wanted)]


def test_more_steps_than_the_schedule_has_go_on_one_by_one():
    masked, sure = np.ones(6, bool), np.linspace(0, 1, 6, dtype=np.float32)
    for step in (2, 3, 50):
        assert settle(Unmasking(steps=6), sure, masked, step, total=6).sum() == 1


def test_fewer_masks_than_the_quota_settle_those_and_nothing_else():
    """The public script of SDAR overwrites known positions here."""
    masked = np.array([False, True, False, False, True, False])
    sure = np.array([0.9, 0.1, 0.9, 0.9, 0.2, 0.9], np.float32)
    for rule in (Unmasking(steps=1), Unmasking(0.95, 1), Unmasking(0.05, 1, inclusive=True)):
        np.testing.assert_array_equal(settle(rule, sure, masked, total=6), masked)
        assert not settle(rule, sure, np.zeros(6, bool), total=6).any()


def test_ties_settle_no_more_than_the_quota():
    sure = np.full(6, 0.5, np.float32)
    masked = np.array([False, True, True, True, False, True])
    assert settle(Unmasking(), sure, masked).tolist() == [False, True] + [False] * 4
    assert settle(Unmasking(0.5), sure, masked).sum() == 1
    np.testing.assert_array_equal(settle(Unmasking(0.5, inclusive=True), sure, masked), masked)


def test_a_sure_known_position_takes_nobody_s_place():
    sure = np.array([1.0, 0.2, 1.0, 0.1], np.float32)
    masked = np.array([False, True, False, True])
    assert settle(Unmasking(), sure, masked).tolist() == [False, True, False, False]
    assert settle(Unmasking(0.9), sure, masked).tolist() == [False, True, False, False]


def test_a_random_order_takes_every_masked_position_equally_often():
    masked = np.array([True, False, True, True, False, True])
    sure = np.linspace(1, 0, 6, dtype=np.float32)
    rule, zero, four = Unmasking(steps=2, order="random"), np.int32(0), np.int32(4)
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.jit(jax.vmap(lambda key: rule.settle(sure, masked, zero, four, key)))(keys)
    found = np.asarray(found)
    assert (found.sum(axis=1) == 2).all()
    assert not found[:, ~masked].any()
    np.testing.assert_allclose(found[:, masked].mean(axis=0), 0.5, atol=0.04)
    # The threshold goes by confidence still.
    both = Unmasking(0.95, order="random")
    found = jax.jit(jax.vmap(lambda key: both.settle(sure, masked, zero, four, key)))(keys)
    found = np.asarray(found)
    assert found[:, 0].all()
    assert set(found.sum(axis=1)) == {1, 2}


def test_a_sequential_order_takes_the_first_masked_positions_and_deferred_ones_last():
    masked = np.array([False, True, True, False, True, True])
    sure = np.array([0.9, 0.1, -1.0, 0.9, 0.3, 0.97], np.float32)
    rule, total = Unmasking(steps=2, order="sequential"), np.int32(4)
    found = rule.settle(sure, masked, np.int32(0), total, jax.random.key(0))
    assert np.flatnonzero(found).tolist() == [1, 4]
    both = Unmasking(0.95, steps=4, order="sequential")
    found = both.settle(sure, masked, np.int32(0), total, jax.random.key(0))
    assert np.flatnonzero(found).tolist() == [1, 5]


def test_what_is_no_number_is_settled_last_and_neither_mask_nor_forbidden_is_drawn():
    confidence = np.array([0.5, np.nan, np.nan, 0.2], np.float32)
    for masked, wanted in [([1, 1, 1, 1], 0), ([0, 1, 1, 1], 3), ([0, 1, 1, 0], 1)]:
        found = settle(Unmasking(), confidence, np.array(masked, bool))
        assert np.flatnonzero(found).tolist() == [wanted]
    logits = logits_of(4)
    logits[0] = np.nan
    logits[1, :5] = np.nan
    logits[2] = np.inf
    logits[3] = -np.inf
    for choice in (TokenChoice(), TokenChoice(1.0, top_p=0.5, top_k=3), TokenChoice(1e-30)):
        tokens, sure = draw(dataclasses.replace(choice, forbidden=(0,)), logits)
        assert not np.isin(tokens, [0, MASK]).any()
        assert np.isfinite(sure).all()


def test_another_threshold_does_not_compile_again():
    _settle.clear_cache()
    counts = [
        settle(Unmasking(value), np.linspace(0, 1, 8, dtype=np.float32), np.ones(8, bool)).sum()
        for value in (0.1, 0.5, 0.9)
    ]
    assert _settle._cache_size() == 1
    assert counts == [7, 4, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenChoice(-0.1), "temperature must be 0 or more and finite, got -0.1"),
        (lambda: TokenChoice(float("inf")), "temperature must be 0 or more and finite, got inf"),
        (lambda: TokenChoice(float("nan")), "temperature must be 0 or more and finite, got nan"),
        (lambda: TokenChoice(np.float32(-1)), "temperature must be 0 or more and finite, got -1.0"),
        (lambda: TokenChoice(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (lambda: TokenChoice(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
        (lambda: TokenChoice(top_k=0), "top_k must be a positive int, got top_k=0"),
        (lambda: TokenChoice(top_k=2.0), "top_k must be a positive int, got top_k=2.0"),
        (
            lambda: TokenChoice(confidence="min"),
            "confidence must be one of max, sampled, raw, got 'min'",
        ),
        (lambda: Unmasking(1.1), "threshold must be from 0 to 1 or None, got 1.1"),
        (lambda: Unmasking(-0.1), "threshold must be from 0 to 1 or None, got -0.1"),
        (lambda: Unmasking(steps=0), "steps must be a positive int, got steps=0"),
        (lambda: Unmasking(steps=1.5), "steps must be a positive int, got steps=1.5"),
        (
            lambda: Unmasking(order="left"),
            "order must be one of confidence, random, sequential, got 'left'",
        ),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
