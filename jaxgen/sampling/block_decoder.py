"""The options of block-wise decoding: one frozen part that is made of three smaller ones."""

import dataclasses
import math
from typing import Literal, get_args

import jax
from jaxtyping import Array

from jaxgen.models.fields import require_number, require_positive
from jaxgen.sampling.residual_context import ResidualContext
from jaxgen.sampling.unmasking import TokenChoice, Unmasking

Sight = Literal["block_causal", "bidirectional"]
Caching = Literal["none", "prefix", "dual"]

_WINDOWS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiffusion:
    """How an answer is decoded. The numbers of its parts may change without compiling again.

    Attributes:
        block_length: tokens of a block.
        sight: "block_causal" (SDAR) or "bidirectional" (LLaDA).
        cache: with "bidirectional", which keys and values are kept within a block: "none",
            "prefix" or "dual". "block_causal" always keeps those of earlier blocks, and wants
            "none" here.
        choice: how tokens are drawn.
        unmasking: which are settled.
        residual: what discarded predictions feed back (RCD); None: nothing.
        cfg_scale: with "bidirectional", classifier-free guidance, counted as LLaDA's code does:
            logits are `without + (cfg_scale + 1) * (with - without)`, those "without" being of the
            same answer behind a prompt of masks. 0 is the model as trained, -1 ignores the prompt;
            `guidance_scale` of the picture pipelines is one more. Choice, confidence and residual
            are of these logits, and both predictions read the same residual. A pass then has twice
            the rows, and so has the cache. None: no second prediction.
        stop_ids: tokens that end an answer; a row that holds one starts no further block.
        pad_id: fills answers after their end.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    block_length: int = dataclasses.field(default=32, metadata={"static": True})
    sight: Sight = dataclasses.field(default="block_causal", metadata={"static": True})
    cache: Caching = dataclasses.field(default="none", metadata={"static": True})
    choice: TokenChoice = dataclasses.field(default_factory=TokenChoice)
    unmasking: Unmasking = dataclasses.field(default_factory=Unmasking)
    residual: ResidualContext | None = None
    cfg_scale: float | Array | None = None
    stop_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    pad_id: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self):
        require_positive(self, "block_length")
        for name, kind in {"sight": Sight, "cache": Caching}.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if self.sight == "block_causal" and self.cache != "none":
            raise ValueError(
                "block_causal keeps earlier blocks by itself and wants cache='none', "
                f"got cache={self.cache!r}"
            )
        wanted = "-1 or more and finite, or None"
        require_number(self, "cfg_scale", lambda x: -1 <= x < math.inf, wanted)
        if self.sight == "block_causal" and self.cfg_scale is not None:
            raise ValueError(
                "cfg_scale is for sight='bidirectional' and must be None with 'block_causal', "
                f"got {self.cfg_scale}"
            )

    def blocks(self, new_tokens: int) -> int:
        """Returns the most blocks that an answer of `new_tokens` can touch."""
        # A prompt may fill all but one place of the block that the answer begins in.
        before = self.block_length - 1 if self.sight == "block_causal" else 0
        return -(-(new_tokens + before) // self.block_length)

    def windows(self, new_tokens: int) -> tuple[int, ...]:
        """Returns the numbers of tokens that a step within a block computes, rising.

        "prefix" computes everything from the block to the end, which becomes less with every block.
        A program has fixed shapes, so that a few numbers must do.
        """
        if self.cache != "prefix":
            return (self.block_length,)
        blocks = self.blocks(new_tokens)
        counts = {-(-blocks * part // _WINDOWS) for part in range(1, _WINDOWS + 1)}
        return tuple(count * self.block_length for count in sorted(counts))
