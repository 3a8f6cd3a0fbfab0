"""The differentiation rule of INT8 attention: what each pass computes and what it keeps."""

import functools
from typing import Any, Protocol

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.sage_attention.masking import Masking

RESIDUALS = "sage_attention"
"""The name of what the backward pass needs, for `jax.checkpoint` policies."""


class Passes(Protocol):
    """A module with the two passes: `reference` or `mosaic_gpu`. See the former for the meaning."""

    def forward(
        self,
        options: Any,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None,
        masking: Masking,
        *,
        differentiated: bool,
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """Returns output, log-sum-exp (or None) and what `backward` needs."""
        ...

    def backward(
        self,
        options: Any,
        shapes: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
        residuals: Any,
        d_out: jax.Array,
        d_logsumexp: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Returns the gradients of query, key, value and bias."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    passes: Passes,
    options: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masking: Masking,
) -> tuple[jax.Array, jax.Array | None]:
    """Compute the output and the log-sum-exp; see `reference.forward` for the arguments."""
    inputs = (query, key, value, bias, masking)
    out, logsumexp, _ = passes.forward(options, *inputs, differentiated=False)
    return out, logsumexp


def _forward(passes, options, query, key, value, bias, masking):
    results = passes.forward(options, query, key, value, bias, masking, differentiated=True)
    out, logsumexp, residuals = jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), results)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (query, key, bias))
    return (out, logsumexp), (residuals, _Static(shapes))


def _backward(passes, options, saved, cotangents):
    residuals, shapes = saved[0], saved[1].value
    query, key, bias = shapes
    *d_inputs, d_bias = passes.backward(options, (query, key), residuals, *cotangents)
    if d_bias is not None:
        d_bias = d_bias[tuple(slice(size) for size in bias.shape)].astype(bias.dtype)
    return *d_inputs, d_bias, None


@jax.tree_util.register_static
class _Static:
    """Carries shapes from the forward rule to the backward rule as part of the tree structure."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return hash(str(self.value))

    def __eq__(self, other):
        return isinstance(other, _Static) and str(self.value) == str(other.value)


_attention.defvjp(_forward, _backward)

# Compiled as one program also where the caller does not.
attention = jax.jit(_attention, static_argnums=(0, 1))
