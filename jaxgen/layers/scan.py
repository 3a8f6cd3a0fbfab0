"""Deep stacks of equal blocks, made and run so that compiling takes seconds at any depth."""

from collections.abc import Callable, Iterable
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
    graphs, states = zip(*map(nnx.split, blocks), strict=True)
    if any(graph != graphs[0] for graph in graphs):
        raise ValueError("scan needs blocks that are alike, these have different structures")

    def body(x, state):
        block = nnx.merge(graphs[0], state)
        x = run(block, x)
        return x, nnx.state(block, nnx.Intermediate)

    x, kept = jax.lax.scan(body, x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *states))
    for number, block in enumerate(blocks):
        nnx.update(block, jax.tree.map(lambda array, i=number: array[i], kept))
    return x
