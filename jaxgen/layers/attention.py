"""Attention layers: projections of one stream, self-attention, and the joint attention of SD3.

The arithmetic between the projections is a function called as `jax.nn.dot_product_attention`,
chosen by name: "exact", which on GPUs in 16 bits is cuDNN's, or "int8", which trains with 8-bit
integer matrix products (`kernels_pallas.sage_attention`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxgen.layers.linear import Linear
from jaxgen.layers.norms import RMSNorm

AttentionName = Literal["exact", "int8"]

_XAVIER = nnx.initializers.xavier_uniform()
_MANY_SCORES = 2**24


def attention_function(name: str) -> Callable[..., Any]:
    """Returns the attention function of this name, called as `jax.nn.dot_product_attention`.

    Args:
        name: "exact" for `exact_attention`, "int8" for `kernels_pallas.sage_attention`.

    Raises:
        ValueError: any other name.
    """
    match name:
        case "exact":
            return exact_attention
        case "int8":
            from kernels_pallas import sage_attention

            return sage_attention
        case _:
            allowed = ", ".join(map(repr, get_args(AttentionName)))
            raise ValueError(f"attention must be one of {allowed}, got {name!r}")


@functools.cache
def causal_attention(
    name: AttentionName, *, smooth_keys: bool = True, smooth_queries: bool = False
) -> Callable[..., Array]:
    """Returns the attention of a language model, always the same function for the same arguments.

    It is called `attend(query, key, value, segment_ids=None, bias=None)`; a token sees those before
    it, of its own document if `segment_ids` (batch, tokens) say which that is.

    Args:
        name: as for `attention_function`.
        smooth_keys: of "int8", as for `kernels_pallas.sage_attention`.
        smooth_queries: likewise.
    """
    attention, integer = attention_function(name), name == "int8"

    def attend(
        query: Array,
        key: Array,
        value: Array,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        bias: Array | None = None,
    ) -> Array:
        options: dict[str, Any] = (
            {"smooth_keys": smooth_keys, "smooth_queries": smooth_queries} if integer else {}
        )
        if segment_ids is not None and integer:
            options |= {"query_segment_ids": segment_ids, "key_value_segment_ids": segment_ids}
        elif segment_ids is not None:
            options = {"mask": (segment_ids[:, :, None] == segment_ids[:, None])[:, None]}
        return attention(query, key, value, bias, is_causal=True, **options)

    return attend


def exact_attention(
    query: Float[Array, "*batch queries heads head_dim"],
    key: Float[Array, "*batch keys key_heads head_dim"],
    value: Float[Array, "*batch keys key_heads head_dim"],
    bias: Array | None = None,
    mask: Array | None = None,
    **options: Any,
) -> Float[Array, "*batch queries heads head_dim"]:
    """`jax.nn.dot_product_attention`, that of cuDNN where XLA's would store many scores.

    XLA writes an array of queries x keys for each head. On GPUs, in 16 bits, cuDNN needs none, with
    a causal mask or none, and one for all heads with a mask and even lengths; what has a bias, and
    small calls, stay with XLA. On the CPU, where XLA lacks the products of float16 that are summed
    in float32, float16 is computed in float32.

    Args:
        query: any float dtype.
        key: dtype of the query.
        value: like the key.
        bias: added to the scores.
        mask: True where a query may see a key. What a query gets that may see none is not defined.
        **options: the others of `jax.nn.dot_product_attention`.
    """
    plain = bias is None and options.keys() <= {"is_causal"} and _cudnn_takes(query, key, mask)
    if plain and _many_scores(query, key):
        options |= {"implementation": "cudnn"}
        if mask is not None:
            mask = _without_blind_rows(mask, query.shape[-3], options.get("is_causal", False))
    widened = _halves_on_cpu(query, key, value)
    if widened:
        query, key, value = (array.astype(jnp.float32) for array in (query, key, value))
    with jax.numpy_dtype_promotion("standard"):  # it relies on it for 16 bits
        found = jax.nn.dot_product_attention(query, key, value, bias, mask, **options)
    if widened:
        return jax.tree.map(lambda array: array.astype(jnp.float16), found)
    return found


def _cudnn_takes(query: Array, key: Array, mask: Array | None) -> bool:
    """Whether cuDNN takes a mask: for even lengths, one that all heads share."""
    if mask is None:
        return True
    queries, keys = query.shape[-3], key.shape[-3]
    if query.ndim != 4 or mask.ndim != 4 or queries % 2 or keys % 2:
        return False
    batch, heads, *seen = mask.shape
    shared = heads == 1 and batch in (1, query.shape[0])
    return shared and seen in ([queries, keys], [1, keys])


def _without_blind_rows(mask: Array, queries: int, is_causal: bool) -> Array:
    """A row for each query; what sees nothing, where cuDNN's gradients are wrong, sees all."""
    *outside, _, keys = mask.shape
    mask = jnp.broadcast_to(mask, (*outside, queries, keys))
    causal = jnp.tri(queries, keys, dtype=jnp.bool_)[None, None]
    seen = mask & causal if is_causal else mask
    return mask | ~seen.any(axis=-1, keepdims=True)


