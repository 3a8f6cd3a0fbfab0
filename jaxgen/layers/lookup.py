"""Rows of an embedding table by number, with gradients that are sums in float32."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def look_up(
    table: Float[Array, "vocabulary width"], ids: Int[Array, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch width"]:
    """Returns rows of a table.

    A token that occurs often has the sum of many gradients, which 16 bits do not hold: after a few
    hundred addends of one sign, the next is rounded away. So rows are rounded, not the table.

    Args:
        table: one row a token, any float dtype.
        ids: numbers of rows; those that do not exist give NaN, as in `jnp.take`.
        dtype: of the result.
    """
    wide = table.astype(jnp.float32) if table.dtype.itemsize < 4 else table
    return jnp.take(wide, ids, axis=0).astype(dtype)
