"""What attention gets in each layer of a language model, and what INT8 costs it there.

INT8 attention is only as accurate as its operands let it be: SageBwd (arXiv:2603.02170, sections 4
to 6) finds that its errors grow with the root mean squares sigma of queries and keys, and that the
weakest tensor is dS, the gradient of the scores. Both change while a model learns. So a batch goes
forward and backward through the model; at each attention the queries, keys and values that it
really gets, and the gradient dO of its output that really comes back, are given to the attention
that is measured and to exact attention in float32.

Blocks are visited one after the other, as backpropagation does, and of a block one head after the
other: one block and the scores of one head need memory, and compiling does not depend on the depth.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from jaxgen.layers import AttentionName, Rotary, causal_attention
from jaxgen.models import LanguageModel
from jaxgen.sampling import weighted_cross_entropy
from train.metrics import JsonLines, Row

type Attend = Callable[..., Array]
"""Called as what `jaxgen.layers.causal_attention` returns."""

LARGE_SIGMA = 5.0
"""Of queries and keys; the gradients of INT8 attention are then off by about a fifth."""
TENSORS = ("output", "ds", "dq", "dk", "dv")
"""What is compared; dS before it is rounded for the products that make dQ and dK of it."""


class Operands(NamedTuple):
    """What one attention gets, in the dtypes that the model computes with.

    Attributes:
        query: after its norm and rotation.
        key: likewise.
        value: as it is multiplied.
        d_out: gradient of the loss with respect to the output.
    """

    query: Float[Array, "batch tokens heads head_dim"]
    key: Float[Array, "batch tokens key_heads head_dim"]
    value: Float[Array, "batch tokens key_heads head_dim"]
    d_out: Float[Array, "batch tokens heads head_dim"]


def attention_statistics(
    model: LanguageModel,
    batch: Mapping[str, ArrayLike],
    *,
    attention: AttentionName = "int8",
    across_documents: bool = False,
    chunk: int = 4096,
) -> list[dict[str, float]]:
    """Measure every layer of a model on one batch.

    The model runs with its own attention; see `layer_statistics` for what is measured.

    Args:
        model: On one device.
        batch: Of `train.corpus`: tokens, targets, weights, segment_ids, positions.
        attention: What is compared with exact attention.
        across_documents: Tokens attend to the documents before theirs, and positions count on.
        chunk: Positions whose logits are computed at a time.

    Returns:
        For each layer, from the first, numbers by name.
    """
    attend, measured = causal_attention(attention, **model.config.smoothing), []
    for operands, segment_ids in visit_attentions(
        model, batch, across_documents=across_documents, chunk=chunk
    ):
        found = _jitted_statistics(attend, operands, segment_ids)
        measured.append({name: float(value) for name, value in found.items()})
    return measured[::-1]


def visit_attentions(
    model: LanguageModel,
    batch: Mapping[str, ArrayLike],
    *,
    across_documents: bool = False,
    chunk: int = 4096,
) -> Iterator[tuple[Operands, Int[Array, "batch tokens"] | None]]:
    """Yield what the attention of each layer gets, from the last layer to the first.

    Args:
        model: As for `attention_statistics`.
        batch: Likewise.
        across_documents: Likewise.
        chunk: Likewise.

    Yields:
        `Operands`, and the segment ids (batch, tokens) that go with them, or None.
    """
    rows: dict[str, Array] = {name: jnp.asarray(value) for name, value in batch.items()}
    length = rows["tokens"].shape[1]
    positions = jnp.arange(length)[None] if across_documents else rows["positions"]
    segment_ids = None if across_documents else rows["segment_ids"]
    place = model.rotary(positions), segment_ids
    own = causal_attention(model.config.attention, **model.config.smoothing)

    blocks = [nnx.split(block) for block in model.blocks]
    inputs = [model.embed(rows["tokens"])]
    for graph, weights in blocks:
        inputs.append(_forward(graph, own, weights, inputs[-1], *place))
    gradient = _loss_gradient(*nnx.split(model), chunk, inputs.pop(), rows)
    for graph, weights in reversed(blocks):
        operands, gradient = _backward(graph, own, weights, inputs.pop(), *place, gradient)
        yield operands, segment_ids


def layer_statistics(
    attend: Attend, operands: Operands, segment_ids: Int[Array, "batch tokens"] | None
) -> dict[str, Float[Array, ""]]:
    """Measure one attention.

    Args:
        attend: What is compared with exact attention in float32. What it says dS is, is its
            gradient of a bias of zeros.
        operands: What it gets.
        segment_ids: Tokens of different numbers do not see each other.

    Returns:
        - `sigma_q`, `sigma_k`: root mean square of queries and keys.
        - `sigma_k_mean`: that of each head's mean key, which INT8 attention subtracts first.
        - `largest_score`: magnitude of the largest scaled score between tokens that see each other.
        - `output_error`, `ds_error`, `dq_error`, `dk_error`, `dv_error`: relative L2 errors.
        - `output_cosine`, ...: cosines between the measured and the exact tensors.
    """
    query, key = (x.astype(jnp.float32) for x in (operands.query, operands.key))
    found = {
        "sigma_q": _root_mean_square(query),
        "sigma_k": _root_mean_square(key),
        "sigma_k_mean": _root_mean_square(key.mean(1)),
    }
    heads = tuple(_one_head_each(x, key.shape[2]) for x in operands)
    ids = None if segment_ids is None else jnp.repeat(segment_ids, key.shape[2], axis=0)[:, None]
    head_statistics = lambda head: _head_statistics(attend, Operands(*head[0]), head[1])
    largest, products = jax.lax.map(head_statistics, (heads, ids))
    found["largest_score"] = largest.max()
    for name, (squares, exact_squares, difference_squares, product) in zip(
        TENSORS, products.sum(0), strict=True
    ):
        found[f"{name}_error"] = jnp.sqrt(difference_squares / exact_squares)
        found[f"{name}_cosine"] = product / jnp.sqrt(squares * exact_squares)
    return found


def write_statistics(
    path: Path,
    step: int,
    model: LanguageModel,
    batch: Mapping[str, np.ndarray],
    **options: Any,
) -> list[Row]:
    """Append a row for each layer to a file: `step`, `layer` from 0, and the numbers.

    Args:
        path: The file; rows of this step and later ones, of a run now resumed, are dropped.
        step: After how many updates.
        model: As for `attention_statistics`.
        batch: Likewise.
        **options: Likewise.

    Returns:
        The rows.
    """
    measured = attention_statistics(model, batch, **options)
    rows = [{"step": step, "layer": layer} | found for layer, found in enumerate(measured)]
    writer = JsonLines(path, step - 1)
    for row in rows:
        writer.write(row)
    writer.close()
    return rows


def warning_of(rows: Sequence[Row]) -> str | None:
    """Return what to tell the user if queries and keys are too large for INT8 in some layer."""
    worst = max(rows, key=lambda row: row["sigma_q"] * row["sigma_k"])
    sigma = (worst["sigma_q"] * worst["sigma_k"]) ** 0.5
    if not sigma > LARGE_SIGMA:
        return None
    return (
        f"step {worst['step']}: in layer {worst['layer']} queries and keys have grown to root mean "
        f"squares of {worst['sigma_q']:.1f} and {worst['sigma_k']:.1f}; with INT8 attention their "
        f"gradients are now off by {worst['dq_error']:.0%} and {worst['dk_error']:.0%}"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
    graph: Any,
    attend: Attend,
    weights: Any,
    x: Array,
    rotary: Rotary,
    segment_ids: Array | None,
) -> Array:
    """One block."""
    return nnx.merge(graph, weights)(x, rotary, functools.partial(attend, segment_ids=segment_ids))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _loss_gradient(
    graph: Any, weights: Any, chunk: int, x: Array, rows: Mapping[str, Array]
) -> Array:
    """The gradient of the loss with respect to the last block's output."""
    model: LanguageModel = nnx.merge(graph, weights)
    share = rows["weights"] / jnp.maximum(rows["weights"].sum(), 1.0)
    table, axis = model.output_table()

    def loss(x: Array) -> Array:
        hidden = model.final_norm(x)
        return weighted_cross_entropy(hidden, table, rows["targets"], share, axis=axis, chunk=chunk)

    return jax.grad(loss)(x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    graph: Any,
    attend: Attend,
    weights: Any,
    x: Array,
    rotary: Rotary,
    segment_ids: Array | None,
    gradient: Array,
) -> tuple[Operands, Array]:
    """What a block's attention gets, and the gradient of the block's input.

    dO is the gradient of zeros that are added to the output of attention.
    """
    block = nnx.merge(graph, weights)

    def run(x: Array, zeros: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        seen = []

        def probe(query: Array, key: Array, value: Array) -> Array:
            seen.append((query, key, value))
            return attend(query, key, value, segment_ids=segment_ids) + zeros

        return block(x, rotary, probe), seen[0]

    query = jax.eval_shape(block.attention.split, x, rotary)[0]
    zeros = jnp.zeros(query.shape, query.dtype)
    _, pullback, operands = jax.vjp(run, x, zeros, has_aux=True)
    d_x, d_out = pullback(gradient)
    query, key, value = operands
    return Operands(query, key, value, d_out), d_x


_jitted_statistics = jax.jit(layer_statistics, static_argnums=0)


def _head_statistics(
    attend: Attend, operands: Operands, segment_ids: Array | None
) -> tuple[Array, Array]:
    """The largest score, and for each tensor sums of which errors and cosines are made.

    These are sums of squares, of squares of the exact tensor and of the difference, and of
    products.
    """
    *inputs, d_out = operands
    tokens, heads = d_out.shape[1:3]
    bias = jnp.zeros((1, heads, tokens, tokens), jnp.float32)
    inside = lambda query, key, value, bias=None: attend(
        query, key, value, segment_ids=segment_ids, bias=bias
    )
    out, pullback = jax.vjp(inside, *inputs)
    dq, dk, dv = pullback(d_out)
    # A bias may keep the measured attention from its kernels: that call is for dS alone.
    ds = jax.vjp(inside, *inputs, bias)[1](d_out)[3]

    visible = jnp.tril(jnp.ones((tokens, tokens), bool))
    if segment_ids is not None:
        visible &= segment_ids[0, :, None] == segment_ids[0, None]
    full = [x.astype(jnp.float32) for x in inputs]
    exact = lambda query, key, value, bias: _exact(query, key, value, bias, visible)
    exact_out, pullback, scores = jax.vjp(exact, *full, bias, has_aux=True)
    exact_dq, exact_dk, exact_dv, exact_ds = pullback(d_out.astype(jnp.float32))

    pairs = zip(
        (out, ds, dq, dk, dv), (exact_out, exact_ds, exact_dq, exact_dk, exact_dv), strict=True
    )
    largest = jnp.max(jnp.where(visible, jnp.abs(scores), 0.0))
    return largest, jnp.stack([_products(x.astype(jnp.float32), y) for x, y in pairs])


def _exact(
    query: Array, key: Array, value: Array, bias: Array, visible: Array
) -> tuple[Array, Array]:
    """Attention to one head of keys as its definition reads, and the scores."""
    einsum = functools.partial(jnp.einsum, precision="highest")
    scores = einsum("btnd,bsd->bnts", query, key[:, :, 0]) / query.shape[-1] ** 0.5 + bias
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return einsum("bnts,bsd->btnd", weights, value[:, :, 0]), scores


def _products(x: Array, exact: Array) -> Array:
    pairs = (x, x), (exact, exact), (x - exact, x - exact), (x, exact)
    return jnp.stack([jnp.sum(one * other) for one, other in pairs])


def _one_head_each(x: Array, key_heads: int) -> Array:
    """Makes (batch * key_heads, 1, tokens, heads of a group, head_dim) of all heads."""
    batch, tokens, _, dim = x.shape
    grouped = jnp.moveaxis(x.reshape(batch, tokens, key_heads, -1, dim), 2, 1)
    return grouped.reshape(batch * key_heads, 1, tokens, -1, dim)


def _root_mean_square(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
