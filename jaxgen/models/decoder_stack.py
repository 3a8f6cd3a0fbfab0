"""What the language models have in common: token embeddings, a stack of blocks, a head."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgen.layers import (
    Attend,
    DecoderBlock,
    Rotary,
    attention_function,
    divide,
    float32_logits,
    linear_of,
    look_up,
    make_blocks,
    norm_of,
    scan_blocks,
    text_rotary,
)
from jaxgen.layers.decoder_block import INIT
from jaxgen.models.fields import (
    require_bool,
    require_divides,
    require_positive,
    set_float_dtypes,
)

type Policy = Callable[..., bool] | None
"""What `jax.checkpoint` keeps of a block; None: its input alone."""


def check_stack(config: Any) -> None:
    """Checks the fields that the configurations of language models share, and makes dtypes equal.

    Raises:
        ValueError: a value out of range; the message names the field.
    """
    require_positive(config, "num_layers", "width", "num_heads", "num_kv_heads", "head_dim")
    require_positive(config, "ffn_dim", "vocabulary_size", "max_tokens")
    require_divides(config, "num_kv_heads", "num_heads")
    require_bool(config, "qk_norm", "tied", "scan")
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even, got {config.head_dim}")
    for name in ("rope_theta", "eps"):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    attention_function(config.attention)
    set_float_dtypes(config)


class DecoderStack(nnx.Module):
    """Embeds tokens, runs the blocks, and predicts tokens; base of the language models.

    Args:
        shape: sizes and dtypes, the configuration of a language model.
    """

    def __init__(self, shape: Any, *, rngs: nnx.Rngs):
        self.config = shape
        self.embedding = nnx.Embed(
            shape.vocabulary_size,
            shape.width,
            embedding_init=INIT,
            dtype=shape.dtype,
            param_dtype=shape.param_dtype,
            rngs=rngs,
        )
        make = functools.partial(DecoderBlock, shape)
        self.blocks = nnx.List(make_blocks(make, shape.num_layers, rngs=rngs))
        self.final_norm = norm_of(shape.width, shape)
        head = None if shape.tied else linear_of(shape.width, shape.vocabulary_size, shape, rngs)
        self.head = head

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Returns the input embeddings of ids, in the computation dtype."""
        table = divide(self.embedding.embedding[...], "vocabulary", None)
        return divide(look_up(table, tokens, self.config.dtype), "batch", "tokens", None)

    def input_table(self) -> Float[Array, "vocabulary width"]:
        """Returns the input embeddings of all tokens, in the computation dtype."""
        return self.embedding.embedding[...].astype(self.config.dtype)

    def rotary(self, positions: Int[Array, "batch tokens"]) -> Rotary:
        """Returns the rotation of tokens at these positions."""
        return text_rotary(positions, self.config.head_dim, max_period=self.config.rope_theta)

    def run(
        self,
        x: Float[Array, "batch tokens width"],
        rotary: Rotary,
        attend: Attend,
        *,
        recompute: bool,
        scan: bool,
        policy: Policy = None,
    ) -> Float[Array, "batch tokens width"]:
        """Runs the blocks and the final norm.

        Args:
            x: embeddings.
            rotary: of their positions.
            attend: which token sees which.
            recompute: compute each block again in the backward pass.
            scan: compile one block and loop over the weights of all, copied together first.
            policy: what of a block is kept with `recompute`.
        """
        call = lambda block, x: divide(block(x, rotary, attend), "batch", "tokens", None)
        call = _recomputed(call, policy) if recompute else call
        if scan:
            x = scan_blocks(self.blocks, call, x)
        else:
            for block in self.blocks:
                x = call(block, x)
        return self.final_norm(x)

    def output_table(self) -> tuple[Float[Array, "first second"], int]:
        """Returns the head, and which of its axes is the width."""
        if self.head is None:
            return self.embedding.embedding[...], 1
        return self.head.kernel[...], 0

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Returns the float32 logits of tokens after the final norm; see `float32_logits`."""
        return float32_logits(hidden, *self.output_table())


def _recomputed(
    run: Callable[[Any, Array], Array], policy: Policy
) -> Callable[[Any, Array], Array]:
    """Makes what runs a block keep only its input, and what the policy says, for later.

    Not `nnx.remat`, which refuses blocks whose weights are constants of the gradient.
    """

    def recompute(layer: nnx.Module, x: Array) -> Array:
        graph, state = nnx.split(layer)
        compute = lambda state, x: run(nnx.merge(graph, state), x)
        return jax.checkpoint(compute, policy=policy)(state, x)

    return recompute
