"""Losses of masked diffusion language models: LLaDA, BD3-LM, SDAR, and RCD on top of each.

Tokens are masked at a random rate q, and the model predicts those that are. The cross entropy of a
masked token counts 1/q, which makes the sum a bound of the likelihood (LLaDA, arXiv:2502.09992,
equation 3). Models that see blocks get [noisy ; clean] (`jaxgen.layers.block_diffusion_attention`).

With `residual`, inputs at masked positions are mixed with what a frozen reference model predicts
there (RCD, arXiv:2601.22954, algorithm 1): one plain pass of that model, no unrolling. With
`own_passes` it is what the model itself predicts, without a gradient; with `learn_every_pass`
those passes have a loss, too.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from jaxgen.layers import block_diffusion_attention
from jaxgen.models.diffusion_lm import DiffusionLM
from jaxgen.models.fields import require_number, require_positive
from jaxgen.sampling.block_arguments import check_vocabulary
from jaxgen.sampling.block_decoder import Sight
from jaxgen.sampling.cross_entropy import over_chunks, weighted_cross_entropy
from jaxgen.sampling.residual_context import Residual, ResidualContext, mix_residual

Average = Literal["row", "token"]
_LEAST_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion:
    """How a diffusion language model is trained.

    Attributes:
        sight: "bidirectional" (LLaDA) or "block_causal" (BD3-LM, SDAR).
        block_length: tokens of a block, for "block_causal" and `rate_per_block`.
        rate_per_block: each block has a rate of its own (BD3-LM); otherwise each row (SDAR, LLaDA).
        average: "row" divides the loss of a row by its tokens, then averages over rows (LLaDA);
            "token" divides that of all rows by all tokens (SDAR, BD3-LM). Tokens are those that
            may be masked, masked or not.
        residual: how predictions are mixed into the inputs (RCD); None: they are not.
        stop_vector: no gradient to the table of embeddings through the vector of the residual.
            The paper's algorithm shows no such stop, which is the default.
        cold_share: share of the rows that are fed back nothing, as is the first step of a block
            decoded with `ResidualContext.init` "zero". Not in the paper, whose models learn with
            residuals alone (0); half is what self-conditioning takes (arXiv:2208.04202).
        own_passes: feed back what the model itself predicts, without a gradient, in up to so many
            passes one after the other; 0 is the paper's, what a reference predicts. Decoding feeds
            back the model's own predictions, too; self-conditioning (arXiv:2208.04202) learns with
            one pass. Rows begin with any of them, equally often.
        learn_every_pass: the loss is the mean over those passes and the last one, where the last
            one alone is the paper's. Every row takes all passes then, the first from nothing, and
            tokens that are masked for a pass alone are learned, too. A step costs as much as
            `own_passes` + 1 of a standard model.
        stale_share: up to this share of the known tokens of a row, drawn evenly for each row, are
            masked for the first of these passes, and fewer for each later one. When answers are
            decoded, what is fed back was predicted before the last tokens were settled; the paper's
            reference knows them (0).
        chunk: positions whose logits are computed at a time.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    sight: Sight = "block_causal"
    block_length: int = 32
    rate_per_block: bool = False
    average: Average = "token"
    residual: ResidualContext | None = None
    stop_vector: bool = False
    own_passes: int = 0
    learn_every_pass: bool = False
    cold_share: float = 0.0
    stale_share: float = 0.0
    chunk: int = 2048

    def __post_init__(self):
        for name, kind in {"sight": Sight, "average": Average}.items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        require_positive(self, "block_length", "chunk")
        for name in ("cold_share", "stale_share"):
            require_number(self, name, lambda x: 0 <= x <= 1, "from 0 to 1")
        passes = self.own_passes
        if not isinstance(passes, int) or isinstance(passes, bool) or passes < 0:
            raise ValueError(f"own_passes must be an int of at least 0, got {passes!r}")
        if self.own_passes and self.residual is None:
            raise ValueError(
                f"own_passes={passes} decides whose predictions are fed back, got residual=None"
            )
        if self.learn_every_pass and not self.own_passes:
            raise ValueError("learn_every_pass=True needs own_passes of at least 1, got 0")
        if self.residual is not None and self.residual.table != "exact":
            raise ValueError(
                f"training reads the exact table, got residual.table={self.residual.table!r}"
            )


