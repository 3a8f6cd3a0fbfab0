"""INT8 attention on Hopper GPUs: what the kernels accept, how they are fed, what they give back."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.dispatch import not_hopper
from kernels_pallas.mosaic.team import SHARED_MEMORY
from kernels_pallas.sage_attention import backward_sm90, forward_sm90
from kernels_pallas.sage_attention.masking import Masking, Structure
from kernels_pallas.sage_attention.problem import TILE, Problem, round_up, team_for
from kernels_pallas.sage_attention.quantize_sm90 import Codes, Task, quantize_tiles
from kernels_pallas.sage_attention.reference import EMPTY_LOGSUMEXP
from kernels_pallas.sage_attention.segments import Segments, describe, match, reached
from kernels_pallas.sage_attention.tiling import Tiling
from kernels_pallas.sage_attention.tuning import Tuning
from kernels_pallas.varying import varying_like

_LARGEST_HEAD_DIM = 128
_LN2 = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when the program is compiled.

    Attributes:
        scale: factor on the scores, not negative.
        structure: causal mask and local window.
        smooth_values: subtract the mean value before quantization and add it to the output.
        smooth_keys: subtract the mean key before quantization.
        ragged_queries: whether lengths of the queries are given when the program runs.
        ragged_keys: the same for keys.
        return_logsumexp: whether the log-sum-exp is wanted.
        tiling: what shares a scale, from `tiling_for`.
        interpret: whether the kernels run in the interpreter.
        tuning: choices that change no result.
    """

    scale: float
    structure: Structure
    smooth_values: bool
    smooth_keys: bool
    ragged_queries: bool
    ragged_keys: bool
    segmented: bool
    return_logsumexp: bool
    tiling: Tiling
    interpret: bool
    tuning: Tuning = dataclasses.field(default_factory=Tuning)


def unsupported(head_dim: int, *, has_bias: bool, has_mask: bool, device: Any) -> str | None:
    """Says why a call cannot use the kernels; None if it can.

    Args:
        head_dim: of query, key and value.
        has_bias: whether a bias is given.
        has_mask: whether a mask is given.
        device: where the call runs; None in the interpreter.
    """
    if device is not None and (reason := not_hopper(device)):
        return reason
    flags = {"bias": has_bias, "mask": has_mask}
    given = " and ".join(name for name, on in flags.items() if on)
    if given:
        taken = "causal masks, local windows, lengths and segment ids"
        return f"it takes no {given}; {taken} it does take"
    if head_dim % 8 or head_dim > _LARGEST_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {_LARGEST_HEAD_DIM}, got {head_dim}"
    return None


def tiling_for(keys: int) -> Tiling:
    """Returns what shares a scale in the kernels: 256 keys, fewer in short sequences."""
    block_kv = 256 if keys > 128 else 128
    return Tiling(TILE, block_kv, gradient_block_kv=TILE, half_precision=True)


class Residuals(NamedTuple):
    """What the backward pass needs. Tokens of INT8 arrays are padded; heads come before them."""

    query: Codes
    key: Codes
    key_mean: jax.Array  # float32 (batch, kv_heads, head_dim)
    value: jax.Array  # 16 bits, smoothed if the options say so
    value_scale: jax.Array  # of its codes, float32 (batch, kv_heads, tiles)
    out: jax.Array  # of the values above
    logsumexp: jax.Array  # (batch, heads, padded queries), in units of log 2; +1e30: sees nothing
    query_length: jax.Array
    key_length: jax.Array
    segments: Segments | None


def forward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: None,
    masking: Masking,
    *,
    differentiated: bool = True,
) -> tuple[jax.Array, jax.Array | None, Residuals]:
    """Computes attention; arguments and results are those of `reference.forward`.

    Unless `differentiated`, the transposed copies that only `backward` needs are not made.
    """
    assert bias is None
    lengths = _lengths(options, query, key, masking)
    compute = functools.partial(_forward, options, differentiated)
    return _over_batches(compute)(query, key, value, lengths, masking.segments)


