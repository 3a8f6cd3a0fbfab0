"""The public function: check the arguments, route, choose an implementation."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Implementation
from kernels_pallas.mosaic import interpreting
from kernels_pallas.operands import check_operands
from kernels_pallas.quantize import wide_dtype
from kernels_pallas.sparse_linear_attention import reference, vjp
from kernels_pallas.sparse_linear_attention.blocks import Blocks
from kernels_pallas.sparse_linear_attention.reference import GradientScores, Options
from kernels_pallas.sparse_linear_attention.router import block_means, block_scores, choose
from kernels_pallas.sparse_linear_attention.soft_topk import soft_topk_logits
from kernels_pallas.varying import varying_like

type Selection = Literal["hard", "soft"]
type ImplementationName = Literal["mosaic_gpu", "xla"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ON_ACCELERATORS = 2**29  # entries at once


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of `sparse_linear_attention` with its arguments in one form.

    Attributes:
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, heads, head_dim).
        value: shape of `key`.
        alpha: float32 (heads, query_blocks).
        routers: of queries and of keys.
        options: what is fixed when the program is compiled.
        temperature: of the soft choice; None: the choice is hard.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    alpha: jax.Array
    routers: tuple[jax.Array | None, jax.Array | None]
    options: Options
    temperature: float | None


def _xla(call: _Call) -> jax.Array:
    options, arrays = call.options, (call.query, call.key, call.value, call.alpha)
    if dispatch.device_of(call.query).platform != "cpu":
        options = dataclasses.replace(options, entries_at_once=_ON_ACCELERATORS)
    means = block_means(options.blocks, call.query, call.key)
    scores = block_scores(means, *call.routers)
    if call.temperature is None:
        return vjp.attention(
            reference, options, *arrays, choose(options.blocks, scores, means.keys)
        )
    logits = soft_topk_logits(scores, options.blocks.kept, call.temperature)
    return _soft(options, *arrays, logits, means.keys)


# Compiled as one program also where the caller does not.
_soft = jax.jit(reference.soft_forward, static_argnums=0)


def _mosaic_gpu(call: _Call) -> jax.Array:
    from kernels_pallas.sparse_linear_attention import mosaic_gpu

    return mosaic_gpu.attend(
        dataclasses.replace(call.options, interpret=interpreting()),
        *(call.query, call.key, call.value, call.alpha),
        call.routers,
    )


def _unsupported_mosaic_gpu(call: _Call) -> str | None:
    from kernels_pallas.sparse_linear_attention import mosaic_gpu

    if call.temperature is not None:
        return "it has no soft choice (selection='soft')"
    device = None if interpreting() else dispatch.device_of(call.query)
    return mosaic_gpu.unsupported(call.options, call.query, device)


# In order of preference for `implementation=None`.
_IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(_mosaic_gpu, _unsupported_mosaic_gpu),
    "xla": Implementation(_xla, lambda call: None),
}


def sparse_linear_attention(
    query: Float[ArrayLike, "*batch queries heads head_dim"],
    key: Float[ArrayLike, "*batch keys heads head_dim"],
    value: Float[ArrayLike, "*batch keys heads head_dim"],
    mixing_logits: Float[ArrayLike, "heads query_blocks"] | Float[ArrayLike, " heads"],
    *,
    query_router: Float[ArrayLike, "*heads head_dim head_dim"] | None = None,
    key_router: Float[ArrayLike, "*heads head_dim head_dim"] | None = None,
    kept_fraction: float = 0.05,
    block_q: int = 128,
    block_k: int = 64,
    selection: Selection = "hard",
    temperature: float = 0.1,
    scale: float | None = None,
    quantize: bool = True,
    gradient_scores: GradientScores = "exact",
    smooth_features: bool = True,
    implementation: ImplementationName | None = None,
) -> Array:
    r"""Softmax attention to a few blocks of keys, linear attention to all others, mixed.

    SLA2 (arXiv 2602.12675). A router compares the mean of each block of queries with that of each
    block of keys. The best `kept_fraction` of the blocks of keys get softmax attention, the others
    linear attention with the feature map softmax over the channels; a learnable ratio mixes the
    two: `alpha sparse + (1 - alpha) linear`, with `alpha = sigmoid(mixing_logits)`. Attention is
    not causal. No array of queries x keys is ever formed.

    Where the paper is silent or contradicts itself, this is what is done: the mixing ratio belongs
    to a head and a block of queries (or to a head); scores of the router are scaled by
    1/sqrt(head_dim) and not softmaxed; the feature map sees the keys less their mean. Unlike the
    paper, P·V is not quantized, only Q·Kᵀ is.

    Args:
        query: (batch, queries, heads, head_dim) or without batch; float32, bfloat16 or float16
            (float64 without `quantize`).
        key: (batch, keys, heads, head_dim), dtype of the query; any number of keys.
        value: shape and dtype of `key`.
        mixing_logits: float (heads, query_blocks), one for each head and block of queries, or
            (heads,). Differentiable.
        query_router: float (head_dim, head_dim) or (heads, head_dim, head_dim): the projection of
            the means of queries, `mean @ query_router`; None is the identity, the router of SLA.
            Differentiable with `selection="soft"`; the hard choice has no gradient.
        key_router: the same for keys.
        kept_fraction: share of the blocks of keys that get softmax attention, more than 0, at most
            1; `max(1, floor(kept_fraction * key_blocks))` blocks. With 1 this is full attention and
            the mixing ratio is taken as 1.
        block_q: queries in a block; the last one may be shorter.
        block_k: keys in a block.
        selection: "hard" takes the best blocks. "soft" (the paper's first training stage) weights
            them by SoftTop-k so that the routers have a gradient; it costs as much as full
            attention and quantizes nothing.
        temperature: of SoftTop-k.
        scale: factor on the scores of attention, 1/sqrt(head_dim) if None.
        quantize: compute the scores of the forward pass from INT8 codes of Q and K, with one scale
            a
            block, and the gradients as if nothing had been rounded: quantization-aware training.
        gradient_scores: "exact" computes the scores in the backward pass from Q and K, as the paper
            does; "int8" from the codes. Use that where scores are wide (a standard deviation above
            2): the scores of the two passes then agree.
        smooth_features: False gives the feature map the keys as they are, as SLA does.
        implementation: "mosaic_gpu" runs on Hopper GPUs, "xla" on every device. None picks the
            first that supports the call.

    Returns:
        The output, shape and dtype of `query`.

    Raises:
        ValueError: shapes, block sizes or options are not among those allowed.
        TypeError: a dtype is not among those allowed.
        NotImplementedError: the implementation asked for does not support the call.
    """
    call, batch_shape = _canonical(
        query,
        key,
        value,
        mixing_logits,
        query_router=query_router,
        key_router=key_router,
        kept_fraction=kept_fraction,
        block_q=block_q,
        block_k=block_k,
        selection=selection,
        temperature=temperature,
        scale=scale,
        quantize=quantize,
        gradient_scores=gradient_scores,
        smooth_features=smooth_features,
    )
    chosen, _ = dispatch.choose(_IMPLEMENTATIONS, call, implementation)
    out = _IMPLEMENTATIONS[chosen].run(call)
    return out.reshape(*batch_shape, *out.shape[1:])


def explain_sparse_linear_attention(
    query: Any,
    key: Any,
    value: Any,
    mixing_logits: Any,
    *,
    implementation: ImplementationName | None = None,
    **options: Any,
) -> str:
    """Says which implementation a call of `sparse_linear_attention` takes, and why.

    Args:
        query: as for `sparse_linear_attention`; a shape and dtype (`jax.ShapeDtypeStruct`) suffice.
        key: likewise.
        value: likewise.
        mixing_logits: likewise.
        implementation: as for `sparse_linear_attention`.
        **options: its other arguments.

    Returns:
        One line.

    Raises:
        ValueError, TypeError, NotImplementedError: what the call would raise.
    """
    found: list[tuple[str, dict[str, str]]] = []

    def trace(*arrays):
        call, _ = _canonical(*arrays, **options)
        found.append(dispatch.choose(_IMPLEMENTATIONS, call, implementation))

    jax.eval_shape(trace, query, key, value, mixing_logits)
    return dispatch.describe("sparse_linear_attention", *found[0])


def _canonical(
    query,
    key,
    value,
    mixing_logits,
    *,
    query_router=None,
    key_router=None,
    kept_fraction=0.05,
    block_q=128,
    block_k=64,
    selection="hard",
    temperature=0.1,
    scale=None,
    quantize=True,
    gradient_scores: GradientScores = "exact",
    smooth_features=True,
) -> tuple[_Call, tuple[int, ...]]:
    """Checks the arguments and brings them into one form; also returns the batch axes."""
    query, key, value, mixing_logits = map(jnp.asarray, (query, key, value, mixing_logits))
    _check_operands(query, key, value, quantize)
    for name, given, kind in (
        ("selection", selection, Selection),
        ("gradient_scores", gradient_scores, GradientScores),
    ):
        if given not in get_args(kind.__value__):
            allowed = " or ".join(map(repr, get_args(kind.__value__)))
            raise ValueError(f"{name} must be {allowed}, got {given!r}")
    if not 0 < kept_fraction <= 1:
        raise ValueError(f"kept_fraction must be more than 0 and at most 1, got {kept_fraction}")
    if min(block_q, block_k) < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    batch_shape = query.shape[:-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    heads, head_dim = query.shape[2:]
    blocks = Blocks(query.shape[1], key.shape[1], int(block_q), int(block_k), float(kept_fraction))
    wide = wide_dtype(query.dtype)
    routers = _check_routers((query_router, key_router), heads, head_dim, wide)
    options = Options(
        blocks=blocks,
        scale=head_dim**-0.5 if scale is None else float(scale),
        quantize=bool(quantize),
        gradient_scores=gradient_scores,
        smooth_features=bool(smooth_features),
    )
    # Devices of a mesh that share the ratio have different queries: their gradients add up.
    alpha = varying_like((query, key, value), _mixing_ratio(mixing_logits, heads, blocks, wide))
    soft = float(temperature) if selection == "soft" else None
    return _Call(query, key, value, alpha, routers, options, soft), batch_shape


def _check_operands(query, key, value, quantize):
    check_operands(query, key, value, _DTYPES)
    if query.dtype == jnp.float64 and quantize:
        raise TypeError("float64 cannot be quantized; pass quantize=False")
    same = (*query.shape[:-3], *query.shape[-2:]) == (*key.shape[:-3], *key.shape[-2:])
    if not same:
        raise ValueError(
            "query and key must agree in batch, heads and head_dim (there are no grouped-query "
            f"heads here), got {query.shape} and {key.shape}"
        )


def _check_routers(routers, heads, head_dim, dtype):
    allowed = ((head_dim, head_dim), (heads, head_dim, head_dim))
    found = []
    for name, router in zip(("query_router", "key_router"), routers, strict=True):
        if router is not None:
            router = jnp.asarray(router)
            if router.shape not in allowed:
                raise ValueError(
                    f"{name} must have shape {allowed[0]} or {allowed[1]}, got {router.shape}"
                )
            if not jnp.issubdtype(router.dtype, jnp.floating):
                raise TypeError(f"{name} must have a float dtype, got {router.dtype}")
            router = router.astype(dtype)
        found.append(router)
    return tuple(found)


def _mixing_ratio(logits, heads, blocks: Blocks, dtype):
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"mixing_logits must have a float dtype, got {logits.dtype}")
    whole = (heads, blocks.query_blocks)
    if logits.shape not in (whole, (heads,)):
        raise ValueError(
            f"mixing_logits must have shape (heads, query_blocks) = {whole} or (heads,) = "
            f"({heads},), got {logits.shape}; resize_mixing_logits takes them to another length"
        )
    alpha = jax.nn.sigmoid(logits.astype(dtype))
    return jnp.broadcast_to(alpha.reshape(heads, -1), whole)


@functools.partial(jax.jit, static_argnums=1)
def resize_mixing_logits(
    logits: Float[Array, "heads old_blocks"], query_blocks: int
) -> Float[Array, "heads query_blocks"]:
    """Interpolates mixing logits linearly over the blocks of queries, for another length.

    Args:
        logits: those of a model that was trained with `old_blocks` blocks of queries.
        query_blocks: how many there are now, `ceil(queries / block_q)`.

    Raises:
        ValueError: not two axes, or no blocks.
    """
    if logits.ndim != 2 or query_blocks < 1:
        raise ValueError(
            "logits must have shape (heads, blocks) and query_blocks be at least 1, got "
            f"{logits.shape} and {query_blocks}"
        )
    return jax.image.resize(logits, (logits.shape[0], query_blocks), "linear")
