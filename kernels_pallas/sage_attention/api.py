"""The public function: check the arguments, bring them into one form, choose an implementation."""

import dataclasses
import inspect
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Implementation
from kernels_pallas.mosaic import interpreting
from kernels_pallas.operands import check_operands
from kernels_pallas.sage_attention import reference, vjp
from kernels_pallas.sage_attention.masking import Masking, Structure
from kernels_pallas.sage_attention.tiling import Tiling
from kernels_pallas.sage_attention.tuning import tuning_for

type ImplementationName = Literal["mosaic_gpu", "xla"]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of `sage_attention` with its arguments in one form.

    Attributes:
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, kv_heads, head_dim).
        value: shape of `key`.
        bias: None or four axes, each of full size or of size one.
        masking: the traced half of the mask.
        structure: the static half.
        scale: factor on the scores.
        smooth_values: as given.
        smooth_keys: as given.
        smooth_queries: as given.
        return_residual: as given.
        has_lengths: whether lengths of the queries, and of the keys, were given.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    masking: Masking
    structure: Structure
    scale: float
    smooth_values: bool
    smooth_keys: bool
    smooth_queries: bool
    return_residual: bool
    has_lengths: tuple[bool, bool]


def _xla(call: _Call):
    options = reference.Options(
        scale=call.scale,
        structure=call.structure,
        smooth_values=call.smooth_values,
        smooth_keys=call.smooth_keys,
        smooth_queries=call.smooth_queries,
        tiling=Tiling.for_lengths(call.query.shape[1], call.key.shape[1]),
    )
    arrays = call.query, call.key, call.value, call.bias, call.masking
    return vjp.attention(reference, options, *arrays)


def _mosaic_gpu(call: _Call):
    from kernels_pallas.sage_attention import mosaic_gpu

    # The kernels find the largest score before they scale, so the sign belongs to the query.
    query, scale = (call.query, call.scale) if call.scale >= 0 else (-call.query, -call.scale)
    options = mosaic_gpu.Options(
        scale=scale,
        structure=call.structure,
        smooth_values=call.smooth_values,
        smooth_keys=call.smooth_keys,
        ragged_queries=call.has_lengths[0],
        ragged_keys=call.has_lengths[1],
        segmented=call.masking.segments is not None,
        return_logsumexp=call.return_residual,
        tiling=mosaic_gpu.tiling_for(call.key.shape[1]),
        interpret=interpreting(),
        tuning=tuning_for(dispatch.device_of(query).device_kind, query.shape[-1]),
    )
    arrays = query, call.key, call.value, None, call.masking
    return vjp.attention(mosaic_gpu, options, *arrays)


def _unsupported_mosaic_gpu(call: _Call) -> str | None:
    from kernels_pallas.sage_attention import mosaic_gpu

    if call.smooth_queries:
        return "it does not smooth queries"
    return mosaic_gpu.unsupported(
        call.query.shape[-1],
        has_bias=call.bias is not None,
        has_mask=call.masking.mask is not None,
        device=None if interpreting() else dispatch.device_of(call.query),
    )


# In order of preference for `implementation=None`.
_IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(_mosaic_gpu, _unsupported_mosaic_gpu),
    "xla": Implementation(_xla, lambda call: None),
}