def _forward(options, differentiated, query, key, value, lengths, ids):
    problem, segments = _problem(options, query, key), None
    dtype, dim, padded = key.dtype, query.shape[-1], problem.head_dim
    queries = query.shape[1]
    query, key, value = (_pad(x, 3, padded) for x in (query, key, value))
    query_lengths = lengths[0] if problem.ragged_queries else None
    key_lengths = lengths[1] if problem.ragged_keys else None
    attended = None if key_lengths is None else _inside(key.shape[1], key_lengths)
    if ids is not None:
        matches = match(ids, lengths)
        segments = describe(ids, lengths, matches)
        attending = reached(matches[0], problem.left, problem.right)
        attended = reached(matches[1], problem.right, problem.left)
        query = _keep(query, attending)
    value = _keep(value, attended)
    key_mean, value_mean = _mean(key, attended), None
    if not options.smooth_keys:
        key_mean = jnp.zeros_like(key_mean)
    if ids is not None and attended is not None:
        # Lengths do not cut off what nobody sees among others, so it becomes zero this way.
        key = jnp.where(attended[..., None, None], key, key_mean[:, None].astype(dtype))
    if options.smooth_values:
        value_mean = _mean(value, attended)
        value = _keep(value - value_mean[:, None], attended)

    block_kv = options.tiling.block_kv
    query8, key8, value8 = _quantize(
        options,
        Task(query, TILE, transposed=differentiated, lengths=query_lengths),
        Task(key, block_kv, transposed=differentiated, mean=key_mean, lengths=key_lengths),
        Task(value, block_kv, plain=False),
    )
    tiles = forward_sm90.ForwardTiles(block_kv, _stages(options, _forward_bytes(problem, options)))
    results = forward_sm90.forward(
        problem,
        tiles,
        query8.plain,
        key8.plain,
        value8.transposed,
        (query8.scale, key8.scale, value8.scale),
        lengths,
        segments,
    )
    out, largest, total = varying_like(value, results)
    inside = _inside(largest.shape[2], lengths[0])[:, None]
    sees = inside & (total > 0)
    logsumexp = jnp.where(sees, largest + jnp.log2(jnp.where(sees, total, 1.0)), 1e30)
    # A row of NaN has seen something; the comparison above would hide it.
    logsumexp = jnp.where(inside & jnp.isnan(total), jnp.nan, logsumexp)
    value = _pad(value.astype(_product_dtype(dtype)), 1, problem.key_shape[1])
    residuals = Residuals(
        query8,
        key8,
        key_mean,
        value,
        value8.scale,
        out,
        logsumexp,
        lengths[0],
        lengths[1],
        segments,
    )
    result = out
    if value_mean is not None:
        seen = sees[:, :, : out.shape[1]].swapaxes(1, 2)[..., None]
        value_mean = jnp.repeat(value_mean, problem.group, axis=1)[:, None]
        result = jnp.where(seen, result + value_mean, result).astype(dtype)
    raw = None
    if options.return_logsumexp:
        raw = _raw_logsumexp(options, logsumexp, query, key_mean[:, None])
    return result[:, :queries, :, :dim], raw, residuals


