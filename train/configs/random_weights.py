"""Models of random weights, for measuring time and memory: a step takes as long with any."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def with_random_weights[Module: nnx.Module](make: Callable[..., Module]) -> Module:
    """Return a module whose weights are all random, made on the device in their own dtype.

    Modules that start as the identity, or predict zero, do not here. Kernels keep the size of what
    they are applied to; whole numbers, which are settings, stay. Each array is made by a program of
    its own, since one for all would take long to compile; there are few shapes.

    Args:
        make: Called with `rngs`, without making arrays.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten_with_path(state)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in leaves]
    settings = [number for number, is_float in enumerate(floating) if not is_float]

    @jax.jit
    def usual() -> dict[int, jax.Array]:
        made = jax.tree.leaves(nnx.state(make(rngs=nnx.Rngs(0))))
        return {number: made[number] for number in settings}

    weights = usual() if settings else {}
    for number, (path, leaf) in enumerate(leaves):
        if number not in settings:
            around = 1.0 if "'scale'" in jax.tree_util.keystr(path) else 0.0
            size = 1 / math.sqrt(math.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.02
            weights[number] = normal(number, around, size, shape=leaf.shape, dtype=leaf.dtype)
    found = [weights[number] for number in range(len(leaves))]
    return nnx.merge(graph, jax.tree.unflatten(structure, found))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(
    seed: int,
    around: float = 0.0,
    size: float = 1.0,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Draw normal numbers on the device."""
    values = jax.random.normal(jax.random.key(seed), shape, dtype)
    return jnp.asarray(around, dtype) + jnp.asarray(size, dtype) * values
