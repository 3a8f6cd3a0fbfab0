"""The video transformer of Wan2.1: a diffusion transformer over patches of frames.

Wan Team 2025, arXiv:2503.20314. The computation graph is that of the released text-to-video
models, so that their weights load (`jaxgen.checkpoints`). Each block lets the video tokens attend
to themselves, with rotary positions, then to the text, and ends in an MLP. The time step reaches
every block through one shared projection, to which a block adds a table of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxgen.layers import (
    AttentionName,
    ConditionEmbedding,
    FeedForward,
    LayerNorm,
    Linear,
    Modulation,
    RMSNorm,
    Rotary,
    add_gated,
    attention_function,
    layer_norm,
    rotate,
    scan_blocks,
    sinusoid,
    video_axis_dims,
    video_rotary,
)
from jaxgen.models.fields import require_bool, require_positive, set_field, set_float_dtypes

Attend = Callable[[Array, Array, Array], Array]
"""Attention of query, key and value, each (batch, tokens, heads, head_dim)."""

_XAVIER = nnx.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Shape and arithmetic of a `Wan`.

    Attributes:
        num_layers: number of blocks.
        num_heads: number of attention heads.
        ffn_dim: width inside the MLPs.
        patch_size: frames, rows and columns of a patch.
        token_cube: frames, rows and columns of patches whose tokens follow each other. The order
            of tokens changes no velocity, but a block of keys that sparse attention takes or
            leaves as a whole is then a compact piece of the video, and not a strip of one frame,
            as in the order of the released models, (1, 1, 1). The router and the mixing ratios of
            sparse attention belong to the order that they were trained in.
        in_channels: latent channels read.
        out_channels: latent channels predicted; `in_channels` if None.
        head_dim: size of a head, even and at least 6; the width is num_heads*head_dim.
        text_dim: size of a text token.
        freq_dim: size of the sinusoidal embedding of the time step, even.
        qk_norm: RMS-normalize queries and keys over all heads together, as the released models.
        cross_attn_norm: layer-normalize, with a trained scale and bias, what attends to the text.
        eps: epsilon of all norms.
        rope_max_seq_len: most patches along frames, rows and columns each.
        attention: "exact" or "int8" self-attention; that to the text is always exact.
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan: compile one block and loop over the weights of all, so that compiling takes seconds
            at any depth. The blocks must be alike, and their weights are copied together first.
        dtype: computation dtype; time step, modulation, norms and rotary are float32 in between.
        param_dtype: dtype of the parameters; those of the time step, the tables and the norm
            before the text are float32 if it is narrower.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    num_layers: int
    num_heads: int
    ffn_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    token_cube: tuple[int, int, int] = (1, 1, 1)
    in_channels: int = 16
    out_channels: int | None = None
    head_dim: int = 128
    text_dim: int = 4096
    freq_dim: int = 256
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    attention: AttentionName = "exact"
    remat: bool = False
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        out_channels = self.in_channels if self.out_channels is None else self.out_channels
        set_field(self, "out_channels", out_channels)
        for name in ("patch_size", "token_cube"):
            set_field(self, name, _three_sizes(name, getattr(self, name)))
        set_float_dtypes(self)
        require_positive(self, *_POSITIVE)
        require_bool(self, "qk_norm", "cross_attn_norm", "remat", "scan")
        video_axis_dims(self.head_dim)
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, got freq_dim={self.freq_dim}")
        if not isinstance(self.eps, float) or not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must be a float between 0 and 1, got eps={self.eps!r}")
        attention_function(self.attention)

    @property
    def width(self) -> int:
        """Width of the video tokens."""
        return self.num_heads * self.head_dim

    @property
    def patch_pixels(self) -> int:
        """Latent pixels of one patch."""
        return math.prod(self.patch_size)

    @property
    def wide_param_dtype(self) -> DTypeLike:
        """Dtype of the parameters that are never narrower than float32."""
        return max(jnp.dtype(jnp.float32), jnp.dtype(self.param_dtype), key=lambda d: d.itemsize)


_POSITIVE = (
    "num_layers",
    "num_heads",
    "ffn_dim",
    "in_channels",
    "out_channels",
    "head_dim",
    "text_dim",
    "freq_dim",
    "rope_max_seq_len",
)


def _three_sizes(name: str, value: Any) -> tuple[int, int, int]:
    """Three positive ints as a tuple, from any sequence of them."""
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"{name} must be three positive ints (frames, rows, columns), got {value!r}"
        )
    return sizes


class WanAttention(nnx.Module):
    """Attention whose queries and keys are normalized before they are split into heads.

    Args:
        config: the model's configuration.
        attend: the arithmetic between the projections, a function or a module. It gets query, key
            and value after norm and rotation.
    """

    def __init__(self, config: WanConfig, attend: Attend, *, rngs: nnx.Rngs):
        width, options = config.width, _options(config, rngs)

        def linear() -> Linear:
            return Linear(width, width, kernel_init=_XAVIER, **options)

        def norm() -> RMSNorm | None:
            if not config.qk_norm:
                return None
            return RMSNorm(width, epsilon=config.eps, param_dtype=config.param_dtype)

        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()
        self.query_norm, self.key_norm = norm(), norm()
        self.attend = attend

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        context: Float[Array, "batch context_tokens width"],
        rotary: Rotary | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Lets `x` attend to `context`; `rotary` turns queries and keys alike."""
        query, key, value = self.query(x), self.key(context), self.value(context)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (
            array.reshape(*array.shape[:2], self.num_heads, -1) for array in (query, key, value)
        )
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return self.output(self.attend(query, key, value).reshape(x.shape))


