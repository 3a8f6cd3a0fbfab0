"""Sparse-linear attention on Hopper GPUs: what the kernels accept, how they are fed.

The sums over the blocks that are not chosen, H_i and Z_i, are one matrix product per head of the
mask with all h_j and z_j, as exact as its float32 sums at any sparsity; so is their gradient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.dispatch import not_hopper
from kernels_pallas.quantize import float_einsum
from kernels_pallas.sparse_linear_attention import backward_sm90, forward_sm90, prepare_sm90, vjp
from kernels_pallas.sparse_linear_attention.blocks import Blocks
from kernels_pallas.sparse_linear_attention.reference import Options
from kernels_pallas.sparse_linear_attention.router import (
    Means,
    block_scores,
    choose,
    mean_of_means,
)
from kernels_pallas.varying import varying_like

_BLOCK_Q, _BLOCK_K = 128, 64


def unsupported(options: Options, query: jax.Array, device: Any) -> str | None:
    """Says why a call cannot use the kernels; None if it can.

    Args:
        options: of the call.
        query: its query.
        device: where it runs; None in the interpreter.
    """
    blocks = options.blocks
    if device is not None and (reason := not_hopper(device)):
        return reason
    if query.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, got {query.dtype}"
    if query.shape[-1] not in (64, 128):
        return f"head_dim must be 64 or 128, got {query.shape[-1]}"
    if (blocks.block_q, blocks.block_k) != (_BLOCK_Q, _BLOCK_K):
        return (
            f"block_q and block_k must be {_BLOCK_Q} and {_BLOCK_K}, "
            f"got {blocks.block_q} and {blocks.block_k}"
        )
    if blocks.dense:
        return "it keeps all blocks of keys; that is full attention"
    if options.scale <= 0:  # the kernels find the largest score before they scale
        return f"scale must be positive, got {options.scale}"
    if options.quantize and options.gradient_scores != "exact":
        return f"it has no gradient_scores={options.gradient_scores!r}"
    return None


class Routing(NamedTuple):
    """The choice, see `router.Routing`, and the largest magnitude in each block of queries."""

    chosen: jax.Array
    mask: jax.Array
    key_mean: jax.Array
    query_largest: jax.Array


class Residuals(NamedTuple):
    """What the backward pass needs besides query, key, value, alpha and routing.

    Attributes:
        out: (batch, queries, heads, head_dim).
        difference: of the two branches, like `out`.
        logsumexp: in units of log 2, float32 (batch, heads, query_blocks * 128).
        h, z: sums over the blocks not chosen, see `forward_sm90.Operands`.
    """

    out: jax.Array
    difference: jax.Array
    logsumexp: jax.Array
    h: tuple[jax.Array, ...]
    z: jax.Array


def attend(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: jax.Array,
    routers: tuple[jax.Array | None, jax.Array | None],
) -> jax.Array:
    """Routes and computes attention; arguments as for `reference.forward`, and the routers."""
    query, key, value = (_pad(x, -x.shape[1] % 8) for x in (query, key, value))
    routing = route(options, *lax.stop_gradient((query, key)), routers)
    out = vjp.attention(_PASSES, options, query, key, value, alpha, routing)
    return out[:, : options.blocks.queries]


def route(options: Options, query, key, routers) -> Routing:
    """Returns the choice of `router.choose`."""
    sums = _alone(functools.partial(_sums, options))
    (by_query, query_largest), by_key = sums(query, key)
    blocks = options.blocks
    by_query /= _counts(blocks.query_inside())
    by_key /= _counts(blocks.key_inside())
    means = Means(by_query, by_key, mean_of_means(blocks, by_key))
    routing = choose(blocks, block_scores(means, *lax.stop_gradient(routers)), means.keys)
    return Routing(*routing, query_largest)


def _sums(options, query, key):
    interpret = options.interpret
    by_query = prepare_sm90.block_sums(query, _BLOCK_Q, interpret=interpret)
    by_key = prepare_sm90.block_sums(key, _BLOCK_K, interpret=interpret)[0]
    return varying_like((query, key), (by_query, by_key))


def _counts(inside):
    return jnp.asarray(inside.sum(axis=1), jnp.float32)[None, None, :, None]


def _forward(options, query, key, value, alpha, routing, *, differentiated=True):
    keys = prepare_sm90.prepare_keys(
        key,
        value,
        routing.key_mean,
        options.blocks.keys,
        quantize=options.quantize,
        smooth_features=options.smooth_features,
        interpret=options.interpret,
    )
    keys = varying_like((query, key), keys)
    h = _sum_rest("bhij,bhjx->bhix", routing.mask, keys.h)
    z = float_einsum("bhij,bhjd->bhid", 1 - routing.mask.astype(jnp.float32), keys.z)
    query_scale = key_scale = None
    if options.quantize:
        query_scale = jnp.maximum(routing.query_largest / 127.0, jnp.finfo(jnp.float32).tiny)
        query_scale = jnp.where(query_scale < jnp.inf, query_scale, jnp.nan)
        key_scale = jnp.broadcast_to(keys.scale[:, :, None], routing.mask.shape)
        key_scale = jnp.take_along_axis(key_scale, routing.chosen, axis=3)
    operands = forward_sm90.Operands(
        query,
        query_scale,
        keys.codes if options.quantize else key,
        key_scale,
        value,
        routing.chosen,
        h,
        z,
        alpha,
    )
    out, difference, largest, total = varying_like(
        query,
        forward_sm90.forward(
            operands,
            options.blocks.keys,
            options.scale,
            differentiated=differentiated,
            interpret=options.interpret,
        ),
    )
    if not differentiated:
        return out, None
    return out, Residuals(out, difference, largest + jnp.log2(total), h, z)


def _backward(options, query, key, value, alpha, routing, residuals, d_out):
    blocks, interpret = options.blocks, options.interpret
    wide = d_out.astype(jnp.float32)
    row_sum = lambda x: jnp.sum(wide * x.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    along, across = row_sum(residuals.out), row_sum(residuals.difference)
    rows = blocks.query_blocks * _BLOCK_Q
    along, across = (jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]))) for x in (along, across))
    d_alpha = jnp.sum(across.reshape(*across.shape[:2], -1, _BLOCK_Q), axis=(0, 3))
    ratio = jnp.repeat(alpha, _BLOCK_Q, axis=1)[None]
    # From O and O_s - O_l, so that nothing cancels.
    sparse_delta = along + (1 - ratio) * across
    linear_delta = (1 - ratio) * (along - ratio * across)
    found = backward_sm90.query_gradient(
        backward_sm90.QueryOperands(
            query,
            key,
            value,
            d_out,
            routing.chosen,
            residuals.logsumexp,
            sparse_delta,
            linear_delta,
            alpha,
            routing.key_mean,
            residuals.h,
            residuals.z,
        ),
        blocks.keys,
        options.scale,
        smoothed=options.quantize,
        interpret=interpret,
    )
    found = varying_like((query, d_out), found)
    d_z = float_einsum(
        "bhij,bhid->bhjd", 1 - routing.mask.astype(jnp.float32), jnp.sum(found.d_z, axis=3)
    )
    order, start, choosing = _transpose(blocks, routing)
    per_block = jnp.broadcast_to(alpha, (query.shape[0], *alpha.shape))
    operands = backward_sm90.KeyOperands(
        query,
        key,
        value,
        d_out,
        sparse_delta,
        routing.key_mean,
        found.logsumexp,
        order,
        start,
        choosing,
        jnp.take_along_axis(per_block, choosing, axis=2),
        d_z,
        found.d_h[0],
    )
    results, first = (), 0
    for d_h in _sum_rest("bhij,bhix->bhjx", routing.mask, found.d_h):
        heads = range(first, first + d_h.shape[1])
        results = backward_sm90.key_value_gradients(
            operands._replace(d_h=d_h),
            blocks.keys,
            options.scale,
            heads=heads,
            into=results,
            smooth_features=options.smooth_features,
            interpret=interpret,
        )
        first = heads.stop
    d_key, d_value, sums = varying_like((query, d_out), results)
    # Through K - mean(K).
    mean = (jnp.sum(sums, axis=2) / blocks.keys)[:, None]
    d_key = (d_key.astype(jnp.float32) - mean).astype(key.dtype)
    return found.d_query, d_key, d_value, d_alpha


def _transpose(blocks: Blocks, routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns which blocks of queries chose each block of keys; see `backward_sm90.KeyOperands`.

    The blocks of keys that most chose come first: they take longest.
    """
    ids = jnp.arange(blocks.query_blocks, dtype=jnp.int32)[None, None, :, None]
    pairs = routing.chosen * blocks.query_blocks + ids
    pairs = jnp.sort(pairs.reshape(*pairs.shape[:2], -1), axis=-1)
    counts = jnp.sum(routing.mask, axis=2, dtype=jnp.int32)
    start = jnp.pad(jnp.cumsum(counts, axis=-1), ((0, 0), (0, 0), (1, 0)))
    order = jnp.argsort(-counts, axis=-1).astype(jnp.int32)
    return order, start, pairs % blocks.query_blocks


def _sum_rest(subscripts, mask, groups):
    """Sums matrices (…, dim, dim) over the blocks that are not chosen, in groups of heads.

    Tensor cores accumulate in float32 all the same; a result asked for in float32 and rounded
    afterwards would lie in memory in both.
    """
    results, first = [], 0
    for x in groups:
        rest = 1 - mask[:, first : first + x.shape[1]].astype(x.dtype)
        flat = x.reshape(*x.shape[:3], -1)
        sums = jnp.einsum(subscripts, rest, flat)
        results.append(sums.reshape(*sums.shape[:3], *x.shape[3:]))
        first += x.shape[1]
    return tuple(results)


def _pad(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x


def _alone(function):
    """Lets `jax.vmap` call kernels once for every entry."""
    return jax.custom_batching.sequential_vmap(function)


class _Passes:
    """The two passes, as `vjp.Passes`."""

    def forward(self, options, *arrays):
        return _alone(functools.partial(_forward, options))(*arrays)

    def backward(self, options, *arrays):
        return _alone(functools.partial(_backward, options))(*arrays)


_PASSES = _Passes()
