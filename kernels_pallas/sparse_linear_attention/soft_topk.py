"""A differentiable choice of the t largest scores of a row: SoftTop-k (arXiv 2403.19969).

`y = sigmoid(u)` with `u = scores / temperature + shift`, where the shift of each row makes its y
add up to t. Small temperatures come close to the hard choice. The shift depends on the scores, so
it
has a derivative: with `v = y (1 - y)`, a gradient g of u becomes
`(g - v sum(g) / sum(v)) / temperature`. Treating the shift as a constant, which drops the second
term, gives a biased gradient that pushes on a sum which cannot change.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_STEPS = 40


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def soft_topk_logits(
    scores: Float[Array, "*rows n"], count: float, temperature: float = 0.1
) -> Float[Array, "*rows n"]:
    """Returns u of every score; `sigmoid(u)` of a row adds up to `count`.

    Args:
        scores: float32 or float64; scale them so that a difference of one means much.
        count: how many to choose of n, more than 0 and at most n. With n, every u is infinite.
        temperature: positive; 0.1 in SLA2 (arXiv 2602.12675).

    Raises:
        ValueError: count or temperature out of range.
    """
    return _solve(scores, count, temperature)


def _solve(scores, count, temperature):
    size = scores.shape[-1]
    if not 0 < count <= size:
        raise ValueError(f"count must be more than 0 and at most {size}, the scores, got {count}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if count == size:
        return jnp.full_like(scores, jnp.inf)
    x = scores / temperature
    reach = math.log(size / count) + 20.0
    low = -jnp.max(x, axis=-1, keepdims=True) - reach
    high = -jnp.min(x, axis=-1, keepdims=True) + reach

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = jnp.sum(jax.nn.sigmoid(x + middle), axis=-1, keepdims=True) >= count
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low, high = lax.fori_loop(0, _STEPS, halve, (low, high))
    return x + 0.5 * (low + high)


def _forward(scores, count, temperature):
    u = _solve(scores, count, temperature)
    return u, u


def _backward(count, temperature, u, gradient):
    if count == u.shape[-1]:
        return (jnp.zeros_like(u),)
    v = jax.nn.sigmoid(u) * jax.nn.sigmoid(-u)
    share = jnp.sum(gradient, axis=-1, keepdims=True) / jnp.sum(v, axis=-1, keepdims=True)
    return ((gradient - v * share) / temperature,)


soft_topk_logits.defvjp(_forward, _backward)
