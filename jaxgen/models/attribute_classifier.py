"""A small convolutional classifier of the attributes that a caption names.

It scores generated pictures: how often concept, gender and skin tone are those of the caption,
and how far the distribution of its features is from that of real pictures (Frechet distance).
Pre-activation residual blocks (He et al. 2016, arXiv:1603.05027) with group normalization, so
that the result for one picture never depends on the others of the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxgen.layers import GroupNorm, Linear
from jaxgen.models.fields import require_positive, set_field, set_float_dtypes

_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class AttributeClassifierConfig:
    """Shape and arithmetic of an `AttributeClassifier`.

    Attributes:
        num_concepts: number of concepts ("firefighter").
        num_genders: number of genders, "none" included.
        num_skin_tones: number of skin tones, "none" included.
        widths: channels of the stages; the last is the number of features. The first three
            stages halve the resolution. Multiples of 8.
        dtype: computation dtype.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    num_concepts: int
    num_genders: int
    num_skin_tones: int
    widths: tuple[int, ...] = (32, 64, 128, 256)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        set_field(self, "widths", tuple(self.widths))
        set_float_dtypes(self)
        require_positive(self, "num_concepts", "num_genders", "num_skin_tones")
        good = all(isinstance(width, int) and width > 0 and not width % 8 for width in self.widths)
        if len(self.widths) < 3 or not good:
            raise ValueError(
                f"widths must be three or more positive multiples of {_GROUPS}, got {self.widths}"
            )


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each after normalization and SiLU, beside a 1x1 shortcut.

    Args:
        in_channels: channels read.
        out_channels: channels returned.
        stride: 2 halves the resolution.
        config: dtypes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        config: AttributeClassifierConfig,
        *,
        rngs: nnx.Rngs,
    ):
        options = _options(config, rngs)
        self.norm_in = GroupNorm(in_channels, _GROUPS, param_dtype=config.param_dtype)
        self.conv_in = nnx.Conv(in_channels, out_channels, (3, 3), strides=stride, **options)
        self.norm_out = GroupNorm(out_channels, _GROUPS, param_dtype=config.param_dtype)
        self.conv_out = nnx.Conv(out_channels, out_channels, (3, 3), **options)
        self.shortcut = nnx.Conv(in_channels, out_channels, (1, 1), strides=stride, **options)

    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch new_height new_width out_channels"]:
        """Applies the block."""
        shortcut = self.shortcut(x)
        x = self.conv_in(jax.nn.silu(self.norm_in(x)))
        return shortcut + self.conv_out(jax.nn.silu(self.norm_out(x)))


class AttributeClassifier(nnx.Module):
    """Classifies concept, gender and skin tone of a picture.

    Args:
        config: shape and arithmetic.
    """

    def __init__(self, config: AttributeClassifierConfig, *, rngs: nnx.Rngs):
        options = _options(config, rngs)
        widths = config.widths
        self.config = config
        self.stem = nnx.Conv(3, widths[0], (3, 3), **options)
        self.blocks = nnx.List(
            [
                ResidualBlock(before, after, 2 if stage < 3 else 1, config, rngs=rngs)
                for stage, (before, after) in enumerate(
                    zip((widths[0], *widths), widths, strict=False)
                )
            ]
        )
        self.final_norm = GroupNorm(widths[-1], _GROUPS, param_dtype=config.param_dtype)
        self.concept = Linear(widths[-1], config.num_concepts, **options)
        self.gender = Linear(widths[-1], config.num_genders, **options)
        self.skin_tone = Linear(widths[-1], config.num_skin_tones, **options)

    def features(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch features"]:
        """Returns float32 features: the mean over the picture of the last stage's channels.

        Args:
            images: RGB in [-1, 1]; sides are multiples of 8.

        Raises:
            ValueError: wrong rank or channel count, or a side that 8 does not divide.
        """
        sides = images.shape[1:3]
        if images.ndim != 4 or images.shape[3] != 3 or any(side % 8 or not side for side in sides):
            raise ValueError(
                "images must have shape (batch, height, width, 3), height and width multiples "
                f"of 8, got {images.shape}"
            )
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        x = jax.nn.silu(self.final_norm(x))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> dict[str, Float[Array, "batch classes"]]:
        """Returns float32 logits by attribute: "concept", "gender" and "skin_tone".

        Args:
            images: RGB in [-1, 1]; sides are multiples of 8.

        Raises:
            ValueError: wrong rank or channel count, or a side that 8 does not divide.
        """
        features = self.features(images)
        heads = {"concept": self.concept, "gender": self.gender, "skin_tone": self.skin_tone}
        return {name: head(features).astype(jnp.float32) for name, head in heads.items()}


def _options(config: AttributeClassifierConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Keywords that every layer takes."""
    return {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
