"""Sparse-linear attention in plain jnp: the specification that the kernels are compared with.

SLA2 (arXiv 2602.12675). Of each block of queries i, some blocks of keys j are chosen. Softmax
attention looks at those, linear attention with the feature map phi (softmax over the channels) at
all others, and alpha mixes the two:

    O_i = alpha_i softmax(c Q_i Ks') V + (1 - alpha_i) (phi(Q_i) H_i) / (phi(Q_i) Z_i)
    H_i = sum over the j not chosen of h_j = phi(Ks_j)' V_j
    Z_i = sum over the same j of the column sums of phi(Ks_j)

where Ks is K less its mean over the tokens. With `quantize`, c Q Ks' is computed from INT8 codes,
one scale for a block of Q and of Ks, and the gradient is that of the unrounded function at the
quantized output (straight-through), in the precision of the inputs, as the paper trains it. P·V
stays in the precision of the inputs, where the paper has FP8: the product of a chosen block is
small beside what else is done for it, and V needs no second copy.

Everything is written for one head, and in it for one block of queries. They are visited one after
another, as many at once as `Options.entries_at_once` allows, so no array has queries x keys
entries.

Misprints of the algorithm in SLA and SLA2 that are put right here: dQ and dK need the factor c, and
the linear part of dV is added, not assigned.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.quantize import float_einsum, integer_einsum, quantize
from kernels_pallas.sparse_linear_attention.blocks import Blocks
from kernels_pallas.sparse_linear_attention.router import Routing
from kernels_pallas.varying import varying_like

type GradientScores = Literal["exact", "int8"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when the program is compiled.

    Attributes:
        blocks: how tokens are cut.
        scale: c, the factor on the scores.
        quantize: whether the scores of the forward pass come from INT8 codes.
        gradient_scores: whether the backward pass computes the scores from the inputs ("exact", as
            printed in the paper) or from the same codes ("int8").
        smooth_features: whether phi sees the keys less their mean (SLA2) or as they are (SLA).
        interpret: whether kernels run in the interpreter.
        entries_at_once: about how many numbers the largest intermediate array may hold. Many keep a
            GPU busy, few stay in the caches of a CPU.
    """

    blocks: Blocks
    scale: float
    quantize: bool = True
    gradient_scores: GradientScores = "exact"
    smooth_features: bool = True
    interpret: bool = False
    entries_at_once: int = 2**18


class Residuals(NamedTuple):
    """What the backward pass needs besides query, key, value, alpha and routing.

    Attributes:
        out: (batch, queries, heads, head_dim), dtype of the query.
        difference: output of the sparse branch less that of the linear one, like `out`.
        logsumexp: of the chosen scores, float32 (batch, heads, query_blocks, block_q).
    """

    out: jax.Array
    difference: jax.Array
    logsumexp: jax.Array


class _Head(NamedTuple):
    """Blocks of one head: query (I, q, D), key and value (J, s, D), alpha (I), and the choice."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    alpha: jax.Array
    chosen: jax.Array
    mask: jax.Array
    key_mean: jax.Array


def forward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: jax.Array,
    routing: Routing,
) -> tuple[jax.Array, Residuals]:
    """Computes attention with a hard choice of blocks.

    Args:
        options: the static options.
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, heads, head_dim).
        value: shape of `key`.
        alpha: float32 (heads, query_blocks), between 0 and 1.
        routing: the choice.

    Returns:
        The output, shape and dtype of `query`, and what the backward pass needs.
    """
    blocks = options.blocks
    heads = _heads(blocks, query, key, value, alpha, routing)
    portion = _Portion.of(options, blocks.kept * blocks.block_k, query.shape[-1])
    function = functools.partial(_forward, options, portion.rows)
    out, difference, logsumexp = _over_heads(function, heads, portion.heads)
    join = lambda x: blocks.join_queries(x).astype(query.dtype)
    return join(out), Residuals(join(out), join(difference), logsumexp)


def backward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: jax.Array,
    routing: Routing,
    residuals: Residuals,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of query, key, value and alpha; arguments as for `forward`."""
    blocks = options.blocks
    heads = _heads(blocks, query, key, value, alpha, routing)
    saved = (*map(blocks.split_queries, (residuals.out, residuals.difference)), residuals.logsumexp)
    d_out = blocks.split_queries(d_out)
    portion = _Portion.of(options, blocks.kept * blocks.block_k, query.shape[-1])
    d_query, d_key, d_value, d_alpha = _over_heads(
        lambda arguments: _backward(options, portion.rows, *arguments),
        (heads, saved, d_out),
        portion.heads,
    )
    return (
        blocks.join_queries(d_query).astype(query.dtype),
        blocks.join_keys(d_key).astype(key.dtype),
        blocks.join_keys(d_value).astype(value.dtype),
        jnp.sum(d_alpha, axis=0).astype(alpha.dtype),
    )


