"""The noise that sampling starts from: of a clip or picture, not of the batch it is drawn in."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


@functools.partial(jax.jit, static_argnames="shape")
def draw_normal(
    seeds: UInt32[Array, "batch"], indices: UInt32[Array, "batch"], *, shape: tuple[int, ...]
) -> Float[Array, "batch *shape"]:
    """Draw float32 standard normal noise, each row from its own seed and index.

    Args:
        seeds: Seed of each row.
        indices: Position of each row among those of its seed; see `arguments.seeds_and_indices`.
        shape: Of one row.
    """

    def one(seed, index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.normal(key, shape, dtype=jnp.float32)

    return jax.vmap(one)(seeds, indices)
