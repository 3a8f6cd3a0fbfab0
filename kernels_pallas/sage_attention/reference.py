"""INT8 attention in plain jnp: the specification that every kernel is compared with.

Forward and backward of SageBwd (arXiv 2603.02170, Algorithms 1 and 2; their misprinted rescaling
factors are put right here). Of the seven matrix products in attention training six run in INT8;
only dP = dO·Vᵀ keeps the precision of its inputs, because its error is not averaged away.

The arrays are cut into tiles as `Tiling` says, which also says what shares a scale. Of P and dS the
backward pass quantizes, by default, each row where rows leave the product and each column where
columns do; the paper's Algorithm 2 has one scale for the tile. Tiles of keys are visited one after
another, so memory grows with queries x block_kv, never with queries x keys (smoothed queries need
tiles of queries x keys). Two runs give the same bits.

Shape suffixes: B batch, K key/value heads, G query heads per key/value head, I tiles of queries,
q queries of a tile, J tiles of keys, s keys of a tile, D head_dim.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.mosaic.magic import beside
from kernels_pallas.mosaic.rounding import sum_eights, to_half
from kernels_pallas.quantize import (
    INT8_MAX,
    Quantized,
    float_einsum,
    integer_einsum,
    quantize,
    subtract_mean,
)
from kernels_pallas.sage_attention.masking import (
    Masking,
    Structure,
    coverage,
    tile_of_keys,
    visible,
)
from kernels_pallas.sage_attention.tiling import Tiling, scale_of_scores
from kernels_pallas.varying import varying_like

# What a query that attends to nothing reports as its log-sum-exp: finite, as in jax.nn.
EMPTY_LOGSUMEXP = -0.7 * float(jnp.finfo(jnp.float32).max)
_LOG2_127 = math.log2(INT8_MAX)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when the program is compiled.

    Attributes:
        scale: factor on the scores, usually 1/sqrt(head_dim).
        structure: causal mask and local window.
        tiling: what shares a scale.
        product_dtype: of the operands of dP = dO·Vᵀ; None is that of the inputs.
        smooth_values: subtract the mean value before quantization and add it to the output.
        smooth_keys: subtract the mean key before quantization.
        smooth_queries: subtract the mean query of each tile before quantization.
        quantize: False computes exact attention by the same path, to separate error sources.
    """

    scale: float
    structure: Structure
    tiling: Tiling = dataclasses.field(default_factory=Tiling)
    product_dtype: Any = None
    smooth_values: bool = False
    smooth_keys: bool = True
    smooth_queries: bool = False
    quantize: bool = True

    @property
    def block_q(self) -> int:
        """Queries in a tile."""
        return self.tiling.block_q

    @property
    def block_kv(self) -> int:
        """Keys in a tile of the forward pass."""
        return self.tiling.block_kv

    @property
    def half_precision(self) -> bool:
        """Whether to round as the kernels do on the way to int8, see `Tiling`."""
        return self.tiling.half_precision and self.quantize

    @property
    def base(self) -> float:
        """Of exponentials; scores are in units of its logarithm. GPUs have instructions for 2."""
        return 2.0 if self.half_precision else math.e


class Residuals(NamedTuple):
    """What the backward pass needs: no 16-bit copy of Q or K, no INT8 copy of V."""

    query: Quantized  # BKGIqD, scale BKGI11; smoothed if the options say so
    query_mean: jax.Array | None  # BKGIqD with q = 1, float32; None if not subtracted
    mean_scores: jax.Array | None  # JBKGIs, its products with the smoothed keys, float32
    key: Quantized  # JBKsD, scale JBK11: tiles lead, to be scanned over
    key_mean: jax.Array  # BK1D, float32
    value: jax.Array  # JBKsD, in the dtype of V; smoothed if the options say so
    out: jax.Array  # BKGIqD, in the dtype of Q; of the values above
    # The log-sum-exp to `Options.base`, in two parts, both BKGIq1 float32, of scores with smoothed
    # keys. Added up, the second would be rounded away where a bias of -1e9 shifts a whole row.
    largest: jax.Array  # +inf where nothing is seen
    log_total: jax.Array
    bias: jax.Array | None
    masking: Masking


