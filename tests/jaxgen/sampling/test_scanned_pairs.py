"""Pairs whose blocks are a loop: the same pictures, and weights that are stacked once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import Stack, blocks_apart, with_stacks
from jaxgen.sampling import Guided, HybridStitch, SkipLayers, SRDiffusion, stitch
from jaxgen.sampling.hybrid import mix, remember
from jaxgen.sampling.stages import follow, sketch
from jaxgen.sampling.state import State
from tests.jaxgen.sampling.test_stages import LARGE, SIGMAS, SMALL, model_of, noise, text_of

DEEP = {
    "large": dataclasses.replace(LARGE, num_layers=4, dual_attention_layers=(0, 1)),
    "small": dataclasses.replace(SMALL, num_layers=3),
}
SKIP = SkipLayers(2.0, after=1.0, before=5.0, blocks=(1,))


@functools.cache
def deep_pair(scan, skip=None):
    return [
        Guided.of(
            model_of(dataclasses.replace(config, scan=scan), seed),
            text_of(0, 2),
            text_of(1, 2),
            3.0,
            skip,
        )
        for seed, config in enumerate(DEEP.values())
    ]


@pytest.mark.parametrize(
    ("policy", "skip", "apart"),
    [
        (SRDiffusion(threshold=0.5), SKIP, False),
        (HybridStitch(2, 6, keep_text=True), None, False),
        (HybridStitch(1, 7, refresh=2, update=True, score="model_diff"), SKIP, False),
        (HybridStitch(1, 7, refresh=2, update=True, score="model_diff"), None, True),
    ],
    ids=str,
)
def test_pictures_are_those_of_models_without_a_loop(policy, skip, apart):
    places = jax.devices()[1:3] if apart else (None, None)
    drawn = []
    for scan in (False, True):
        models = [
            model if place is None else jax.device_put(model, place)
            for model, place in zip(deep_pair(scan, skip), places, strict=True)
        ]
        *_, last = stitch(*models, policy, noise(), SIGMAS)
        drawn.append(np.asarray(last.latents))
    np.testing.assert_allclose(*drawn, rtol=1e-4, atol=1e-4)


def loops_of(jaxpr, inside=False):
    """Yield the equations within loops over steps, which stand outside of those over blocks."""
    for equation in jaxpr.eqns:
        if inside:
            yield equation
        within = inside or equation.primitive.name == "while"
        for parameter in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from loops_of(inner, within)


def stacked_in_loops(program, shapes):
    """How many weights are put together in the loops of a traced program."""
    equations = list(loops_of(program.jaxpr.jaxpr))
    assert any(equation.primitive.name == "dot_general" for equation in equations)
    made = [
        equation.outvars[0].aval.shape[1:]
        for equation in equations
        if equation.primitive.name in ("concatenate", "stack")
    ]
    return sum(shape in shapes for shape in made)


def test_no_step_stacks_weights():
    large, small = deep_pair(True)
    policy = HybridStitch(0, 0)
    shapes = {leaf.shape for model in (large, small) for leaf in jax.tree.leaves(model.weights)}
    shapes = {shape for shape in shapes if len(shape) == 2}  # others may be those of activations
    state = State.start(noise())
    state, memory = remember(large, None, state, SIGMAS, 1, None, policy=policy)
    number = jnp.int32(2)
    programs = [
        follow.trace(large, state, SIGMAS, number, number),
        sketch.trace(large, state, SIGMAS, number, number, jnp.float32(0)),
        mix.trace(large, small, state, memory, SIGMAS, number, number, number, policy=policy),
    ]
    assert [stacked_in_loops(program, shapes) for program in programs] == [0, 0, 0]

    def unprepared(model, latents, number):
        step = lambda _, latents: latents + model.velocity(latents, SIGMAS[0])
        return jax.lax.fori_loop(0, number, step, latents)

    program = jax.jit(unprepared).trace(large, noise(), number)
    assert stacked_in_loops(program, shapes) > 10  # what is looked for is found


def test_stacks_take_a_model_apart_and_leave_it_as_it_was():
    config = dataclasses.replace(DEEP["large"], scan=True)
    model = model_of(config, 0)
    stacked = with_stacks(model)
    assert [stack.count for stack in stacked.blocks] == [2, 1, 1]
    assert len(model.blocks) == 4
    assert not any(isinstance(block, Stack) for block in model.blocks)
    for one, other in zip(model.blocks, blocks_apart(stacked.blocks), strict=True):
        assert nnx.graphdef(one) == nnx.graphdef(other)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))
    again = with_stacks(stacked)
    assert [stack.count for stack in again.blocks] == [2, 1, 1]
    plain = model_of(DEEP["large"], 0)
    assert with_stacks(plain) is plain
