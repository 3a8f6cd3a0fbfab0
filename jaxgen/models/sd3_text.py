"""What SD3 reads of a prompt: two CLIP text models and a T5 encoder, joined.

Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2. The context is a sequence: the tokens
of both CLIP models side by side in the channels, filled up with zeros, then those of T5. Each model
has tokens of its own, so that these stand for the same prompt but not for the same words. The
pooled vector is that of both CLIP models. No mask tells padding from text.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgen.models.clip_text import CLIPText
from jaxgen.models.t5_encoder import T5Encoder

T5_TOKENS = 256
"""Tokens of T5 in the context of SD3 unless chosen otherwise."""

HIDDEN_DIM = 4096
"""Size of a context token of SD3, and the width of T5 XXL."""


class SD3TextOutput(NamedTuple):
    """The condition of an SD3 transformer (`jaxgen.models.MMDiT`).

    Attributes:
        context: the tokens of CLIP, then those of T5; 77 + 256 = 333 of 4096 in SD3.
        pooled: the pooled vectors of both CLIP models; 768 + 1280 = 2048 in SD3.
    """

    context: Float[Array, "batch tokens hidden_dim"]
    pooled: Float[Array, "batch pooled_dim"]


def join_sd3_text(
    clip_l: Float[Array, "batch clip_tokens width_l"],
    clip_l_pooled: Float[Array, "batch pooled_l"],
    clip_g: Float[Array, "batch clip_tokens width_g"],
    clip_g_pooled: Float[Array, "batch pooled_g"],
    t5: Float[Array, "batch t5_tokens hidden_dim"] | None = None,
    *,
    t5_tokens: int = T5_TOKENS,
    hidden_dim: int = HIDDEN_DIM,
) -> SD3TextOutput:
    """Joins the outputs of the three encoders.

    Args:
        clip_l: penultimate states of the first CLIP model.
        clip_l_pooled: its pooled vector.
        clip_g: penultimate states of the second, for as many tokens.
        clip_g_pooled: its pooled vector.
        t5: last states of T5; None stands for zeros, as if there were no T5.
        t5_tokens: how many tokens of zeros that is; not read if `t5` is given.
        hidden_dim: their size; not read if `t5` is given.

    Returns:
        Context and pooled vector, in the dtype of all encoders, float32 if theirs differ.

    Raises:
        ValueError: wrong ranks, batches or numbers of CLIP tokens that differ, CLIP models that
            are together wider than a context token, or a negative `t5_tokens`.
    """
    if t5 is None and t5_tokens < 0:
        raise ValueError(f"t5_tokens must not be negative, got {t5_tokens}")
    batch = clip_l.shape[0] if clip_l.ndim else 0
    if t5 is None:
        t5 = jnp.zeros((batch, t5_tokens, hidden_dim), clip_l.dtype)
    given = {
        "clip_l": (clip_l, 3),
        "clip_l_pooled": (clip_l_pooled, 2),
        "clip_g": (clip_g, 3),
        "clip_g_pooled": (clip_g_pooled, 2),
        "t5": (t5, 3),
    }
    for name, (array, rank) in given.items():
        if array.ndim != rank or array.shape[0] != batch:
            raise ValueError(
                f"{name} must have {rank} axes, the first of {batch} prompts, got {array.shape}"
            )
    if clip_l.shape[1] != clip_g.shape[1]:
        raise ValueError(
            "clip_l and clip_g must have as many tokens, got "
            f"{clip_l.shape[1]} and {clip_g.shape[1]}"
        )
    free = t5.shape[2] - clip_l.shape[2] - clip_g.shape[2]
    if free < 0:
        raise ValueError(
            f"both CLIP models must fit into {t5.shape[2]} channels, got "
            f"{clip_l.shape[2]} and {clip_g.shape[2]}"
        )
    same = all(array.dtype == clip_l.dtype for array, _ in given.values())
    dtype = clip_l.dtype if same else jnp.float32
    arrays = {name: array.astype(dtype) for name, (array, _) in given.items()}
    clip = jnp.concatenate([arrays["clip_l"], arrays["clip_g"]], axis=2)
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, free)))
    return SD3TextOutput(
        jnp.concatenate([clip, arrays["t5"]], axis=1),
        jnp.concatenate([arrays["clip_l_pooled"], arrays["clip_g_pooled"]], axis=1),
    )


class SD3Text(nnx.Module):
    """The three text encoders of SD3 and SD3.5.

    Args:
        clip_l: the first CLIP model, `text_encoder` of a folder.
        clip_g: the second, `text_encoder_2`.
        t5: the T5 encoder, `text_encoder_3`; None goes without it: it is by far the largest, and
            SD3 was trained to do without now and then.
        hidden_dim: size of a context token without `t5`.

    Raises:
        ValueError: CLIP models that are together wider than a context token.
    """

    def __init__(
        self,
        clip_l: CLIPText,
        clip_g: CLIPText,
        t5: T5Encoder | None = None,
        *,
        hidden_dim: int = HIDDEN_DIM,
    ):
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.hidden_dim = hidden_dim if t5 is None else t5.config.width
        if clip_l.config.width + clip_g.config.width > self.hidden_dim:
            raise ValueError(
                f"both CLIP models must fit into {self.hidden_dim} channels, got "
                f"{clip_l.config.width} and {clip_g.config.width}"
            )

    def __call__(
        self,
        clip_l_tokens: Int[Array, "batch clip_tokens"],
        clip_g_tokens: Int[Array, "batch clip_tokens"],
        t5_tokens: Int[Array, "batch t5_tokens"] | None = None,
    ) -> SD3TextOutput:
        """Encodes prompts.

        Args:
            clip_l_tokens: ids for the first CLIP model, padded with the id that ends a text.
            clip_g_tokens: ids for the second, padded with 0.
            t5_tokens: ids for T5, padded with 0. Without a T5 encoder only their number counts,
                256 if None.

        Raises:
            ValueError: ids that an encoder refuses, or none for T5 although it is there.
        """
        left, right = self.clip_l(clip_l_tokens), self.clip_g(clip_g_tokens)
        length = T5_TOKENS if t5_tokens is None else t5_tokens.shape[1]
        states = None
        if self.t5 is not None:
            if t5_tokens is None:
                raise ValueError("t5_tokens must be given: there is a T5 encoder")
            states = self.t5(t5_tokens)
        return join_sd3_text(
            *(left.penultimate, left.pooled, right.penultimate, right.pooled, states),
            t5_tokens=length,
            hidden_dim=self.hidden_dim,
        )
