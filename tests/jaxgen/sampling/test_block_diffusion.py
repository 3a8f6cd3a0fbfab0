"""Decoding, against plain loops that keep nothing between passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.sampling import (
    BlockDiffusion,
    ResidualContext,
    TokenChoice,
    Unmasking,
    answers_of,
    block_diffusion,
    block_passes,
    decode,
    decode_steps,
    left_aligned,
)
from tests.jaxgen.sampling.language_models import (
    MASK,
    VOCABULARY,
    decode_by_hand,
    entropy,
    plain,
    softmax,
    tiny_model,
)

PAD, STOPS, NEW, WIDE = 3, (5, 9), 10, 9
LENGTHS = np.array([1, 3, 4, 5, 8, 9])
ROWS = len(LENGTHS)
SDAR = tiny_model()
LLADA = tiny_model(1, num_kv_heads=2, qk_norm=False)
SMALLER = tiny_model(2, num_layers=1, width=8, num_heads=1)


def prompts_of(seed, rows=ROWS, wide=WIDE):
    """Random ids, among them the mask, the stop tokens and the padding."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, wide)).astype(np.int32)


def model_of(decoder):
    return SDAR if decoder.sight == "block_causal" else LLADA


def reference_of(decoder):
    wants = decoder.residual is not None and decoder.residual.init == "reference"
    return SMALLER if wants else None


def run(decoder, prompts=None, lengths=LENGTHS, new_tokens=NEW, **options):
    prompts = prompts_of(0) if prompts is None else prompts
    return decode(
        model_of(decoder), jnp.asarray(prompts), decoder, new_tokens=new_tokens,
        lengths=jnp.asarray(lengths), reference=reference_of(decoder), **options,
    )  # fmt: skip


def causal(block=4, residual=None, **options):
    return BlockDiffusion(block, residual=residual, stop_ids=STOPS, pad_id=PAD, **options)


def bidirectional(block=4, residual=None, **options):
    return causal(block, residual, sight="bidirectional", **options)


def test_the_models_of_these_tests_are_sure_here_and_unsure_there():
    for model in (SDAR, LLADA):
        tokens = prompts_of(5, 60, 12)
        tokens[:, 6:] = MASK
        logits = np.stack([plain(model)(row, np.ones((12, 12), bool))[0] for row in tokens])
        sure = softmax(logits)[:, 6:].max(axis=-1)
        assert (np.quantile(sure, [0.1, 0.9]) < [0.5, 1.0]).all()
        assert (np.quantile(sure, [0.1, 0.9]) > [0.1, 0.7]).all()
        weight = entropy(softmax(logits)) / np.log(VOCABULARY)
        assert weight.std() > 0.1
        assert len(np.unique(logits.argmax(axis=-1))) > 10
        found = nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(tokens))
        np.testing.assert_allclose(found, logits, atol=2e-4)