def forward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masking: Masking,
    *,
    differentiated: bool = True,
) -> tuple[jax.Array, jax.Array, Residuals]:
    """Compute attention and its log-sum-exp.

    Args:
        options: the static options.
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, kv_heads, head_dim).
        value: the shape and dtype of `key`.
        bias: (batch|1, heads|1, queries|1, keys|1) added to the scaled scores, or None.
        masking: who attends to whom.
        differentiated: whether the third result is needed; here it makes no difference.

    Returns:
        The output (batch, queries, heads, head_dim) in the dtype of the query, the log-sum-exp
        (batch, queries, heads) in float32, and what the backward pass needs.
    """
    del differentiated
    layout = _Layout.of(options, query, key)
    bias, masking = layout.pad_pairs(bias), layout.pad_masking(masking)
    attending, attended = coverage(
        masking, options.structure, layout.padded_queries, layout.padded_keys, options.block_kv
    )
    attending = layout.split_rows(attending[..., None])
    attended = layout.tile_keys(jnp.swapaxes(attended, 1, 2)[..., None], reduce_groups=True)

    query = jnp.where(attending, layout.tile_queries(query), 0)
    value = jnp.where(attended, layout.tile_keys(value), 0)
    value_mean, product_dtype = None, options.product_dtype or value.dtype
    if options.smooth_values:
        value, value_mean = subtract_mean(value, attended, token_axes=(0, 3))
    smooth_key, key_mean = subtract_mean(
        layout.tile_keys(key), attended, token_axes=(0, 3), enabled=options.smooth_keys
    )
    smooth_query, query_mean, mean_scores = query, None, None
    if options.smooth_queries:
        smooth_query, query_mean = subtract_mean(query, attending, token_axes=(4,))
        mean = query_mean[..., 0, :]
        mean_scores = options.scale * float_einsum("bkgid,jbksd->jbkgis", mean, smooth_key)
    quantized_query = quantize(smooth_query, tile_axes=(4, 5), enabled=options.quantize)
    quantized_key = quantize(smooth_key, tile_axes=(3, 4), enabled=options.quantize)
    quantized_value = quantize(value, tile_axes=(3, 4), enabled=options.quantize)

    log_base = math.log(options.base)
    exp = jnp.exp2 if options.half_precision else jnp.exp

    def visit(carry, tile):
        largest, total, out = carry
        start, key_tile, value_tile, mean_tile = tile
        products = quantized_query, key_tile, mean_tile
        s_BKGIqs, s_scale = _scores(
            options, layout, products, bias, masking, start, options.block_kv
        )
        tile_largest = jnp.max(s_BKGIqs, axis=-1, keepdims=True)
        new_largest = jnp.maximum(largest, tile_largest)
        # Relative to the largest score of its own row in this tile, P needs no search for its
        # scale and never overflows; a row without a visible key has P = 0.
        if options.half_precision:
            exact = _finite(tile_largest) - _LOG2_127
            shift = beside(exact, s_scale)
            p_BKGIqs, correction = to_half(jnp.exp2(s_BKGIqs - shift)), jnp.exp2(shift - exact)
            tile_total = sum_eights(p_BKGIqs) * to_half(correction)
            p_BKGIqs *= to_half(correction)
        else:
            p_BKGIqs = INT8_MAX * exp(s_BKGIqs - _finite(tile_largest))
            tile_total = jnp.sum(p_BKGIqs, axis=-1, keepdims=True)
        codes = jnp.round(p_BKGIqs).astype(jnp.int8) if options.quantize else p_BKGIqs
        pv = integer_einsum("bkgiqs,bksd->bkgiqd", codes, value_tile.codes)
        tile_weight = exp(tile_largest - _finite(new_largest)) / INT8_MAX
        keep = exp(largest - _finite(new_largest))
        total = keep * total + tile_weight * tile_total
        out = keep * out + (tile_weight * value_tile.scale[:, :, None, None]) * pv
        return (new_largest, total, out), None

    f32, rows = jnp.float32, (*query.shape[:-1], 1)
    start = (jnp.full(rows, -jnp.inf, f32), jnp.zeros(rows, f32), jnp.zeros(query.shape, f32))
    start = varying_like((query, key, value, bias, masking), start)
    tiles = (layout.key_starts, quantized_key, quantized_value, mean_scores)
    (largest, total, out), _ = lax.scan(visit, start, tiles)

    empty = total == 0
    out = out / jnp.where(empty, 1.0, total)
    log_total = jnp.log(jnp.where(empty, 1.0, total)) / log_base
    raw_logsumexp = log_base * (largest + log_total) + options.scale * _dot_mean(query, key_mean)
    residuals = Residuals(
        query=quantized_query,
        query_mean=query_mean,
        mean_scores=mean_scores,
        key=quantized_key,
        key_mean=key_mean,
        value=value.astype(product_dtype),
        out=out.astype(query.dtype),
        largest=jnp.where(empty, jnp.inf, largest),
        log_total=log_total,
        bias=bias,
        masking=masking,
    )
    raw_logsumexp = layout.join_rows(jnp.where(empty, EMPTY_LOGSUMEXP, raw_logsumexp))
    if value_mean is not None:
        out += jnp.where(empty, 0.0, value_mean[0, :, :, None, None])
    return layout.join_rows(out.astype(query.dtype)), raw_logsumexp[..., 0], residuals


