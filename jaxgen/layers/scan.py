"""Deep stacks of equal blocks as a loop, so that compiling takes seconds at any depth."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


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