def soft_forward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: jax.Array,
    logits: jax.Array,
    key_mean: jax.Array,
) -> jax.Array:
    """Computes attention with a soft choice; differentiable in everything by JAX.

    The exponentials of a block are weighted by y = sigmoid(logits), its share in the linear branch
    by 1 - y. Where y is 0 or 1 this is `forward` without quantization.

    Args:
        options: the static options; nothing is quantized.
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, heads, head_dim).
        value: shape of `key`.
        alpha: float32 (heads, query_blocks).
        logits: float32 (batch, heads, query_blocks, key_blocks).
        key_mean: float32 (batch, heads, head_dim).
    """
    blocks = options.blocks
    routing = Routing(logits, logits, key_mean)
    heads = _heads(blocks, query, key, value, alpha, routing)
    portion = _Portion.of(options, blocks.keys, query.shape[-1])

    def head(x):
        kept, left = jax.nn.log_sigmoid(x.mask), jax.nn.sigmoid(-x.mask)
        smooth = _smooth(blocks, x)
        features = _Features.of(options, x, smooth, left)

        @jax.checkpoint
        def block(arguments):
            query, bias = arguments
            scores = options.scale * float_einsum("qd,jsd->qjs", query, smooth)
            scores = jnp.where(blocks.key_inside()[None], scores + bias[None, :, None], -jnp.inf)
            p = jax.nn.softmax(scores.reshape(len(query), -1), axis=-1).reshape(scores.shape)
            return float_einsum("qjs,jsd->qd", p.astype(query.dtype), x.value)

        sparse = lax.map(block, (x.query, kept), batch_size=portion.rows)
        return _mix(blocks, x.alpha, sparse, features.linear())[0]

    return blocks.join_queries(_over_heads(head, heads, portion.heads)).astype(query.dtype)


