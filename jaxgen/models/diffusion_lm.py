"""Language models that see all tokens at once: the transformer of LLaDA and that of SDAR.

Both are decoders of the Llama family without the causal mask. LLaDA (Nie et al. 2025,
arXiv:2502.09992) attends to everything; SDAR (Cheng et al. 2025, arXiv:2510.06303) is Qwen3
(arXiv:2505.09388) that attends to its own block of tokens and those before. Which token sees which
is therefore an argument, not a part of the model. Pre-norm blocks without biases: grouped-query
attention with rotary positions, in Qwen3 after an RMS norm of queries and keys, and SwiGLU.

Inputs may be embeddings instead of ids, which is how `jaxgen.sampling.ResidualContext` feeds
distributions back. Norms and the rotation are float32 in every dtype and rounded once, and the
logits stay float32: in bfloat16 two likely tokens would often be equal.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxgen.layers import (
    AttentionName,
    KeyValues,
    RMSNorm,
    Rotary,
    attention_function,
    rotate_halves,
    scan_blocks,
    text_rotary,
)
from jaxgen.models.fields import (
    require_bool,
    require_divides,
    require_positive,
    set_float_dtypes,
)

type Attend = Callable[[Array, Array, Array], Array]
"""`attend(query, key, value)`: arrays (batch, tokens, heads, head_dim), perhaps fewer key heads."""

type Cache = tuple[KeyValues, ...]
"""Keys and values of every block, (batch, slots, kv_heads, head_dim), keys after their rotation."""

_INIT = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class DiffusionLMConfig:
    """Shape and arithmetic of a `DiffusionLM`.

    Attributes:
        num_layers: number of blocks.
        width: width of the tokens.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; divides `num_heads`.
        head_dim: size of a head, even; num_heads*head_dim need not be `width`.
        ffn_dim: width inside the feed-forward.
        vocabulary_size: number of token ids, rows of the embedding and of the head.
        mask_id: the token that stands for one not known yet.
        qk_norm: RMS-normalize queries and keys per head, as Qwen3 does.
        tied: the head is the embedding, transposed.
        rope_theta: base of the rotary angles.
        max_tokens: longest sequence that the model is made for; only recorded.
        eps: epsilon of all norms.
        attention: "exact" or "int8".
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan: compile one block and loop over the weights of all, which are copied together first;
            compiling then takes seconds at any depth. Not for cached calls.
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
    mask_id: int
    qk_norm: bool = False
    tied: bool = False
    rope_theta: float = 10_000.0
    max_tokens: int = 4096
    eps: float = 1e-6
    attention: AttentionName = "exact"
    remat: bool = False
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        require_positive(self, "num_layers", "width", "num_heads", "num_kv_heads", "head_dim")
        require_positive(self, "ffn_dim", "vocabulary_size", "max_tokens")
        require_divides(self, "num_kv_heads", "num_heads")
        require_bool(self, "qk_norm", "tied", "remat", "scan")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        for name in ("rope_theta", "eps"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        mask = self.mask_id
        if not isinstance(mask, int) or isinstance(mask, bool):
            raise ValueError(f"mask_id must be an int, got {mask!r}")
        if not 0 <= mask < self.vocabulary_size:
            raise ValueError(
                f"mask_id must be a token, below vocabulary_size={self.vocabulary_size}, got {mask}"
            )
        attention_function(self.attention)
        set_float_dtypes(self)


class GroupedQueryAttention(nnx.Module):
    """Attention whose groups of query heads share keys and values (arXiv:2305.13245).

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: DiffusionLMConfig, *, rngs: nnx.Rngs):
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.head_dim = config.head_dim
        self.query = _linear(config.width, queries, config, rngs)
        self.key = _linear(config.width, keys, config, rngs)
        self.value = _linear(config.width, keys, config, rngs)
        self.output = _linear(queries, config.width, config, rngs)
        norm = lambda: _norm(config.head_dim, config) if config.qk_norm else None
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
        config: the model's configuration.
    """

    def __init__(self, config: DiffusionLMConfig, *, rngs: nnx.Rngs):
        self.gate = _linear(config.width, config.ffn_dim, config, rngs)
        self.up = _linear(config.width, config.ffn_dim, config, rngs)
        self.down = _linear(config.ffn_dim, config.width, config, rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Applies the branch to each token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DiffusionLMBlock(nnx.Module):
    """Pre-norm attention and feed-forward, both residual.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: DiffusionLMConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config.width, config)
        self.attention = GroupedQueryAttention(config, rngs=rngs)
        self.mlp_norm = _norm(config.width, config)
        self.mlp = SwiGLU(config, rngs=rngs)

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
        x = x + self.attention.merge(attend(query, *(a.astype(query.dtype) for a in cache)))
        return x + self.mlp(self.mlp_norm(x)), cache


class DiffusionLM(nnx.Module):
    """Predicts the token of every position from all positions that it may see, without a shift.

    Args:
        config: shape and arithmetic.
    """

    def __init__(self, config: DiffusionLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(
            config.vocabulary_size,
            config.width,
            embedding_init=_INIT,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        blocks = [DiffusionLMBlock(config, rngs=rngs) for _ in range(config.num_layers)]
        self.blocks = nnx.List(blocks)
        self.final_norm = _norm(config.width, config)
        head = None if config.tied else _linear(config.width, config.vocabulary_size, config, rngs)
        self.head = head

    def __call__(
        self,
        inputs: Int[Array, "batch tokens"] | Float[Array, "batch tokens width"],
        positions: Int[Array, "#batch tokens"] | None = None,
        mask: Bool[Array, "#batch #tokens tokens"] | None = None,
        *,
        attend: Attend | None = None,
    ) -> Float[Array, "batch tokens vocabulary"]:
        """Predicts every token.

        Args:
            inputs: ids, or embeddings as `embed` returns.
            positions: of each token; 0, 1, 2, ... if None.
            mask: True where a token (second axis) may see another (third); all if None. Let every
                token see one at least, padding itself: what nothing is seen from is undefined.
            attend: attention to use in place of that of the configuration, instead of `mask`.

        Returns:
            Float32 logits.

        Raises:
            ValueError: inputs of another rank or width, or both `mask` and `attend`.
        """
        return self.logits(self.hidden(inputs, positions, mask, attend=attend))

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Returns the input embeddings of ids, in the computation dtype."""
        return self.embedding(tokens)

    def input_table(self) -> Float[Array, "vocabulary width"]:
        """Returns the input embeddings of all tokens, in the computation dtype."""
        return self.embedding.embedding[...].astype(self.config.dtype)

    def hidden(
        self,
        inputs: Int[Array, "batch tokens"] | Float[Array, "batch tokens width"],
        positions: Int[Array, "#batch tokens"] | None = None,
        mask: Bool[Array, "#batch #tokens tokens"] | None = None,
        *,
        attend: Attend | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Returns what `logits` takes: the tokens after the final norm. Arguments as of a call."""
        if mask is not None and attend is not None:
            raise ValueError("give either mask or attend, got both")
        x = self._embedded(inputs)
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        rotary, attend = self._rotary(positions), attend or self._attend(mask)
        run = lambda layer, x: layer(x, rotary, attend)
        run = _recomputed(run) if self.config.remat else run
        if self.config.scan:
            x = scan_blocks(self.blocks, run, x)
        else:
            for layer in self.blocks:
                x = run(layer, x)
        return self.final_norm(x)

    def cached(
        self,
        inputs: Int[Array, "batch active"] | Float[Array, "batch active width"],
        rows: Int32[Array, "batch active"],
        cache: Cache,
        mask: Bool[Array, "#batch #active slots"],
    ) -> tuple[Float[Array, "batch active width"], Cache]:
        """Computes some tokens of a sequence, whose others are known by their keys and values.

        Args:
            inputs: ids or embeddings of the tokens that are here.
            rows: their positions, which are also their slots; rising and distinct in each row.
                Slots beyond the cache are not written.
            cache: keys and values of all slots, from `empty_cache` or an earlier call.
            mask: True where a token may see a slot, its own among them.

        Returns:
            The tokens after the final norm, and the cache with theirs in place.
        """
        x = self._embedded(inputs)
        rotary, attend = self._rotary(rows), self._attend(mask)
        written = []
        for layer, keys in zip(self.blocks, cache, strict=True):
            x, keys = layer.cached(x, rotary, attend, rows, keys)
            written.append(keys)
        return self.final_norm(x), tuple(written)

    def empty_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """Returns zeros for `slots` positions of `batch` rows, in the computation dtype if None."""
        config = self.config
        shape = (batch, slots, config.num_kv_heads, config.head_dim)
        zeros = lambda: jnp.zeros(shape, config.dtype if dtype is None else dtype)
        return tuple(KeyValues(zeros(), zeros()) for _ in range(config.num_layers))

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Returns the float32 logits of tokens after the final norm."""
        table = self.embedding.embedding if self.head is None else self.head.kernel
        axis = 1 if self.head is None else 0
        return jax.lax.dot_general(
            hidden,
            table[...].astype(hidden.dtype),
            (((hidden.ndim - 1,), (axis,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def _embedded(self, inputs: Array) -> Array:
        """Returns ids as embeddings, and embeddings in the computation dtype."""
        if inputs.ndim == 2 and jnp.issubdtype(inputs.dtype, jnp.integer):
            return self.embed(inputs)
        if inputs.ndim != 3 or inputs.shape[-1] != self.config.width:
            raise ValueError(
                "inputs must be ids (batch, tokens) or embeddings (batch, tokens, "
                f"{self.config.width}), got {inputs.dtype} of shape {inputs.shape}"
            )
        return inputs.astype(self.config.dtype)

    def _rotary(self, positions: Array) -> Rotary:
        return text_rotary(positions, self.config.head_dim, max_period=self.config.rope_theta)

    def _attend(self, mask: Array | None) -> Attend:
        attention = attention_function(self.config.attention)
        if mask is None:
            return attention
        return lambda query, key, value: attention(query, key, value, mask=mask[:, None])


def _recomputed(run: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """Makes what runs a block keep only its input for the backward pass.

    Not `nnx.remat`, which refuses blocks whose weights are constants of the gradient.
    """

    def recompute(layer: nnx.Module, x: Array) -> Array:
        graph, state = nnx.split(layer)
        return jax.checkpoint(lambda state, x: run(nnx.merge(graph, state), x))(state, x)

    return recompute


def _norm(dim: int, config: DiffusionLMConfig) -> RMSNorm:
    return RMSNorm(dim, epsilon=config.eps, param_dtype=config.param_dtype)


def _linear(width_in: int, width_out: int, config: DiffusionLMConfig, rngs: nnx.Rngs) -> nnx.Linear:
    options: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nnx.Linear(width_in, width_out, use_bias=False, kernel_init=_INIT, **options, rngs=rngs)


_LLADA = DiffusionLMConfig(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_dim=12288,
    vocabulary_size=126464,
    mask_id=126336,
    rope_theta=500_000.0,
    eps=1e-5,
)
_SDAR = DiffusionLMConfig(
    num_layers=36,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=12288,
    vocabulary_size=151936,
    mask_id=151669,
    qk_norm=True,
    rope_theta=1e6,
    max_tokens=32768,
)

DIFFUSION_LM_PRESETS: Mapping[str, DiffusionLMConfig] = MappingProxyType(
    {
        "llada-8b": _LLADA,
        "sdar-1.7b": dataclasses.replace(
            _SDAR, num_layers=28, width=2048, num_heads=16, ffn_dim=6144
        ),
        "sdar-4b": dataclasses.replace(_SDAR, width=2560, ffn_dim=9728),
        "sdar-8b": _SDAR,
    }
)
"""Named configurations: the released LLaDA and SDAR."""
