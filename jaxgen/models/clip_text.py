"""The text encoder of CLIP, which gives SD3 two of its three views of a prompt.

Radford et al. 2021, arXiv:2103.00020. A causal transformer, pre-norm, with learned positions. The
computation graph is that of the transformers library (`CLIPTextModelWithProjection`), so that
released weights load (`jaxgen.checkpoints`).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxgen.layers import LayerNorm, Linear, SelfAttention, scan_blocks
from jaxgen.models.fields import require_bool, require_divides, require_positive, set_float_dtypes

ActivationName = Literal["quick_gelu", "gelu"]

# The id that configurations from before July 2023 give as the end of a text; their tokenizers never
# used it. With it, the end is where the highest id is (transformers, pull request 24773).
_LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape and arithmetic of a `CLIPText`.

    Attributes:
        num_layers: number of blocks.
        num_heads: number of attention heads; divides `width`.
        width: width of the transformer.
        ffn_dim: width inside the MLPs.
        projection_dim: size of the pooled vector.
        activation: "quick_gelu", x*sigmoid(1.702 x), or "gelu", the exact one.
        vocabulary_size: number of token ids.
        max_tokens: the longest text in tokens: rows of the table of positions.
        eos_token_id: the id that ends a text and marks what is pooled. The value 2 stands for the
            highest id of the text, as in transformers: the configurations of SD3 say 2, while
            their tokenizers end a text with 49407, which is the highest.
        eps: epsilon of all norms.
        scan: compile one block and loop over the weights of all, so that compiling takes seconds
            at any depth; their weights are copied together first.
        dtype: computation dtype; norms and softmax are float32 in between.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    num_layers: int
    num_heads: int
    width: int
    ffn_dim: int
    projection_dim: int
    activation: ActivationName = "quick_gelu"
    vocabulary_size: int = 49408
    max_tokens: int = 77
    eos_token_id: int = _LEGACY_EOS
    eps: float = 1e-5
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        set_float_dtypes(self)
        require_positive(
            self,
            *("num_layers", "num_heads", "width", "ffn_dim", "projection_dim"),
            *("vocabulary_size", "max_tokens"),
        )
        require_divides(self, "num_heads", "width")
        require_bool(self, "scan")
        if self.activation not in get_args(ActivationName):
            allowed = ", ".join(map(repr, get_args(ActivationName)))
            raise ValueError(f"activation must be one of {allowed}, got {self.activation!r}")
        if type(self.eos_token_id) is not int or self.eos_token_id < 0:
            raise ValueError(f"eos_token_id must be an int from 0 on, got {self.eos_token_id!r}")
        if not isinstance(self.eps, float) or not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must be a float between 0 and 1, got eps={self.eps!r}")


class CLIPTextOutput(NamedTuple):
    """What a `CLIPText` returns, in the computation dtype.

    Attributes:
        penultimate: what the last block reads, without the final norm: the context of SD3.
        last: what the last block returns, after the final norm.
        pooled: the projection of `last` at the end of the text.
    """

    penultimate: Float[Array, "batch tokens width"]
    last: Float[Array, "batch tokens width"]
    pooled: Float[Array, "batch projection_dim"]


class CLIPTextBlock(nnx.Module):
    """Pre-norm self-attention and MLP, both residual.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        norm: dict[str, Any] = {"epsilon": config.eps, "param_dtype": config.param_dtype}
        options, xavier = _options(config, rngs), nnx.initializers.xavier_uniform()
        self.activation = config.activation
        self.attention_norm = LayerNorm(config.width, **norm)
        self.attention = SelfAttention(config.width, config.num_heads, **options)
        self.mlp_norm = LayerNorm(config.width, **norm)
        self.up = Linear(config.width, config.ffn_dim, kernel_init=xavier, **options)
        self.down = Linear(config.ffn_dim, config.width, kernel_init=xavier, **options)

    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch 1 tokens tokens"]
    ) -> Float[Array, "batch tokens width"]:
        """Applies both branches; `mask` is True where a query (third axis) may see a key."""
        x = x + self.attention(self.attention_norm(x), mask)
        hidden = self.up(self.mlp_norm(x))
        if self.activation == "quick_gelu":
            hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
        else:
            hidden = jax.nn.gelu(hidden, approximate=False)
        return x + self.down(hidden)


class CLIPText(nnx.Module):
    """Encodes token ids to a vector for each token and one for the text.

    There is no mask for padding: attention is causal, so what follows the end of a text does not
    reach its pooled vector; the vectors of padding itself are part of what SD3 reads.

    Args:
        config: shape and arithmetic.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        options = _options(config, rngs)
        embedding: dict[str, Any] = {"embedding_init": nnx.initializers.normal(0.02), **options}
        self.config = config
        self.token_embedding = nnx.Embed(config.vocabulary_size, config.width, **embedding)
        self.position_embedding = nnx.Embed(config.max_tokens, config.width, **embedding)
        self.blocks = nnx.List([CLIPTextBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = LayerNorm(
            config.width, epsilon=config.eps, param_dtype=config.param_dtype
        )
        self.projection = Linear(
            config.width,
            config.projection_dim,
            use_bias=False,
            kernel_init=nnx.initializers.normal(config.width**-0.5),
            **options,
        )

    def __call__(self, tokens: Int[Array, "batch tokens"]) -> CLIPTextOutput:
        """Encodes texts.

        Args:
            tokens: ids below vocabulary_size, at most max_tokens a row; each row holds the id that
                ends a text. In a row without it the first token is pooled.

        Raises:
            ValueError: wrong rank, no or too many tokens, or ids that are not integers.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.max_tokens:
            raise ValueError(
                f"tokens must have shape (batch, 1 to {self.config.max_tokens}), got {tokens.shape}"
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        batch, length = tokens.shape
        positions = jnp.arange(length)
        causal = positions[:, None] >= positions[None, :]
        mask = jnp.broadcast_to(causal[None, None], (batch, 1, length, length))
        x = self.token_embedding(tokens) + self.position_embedding(positions)[None]
        *first, last = self.blocks
        if self.config.scan and first:
            penultimate = scan_blocks(first, lambda block, x: block(x, mask), x)
        else:
            penultimate = x
            for block in first:
                penultimate = block(penultimate, mask)
        x = self.final_norm(last(penultimate, mask))
        return CLIPTextOutput(
            penultimate, x, self.projection(x[jnp.arange(batch), self._end(tokens)])
        )

    def _end(self, tokens: Int[Array, "batch tokens"]) -> Int[Array, " batch"]:
        """The position that ends each text: the first of several."""
        if self.config.eos_token_id == _LEGACY_EOS:
            return jnp.argmax(tokens, axis=1)
        return jnp.argmax(tokens == self.config.eos_token_id, axis=1)


def _options(config: CLIPTextConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Keywords that every layer takes."""
    return {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}


CLIP_TEXT_PRESETS: Mapping[str, CLIPTextConfig] = MappingProxyType(
    {
        "clip-l": CLIPTextConfig(
            num_layers=12, num_heads=12, width=768, ffn_dim=3072, projection_dim=768
        ),
        "clip-g": CLIPTextConfig(
            num_layers=32,
            num_heads=20,
            width=1280,
            ffn_dim=5120,
            projection_dim=1280,
            activation="gelu",
        ),
    }
)
"""Named configurations: the text encoders of CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 in SD3."""
