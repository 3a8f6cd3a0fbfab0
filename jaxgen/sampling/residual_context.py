"""Residual Context Diffusion: what a discarded prediction already knew, fed back to the next step.

"Residual Context Diffusion Language Models", arXiv:2601.22954v2. A diffusion language model commits
the tokens it is sure of and forgets its predictions for the others. Here each position that is
still masked gets, at the next step, a mix of the embedding of the mask and of the average embedding
under its prediction (equations 1 to 3):

    vector = sum over tokens j of p[j] * E[j]
    weight = entropy(p) / log(vocabulary)
    input  = (1 - weight) * E[mask] + weight * vector

E is the table of input embeddings, not the head. A sure prediction has no entropy and stays at the
mask; nothing is added on top, so inputs keep their size. There are no parameters.

Both are computed in float32 in tiles of the vocabulary, without an array of probabilities beside
the logits. On GPUs there is one, in the dtype of the table: tiles of the table would be copied.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, PRNGKeyArray

from jaxgen.models.fields import require_number

Weighting = Literal[
    "entropy", "confidence", "fixed", "one", "one_minus_entropy", "one_minus_confidence"
]
Source = Literal["full", "top1"]
Init = Literal["zero", "self", "reference", "dirichlet"]
TableName = Literal["exact", "int8"]

_TILE = 8192


class Int8Table(NamedTuple):
    """Embeddings as 8-bit integers, each row with a scale of its own.

    Attributes:
        codes: from -127 to 127.
        scale: of each row, float32; codes times scale are the embeddings, to 0.4 % of the largest.
    """

    codes: Int8[Array, "vocabulary width"]
    scale: Float[Array, " vocabulary"]


type Table = Float[Array, "vocabulary width"] | Int8Table


class Residual(NamedTuple):
    """What is fed back to masked positions; a pytree.

    Attributes:
        weight: share of `vector` in the input, from 0 to 1, float32.
        vector: average embedding under the prediction, float32.
    """

    weight: Float[Array, "*batch"]
    vector: Float[Array, "*batch width"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidualContext:
    """How predictions are fed back. Numbers but `restart` change without compiling again.

    Attributes:
        temperature: softens (above 1) or sharpens the prediction whose entropy is the weight
            ("T_res"); positive. Weights by confidence are of the tempered prediction, too; which
            tokens are committed is not.
        weighting: "entropy" as above; the others are the paper's ablations (figure 5):
            "confidence" (largest probability), "fixed", "one", and one minus the first two.
        fixed_weight: the weight of "fixed".
        source: "full", the whole prediction; or "top1", the embedding of its likeliest token.
        temper_vector: build the vector of the tempered prediction, too. The text of the paper can
            be read so; its algorithm 2 does not, which is the default.
        skip_mask_token: leave the mask token out of the prediction.
        init: the first step of a block, where there is no prediction yet: "zero", a plain step;
            "self", a plain pass of the model before it; "reference", a pass of another model;
            "dirichlet", a random prediction.
        restart: after so many steps of a block, the next one begins as the first does (`init`); 0:
            never, which is the paper's. Predictions that are fed back more often than a model
            learned from can get surer than they are right (docs/residual_context.md). With "zero",
            set it to K + 1 for one that learned from residuals of K passes
            (`MaskedDiffusion.own_passes`; 1 of a reference). With "self" and "reference" a restart
            of any row costs the batch a pass. Training does not read it.
        table: decoding reads the whole table of embeddings once a step, which is most of what RCD
            costs. "int8" reads half as much, of a copy that is made when decoding starts; it
            changes a vector by a percent at most. Not for training.
        concentration: of the Dirichlet distribution, the same for all tokens. The paper does not
            give it: 1 is a guess.

    Raises:
        ValueError: an unknown name, or a number out of range; the message names the field.
    """

    temperature: float | Array = 1.0
    fixed_weight: float | Array = 0.3
    concentration: float | Array = 1.0
    weighting: Weighting = dataclasses.field(default="entropy", metadata={"static": True})
    source: Source = dataclasses.field(default="full", metadata={"static": True})
    temper_vector: bool = dataclasses.field(default=False, metadata={"static": True})
    skip_mask_token: bool = dataclasses.field(default=False, metadata={"static": True})
    init: Init = dataclasses.field(default="zero", metadata={"static": True})
    restart: int = dataclasses.field(default=0, metadata={"static": True})
    table: TableName = dataclasses.field(default="exact", metadata={"static": True})

    def __post_init__(self):
        names = {"weighting": Weighting, "source": Source, "init": Init, "table": TableName}
        for name, kind in names.items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in ("temperature", "concentration"):
            require_number(self, name, lambda x: 0 < x < math.inf, "positive and finite")
        require_number(self, "fixed_weight", lambda x: 0 <= x <= 1, "from 0 to 1")
        if not isinstance(self.restart, int) or isinstance(self.restart, bool) or self.restart < 0:
            raise ValueError(f"restart must be an int of at least 0, got {self.restart!r}")

    def residual(
        self,
        logits: Float[Array, "*batch vocabulary"],
        table: Table,
        mask_id: int,
    ) -> Residual:
        """Returns what predictions feed back.

        Args:
            logits: of each position, any float dtype.
            table: input embeddings of the model that gets the residual. The product with them is
                made in their dtype (bfloat16 for those of `quantized_table`) and summed in float32;
                gradients reach them.
            mask_id: row of the mask token.

        Raises:
            ValueError: logits of another vocabulary than the table's.
        """
        if logits.shape[-1] != _shape(table)[0]:
            raise ValueError(
                f"logits must be of the {_shape(table)[0]} tokens of the table, "
                f"got shape {logits.shape}"
            )
        statistics = _statistics(
            logits,
            table,
            self.temperature,
            temper_vector=self.temper_vector,
            skip=mask_id if self.skip_mask_token else None,
        )
        vector = _rows(table, statistics.best) if self.source == "top1" else statistics.vector
        entropy = jnp.clip(statistics.entropy / math.log(logits.shape[-1]), 0.0, 1.0)
        match self.weighting:
            case "entropy":
                weight = entropy
            case "one_minus_entropy":
                weight = 1.0 - entropy
            case "confidence":
                weight = statistics.confidence
            case "one_minus_confidence":
                weight = 1.0 - statistics.confidence
            case "fixed":
                weight = jnp.full_like(entropy, self.fixed_weight)
            case "one":
                weight = jnp.ones_like(entropy)
        return Residual(weight, vector)

    def random_residual(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, ...],
        table: Table,
        mask_id: int,
    ) -> Residual:
        """Returns what predictions drawn from a Dirichlet distribution feed back ("dirichlet")."""
        # The logarithms of gamma variables are logits of Dirichlet ones.
        concentration = _moderate(self.concentration)
        logits = jax.random.loggamma(key, concentration, (*shape, _shape(table)[0]))
        return self.residual(logits, table, mask_id)


def quantized_table(table: Float[Array, "vocabulary width"]) -> Int8Table:
    """Returns embeddings as 8-bit integers, rounded to the nearest."""
    wide = table.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=1), 1e-30) / 127.0
    return Int8Table(jnp.round(wide / scale[:, None]).astype(jnp.int8), scale)


def no_residual(shape: tuple[int, ...], width: int) -> Residual:
    """Returns a residual that leaves every position at the mask: a cold start."""
    return Residual(jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, width), jnp.float32))


def mix_residual(
    embeddings: Float[Array, "*batch width"], masked: Bool[Array, "*batch"], residual: Residual
) -> Float[Array, "*batch width"]:
    """Mixes residuals into the embeddings of masked positions; others stay as they are.

    Args:
        embeddings: of the tokens, those of masked positions the mask's.
        masked: True where a token is not known.
        residual: of the same positions.

    Returns:
        Embeddings in the dtype of `embeddings`, mixed in float32.
    """
    weight = residual.weight[..., None]
    mixed = (1.0 - weight) * embeddings.astype(jnp.float32) + weight * residual.vector
    return jnp.where(masked[..., None], mixed.astype(embeddings.dtype), embeddings)


class _Statistics(NamedTuple):
    """Of each prediction: entropy in nats, largest probability, its token, average embedding."""

    entropy: Array
    confidence: Array
    best: Array
    vector: Array


def _statistics(
    logits: Array,
    table: Table,
    temperature: float | Array,
    *,
    temper_vector: bool,
    skip: int | None,
) -> _Statistics:
    """Streams over tiles of the vocabulary; only the vector is of the prediction untempered."""
    vocabulary, width = _shape(table)
    batch, temperature = logits.shape[:-1], _moderate(temperature)
    logits = logits.reshape(-1, vocabulary)
    if skip is not None:
        logits = jnp.where(jnp.arange(vocabulary)[None] == skip, -jnp.inf, logits)
    best = jnp.argmax(logits, axis=-1)
    top = jnp.take_along_axis(logits, best[:, None], axis=-1).astype(jnp.float32)

    def add(sums: Any, start: Array | int, size: int) -> Any:
        total, tempered, moment, vector = sums
        tile = jax.lax.dynamic_slice_in_dim(logits, start, size, axis=1)
        below = tile.astype(jnp.float32) - top  # the exponents are at most zero
        scaled = below / temperature
        plain, soft = jnp.exp(below), jnp.exp(scaled)
        # What is impossible (-inf) adds nothing; zero times its exponent would be no number.
        moments = soft * jnp.where(soft > 0, scaled, 0.0)
        chosen = soft if temper_vector else plain
        part = _product(chosen, table, start, size)
        return (
            total + chosen.sum(axis=1),
            tempered + soft.sum(axis=1),
            moment + moments.sum(axis=1),
            vector + part,
        )

    count = logits.shape[0]
    zeros = jnp.zeros(count, jnp.float32)
    sums = (zeros, zeros, zeros, jnp.zeros((count, width), jnp.float32))
    sums = _over_tiles(add, sums, vocabulary)
    total, tempered, moment, vector = sums
    return _Statistics(
        (jnp.log(tempered) - moment / tempered).reshape(batch),
        (1.0 / tempered).reshape(batch),
        best.reshape(batch),
        (vector / total[:, None]).reshape(*batch, width),
    )


def _moderate(number: float | Array) -> Array:
    """A positive number as float32, of which neither it nor its inverse is rounded to zero."""
    return jnp.clip(jnp.asarray(number, jnp.float32), 1e-30, 1e30)


def _shape(table: Table) -> tuple[int, ...]:
    return (table.codes if isinstance(table, Int8Table) else table).shape


def _rows(table: Table, tokens: Array) -> Array:
    """Embeddings of tokens, float32."""
    if isinstance(table, Int8Table):
        return table.codes[tokens].astype(jnp.float32) * table.scale[tokens][..., None]
    return table[tokens].astype(jnp.float32)


def _product(weights: Array, table: Table, start: Array | int, size: int) -> Array:
    """Weighted sums of a tile of embeddings, float32."""
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, size, axis=0)
    if isinstance(table, Int8Table):
        weights, rows = weights * cut(table.scale)[None], cut(table.codes).astype(jnp.bfloat16)
    else:
        rows = cut(table)
    return jnp.dot(weights.astype(rows.dtype), rows, preferred_element_type=jnp.float32)


def _over_tiles(add: Callable[..., Any], sums: Any, length: int) -> Any:
    """Calls `add(sums, start, size)` for tiles in a loop, and for what is left over."""
    # On a GPU a tile of the table would be copied before it is multiplied: thrice the memory
    # traffic of the whole step, which is all that the step costs.
    whole = 0 if jax.default_backend() == "gpu" else length // _TILE
    if whole:
        # Recomputed in the backward pass, which would otherwise keep an array of probabilities.
        body = jax.checkpoint(lambda sums, start: (add(sums, start, _TILE), None))
        sums, _ = jax.lax.scan(body, sums, jnp.arange(whole) * _TILE)
    rest = length - whole * _TILE
    return add(sums, whole * _TILE, rest) if rest else sums
