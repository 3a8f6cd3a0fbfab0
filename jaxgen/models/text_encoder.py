"""A small bidirectional transformer that encodes captions for the MMDiT, trained with it.

It returns what SD3 takes from CLIP and T5: one vector for each token (`context`) and one for the
caption (`pooled`). Pre-norm blocks, learned positions, tanh GELU.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxgen.layers import FeedForward, LayerNorm, Linear, SelfAttention, look_up
from jaxgen.models.fields import require_divides, require_positive, set_float_dtypes


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Shape and arithmetic of a `TextEncoder`.

    Attributes:
        vocabulary_size: number of token ids; 0 is padding.
        max_tokens: the longest caption in tokens.
        width: width of the transformer.
        num_layers: number of blocks.
        num_heads: number of attention heads; divides `width`.
        hidden_dim: size of a context token (`joint_attention_dim` of the MMDiT).
        pooled_dim: size of the pooled vector (`pooled_projection_dim` of the MMDiT).
        dtype: computation dtype.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    vocabulary_size: int
    max_tokens: int = 16
    width: int = 128
    num_layers: int = 2
    num_heads: int = 2
    hidden_dim: int = 256
    pooled_dim: int = 256
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        set_float_dtypes(self)
        fields = {field.name for field in dataclasses.fields(self)}
        require_positive(self, *sorted(fields - {"dtype", "param_dtype"}))
        require_divides(self, "num_heads", "width")


class TextEncoderBlock(nnx.Module):
    """Pre-norm self-attention and feed-forward, both residual."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        options = _options(config, rngs)
        self.attention_norm = LayerNorm(config.width, param_dtype=config.param_dtype)
        self.attention = SelfAttention(config.width, config.num_heads, **options)
        self.mlp_norm = LayerNorm(config.width, param_dtype=config.param_dtype)
        self.mlp = FeedForward(config.width, **options)

    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Array
    ) -> Float[Array, "batch tokens width"]:
        """Applies both branches; `mask` is True where a key may be seen."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class TextEncoder(nnx.Module):
    """Encodes token ids to context tokens and a pooled vector.

    Padding is never attended to and does not count in the pooled mean; its own outputs are
    finite and depend on the caption, as in SD3. The first position always counts, so that the
    empty caption of classifier-free guidance is encoded by the padding token's embedding.

    Args:
        config: shape and arithmetic.
    """

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        options = _options(config, rngs)
        embedding = {"embedding_init": nnx.initializers.normal(0.02), **options}
        self.config = config
        self.token_embedding = nnx.Embed(config.vocabulary_size, config.width, **embedding)
        self.position_embedding = nnx.Embed(config.max_tokens, config.width, **embedding)
        self.blocks = nnx.List(
            [TextEncoderBlock(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = LayerNorm(config.width, param_dtype=config.param_dtype)
        self.context_projection = Linear(config.width, config.hidden_dim, **options)
        self.pooled_projection = Linear(config.width, config.pooled_dim, **options)

    def __call__(
        self, tokens: Int[Array, "batch tokens"]
    ) -> tuple[Float[Array, "batch tokens hidden_dim"], Float[Array, "batch pooled_dim"]]:
        """Encodes captions.

        Args:
            tokens: ids below vocabulary_size, 0 for padding, at most max_tokens a row.

        Returns:
            The context tokens and the pooled vector, in the computation dtype.

        Raises:
            ValueError: wrong rank, no or too many tokens, or ids that are not integers.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.max_tokens:
            raise ValueError(
                f"tokens must have shape (batch, 1 to {self.config.max_tokens}), got {tokens.shape}"
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        length = tokens.shape[1]
        visible = (tokens != 0) | (jnp.arange(length) == 0)[None, :]
        x = look_up(self.token_embedding.embedding[...], tokens, self.config.dtype)
        x += self.position_embedding(jnp.arange(length))[None]
        for block in self.blocks:
            x = block(x, visible[:, None, None, :])
        x = self.final_norm(x)
        weights = visible.astype(jnp.float32)[:, :, None]
        mean = (x.astype(jnp.float32) * weights).sum(axis=1) / weights.sum(axis=1)
        return self.context_projection(x), self.pooled_projection(mean)


def _options(config: TextEncoderConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Keywords that every layer takes."""
    return {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
