"""Sampling with a pair of tiny models: the limits, and the whole run against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import patchify, unpatchify
from jaxgen.models import MMDiT, MMDiTConfig
from jaxgen.sampling import (
    Alone,
    Conditioning,
    FlowMatchingSchedule,
    Guided,
    HybridStitch,
    SRDiffusion,
    TStitch,
    hybrid,
    stages,
    stitch,
)

STEPS = 8
SIGMAS = FlowMatchingSchedule().sigmas(STEPS)
LARGE = MMDiTConfig(
    sample_size=8, in_channels=3, num_layers=2, num_heads=2, head_dim=8, joint_attention_dim=12,
    pooled_projection_dim=10, pos_embed_max_size=6, qk_norm=True, dual_attention_layers=(0,),
)  # fmt: skip
SMALL = dataclasses.replace(LARGE, num_layers=1, num_heads=1, dual_attention_layers=())
PATCHES = 16


def model_of(config, seed):
    """A model in which no parameter has its initial zero or one."""
    random = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        values *= variable.shape[0] ** -0.5 if path[-1] == "kernel" else 0.3
        values += 1.0 if path[-1] == "scale" else 0.0
        return variable.replace(jnp.asarray(values.astype(np.float32)))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def text_of(seed, batch):
    keys = jax.random.split(jax.random.key(seed), 2)
    return Conditioning(
        jax.random.normal(keys[0], (batch, 5, 12)), jax.random.normal(keys[1], (batch, 10))
    )


MODELS = {"large": model_of(LARGE, 0), "small": model_of(SMALL, 1)}


def pair(batch=2, scales=(3.0, 2.0), only=slice(None)):
    text = [jax.tree.map(lambda x: x[only], text_of(seed, batch)) for seed in (0, 1)]
    return [
        Guided.of(model, *text, scale) for model, scale in zip(MODELS.values(), scales, strict=True)
    ]


def noise(batch=2, seed=9):
    return jax.random.normal(jax.random.key(seed), (batch, 8, 8, 3))


def run(policy, models=None, start=None, **options):
    models = pair() if models is None else models
    start = noise() if start is None else start
    *_, last = stitch(*models, policy, start, SIGMAS, **options)
    return np.asarray(last.latents)


def halves(model, latents, sigma, scale):
    """The guided velocity of one model, by two calls."""
    times = jnp.full(len(latents), 1000 * sigma)
    conditional, unconditional = (
        model(latents, times, text.context, text.pooled) for text in (text_of(0, 2), text_of(1, 2))
    )
    return unconditional + scale * (conditional - unconditional)


_halves = nnx.jit(halves)
_call, _with_cache, _masked = map(nnx.jit, (MMDiT.__call__, MMDiT.with_cache, MMDiT.masked))
_region = nnx.jit(MMDiT.region, static_argnames="keep_text")


def by_switch(order, switch):
    """One model up to a step, then the other: a plain loop."""
    latents = noise()
    for i in range(STEPS):
        name = order[i >= switch]
        scale = {"large": 3.0, "small": 2.0}[name]
        velocity = _halves(MODELS[name], latents, SIGMAS[i], scale)
        latents += (SIGMAS[i + 1] - SIGMAS[i]) * velocity
    return np.asarray(latents)


@pytest.mark.parametrize(
    ("policy", "order", "switch"),
    [
        (Alone(), ("large", "large"), 0),
        (Alone("small"), ("small", "small"), 0),
        (TStitch(0.25), ("small", "large"), 2),
        (SRDiffusion(5), ("large", "small"), 5),
        (HybridStitch(1.0, 1.0), ("large", "large"), 0),
        (HybridStitch(0, 0), ("small", "small"), 0),
        (HybridStitch(3, 3), ("large", "small"), 3),
        (HybridStitch(3, 5, share=1), ("large", "small"), 5),
        (HybridStitch(3, 5, share=0), ("large", "small"), 3),
    ],
)
def test_baselines_and_the_limits_of_the_three_stages(policy, order, switch):
    np.testing.assert_allclose(run(policy), by_switch(order, switch), atol=2e-5)


def test_a_model_stitched_to_itself_with_fresh_keys_is_that_model():
    large = pair()[0]
    found = run(HybridStitch(2, 6, refresh=1), (large, large))
    np.testing.assert_allclose(found, run(Alone()), atol=2e-5)
    stale = run(HybridStitch(2, 6), (large, large))
    assert np.abs(stale - found).max() > 1e-3


def hybrid_by_hand(policy, start, end, scores=None):
    """HybridStitch as one would write it down, without guidance scales that differ from 3 and 2."""
    large, small = MODELS.values()
    texts = text_of(0, 2), text_of(1, 2)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *texts)
    combine = lambda pair, scale: pair[2:] + scale * (pair[:2] - pair[2:])
    latents, velocity, estimate = noise(), 0.0, 0.0
    rows = region = None
    for i in range(STEPS):
        sigma = SIGMAS[i]
        inputs = (
            jnp.concatenate([latents, latents]), jnp.full(4, 1000 * sigma), both.context,
            both.pooled,
        )  # fmt: skip
        before = velocity, estimate
        if i < end:
            full, fresh = _with_cache(large, *inputs)
            full = combine(full, 3.0)
        if i >= start:
            by_small = combine(_call(small, *inputs), 2.0)
        refreshed = start <= i < end and policy.refresh and (i - start + 1) % policy.refresh == 0
        if i == start - 1 or (refreshed and policy.update):
            difference = None
            if policy.score == "v_diff":
                difference = full - before[0]
            elif policy.score == "x0_diff":
                difference = latents - sigma * full - before[1]
            elif policy.score == "model_diff":
                difference = full - combine(_call(small, *inputs), 2.0)
            values = scores
            if difference is not None:
                values = np.abs(np.asarray(patchify(difference, 2))).mean(axis=-1)
            count = -(-round(policy.share * PATCHES * 1000) // 1000)
            order = np.argsort(-np.asarray(values), axis=1, kind="stable")[:, :count]
            rows = jnp.asarray(np.sort(order, axis=1), jnp.int32)
        if i == start - 1 or refreshed:
            doubled = jnp.concatenate([rows, rows])
            region = _region(large, doubled, fresh, keep_text=policy.keep_text)
        if i < start:
            velocity = full
        elif i >= end:
            velocity = by_small
        else:
            if refreshed:
                parts = patchify(full, 2)
                parts = jnp.take_along_axis(parts, rows[..., None], axis=1)
            else:
                parts, region = _masked(large, *inputs, region)
                parts = combine(parts, 3.0)
            patches = np.array(patchify(by_small, 2))
            for b in range(2):
                patches[b, rows[b]] = parts[b]
            velocity = unpatchify(jnp.asarray(patches), 2, 8, 8)
        estimate = latents - sigma * velocity
        latents += (SIGMAS[i + 1] - sigma) * velocity
    return np.asarray(latents)


@pytest.mark.parametrize(
    "policy",
    [
        HybridStitch(2, 6),
        HybridStitch(3, 7, share=0.5, score="v_diff"),
        HybridStitch(1, 4, score="model_diff"),
        HybridStitch(1, 5, score="user"),
        HybridStitch(2, 8, refresh=2),
        HybridStitch(2, 7, refresh=2, update=True),
        HybridStitch(2, 7, refresh=3, update=True, score="v_diff"),
        HybridStitch(2, 6, refresh=1, update=True, score="model_diff"),
        HybridStitch(2, 6, keep_text=True),
        HybridStitch(2, 8, refresh=2, update=True, keep_text=True),
    ],
    ids=str,
)
def test_the_hybrid_stage_is_what_one_would_write_down(policy):
    scores = jax.random.uniform(jax.random.key(5), (2, PATCHES)) if policy.score == "user" else None
    wanted = hybrid_by_hand(policy, policy.start, policy.end, scores)
    np.testing.assert_allclose(run(policy, scores=scores), wanted, atol=5e-5)


def test_patches_outside_the_mask_are_the_small_models_and_inside_the_large_ones():
    policy = HybridStitch(2, 3)
    models = pair()
    before, after = (
        step for step in stitch(*models, policy, noise(), SIGMAS, every=1) if step.step in (2, 3)
    )
    assert before.mask is None
    velocity = (after.latents - before.latents) / (SIGMAS[3] - SIGMAS[2])
    by_small = _halves(MODELS["small"], before.latents, SIGMAS[2], 2.0)
    distance = np.abs(np.asarray(patchify(velocity - by_small, 2))).max(axis=-1)
    mask = np.asarray(after.mask)
    assert mask.sum(axis=1).tolist() == [5, 5]  # 30 % of 16, rounded up
    assert distance[~mask].max() < 1e-4
    assert distance[mask].min() > 1e-3


def test_blending_fades_regions_into_their_surroundings():
    scores = np.zeros((2, PATCHES), np.float32)
    scores[:, [5, 6, 9, 10]] = 1.0  # the four in the middle
    policy = HybridStitch(1, 2, share=0.25, score="user", blend=1)
    scores = jnp.asarray(scores)
    steps = {
        blend: [
            step.latents
            for step in stitch(
                *pair(), dataclasses.replace(policy, blend=blend), noise(), SIGMAS, every=1,
                scores=scores,
            )
        ][:2]
        for blend in (0, 1)
    }  # fmt: skip
    by_small = _halves(MODELS["small"], steps[0][0], SIGMAS[1], 2.0)
    moved = lambda blend: (steps[blend][1] - steps[blend][0]) / (SIGMAS[2] - SIGMAS[1]) - by_small
    share = np.asarray(patchify(moved(1), 2) / patchify(moved(0), 2))[:, [5, 6, 9, 10]]
    np.testing.assert_allclose(share, 4 / 9, atol=2e-3)


def test_a_batch_of_two_is_two_runs_of_one():
    policy = HybridStitch(2, 6, refresh=3, update=True)
    both = run(policy)
    for i in range(2):
        one = run(policy, pair(only=slice(i, i + 1)), noise()[i : i + 1])
        np.testing.assert_allclose(one, both[i : i + 1], atol=5e-5)


@pytest.mark.parametrize("policy", [HybridStitch(2, 6), TStitch(), SRDiffusion(earliest=0.3)])
def test_previews_change_nothing_and_come_as_often_as_asked(policy):
    steps = list(stitch(*pair(), policy, noise(), SIGMAS, every=1))
    np.testing.assert_array_equal(steps[-1].latents, run(policy))
    np.testing.assert_array_equal(steps[-1].latents, run(policy))  # nothing is left over
    if not isinstance(policy, SRDiffusion):
        assert [step.step for step in steps] == list(range(1, STEPS + 1))
    whole = list(stitch(*pair(), HybridStitch(3, 6), noise(), SIGMAS, every=2))
    assert [step.step for step in whole] == [2, 3, 5, 6, 8]
    assert [step.stage.kind for step in whole] == ["large"] * 2 + ["hybrid"] * 2 + ["small"]


def adaptive_by_hand(policy):
    """The step after which SRDiffusion switches."""
    latents, changes, velocity = noise(), [], None
    size = lambda x: np.abs(np.asarray(x)).mean(axis=(1, 2, 3))
    for i in range(round(policy.latest * STEPS)):
        last, velocity = velocity, _halves(MODELS["large"], latents, SIGMAS[i], 3.0)
        latents += (SIGMAS[i + 1] - SIGMAS[i]) * velocity
        if last is not None:
            changes.append(np.tanh(size(velocity - last) / size(last)))
        if len(changes) >= 2 and i + 1 >= round(policy.earliest * STEPS):
            slower = changes[-2] - changes[-1]
            if ((slower > 0) & (slower < policy.threshold)).all():
                return i + 1
    return round(policy.latest * STEPS)


@pytest.mark.parametrize("threshold", [1e-9, 0.02, 0.1, 0.5, 10.0])
@pytest.mark.parametrize(("earliest", "latest"), [(0.0, 1.0), (0.5, 0.9)])
def test_the_adaptive_switch(threshold, earliest, latest):
    policy = SRDiffusion(threshold=threshold, earliest=earliest, latest=latest)
    first, *rest = stitch(*pair(), policy, noise(), SIGMAS)
    assert first.stage == ("large", 0, adaptive_by_hand(policy))
    np.testing.assert_allclose(
        (rest or [first])[-1].latents, by_switch(("large", "small"), first.step), atol=5e-5
    )


def test_the_adaptive_switch_depends_on_the_threshold():
    found = {adaptive_by_hand(SRDiffusion(threshold=t, latest=1.0)) for t in (1e-9, 0.5)}
    assert len(found) == 2


def test_nothing_is_compiled_for_other_noise_guidance_text_and_boundaries():
    programs = (stages.follow, hybrid.remember, hybrid.mix)
    run(HybridStitch(2, 6, share=0.4))
    count = [program._cache_size() for program in programs]
    models = [
        Guided.of(model, text_of(7, 2), text_of(8, 2), scale)
        for model, scale in zip(MODELS.values(), (1.5, 6.0), strict=True)
    ]
    # The policy is static, so only its share and what else it says of the stage is compared.
    run(HybridStitch(3, 5, share=0.4), models, noise(seed=3))
    run(HybridStitch(0.4, 0.9, share=0.4), models, noise(seed=3))
    assert [program._cache_size() for program in programs] == count
    run(HybridStitch(3, 5, share=0.6))
    assert hybrid.mix._cache_size() == count[2] + 1


@pytest.mark.parametrize("policy", [HybridStitch(2, 6), TStitch(0.5), SRDiffusion(3)])
def test_the_estimate_is_where_the_last_prediction_points(policy):
    """It and the latents before a step are on one line with those after it."""
    before = noise()
    for progress in stitch(*pair(), policy, before, SIGMAS, every=1):
        this, following = SIGMAS[progress.step - 1], SIGMAS[progress.step]
        velocity = (before - progress.estimate) / this
        after = before + (following - this) * velocity
        np.testing.assert_allclose(after, progress.latents, atol=2e-5)
        assert np.abs(velocity).mean() > 0.1
        before = progress.latents
    np.testing.assert_array_equal(progress.estimate, progress.latents)


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        (HybridStitch(2, 6), [2, 6, "large", 8, "small"]),
        (TStitch(0.5), [4, "small", 8, "large"]),
        (SRDiffusion(3), [3, "large", 8, "small"]),
    ],
)
def test_models_are_released_when_their_last_stage_ends(policy, order):
    seen = []
    for progress in stitch(*pair(), policy, noise(), SIGMAS, release=seen.append):
        seen.append(progress.step)
    assert seen == order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"large": None}, r"needs a large model, got None"),
        ({"small": None}, r"HybridStitch\(.*\) needs a small model, got None"),
        ({"small": None, "policy": SRDiffusion(latest=1.0)}, "needs a small model, got None"),
        ({"noise": noise(3)}, "the large model has text for 2 pictures, got noise for 3"),
        ({"sigmas": SIGMAS[:1]}, r"sigmas must be a vector .*, got shape \(1,\)"),
        ({"every": -1}, "every must not be negative, got -1"),
        ({"scores": jnp.zeros((2, PATCHES))}, "score='user' goes with scores, got score='x0_diff'"),
        ({"policy": HybridStitch(2, 3, score="user")}, "got score='user' and none"),
        (
            {"policy": HybridStitch(2, 3, score="user"), "scores": jnp.zeros((2, 15))},
            r"scores must have shape \(2, 16\), a value for each patch, got \(2, 15\)",
        ),
        (
            {"policy": TStitch(), "scores": jnp.zeros((2, PATCHES))},
            r"scores are for HybridStitch\(score='user'\), got TStitch",
        ),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    large, small = pair()
    arguments = {"large": large, "small": small, "policy": HybridStitch(2, 3), "noise": noise(),
                 "sigmas": SIGMAS}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        next(stitch(**(arguments | changes)))
