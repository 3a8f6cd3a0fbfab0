"""The encoder of T5 v1.1, and that of umT5: the third text encoder of SD3, and Wan's.

Raffel et al. 2020, arXiv:1910.10683; gated feed-forward of Shazeer 2020, arXiv:2002.05202; umT5 of
Chung et al. 2023, arXiv:2304.09151. Pre-norm blocks without biases. Positions enter as a bias of
the attention scores, which are not divided by sqrt(head_dim): the initial weights account for it.
The computation graph is that of the transformers library (`T5EncoderModel`, `UMT5EncoderModel`),
so that released weights load (`jaxgen.checkpoints`).

The residual stream and the hidden values of the feed-forward outgrow float16, whose largest number
is 65504, in the released models. Computing in it is therefore refused; bfloat16 has the range.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxgen.layers import RMSNorm, scan_blocks
from jaxgen.models.fields import require_bool, require_positive, set_float_dtypes


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig:
    """Shape and arithmetic of a `T5Encoder`.

    Attributes:
        num_layers: number of blocks.
        num_heads: number of attention heads.
        width: width of the transformer (`d_model`).
        ffn_dim: width inside the gated feed-forward (`d_ff`).
        head_dim: size of a head (`d_kv`); num_heads*head_dim need not be `width`.
        vocabulary_size: number of token ids.
        num_buckets: relative positions that are told apart, a multiple of 4: half of them for
            each direction, half of these for single distances, the others logarithmic.
        max_distance: the distance from which on all are one bucket, above num_buckets/4.
        shared_positions: True for T5, whose blocks share one table of position biases; False for
            umT5, where each has its own.
        eps: epsilon of all norms.
        scan: compile one block and loop over the weights of all, so that compiling takes seconds
            at any depth; their weights are copied together first.
        dtype: computation dtype, any but float16; norms, position biases and softmax are float32
            in between.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a value out of range, or computation in float16; the message names the field.
    """

    num_layers: int
    num_heads: int
    width: int
    ffn_dim: int
    head_dim: int = 64
    vocabulary_size: int = 32128
    num_buckets: int = 32
    max_distance: int = 128
    shared_positions: bool = True
    eps: float = 1e-6
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        set_float_dtypes(self)
        require_positive(
            self,
            *("num_layers", "num_heads", "width", "ffn_dim", "head_dim", "vocabulary_size"),
            *("num_buckets", "max_distance"),
        )
        require_bool(self, "shared_positions", "scan")
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                "num_buckets must be a multiple of 4 and max_distance above a quarter of it, got "
                f"num_buckets={self.num_buckets} and max_distance={self.max_distance}"
            )
        if not isinstance(self.eps, float) or not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must be a float between 0 and 1, got eps={self.eps!r}")
        if self.dtype == jnp.float16:
            raise ValueError(
                "dtype must not be float16, in which the feed-forward of T5 overflows, got "
                "dtype=float16; use bfloat16 or float32 (param_dtype may be float16)"
            )


class T5Positions(nnx.Module):
    """Biases of the attention scores, one for each head and bucket of relative positions.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: T5EncoderConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.width**-0.5)
        shape = (config.num_buckets, config.num_heads)
        self.max_distance = config.max_distance
        self.table = nnx.Param(init(rngs.params(), shape, config.param_dtype))

    def __call__(self, length: int) -> Float[Array, "1 heads tokens tokens"]:
        """Returns the float32 bias of each query (third axis) and key (last axis)."""
        buckets = relative_buckets(length, self.table.shape[0], self.max_distance)
        bias = self.table[...].astype(jnp.float32)[buckets]
        return bias.transpose(2, 0, 1)[None]


