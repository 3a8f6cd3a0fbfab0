"""Embeddings of pictures, positions and time steps, as in SD3 (arXiv:2403.03206)."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxgen.layers.linear import Linear
from jaxgen.layers.mlp import ConditionEmbedding


class PositionTable(nnx.Variable):
    """A stored position table: saved and loaded with the weights, never trained."""


def sinusoid(
    positions: Float[Array, " batch"], dim: int, *, max_period: float = 10_000.0
) -> Float[Array, "batch dim"]:
    """Embeds scalars by dim/2 cosines followed by dim/2 sines of geometric frequencies.

    Args:
        positions: one value each, for example a time step in 0..1000; not rounded.
        dim: size of the embedding, even.
        max_period: the longest period is 2*pi*max_period.

    Returns:
        Float32 values in [-1, 1], the cosines first.

    Raises:
        ValueError: `dim` is odd or not positive.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be a positive even number, got {dim}")
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) / half * jnp.arange(half, dtype=jnp.float32))
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(side: int, dim: int) -> Float[Array, "side side dim"]:
    """Returns sines and cosines of column and row, in patches, for a square of patches.

    The channels are four quarters: sin(column), cos(column), sin(row), cos(row).

    Args:
        side: patches along each side.
        dim: number of channels, a multiple of 4.

    Returns:
        Float32 array, rows first.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a position table needs a multiple of 4 channels, got dim={dim}")
    quarter = dim // 4
    frequencies = jnp.exp(-math.log(10_000.0) / quarter * jnp.arange(quarter, dtype=jnp.float32))
    angles = jnp.arange(side, dtype=jnp.float32)[:, None] * frequencies[None, :]
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    columns = jnp.broadcast_to(line[None, :, :], (side, side, dim // 2))
    rows = jnp.broadcast_to(line[:, None, :], (side, side, dim // 2))
    return jnp.concatenate([columns, rows], axis=-1)


def patchify(
    images: Float[Array, "batch height width channels"], patch_size: int
) -> Float[Array, "batch tokens patch"]:
    """Cuts pictures into patches, row by row; a patch is ordered (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(
    patches: Float[Array, "batch tokens patch"], patch_size: int, height: int, width: int
) -> Float[Array, "batch height width channels"]:
    """Puts patches together again: the inverse of `patchify`."""
    batch, rows, columns = patches.shape[0], height // patch_size, width // patch_size
    images = patches.reshape(batch, rows, columns, patch_size, patch_size, -1)
    return images.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


class PatchEmbedding(nnx.Module):
    """Embeds each patch by one linear layer and adds the centered crop of a position table.

    The linear layer is the convolution with kernel = stride = patch_size of SD3.

    Args:
        patch_size: side of a patch in pixels.
        in_channels: channels of the pictures.
        dim: width of the tokens, a multiple of 4.
        table_size: patches along each side of the table, the largest side accepted.
        dtype: computation dtype.
        param_dtype: dtype of the parameters and of the table.
    """

    def __init__(
        self,
        patch_size: int,
        in_channels: int,
        dim: int,
        table_size: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.in_channels, self.table_size = patch_size, in_channels, table_size
        self.projection = Linear(
            patch_size * patch_size * in_channels,
            dim,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.table = PositionTable(position_table(table_size, dim).astype(param_dtype))

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        """Returns the tokens, row by row.

        Raises:
            ValueError: wrong channel count, a side that patch_size does not divide, or a side
                longer than the table.
        """
        _, height, width, channels = images.shape
        if channels != self.in_channels:
            raise ValueError(f"latents must have {self.in_channels} channels, got {images.shape}")
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"patch_size={self.patch_size} must divide height and width, got {height}x{width}"
            )
        rows, columns = height // self.patch_size, width // self.patch_size
        if max(rows, columns) > self.table_size:
            raise ValueError(
                f"latents of {height}x{width} are {rows}x{columns} patches, at most "
                f"{self.table_size}x{self.table_size} are allowed (pos_embed_max_size)"
            )
        top, left = (self.table_size - rows) // 2, (self.table_size - columns) // 2
        crop = self.table[top : top + rows, left : left + columns]
        tokens = self.projection(patchify(images, self.patch_size))
        return tokens + crop.reshape(1, rows * columns, -1).astype(tokens.dtype)


class TimestepTextEmbedding(nnx.Module):
    """The conditioning vector of AdaLN: embedded time step plus embedded pooled text.

    Args:
        pooled_dim: size of the pooled text vector.
        dim: width of the conditioning.
        frequency_dim: size of the sinusoidal embedding of the time step.
        dtype: computation dtype.
        param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        pooled_dim: int,
        dim: int,
        *,
        frequency_dim: int = 256,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.frequency_dim = frequency_dim
        self.timestep = ConditionEmbedding(frequency_dim, dim, **dtypes, rngs=rngs)
        self.pooled = ConditionEmbedding(pooled_dim, dim, **dtypes, rngs=rngs)

    def __call__(
        self, timestep: Float[Array, " batch"], pooled: Float[Array, "batch pooled_dim"]
    ) -> Float[Array, "batch dim"]:
        """Returns the conditioning; `timestep` is 1000*sigma."""
        return self.timestep(sinusoid(timestep, self.frequency_dim)) + self.pooled(pooled)
