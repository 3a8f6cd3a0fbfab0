"""Which token goes where, and which positions are settled at a step: two small frozen parts.

LLaDA (arXiv:2502.09992) settles a fixed number of tokens a step, the most confident ones or random
ones; Fast-dLLM (arXiv:2505.22618) and SDAR (arXiv:2510.06303) settle all above a threshold, at
least one. All of these are one rule: the quota's most confident positions, and those above the
threshold. Positions that are not masked are never touched, and neither rule can stall.
"""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from jaxgen.models.fields import require_number, require_positive

Confidence = Literal["max", "sampled", "raw"]
Order = Literal["confidence", "random", "sequential"]

_NEVER, _LAST = -2.0, -1.0  # below every probability


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Draws a token for every position. Numbers may be changed without compiling again.

    Attributes:
        temperature: of the draw; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens whose probabilities add up to this; None: from all.
        top_k: draw from this many likeliest tokens, more where some are equally likely; None: from
            all.
        confidence: how sure a draw is: "max", the largest probability of the prediction (algorithm
            2 of arXiv:2601.22954), of tokens that may be drawn; "raw", the probability of the drawn
            token (LLaDA); "sampled", the same after temperature, top_k and top_p (SDAR). Greedy,
            the first two agree.
        forbidden: tokens that are never drawn, besides the mask.
        deferred: tokens that are settled last, for example the end of the text, of which models
            are sure early.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    temperature: float | Array = 0.0
    top_p: float | Array | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    confidence: Confidence = dataclasses.field(default="max", metadata={"static": True})
    forbidden: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    deferred: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __post_init__(self):
        if self.confidence not in get_args(Confidence):
            allowed = ", ".join(get_args(Confidence))
            raise ValueError(f"confidence must be one of {allowed}, got {self.confidence!r}")
        require_number(self, "temperature", lambda x: 0 <= x < math.inf, "0 or more and finite")
        require_number(self, "top_p", lambda x: 0 < x <= 1, "above 0 and at most 1")
        if self.top_k is not None:
            require_positive(self, "top_k")

    def draw(
        self,
        logits: Float[Array, "tokens vocabulary"],
        key: PRNGKeyArray,
        mask_id: int,
    ) -> tuple[Int32[Array, " tokens"], Float[Array, " tokens"]]:
        """Draws the tokens of one row, and says how sure they are.

        Args:
            logits: of each position; what is not a number counts as the least likely.
            key: of this row and step.
            mask_id: the mask token, which is never drawn: its position would stay masked.

        Returns:
            Tokens, and their confidence, from 0 to 1, or below 0 for deferred tokens.
        """
        logits = _finite(logits.astype(jnp.float32))
        temperature = jnp.asarray(self.temperature, jnp.float32)
        out = (mask_id, *self.forbidden)

        def sampled_probability(kept: Array, tokens: Array) -> Array:
            asked = self.confidence == "sampled"
            return _probability(kept, tokens) if asked else jnp.zeros(len(kept), jnp.float32)

        def sample() -> tuple[Array, Array]:
            # `cond` may compute both branches: nothing is divided by zero in either.
            allowed = _without(logits, out)
            allowed -= allowed.max(axis=-1, keepdims=True)  # a tiny temperature may not overflow
            kept = self._restrict(allowed / jnp.where(temperature > 0, temperature, 1.0))
            # The largest of logits with Gumbel noise is a draw from their softmax.
            tokens = jnp.argmax(kept + jax.random.gumbel(key, kept.shape), axis=-1)
            return tokens.astype(jnp.int32), sampled_probability(kept, tokens)

        def greedy() -> tuple[Array, Array]:
            allowed = _without(logits, out)
            tokens = jnp.argmax(allowed, axis=-1)
            return tokens.astype(jnp.int32), sampled_probability(allowed, tokens)

        tokens, sampled = jax.lax.cond(temperature > 0, sample, greedy)
        match self.confidence:
            case "max":
                sure = _probability(logits, jnp.argmax(_without(logits, out), axis=-1))
            case "raw":
                sure = _probability(logits, tokens)
            case "sampled":
                sure = sampled
        if self.deferred:
            late = jnp.isin(tokens, jnp.array(self.deferred, jnp.int32))
            sure = jnp.where(late, _LAST, sure)
        return tokens, sure

    def _restrict(self, logits: Array) -> Array:
        """Makes tokens beyond top_k and top_p impossible; equally likely ones stay together."""
        if self.top_k is None and self.top_p is None:
            return logits
        size = logits.shape[-1]
        likeliest = jax.lax.top_k(logits, min(self.top_k or size, size))[0]
        least = likeliest[:, -1:]
        if self.top_p is not None:
            shares = jax.nn.softmax(likeliest, axis=-1)
            before = jnp.cumsum(shares, axis=-1) - shares
            inside = (before < self.top_p).at[:, 0].set(True)
            least = jnp.min(jnp.where(inside, likeliest, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unmasking:
    """Chooses the positions that are settled at a step.

    Attributes:
        threshold: settle every position that is surer than this, too; None: only the quota.
        steps: steps over which the tokens of a block are spread evenly, the first steps taking one
            more where it does not come out even; None: one token a step.
        order: the quota takes the most confident positions, "random" ones, or the first ones
            ("sequential").
        inclusive: a confidence that equals the threshold is enough (Fast-dLLM); SDAR wants more.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    threshold: float | Array | None = None
    steps: int | None = dataclasses.field(default=None, metadata={"static": True})
    order: Order = dataclasses.field(default="confidence", metadata={"static": True})
    inclusive: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        if self.order not in get_args(Order):
            allowed = ", ".join(get_args(Order))
            raise ValueError(f"order must be one of {allowed}, got {self.order!r}")
        if self.steps is not None:
            require_positive(self, "steps")
        require_number(self, "threshold", lambda x: 0 <= x <= 1, "from 0 to 1 or None")

    def settle(
        self,
        confidence: Float[Array, " tokens"],
        masked: Bool[Array, " tokens"],
        step: Int32[Array, ""],
        total: Int32[Array, ""],
        key: PRNGKeyArray,
    ) -> Bool[Array, " tokens"]:
        """Chooses among the masked positions of one row.

        Args:
            confidence: of each position; not a number is the least.
            masked: True where a token is not known.
            step: steps that this block had before.
            total: tokens that were masked at its first step.
            key: of this row and step.

        Returns:
            True where a token is settled: at least at one position if any is masked.
        """
        quota = jnp.int32(1)
        if self.steps is not None:
            quota = total // self.steps + (step < total % self.steps).astype(jnp.int32)
            quota = jnp.maximum(quota, 1)
        confidence = jnp.where(jnp.isnan(confidence), _LAST, confidence)
        match self.order:
            case "confidence":
                rating = confidence
            case "random":
                rating = jax.random.uniform(key, confidence.shape)
            case "sequential":
                rating = jnp.ones_like(confidence)  # the first of equal ones comes first
        rating = jnp.where(confidence < 0, confidence, rating)  # deferred tokens, in any order
        rating = jnp.where(masked, rating, _NEVER)
        # Ranks instead of a threshold, so that ties do not settle more than the quota.
        rank = jnp.argsort(jnp.argsort(-rating, stable=True), stable=True)
        settled = rank < quota
        if self.threshold is not None:
            sure = confidence >= self.threshold if self.inclusive else confidence > self.threshold
            settled |= sure
        return settled & masked


def _finite(logits: Array) -> Array:
    """Logits without infinities and numbers that are none, so that one can always be chosen."""
    largest = jnp.finfo(logits.dtype).max
    return jnp.where(jnp.isnan(logits), -largest, jnp.clip(logits, -largest, largest))


def _probability(logits: Array, tokens: Array) -> Array:
    """The probability of one token for each row of logits."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def _without(logits: Array, tokens: tuple[int, ...]) -> Array:
    """Logits with some tokens impossible; what reads them does that on the way, without a copy."""
    number = jnp.arange(logits.shape[-1])[None]
    out = functools.reduce(jnp.logical_or, [number == token for token in tokens])
    return jnp.where(out, -jnp.inf, logits)