class T5Attention(nnx.Module):
    """Attention of all tokens to all, scores not scaled.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: T5EncoderConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.query = _linear(width, inner, (width * config.head_dim) ** -0.5, config, rngs)
        self.key = _linear(width, inner, width**-0.5, config, rngs)
        self.value = _linear(width, inner, width**-0.5, config, rngs)
        self.output = _linear(inner, width, inner**-0.5, config, rngs)
        self.positions = None if config.shared_positions else T5Positions(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        bias: Float[Array, "1 heads tokens tokens"] | None,
        mask: Bool[Array, "batch 1 1 tokens"] | None,
    ) -> Float[Array, "batch tokens width"]:
        """Attends; `bias` is that of the positions, None if this layer has its own table."""
        if self.positions is not None:
            bias = self.positions(x.shape[1])
        query, key, value = (
            projection(x).reshape(*x.shape[:2], self.num_heads, -1)
            for projection in (self.query, self.key, self.value)
        )
        # JAX's attention keeps scores and softmax in float32 in every dtype.
        heads = jax.nn.dot_product_attention(query, key, value, bias, mask, scale=1.0)
        return self.output(heads.reshape(*x.shape[:2], -1))


class T5FeedForward(nnx.Module):
    """Linear, GELU (tanh approximation), times another Linear, then a third.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: T5EncoderConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.ffn_dim
        self.gate = _linear(width, inner, width**-0.5, config, rngs)
        self.up = _linear(width, inner, width**-0.5, config, rngs)
        self.down = _linear(inner, width, inner**-0.5, config, rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Applies the branch to each token."""
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class T5Block(nnx.Module):
    """Pre-norm attention and feed-forward, both residual.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: T5EncoderConfig, *, rngs: nnx.Rngs):
        norm: dict[str, Any] = {"epsilon": config.eps, "param_dtype": config.param_dtype}
        self.attention_norm = RMSNorm(config.width, **norm)
        self.attention = T5Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, **norm)
        self.mlp = T5FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        bias: Float[Array, "1 heads tokens tokens"] | None,
        mask: Bool[Array, "batch 1 1 tokens"] | None,
    ) -> Float[Array, "batch tokens width"]:
        """Applies both branches."""
        x = x + self.attention(self.attention_norm(x), bias, mask)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
    """Encodes token ids to one vector for each token.

    Args:
        config: shape and arithmetic.
    """

    def __init__(self, config: T5EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocabulary_size,
            config.width,
            embedding_init=nnx.initializers.normal(1.0),
            **_options(config, rngs),
        )
        self.positions = T5Positions(config, rngs=rngs) if config.shared_positions else None
        self.blocks = nnx.List([T5Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.width, epsilon=config.eps, param_dtype=config.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Encodes texts of any length.

        Args:
            tokens: ids below vocabulary_size.
            mask: True for tokens that may be attended to, False for padding. None attends to
                padding too, as SD3 does; Wan passes a mask.

        Returns:
            The tokens after the final norm, in the computation dtype. Those of padding are
            computed like the others; whether to read them is up to the caller.

        Raises:
            ValueError: shapes that are not (batch, tokens), no tokens, ids that are not integers
                or a mask that is not boolean.
        """
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens must have shape (batch, tokens), got {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != bool):
            raise ValueError(
                f"mask must be bool of shape {tokens.shape}, got {mask.dtype} of {mask.shape}"
            )
        x = self.token_embedding(tokens)
        bias = None if self.positions is None else self.positions(tokens.shape[1])
        visible = None if mask is None else mask[:, None, None, :]
        run = lambda block, x: block(x, bias, visible)
        if self.config.scan:
            x = scan_blocks(self.blocks, run, x)
        else:
            for block in self.blocks:
                x = run(block, x)
        return self.final_norm(x)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each pair of positions: section 2.1 of arXiv:1910.10683.

    The boundaries of the logarithmic half are compared in integers, which gives the buckets that
    transformers gets in float32, without its rounding.

    Args:
        length: number of positions.
        num_buckets: number of buckets, a multiple of 4.
        max_distance: the distance from which on all are one bucket.

    Returns:
        Int32 array (length, length), queries first; keys after the query are in the upper half.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    bucket_of, bucket = [], 0
    for distance in range(length):
        if distance < exact:
            bucket = distance
        while distance >= exact and bucket + 1 < half:
            # bucket + 1 <= exact + (half-exact)*log(distance/exact)/log(max_distance/exact)?
            step = bucket + 1 - exact
            reached = distance ** (half - exact) * exact**step
            if reached < max_distance**step * exact ** (half - exact):
                break
            bucket += 1
        bucket_of.append(bucket)
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    buckets = np.array(bucket_of)[np.abs(relative)] + half * (relative > 0)
    return buckets.astype(np.int32)


def _linear(
    width_in: int, width_out: int, scale: float, config: T5EncoderConfig, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer without bias whose weights start at N(0, scale)."""
    init = nnx.initializers.normal(scale)
    options = _options(config, rngs)
    return nnx.Linear(width_in, width_out, use_bias=False, kernel_init=init, **options)


def _options(config: T5EncoderConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Keywords that every layer takes."""
    return {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}


_XXL = T5EncoderConfig(num_layers=24, num_heads=64, width=4096, ffn_dim=10240)

T5_PRESETS: Mapping[str, T5EncoderConfig] = MappingProxyType(
    {
        "t5-xxl": _XXL,
        "umt5-xxl": dataclasses.replace(_XXL, vocabulary_size=256384, shared_positions=False),
    }
)
"""Named configurations: the encoder of T5 v1.1 XXL in SD3, and of umT5 XXL in Wan."""
