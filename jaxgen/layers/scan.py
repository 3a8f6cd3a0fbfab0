"""Deep stacks of equal blocks, made and run so that compiling takes seconds at any depth."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array


def make_blocks[Block: nnx.Module](
    make: Callable[..., Block], count: int, *, rngs: nnx.Rngs
) -> list[Block]:
    """Makes blocks that differ in their random numbers only.

    Inside `jax.jit`, the weights of all blocks are drawn together: XLA takes about half a second to
    compile a draw, and a deep model would have hundreds. Values are the same as outside. For a
    moment the weights are then in memory twice, stacked and block by block.

    Args:
        make: called with `rngs`, makes one block.
        count: how many.
        rngs: gives one key of its stream `params` to all of them.
    """
    keys = jax.random.split(rngs.params(), count)
    if not isinstance(keys, Tracer):
        return [make(rngs=nnx.Rngs(key)) for key in keys]
    graph = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]
    states = jax.vmap(lambda key: nnx.split(make(rngs=nnx.Rngs(key)))[1])(keys)
    # Without barriers XLA would draw the part of each block by itself.
    states = jax.tree.map(jax.lax.optimization_barrier, states)
    one = lambda number: jax.tree.map(lambda arrays: arrays[number], states)
    return [nnx.merge(graph, one(number)) for number in range(count)]


class Stack(nnx.Module):
    """Blocks of one structure, as one block whose arrays have an axis more, the first.

    Args:
        blocks: which; at least one.

    Attributes:
        block: all of them; not to be called.
        count: how many.
    """

    def __init__(self, blocks: Sequence[nnx.Module]):
        states = [nnx.state(block) for block in blocks]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
        self.block = nnx.merge(nnx.graphdef(blocks[0]), stacked)
        self.count = len(blocks)

    def apart(self) -> list[Any]:
        """Returns the blocks, with copies of their arrays."""
        graph, state = nnx.split(self.block)
        return [
            nnx.merge(graph, jax.tree.map(lambda array, i=number: array[i], state))
            for number in range(self.count)
        ]


def _stacks(blocks: Iterable[nnx.Module]) -> Iterator[tuple[Stack, list[nnx.Module]]]:
    """Yields neighbours of one structure, stacked and as they were, or a `Stack` and nothing."""
    for _, group in itertools.groupby(blocks, nnx.graphdef):
        alike = list(group)
        if isinstance(alike[0], Stack):
            yield from ((stack, []) for stack in alike if isinstance(stack, Stack))
        else:
            yield Stack(alike), alike


def with_stacks[Model: nnx.Module](model: Model) -> Model:
    """Returns a model that loops over its blocks (`config.scan`) with these stacked for good.

    For programs that call it again and again: a call stacks them otherwise, and XLA does not move
    that out of a loop over calls. Any other model is returned as it is. Not for training or saving:
    the weights have other names and shapes.
    """
    given: Any = model
    if not given.config.scan:
        return model
    copy: Any = nnx.merge(*nnx.split(model))
    copy.blocks = nnx.List([stack for stack, _ in _stacks(copy.blocks)])
    return copy


def blocks_apart(blocks: Iterable[nnx.Module]) -> list[Any]:
    """Returns blocks one by one, those of a `Stack` as copies."""
    parts = [block.apart() if isinstance(block, Stack) else [block] for block in blocks]
    return list(itertools.chain.from_iterable(parts))


def scan_blocks(
    blocks: Iterable[nnx.Module], run: Callable[[Any, Array], Array], x: Array
) -> Array:
    """Runs blocks one after another in a loop over their weights, which are stacked first.

    Args:
        blocks: modules of one structure, or a `Stack` of such; what modules keep in
            `nnx.Intermediate` is kept as usual.
        run: called with a block and x; returns the next x.
        x: what the first block gets.

    Raises:
        ValueError: the blocks differ in more than their weights.
    """
    blocks = list(blocks)
    if any(nnx.graphdef(block) != nnx.graphdef(blocks[0]) for block in blocks):
        raise ValueError("scan needs blocks that are alike, these have different structures")
    return scan_neighbours(blocks, lambda block, x, _: (run(block, x), None), x)[0]


def scan_neighbours[Carry, Own](
    blocks: Iterable[nnx.Module],
    run: Callable[[Any, Carry, Any], tuple[Carry, Own]],
    x: Carry,
    own: Sequence[Any] | None = None,
) -> tuple[Carry, list[Own]]:
    """Runs blocks one after another; neighbours of one structure are a loop over their weights.

    What the blocks of a loop have, weights (if they are no `Stack` yet) and all of `own`, is
    stacked before it.

    Args:
        blocks: modules, of which each `Stack` counts for the blocks that it stands for; what they
            keep in `nnx.Intermediate` is kept as usual, that of a `Stack` together.
        run: called with a block, x and what the block has for its own; returns the next x and
            something of its own. All are pytrees.
        x: what the first block gets.
        own: something for each block, of equal shapes where neighbours are alike; None: nothing.

    Returns:
        What the last block returns, and what each returns of its own.
    """
    found: list[Own] = []
    for stack, alike in _stacks(blocks):
        graph, state = nnx.split(stack.block)
        given = own and own[len(found) : len(found) + stack.count]
        given = given and jax.tree.map(lambda *arrays: jnp.stack(arrays), *given)

        def body(x, both, graph=graph):
            block = nnx.merge(graph, both[0])
            x, kept = run(block, x, both[1])
            return x, (kept, nnx.state(block, nnx.Intermediate))

        x, (kept, intermediates) = jax.lax.scan(body, x, (state, given))
        one = lambda number, tree: jax.tree.map(lambda array: array[number], tree)
        found += [one(number, kept) for number in range(stack.count)]
        nnx.update(stack.block, intermediates)
        for number, block in enumerate(alike):
            nnx.update(block, one(number, intermediates))
    return x, found