class Noised(NamedTuple):
    """Tokens of which some are masked.

    Attributes:
        tokens: the mask's id where a token is masked.
        masked: True there.
        rate: probability with which each token was masked, float32.
    """

    tokens: Int32[Array, "batch tokens"]
    masked: Bool[Array, "batch tokens"]
    rate: Float[Array, "batch tokens"]


def mask_tokens(
    key: PRNGKeyArray,
    tokens: Int[Array, "batch tokens"],
    maskable: Bool[Array, "batch tokens"],
    mask_id: int,
    *,
    block_length: int | None = None,
) -> Noised:
    """Masks tokens at random rates, which are spread evenly over the batch.

    A rate is uniform in [1e-3, 1]. Those of different rows (or blocks) are a random one plus equal
    steps, modulo 1: each is uniform, and together they cover the range (BD3-LM, arXiv:2503.09573).

    Args:
        key: decides rates and masks.
        tokens: ids.
        maskable: False for tokens that stay, such as those of a prompt.
        mask_id: the mask token.
        block_length: each block of so many tokens has a rate of its own; None: each row.
    """
    rows, length = tokens.shape
    blocks = 1 if block_length is None else -(-length // block_length)
    shift_key, shuffle_key, mask_key = jax.random.split(key, 3)
    count = rows * blocks
    spread = (jax.random.uniform(shift_key) + jnp.arange(count) / count) % 1.0
    uniform = jax.random.permutation(shuffle_key, spread).reshape(rows, blocks)
    rate = _LEAST_RATE + (1.0 - _LEAST_RATE) * uniform
    rate = jnp.repeat(rate, block_length or length, axis=1)[:, :length]
    masked = maskable & (jax.random.uniform(mask_key, tokens.shape) < rate)
    return Noised(jnp.where(masked, mask_id, tokens).astype(jnp.int32), masked, rate)


def diffusion_lm_loss(
    key: PRNGKeyArray,
    model: DiffusionLM,
    tokens: Int[Array, "batch tokens"],
    maskable: Bool[Array, "batch tokens"],
    training: MaskedDiffusion,
    *,
    lengths: Int[Array, " batch"] | None = None,
    reference: DiffusionLM | None = None,
) -> Float[Array, ""]:
    """Returns the loss of one batch, float32.

    Args:
        key: decides which tokens are masked, for what is fed back, too, and which rows are cold.
        model: the model that is trained.
        tokens: ids; a prompt, an answer, and the ends of text that pad it.
        maskable: True for the tokens to learn: the answer and, in LLaDA and SDAR, its padding.
        training: how to train.
        lengths: tokens of each row; those after them are padding that nothing sees. None: all
            are seen. In "block_causal" rows, later blocks are not seen in any case.
        reference: the frozen model of RCD; it gets no gradient. None with `training.own_passes`.

    Raises:
        ValueError: a reference that `training` does not ask for or the reverse, or of another
            vocabulary; another shape of `maskable`; INT8 attention with "block_causal".
    """
    needed = training.residual is not None and not training.own_passes
    if (reference is not None) != needed:
        raise ValueError(
            f"training.residual={training.residual} with own_passes={training.own_passes} "
            f"{'needs a' if needed else 'takes no'} reference model"
        )
    if reference is not None:
        check_vocabulary(model.config, reference.config)
    if maskable.shape != tokens.shape:
        raise ValueError(f"maskable must have shape {tokens.shape}, got {maskable.shape}")
    if training.sight == "block_causal" and model.config.attention != "exact":
        raise ValueError(
            'the attention that trains sight="block_causal" is exact, got a model with '
            f"attention={model.config.attention!r}"
        )
    mask_id, length = model.config.mask_id, tokens.shape[1]
    block_length = training.block_length if training.rate_per_block else None
    noised = mask_tokens(key, tokens, maskable, mask_id, block_length=block_length)
    options: dict[str, Any] = {}
    if training.sight == "block_causal":
        attend = functools.partial(block_diffusion_attention, block_length=training.block_length)
        options = {"positions": jnp.tile(jnp.arange(length), 2)[None], "attend": attend}
    elif lengths is not None:
        options = {"mask": (jnp.arange(length)[None] < lengths[:, None])[:, None]}

    def states_of(predictor: DiffusionLM, noised: Noised, residual: Residual | None) -> Array:
        ids = noised.tokens
        if training.sight == "block_causal":
            ids = jnp.concatenate([ids, tokens.astype(ids.dtype)], axis=1)
        inputs = _inputs(model, ids, noised.masked, residual)
        return predictor.hidden(inputs, **options)[:, :length]

    def loss_of(states: Array, noised: Noised) -> Float[Array, ""]:
        weights = noised.masked.astype(jnp.float32) / noised.rate
        learned = maskable.astype(jnp.float32)
        if training.average == "row":
            weights /= jnp.maximum(learned.sum(axis=1, keepdims=True), 1.0) * len(tokens)
        else:
            weights /= jnp.maximum(learned.sum(), 1.0)
        table, axis = model.output_table()
        return weighted_cross_entropy(
            states, table, tokens, weights, axis=axis, chunk=training.chunk
        )

    residual, losses = None, []
    predictor = model if reference is None else reference
    for earlier, warm in _earlier_passes(key, noised, maskable, mask_id, training):
        states = states_of(predictor, earlier, residual)
        if training.learn_every_pass:
            losses.append(loss_of(states, earlier))
        residual = _predicted(jax.lax.stop_gradient(states), model, predictor, training)
        residual = residual._replace(weight=jnp.where(warm, residual.weight, 0.0))
    losses.append(loss_of(states_of(model, noised, residual), noised))
    return sum(losses[1:], losses[0]) / len(losses)


def _inputs(model: DiffusionLM, ids: Array, masked: Array, residual: Residual | None) -> Array:
    """The input of a pass: ids, or embeddings into which a residual of the first ones is mixed."""
    if residual is None:
        return ids
    length, embeddings = masked.shape[1], model.embed(ids)
    mixed = mix_residual(embeddings[:, :length], masked, residual)
    return embeddings.at[:, :length].set(mixed)


def _earlier_passes(
    key: PRNGKeyArray, noised: Noised, maskable: Array, mask_id: int, training: MaskedDiffusion
) -> list[tuple[Noised, Bool[Array, "batch 1"]]]:
    """What the passes whose predictions are fed back see, and which rows are fed them back.

    Each knows some tokens less than the one after it. If the last pass alone learns, equally many
    of the rows that are not cold begin with the first pass, the second, and so on.
    """
    if training.residual is None:
        return []
    rows, passes = len(noised.masked), max(training.own_passes, 1)
    cold_key, stale_key = (jax.random.fold_in(key, number) for number in (1, 2))
    share_key, token_key = jax.random.split(stale_key)
    share = training.stale_share * jax.random.uniform(share_key, (rows, 1))
    settled_at = jax.random.uniform(token_key, noised.masked.shape)
    start = jax.random.uniform(cold_key, (rows, 1))
    earlier = []
    for later in reversed(range(passes)):
        hidden = share * ((later + 1) / passes)
        unknown = maskable & (settled_at < hidden)
        tokens = jnp.where(unknown, mask_id, noised.tokens)
        rate = noised.rate + (1.0 - noised.rate) * hidden
        skipped = 0.0 if training.learn_every_pass else later / passes
        warm = start >= training.cold_share + (1 - training.cold_share) * skipped
        earlier.append((Noised(tokens, noised.masked | unknown, rate), warm))
    return earlier


def _predicted(
    states: Array, model: DiffusionLM, predictor: DiffusionLM, training: MaskedDiffusion
) -> Residual:
    """The residual of each position, from the predictor's states before its head."""
    settings, table = training.residual, model.input_table()
    assert settings is not None
    if training.stop_vector:
        table = jax.lax.stop_gradient(table)

    def part(states: Array) -> Residual:
        logits = jax.lax.stop_gradient(predictor.logits(states))
        return settings.residual(logits, table, model.config.mask_id)

    # Probabilities are computed again in the backward pass rather than kept.
    return over_chunks(jax.checkpoint(part), training.chunk, states)
