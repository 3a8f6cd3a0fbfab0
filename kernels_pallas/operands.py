"""What every attention asks of query, key and value."""

from collections.abc import Sequence

import jax


def check_operands(
    query: jax.Array, key: jax.Array, value: jax.Array, dtypes: Sequence[str]
) -> None:
    """Checks what needs no knowledge of the operation.

    Args:
        query: (batch, queries, heads, head_dim) or without batch.
        key: (batch, keys, heads, head_dim) or without batch.
        value: like `key`.
        dtypes: names of those allowed.

    Raises:
        TypeError: a dtype is not allowed, or they differ.
        ValueError: a rank or an empty axis, or shapes of key and value that differ.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype.name not in dtypes:
            raise TypeError(f"{name} must have dtype {', '.join(dtypes)}, got {x.dtype}")
        if x.ndim < 3 or min(x.shape) == 0:
            raise ValueError(
                f"{name} must have shape (batch, tokens, heads, head_dim) or (tokens, heads, "
                f"head_dim) with no axis of size 0, got {x.shape}"
            )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must have the same dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if key.shape != value.shape:
        raise ValueError(
            f"key and value must have the same shape, got {key.shape} and {value.shape}"
        )
