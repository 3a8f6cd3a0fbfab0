"""Deep stacks of equal blocks, made and run so that compiling takes seconds at any depth."""

import itertools
from collections.abc import Callable, Iterable, Sequence
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


def scan_blocks(
    blocks: Iterable[nnx.Module], run: Callable[[Any, Array], Array], x: Array
) -> Array:
    """Runs blocks one after another in a loop over their weights, which are stacked first.

    Args:
        blocks: modules of one structure; what they keep in `nnx.Intermediate` is kept as usual.
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

    What the blocks of a loop have, weights and all of `own`, is stacked before it.

    Args:
        blocks: modules; what they keep in `nnx.Intermediate` is kept as usual.
        run: called with a block, x and what the block has for its own; returns the next x and
            something of its own. All are pytrees.
        x: what the first block gets.
        own: something for each block, of equal shapes where neighbours are alike; None: nothing.

    Returns:
        What the last block returns, and what each returns of its own.
    """
    blocks = list(blocks)
    own = [None] * len(blocks) if own is None else own
    found: list[Own] = []
    pairs = zip(blocks, own, strict=True)
    for graph, group in itertools.groupby(pairs, lambda pair: nnx.graphdef(pair[0])):
        alike, given = zip(*group, strict=True)
        states = [nnx.state(block) for block in alike]

        def body(x, both, graph=graph):
            block = nnx.merge(graph, both[0])
            x, kept = run(block, x, both[1])
            return x, (kept, nnx.state(block, nnx.Intermediate))

        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *zip(states, given, strict=True))
        x, kept = jax.lax.scan(body, x, stacked)
        for number, block in enumerate(alike):
            mine, intermediates = jax.tree.map(lambda array, i=number: array[i], kept)
            found.append(mine)
            nnx.update(block, intermediates)
    return x, found
