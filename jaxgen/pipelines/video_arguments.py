"""What a caller of the video pipeline may pass beside captions, checked and in one form."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.models.text_encoder import TextEncoder
from jaxgen.models.wan import Wan
from jaxgen.pipelines.arguments import as_captions
from jaxgen.sampling import Conditioning
from jaxgen.text import WordTokenizer

AXES: tuple[str, ...] = ("frames", "height", "width")


def check_fit(
    transformer: Wan, text_encoder: TextEncoder | None, tokenizer: WordTokenizer | None
) -> None:
    """Compare the sizes that the parts of a model share; raise ValueError with all that differ."""
    video = transformer.config
    pairs = {"in_channels and out_channels": (video.in_channels, video.out_channels)}
    if text_encoder is not None and tokenizer is not None:
        text = text_encoder.config
        pairs |= {
            "text_dim and hidden_dim": (video.text_dim, text.hidden_dim),
            "vocabulary_size and tokenizer.size": (text.vocabulary_size, tokenizer.size),
            "max_tokens of encoder and tokenizer": (text.max_tokens, tokenizer.max_tokens),
            "in_channels and RGB": (video.in_channels, 3),
        }
    elif text_encoder is not None or tokenizer is not None:
        there = "text_encoder" if tokenizer is None else "tokenizer"
        raise ValueError(f"text_encoder and tokenizer must both be given or none, got {there} only")
    wrong = [f"{names}: {one} and {other}" for names, (one, other) in pairs.items() if one != other]
    if wrong:
        raise ValueError("parts do not fit together, these must be equal: " + "; ".join(wrong))


def as_captions_alone(prompts: Any, features: Mapping[str, Any]) -> list[str]:
    """Return the prompts as a list, or raise if there are none or features beside them."""
    if prompts is None or _names(features):
        raise ValueError(
            "this model has a text encoder: prompts must be given, and no features, got "
            f"{_described(prompts, features)}"
        )
    return as_captions(prompts)


def refuse_prompts(prompts: Any, features: Mapping[str, Any], dim: int) -> None:
    """Raise ValueError unless there is a context and no prompts."""
    if prompts is not None or features["context"] is None:
        raise ValueError(
            "this model has no text encoder: context must be given, float features of shape "
            f"(batch, tokens, {dim}), and no prompts, got {_described(prompts, features)}"
        )


def as_conditionings(
    context: Any, negative_context: Any, guidance_scale: Array, dim: int
) -> tuple[Conditioning, Conditioning]:
    """Return text features as both halves of guidance; see `TextToVideo.__call__`."""
    features = _as_features("context", context, dim)
    if negative_context is None:
        if float(guidance_scale) != 1.0:
            raise ValueError(
                "negative_context must be given, features of the same shape as context, unless "
                f"guidance_scale is 1, got guidance_scale={float(guidance_scale)}"
            )
        return _conditioning(features), _conditioning(features)
    negative = _as_features("negative_context", negative_context, dim)
    batch, tokens, _ = features.shape
    if negative.shape not in (features.shape, (1, *features.shape[1:])):
        raise ValueError(
            f"negative_context must have the shape of context, ({batch}, {tokens}, {dim}), or "
            f"(1, {tokens}, {dim}) for all clips, got {negative.shape}"
        )
    return _conditioning(features), _conditioning(jnp.broadcast_to(negative, features.shape))


def as_noise(
    noise: Any, given: Mapping[str, int | None], batch: int, channels: int
) -> Float[Array, "batch frames height width channels"]:
    """Return the first noise as float32, or raise if it is not that of so many clips.

    Args:
        noise: What the caller passed.
        given: Frames, height and width as the caller passed them; None: those of the noise.
        batch: Number of clips.
        channels: Of the transformer.
    """
    array = _as_floats("noise", noise)
    fits = array.ndim == 5 and (array.shape[0], array.shape[-1]) == (batch, channels)
    if not fits or array.size == 0:
        raise ValueError(
            f"noise must have shape ({batch}, {', '.join(AXES)}, {channels}), got {array.shape}"
        )
    sizes = dict(zip(AXES, array.shape[1:4], strict=True))
    if any(size not in (None, sizes[axis]) for axis, size in given.items()):
        raise ValueError(
            f"frames, height and width must be left out or be those of noise, {_listed(sizes)}, "
            f"got {_listed(given)}"
        )
    return array.astype(jnp.float32)


def trained_sizes(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of the clips of a training run, None where its card does not tell."""
    run = card.get("config")
    run = run if isinstance(run, Mapping) else {}
    return {"frames": run.get("frames"), "height": run.get("size"), "width": run.get("size")}


def clip_sizes(
    given: Mapping[str, int | None], trained: Mapping[str, int | None]
) -> tuple[int, int, int]:
    """Return frames, height and width: as given or, where None, as trained on.

    Raises:
        ValueError: A size is neither given nor known, or is no positive int.
    """
    sizes = {axis: trained.get(axis) if given[axis] is None else given[axis] for axis in AXES}
    if None in sizes.values():
        raise ValueError(
            "frames, height and width must be given, this model does not say what it was trained "
            f"on, got {_listed(given)}"
        )
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{axis} must be a positive int, got {size!r}")
    frames, height, width = (int(size or 0) for size in sizes.values())
    return frames, height, width


def _as_features(name: str, value: Any, dim: int) -> Float[Array, "batch tokens dim"]:
    """Return text features as float32, or raise if they have another shape or are no floats."""
    array = _as_floats(name, value)
    if array.ndim != 3 or array.shape[-1] != dim or array.size == 0:
        raise ValueError(f"{name} must have shape (batch, tokens, {dim}), got {array.shape}")
    return array.astype(jnp.float32)


def _as_floats(name: str, value: Any) -> Array:
    """Return an array of floats; a list of numbers is not one."""
    dtype = getattr(value, "dtype", type(value))
    if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a NumPy or JAX array of floats, got {dtype}")
    return jnp.asarray(value)


def _conditioning(features: Float[Array, "batch tokens dim"]) -> Conditioning:
    """Return what guidance takes; the transformer reads no pooled vector."""
    return Conditioning(features, jnp.zeros((len(features), 0), jnp.float32))


def _listed(sizes: Mapping[str, int | None]) -> str:
    return ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)


def _names(features: Mapping[str, Any]) -> list[str]:
    return [name for name, value in features.items() if value is not None]


def _described(prompts: Any, features: Mapping[str, Any]) -> str:
    """What there is of text, for a message."""
    return f"prompts={prompts!r} and {' and '.join(_names(features)) or 'no features'}"
