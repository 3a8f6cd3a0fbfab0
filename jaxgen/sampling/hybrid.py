"""The hybrid stage: the small model predicts whole pictures, the large one some of their patches.

Both on the same devices are one compiled program for all steps (`mix`). On devices of their own
(`mix_apart`) every step is a few programs, and the models predict at the same time (but where a
refresh scores patches by what the small one predicts).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxgen.layers import patchify, unpatchify
from jaxgen.models.mmdit_region import Region
from jaxgen.sampling.devices import bring, home_of
from jaxgen.sampling.guided import Guided, Latents
from jaxgen.sampling.regions import active_count, as_mask, highest, patch_scores, place
from jaxgen.sampling.state import State
from jaxgen.sampling.stitching import HybridStitch

type Parts = Float[Array, "batch active values"]
"""Velocities of the large model's patches."""


class Memory(NamedTuple):
    """What the hybrid stage knows of the large model; a pytree.

    Attributes:
        rows: Numbers of the patches that it goes on with.
        weight: How much its prediction counts there, or None: wholly.
        region: The same patches, with keys and values of all, for both halves of the guidance.
    """

    rows: Int32[Array, "batch active"]
    weight: Float[Array, "batch patches"] | None
    region: Region


@jax.jit
def predict(model: Guided, latents: Latents, sigma: Float[Array, ""]) -> Latents:
    """Return the velocity that a model predicts, as a program of its own."""
    return model.velocity(latents, sigma)


@functools.partial(jax.jit, static_argnames="policy")
def remember(
    large: Guided,
    by_small: Latents | None,
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
        by_small: What the small one predicts, if the score needs it.
        state: Before the step.
        sigmas: Noise levels.
        i: The step.
        scores: Given ones.
        policy: What decides.
    """
    velocity, cache = large.velocity_and_cache(state.latents, sigmas[i], i)
    if scores is None:
        scores = _scores(policy, large, state, velocity, sigmas[i], by_small)
    count = active_count(scores.shape[1], policy.share, policy.multiple)
    rows = highest(scores, count)
    shape = state.latents.shape
    weight = _weight(policy, rows, shape, large.patch_size)
    memory = Memory(rows, weight, large.region(rows, cache, keep_text=policy.keep_text))
    return state.stepped(velocity, sigmas, i), memory


@functools.partial(jax.jit, static_argnames="policy", donate_argnames="memory")
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

    The memory that is given is used up.

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
    large, small = large.ready(), small.ready()

    def step(i, carry):
        state, memory = carry
        by_small = small.velocity(state.latents, sigmas[i])
        inputs = large, state, memory, sigmas[i], by_small
        refreshed = functools.partial(_refreshed, policy)
        if policy.refresh:
            due = (i - start + 1) % policy.refresh == 0
            parts, memory = lax.cond(due, refreshed, _masked, *inputs)
        else:
            parts, memory = _masked(*inputs)
        new = _joined(state, memory, by_small, parts, sigmas, i, patch=large.patch_size)
        return new, memory

    return lax.fori_loop(first, last, step, (state, memory))


def mix_apart(
    large: Guided,
    small: Guided,
    state: State,
    memory: Memory,
    sigmas: Array,
    first: int,
    last: int,
    start: int,
    *,
    policy: HybridStitch,
) -> tuple[State, Memory]:
    """Do what `mix` does with models on different devices; state and memory are the large one's.

    Both models are started before either is done, also where copying to another device waits for
    what is copied; latents and velocities are all that goes from device to device. The memory that
    is given is used up.
    """
    here, there = home_of(large.weights), home_of(small.weights)
    large, small = large.ready(), small.ready()
    patch, levels = large.patch_size, np.asarray(sigmas)
    compared = policy.update and policy.score == "model_diff"
    for i in range(first, last):
        by_small = predict(small, bring(state.latents, there), levels[i])
        if policy.refresh and (i - start + 1) % policy.refresh == 0:
            seen = bring(by_small, here) if compared else None
            parts, memory = _refresh(large, state, memory, levels[i], seen, policy=policy)
        else:
            parts, memory = _go_on(large, state, memory, levels[i])
        by_small = bring(by_small, here)
        state = _join(state, memory, by_small, parts, levels, np.int32(i), patch=patch)
    return state, memory


def _masked(
    large: Guided, state: State, memory: Memory, sigma: Array, by_small: Latents | None = None
) -> tuple[Parts, Memory]:
    """Predict the large model's patches beside remembered keys and values."""
    del by_small
    parts, region = large.masked(state.latents, sigma, memory.region)
    return parts, memory._replace(region=region)


def _refreshed(
    policy: HybridStitch,
    large: Guided,
    state: State,
    memory: Memory,
    sigma: Array,
    by_small: Latents | None,
) -> tuple[Parts, Memory]:
    """Predict whole pictures, remember all keys and values anew, and perhaps choose patches."""
    velocity, cache = large.velocity_and_cache(state.latents, sigma)
    rows, weight, patch = memory.rows, memory.weight, large.patch_size
    if policy.update:
        scores = _scores(policy, large, state, velocity, sigma, by_small)
        rows = highest(scores, rows.shape[1])
        weight = _weight(policy, rows, state.latents.shape, patch)
    parts = jnp.take_along_axis(patchify(velocity, patch), rows[..., None], axis=1)
    # A cache may be kept in another dtype than the model computes in.
    region = large.region(rows, cache, keep_text=policy.keep_text)
    region = jax.tree.map(lambda new, old: new.astype(old.dtype), region, memory.region)
    return parts, Memory(rows, weight, region)


def _joined(
    state: State,
    memory: Memory,
    by_small: Latents,
    parts: Parts,
    sigmas: Array,
    i: Int32[Array, ""],
    *,
    patch: int,
) -> State:
    """Take a step with the large model's patches in the small one's pictures."""
    patches = place(patchify(by_small, patch), memory.rows, parts, memory.weight)
    velocity = unpatchify(patches, patch, *state.latents.shape[1:3])
    return state.stepped(velocity, sigmas, i)


_go_on = jax.jit(_masked, donate_argnames="memory")
_join = jax.jit(_joined, static_argnames="patch")


# What is used up need not be used: of the old memory a refresh wants the dtypes only.
@functools.partial(jax.jit, static_argnames="policy", donate_argnames="memory", keep_unused=True)
def _refresh(large, state, memory, sigma, by_small, *, policy):
    return _refreshed(policy, large, state, memory, sigma, by_small)


def _scores(
    policy: HybridStitch,
    large: Guided,
    state: State,
    velocity: Latents,
    sigma: Array,
    by_small: Latents | None,
) -> Float[Array, "batch patches"]:
    """Return the scores of patches from what the large model just predicted."""
    match policy.score:
        case "v_diff":
            difference = velocity - state.velocity
        case "model_diff":
            assert by_small is not None
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
