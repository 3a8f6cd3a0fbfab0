"""The differentiation rule of sparse-linear attention with a hard choice."""

import functools
from typing import Any, Protocol

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.sparse_linear_attention.router import Routing

RESIDUALS = "sparse_linear_attention"
"""The name of what the backward pass needs, for `jax.checkpoint` policies."""


class Passes(Protocol):
    """A module with the two passes: `reference` or `mosaic_gpu`. See the former for the meaning."""

    def forward(
        self,
        options: Any,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        alpha: jax.Array,
        routing: Routing,
    ) -> tuple[jax.Array, Any]:
        """Returns the output and what `backward` needs."""
        ...

    def backward(
        self,
        options: Any,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        alpha: jax.Array,
        routing: Routing,
        residuals: Any,
        d_out: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns the gradients of query, key, value and alpha."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    passes: Passes,
    options: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: jax.Array,
    routing: Routing,
) -> jax.Array:
    """Computes attention; see `reference.forward` for the arguments."""
    return passes.forward(options, query, key, value, alpha, routing)[0]


def _forward(passes, options, *inputs):
    out, residuals = passes.forward(options, *inputs)
    *_, routing = inputs
    name = lambda x: checkpoint_name(x, RESIDUALS)
    out, residuals, routing = jax.tree.map(name, (out, residuals, routing))
    return out, (*inputs[:-1], routing, residuals)


def _backward(passes, options, saved, d_out):
    return *passes.backward(options, *saved, d_out), None


_attention.defvjp(_forward, _backward)

# Compiled as one program also where the caller does not.
attention = jax.jit(_attention, static_argnums=(0, 1))
