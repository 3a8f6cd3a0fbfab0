"""The configuration of the image autoencoder (`jaxgen.models.autoencoder`) and its presets."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.fields import require_bool, require_positive, set_field, set_float_dtypes


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and arithmetic of an `Autoencoder`; without arguments that of Stable Diffusion 3.

    Attributes:
        in_channels: channels of the pictures encoded.
        out_channels: channels of the pictures decoded.
        latent_channels: channels of the latents.
        block_out_channels: channels of the levels, the highest resolution first; multiples of
            `norm_num_groups`. Each level after the first has half the resolution of the previous.
        layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
        norm_num_groups: groups of the normalizations.
        sample_size: side of the training pictures in pixels; other sizes run, too.
        scaling_factor: by what shifted latents are multiplied for diffusion models.
        shift_factor: what is subtracted from latents before that.
        use_quant_conv: end the encoder in a 1x1 convolution (Stable Diffusion 1, 2, XL).
        use_post_quant_conv: begin the decoder with one.
        mid_block_add_attention: attention at the lowest resolution.
        force_upcast: the weights overflow in float16: compute in float32 if `dtype` is that.
        dtype: computation dtype; normalizations are float32 in between.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        set_float_dtypes(self)
        require_positive(self, *_POSITIVE)
        require_bool(self, *_SWITCHES)
        for name in ("scaling_factor", "shift_factor"):
            set_field(self, name, _finite(name, getattr(self, name)))
        if self.scaling_factor <= 0.0:
            raise ValueError(
                f"scaling_factor must be positive, got scaling_factor={self.scaling_factor}"
            )
        widths = self.block_out_channels
        widths = tuple(widths) if isinstance(widths, list | tuple) else ()
        if not widths or not all(
            type(width) is int and width > 0 and not width % self.norm_num_groups
            for width in widths
        ):
            raise ValueError(
                "block_out_channels must be one or more positive multiples of norm_num_groups="
                f"{self.norm_num_groups}, got {self.block_out_channels!r}"
            )
        set_field(self, "block_out_channels", widths)

    @property
    def downscale(self) -> int:
        """Pixels along a side of one latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def compute_dtype(self) -> DTypeLike:
        """The computation dtype after `force_upcast`."""
        return jnp.float32 if self.force_upcast and self.dtype == jnp.float16 else self.dtype

    @property
    def layer_options(self) -> dict[str, Any]:
        """The dtypes that every layer takes."""
        return {"dtype": self.compute_dtype, "param_dtype": self.param_dtype}


_POSITIVE = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "sample_size",
)
_SWITCHES = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast")


def _finite(name: str, value: Any) -> float:
    """The value as a float, if it is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {name}={value!r}")
    return float(value)


AUTOENCODER_PRESETS: Mapping[str, AutoencoderConfig] = MappingProxyType(
    {"stable-diffusion-3": AutoencoderConfig()}
)
"""Named configurations; the released Stable Diffusion 3 and 3.5 share one autoencoder."""
