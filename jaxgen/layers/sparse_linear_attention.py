"""Sparse-linear attention as a module: SLA2 (arXiv 2602.12675).

It replaces exact attention between projections, for instance as `attend` of `jaxgen.models.Wan`.
Its parameters are float32 and few; a model whose attention was replaced must be fine-tuned as a
whole, which `train.sla2` does in the two stages of the paper.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from jaxgen.layers.attention import exact_attention
from kernels_pallas import sparse_linear_attention
from kernels_pallas.sparse_linear_attention.api import ImplementationName, Selection
from kernels_pallas.sparse_linear_attention.blocks import Blocks
from kernels_pallas.sparse_linear_attention.reference import GradientScores
from kernels_pallas.sparse_linear_attention.router import block_means, block_scores, choose

ALL_SPARSE = 40.0
"""Mixing logit whose sigmoid is exactly 1 in float32: nothing of the linear branch remains."""

_SETTINGS = ("kept_fraction", "block_q", "block_k", "smooth_features")
_SMALLEST_ALPHA, _LARGEST_ALPHA = 0.02, 0.98
_MILLION = 1_000_000
_CHANGEABLE = (
    "kept_fraction",
    "quantize",
    "gradient_scores",
    "selection",
    "temperature",
    "implementation",
)


class RouterParam(nnx.Param):
    """A projection of the router: trained in the first stage, frozen in the second."""


class BasisParam(RouterParam):
    """The basis of a head: trained in the first stage, frozen in the second."""


class MixingParam(nnx.Param):
    """Mixing logits: trained in both stages, without weight decay."""


class Settings(nnx.Variable):
    """What the parameters beside it were trained for, int32, one number a setting; not trained.

    It travels with the weights, and `jaxgen.checkpoints` refuses a file that says otherwise than
    the module it is loaded into.
    """

    @staticmethod
    def read(names: tuple[str, ...], numbers: Any) -> dict[str, Any]:
        """Returns the settings by name that a file holds as numbers; `of` backwards.

        Raises:
            ValueError: another number of them.
        """
        numbers = np.asarray(numbers)
        if numbers.shape != (len(names),):
            raise ValueError(f"settings must be {', '.join(names)}, got shape {numbers.shape}")
        return dict(zip(names, map(_shown, names, numbers.tolist()), strict=True))

    @classmethod
    def of(cls, **settings: float) -> Self:
        """Records settings by name; a fraction (its name ends in "fraction") in millionths."""
        numbers = [
            round(value * _MILLION) if name.endswith("fraction") else int(value)
            for name, value in settings.items()
        ]
        return cls(jnp.asarray(numbers, jnp.int32), names=tuple(settings), expected=tuple(numbers))

    def check(self, found: Any, source: str) -> None:
        """Compares with what a file holds.

        Args:
            found: int (settings,).
            source: what to call the array in the error.

        Raises:
            ValueError: they differ; the message names every setting with both values.
        """
        metadata = self.get_metadata()
        names, expected = metadata["names"], metadata["expected"]
        wrong = [
            f"{name} is {_shown(name, given)} there and {_shown(name, wanted)} here"
            for name, given, wanted in zip(names, np.asarray(found).tolist(), expected, strict=True)
            if given != wanted
        ]
        if wrong:
            raise ValueError(f"{source}: trained with other settings; {', '.join(wrong)}")


class SparseLinearAttention(nnx.Module):
    """SLA2: softmax attention to a few blocks of keys, linear attention to the rest, mixed.

    See `kernels_pallas.sparse_linear_attention` for the arithmetic. A new module has the router of
    SLA (identity projections) and mostly trusts the sparse branch.

    Attributes:
        query_router: float32 (head_dim, head_dim) or (num_heads, head_dim, head_dim).
        key_router: likewise.
        mixing_logits: float32 (num_heads, query_blocks) or (num_heads,).
        head_basis: float32 (num_heads, head_dim, head_dim), A of each head, or None.
        settings: what the above were trained for.

    Args:
        num_heads: number of heads.
        head_dim: size of a head.
        query_tokens: number of queries; other lengths are refused. None with `per_head_ratio`
            allows any.
        kept_fraction: share of the blocks of keys that get softmax attention.
        block_q: queries in a block.
        block_k: keys in a block.
        per_head_ratio: one mixing ratio a head, not one for each of its blocks of queries.
        per_head_routers: projections for each head instead of shared ones.
        learn_basis: attend to Q A and K A⁻ᵀ with a matrix A for each head, at first the identity,
            which stage 1 trains. Scores stay the same, but not the features of the linear branch,
            a softmax over the channels: it comes closer to full attention in a basis of its own.
            Not in the paper.
        initial_logit: where mixing logits start; 2 means 88 % of the sparse branch.
        quantize: compute scores from INT8 codes.
        gradient_scores: "exact" or "int8", the scores of the backward pass.
        selection: "hard", or "soft" to train the routers.
        temperature: of the soft selection.
        implementation: as for the function.
        param_dtype: dtype of the parameters.
        rngs: not used; accepted so that all layers are made alike.

    Raises:
        ValueError: a size below 1, `kept_fraction` out of range, or `query_tokens` missing.
    """

    PARAMETERS: ClassVar[frozenset[str]] = frozenset(
        {"query_router", "key_router", "mixing_logits", "settings"}
    )
    """Names of what a checkpoint holds."""
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"head_basis"})
    """Names of what it may hold besides."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        query_tokens: int | None,
        *,
        kept_fraction: float = 0.05,
        block_q: int = 128,
        block_k: int = 64,
        per_head_ratio: bool = False,
        per_head_routers: bool = False,
        learn_basis: bool = False,
        initial_logit: float = 2.0,
        quantize: bool = True,
        gradient_scores: GradientScores = "exact",
        selection: Selection = "hard",
        temperature: float = 0.1,
        implementation: ImplementationName | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        check_sizes(num_heads=num_heads, head_dim=head_dim, block_q=block_q, block_k=block_k)
        check_fraction(kept_fraction)
        if not per_head_ratio:
            if query_tokens is None:
                raise ValueError("query_tokens may be None with per_head_ratio only")
            check_sizes(query_tokens=query_tokens)
        blocks = () if per_head_ratio else (-(-(query_tokens or 0) // block_q),)
        identity = jnp.eye(head_dim, dtype=param_dtype)
        identities = jnp.tile(identity[None], (num_heads, 1, 1))
        self.head_basis = BasisParam(identities) if learn_basis else None
        if per_head_routers:
            identity = identities
        self.query_router = RouterParam(identity)
        self.key_router = RouterParam(jnp.copy(identity))
        self.mixing_logits = MixingParam(
            jnp.full((num_heads, *blocks), initial_logit, dtype=param_dtype)
        )
        self.kept_fraction, self.block_q, self.block_k = kept_fraction, block_q, block_k
        self.quantize, self.temperature = quantize, temperature
        self.gradient_scores: GradientScores = gradient_scores
        self.selection: Selection = selection
        self.implementation: ImplementationName | None = implementation
        self.settings = self._record()

    @classmethod
    def of_parameters(cls, shapes: Mapping[str, Any], settings: ArrayLike) -> Self:
        """Makes a module that parameters from a file fit into; what no file tells is the default.

        Args:
            shapes: what has the shapes of the parameters, by name.
            settings: the array `settings` of the file.

        Raises:
            ValueError: settings out of range, or shapes that belong together in no module.
        """
        found = Settings.read(_SETTINGS, settings)
        if not found.pop("smooth_features"):
            raise ValueError("features of unsmoothed keys are those of SLA, not of SLA2")
        logits, router = shapes["mixing_logits"].shape, shapes["query_router"].shape
        if len(logits) not in (1, 2) or len(router) not in (2, 3):
            raise ValueError(
                "mixing_logits must have one or two axes and routers two or three, "
                f"got {logits} and {router}"
            )
        return cls(
            logits[0],
            router[-1],
            None if len(logits) == 1 else logits[1] * found["block_q"],
            per_head_ratio=len(logits) == 1,
            per_head_routers=len(router) == 3,
            learn_basis="head_basis" in shapes,
            **found,
        )

    def _record(self) -> Settings:
        cut = {"block_q": self.block_q, "block_k": self.block_k}
        return Settings.of(kept_fraction=self.kept_fraction, **cut, smooth_features=1)

    def __call__(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
    ) -> Float[Array, "batch queries heads head_dim"]:
        """Attends; raises what `kernels_pallas.sparse_linear_attention` raises."""
        return self._attend(query, key, value, self.mixing_logits[...], self.selection)

    def _in_basis(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns queries and keys in the basis of their heads; products of the two stay."""
        if self.head_basis is None:
            return query, key
        basis = self.head_basis[...]
        turn = lambda x, matrices: jnp.einsum(
            "bnhd,hde->bnhe", x.astype(basis.dtype), matrices
        ).astype(x.dtype)
        return turn(query, basis), turn(key, jnp.swapaxes(jnp.linalg.inv(basis), 1, 2))

    def _attend(self, query, key, value, logits, selection) -> Array:
        query, key = self._in_basis(query, key)
        return sparse_linear_attention(
            query,
            key,
            value,
            logits,
            query_router=self.query_router[...],
            key_router=self.key_router[...],
            kept_fraction=self.kept_fraction,
            block_q=self.block_q,
            block_k=self.block_k,
            selection=selection,
            temperature=self.temperature,
            quantize=self.quantize,
            gradient_scores=self.gradient_scores,
            # Only the reference has a soft choice.
            implementation=None if selection == "soft" else self.implementation,
        )

    def with_options(self, **changes: Any) -> Self:
        """Returns a module with the same parameter values that computes differently.

        Args:
            **changes: new values of kept_fraction, quantize, gradient_scores, selection,
                temperature or implementation, as for the constructor.

        Raises:
            ValueError: another name.
        """
        unknown = sorted(changes.keys() - set(_CHANGEABLE))
        if unknown:
            allowed = ", ".join(_CHANGEABLE)
            raise ValueError(f"with_options changes {allowed}; got {', '.join(unknown)}")
        changed = nnx.clone(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        if "kept_fraction" in changes:
            changed.settings = changed._record()
        return changed

    def route(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys heads head_dim"],
    ) -> Bool[Array, "batch heads query_blocks key_blocks"]:
        """Returns which blocks of keys get softmax attention, for pictures."""
        routers = self.query_router[...], self.key_router[...]
        query, key = self._in_basis(query, key)
        blocks = Blocks(
            query.shape[1], key.shape[1], self.block_q, self.block_k, self.kept_fraction
        )
        return choose_blocks(blocks, query, key, *routers)

    def calibrate_mixing(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
    ) -> Float[Array, "heads query_blocks"] | Float[Array, " heads"]:
        """Returns mixing logits that come closest to full attention on these inputs.

        Least squares of the ratio, `<T - L, S - L> / <S - L, S - L>` with full attention T and the
        two branches S and L, summed over the batch and over what shares a ratio, kept between 0.02
        and 0.98. Where all blocks are chosen the ratio does not matter and becomes 0.98.

        Args:
            query: as for a call.
            key: likewise.
            value: likewise.

        Returns:
            float32, in the shape of `mixing_logits`.
        """
        full = exact_attention(query, key, value)
        return mixing_of_sums(*self.mixing_sums(query, key, value, full))

    def mixing_sums(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
        full: Float[Array, "batch queries heads head_dim"],
    ) -> tuple[Array, Array]:
        """Returns the two products of `calibrate_mixing`; those of several batches may be added.

        Args:
            query: as for a call.
            key: likewise.
            value: likewise.
            full: full attention of these.

        Returns:
            `<T - L, S - L>` and `<S - L, S - L>`, float32, in the shape of `mixing_logits`.
        """
        blocks = Blocks(
            query.shape[1], key.shape[1], self.block_q, self.block_k, self.kept_fraction
        )
        shape = self.mixing_logits.shape
        outputs = [full] + [
            self._attend(query, key, value, jnp.full(shape, logit, jnp.float32), "hard")
            for logit in (ALL_SPARSE, -ALL_SPARSE)
        ]
        target, sparse, linear = (blocks.split_queries(x.astype(jnp.float32)) for x in outputs)
        axes = (0, 3, 4) if len(shape) == 2 else (0, 2, 3, 4)
        along = jnp.sum((target - linear) * (sparse - linear), axis=axes)
        return along, jnp.sum(jnp.square(sparse - linear), axis=axes)


def mixing_of_sums(along: Array, square: Array) -> Array:
    """Returns the mixing logits of least squares from sums of `mixing_sums`."""
    alpha = jnp.where(square > 0, along / jnp.where(square > 0, square, 1), 1)
    return jax.scipy.special.logit(jnp.clip(alpha, _SMALLEST_ALPHA, _LARGEST_ALPHA))


def choose_blocks(
    blocks: Blocks,
    query: Array,
    key: Array,
    query_router: Array | None = None,
    key_router: Array | None = None,
) -> Array:
    """Returns the hard choice, bool (batch, heads, query_blocks, key_blocks).

    Args:
        blocks: how tokens are cut.
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, heads, head_dim).
        query_router: (head_dim, head_dim) or (heads, head_dim, head_dim); None: the identity.
        key_router: likewise.
    """
    means = block_means(blocks, query, key)
    return choose(blocks, block_scores(means, query_router, key_router), means.keys).mask


def check_sizes(**sizes: int) -> None:
    """Refuses sizes below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_fraction(kept_fraction: float) -> None:
    """Refuses shares that keep no block, or more than there are."""
    if not 0 < kept_fraction <= 1:
        raise ValueError(f"kept_fraction must be more than 0 and at most 1, got {kept_fraction}")


def _shown(name: str, number: int) -> float:
    return number / _MILLION if name.endswith("fraction") else number