class _Portion(NamedTuple):
    """How many heads are computed at once, and how many blocks of queries in each."""

    heads: int
    rows: int

    @classmethod
    def of(cls, options: Options, keys: int, head_dim: int) -> "_Portion":
        """`keys` is how many keys a block of queries attends to."""
        blocks, most = options.blocks, options.entries_at_once
        linear = (blocks.query_blocks + blocks.key_blocks) * head_dim**2
        row = keys * (blocks.block_q + 2 * head_dim)
        rows = max(1, min(blocks.query_blocks, most // row))
        return cls(max(1, most // max(linear, rows * row)), rows)


def _heads(blocks: Blocks, query, key, value, alpha, routing) -> _Head:
    """Cuts everything into blocks, with leading axes (batch, heads)."""
    alpha = jnp.broadcast_to(alpha, (query.shape[0], *alpha.shape))
    key, value = blocks.split_keys(key), blocks.split_keys(value)
    return _Head(blocks.split_queries(query), key, value, alpha, *routing)


def _over_heads(function, arguments, together: int):
    """Applies a function to every head of every sequence, at most `together` of them at once."""
    batch, heads = jax.tree.leaves(arguments)[0].shape[:2]
    merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arguments)
    count = batch * heads
    sizes = [size for size in range(2, min(together, count) + 1) if count % size == 0]
    results = lax.map(function, merged, batch_size=sizes[-1] if sizes else None)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), results)


def _smooth(blocks: Blocks, x: _Head) -> jax.Array:
    """Returns the keys less their mean, float32, zero in the padding."""
    inside = blocks.key_inside()[..., None]
    return jnp.where(inside, x.key.astype(x.key_mean.dtype) - x.key_mean[None, None], 0)


class _Features(NamedTuple):
    """The linear branch: phi of queries (I, q, D) and keys (J, s, D), and sums over the rest."""

    query: jax.Array
    key: jax.Array
    h: jax.Array  # (I, D, E)
    z: jax.Array  # (I, D)
    denominator: jax.Array  # (I, q, 1)

    @classmethod
    def of(cls, options: Options, x: _Head, smooth: jax.Array, left: jax.Array) -> "_Features":
        """`left` (I, J) says how much of a block of keys the linear branch of queries sees."""
        wide, inside = smooth.dtype, options.blocks.key_inside()[..., None]
        query = jax.nn.softmax(x.query.astype(wide), axis=-1).astype(x.query.dtype)
        seen = smooth if options.smooth_features else x.key.astype(wide)
        key = jnp.where(inside, jax.nn.softmax(seen, axis=-1), 0).astype(x.key.dtype)
        h = float_einsum("ij,jde->ide", left, float_einsum("jsd,jse->jde", key, x.value))
        z = float_einsum("ij,jd->id", left, jnp.sum(key.astype(wide), axis=1))
        denominator = float_einsum("iqd,id->iq", query.astype(wide), z)[..., None]
        return cls(query, key, h, z, denominator)

    def linear(self) -> jax.Array:
        """Returns what the linear branch gives, (I, q, E)."""
        h = self.h.astype(self.query.dtype)
        # Without a block left all is zero.
        safe = jnp.where(self.denominator == 0, 1, self.denominator)
        return float_einsum("iqd,ide->iqe", self.query, h) / safe


def _mix(blocks, alpha, sparse, linear):
    """Returns output and difference of the branches; what is sparse alone where nothing is left."""
    if blocks.dense:
        return sparse, jnp.zeros_like(sparse)
    difference = sparse - linear
    return linear + alpha[:, None, None] * difference, difference


class _Scores(NamedTuple):
    """Computes the scores (q, t, s) of a block of queries and its t chosen blocks of keys."""

    options: Options
    query: jax.Array
    key: jax.Array
    query_scale: jax.Array | None = None
    key_scale: jax.Array | None = None

    @classmethod
    def of(cls, options: Options, x: _Head, smooth: jax.Array, *, integer: bool) -> "_Scores":
        if not integer:
            return cls(options, x.query.astype(smooth.dtype), smooth)
        query, key = (quantize(array, tile_axes=(1, 2)) for array in (x.query, smooth))
        return cls(options, query.codes, key.codes, query.scale, key.scale)

    def __call__(self, i: jax.Array, chosen: jax.Array) -> jax.Array:
        options = self.options
        product = integer_einsum("qd,jsd->qjs", self.query[i], self.key[chosen])
        scale = options.scale
        if self.query_scale is not None and self.key_scale is not None:
            query_scale, key_scale = self.query_scale[i][None], self.key_scale[chosen][None, ..., 0]
            scale = (options.scale * query_scale) * key_scale
        inside = jnp.asarray(options.blocks.key_inside())[chosen][None]
        return jnp.where(inside, scale * product, -jnp.inf)


def _forward(options: Options, rows: int, x: _Head):
    """Returns output and difference (I, q, D) and log-sum-exp (I, q) of a head."""
    blocks = options.blocks
    smooth = _smooth(blocks, x)
    scores = _Scores.of(options, x, smooth, integer=options.quantize)

    def block(arguments):
        i, chosen = arguments
        s_qjs = scores(i, chosen)
        largest = jnp.max(s_qjs, axis=(1, 2), keepdims=True)
        p_qjs = jnp.exp(s_qjs - largest)
        total = jnp.sum(p_qjs, axis=(1, 2))
        product = float_einsum("qjs,jsd->qd", p_qjs.astype(x.value.dtype), x.value[chosen])
        return product / total[:, None], largest[:, 0, 0] + jnp.log(total)

    ids = jnp.arange(blocks.query_blocks, dtype=jnp.int32)
    sparse, logsumexp = lax.map(block, (ids, x.chosen), batch_size=rows)
    features = _Features.of(options, x, smooth, 1 - x.mask.astype(smooth.dtype))
    out, difference = _mix(blocks, x.alpha, sparse, features.linear())
    return out, difference, logsumexp


def _backward(options: Options, rows: int, x: _Head, saved, d_out):
    """Returns gradients for a head: query (I, q, D), key and value (J, s, D), alpha (I)."""
    blocks = options.blocks
    smooth = _smooth(blocks, x)
    wide, narrow = smooth.dtype, x.query.dtype
    scores = _Scores.of(
        options, x, smooth, integer=options.quantize and options.gradient_scores == "int8"
    )
    out, difference, logsumexp = saved
    sum_with = lambda y: jnp.sum(d_out.astype(wide) * y.astype(wide), axis=-1, keepdims=True)
    d_alpha, along = sum_with(difference), sum_with(out)
    alpha = jnp.ones_like(x.alpha) if blocks.dense else x.alpha
    alpha = alpha[:, None, None]
    # rowsum(dOs Os) and rowsum(dOl Ol), from O and Os - Ol so that nothing cancels.
    sparse_delta = alpha * (along + (1 - alpha) * d_alpha)
    linear_delta = (1 - alpha) * (along - alpha * d_alpha)
    d_sparse = alpha * d_out.astype(wide)

    def block(i, chosen):
        key, value = smooth[chosen].astype(narrow), x.value[chosen]
        p_qjs = jnp.exp(scores(i, chosen) - logsumexp[i][:, None, None])
        dp_qjs = float_einsum("qd,jsd->qjs", d_sparse[i].astype(narrow), value)
        ds_qjs = (p_qjs * (dp_qjs - sparse_delta[i][:, None])).astype(narrow)
        d_query = options.scale * float_einsum("qjs,jsd->qd", ds_qjs, key)
        dk_jsd = options.scale * float_einsum("qjs,qd->jsd", ds_qjs, x.query[i])
        dv_jsd = float_einsum("qjs,qd->jsd", p_qjs.astype(narrow), d_sparse[i].astype(narrow))
        return d_query, jnp.stack([dk_jsd, dv_jsd], axis=1)

    def add(sums, arguments):
        chosen, terms = arguments  # no block is chosen twice
        return sums.at[chosen].add(terms, unique_indices=True), None

    def portion(sums, arguments):
        d_query, terms = jax.vmap(block)(*arguments)
        return lax.scan(add, sums, (arguments[1], terms))[0], d_query

    ids = jnp.arange(blocks.query_blocks, dtype=jnp.int32)
    zeros = jnp.zeros((len(smooth), 2, *smooth.shape[1:]), wide)
    zeros = varying_like((x, saved, d_out), zeros)
    sums, d_query = _scan_portions(portion, zeros, (ids, x.chosen), rows)
    d_key, d_value = sums[:, 0], sums[:, 1]
    d_alpha = jnp.sum(d_alpha, axis=(1, 2))
    if blocks.dense:
        return d_query, _less_mean(blocks, d_key), d_value, jnp.zeros_like(d_alpha)

    left = 1 - x.mask.astype(wide)
    features = _Features.of(options, x, smooth, left)
    d_linear = ((1 - alpha) * d_out.astype(wide)).astype(narrow)
    weighted = (features.query.astype(wide) / features.denominator).astype(narrow)
    d_h = float_einsum("iqd,iqe->ide", weighted, d_linear)
    d_z = -float_einsum("iqd,iq->id", weighted.astype(wide), linear_delta[..., 0])
    toward = float_einsum("iqe,ide->iqd", d_linear, features.h.astype(narrow))
    toward = (toward - linear_delta * features.z[:, None]) / features.denominator
    d_query += _softmax_gradient(features.query, toward)

    d_h = float_einsum("ij,ide->jde", left, d_h.astype(narrow).astype(wide)).astype(narrow)
    d_z = float_einsum("ij,id->jd", left, d_z)
    d_value += float_einsum("jsd,jde->jse", features.key, d_h)
    toward = float_einsum("jse,jde->jsd", x.value, d_h) + d_z[:, None]
    through_features = _softmax_gradient(features.key, toward)
    if options.smooth_features:
        d_key += through_features
        return d_query, _less_mean(blocks, d_key), d_value, d_alpha
    return d_query, _less_mean(blocks, d_key) + through_features, d_value, d_alpha


def _scan_portions(function, carry, arguments, rows: int):
    """Scans over portions of so many rows, of which the last may be smaller."""
    count = len(jax.tree.leaves(arguments)[0])
    whole = count - count % rows
    cut = lambda x: x[:whole].reshape(-1, rows, *x.shape[1:])
    carry, results = lax.scan(function, carry, jax.tree.map(cut, arguments))
    results = results.reshape(whole, *results.shape[2:])
    if whole < count:
        carry, rest = function(carry, jax.tree.map(lambda x: x[whole:], arguments))
        results = jnp.concatenate([results, rest])
    return carry, results


def _softmax_gradient(p: jax.Array, gradient: jax.Array) -> jax.Array:
    """Takes a gradient back through a softmax over the last axis that gave p."""
    p = p.astype(gradient.dtype)
    return p * (gradient - jnp.sum(p * gradient, axis=-1, keepdims=True))


def _less_mean(blocks: Blocks, d_smooth: jax.Array) -> jax.Array:
    """Takes a gradient back through K - mean(K); padding stays zero."""
    inside = jnp.asarray(blocks.key_inside())[..., None]
    mean = jnp.sum(d_smooth, axis=(0, 1)) / blocks.keys
    return jnp.where(inside, d_smooth - mean[None, None], 0)
