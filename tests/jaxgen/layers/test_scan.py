"""Blocks that are made together: the same weights however they are made, and few programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import make_blocks


class Block(nnx.Module):
    """Two weights and a setting."""

    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, 2 * width, rngs=rngs)
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.count = nnx.Variable(jnp.int32(width))


def states(count, seed):
    blocks = make_blocks(functools.partial(Block, 4), count, rngs=nnx.Rngs(seed))
    return [nnx.state(block) for block in blocks]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_compiled_program_makes_the_same_blocks(count):
    plain, compiled = states(count, 3), jax.jit(states, static_argnums=(0, 1))(count, 3)
    assert len(plain) == len(compiled) == count
    for one, other in zip(plain, compiled, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_blocks_and_seeds_differ():
    drawn = [np.asarray(state["scale"][...]) for seed in (0, 1) for state in states(3, seed)]
    assert len({tuple(values) for values in drawn}) == 6


def test_later_draws_do_not_depend_on_how_many_blocks_there_are():
    keys = []
    for count in (1, 7):
        rngs = nnx.Rngs(0)
        make_blocks(functools.partial(Block, 4), count, rngs=rngs)
        keys.append(jax.random.key_data(rngs.params()))
    np.testing.assert_array_equal(*keys)


def test_a_deep_stack_is_drawn_by_as_many_draws_as_a_flat_one():
    def draws(count):
        text = jax.jit(states, static_argnums=(0, 1)).lower(count, 0).compile().as_text()
        return text.count(" xor(")  # of the random bits

    assert draws(12) == draws(2)
