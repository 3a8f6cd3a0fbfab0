"""The image autoencoder of Stable Diffusion 3: pictures to latents of an eighth the side, and back.

A variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114) of convolutions, as in latent
diffusion (Rombach et al. 2022, arXiv:2112.10752), with the latent channels of Stable Diffusion 3
(Esser et al. 2024, arXiv:2403.03206). The computation graph is that of diffusers' `AutoencoderKL`,
so that released weights load (`jaxgen.checkpoints`). Diffusion models see the latents shifted and
scaled to about mean 0 and variance 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxgen.models.autoencoder_blocks import (
    DownLevel,
    Middle,
    UpLevel,
    activate,
    convolution,
    normalize,
)
from jaxgen.models.autoencoder_config import AutoencoderConfig
from jaxgen.models.tiles import map_tiles

_LOGVAR_RANGE = (-30.0, 20.0)


class Encoder(nnx.Module):
    """Pictures to the moments of their latents.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = convolution(config.in_channels, widths[0], config, rngs)
        self.levels = nnx.List(
            [
                DownLevel(
                    widths[max(number - 1, 0)],
                    width,
                    config.layers_per_block,
                    number < len(widths) - 1,
                    config,
                    rngs=rngs,
                )
                for number, width in enumerate(widths)
            ]
        )
        self.middle = Middle(widths[-1], config.mid_block_add_attention, config, rngs=rngs)
        self.norm_out = normalize(widths[-1], config)
        self.conv_out = convolution(widths[-1], 2 * config.latent_channels, config, rngs)

    def __call__(
        self, images: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch latent_height latent_width moments"]:
        """Returns mean and log-variance, one after the other along the channels."""
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(activate(self.norm_out, self.middle(x)))


class Decoder(nnx.Module):
    """Latents, not scaled, to pictures.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = convolution(config.latent_channels, widths[0], config, rngs)
        self.middle = Middle(widths[0], config.mid_block_add_attention, config, rngs=rngs)
        self.levels = nnx.List(
            [
                UpLevel(
                    widths[max(number - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    number < len(widths) - 1,
                    config,
                    rngs=rngs,
                )
                for number, width in enumerate(widths)
            ]
        )
        self.norm_out = normalize(widths[-1], config)
        self.conv_out = convolution(widths[-1], config.out_channels, config, rngs)

    def __call__(
        self, latents: Float[Array, "batch latent_height latent_width latent_channels"]
    ) -> Float[Array, "batch height width out_channels"]:
        """Returns the pictures."""
        x = self.middle(self.conv_in(latents))
        for level in self.levels:
            x = level(x)
        return self.conv_out(activate(self.norm_out, x))


class Autoencoder(nnx.Module):
    """Encodes pictures into latents of which diffusion models make new ones, and decodes them.

    Args:
        config: shape and arithmetic.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant = (
            convolution(moments, moments, config, rngs, size=1) if config.use_quant_conv else None
        )
        self.post_quant = (
            convolution(latents, latents, config, rngs, size=1)
            if config.use_post_quant_conv
            else None
        )
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self, images: Float[Array, "batch height width in_channels"]
    ) -> tuple[
        Float[Array, "batch latent_height latent_width latent_channels"],
        Float[Array, "batch latent_height latent_width latent_channels"],
    ]:
        """Returns mean and log-variance of the latents, float32, not scaled for diffusion.

        Args:
            images: values in [-1, 1], any float dtype; `config.downscale` divides height and
                width.

        Returns:
            The mean, and the natural logarithm of the variance, limited to -30..20.

        Raises:
            ValueError: a shape that does not fit the configuration.
        """
        self._check_images(images)
        return _split(self._moments(images))

    def encode_tiled(
        self,
        images: Float[Array, "batch height width in_channels"],
        *,
        tile: int = 64,
        overlap: int = 16,
    ) -> tuple[
        Float[Array, "batch latent_height latent_width latent_channels"],
        Float[Array, "batch latent_height latent_width latent_channels"],
    ]:
        """Returns `encode(images)` computed in tiles; with one tile it is the same.

        Each tile is normalized over itself and attends to itself, so that the result differs
        from `encode` a little everywhere. That convolutions miss the surroundings at the edge of a
        tile changes no more than the seams. Mean and log-variance are
        blended each on its own.

        Args:
            images: as for `encode`.
            tile: side of a tile in latent pixels.
            overlap: least overlap of neighbors in latent pixels, over which they are blended.

        Raises:
            ValueError: as for `encode`, or `overlap` not in 0..tile - 1.
        """
        self._check_images(images)
        scales = self.config.downscale, 1
        return _split(map_tiles(self._moments, images, tile=tile, overlap=overlap, scales=scales))

    def sample_latents(
        self, images: Float[Array, "batch height width in_channels"], key: Key[Array, ""]
    ) -> Float[Array, "batch latent_height latent_width latent_channels"]:
        """Returns latents drawn from what the encoder finds, scaled for diffusion, float32.

        Args:
            images: as for `encode`.
            key: a random key, `jax.random.key(seed)`.

        Raises:
            ValueError: as for `encode`.
        """
        mean, logvar = self.encode(images)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return self.to_latents(mean + jnp.exp(0.5 * logvar) * noise)

    def to_latents(
        self, values: Float[Array, "batch latent_height latent_width latent_channels"]
    ) -> Float[Array, "batch latent_height latent_width latent_channels"]:
        """Returns (values - shift_factor)*scaling_factor, float32: latents for diffusion.

        Args:
            values: for example the mean that `encode` returns.
        """
        shifted = values.astype(jnp.float32) - self.config.shift_factor
        return shifted * self.config.scaling_factor

    def decode(
        self, latents: Float[Array, "batch latent_height latent_width latent_channels"]
    ) -> Float[Array, "batch height width out_channels"]:
        """Returns pictures, float32; nominally in [-1, 1], but not clipped to that.

        Args:
            latents: as diffusion models make them: shifted and scaled, any float dtype.

        Raises:
            ValueError: a shape that does not fit the configuration.
        """
        self._check_latents(latents)
        return self._pictures(latents)

    def decode_tiled(
        self,
        latents: Float[Array, "batch latent_height latent_width latent_channels"],
        *,
        tile: int = 64,
        overlap: int = 16,
    ) -> Float[Array, "batch height width out_channels"]:
        """Returns `decode(latents)` computed in tiles; with one tile it is the same.

        Each tile is normalized over itself and attends to itself, so that the result differs
        from `decode` a little everywhere. That convolutions miss the surroundings at the edge of a
        tile changes no more than the seams.

        Args:
            latents: as for `decode`.
            tile: side of a tile in latent pixels.
            overlap: least overlap of neighbors in latent pixels, over which they are blended.

        Raises:
            ValueError: as for `decode`, or `overlap` not in 0..tile - 1.
        """
        self._check_latents(latents)
        scales = 1, self.config.downscale
        return map_tiles(self._pictures, latents, tile=tile, overlap=overlap, scales=scales)

    def _moments(self, images: Array) -> Array:
        """Mean and log-variance, one after the other along the channels, float32."""
        moments = self.encoder(images.astype(self.config.compute_dtype))
        moments = moments if self.quant is None else self.quant(moments)
        return moments.astype(jnp.float32)

    def _pictures(self, latents: Array) -> Array:
        """The pictures of scaled latents, float32."""
        values = latents.astype(jnp.float32) / self.config.scaling_factor
        values = (values + self.config.shift_factor).astype(self.config.compute_dtype)
        values = values if self.post_quant is None else self.post_quant(values)
        return self.decoder(values).astype(jnp.float32)

    def _check_images(self, images: Array) -> None:
        """Raises ValueError for a shape that cannot be encoded."""
        channels, divisor = self.config.in_channels, self.config.downscale
        good = images.ndim == 4 and images.shape[3] == channels
        if not good or any(side % divisor or not side for side in images.shape[1:3]):
            raise ValueError(
                f"images must have shape (batch, height, width, {channels}), height and width "
                f"multiples of {divisor}, got {images.shape}"
            )

    def _check_latents(self, latents: Array) -> None:
        """Raises ValueError for a shape that cannot be decoded."""
        channels = self.config.latent_channels
        good = latents.ndim == 4 and latents.shape[3] == channels
        if not good or not all(latents.shape[1:3]):
            raise ValueError(
                f"latents must have shape (batch, height, width, {channels}), height and width "
                f"positive, got {latents.shape}"
            )


def _split(moments: Array) -> tuple[Array, Array]:
    """Mean and log-variance from what the encoder makes."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *_LOGVAR_RANGE)