def backward(
    options: Options,
    shapes: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    residuals: Residuals,
    d_out: jax.Array,
    d_logsumexp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Computes the gradients; arguments and results are those of `reference.backward`."""
    function = _over_batches(functools.partial(_backward, options, shapes))
    return *function(residuals, d_out, d_logsumexp), None


def _backward(options, shapes, residuals, d_out, d_logsumexp):
    batch = d_out.shape[0]
    query, key = (jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in shapes)
    problem = _problem(options, query, key)
    dim, x = query.shape[-1], residuals
    d_out = _pad(_pad(d_out, 3, problem.head_dim), 1, problem.query_shape[1])
    if problem.ragged_queries:
        d_out = _keep(d_out, _inside(d_out.shape[1], x.query_length))
    if problem.segmented:
        sees = ~(x.logsumexp[:, 0, : d_out.shape[1]] >= 1e30)  # alike for all heads
        d_out = _keep(d_out, sees)
    (d_out8,) = _quantize(options, Task(d_out, TILE, plain=False, other=x.out))
    delta, square = d_out8.products
    if d_logsumexp is not None:
        sees = x.logsumexp[:, :, : query.shape[1]].swapaxes(1, 2) < 1e30
        d_logsumexp = jnp.where(sees, d_logsumexp, 0.0)
        delta -= _pad(d_logsumexp.swapaxes(1, 2), 2, delta.shape[2])
    tile_bound = _score_gradient_bound(problem, square, x.value_scale, delta)
    bound = tile_bound.max(axis=-1)
    tiles = (*delta.shape[:2], -1, TILE)
    statistics = [
        x.logsumexp - backward_sm90.HALF_EXPONENT,
        delta / bound[..., None],
    ]
    operands = backward_sm90.Operands(
        query=x.query.plain,
        query_transposed=x.query.transposed,
        query_scale=x.query.scale,
        key=x.key.plain,
        key_transposed=x.key.transposed,
        key_scale=x.key.scale,
        value=x.value,
        d_out=d_out.astype(x.value.dtype),
        d_out_transposed=d_out8.transposed,
        d_out_scale=d_out8.scale,
        bound=bound,
        tile_bound=tile_bound,
        statistics=jnp.stack([row.reshape(tiles) for row in statistics], axis=3),
        query_length=x.query_length,
        key_length=x.key_length,
        segments=x.segments,
    )
    query_stages, key_stages = (_stages(options, size) for size in _backward_bytes(problem))
    gradients = varying_like(
        d_out,
        (
            backward_sm90.query_gradient(problem, operands, stages=query_stages),
            *backward_sm90.key_value_gradients(problem, operands, stages=key_stages),
        ),
    )
    d_query, d_key, d_value = gradients
    tokens = query.shape[1], key.shape[1], key.shape[1]
    if d_logsumexp is not None:
        # The log-sum-exp of unsmoothed keys is that of smoothed ones plus scale * q * mean(K).
        mean = jnp.repeat(x.key_mean, problem.group, axis=1)[:, None]
        shift = _pad(options.scale * d_logsumexp[..., None] * mean, 1, d_query.shape[1])
        d_query = (d_query + shift).astype(d_query.dtype)
    gradients = zip((d_query.astype(query.dtype), d_key, d_value), tokens, strict=True)
    return tuple(gradient[:, :count, :, :dim] for gradient, count in gradients)


def _score_gradient_bound(problem: Problem, square, value_scale, delta) -> jax.Array:
    """Returns `Operands.tile_bound`, (batch, heads, tiles of queries).

    |dP| is at most |dO| |V|, and |V| at most sqrt(head_dim) times its largest entry. The kernels
    divide dP - D by this bound, so that dS fits into float16.

    Args:
        problem: what is computed.
        square: |dO|², (batch, heads, queries).
        value_scale: of the values' codes, (batch, kv_heads, tiles).
        delta: D, like `square`.
    """
    # The factor allows for V being rounded to 16 bits, which the scale was not taken from.
    largest = value_scale.max(axis=-1) * (127.0 * 1.01 * problem.head_dim**0.5)
    largest = jnp.repeat(largest, problem.group, axis=1)[..., None]
    bound = jnp.sqrt(square) * largest + jnp.abs(delta)
    bound = bound.reshape(*delta.shape[:2], -1, TILE).max(axis=-1)
    # Where it is zero or not finite, any bound will do.
    exponent = jnp.frexp(jnp.where((bound > 0) & (bound < jnp.inf), bound, 1.0))[1]
    exponent = jnp.clip(exponent, -100, 100) - backward_sm90.DP_EXPONENT
    return jnp.ldexp(jnp.float32(1.0), exponent)


def _over_batches(function):
    """Lets `jax.vmap` add its axis to the batch, which leads every array in and out."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def rule(size, in_batched, *arrays):
        def merge(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = call(*jax.tree.map(merge, arrays, tuple(in_batched)))
        split = lambda x: x.reshape(size, -1, *x.shape[1:])
        return jax.tree.map(split, results), jax.tree.map(lambda x: True, results)

    return call


def _problem(options: Options, query, key) -> Problem:
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    left, right = _window(options.structure)
    # Without lengths it is known when compiling which queries and keys meet nobody.
    return Problem(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64 if head_dim <= 64 else 128,
        dtype=key.dtype,  # a traced scale makes a float32 query of a 16-bit one
        scale=options.scale,
        left=left,
        right=right,
        ragged_queries=options.ragged_queries
        or options.ragged_keys
        or (left is not None and keys + left < queries),
        ragged_keys=options.ragged_queries
        or options.ragged_keys
        or (right is not None and queries + right < keys),
        segmented=options.segmented,
        interpret=options.interpret,
        stagger=options.tuning.stagger,
    )


def _window(structure: Structure) -> tuple[int | None, int | None]:
    """Returns how far a query looks back and ahead."""
    left, right = structure.local_window_size or (None, None)
    return left, 0 if structure.is_causal else right


def _lengths(options: Options, query, key, masking: Masking) -> tuple[jax.Array, jax.Array]:
    """Returns how many queries attend to anything, and how many keys are attended to."""
    batch, (left, right) = query.shape[0], _window(options.structure)
    queries = jnp.broadcast_to(masking.query_lengths, (batch,))
    keys = jnp.broadcast_to(masking.key_lengths, (batch,))
    seen = keys if right is None else jnp.minimum(keys, queries + right)
    seeing = queries if left is None else jnp.minimum(queries, keys + left)
    return jnp.where(keys > 0, seeing, 0), jnp.where(queries > 0, seen, 0)


def _product_dtype(dtype) -> jnp.dtype:
    """Returns the 16-bit type in which dO·Vᵀ is computed."""
    return jnp.dtype(jnp.float16 if dtype == jnp.float16 else jnp.bfloat16)


def _mean(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Returns the mean of the tokens that are kept, float32 (batch, heads, head_dim)."""
    x, tokens, count = _keep(x, kept), x.shape[1], x.shape[1]
    if kept is not None:
        count = jnp.maximum(jnp.sum(kept, axis=1, dtype=jnp.float32), 1.0)[:, None, None, None]
    # In two steps: one alone would keep few of a GPU's processors busy.
    parts = x.reshape(x.shape[0], -1, math.gcd(tokens, 64), *x.shape[2:])
    sums = lax.optimization_barrier(jnp.sum(parts, axis=2, dtype=jnp.float32))
    return jnp.sum(sums / count, axis=1)


def _keep(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Zeroes tokens of (batch, tokens, heads, head_dim); kept: bool (batch, tokens), None: all."""
    return x if kept is None else jnp.where(kept[..., None, None], x, 0)


def _inside(tokens: int, lengths: jax.Array) -> jax.Array:
    """Returns which tokens are not padding, bool (batch, tokens)."""
    return jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads an axis with zeros."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _quantize(options: Options, *tasks: Task) -> Sequence[Codes]:
    """Quantizes tensors of any number of tokens, those of one dtype in one launch."""

    def pad(task):
        batch, tokens = task.x.shape[:2]
        x, lengths = _pad(task.x, 1, round_up(tokens, 8)), task.lengths
        if lengths is None and x.shape[1] != tokens:
            lengths = jnp.full((batch,), tokens, jnp.int32)  # the mean is not taken from padding
        return task._replace(x=x, lengths=lengths)

    codes: list[Any] = [None] * len(tasks)
    for dtype in {task.x.dtype: None for task in tasks}:
        chosen = [i for i, task in enumerate(tasks) if task.x.dtype == dtype]
        found = quantize_tiles([pad(tasks[i]) for i in chosen], interpret=options.interpret)
        for i, result in zip(chosen, found, strict=True):
            codes[i] = varying_like(tasks[i].x, result)
    return codes


def _raw_logsumexp(options: Options, logsumexp, query, key_mean) -> jax.Array:
    """Returns the log-sum-exp of the scores with unsmoothed keys, (batch, queries, heads)."""
    logsumexp = logsumexp[:, :, : query.shape[1]].swapaxes(1, 2)
    group = query.shape[2] // key_mean.shape[2]
    shift = jnp.sum(query.astype(jnp.float32) * jnp.repeat(key_mean, group, axis=2), axis=-1)
    raw = logsumexp * _LN2 + options.scale * shift
    return jnp.where(logsumexp >= 1e30, EMPTY_LOGSUMEXP, raw)


def _forward_bytes(problem: Problem, options: Options) -> tuple[int, int]:
    """Returns the shared memory of the forward kernel, without stages and of a stage."""
    rows = forward_sm90.TEAM.rows * problem.head_dim
    return rows * (1 + jnp.dtype(problem.dtype).itemsize) + 4096, (
        2 * options.tiling.block_kv * problem.head_dim
    )


def _backward_bytes(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the same for the two backward kernels."""
    rows, tile = team_for(problem.head_dim).rows * problem.head_dim, TILE * problem.head_dim
    size, other = jnp.dtype(problem.dtype).itemsize, 4096
    staging = 0 if size == 2 else size
    return (rows * (1 + 2 + size) + other, tile * (1 + 2 + 1)), (
        rows * (1 + 2 + staging) + other,
        tile * (1 + 2 + 1 + 1) + 8 * TILE,
    )


def _stages(options: Options, sizes: tuple[int, int]) -> int:
    """Returns how many stages are wanted and fit."""
    fixed, stage = sizes
    return min(options.tuning.stages, (SHARED_MEMORY - fixed) // stage)