def _many_scores(query: Array, key: Array) -> bool:
    """Whether cuDNN takes a call, and XLA would store many scores."""
    dim, count = query.shape[-1], math.prod(query.shape[:-1]) * key.shape[-3]
    narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = dim % 8 == 0 and dim <= 128
    return jax.default_backend() == "gpu" and narrow and fits and count >= _MANY_SCORES


def _halves_on_cpu(*arrays: Array) -> bool:
    """Whether all are float16, on the CPU: it cannot sum their products in float32."""
    return jax.default_backend() == "cpu" and all(array.dtype == jnp.float16 for array in arrays)


class KeyValues(NamedTuple):
    """Keys and values of the tokens of one stream, as attention takes them; a pytree.

    Attributes:
        key: (batch, tokens, heads, head_dim), after its norm.
        value: like the key.
    """

    key: Array
    value: Array

    def astype(self, dtype: DTypeLike) -> "KeyValues":
        """Returns these in the dtype of a query; a cache may be kept in another."""
        return KeyValues(self.key.astype(dtype), self.value.astype(dtype))

    def updated(self, rows: Int32[Array, "batch active"], new: "KeyValues") -> "KeyValues":
        """Returns these with some tokens replaced, whose rising, distinct numbers `rows` holds."""
        batch = jnp.arange(rows.shape[0], dtype=rows.dtype)[:, None]

        def write(old: Array, part: Array) -> Array:
            place = old.at[batch, rows]
            return place.set(part.astype(old.dtype), indices_are_sorted=True, unique_indices=True)

        return KeyValues(write(self.key, new.key), write(self.value, new.value))

    def taken(self, rows: Int32[Array, "batch taken"], room: int) -> "KeyValues":
        """Returns those of some tokens, and room for `room` tokens after them; see `ended`."""

        def take(array: Array) -> Array:
            kept = jnp.take_along_axis(array, rows[:, :, None, None], axis=1)
            return jnp.pad(kept, ((0, 0), (0, room), (0, 0), (0, 0)))

        return KeyValues(take(self.key), take(self.value))

    def joined(self, others: "KeyValues") -> "KeyValues":
        """Returns these and then others."""
        return KeyValues(
            *(jnp.concatenate(pair, axis=1) for pair in zip(self, others, strict=True))
        )

    def ended(self, new: "KeyValues") -> "KeyValues":
        """Returns these with other tokens at the end, in place where nothing else needs these."""

        def write(old: Array, part: Array) -> Array:
            start = old.shape[1] - part.shape[1]
            return jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), start, axis=1)

        return KeyValues(write(self.key, new.key), write(self.value, new.value))