class WanBlock(nnx.Module):
    """One block: self-attention, attention to the text, MLP.

    Args:
        config: the model's configuration.
        attend: the self-attention between the projections, a function or a module called with
            query, key and value; that of `config.attention` if None.
    """

    def __init__(self, config: WanConfig, attend: Attend | None = None, *, rngs: nnx.Rngs):
        if attend is None:
            attend = attention_function(config.attention)
        options = _options(config, rngs)
        self.epsilon = config.eps
        self.table = _table(6, config, rngs)
        self.self_attention = WanAttention(config, attend, rngs=rngs)
        self.cross_attention = WanAttention(config, attention_function("exact"), rngs=rngs)
        norm = {"epsilon": config.eps, "param_dtype": config.wide_param_dtype}
        self.cross_norm = LayerNorm(config.width, **norm) if config.cross_attn_norm else None
        self.mlp = FeedForward(config.width, config.ffn_dim, **options)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        text: Float[Array, "batch text_tokens width"],
        modulation: Float[Array, "batch 6 width"],
        rotary: Rotary,
    ) -> Float[Array, "batch tokens width"]:
        """Returns the video tokens.

        Args:
            x: the video tokens.
            text: the embedded text; every token of it takes part.
            modulation: shift, scale and gate of the self-attention, then of the MLP, float32.
            rotary: the positions of the video tokens.
        """
        parts = jnp.split(modulation + _wide(self.table)[None], 6, axis=1)
        attend, feed = Modulation(*parts[:3]), Modulation(*parts[3:])
        tokens = _modulate(x, attend, self.epsilon)
        x = add_gated(x, self.self_attention(tokens, tokens, rotary), attend)
        x = x + self.cross_attention(x if self.cross_norm is None else self.cross_norm(x), text)
        return add_gated(x, self.mlp(_modulate(x, feed, self.epsilon)), feed)


