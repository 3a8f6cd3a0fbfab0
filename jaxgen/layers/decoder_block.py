"""The block of Llama and Qwen3: grouped-query attention with rotary positions, and SwiGLU.

Pre-norm, without biases (arXiv:2302.13971; arXiv:2505.09388 with RMS norms of queries and keys).
Which token sees which is up to `attend`. Norms and the rotation are float32 in every dtype and
rounded once.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jaxgen.layers.attention import KeyValues
from jaxgen.layers.norms import RMSNorm
from jaxgen.layers.rotary import Rotary, rotate_halves

type Attend = Callable[[Array, Array, Array], Array]
"""`attend(query, key, value)`: arrays (batch, tokens, heads, head_dim), perhaps fewer key heads."""

INIT = nnx.initializers.normal(0.02)
"""Initial weights of language models."""


class DecoderShape(Protocol):
    """Sizes and dtypes of a block; the configurations of language models have them."""

    @property
    def width(self) -> int:
        """Width of the tokens."""
        ...

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads, which divides that of query heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        ...

    @property
    def ffn_dim(self) -> int:
        """Width inside the feed-forward."""
        ...

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized."""
        ...

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """Computation dtype."""
        ...

    @property
    def param_dtype(self) -> DTypeLike:
        """Dtype of the parameters."""
        ...


class GroupedQueryAttention(nnx.Module):
    """Attention whose groups of query heads share keys and values (arXiv:2305.13245).

    Args:
        shape: sizes and dtypes.
    """

    def __init__(self, shape: DecoderShape, *, rngs: nnx.Rngs):
        queries, keys = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
        self.head_dim = shape.head_dim
        self.query = linear_of(shape.width, queries, shape, rngs)
        self.key = linear_of(shape.width, keys, shape, rngs)
        self.value = linear_of(shape.width, keys, shape, rngs)
        self.output = linear_of(queries, shape.width, shape, rngs)
        norm = lambda: norm_of(shape.head_dim, shape) if shape.qk_norm else None
        self.query_norm, self.key_norm = norm(), norm()

    def split(
        self, x: Float[Array, "batch tokens width"], rotary: Rotary
    ) -> tuple[Float[Array, "batch tokens heads head_dim"], KeyValues]:
        """Returns the queries, and the keys and values, in heads, rotated."""
        query, key, value = (
            projection(x).reshape(*x.shape[:2], -1, self.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate_halves(query, rotary), KeyValues(rotate_halves(key, rotary), value)

    def merge(
        self, heads: Float[Array, "batch tokens heads head_dim"]
    ) -> Float[Array, "batch tokens width"]:
        """Joins the heads and projects them."""
        return self.output(heads.reshape(*heads.shape[:2], -1))


class SwiGLU(nnx.Module):
    """Linear, SiLU, times another linear, then a third (Shazeer 2020, arXiv:2002.05202).

    Args:
        shape: sizes and dtypes.
    """

    def __init__(self, shape: DecoderShape, *, rngs: nnx.Rngs):
        self.gate = linear_of(shape.width, shape.ffn_dim, shape, rngs)
        self.up = linear_of(shape.width, shape.ffn_dim, shape, rngs)
        self.down = linear_of(shape.ffn_dim, shape.width, shape, rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Applies the branch to each token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nnx.Module):
    """Pre-norm attention and feed-forward, both residual.

    Args:
        shape: sizes and dtypes.
    """

    def __init__(self, shape: DecoderShape, *, rngs: nnx.Rngs):
        self.attention_norm = norm_of(shape.width, shape)
        self.attention = GroupedQueryAttention(shape, rngs=rngs)
        self.mlp_norm = norm_of(shape.width, shape)
        self.mlp = SwiGLU(shape, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], rotary: Rotary, attend: Attend
    ) -> Float[Array, "batch tokens width"]:
        """Applies both branches."""
        query, keys = self.attention.split(self.attention_norm(x), rotary)
        x = x + self.attention.merge(attend(query, *keys))
        return x + self.mlp(self.mlp_norm(x))

    def cached(
        self,
        x: Float[Array, "batch active width"],
        rotary: Rotary,
        attend: Attend,
        rows: Int32[Array, "batch active"],
        cache: KeyValues,
    ) -> tuple[Float[Array, "batch active width"], KeyValues]:
        """Applies both branches; `attend` gets the cache with what is new written to `rows`."""
        query, keys = self.attention.split(self.attention_norm(x), rotary)
        cache = cache.updated(rows, keys)
        x = x + self.attention.merge(attend(query, *cache.astype(query.dtype)))
        return x + self.mlp(self.mlp_norm(x)), cache


def norm_of(dim: int, shape: DecoderShape) -> RMSNorm:
    """Returns a norm with the epsilon and dtype of a model."""
    return RMSNorm(dim, epsilon=shape.eps, param_dtype=shape.param_dtype)


def linear_of(width_in: int, width_out: int, shape: DecoderShape, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a layer without bias in the dtypes of a model."""
    options: dict[str, Any] = {"dtype": shape.dtype, "param_dtype": shape.param_dtype}
    return nnx.Linear(width_in, width_out, use_bias=False, kernel_init=INIT, **options, rngs=rngs)
