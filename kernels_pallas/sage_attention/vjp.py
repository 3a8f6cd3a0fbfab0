"""The differentiation rule of INT8 attention: what each pass computes and what it keeps."""

import functools

import jax

from kernels_pallas.sage_attention import reference
from kernels_pallas.sage_attention.masking import Masking


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    options: reference.Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masking: Masking,
) -> tuple[jax.Array, jax.Array]:
    """Compute the output and the log-sum-exp; see `reference.forward` for the arguments."""
    out, logsumexp, _ = reference.forward(options, query, key, value, bias, masking)
    return out, logsumexp


def _forward(options, query, key, value, bias, masking):
    out, logsumexp, residuals = reference.forward(options, query, key, value, bias, masking)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (query, key, bias))
    return (out, logsumexp), (residuals, _Static(shapes))


def _backward(options, saved, cotangents):
    residuals, shapes = saved[0], saved[1].value
    query, key, bias = shapes
    *d_inputs, d_bias = reference.backward(options, (query, key), residuals, *cotangents)
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
attention = jax.jit(_attention, static_argnums=(0,))
