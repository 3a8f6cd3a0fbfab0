"""A language model that predicts the next token: a decoder of the Llama family, to pretrain.

The blocks are those of `jaxgen.models.DiffusionLM` behind a causal mask, with RMS norms of queries
and keys unless they are turned off: SageBwd (arXiv:2603.02170, section 4) finds that INT8 attention
needs them at large batches. Several documents may share a row; tokens see their own one only.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxgen.layers import Attend, AttentionName, attend_on_mesh, causal_attention
from jaxgen.models.decoder_stack import DecoderStack, Policy, check_stack
from jaxgen.models.fields import require_bool

Remat = Literal["none", "block", "keep_attention", "keep_products"]


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Shape and arithmetic of a `LanguageModel`.

    Attributes:
        num_layers: number of blocks.
        width: width of the tokens.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; divides `num_heads`.
        head_dim: size of a head, even.
        ffn_dim: width inside the feed-forward.
        vocabulary_size: number of token ids.
        qk_norm: RMS-normalize queries and keys per head.
        tied: the head is the embedding, transposed.
        rope_theta: base of the rotary angles.
        max_tokens: longest sequence that the model is made for; only recorded.
        eps: epsilon of all norms.
        attention: "exact" or "int8" (`kernels_pallas.sage_attention`).
        smooth_keys: INT8 attention quantizes keys less their mean; False is for experiments.
        smooth_queries: it quantizes queries less their mean, too, without kernels; for experiments.
        remat: what the backward pass computes again: "none"; "block", everything from the input of
            each block; "keep_attention", all but what attention keeps for itself, its dearest part
            (exact attention: cuDNN's alone); "keep_products", all but that and the products with
            weights: what is left costs next to nothing and is most of the memory.
        scan: compile one block and loop over the weights of all, which are copied together first;
            compiling then takes seconds at any depth.
        dtype: computation dtype.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocabulary_size: int
    qk_norm: bool = True
    tied: bool = False
    rope_theta: float = 10_000.0
    max_tokens: int = 4096
    eps: float = 1e-6
    attention: AttentionName = "exact"
    smooth_keys: bool = True
    smooth_queries: bool = False
    remat: Remat = "none"
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_stack(self)
        require_bool(self, "smooth_keys", "smooth_queries")
        if self.remat not in get_args(Remat):
            allowed = ", ".join(get_args(Remat))
            raise ValueError(f"remat must be one of {allowed}, got {self.remat!r}")

    @property
    def smoothing(self) -> dict[str, bool]:
        """What INT8 attention quantizes less its mean, as keywords."""
        return {"smooth_keys": self.smooth_keys, "smooth_queries": self.smooth_queries}

    def operations(self, tokens: int) -> int:
        """Returns the multiplications and additions of a forward pass over one sequence.

        Those of the causal half of attention count, the others do not. A training step has three
        times as many, whatever is computed again.
        """
        heads = self.num_heads * self.head_dim
        kv_heads = self.num_kv_heads * self.head_dim
        block = self.width * (2 * heads + 2 * kv_heads + 3 * self.ffn_dim)
        matrices = self.num_layers * block + self.vocabulary_size * self.width
        attention = self.num_layers * heads * tokens * (tokens + 1)
        return 2 * matrices * tokens + 2 * attention


class LanguageModel(DecoderStack):
    """Predicts, at every position, the token that comes next.

    Args:
        config: shape and arithmetic.
    """

    config: LanguageModelConfig

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "#batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens vocabulary"]:
        """Predicts every next token; arguments as of `hidden`. Returns float32 logits."""
        return self.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "#batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Returns what `logits` takes: the tokens after the final norm.

        Args:
            tokens: ids.
            positions: of each token in its document; 0, 1, 2, ... if None.
            segment_ids: the number of the document of each token; tokens of different documents do
                not see each other. None: a row is one document.

        Raises:
            ValueError: tokens of another rank or dtype, or segment ids of another shape.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be ids (batch, tokens), got {tokens.dtype} of shape {tokens.shape}"
            )
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(f"segment_ids must have shape {tokens.shape}, got {segment_ids.shape}")
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        return self.run(
            self.embed(tokens),
            self.rotary(positions),
            self._attend(segment_ids),
            recompute=self.config.remat != "none",
            scan=self.config.scan,
            policy=_keeps(self.config.remat),
        )

    def _attend(self, segment_ids: Array | None) -> Attend:
        name = self.config.attention
        attend = causal_attention(name, **self.config.smoothing)
        return lambda query, key, value: attend_on_mesh(
            attend, query, key, value, segment_ids, kernel=name == "int8"
        )


def _keeps(remat: Remat) -> Policy:
    """Returns what `jax.checkpoint` keeps of a block."""
    if remat not in ("keep_attention", "keep_products"):
        return None
    from kernels_pallas.sage_attention.vjp import RESIDUALS

    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(
        policies.save_only_these_names(RESIDUALS),
        lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd"),
    )
    if remat == "keep_products":
        keep = policies.save_from_both_policies(keep, policies.dots_with_no_batch_dims_saveable)
    return keep


_LLAMA = LanguageModelConfig(
    num_layers=20,
    width=1024,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    ffn_dim=3072,
    vocabulary_size=50304,
    tied=True,
)

LANGUAGE_MODEL_PRESETS: Mapping[str, LanguageModelConfig] = MappingProxyType(
    {
        "10m": dataclasses.replace(
            _LLAMA,
            num_layers=6,
            width=384,
            num_heads=6,
            num_kv_heads=6,
            ffn_dim=1024,
            vocabulary_size=384,
        ),
        "125m": dataclasses.replace(
            _LLAMA, num_layers=12, width=768, num_heads=12, num_kv_heads=4, ffn_dim=2048
        ),
        "325m": _LLAMA,
        "1b": dataclasses.replace(
            _LLAMA,
            num_layers=16,
            width=2048,
            num_kv_heads=8,
            head_dim=128,
            ffn_dim=8192,
            vocabulary_size=128256,
            rope_theta=500_000.0,
        ),
        "8b": dataclasses.replace(
            _LLAMA,
            num_layers=32,
            width=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            ffn_dim=14336,
            vocabulary_size=128256,
            rope_theta=500_000.0,
            tied=False,
        ),
    }
)
"""Named configurations by their size. "325m" is that of SageBwd's experiments as far as the paper
gives it; its 20 layers of width 1024 with 16 heads are inferred. "10m" has a vocabulary of bytes.
"""
