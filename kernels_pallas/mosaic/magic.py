"""Numbers beside 1.5 * 2**23, where float32 counts in ones.

Kernels read sums of int8 products as floats with MAGIC in excess (`mosaic.products`), and take it
away where they take away something else: `score * scale - (shift + MAGIC * scale)`. What is in
parentheses is rounded to a multiple of about `scale`, which is far less than what rounding Q and K
to int8 does, but more than a float's usual rounding. The reference does the same (`beside`).
"""

import jax

MAGIC = 12582912.0


def shorten(scale: jax.Array) -> jax.Array:
    """Rounds float32 to 22 bits, so that its product with MAGIC, which has two, is exact."""
    return (scale + 4.0 * scale) - 4.0 * scale  # the sum loses two or three bits


def beside(shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Rounds a float32 to what is left of it in `shift + MAGIC * scale`, for a shortened scale."""
    return (shift + MAGIC * scale) - MAGIC * scale
