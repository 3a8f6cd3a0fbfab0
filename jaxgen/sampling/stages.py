"""Sampling with a pair of models, as a policy of `jaxgen.sampling.stitching` says.

Every stage is one compiled program whose first and last step, noise levels, text, guidance and
noise are inputs: a change of these compiles nothing. The state stays in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxgen.layers import patchify, unpatchify
from jaxgen.models.mmdit import Cache
from jaxgen.sampling.guided import Guided, Latents
from jaxgen.sampling.regions import active_count, as_mask, highest, patch_scores, place
from jaxgen.sampling.stitching import HybridStitch, Policy, SRDiffusion, Stage


class State(NamedTuple):
    """Where sampling is; a pytree of float32.

    Attributes:
        latents: Before the next step.
        velocity: That led here; zeros at the start.
        estimate: Of the clean latents, from the same prediction; zeros at the start.
    """

    latents: Latents
    velocity: Latents
    estimate: Latents

    @classmethod
    def start(cls, noise: Latents) -> "State":
        """Return the state before the first step."""
        noise = noise.astype(jnp.float32)
        return cls(noise, jnp.zeros_like(noise), jnp.zeros_like(noise))

    def stepped(self, velocity: Latents, sigmas: Array, i: Array) -> "State":
        """Return the state after an Euler step."""
        latents = self.latents + (sigmas[i + 1] - sigmas[i]) * velocity
        return State(latents, velocity, self.latents - sigmas[i] * velocity)


class Memory(NamedTuple):
    """What the hybrid stage knows of the large model; a pytree.

    Attributes:
        rows: Numbers of the patches that it goes on with.
        weight: How much its prediction counts there, or None: wholly.
        cache: Keys and values of all patches, of both halves of the guidance.
    """

    rows: Int32[Array, "batch active"]
    weight: Float[Array, "batch patches"] | None
    cache: Cache


class Progress(NamedTuple):
    """What `stitch` yields.

    Attributes:
        step: Steps done.
        stage: The stage that they ended in.
        latents: After them, float32.
        estimate: Of the clean latents, by the last prediction: a preview that is not noisy. After
            the last step it is the same as `latents` if the last noise level is 0.
        mask: Patches that the large model goes on with, bool (batch, patches), in the hybrid stage.
    """

    step: int
    stage: Stage
    latents: Latents
    estimate: Latents
    mask: Bool[Array, "batch patches"] | None


def stitch(
    large: Guided | None,
    small: Guided | None,
    policy: Policy,
    noise: Latents,
    sigmas: Float[Array, "steps+1"],
    *,
    every: int = 0,
    scores: Float[Array, "batch patches"] | None = None,
    release: Callable[[str], None] | None = None,
) -> Iterator[Progress]:
    """Sample, yielding the latents on the way; those of the last step are the result.

    Args:
        large: The large model; None if the policy does not use it.
        small: The small one, for the same latents, likewise.
        policy: Who predicts which step.
        noise: Where sampling starts, standard normal.
        sigmas: Falling noise levels, as `FlowMatchingSchedule.sigmas` returns them.
        every: Yield after so many steps of a stage, and at its end; 0: at its end only, as a stage
            whose end is found while sampling does always.
        scores: Of the patches, for `HybridStitch(score="user")`: the highest go to the large model.
        release: Called with "large" or "small" once that model is needed no more.

    Raises:
        ValueError: `every` is negative, a model is missing, arrays do not fit each other, or the
            policy does not fit the number of steps.
    """
    steps = _check(large, small, policy, noise, sigmas, every, scores)
    models: dict[str, Any] = {"large": large, "small": small}
    # Where stages begin is no part of the programs.
    how = dataclasses.replace(policy, start=0, end=0) if isinstance(policy, HybridStitch) else None
    del large, small  # so that released models can go
    stages = list(policy.stages(steps))
    state, memory = State.start(noise), None
    while stages:
        stage = stages.pop(0)
        remembers = bool(stages) and stages[0].kind == "hybrid"
        if isinstance(policy, SRDiffusion) and policy.adaptive and stage.kind == "large":
            state, done = sketch(models["large"], state, sigmas, *_bounds(policy, steps))
            stage = Stage("large", stage.first, int(done))
            stages = [Stage("small", stage.last, steps)] if stage.last < steps else []
            yield Progress(stage.last, stage, state.latents, state.estimate, None)
        else:
            for first, last in _chunks(stage, every, alone=remembers):
                bounds = jnp.int32(first), jnp.int32(last)
                if stage.kind == "hybrid":
                    state, memory = mix(
                        models["large"],
                        models["small"],
                        state,
                        memory,
                        sigmas,
                        *bounds,
                        jnp.int32(stage.first),
                        policy=how,
                    )
                elif how and remembers and last == stage.last:
                    state, memory = remember(
                        models["large"],
                        models["small"] if how.score == "model_diff" else None,
                        state,
                        sigmas,
                        bounds[0],
                        scores,
                        policy=how,
                    )
                else:
                    state = follow(models[stage.kind], state, sigmas, *bounds)
                mask = None
                if memory is not None and stage.kind == "hybrid":
                    mask = as_mask(memory.rows, memory.cache[0].joint.key.shape[1])
                if every or last == stage.last:
                    yield Progress(last, stage, state.latents, state.estimate, mask)
        left = {kind for later in stages for kind in _needed(later)}
        for name in ("large", "small"):
            if name not in left and models.pop(name, None) is not None and release:
                release(name)
        if "large" not in left:
            memory = None


@jax.jit
def follow(
    model: Guided, state: State, sigmas: Array, first: Int32[Array, ""], last: Int32[Array, ""]
) -> State:
    """Let one model predict the steps from `first` to before `last`."""

    def step(i, state):
        return state.stepped(model.velocity(state.latents, sigmas[i], i), sigmas, i)

    return lax.fori_loop(first, last, step, state)


@jax.jit
def sketch(
    model: Guided,
    state: State,
    sigmas: Array,
    earliest: Int32[Array, ""],
    latest: Int32[Array, ""],
    threshold: Float[Array, ""],
) -> tuple[State, Int32[Array, ""]]:
    """Let the large model predict until its predictions stop changing faster; see `SRDiffusion`.

    Returns:
        The state, and the number of steps done.
    """
    size = lambda x: jnp.mean(jnp.abs(x), axis=(1, 2, 3))
    unknown = jnp.full(len(state.latents), jnp.nan)

    def going(carry):
        _, i, _, agreed = carry
        return (i < latest) & ~(agreed & (i >= earliest))

    def step(carry):
        state, i, before, _ = carry
        velocity = model.velocity(state.latents, sigmas[i], i)
        change = jnp.tanh(size(velocity - state.velocity) / size(state.velocity))
        change = jnp.where(i > 0, change, unknown)  # the first prediction has none before it
        slower = before - change
        agreed = jnp.all((slower > 0) & (slower < threshold))
        return state.stepped(velocity, sigmas, i), i + 1, change, agreed

    start = (state, jnp.int32(0), unknown, jnp.bool_(False))
    state, done, *_ = lax.while_loop(going, step, start)
    return state, done


@functools.partial(jax.jit, static_argnames="policy")
def remember(
    large: Guided,
    small: Guided | None,
    state: State,
    sigmas: Array,
    i: Int32[Array, ""],
    scores: Float[Array, "batch patches"] | None,
    *,
    policy: HybridStitch,
) -> tuple[State, Memory]:
    """Let the large model predict one step, keep its keys and values, and choose patches.

    Args:
        large: The large model.
        small: The small one if the score needs it.
        state: Before the step.
        sigmas: Noise levels.
        i: The step.
        scores: Given ones.
        policy: What decides.
    """
    velocity, cache = large.velocity_and_cache(state.latents, sigmas[i], i)
    if scores is None:
        scores = _scores(policy, large, small, state, velocity, sigmas[i])
    count = active_count(scores.shape[1], policy.share, policy.multiple)
    rows = highest(scores, count)
    shape = state.latents.shape
    memory = Memory(rows, _weight(policy, rows, shape, large.patch_size), cache)
    return state.stepped(velocity, sigmas, i), memory


@functools.partial(jax.jit, static_argnames="policy")
def mix(
    large: Guided,
    small: Guided,
    state: State,
    memory: Memory,
    sigmas: Array,
    first: Int32[Array, ""],
    last: Int32[Array, ""],
    start: Int32[Array, ""],
    *,
    policy: HybridStitch,
) -> tuple[State, Memory]:
    """Let the small model predict pictures and the large one some of their patches.

    Args:
        large: The large model.
        small: The small one.
        state: Before step `first`.
        memory: Of the large model.
        sigmas: Noise levels.
        first: The first step.
        last: The step after the last one.
        start: The first step of the hybrid stage, from which refreshs are counted.
        policy: How they share the work.
    """
    patch, shape = large.patch_size, state.latents.shape

    def masked(state, memory, sigma, _):
        parts, cache = large.masked(state.latents, sigma, memory.rows, memory.cache)
        return parts, memory._replace(cache=cache)

    def refreshed(state, memory, sigma, by_small):
        velocity, cache = large.velocity_and_cache(state.latents, sigma)
        rows, weight = memory.rows, memory.weight
        if policy.update:
            scores = _scores(policy, large, None, state, velocity, sigma, by_small)
            rows = highest(scores, rows.shape[1])
            weight = _weight(policy, rows, shape, patch)
        parts = jnp.take_along_axis(patchify(velocity, patch), rows[..., None], axis=1)
        # A cache may be kept in another dtype than the model computes in.
        cache = jax.tree.map(lambda new, old: new.astype(old.dtype), cache, memory.cache)
        return parts, Memory(rows, weight, cache)

    def step(i, carry):
        state, memory = carry
        by_small = small.velocity(state.latents, sigmas[i])
        inputs = state, memory, sigmas[i], by_small
        if policy.refresh:
            due = (i - start + 1) % policy.refresh == 0
            parts, memory = lax.cond(due, refreshed, masked, *inputs)
        else:
            parts, memory = masked(*inputs)
        patches = place(patchify(by_small, patch), memory.rows, parts, memory.weight)
        velocity = unpatchify(patches, patch, *shape[1:3])
        return state.stepped(velocity, sigmas, i), memory

    return lax.fori_loop(first, last, step, (state, memory))


def _scores(
    policy: HybridStitch,
    large: Guided,
    small: Guided | None,
    state: State,
    velocity: Latents,
    sigma: Array,
    by_small: Latents | None = None,
) -> Float[Array, "batch patches"]:
    """Return the scores of patches from what the large model just predicted."""
    match policy.score:
        case "v_diff":
            difference = velocity - state.velocity
        case "model_diff":
            if by_small is None:
                assert small is not None
                by_small = small.velocity(state.latents, sigma)
            difference = velocity - by_small
        case _:
            difference = (state.latents - sigma * velocity) - state.estimate
    return patch_scores(difference, large.patch_size, opening=policy.opening)


def _weight(
    policy: HybridStitch, rows: Array, shape: tuple[int, ...], patch: int
) -> Float[Array, "batch patches"] | None:
    """Return how much the large model counts: less the nearer a patch is to the region's edge."""
    if not policy.blend:
        return None
    grid = shape[1] // patch, shape[2] // patch
    mask = as_mask(rows, grid[0] * grid[1]).astype(jnp.float32).reshape(-1, *grid)
    side = 2 * policy.blend + 1
    window = (1, side, side), (1, 1, 1), "SAME"
    inside = lax.reduce_window(mask, 0.0, lax.add, *window)
    room = lax.reduce_window(jnp.ones_like(mask), 0.0, lax.add, *window)
    return (inside / room).reshape(len(mask), -1)