class HeadProjections(nnx.Module):
    """The projections of one token stream into heads and, unless left out, back.

    Args:
        dim: width of the tokens; the heads together have the same width.
        num_heads: number of heads; must divide `dim`.
        qk_norm: RMS-normalize queries and keys per head, with weights shared by the heads.
        output: False leaves the output projection out: the text stream of SD3's last block.
        dtype: computation dtype.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        output: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads} and dim={dim}")

        def linear() -> Linear:
            dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
            return Linear(dim, dim, kernel_init=_XAVIER, **dtypes, rngs=rngs)

        def norm() -> RMSNorm | None:
            if not qk_norm:
                return None
            return RMSNorm(dim // num_heads, param_dtype=param_dtype)

        self.num_heads = num_heads
        self.query, self.key, self.value = linear(), linear(), linear()
        self.query_norm, self.key_norm = norm(), norm()
        self.output = linear() if output else None

    def split(
        self, x: Float[Array, "batch tokens dim"]
    ) -> tuple[
        Float[Array, "batch tokens heads head_dim"],
        Float[Array, "batch tokens heads head_dim"],
        Float[Array, "batch tokens heads head_dim"],
    ]:
        """Returns query, key and value in heads."""
        heads = (*x.shape[:-1], self.num_heads, -1)
        query, key, value = (
            projection(x).reshape(heads) for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def merge(
        self, heads: Float[Array, "batch tokens heads head_dim"]
    ) -> Float[Array, "batch tokens dim"] | None:
        """Joins the heads and projects them; None for a stream without output projection."""
        if self.output is None:
            return None
        return self.output(heads.reshape(*heads.shape[:-2], -1))


class SelfAttention(nnx.Module):
    """Multi-head attention of one stream to itself.

    Args:
        dim: width of the tokens.
        num_heads: number of heads; must divide `dim`.
        qk_norm: RMS-normalize queries and keys per head.
        attention: "exact" or "int8".
        dtype: computation dtype.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: unknown `attention`, or `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        attention: AttentionName = "exact",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.attend = attention_function(attention)
        self.heads = HeadProjections(
            dim, num_heads, qk_norm=qk_norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        mask: Bool[Array, "batch #heads #tokens tokens"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Attends; `mask` is True where a query (third axis) may see a key (last axis)."""
        query, key, value = self.heads.split(x)
        return self._merge(self.attend(query, key, value, mask=mask))

    def cached(
        self,
        x: Float[Array, "batch active dim"],
        cache: KeyValues | None = None,
    ) -> tuple[Float[Array, "batch active dim"], KeyValues]:
        """Attends to tokens of which only some are here.

        Args:
            x: all tokens, or some.
            cache: with some, keys and values of the others and room for these, from
                `KeyValues.taken`.

        Returns:
            What `x` found, and the keys and values of all tokens, those of `x` at the end.
        """
        query, key, value = self.heads.split(x)
        keys = KeyValues(key, value)
        if cache is not None:
            keys = cache.ended(keys)
        return self._merge(self.attend(query, *keys.astype(query.dtype))), keys

    def _merge(self, heads: Array) -> Array:
        merged = self.heads.merge(heads)
        assert merged is not None  # HeadProjections above has an output projection
        return merged


class JointAttention(nnx.Module):
    """Image and text tokens attend to both; each stream has its own projections and norms.

    Esser et al. 2024 (arXiv:2403.03206), figure 2. There is no mask: padding tokens of the text
    take part, as in SD3.

    Args:
        dim: width of both streams.
        num_heads: number of heads; must divide `dim`.
        qk_norm: RMS-normalize queries and keys per head, each stream with its own weights.
        text_output: False leaves out the output projection of the text stream (last block).
        attention: "exact" or "int8".
        dtype: computation dtype.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: unknown `attention`, or `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        text_output: bool = True,
        attention: AttentionName = "exact",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.attend = attention_function(attention)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.image = HeadProjections(dim, num_heads, qk_norm=qk_norm, **dtypes, rngs=rngs)
        self.text = HeadProjections(
            dim, num_heads, qk_norm=qk_norm, output=text_output, **dtypes, rngs=rngs
        )

    def __call__(
        self,
        image: Float[Array, "batch image_tokens dim"],
        text: Float[Array, "batch text_tokens dim"],
    ) -> tuple[
        Float[Array, "batch image_tokens dim"], Float[Array, "batch text_tokens dim"] | None
    ]:
        """Returns the attention output of both streams, None for text without `text_output`."""
        image_out, text_out, *_ = self.cached(image, text)
        return image_out, text_out

    def cached(
        self,
        image: Float[Array, "batch active dim"],
        text: Float[Array, "batch text_tokens dim"] | None,
        cache: KeyValues | None = None,
    ) -> tuple[
        Float[Array, "batch active dim"],
        Float[Array, "batch text_tokens dim"] | None,
        KeyValues,
        KeyValues | None,
    ]:
        """Attends to tokens of which only some are here.

        Args:
            image: all image tokens, or some.
            text: all text tokens; None if the cache has them.
            cache: with some, keys and values of all other tokens and room for these.

        Returns:
            The output of both streams, and keys and values: of the image and of the text, or with
            a cache of all tokens, those that were given at the end.
        """
        image_query, *image_keys = self.image.split(image)
        of_image = keys = KeyValues(*image_keys)
        of_text, queries = None, [image_query]
        if text is not None:
            text_query, *text_keys = self.text.split(text)
            of_text = KeyValues(*text_keys)
            keys = of_image.joined(of_text)
            # Without a text output nobody would read what the text queries find.
            queries += [] if self.text.output is None else [text_query]
        if cache is not None:
            of_image = keys = cache.ended(keys)
            of_text = None
        found = self.attend(jnp.concatenate(queries, axis=1), *keys.astype(image_query.dtype))
        image_heads, text_heads = jnp.split(found, [image.shape[1]], axis=1)
        merged = self.image.merge(image_heads)
        assert merged is not None  # the image stream always has an output projection
        text_out = None if text is None else self.text.merge(text_heads)
        return merged, text_out, of_image, of_text