def sage_attention(
    query: Float[ArrayLike, "*batch queries heads head_dim"],
    key: Float[ArrayLike, "*batch keys kv_heads head_dim"],
    value: Float[ArrayLike, "*batch keys kv_heads head_dim"],
    bias: Float[ArrayLike, "..."] | None = None,
    mask: Bool[ArrayLike, "..."] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, " batch"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, " batch"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: Int[ArrayLike, "*batch queries"] | None = None,
    key_value_segment_ids: Int[ArrayLike, "*batch keys"] | None = None,
    implementation: ImplementationName | None = None,
    return_residual: bool = False,
    smooth_values: bool = False,
    smooth_keys: bool = True,
    smooth_queries: bool = False,
    **flax_options: Any,
) -> Array | tuple[Array, Array]:
    r"""INT8 attention that trains: `softmax(scale · QKᵀ + bias) V` with quantized matrix products.

    SageBwd (arXiv 2603.02170): six of the seven matrix products of attention's forward and backward
    run in INT8 with one scale per tile; keys are smoothed by subtracting their mean, which softmax
    cannot see. On N(0, 1) inputs output and gradients have a relative error (L2) of about 0.02 at
    any length: in the backward pass each row or column of a tile of P and dS has a scale of its own
    where the paper's Algorithm 2 has one for the tile, which halves the error of the gradients.

    Signature and semantics are those of `jax.nn.dot_product_attention`, with these differences:
    a query that may attend to nothing gets zeros (there, the mean of all values); the residual is
    float32 and differentiable (there, cut off and rounded to the dtype of the keys); masked or
    padded positions may hold anything, NaN included.

    Args:
        query: (batch, queries, heads, head_dim) or without batch; float32, bfloat16 or float16.
            `heads` is a multiple of `kv_heads` (grouped-query attention).
        key: (batch, keys, kv_heads, head_dim), dtype of the query.
        value: shape and dtype of `key`.
        bias: at most 4-D, broadcastable to (batch, heads, queries, keys); added to the scaled
            scores. Differentiable.
        mask: bool, broadcastable like `bias`; True lets a query attend to a key.
        scale: factor on the scores, 1/sqrt(head_dim) if None. A JAX scalar is traced, so changing
            it does not recompile, and differentiable.
        is_causal: query t sees keys 0 … t. The first query aligns with the first key also if the
            numbers of queries and keys differ.
        query_seq_lengths: int (batch,); queries beyond it are padding and give zeros.
        key_value_seq_lengths: int (batch,); keys beyond it are padding and are not attended to.
        local_window_size: (left, right), or one int for both: query t sees keys t-left … t+right.
        query_segment_ids: int (batch, queries), the number of the document that each token of a
            packed sequence belongs to; a query attends to keys of its own number only.
        key_value_segment_ids: the same for the keys; both are given or none.
        implementation: "mosaic_gpu" runs on Hopper GPUs, without bias and mask and with a
            head_dim up to 128; "xla" runs on every device. None picks the first that supports the
            call, which `explain` tells.
        return_residual: also return the log-sum-exp of the scores, float32 (batch, queries, heads).
        smooth_values: quantize the values less their mean over the tokens, which is added to the
            output. Not in the paper. Use it where channels of the values have means far above
            their spread: without it the error of dQ and dK grows with that ratio.
        smooth_keys: quantize the keys less their mean over the tokens, of which softmax takes no
            notice. False is for experiments: channels with a mean far above their spread then use
            up the range of INT8.
        smooth_queries: quantize the queries less the mean of each tile of queries, whose product
            with the keys is added to the scores ("xla" only). For experiments: the paper finds no
            gain in training.
        **flax_options: the keywords that `nnx.MultiHeadAttention` hands to its `attention_fn`.
            `dtype` casts the operands; dropout, sown weights and custom einsums are refused;
            `precision` and what concerns dropout only have no effect.

    Returns:
        The output, shape and dtype of `query`; or (output, log-sum-exp).

    Raises:
        ValueError: shapes, lengths, windows or the implementation are not among those allowed.
        TypeError: a dtype or a keyword is not among those allowed.
        NotImplementedError: the implementation asked for does not support the call, or dropout or
            sown attention weights were asked for through Flax.
    """
    call, batch_shape = _canonical(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        return_residual=return_residual,
        smooth_values=smooth_values,
        smooth_keys=smooth_keys,
        smooth_queries=smooth_queries,
        flax_options=flax_options,
    )
    chosen, _ = dispatch.choose(_IMPLEMENTATIONS, call, implementation)
    out, logsumexp = _IMPLEMENTATIONS[chosen].run(call)
    out = out.astype(call.value.dtype).reshape(*batch_shape, *out.shape[1:])
    if return_residual:
        assert logsumexp is not None
        return out, logsumexp.reshape(*batch_shape, *logsumexp.shape[1:])
    return out


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    implementation: ImplementationName | None = None,
    **options: Any,
) -> str:
    """Says which implementation a call of `sage_attention` takes, and why not a preferred one.

    Args:
        query: as for `sage_attention`; a shape and dtype (`jax.ShapeDtypeStruct`) suffice.
        key: likewise.
        value: likewise.
        bias: likewise.
        mask: likewise.
        implementation: as for `sage_attention`.
        **options: the other arguments of `sage_attention`.

    Returns:
        One line, such as "sage_attention runs as 'xla', not as 'mosaic_gpu': it needs …".

    Raises:
        ValueError, TypeError, NotImplementedError: what the call would raise.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(_canonical).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "flax_options"
    }
    flax_options = {name: options[name] for name in options if name not in defaults}
    known = {name: options[name] for name in options if name in defaults}
    found: list[tuple[str, dict[str, str]]] = []

    def choose(*arrays):
        call, _ = _canonical(*arrays, **known, flax_options=flax_options)
        found.append(dispatch.choose(_IMPLEMENTATIONS, call, implementation))

    jax.eval_shape(choose, query, key, value, bias, mask)
    ((chosen, reasons),) = found
    return dispatch.describe("sage_attention", chosen, reasons)


def _canonical(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    return_residual=False,
    smooth_values=False,
    smooth_keys=True,
    smooth_queries=False,
    flax_options,
) -> tuple[_Call, tuple[int, ...]]:
    """Checks the arguments and brings them into one form; also returns the batch axes."""
    if flax_options:
        mask, query, key, value = _accept_flax(flax_options, mask, query, key, value)
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    _check_operands(query, key, value)
    batch_shape = query.shape[:-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    batch, queries, heads, head_dim = query.shape
    keys = key.shape[1]
    full = (batch, heads, queries, keys)

    if bias is not None:
        bias = _check_broadcast("bias", jnp.asarray(bias), full)
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias must have a float dtype, got {bias.dtype}")
    if mask is not None:
        mask = _check_broadcast("mask", jnp.asarray(mask), full)
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be bool (use bias for an additive mask), got {mask.dtype}")
    masking = Masking(
        mask,
        _check_lengths("query_seq_lengths", query_seq_lengths, batch, queries),
        _check_lengths("key_value_seq_lengths", key_value_seq_lengths, batch, keys),
        _check_segments(
            (query_segment_ids, key_value_segment_ids),
            ((*batch_shape, queries), (*batch_shape, keys)),
        ),
    )
    structure = Structure(bool(is_causal), _check_window(local_window_size, queries + keys))
    scale = _check_scale(scale, head_dim)
    if isinstance(scale, jax.Array):
        query = query.astype(jnp.float32) * scale.astype(jnp.float32)
        scale = 1.0
    call = _Call(
        query,
        key,
        value,
        bias,
        masking,
        structure,
        scale,
        bool(smooth_values),
        bool(smooth_keys),
        bool(smooth_queries),
        bool(return_residual),
        (query_seq_lengths is not None, key_value_seq_lengths is not None),
    )
    return call, batch_shape


def _check_operands(query, key, value):
    check_operands(query, key, value, _DTYPES)
    if query.shape[:-3] != key.shape[:-3] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in batch and head_dim, got {query.shape} and {key.shape}"
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key/value heads, got "
            f"{query.shape[-2]} and {key.shape[-2]}"
        )


def _check_broadcast(name, x, full):
    """Give a bias or mask four axes, each of size one or of the full size."""
    if x.ndim <= 4:
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        if all(size in (1, whole) for size, whole in zip(x.shape, full, strict=True)):
            return x
    raise ValueError(
        f"{name} must be broadcastable to (batch, heads, queries, keys) = {full}, got {x.shape}"
    )


def _check_lengths(name, lengths, batch, tokens):
    """Lengths as int32 (batch|1,); values are checked where they are known."""
    if lengths is None:
        return jnp.full((1,), tokens, jnp.int32)
    if not isinstance(lengths, Tracer):
        lengths = np.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must have shape (batch,) = ({batch},), got {lengths.shape}")
    if isinstance(lengths, np.ndarray) and (lengths.min() < 0 or lengths.max() > tokens):
        raise ValueError(f"{name} must lie in [0, {tokens}], got {lengths.tolist()}")
    # Values that are only known when the program runs cannot raise; they are cut off.
    return jnp.clip(jnp.asarray(lengths, jnp.int32), 0, tokens)


def _check_segments(segments, shapes):
    """Segment ids as int32 (batch, tokens)."""
    names = ("query_segment_ids", "key_value_segment_ids")
    given = [ids is not None for ids in segments]
    if not any(given):
        return None
    if not all(given):
        raise ValueError(
            f"{names[0]} and {names[1]} must be given together, got only {names[given.index(True)]}"
        )
    checked = []
    for name, ids, shape in zip(names, segments, shapes, strict=True):
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"{name} must hold integers, got {ids.dtype}")
        if ids.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {ids.shape}")
        checked.append(ids.astype(jnp.int32).reshape(-1, shape[-1]))
    return tuple(checked)


def _check_window(window, widest):
    """The window as two ints, cut off where it is wider than everything."""
    if window is None:
        return None
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2 or not all(_is_integer(side) for side in sides):
        raise TypeError(f"local_window_size must be an int or (left, right) ints, got {window!r}")
    if min(sides) < 0:
        raise ValueError(f"local_window_size must not be negative, got {tuple(sides)}")
    return min(int(sides[0]), widest), min(int(sides[1]), widest)


def _check_scale(scale, head_dim):
    """The scale as a Python float, or as a JAX scalar that is traced."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, jax.Array):
        if scale.ndim or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise ValueError(
                f"scale must be a float scalar, got {scale.dtype} of shape {scale.shape}"
            )
        return scale
    if isinstance(scale, int | float | np.number | np.ndarray) and np.ndim(scale) == 0:
        return float(scale)
    raise ValueError(f"scale must be a number or a float scalar, got {scale!r}")


