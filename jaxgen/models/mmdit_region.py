"""What the MMDiT remembers for passes that predict some patches only: keys and values of the rest.

The masked pass of HybridStitch (arXiv 2603.07815), a reconstruction. Attention does not notice the
order of keys, so those that stay come first: a pass writes new ones at the end in place, and
nothing is put together from parts.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxgen.layers import KeyValues

if TYPE_CHECKING:
    from jaxgen.models.mmdit import MMDiTConfig


class BlockCache(NamedTuple):
    """Keys and values of tokens in one block; a pytree.

    Attributes:
        image: those of the image in the joint attention; in a `Region` of all tokens there.
        text: those of the text; None in a `Region`.
        second: those of the image in the second attention of a dual block, otherwise None.
    """

    image: KeyValues
    text: KeyValues | None
    second: KeyValues | None


type Cache = tuple[BlockCache, ...]
"""Of all blocks, tokens in their order."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Region:
    """Patches that masked passes predict while the others are only attended to; a pytree.

    Attributes:
        rows: rising, distinct numbers of these patches, row by row; see `patchify`.
        cache: keys and values in every block: of what stays, the other patches in their order, then
            of what is new, these patches and the text.
        patches: how many the picture has.
        keep_text: the text stays, too, and comes first.
    """

    rows: Int32[Array, "batch active"]
    cache: Cache
    patches: int = field(metadata={"static": True})
    keep_text: bool = field(metadata={"static": True})


def make_region(
    config: "MMDiTConfig", rows: Int32[Array, "batch active"], cache: Cache, *, keep_text: bool
) -> Region:
    """Returns the region of some patches, with room for what is new; see `MMDiT.region`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    found, heads = _shapes(cache), (config.num_heads, config.head_dim)
    complete = bool(found) and len(found[0]) > 3  # keys and values of image and text
    image, text = ((*found[0][i][:2], *heads) if complete else (0,) * 4 for i in (0, 2))
    if found != _wanted(config, [image] * 2 + [text] * 2, image) or not image[1]:
        raise ValueError(
            f"the cache must be that of a pass over everything, with keys and values of image and "
            f"text in {heads[0]} heads of {heads[1]} in {config.num_layers} blocks, "
            f"got {_described(found)}"
        )
    batch, tokens = image[:2]
    active = rows.shape[1] if rows.ndim == 2 else 0
    if rows.shape != (batch, active) or not 0 < active <= tokens:
        raise ValueError(f"rows must have shape ({batch}, 1 to {tokens} patches), got {rows.shape}")
    number = jnp.arange(batch, dtype=rows.dtype)[:, None]
    here = jnp.zeros((batch, tokens), bool).at[number, rows].set(True)
    others = jnp.argsort(here, axis=1, stable=True)[:, : tokens - active]
    blocks = []
    for of_image, of_text, second in cache:
        assert of_text is not None  # its arrays were found
        if keep_text:
            joint = of_text.joined(of_image.taken(others, active))
        else:
            joint = of_image.taken(others, active + text[1])
        blocks.append(BlockCache(joint, None, second and second.taken(others, active)))
    return Region(rows, tuple(blocks), tokens, keep_text)


def check_region(config: "MMDiTConfig", region: Region, image: Array, text: Array) -> None:
    """Checks that a region is of these image and text tokens.

    Raises:
        ValueError: it is not.
    """
    batch, tokens = image.shape[:2]
    heads = (config.num_heads, config.head_dim)
    joint = (batch, tokens + text.shape[1], *heads)
    found = _shapes(region.cache)
    fits = found == _wanted(config, [joint] * 2, (batch, tokens, *heads))
    if not fits or region.patches != tokens or len(region.rows) != batch:
        raise ValueError(
            f"the region must be of {batch} x {tokens} patches and {text.shape[1]} text tokens in "
            f"{config.num_layers} blocks, got rows {region.rows.shape} of {region.patches} patches "
            f"and {_described(found)}"
        )


def _wanted(config, joint, second) -> list[list[tuple[int, ...]]]:
    """Shapes in every block: of the joint attention, and of the second in dual blocks."""
    dual = config.dual_attention_layers
    return [joint + [second] * (2 if i in dual else 0) for i in range(config.num_layers)]


def _shapes(cache: Cache) -> list[list[tuple[int, ...]]]:
    return [[array.shape for array in jax.tree.leaves(block)] for block in cache]


def _described(found: list[list[tuple[int, ...]]]) -> str:
    shapes = sorted({shape for block in found for shape in block})
    return f"arrays of shapes {shapes} in {len(found)} blocks"
