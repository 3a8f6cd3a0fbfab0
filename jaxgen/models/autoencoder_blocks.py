"""The parts of the image autoencoder: residual blocks, attention over a picture, resolution levels.

Pictures are channels-last, (batch, height, width, channels), and kernels (rows, columns, in, out).
Group normalization is float32 in every computation dtype.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxgen.layers import GroupNorm, Linear
from jaxgen.models.autoencoder_config import AutoencoderConfig

QUERY_CHUNK = 1024
"""Most queries whose logits exist at once in the attention over a picture."""


def normalize(channels: int, config: AutoencoderConfig) -> GroupNorm:
    """Returns the group normalization of this many channels."""
    return GroupNorm(channels, config.norm_num_groups, param_dtype=config.param_dtype)


def convolution(
    in_channels: int, out_channels: int, config: AutoencoderConfig, rngs: nnx.Rngs, *, size: int = 3
) -> nnx.Conv:
    """Returns a square convolution that keeps height and width."""
    return nnx.Conv(in_channels, out_channels, (size, size), **config.layer_options, rngs=rngs)


def activate(
    norm: GroupNorm, x: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width channels"]:
    """Returns SiLU of the normalized `x`, rounded once to its dtype."""
    return jax.nn.silu(norm(x.astype(jnp.float32))).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each after normalization and SiLU, beside a shortcut.

    Args:
        in_channels: channels read.
        out_channels: channels returned; if others than `in_channels`, the shortcut is a 1x1
            convolution.
        config: the model's configuration.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: AutoencoderConfig, *, rngs: nnx.Rngs
    ):
        self.norm_in = normalize(in_channels, config)
        self.conv_in = convolution(in_channels, out_channels, config, rngs)
        self.norm_out = normalize(out_channels, config)
        self.conv_out = convolution(out_channels, out_channels, config, rngs)
        self.shortcut = (
            convolution(in_channels, out_channels, config, rngs, size=1)
            if in_channels != out_channels
            else None
        )

    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch height width out_channels"]:
        """Applies the block."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.conv_in(activate(self.norm_in, x))
        return shortcut + self.conv_out(activate(self.norm_out, x))


def attend_in_chunks(
    query: Float[Array, "batch tokens dim"],
    key: Float[Array, "batch keys dim"],
    value: Float[Array, "batch keys dim"],
    *,
    chunk: int = QUERY_CHUNK,
) -> Float[Array, "batch tokens dim"]:
    """Returns the exact attention of one head, for a few queries after another.

    The softmax of a query needs all keys, but no other query, so nothing is approximated. Logits
    and softmax are float32. The backward pass computes them again, also chunk by chunk.

    Args:
        query: the queries.
        key: the keys.
        value: the values.
        chunk: most queries at once; with no more tokens than that there is one piece.
    """

    def attend(query: Array) -> Array:
        products = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(products * query.shape[-1] ** -0.5, axis=-1)
        return jnp.einsum("bqk,bkd->bqd", weights.astype(value.dtype), value)

    batch, tokens, dim = query.shape
    count = -(-tokens // chunk)
    if count <= 1:
        return attend(query)
    size = -(-tokens // count)
    padded = jnp.pad(query, ((0, 0), (0, count * size - tokens), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, count, size, dim), 1, 0)
    attended = jnp.moveaxis(jax.lax.map(jax.checkpoint(attend), chunks), 0, 1)
    return attended.reshape(batch, count * size, dim)[:, :tokens]


class PictureAttention(nnx.Module):
    """Every pixel attends to all others, with one head as wide as the channels.

    Args:
        channels: channels of the picture.
        config: the model's configuration.
    """

    def __init__(self, channels: int, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(channels, channels, **config.layer_options, rngs=rngs)

        self.norm = normalize(channels, config)
        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Adds to `x` what its pixels find."""
        tokens = self.norm(x).reshape(len(x), -1, x.shape[-1])
        found = attend_in_chunks(self.query(tokens), self.key(tokens), self.value(tokens))
        return x + self.output(found).reshape(x.shape)


class Middle(nnx.Module):
    """The blocks at the lowest resolution: residual, attention, residual.

    Args:
        channels: channels of the picture.
        attention: False leaves the attention out.
        config: the model's configuration.
    """

    def __init__(
        self, channels: int, attention: bool, config: AutoencoderConfig, *, rngs: nnx.Rngs
    ):
        self.block_in = ResidualBlock(channels, channels, config, rngs=rngs)
        self.attention = PictureAttention(channels, config, rngs=rngs) if attention else None
        self.block_out = ResidualBlock(channels, channels, config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Applies the blocks."""
        x = self.block_in(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.block_out(x)


class DownLevel(nnx.Module):
    """The residual blocks of one resolution, then half of it.

    Args:
        in_channels: channels read.
        out_channels: channels returned.
        num_blocks: number of residual blocks.
        halve: end in a 3x3 convolution of stride 2. It pads one row below and one column to the
            right, as the released models do, and nothing above or to the left.
        config: the model's configuration.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        halve: bool,
        config: AutoencoderConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.blocks = _residual_blocks(in_channels, out_channels, num_blocks, config, rngs)
        self.halve = (
            nnx.Conv(
                out_channels,
                out_channels,
                (3, 3),
                strides=2,
                padding=((0, 1), (0, 1)),
                **config.layer_options,
                rngs=rngs,
            )
            if halve
            else None
        )

    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch new_height new_width out_channels"]:
        """Applies the blocks; height and width are even if they are to be halved."""
        for block in self.blocks:
            x = block(x)
        return x if self.halve is None else self.halve(x)


class UpLevel(nnx.Module):
    """The residual blocks of one resolution, then twice that.

    Args:
        in_channels: channels read.
        out_channels: channels returned.
        num_blocks: number of residual blocks.
        double: end in nearest-neighbor upsampling and a 3x3 convolution.
        config: the model's configuration.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        double: bool,
        config: AutoencoderConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.blocks = _residual_blocks(in_channels, out_channels, num_blocks, config, rngs)
        self.double = convolution(out_channels, out_channels, config, rngs) if double else None

    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch new_height new_width out_channels"]:
        """Applies the blocks."""
        for block in self.blocks:
            x = block(x)
        if self.double is None:
            return x
        return self.double(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def _residual_blocks(
    in_channels: int, out_channels: int, count: int, config: AutoencoderConfig, rngs: nnx.Rngs
) -> nnx.List:
    """Residual blocks, the first of which changes the channels."""
    widths = [in_channels] + [out_channels] * count
    return nnx.List(
        [
            ResidualBlock(before, after, config, rngs=rngs)
            for before, after in itertools.pairwise(widths)
        ]
    )
