"""Sampling with a pair of models, as a policy of `jaxgen.sampling.stitching` says.

Every stage is one compiled program (a hybrid stage of models on different devices is a few) whose
first and last step, noise levels, text, guidance and noise are inputs: a change of these compiles
nothing. The state stays in float32.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxgen.sampling.devices import bring, home_of, live_apart, meet
from jaxgen.sampling.guided import Guided, Latents
from jaxgen.sampling.hybrid import mix, mix_apart, predict, remember
from jaxgen.sampling.regions import as_mask
from jaxgen.sampling.state import State
from jaxgen.sampling.stitching import HybridStitch, Policy, SRDiffusion, Stage


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
    homes = {name: model and home_of(model.weights) for name, model in models.items()}
    apart = live_apart(*homes.values())
    move = bring if apart else meet
    # Where stages begin is no part of the programs.
    how: Any = None
    if isinstance(policy, HybridStitch):
        how = dataclasses.replace(policy, start=0, end=0)
    del large, small  # so that released models can go
    stages = list(policy.stages(steps))
    state = State.start(noise)
    memory: Any = None
    while stages:
        stage = stages.pop(0)
        remembers = bool(stages) and stages[0].kind == "hybrid"
        home = homes["small" if stage.kind == "small" else "large"]
        state, levels, scores = move((state, sigmas, scores), home)
        if isinstance(policy, SRDiffusion) and policy.adaptive and stage.kind == "large":
            state, done = sketch(models["large"], state, levels, *_bounds(policy, steps))
            stage = Stage("large", stage.first, int(done))
            stages = [Stage("small", stage.last, steps)] if stage.last < steps else []
            yield Progress(stage.last, stage, state.latents, state.estimate, None)
        else:
            for first, last in _chunks(stage, every, alone=remembers):
                if stage.kind == "hybrid":
                    run = mix_apart if apart else mix
                    state, memory = run(
                        models["large"],
                        models["small"],
                        state,
                        memory,
                        levels,
                        first,
                        last,
                        stage.first,
                        policy=how,
                    )
                elif how and remembers and last == stage.last:
                    by_small = None
                    if how.score == "model_diff":
                        latents, sigma = move((state.latents, sigmas[first]), homes["small"])
                        by_small = move(predict(models["small"], latents, sigma), home)
                    state, memory = remember(
                        models["large"], by_small, state, levels, first, scores, policy=how
                    )
                else:
                    state = follow(models[stage.kind], state, levels, first, last)
                mask = None
                if stage.kind == "hybrid":
                    height, width = state.latents.shape[1:3]
                    patches = height * width // models["large"].patch_size ** 2
                    mask = as_mask(memory.rows, patches)
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
    model = model.ready()

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
    model = model.ready()
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