CASES = {
    "causal, quota": causal(unmasking=Unmasking(steps=3)),
    "causal, threshold": causal(unmasking=Unmasking(0.5)),
    "causal, residual": causal(residual=ResidualContext(), unmasking=Unmasking(0.5)),
    "causal, own first step": causal(
        3, ResidualContext(init="self"), unmasking=Unmasking(0.5, steps=2)
    ),
    "causal, reference": causal(residual=ResidualContext(init="reference")),
    "causal, one long block": causal(
        16, ResidualContext(), unmasking=Unmasking(0.5, steps=4)
    ),
    "causal, blocks of one": causal(1, ResidualContext()),
    "causal, restarts": causal(5, ResidualContext(restart=2), unmasking=Unmasking(0.5, steps=5)),
    "causal, own restarts": causal(
        5, ResidualContext(init="self", restart=3), unmasking=Unmasking(0.5, steps=5)
    ),
    "reference restarts": bidirectional(
        16, ResidualContext(init="reference", restart=2), unmasking=Unmasking(0.5)
    ),
    "prefix, own restarts": bidirectional(
        5, ResidualContext(init="self", restart=2), cache="prefix", unmasking=Unmasking(0.5)
    ),
    "dual, restarts": bidirectional(
        5, ResidualContext(restart=2), cache="dual", unmasking=Unmasking(0.5)
    ),
    "quota": bidirectional(unmasking=Unmasking(steps=3)),
    "residual": bidirectional(
        residual=ResidualContext(), unmasking=Unmasking(0.5, inclusive=True)
    ),
    "reference": bidirectional(
        16, ResidualContext(init="reference"), unmasking=Unmasking(0.5)
    ),
    "prefix": bidirectional(
        3, ResidualContext(), cache="prefix", unmasking=Unmasking(0.5)
    ),
    "dual": bidirectional(
        4, ResidualContext(init="self"), cache="dual", unmasking=Unmasking(0.5, inclusive=True)
    ),
    "dual, plain": bidirectional(3, cache="dual"),
    "guided, reference restarts": bidirectional(
        16, ResidualContext(init="reference", restart=2), cfg_scale=0.8, unmasking=Unmasking(0.5)
    ),
    "guided, dual, restarts": bidirectional(
        5, ResidualContext(restart=2), cfg_scale=2.0, cache="dual", unmasking=Unmasking(0.5)
    ),
    "guided": bidirectional(cfg_scale=1.5, unmasking=Unmasking(0.5)),
    "guided, reference": bidirectional(
        16, ResidualContext(init="reference"), cfg_scale=0.8, unmasking=Unmasking(0.5)
    ),
    "guided, prefix": bidirectional(
        3, ResidualContext(init="self"), cfg_scale=-0.4, cache="prefix", unmasking=Unmasking(0.5)
    ),
    "guided, dual": bidirectional(
        3, ResidualContext(), cfg_scale=2.0, cache="dual", unmasking=Unmasking(0.5, steps=2)
    ),
}  # fmt: skip


def with_numbers(decoder, threshold, temperature):
    """The same program with other numbers."""
    unmasking, residual = decoder.unmasking, decoder.residual
    if unmasking.threshold is not None:
        unmasking = dataclasses.replace(unmasking, threshold=threshold)
    if residual is not None:
        residual = dataclasses.replace(residual, temperature=temperature)
    return dataclasses.replace(decoder, unmasking=unmasking, residual=residual)


def passes_by_hand(decoder, answers):
    """Passes of a batch whose rows were decoded alone."""
    steps = [answer.steps for answer in answers]
    if decoder.cache != "none":  # rows begin their blocks together
        blocks = range(max(map(len, steps)))
        steps = [[max(row[i] for row in steps if i < len(row)) for i in blocks]]
    storing = decoder.sight == "block_causal"  # one pass for every block but the last
    starts = [np.cumsum([0, *row[:-1]]) + storing * np.arange(len(row)) for row in steps]
    ends = [start[-1] + row[-1] for start, row in zip(starts, steps, strict=True)]
    context, before = decoder.residual, []
    if context is not None and context.init in ("self", "reference"):
        for row, begins in zip(steps, starts, strict=True):
            for count, begin in zip(row, begins, strict=True):
                before += range(begin, begin + count, context.restart or count)
    return max(ends) + len(set(before))


