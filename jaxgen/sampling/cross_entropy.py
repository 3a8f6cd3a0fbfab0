"""Cross entropy of tokens without the logits of all positions at a time, each made once.

The gradient of a cross entropy is at hand as soon as its logits are: probabilities less one at the
target. So a gradient that is asked for is made in the forward pass, part by part, and no logits
are computed again (as in Liger Kernel, Hsu et al. 2024, arXiv:2410.10989).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.layers import float32_logits, logits_gradients
from kernels_pallas.varying import varying_like


def weighted_cross_entropy(
    hidden: Float[Array, "batch tokens width"],
    table: Float[Array, "first second"],
    targets: Int[Array, "batch tokens"],
    weights: Float[Array, "batch tokens"],
    *,
    axis: int = 1,
    chunk: int = 2048,
) -> Float[Array, ""]:
    """Sums weighted cross entropies; has no forward-mode derivative.

    Args:
        hidden: what the head takes, any float dtype.
        table: the head, of which `axis` is the width; `DecoderStack.output_table` returns both.
        targets: the right tokens, from 0 to vocabulary - 1.
        weights: of each position, float32.
        axis: 1 for embeddings (vocabulary, width), 0 for the kernel of a layer.
        chunk: about how many positions at a time, at least one of each row.
    """
    # Slopes of up to 256 fit float16, and few of them are too small for it.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights)))
    scale = jnp.where(largest > 0, largest / 256, 1.0)
    arrays = (hidden, table, weights / scale, targets.astype(jnp.int32))
    return scale * _sum(axis, chunk, *varying_like(arrays, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(
    axis: int, chunk: int, hidden: Array, table: Array, weights: Array, targets: Array
) -> Array:
    table = table.astype(hidden.dtype)  # once, not for every part

    def part(hidden: Array, targets: Array) -> Array:
        return _entropies(float32_logits(hidden, table, axis), targets)[0]

    return jnp.sum(weights * over_chunks(part, chunk, hidden, targets))


def _forward(
    axis: int, chunk: int, hidden: Array, table: Array, weights: Array, targets: Array
) -> tuple[Array, tuple[Array, ...]]:
    narrow = table.astype(hidden.dtype)

    def part(total: Array, arrays: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        hidden, weights, targets = arrays
        logits = float32_logits(hidden, narrow, axis)
        entropies, log_total = _entropies(logits, targets)
        right = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
        probabilities = jnp.exp(logits - log_total[..., None])
        slope = weights[..., None] * (probabilities - right.astype(jnp.float32))
        to_hidden, to_table = logits_gradients(slope, hidden, narrow, axis)
        return total + to_table, (to_hidden, entropies)

    parts = _count(hidden, chunk)
    pieces = tuple(_cut(array, parts) for array in (hidden, weights, targets))
    total, results = jax.lax.scan(part, jnp.zeros_like(table, dtype=jnp.float32), pieces)
    to_hidden, entropies = (_join(array, hidden.shape[1]) for array in results)
    # The table is kept for its dtype alone.
    return jnp.sum(weights * entropies), (to_hidden, total, entropies, table)


def _backward(axis: int, chunk: int, kept: tuple[Array, ...], slope: Array) -> tuple:
    del axis, chunk
    to_hidden, total, entropies, table = kept
    scaled = lambda array, dtype: (slope * array.astype(jnp.float32)).astype(dtype)
    to_table = scaled(total, table.dtype)
    return scaled(to_hidden, to_hidden.dtype), to_table, slope * entropies, None


_sum.defvjp(_forward, _backward)


def _entropies(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Cross entropies, and the logarithms of the sums of exponentials."""
    right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_total = jax.nn.logsumexp(logits, axis=-1)
    return log_total - right, log_total


def over_chunks(function: Callable, chunk: int, *arrays: Array):
    """Maps over parts of the tokens of all rows, the last ones padded.

    Neighboring tokens go to different parts, so that each part lies on all devices, as the arrays
    do, whether rows or tokens are divided between them.

    Args:
        function: takes a part of each array and returns arrays (batch, tokens, ...).
        chunk: about how many tokens of all rows a part has, at least one of each row.
        *arrays: (batch, tokens, ...).
    """
    parts, length = _count(arrays[0], chunk), arrays[0].shape[1]
    results = jax.lax.map(lambda x: function(*x), tuple(_cut(array, parts) for array in arrays))
    return jax.tree.map(lambda array: _join(array, length), results)


def _count(array: Array, chunk: int) -> int:
    """How many parts the tokens of all rows are."""
    rows, length = array.shape[:2]
    return min(length, -(-rows * length // chunk))


def _cut(array: Array, parts: int) -> Array:
    """Stacks parts of the tokens."""
    rows, length = array.shape[:2]
    missing = ((0, 0), (0, -length % parts), *((0, 0),) * (array.ndim - 2))
    padded = jnp.pad(array, missing)
    return jnp.moveaxis(padded.reshape(rows, -1, parts, *array.shape[2:]), 2, 0)


def _join(array: Array, length: int) -> Array:
    """Puts the tokens of stacked parts in order."""
    moved = jnp.moveaxis(array, 0, 2)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])[:, :length]