def backward(
    options: Options,
    shapes: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    residuals: Residuals,
    d_out: jax.Array,
    d_logsumexp: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Compute the gradients of query, key, value and bias.

    The rounding in the quantizers is treated as the identity (straight-through). Rows of dS sum to
    zero, so smoothing keys needs no term of its own, neither in dQ nor in dK. Smoothed queries do:
    dK = dSᵀ (Q - mean) + (dSᵀ 1) meanᵀ (SageBwd, section 6).

    Args:
        options: the static options of the forward pass.
        shapes: shape and dtype of the query and of the key.
        residuals: the third result of `forward`.
        d_out: cotangent of the output.
        d_logsumexp: cotangent of the log-sum-exp.

    Returns:
        dQ, dK, dV in the dtypes of their inputs; the float32 gradient of the padded bias, or None.
    """
    query, key = shapes
    layout = _Layout.of(options, query, key)
    bias, masking = residuals.bias, residuals.masking
    empty = jnp.isposinf(residuals.largest)
    d_out = jnp.where(empty, 0, layout.tile_queries(d_out))
    d_lse = jnp.where(empty, 0.0, layout.tile_queries(d_logsumexp[..., None]))
    out = residuals.out.astype(jnp.float32)
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True) - d_lse
    quantized_d_out = quantize(d_out, tile_axes=(4, 5), enabled=options.quantize)
    query_scale = options.scale * residuals.query.scale

    # Axes 4 and 5 of a tile of P or dS are its queries and its keys.
    block, per_tile = options.tiling.gradient_block_kv, options.tiling.gradient_scales == "tile"
    over_queries = over_keys = (4, 5)
    if not per_tile:
        over_queries, over_keys = (4,), (5,)

    half = options.half_precision
    narrow = to_half if half else lambda x: x
    quantized = functools.partial(quantize, enabled=options.quantize, half_scales=half)

    def sum_over_queries(x_BKGIqs, codes, scale):
        x8 = quantized(x_BKGIqs, tile_axes=over_queries)
        product = integer_einsum("bkgiqs,bkgiqd->bkgisd", x8.codes, codes)
        return jnp.sum(jnp.swapaxes(x8.scale, 4, 5) * scale * product, axis=(2, 3))

    def visit(d_query, tile):
        start, key_tile, value_tile, mean_tile = tile
        products = residuals.query, key_tile, mean_tile
        s_BKGIqs, s_scale = _scores(options, layout, products, bias, masking, start, block)
        if half:
            logsumexp = beside(residuals.largest + residuals.log_total, s_scale)
            p_BKGIqs = to_half(jnp.exp2(s_BKGIqs - logsumexp))
        else:
            # The bound holds mathematically; it also has to where S is rounded differently.
            s_BKGIqs = jnp.minimum(s_BKGIqs - residuals.largest, 0.0)
            p_BKGIqs = jnp.exp(s_BKGIqs - residuals.log_total)
        d_value = sum_over_queries(p_BKGIqs, quantized_d_out.codes, quantized_d_out.scale)
        dp_BKGIqs = float_einsum("bkgiqd,bksd->bkgiqs", d_out.astype(value_tile.dtype), value_tile)
        ds_BKGIqs = narrow(p_BKGIqs * narrow(dp_BKGIqs - delta))
        ds8 = quantized(ds_BKGIqs, tile_axes=over_keys)
        key_scale = options.scale * key_tile.scale[:, :, None, None]
        d_query += (ds8.scale * key_scale) * integer_einsum(
            "bkgiqs,bksd->bkgiqd", ds8.codes, key_tile.codes
        )
        d_key = sum_over_queries(ds_BKGIqs, residuals.query.codes, query_scale)
        if residuals.query_mean is not None:
            d_key += options.scale * float_einsum(
                "bkgis,bkgid->bksd", jnp.sum(ds_BKGIqs, axis=4), residuals.query_mean[..., 0, :]
            )
        d_bias = None if bias is None else layout.reduce_to_bias(ds_BKGIqs, bias)
        return d_query, (d_key, d_value, d_bias)

    # The log-sum-exp of unsmoothed keys is that of smoothed ones plus scale · q · mean(K).
    d_query = options.scale * d_lse * residuals.key_mean[0, :, :, None, None]
    d_query = varying_like((residuals, d_out), jnp.broadcast_to(d_query, d_out.shape))
    parts, mean_scores = options.block_kv // block, residuals.mean_scores
    if mean_scores is not None:
        mean_scores = jnp.moveaxis(mean_scores.reshape(*mean_scores.shape[:-1], parts, block), 5, 1)
        mean_scores = mean_scores.reshape(-1, *mean_scores.shape[2:])
    tiles = (
        jnp.arange(0, layout.padded_keys, block, dtype=jnp.int32),
        jax.tree.map(lambda x: _split_tiles(x, parts), residuals.key),
        _split_tiles(residuals.value, parts),
        mean_scores,
    )
    d_query, (d_key, d_value, d_bias) = lax.scan(visit, d_query, tiles)
    return (
        layout.join_rows(d_query).astype(query.dtype),
        layout.join_keys(d_key).astype(key.dtype),
        layout.join_keys(d_value).astype(key.dtype),
        None if bias is None or d_bias is None else layout.join_bias(d_bias, bias),
    )


def _split_tiles(x, parts):
    """Cut every tile of JBKsD into parts; a scale (s of size one) is repeated."""
    if parts == 1:
        return x
    if x.shape[3] == 1:
        return jnp.repeat(x, parts, axis=0)
    tiles, batch, heads, block, dim = x.shape
    x = x.reshape(tiles, batch, heads, parts, block // parts, dim)
    return jnp.moveaxis(x, 3, 1).reshape(tiles * parts, batch, heads, block // parts, dim)


def _scores(options, layout, products, bias, masking, start, block):
    """Masked scores of all queries against one tile of smoothed keys, and the integers' scale.

    Both are float32, in units of the logarithm of `Options.base`. `products` are the queries, the
    tile of keys, and the scores of the mean queries that were subtracted, or None.
    """
    query, key_tile, mean_scores = products
    product = integer_einsum("bkgiqd,bksd->bkgiqs", query.codes, key_tile.codes)
    combine = scale_of_scores if options.half_precision else jnp.multiply
    query_scale = query.scale * (options.scale / math.log(options.base))
    scale = combine(query_scale, key_tile.scale[:, :, None, None])
    scores = scale * product
    if mean_scores is not None:
        scores += mean_scores[..., None, :] / math.log(options.base)
    if bias is not None:
        bias_tile = tile_of_keys(bias, start, block)
        scores += layout.split_rows(bias_tile.astype(jnp.float32) / math.log(options.base))
    allowed = visible(masking, options.structure, start, layout.padded_queries, block)
    return jnp.where(layout.split_rows(allowed), scores, -jnp.inf), scale


def _finite(largest):
    """Replace the -inf of rows that see nothing, so that exp(-inf - largest) is 0 and not NaN."""
    return jnp.where(jnp.isneginf(largest), 0.0, largest)


def _dot_mean(query, key_mean):
    """Product of every query with the mean key of its head, (..., q, 1)."""
    mean = key_mean[0, :, :, None, None]
    return jnp.sum(query.astype(jnp.float32) * mean, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Moves arrays between the public layout (batch, tokens, heads, head_dim) and tiles."""

    queries: int
    keys: int
    kv_heads: int
    group: int
    block_q: int
    block_kv: int

    @classmethod
    def of(cls, options, query, key):
        queries, heads = query.shape[1:3]
        keys, kv_heads = key.shape[1:3]
        return cls(queries, keys, kv_heads, heads // kv_heads, options.block_q, options.block_kv)

    @property
    def padded_queries(self):
        return -(-self.queries // self.block_q) * self.block_q

    @property
    def padded_keys(self):
        return -(-self.keys // self.block_kv) * self.block_kv

    @property
    def key_starts(self):
        """First key of every tile."""
        return jnp.arange(0, self.padded_keys, self.block_kv, dtype=jnp.int32)

    def tile_queries(self, x):
        """Reshape BTND to BKGIqD, padding T with zeros."""
        batch, _, _, dim = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.padded_queries - self.queries), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, self.block_q, self.kv_heads, self.group, dim)
        return x.transpose(0, 3, 4, 1, 2, 5)

    def join_rows(self, x):
        """Reshape BKGIqD to BTND, without the padding."""
        batch, dim = x.shape[0], x.shape[-1]
        x = x.transpose(0, 3, 4, 1, 2, 5).reshape(batch, -1, self.kv_heads * self.group, dim)
        return x[:, : self.queries]

    def tile_keys(self, x, *, reduce_groups=False):
        """Reshape BSKD to JBKsD, padding S with zeros; `reduce_groups`: "or" over query heads."""
        batch, tokens, heads, dim = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.padded_keys - tokens), (0, 0), (0, 0)))
        if reduce_groups and heads > 1:
            x = jnp.any(x.reshape(batch, -1, self.kv_heads, self.group, dim), axis=3)
        x = x.reshape(batch, -1, self.block_kv, x.shape[2], dim)
        return x.transpose(1, 0, 3, 2, 4)

    def join_keys(self, x):
        """Reshape JBKsD to BSKD, without the padding."""
        tiles, batch, heads, block, dim = x.shape
        return x.transpose(1, 0, 3, 2, 4).reshape(batch, tiles * block, heads, dim)[:, : self.keys]

    def split_rows(self, x):
        """Reshape a mask or bias (b, n, t, s) to BKGIqs; axes of size one stay of size one."""
        batch, heads, queries, keys = x.shape
        head_axes = (1, 1) if heads == 1 else (self.kv_heads, self.group)
        row_axes = (1, 1) if queries == 1 else (queries // self.block_q, self.block_q)
        return x.reshape(batch, *head_axes, *row_axes, keys)

    def pad_pairs(self, x):
        """Pad the queries and keys of a mask or bias that are not broadcast."""
        if x is None:
            return None
        rows = self.padded_queries - self.queries if x.shape[2] == self.queries else 0
        columns = self.padded_keys - self.keys if x.shape[3] == self.keys else 0
        return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, columns)))

    def pad_masking(self, masking):
        """Pad the mask and the segments; what the padding holds is cut off by the lengths."""
        segments = masking.segments
        if segments is not None:
            sizes = (self.padded_queries - self.queries, self.padded_keys - self.keys)
            pairs = zip(segments, sizes, strict=True)
            segments = tuple(jnp.pad(ids, ((0, 0), (0, size))) for ids, size in pairs)
        return masking._replace(mask=self.pad_pairs(masking.mask), segments=segments)

    def reduce_to_bias(self, ds_BKGIqs, bias):
        """Sum the gradient of one tile of scores over the broadcast axes of the bias."""
        target = self.split_rows(bias[..., :1]).shape[:-1]
        axes = [axis for axis, size in enumerate(target) if size == 1]
        if bias.shape[3] == 1:
            axes.append(5)
        return jnp.sum(ds_BKGIqs, axis=tuple(axes), keepdims=True)

    def join_bias(self, d_bias, bias):
        """Reshape the stacked tiles of the bias' gradient to the (unpadded) shape of the bias."""
        d_bias = jnp.sum(d_bias, axis=0) if bias.shape[3] == 1 else jnp.moveaxis(d_bias, 0, -2)
        return d_bias.reshape(bias.shape)
