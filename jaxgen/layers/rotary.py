"""Rotary position embedding: positions turn the channels of each head.

Su et al. 2021, arXiv:2104.09864, equation 15: a pair of channels is a point in the plane, turned by
an angle proportional to the position, so that the product of a query and a key depends on the
difference of their positions. In Wan (arXiv:2503.20314) each of the three axes of a video owns a
part of the pairs, which are neighbors (`rotate`); in Llama and Qwen (arXiv:2302.13971) a channel of
the first half of a head and one of the second are a pair (`rotate_halves`).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotary(NamedTuple):
    """Cosine and sine of the angle by which each pair of channels of a token is turned."""

    cos: Float[Array, "*batch tokens half_head_dim"]
    sin: Float[Array, "*batch tokens half_head_dim"]


def video_axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Returns how many channels of a head belong to frame, row and column.

    Row and column get the largest even number that is at most head_dim/3, the frame the rest.

    Raises:
        ValueError: `head_dim` is odd or below 6.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"head_dim must be an even number, at least 6, got {head_dim}")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def video_rotary(
    frames: int, rows: int, columns: int, head_dim: int, *, max_period: float = 10_000.0
) -> Rotary:
    """Returns the rotation of every token of a video.

    The pairs of a head are those of the frame, then of the row, then of the column. Pair i of an
    axis with d channels turns by position*max_period**(-2i/d).

    Args:
        frames: number of frames, in patches.
        rows: number of rows, in patches.
        columns: number of columns, in patches.
        head_dim: channels of a head.
        max_period: the longest period of an axis is nearly 2*pi*max_period.

    Returns:
        Float32 arrays, computed in float64; tokens are ordered frame by frame, row by row.

    Raises:
        ValueError: `head_dim` is odd or below 6.
    """
    shape = (frames, rows, columns)

    def along(axis: int, dim: int) -> np.ndarray:
        frequencies = max_period ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = np.arange(shape[axis], dtype=np.float64)[:, None] * frequencies
        return np.expand_dims(angles, tuple(other for other in range(3) if other != axis))

    # Only these three lines of angles are constants of a compiled program, not the whole table.
    lines = [along(axis, dim) for axis, dim in enumerate(video_axis_dims(head_dim))]

    def table(lines: list[np.ndarray]) -> Array:
        parts = [
            jnp.broadcast_to(jnp.asarray(line, jnp.float32), (*shape, line.shape[-1]))
            for line in lines
        ]
        return jnp.concatenate(parts, axis=-1).reshape(frames * rows * columns, head_dim // 2)

    return Rotary(table([np.cos(line) for line in lines]), table([np.sin(line) for line in lines]))


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], rotary: Rotary
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns each pair of neighboring channels (2i, 2i+1) of queries or keys.

    Args:
        x: values of any float dtype.
        rotary: the angles, one row for each token, the same for every head.

    Returns:
        The turned values, computed in float32, in the dtype of `x`.

    Raises:
        ValueError: another number of tokens or channels than `rotary` is for.
    """
    tokens, half = rotary.cos.shape
    if x.ndim != 4 or (x.shape[1], x.shape[3]) != (tokens, 2 * half):
        raise ValueError(f"x must have shape (batch, {tokens}, heads, {2 * half}), got {x.shape}")
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = rotary.cos[None, :, None, :], rotary.sin[None, :, None, :]
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def text_rotary(
    positions: Int[Array, "batch tokens"], head_dim: int, *, max_period: float = 10_000.0
) -> Rotary:
    """Returns the rotation of tokens in a line.

    Pair i turns by position*max_period**(-2i/head_dim).

    Args:
        positions: of each token, from 0.
        head_dim: channels of a head.
        max_period: the base of the angles ("theta").

    Returns:
        Float32 arrays (batch, tokens, head_dim/2).

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be a positive even number, got {head_dim}")
    frequencies = max_period ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.astype(np.float32)[None, None]
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def rotate_halves(
    x: Float[Array, "batch tokens heads head_dim"], rotary: Rotary
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns each pair of channels (i, i + head_dim/2) of queries or keys.

    Args:
        x: values of any float dtype.
        rotary: the angles of each row and token, or of one row for all, as `text_rotary` makes.

    Returns:
        The turned values, computed in float32, in the dtype of `x`.
    """
    # Halves change places by `flip`: concatenation splits what XLA does here and in the gradient
    # into more passes over memory.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    cos, sin = rotary.cos[:, :, None, None, :], rotary.sin[:, :, None, None, :]
    turned = halves * cos + jnp.flip(halves, axis=-2) * jnp.concatenate([-sin, sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)