class WanConditioning(nnx.Module):
    """Embeds the time step, in float32, and the text.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        width, options = config.width, _options(config, rngs)
        small = nnx.initializers.normal(0.02)
        self.freq_dim = config.freq_dim
        self.timestep = ConditionEmbedding(
            config.freq_dim, width, param_dtype=config.wide_param_dtype, rngs=rngs
        )
        wide: dict[str, Any] = options | {"dtype": jnp.float32}
        self.projection = Linear(width, 6 * width, kernel_init=_XAVIER, **wide)
        self.text_hidden = Linear(config.text_dim, width, kernel_init=small, **options)
        self.text_output = Linear(width, width, kernel_init=small, **options)

    def __call__(
        self, timestep: Float[Array, " batch"], context: Float[Array, "batch text_tokens text_dim"]
    ) -> tuple[
        Float[Array, "batch width"],
        Float[Array, "batch 6 width"],
        Float[Array, "batch text_tokens width"],
    ]:
        """Returns the embedded time step, the modulation made from it, and the embedded text."""
        embedded = self.timestep(sinusoid(timestep, self.freq_dim))
        modulation = self.projection(jax.nn.silu(embedded)).reshape(len(embedded), 6, -1)
        text = self.text_output(jax.nn.gelu(self.text_hidden(context), approximate=True))
        return embedded, modulation, text


class Wan(nnx.Module):
    """Predicts the flow-matching velocity of noisy videos from time step and text.

    A new model predicts zero: its last layer starts at zero.

    Args:
        config: shape and arithmetic.
        attend: makes the self-attention of a block from its number, in place of the one that
            `config.attention` names: a function or a module called with query, key and value,
            each (batch, tokens, heads, head_dim), after norm and rotation. The parameters of
            modules are part of the model.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        attend: Callable[[int], Attend] | None = None,
        rngs: nnx.Rngs,
    ):
        options, width = _options(config, rngs), config.width
        self.config = config
        self.patch_embedding = Linear(
            config.patch_pixels * config.in_channels, width, kernel_init=_XAVIER, **options
        )
        self.conditioning = WanConditioning(config, rngs=rngs)
        blocks = [
            WanBlock(config, attend and attend(i), rngs=rngs) for i in range(config.num_layers)
        ]
        self.blocks = nnx.List(blocks)
        self.table = _table(2, config, rngs)
        self.final_projection = Linear(
            width,
            config.patch_pixels * (config.out_channels or config.in_channels),
            kernel_init=nnx.initializers.zeros_init(),
            **options,
        )

    def __call__(
        self,
        latents: Float[Array, "batch frames height width in_channels"],
        timestep: Float[Array, " batch"],
        context: Float[Array, "batch text_tokens text_dim"],
    ) -> Float[Array, "batch frames height width out_channels"]:
        """Predicts the velocity noise - data.

        Args:
            latents: noisy latents, channels last; patch_size divides frames, height and width.
            timestep: 1000*sigma, in 0..1000; not rounded.
            context: encoded text tokens, any number of them. There is no mask: padding takes
                part, and the released models expect it (512 tokens, zeros after the text).

        Returns:
            The velocity, in the computation dtype `config.dtype`.

        Raises:
            ValueError: a shape that does not fit the configuration or the batch.
        """
        grid = self._grid(latents, timestep, context)
        config = self.config
        embedded, modulation, text = self.conditioning(timestep, context)
        rotary = video_rotary(*grid, config.head_dim)
        patches = _to_patches(latents, grid, config.patch_size)
        cubes = max(config.token_cube) > 1
        if cubes:
            order = cube_order(grid, config.token_cube)
            rotary = jax.tree.map(lambda table: table[order], rotary)
            patches = patches[:, order]
        x = self.patch_embedding(patches)
        run = nnx.remat(WanBlock.__call__) if config.remat else WanBlock.__call__
        if config.scan:
            x = scan_blocks(
                self.blocks, lambda block, x: run(block, x, text, modulation, rotary), x
            )
        else:
            for block in self.blocks:
                x = run(block, x, text, modulation, rotary)
        final = Modulation(*jnp.split(embedded[:, None, :] + _wide(self.table)[None], 2, axis=1))
        patches = self.final_projection(_modulate(x, final, config.eps))
        if cubes:
            patches = patches[:, np.argsort(order)]
        return _from_patches(patches, grid, config.patch_size)

    def _grid(self, latents: Array, timestep: Array, context: Array) -> tuple[int, int, int]:
        """Checks the inputs; returns the number of patches along frames, rows and columns."""
        config, batch = self.config, latents.shape[0] if latents.ndim else 0
        expected = {
            "latents": (latents, (batch, "frames", "height", "width", config.in_channels)),
            "timestep": (timestep, (batch,)),
            "context": (context, (batch, "tokens", config.text_dim)),
        }
        for name, (value, shape) in expected.items():
            pairs = zip(value.shape, shape, strict=False)
            fits = all(isinstance(want, str) or size == want for size, want in pairs)
            if value.ndim != len(shape) or not fits:
                wanted = ", ".join(map(str, shape))
                raise ValueError(f"{name} must have shape ({wanted}), got {value.shape}")
        (p_t, p_h, p_w), sizes = config.patch_size, latents.shape[1:4]
        frames, height, width = sizes
        if frames % p_t or height % p_h or width % p_w or not all(sizes):
            raise ValueError(
                f"patch_size={config.patch_size} must divide frames, height and width, got {sizes}"
            )
        grid = frames // p_t, height // p_h, width // p_w
        if max(grid) > config.rope_max_seq_len:
            raise ValueError(
                f"latents of frames, height and width {sizes} are {grid} patches, at most "
                f"rope_max_seq_len={config.rope_max_seq_len} are allowed along each axis"
            )
        return grid


