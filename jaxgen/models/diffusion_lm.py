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
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxgen.layers import Attend, AttentionName, KeyValues, attention_function
from jaxgen.models.decoder_stack import DecoderStack, check_stack
from jaxgen.models.fields import require_bool

type Cache = tuple[KeyValues, ...]
"""Keys and values of every block, (batch, slots, kv_heads, head_dim), keys after their rotation."""


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
        check_stack(self)
        require_bool(self, "remat")
        mask = self.mask_id
        if not isinstance(mask, int) or isinstance(mask, bool):
            raise ValueError(f"mask_id must be an int, got {mask!r}")
        if not 0 <= mask < self.vocabulary_size:
            raise ValueError(
                f"mask_id must be a token, below vocabulary_size={self.vocabulary_size}, got {mask}"
            )


class DiffusionLM(DecoderStack):
    """Predicts the token of every position from all positions that it may see, without a shift.

    Args:
        config: shape and arithmetic.
    """

    config: DiffusionLMConfig

    def __init__(self, config: DiffusionLMConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)

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
        return self.run(
            x,
            self.rotary(positions),
            attend or self._attend(mask),
            recompute=self.config.remat,
            scan=self.config.scan,
        )

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
        rotary, attend = self.rotary(rows), self._attend(mask)
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

    def _attend(self, mask: Array | None) -> Attend:
        attention = attention_function(self.config.attention)
        if mask is None:
            return attention
        return lambda query, key, value: attention(query, key, value, mask=mask[:, None])


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
