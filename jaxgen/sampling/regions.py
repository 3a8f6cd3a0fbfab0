"""Which patches of a picture the large model goes on with: scores and masks of HybridStitch.

HybridStitch (arXiv 2603.07815) says that such regions are found, not how: all of this is a
reconstruction. A score is large where the pictures that two predictions lead to differ.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxgen.layers import patchify


def patch_scores(
    difference: Float[Array, "batch height width channels"], patch_size: int, *, opening: int = 0
) -> Float[Array, "batch patches"]:
    """Average how much two predictions differ, over each patch.

    Args:
        difference: Of two velocities or two estimates of the clean picture.
        patch_size: Side of a patch in latent pixels.
        opening: Side of a square of patches, odd; bright spots smaller than it are removed (a
            grey-scale opening), so that regions are compact. 0 or 1: none.

    Returns:
        float32 means of the absolute difference, patch by patch and row by row.

    Raises:
        ValueError: `opening` is even or negative.
    """
    if opening < 0 or (opening and not opening % 2):
        raise ValueError(f"opening must be 0 or an odd number of patches, got {opening}")
    scores = jnp.mean(patchify(jnp.abs(difference.astype(jnp.float32)), patch_size), axis=-1)
    if opening > 1:
        rows, columns = (side // patch_size for side in difference.shape[1:3])
        image = scores.reshape(-1, rows, columns)
        window = (1, opening, opening), (1, 1, 1), "SAME"
        image = lax.reduce_window(image, jnp.inf, lax.min, *window)
        image = lax.reduce_window(image, -jnp.inf, lax.max, *window)
        scores = image.reshape(scores.shape)
    return scores


def active_count(patches: int, share: float, multiple: int = 1) -> int:
    """Return how many patches a share of them is, rounded up to a multiple, at most all.

    Args:
        patches: Of a picture.
        share: Between 0 and 1.
        multiple: Attention kernels work on blocks of queries; a full last block costs no more.
    """
    wanted = math.ceil(round(share * patches, 6))
    return min(patches, math.ceil(wanted / multiple) * multiple)


def highest(scores: Float[Array, "batch patches"], count: int) -> Int32[Array, "batch active"]:
    """Return the numbers of the patches with the highest scores, rising.

    Among equal scores the lower number wins. Every picture gets `count` patches, so shapes do not
    depend on what is in it.
    """
    _, rows = lax.top_k(scores, count)
    return jnp.sort(rows, axis=1).astype(jnp.int32)


def place(
    everywhere: Float[Array, "batch patches values"],
    rows: Int32[Array, "batch active"],
    parts: Float[Array, "batch active values"],
    weight: Float[Array, "batch patches"] | None = None,
) -> Float[Array, "batch patches values"]:
    """Put what was computed for some patches among the others.

    Args:
        everywhere: Values of all patches.
        rows: Numbers of the patches to replace.
        parts: Their new values.
        weight: How much of the new values to take, from 0 to 1, patch by patch; all if None.
    """
    batch = jnp.arange(rows.shape[0], dtype=rows.dtype)[:, None]
    parts = parts.astype(everywhere.dtype)
    if weight is not None:
        share = weight.astype(everywhere.dtype)[batch, rows][..., None]
        parts = share * parts + (1 - share) * everywhere[batch, rows]
    target = everywhere.at[batch, rows]
    return target.set(parts, indices_are_sorted=True, unique_indices=True)


def as_mask(rows: Int32[Array, "batch active"], patches: int) -> Array:
    """Return a mask, bool (batch, patches), True at `rows`."""
    return jnp.any(jax.nn.one_hot(rows, patches, dtype=jnp.bool_), axis=1)