def compare(decoder, prompts, lengths=LENGTHS):
    reference = reference_of(decoder)
    found = run(decoder, prompts, lengths)
    answers = [
        decode_by_hand(model_of(decoder), prompt[:length], decoder, NEW, reference)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    assert found.tokens.tolist() == [answer.tokens for answer in answers]
    assert found.steps.tolist() == [sum(answer.steps) for answer in answers]
    assert found.lengths.tolist() == [answer.length for answer in answers]
    assert not (found.tokens == MASK).any()
    assert int(found.passes) == passes_by_hand(decoder, answers)
    for answer in answers:
        assert len(answer.steps) <= decoder.blocks(NEW)
        assert max(answer.steps) <= decoder.block_length
    return found


@pytest.mark.parametrize("name", CASES)
def test_decoding_is_what_one_would_write_down(name):
    steps = set()
    for seed, threshold, temperature in ((1, 0.35, 1.0), (2, 0.7, 0.8), (4, 0.95, 1.7)):
        decoder = with_numbers(CASES[name], threshold, temperature)
        found = compare(decoder, prompts_of(seed))
        steps.add(tuple(found.steps.tolist()))
    assert len(steps) > 1 or decoder.unmasking.threshold is None


@pytest.mark.parametrize(
    "name",
    [name for name, case in CASES.items() if case.unmasking.threshold or name.endswith("one")],
)
def test_a_prompt_may_be_empty(name):
    """All masks look alike then, up to rounding: every block is settled at once."""
    found = compare(
        with_numbers(CASES[name], 0.0, 1.3), prompts_of(4), np.where(LENGTHS > 4, LENGTHS, 0)
    )
    assert (np.asarray(found.steps) <= CASES[name].blocks(NEW)).all()


def test_an_answer_ends_at_its_stop_token_and_not_at_one_of_the_prompt():
    prompts = np.full((ROWS, WIDE), STOPS[0], np.int32)
    prompts[:, ::2] = STOPS[1]
    prompts[:, 3] = prompts_of(0)[:, 3]
    for name in ("causal, residual", "prefix"):
        decoder = CASES[name]
        compare(decoder, prompts)
        found = run(decoder, prompts_of(2))
        tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
        stopped = np.isin(tokens, STOPS).any(axis=1)
        assert 0 < stopped.sum() < ROWS
        assert (lengths[~stopped] == NEW).all()
        for row, length in zip(tokens[stopped], lengths[stopped], strict=True):
            assert row[length - 1] in STOPS
            assert not np.isin(row[: length - 1], STOPS).any()
            assert (row[length:] == PAD).all()


def test_masks_in_a_prompt_are_left_alone():
    """A user's text may name the token, and neither gets a prediction nor a residual."""
    prompts = prompts_of(7)
    # Not in the prompt of one token: all positions would be alike, and rounding would choose.
    prompts[1:, [0, 2, 7, 8]] = MASK
    for name in ("causal, residual", "residual", "dual"):
        found = compare(CASES[name], prompts)
        assert (found.steps > 0).all()
    *_, last = steps_of(CASES["causal, residual"], prompts)
    for row, prompt, length in zip(last.tokens, prompts, LENGTHS, strict=True):
        np.testing.assert_array_equal(row[:length], prompt[:length])


def steps_of(decoder, prompts, **options):
    return decode_steps(
        model_of(decoder), jnp.asarray(prompts), decoder, new_tokens=NEW,
        lengths=jnp.asarray(LENGTHS), reference=reference_of(decoder), **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["causal, residual", "dual"])
def test_tokens_that_were_settled_stay_and_the_last_state_is_the_answer(name):
    decoder, prompts = CASES[name], prompts_of(6)
    states = list(steps_of(decoder, prompts))
    known = np.arange(states[0].tokens.shape[1]) < LENGTHS[:, None]
    before = np.where(known, np.pad(prompts, ((0, 0), (0, known.shape[1] - WIDE))), MASK)
    counts = np.zeros(ROWS, int)
    for number, state in enumerate(states):
        tokens = np.asarray(state.tokens)
        np.testing.assert_array_equal(tokens[known], before[known])
        fresh = ~known & (tokens != MASK)
        if number:
            counts += (fresh & (tokens != before)).any(axis=1)
            np.testing.assert_array_equal(state.steps, counts)
        before, known = tokens, known | fresh
        answers = answers_of(state, decoder, jnp.asarray(LENGTHS), NEW)
        waiting = ~np.asarray(state.done)
        assert (np.asarray(answers.tokens) == MASK)[waiting].any(axis=1).all()
    wanted = run(decoder, prompts)
    jax.tree.map(np.testing.assert_array_equal, answers, wanted)
    jax.tree.map(np.testing.assert_array_equal, run(decoder, prompts), wanted)
    if name == "causal, residual":
        assert int(state.passes) == len(states) - 1


def test_kept_keys_and_values_are_those_of_a_plain_pass_over_the_clean_text():
    """Of the prompts from the first state on; of a block after one more pass without masks."""
    decoder, twin = CASES["causal, residual"], plain(SDAR)
    checked = set()
    for state in steps_of(decoder, prompts_of(6)):
        starts, tokens = np.asarray(state.start), np.asarray(state.tokens)
        key = tuple(starts)
        if key in checked:
            continue
        checked.add(key)
        for row, start in enumerate(starts):
            if start == 0:
                continue
            numbers = np.arange(start) // decoder.block_length
            _, wanted = twin(tokens[row, :start], numbers[:, None] >= numbers)
            for kept, layer in zip(state.cache, wanted, strict=True):
                np.testing.assert_allclose(kept.key[row, :start], layer[0], atol=5e-5)
                np.testing.assert_allclose(kept.value[row, :start], layer[1], atol=5e-5)
    assert len(checked) > 3
    assert (starts > LENGTHS).any()


def test_blocks_against_a_cache_are_what_training_sees():
    """Text with masks beside the clean text, positions repeated, under three rules."""
    block, count, causal_decoder = 4, 8, CASES["causal, residual"]
    clean = prompts_of(8)[:, :count]
    noisy = np.where(np.random.default_rng(0).random(clean.shape) < 0.5, MASK, clean)
    numbers, seen = np.arange(count) // block, np.zeros((2 * count, 2 * count), bool)
    for query in range(2 * count):
        for key in range(2 * count):
            halves = ("noisy" if query < count else "clean", "noisy" if key < count else "clean")
            q, k = numbers[query % count], numbers[key % count]
            seen[query, key] = (
                (halves[0] == halves[1] and q == k)
                or (halves == ("noisy", "clean") and q > k)
                or (halves == ("clean", "clean") and q >= k)
            )
    positions = np.tile(np.arange(count), 2)
    both = np.concatenate([noisy, clean], axis=1)
    trained = np.stack([plain(SDAR)(row, seen, positions)[0][:count] for row in both])
    found = nnx.jit(lambda model, *inputs: model(*inputs))(
        SDAR, jnp.asarray(both), jnp.asarray(positions)[None], jnp.asarray(seen)[None]
    )
    np.testing.assert_allclose(found[:, :count], trained, atol=2e-4)

    @nnx.jit
    def against(model, ids, rows, cache):
        mask = (jnp.arange(cache[0].key.shape[1]) <= rows[0, -1])[None, None]
        return model.logits(model.cached(ids, rows, cache, mask)[0])

    prompts = np.pad(clean, ((0, 0), (0, 1)))
    first = next(
        decode_steps(
            SDAR, jnp.asarray(prompts), causal_decoder, new_tokens=NEW,
            lengths=jnp.full(len(prompts), count),
        )
    )  # fmt: skip
    for start in range(0, count, block):
        rows = jnp.tile(jnp.arange(start, start + block, dtype=jnp.int32), (len(prompts), 1))
        ids = jnp.asarray(noisy[:, start : start + block])
        decoded = against(SDAR, ids, rows, first.cache)
        np.testing.assert_allclose(decoded, trained[:, start : start + block], atol=2e-4)


def test_a_cold_start_is_a_plain_step_bit_for_bit():
    residual, without = CASES["causal, residual"], CASES["causal, threshold"]
    states = [list(steps_of(decoder, prompts_of(6))) for decoder in (residual, without)]
    with_it, plainly = states[0][1], states[1][1]
    np.testing.assert_array_equal(with_it.tokens, plainly.tokens)
    jax.tree.map(np.testing.assert_array_equal, with_it.cache, plainly.cache)
    assert (np.asarray(states[0][2].cache[1].key) != states[1][2].cache[1].key).any()


def test_a_narrow_table_feeds_back_nearly_the_same():
    found = {}
    for table in ("exact", "int8"):
        decoder = causal(residual=ResidualContext(table=table))
        _, after_one, *_ = steps_of(decoder, prompts_of(3))
        found[table] = after_one.residual
    np.testing.assert_array_equal(found["int8"].weight, found["exact"].weight)
    vector = np.asarray(found["exact"].vector)
    error = np.linalg.norm(found["int8"].vector - vector) / np.linalg.norm(vector)
    assert 1e-5 < error < 0.02


def test_a_restart_at_every_step_is_no_residual():
    """And one after more steps than a block has is none."""
    without, prompts = CASES["causal, threshold"], prompts_of(6)
    found = {
        restart: run(
            dataclasses.replace(without, residual=ResidualContext(restart=restart)), prompts
        )
        for restart in (0, 1, 5)
    }
    plainly = run(without, prompts)
    jax.tree.map(np.testing.assert_array_equal, found[1], plainly)
    jax.tree.map(np.testing.assert_array_equal, found[5], found[0])
    assert (found[0].tokens != plainly.tokens).any()


def test_no_weight_is_no_residual():
    nothing = ResidualContext(weighting="fixed", fixed_weight=0.0)
    decoder = dataclasses.replace(CASES["causal, threshold"], residual=nothing)
    some = dataclasses.replace(decoder, residual=dataclasses.replace(nothing, fixed_weight=0.5))
    for seed in range(3):
        wanted = run(CASES["causal, threshold"], prompts_of(seed))
        found = run(decoder, prompts_of(seed))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert (run(some, prompts_of(seed)).tokens != wanted.tokens).any()


SAMPLED = {
    "causal": causal(
        residual=ResidualContext(init="dirichlet"),
        choice=TokenChoice(0.8, 0.9, confidence="sampled"),
        unmasking=Unmasking(0.6),
    ),
    "dual": bidirectional(
        residual=ResidualContext(init="dirichlet"),
        cache="dual",
        choice=TokenChoice(0.8, confidence="raw"),
        unmasking=Unmasking(0.6, steps=3, order="random"),
    ),
}
SEEDS = np.array([11, 3, 3, 700, 0, 2**31])


@pytest.mark.parametrize("name", SAMPLED)
def test_a_batch_is_so_many_runs_of_one(name):
    decoder, prompts = SAMPLED[name], prompts_of(9)
    found = run(decoder, prompts, seeds=SEEDS)
    order = np.array([4, 2, 0, 5, 1, 3])
    moved = run(decoder, prompts[order], LENGTHS[order], seeds=SEEDS[order])
    for field in ("tokens", "lengths", "steps"):
        wanted = np.asarray(getattr(found, field))
        np.testing.assert_array_equal(getattr(moved, field), wanted[order])
        for i in (0, 3, 5) if name == "causal" else ():
            alone = run(decoder, prompts[i : i + 1], LENGTHS[i : i + 1], seeds=SEEDS[i : i + 1])
            np.testing.assert_array_equal(getattr(alone, field)[0], wanted[i])
    assert (found.steps > 0).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_seeds_say_what_is_drawn(name):
    prompts, lengths = np.tile(prompts_of(9)[:1], (ROWS, 1)), np.full(ROWS, 6)
    found = run(SAMPLED[name], prompts, lengths, seeds=SEEDS)
    tokens = np.asarray(found.tokens)
    np.testing.assert_array_equal(tokens[1], tokens[2])
    assert len({tuple(row) for row in tokens}) > 3
    jax.tree.map(
        np.testing.assert_array_equal, run(SAMPLED[name], prompts, lengths, seeds=SEEDS), found
    )
    counted = run(SAMPLED[name], prompts, lengths, seeds=3)
    listed = run(SAMPLED[name], prompts, lengths, seeds=3 + np.arange(ROWS))
    jax.tree.map(np.testing.assert_array_equal, counted, listed)
    np.testing.assert_array_equal(counted.tokens[0], tokens[1])


def test_every_block_row_and_position_gets_a_draw_of_its_own():
    """With a model that knows nothing, so that only the random numbers differ."""
    graph, state = nnx.split(SDAR)
    head = state["head"]["kernel"]
    state["head"]["kernel"] = head.replace(jnp.zeros_like(head[...]))
    flat, decoder = nnx.merge(graph, state), SAMPLED["causal"]
    decoder = dataclasses.replace(decoder, choice=dataclasses.replace(decoder.choice, top_p=1.0))
    tokens = []
    for seed in range(0, 40 * ROWS, ROWS):
        found = decode(
            flat, jnp.asarray(prompts_of(0)), decoder, new_tokens=NEW,
            lengths=jnp.full(ROWS, 4), seeds=seed,
        )  # fmt: skip
        inside = np.arange(NEW) < np.asarray(found.lengths)[:, None]
        tokens.append(np.where(inside, found.tokens, -1))
    tokens = np.concatenate(tokens)
    places = [(0, 4), (0, 1), (4, 8), (3, 7)]  # of the next block, the next position
    pairs = [(tokens[:, i], tokens[:, j]) for i, j in places] + [(tokens[:-1, 0], tokens[1:, 0])]
    for first, second in pairs:
        both = (first >= 0) & (second >= 0)
        assert both.sum() > 80
        assert np.mean(first[both] == second[both]) < 0.16  # one in 19 if they are independent
    # One in 19 at any place, stop tokens that end the answer among them.
    drawn = tokens[:, 0]
    share = np.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    assert share[MASK] == 0
    assert np.abs(np.delete(share, MASK) - 1 / 19).max() < 0.06


def test_an_even_random_prediction_is_a_first_step_from_the_average_embedding():
    """A large concentration leaves nothing to chance."""
    base = SAMPLED["causal"]
    residual = dataclasses.replace(base.residual, concentration=1e7)
    choice = dataclasses.replace(base.choice, temperature=0.0)
    decoder = dataclasses.replace(base, residual=residual, choice=choice)
    prompts, mean = prompts_of(2), plain(SDAR).table.mean(axis=0)
    # Greedy, "sampled" leaves the mask out of the probabilities; the mask is made unlikely.
    found = run(decoder, prompts, seeds=SEEDS)
    for i, length in enumerate(LENGTHS):
        wanted = decode_by_hand(SDAR, prompts[i, :length], decoder, NEW, first_residual=(1.0, mean))
        assert found.tokens[i].tolist() == wanted.tokens
        assert int(found.steps[i]) == sum(wanted.steps)


GUIDED = {
    "none": bidirectional(unmasking=Unmasking(steps=3)),
    "residual": bidirectional(residual=ResidualContext(init="self"), unmasking=Unmasking(0.5)),
    "reference": bidirectional(residual=ResidualContext(init="reference")),
    "prefix": bidirectional(3, ResidualContext(), cache="prefix", unmasking=Unmasking(0.5)),
    "dual": SAMPLED["dual"],
}


def guided(decoder, scale, **parts):
    return dataclasses.replace(decoder, cfg_scale=scale, **parts)


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_by_nothing_is_plain_decoding(name):
    for seed in range(3):
        wanted = run(GUIDED[name], prompts_of(seed), seeds=SEEDS)
        found = run(guided(GUIDED[name], 0.0), prompts_of(seed), seeds=SEEDS)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        some = run(guided(GUIDED[name], 3.0), prompts_of(seed), seeds=SEEDS)
        assert (some.tokens != wanted.tokens).any()


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_all_the_way_back_does_not_read_the_prompt(name):
    """That it is the prompt that counts more, not what is left without it.

    A first prediction from masks alone is the same everywhere, so that the order is a random one.
    """
    decoder = dataclasses.replace(GUIDED[name], unmasking=Unmasking(steps=3, order="random"))
    wanted = run(decoder, np.full((ROWS, WIDE), MASK), seeds=SEEDS)
    for seed in range(2):
        back = run(guided(decoder, -1.0), prompts_of(seed), seeds=SEEDS)
        jax.tree.map(np.testing.assert_array_equal, back, wanted)
        asked = run(guided(decoder, 0.0), prompts_of(seed), seeds=SEEDS)
        assert (asked.tokens != wanted.tokens).any(axis=1).sum() > ROWS // 2


@pytest.mark.parametrize("name", ["none", "residual"])
def test_guided_rows_do_not_know_of_each_other_or_of_padding(name):
    choice = TokenChoice(0.8, confidence="raw")
    decoder, prompts = guided(GUIDED[name], 1.3, choice=choice), prompts_of(9)
    found = run(decoder, prompts, seeds=SEEDS)
    padded = np.where(np.arange(WIDE + 5) < LENGTHS[:, None], np.pad(prompts, ((0, 0), (0, 5))), 11)
    jax.tree.map(np.testing.assert_array_equal, run(decoder, padded, seeds=SEEDS), found)
    for i in (0, 3, 5):
        alone = run(decoder, prompts[i : i + 1], LENGTHS[i : i + 1], seeds=SEEDS[i : i + 1])
        for field in ("tokens", "lengths", "steps"):
            np.testing.assert_array_equal(getattr(alone, field)[0], getattr(found, field)[i])


def test_only_guidance_computes_every_row_twice():
    rows, flops = [], []
    for scale in (None, 1.0, 2.0):
        decoder = guided(GUIDED["dual"], scale)
        setting, state = block_diffusion._start(
            LLADA, jnp.asarray(prompts_of(0)), decoder, NEW, jnp.asarray(LENGTHS), 0, None
        )
        lowered = block_diffusion._one_pass.lower(setting, state)
        rows.append(len(state.cache[0].key))
        flops.append(lowered.cost_analysis()["flops"])
    assert rows == [ROWS, 2 * ROWS, 2 * ROWS]
    assert 1.5 < flops[1] / flops[0] <= 2.0
    assert flops[2] == flops[1]
    run(guided(GUIDED["dual"], 1.0))
    count = programs()
    run(guided(GUIDED["dual"], 2.0))
    assert programs() == count


def programs():
    jitted = (block_diffusion._run, block_diffusion._first_state, block_diffusion._one_pass)
    return [program._cache_size() for program in jitted]


def test_nothing_is_compiled_for_other_prompts_seeds_and_numbers():
    decoder, passes = SAMPLED["causal"], set()
    run(decoder, prompts_of(0), seeds=SEEDS)
    count = programs()
    for number in (0.2, 0.9):
        choice = dataclasses.replace(decoder.choice, temperature=number, top_p=number)
        residual = dataclasses.replace(decoder.residual, temperature=number, concentration=number)
        other = dataclasses.replace(
            decoder, choice=choice, residual=residual, unmasking=Unmasking(number)
        )
        found = run(other, prompts_of(1), LENGTHS[::-1].copy(), seeds=round(10 * number))
        passes.add(int(found.passes))
    assert programs() == count
    assert len(passes) == 2
    # Nor for numbers of another type.
    for number in (1, np.float64(1), jnp.float32(1)):
        choice = dataclasses.replace(decoder.choice, temperature=number, top_p=number)
        other = dataclasses.replace(decoder, choice=choice, unmasking=Unmasking(number))
        run(other, prompts_of(1), seeds=np.int64(7))
    assert programs() == count
    run(dataclasses.replace(decoder, pad_id=4), prompts_of(0), seeds=SEEDS)
    assert programs() != count


def test_prompts_are_stored_some_blocks_at_a_time(monkeypatch):
    """A last portion may reach beyond the prompts, and even beyond all slots."""
    monkeypatch.setattr(block_passes, "_PREFILL", 9)
    decoder, prompts = causal(2, unmasking=Unmasking(0.5)), prompts_of(3, wide=11)
    lengths = np.array([11, 10, 7, 4, 2, 1])
    state = next(
        decode_steps(
            SDAR, jnp.asarray(prompts), decoder, new_tokens=1, lengths=jnp.asarray(lengths)
        )
    )
    assert state.tokens.shape[1] == 13  # of two portions, 16 are computed
    found = run(decoder, prompts, lengths, 1)
    for i, length in enumerate(lengths):
        wanted = decode_by_hand(SDAR, prompts[i, :length], decoder, 1)
        assert found.tokens[i].tolist() == wanted.tokens


def test_models_in_half_precision_with_int8_attention():
    model = tiny_model(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, attention="int8")
    decoder, prompts = CASES["causal, residual"], jnp.asarray(prompts_of(1))
    found = decode(model, prompts, decoder, new_tokens=NEW, lengths=jnp.asarray(LENGTHS))
    assert not (found.tokens == MASK).any()
    assert (found.steps >= 3).all()
    assert len(np.unique(found.tokens)) > 5


def test_decoding_can_be_part_of_a_larger_program():
    decoder = CASES["causal, threshold"]

    @jax.jit
    def program(prompts, lengths):
        return decode(SDAR, prompts, decoder, new_tokens=NEW, lengths=lengths)

    found = program(jnp.asarray(prompts_of(1)), jnp.asarray(LENGTHS))
    jax.tree.map(np.testing.assert_array_equal, found, run(decoder, prompts_of(1)))


def test_prompts_without_any_tokens():
    decoder = CASES["causal, blocks of one"]
    none = jnp.zeros((ROWS, 0), jnp.int32)
    found = decode(SDAR, none, decoder, new_tokens=NEW)
    wanted = decode_by_hand(SDAR, [], decoder, NEW)
    assert found.tokens.tolist() == [wanted.tokens] * ROWS


def test_padding_is_moved_to_the_end_of_prompts():
    tokens = np.arange(1, 13, dtype=np.int32).reshape(3, 4)
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    for kind in (bool, np.int32):
        moved, lengths = left_aligned(jnp.asarray(tokens), jnp.asarray(mask.astype(kind)))
        assert moved.dtype == lengths.dtype == jnp.int32
        assert lengths.tolist() == [2, 4, 0]
        assert moved[0, :2].tolist() == [3, 4]
        assert moved[1].tolist() == [5, 6, 7, 8]
    # Padding on the left, on the right and in between is one and the same prompt.
    prompts = prompts_of(4)
    padded, mask = np.zeros_like(prompts), np.zeros(prompts.shape, bool)
    for row, length in enumerate(LENGTHS):
        place = {0: np.arange(length), 1: np.arange(WIDE - length, WIDE)}.get(row % 3)
        if place is None:
            place = np.sort(np.random.default_rng(row).permutation(WIDE)[:length])
        padded[row, place], mask[row, place] = prompts[row, :length], True
    moved, lengths = left_aligned(jnp.asarray(padded), jnp.asarray(mask))
    np.testing.assert_array_equal(lengths, LENGTHS)
    decoder = CASES["causal, residual"]
    jax.tree.map(np.testing.assert_array_equal, run(decoder, moved, lengths), run(decoder, prompts))


@pytest.mark.parametrize("block", [1, 3, 4, 7, 16])
def test_blocks_and_windows_are_enough_and_no_more(block):
    for new in range(1, 20):
        touched = {(start + new - 1) // block - start // block + 1 for start in range(3 * block)}
        assert causal(block).blocks(new) == max(touched)
        decoder = bidirectional(block, cache="prefix")
        blocks = decoder.blocks(new)
        assert (blocks - 1) * block < new <= blocks * block
        windows = decoder.windows(new)
        assert list(windows) == sorted(set(windows))
        assert windows[-1] == blocks * block
        assert windows[0] >= block
        assert 1 <= len(windows) <= 4
        for cache in ("none", "dual"):
            assert bidirectional(block, cache=cache).windows(new) == (block,)