def _is_integer(value):
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _accept_flax(options, mask, query, key, value):
    """Apply the keywords of Flax's attention_fn protocol; refuse those with an effect."""
    known = {
        "dropout_rng", "dropout_rate", "broadcast_dropout", "deterministic", "dtype",
        "precision", "module", "promote_dtype", "out_sharding", "qk_attn_weights_einsum",
        "attn_weights_value_einsum", "force_fp32_for_softmax",
    }  # fmt: skip
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"sage_attention() got an unexpected keyword argument {unknown[0]!r}")
    if options.get("dropout_rate", 0.0) and not options.get("deterministic", False):
        raise NotImplementedError(
            f"sage_attention has no attention dropout, got dropout_rate={options['dropout_rate']} "
            "with deterministic=False; use dropout_rate=0"
        )
    if options.get("module") is not None:
        raise NotImplementedError(
            "sage_attention never forms the attention weights, so it cannot sow them"
        )
    for name in ("qk_attn_weights_einsum", "attn_weights_value_einsum"):
        if options.get(name) is not None:
            raise NotImplementedError(f"sage_attention has its own matrix products, got {name}")
    if options.get("dtype") is not None:
        query, key, value = (jnp.asarray(x).astype(options["dtype"]) for x in (query, key, value))
    if mask is not None:
        mask = jnp.asarray(mask).astype(jnp.bool_)  # Flax's mask helpers make float masks
    return mask, query, key, value