def _bounds(policy: SRDiffusion, steps: int) -> tuple[Array, Array, Array]:
    earliest, latest = round(policy.earliest * steps), round(policy.latest * steps)
    return jnp.int32(max(1, earliest)), jnp.int32(latest), jnp.float32(policy.threshold)


def _chunks(stage: Stage, every: int, *, alone: bool) -> Iterator[tuple[int, int]]:
    """Cut a stage into pieces of `every` steps; `alone` gives its last step a piece of its own."""
    end = stage.last - alone
    size = every or max(1, end - stage.first)
    for first in range(stage.first, end, size):
        yield first, min(first + size, end)
    if alone:
        yield end, stage.last


def _needed(stage: Stage) -> tuple[str, ...]:
    return ("large", "small") if stage.kind == "hybrid" else (stage.kind,)


def _check(
    large: Guided | None,
    small: Guided | None,
    policy: Policy,
    noise: Array,
    sigmas: Array,
    every: int,
    scores: Array | None,
) -> int:
    """Return the number of steps; refuse what does not fit."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be a vector of at least 2 levels, got shape {sigmas.shape}")
    if every < 0:
        raise ValueError(f"every must not be negative, got {every}")
    steps = len(sigmas) - 1
    needed = {kind for stage in policy.stages(steps) for kind in _needed(stage)}
    if isinstance(policy, SRDiffusion) and policy.adaptive:
        needed = {"large", "small"}
    for name, model in (("large", large), ("small", small)):
        if name in needed and model is None:
            raise ValueError(f"{policy} needs a {name} model, got None")
        if model is not None and model.batch != len(noise):
            raise ValueError(
                f"the {name} model has text for {model.batch} pictures, got noise for {len(noise)}"
            )
    if not isinstance(policy, HybridStitch):
        if scores is not None:
            raise ValueError(f"scores are for HybridStitch(score='user'), got {policy}")
        return steps
    if (policy.score == "user") != (scores is not None):
        given = "none" if scores is None else f"shape {scores.shape}"
        raise ValueError(f"score='user' goes with scores, got score={policy.score!r} and {given}")
    if large is not None and scores is not None:
        patches = (noise.shape[1] // large.patch_size) * (noise.shape[2] // large.patch_size)
        if scores.shape != (len(noise), patches):
            raise ValueError(
                f"scores must have shape {(len(noise), patches)}, a value for each patch, "
                f"got {scores.shape}"
            )
    return steps
