"""What a pipeline's caller may pass, checked and brought into one form."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt32


def as_captions(prompts: str | Sequence[str]) -> list[str]:
    """Return the prompts as a list, a lone string as a list of one."""
    captions = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(captions, Sequence | np.ndarray):
        raise TypeError(f"prompts must be a string or a list of strings, got {type(prompts)}")
    wrong = [type(caption).__name__ for caption in captions if not isinstance(caption, str)]
    if wrong:
        raise TypeError(f"prompts must be strings, got {', '.join(sorted(set(wrong)))}")
    if len(captions) == 0:
        raise ValueError("prompts must hold at least one caption, got none")
    return list(captions)


def seeds_and_indices(
    seed: int | Sequence[int], count: int
) -> tuple[UInt32[Array, "batch"], UInt32[Array, "batch"]]:
    """Return what each picture's noise is drawn from; see `TextToImage.__call__`."""
    several = isinstance(seed, Sequence | np.ndarray)
    seeds = list(seed) if several else [seed] * count
    wrong = [value for value in seeds if not _is_seed(value)]
    if wrong:
        raise ValueError(f"seed must be an int from 0 to 2**32 - 1, got {wrong[0]!r}")
    if len(seeds) != count:
        raise ValueError(
            f"there must be one seed, or one for each prompt, got {len(seeds)} seeds "
            f"and {count} prompts"
        )
    indices = np.zeros(count) if several else np.arange(count)
    return jnp.asarray(np.asarray(seeds, np.uint32)), jnp.asarray(indices.astype(np.uint32))


def as_guidance(scale: Any) -> Float[Array, ""]:
    """Return a guidance scale as a float32 scalar, or raise if it is no finite number."""
    number = isinstance(scale, int | float | np.number | jax.Array) and np.ndim(scale) == 0
    if not number or not np.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale!r}")
    return jnp.float32(scale)


def as_two_guidances(scale: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the guidance of a large and of a small model, from one number for both or from two."""
    scales = tuple(scale) if isinstance(scale, tuple | list) else (scale, scale)
    if len(scales) != 2:
        raise ValueError(f"guidance_scale must be one number or two, got {scale!r}")
    return as_guidance(scales[0]), as_guidance(scales[1])


def as_patch_scores(
    scores: ArrayLike | None, shape: tuple[int, int, int]
) -> Float[Array, "batch patches"] | None:
    """Return scores of patches row by row; given as (batch, rows, columns), or None."""
    if scores is None:
        return None
    array = jnp.asarray(scores, jnp.float32)
    if array.shape != shape:
        raise ValueError(f"scores must have shape {shape}, got {array.shape}")
    return array.reshape(shape[0], -1)


def _is_seed(value: Any) -> bool:
    """Whether a value can seed a picture; a bool cannot."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return 0 <= int(value) < 2**32