def _options(config: WanConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Keywords that every layer takes."""
    return {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}


def _table(rows: int, config: WanConfig, rngs: nnx.Rngs) -> nnx.Param:
    """A table of shifts, scales and gates that is added to the modulation."""
    init = nnx.initializers.normal(config.width**-0.5)
    return nnx.Param(init(rngs.params(), (rows, config.width), config.wide_param_dtype))


def _wide(table: nnx.Param) -> Array:
    """A table in float32."""
    return table[...].astype(jnp.float32)


def _modulate(x: Array, modulation: Modulation, epsilon: float) -> Array:
    """`jaxgen.layers.modulate` with an epsilon of its own."""
    normalized = layer_norm(x, epsilon=epsilon)
    return (normalized * (1.0 + modulation.scale) + modulation.shift).astype(x.dtype)


def cube_order(grid: tuple[int, int, int], cube: tuple[int, int, int]) -> np.ndarray:
    """Returns the tokens of a video, numbered by frame, row and column, cube by cube.

    Cubes that follow each other are neighbors in time; those at the end of an axis may be smaller.

    Args:
        grid: frames, rows and columns of patches.
        cube: the same of a cube.
    """
    place = np.indices(grid).reshape(3, -1)
    frame, row, column = place // np.array(cube)[:, None]
    return np.lexsort((*place[::-1], frame, column, row)).astype(np.int32)


def _to_patches(videos: Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Array:
    """Cuts (batch, frames, height, width, channels) into (batch, tokens, patch).

    Tokens are ordered by frame, row, column, the values of a patch by these and then channel.
    """
    sizes = (grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    patches = videos.reshape(len(videos), *sizes, -1).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return patches.reshape(len(videos), math.prod(grid), -1)


def _from_patches(patches: Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Array:
    """Puts patches together again: the inverse of `_to_patches`."""
    videos = patches.reshape(len(patches), *grid, *patch, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return videos.reshape(len(patches), *(grid[i] * patch[i] for i in range(3)), videos.shape[-1])


_WAN = WanConfig(num_layers=30, num_heads=12, ffn_dim=8960)

WAN_PRESETS: Mapping[str, WanConfig] = MappingProxyType(
    {
        "wan2.1-t2v-1.3b": _WAN,
        "wan2.1-t2v-14b": dataclasses.replace(_WAN, num_layers=40, num_heads=40, ffn_dim=13824),
        "moving-emoji": WanConfig(
            num_layers=8,
            num_heads=6,
            ffn_dim=768,
            patch_size=(1, 4, 4),
            token_cube=(4, 4, 4),
            in_channels=3,
            head_dim=32,
            text_dim=192,
        ),
    }
)
"""Named configurations: the released text-to-video models, and ours for small videos in pixels."""
