"""Pictures too large for one pass, in overlapping tiles of one size, blended along the seams.

All tiles go through one compiled loop, so that memory and compilation do not grow with their
number. Tiles are spread evenly and overlap at least as much as asked. Two neighbors are blended
linearly over that width in the middle of what they share: what a tile computes near its own edge,
where it misses the surroundings, is not used there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def check_tile(tile: int, overlap: int) -> None:
    """Raises ValueError unless `tile` is a positive int and `overlap` one of 0..tile - 1."""
    for name, value in {"tile": tile, "overlap": overlap}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an int, got {name}={value!r}")
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(
            "tile must be positive, and overlap not negative and below tile, "
            f"got tile={tile} and overlap={overlap}"
        )


def tile_starts(size: int, tile: int, overlap: int) -> np.ndarray:
    """Returns where tiles start along one axis, int32; the last ends with the axis.

    Args:
        size: length of the axis, at least `tile`.
        tile: length of a tile.
        overlap: least overlap of neighbors.
    """
    count = max(1, -(-(size - overlap) // (tile - overlap)))
    return (np.arange(count) * (size - tile) // max(count - 1, 1)).astype(np.int32)


def blend_weights(starts: np.ndarray, tile: int, overlap: int) -> np.ndarray:
    """Returns the weights of tiles along one axis, (tiles, tile), float32.

    The weights of one place, over the tiles that hold it, add up to one.

    Args:
        starts: where the tiles start.
        tile: length of a tile.
        overlap: over how much neighbors are blended; no more than they share.
    """
    seams = (starts[:-1] + starts[1:] + tile) / 2
    place = starts[:, None] + np.arange(tile) + 0.5

    def after(seam: np.ndarray) -> np.ndarray:
        return np.clip((place - seam[:, None]) / max(overlap, 1) + 0.5, 0.0, 1.0)

    rise, fall = after(np.append(-np.inf, seams)), after(np.append(seams, np.inf))
    return (rise - fall).astype(np.float32)


def map_tiles(
    run: Callable[[Array], Array],
    picture: Float[Array, "batch height width channels"],
    *,
    tile: int,
    overlap: int,
    scales: tuple[int, int],
) -> Float[Array, "batch new_height new_width new_channels"]:
    """Returns `run(picture)`, computed tile by tile.

    A picture that one tile covers goes through `run` as it is. The backward pass computes each
    tile again.

    Args:
        run: maps a picture of any size to another; must not depend on the place.
        picture: the picture; `scales[0]` divides height and width.
        tile: side of a tile in units of the coarsest grid, of which a pixel of `picture` is
            1/scales[0] and one of the result 1/scales[1]. An axis that is shorter has shorter
            tiles.
        overlap: least overlap of neighbors in the same unit.
        scales: pixels of the picture and of the result along a side of one unit.

    Raises:
        ValueError: a `tile` or `overlap` out of range.
    """
    check_tile(tile, overlap)
    read, write = scales
    grid = [side // read for side in picture.shape[1:3]]
    sides = [min(tile, side) for side in grid]
    starts = [
        tile_starts(size, side, min(overlap, side - 1))
        for size, side in zip(grid, sides, strict=True)
    ]
    if all(len(axis) == 1 for axis in starts):
        return run(picture)
    weights = [
        blend_weights(axis * write, side * write, overlap * write)
        for axis, side in zip(starts, sides, strict=True)
    ]
    rows, columns = (axis.ravel() for axis in np.indices([len(axis) for axis in starts]))
    places = (starts[0][rows], starts[1][columns], weights[0][rows], weights[1][columns])
    cut_shape = (len(picture), sides[0] * read, sides[1] * read, picture.shape[3])
    made = jax.eval_shape(run, jax.ShapeDtypeStruct(cut_shape, picture.dtype))
    canvas = jnp.zeros((len(picture), grid[0] * write, grid[1] * write, made.shape[3]), made.dtype)
    run = jax.checkpoint(run)

    def paste(canvas: Array, place: tuple[Array, ...]) -> tuple[Array, None]:
        row, column, row_weights, column_weights = place
        cut = jax.lax.dynamic_slice(picture, (0, row * read, column * read, 0), cut_shape)
        weight = row_weights[None, :, None, None] * column_weights[None, None, :, None]
        at = (0, row * write, column * write, 0)
        old = jax.lax.dynamic_slice(canvas, at, made.shape)
        new = old + run(cut) * weight.astype(made.dtype)
        return jax.lax.dynamic_update_slice(canvas, new, at), None

    return jax.lax.scan(paste, canvas, tuple(map(jnp.asarray, places)))[0]
