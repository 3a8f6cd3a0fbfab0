"""The MMDiT of Stable Diffusion 3 and 3.5: a diffusion transformer over image and text tokens.

Esser et al. 2024, arXiv:2403.03206. The computation graph is that of the released models, so
that their weights load (`jaxgen.checkpoints`). Image and text have separate weights and meet in
joint attention; AdaLN conditions every block on time step and pooled text. The text stream ends
in the last block, which takes only query, key and value from it. SD3.5-Medium's dual blocks add
a second, image-only attention that reads the same normalized tokens as the first.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jaxgen.layers import (
    AdaLNScaleShift,
    AdaLNZero,
    AttentionName,
    FeedForward,
    JointAttention,
    Linear,
    PatchEmbedding,
    SelfAttention,
    TimestepTextEmbedding,
    add_gated,
    attention_function,
    blocks_apart,
    modulate,
    scan_neighbours,
    unpatchify,
)
from jaxgen.models.fields import (
    require_bool,
    require_divides,
    require_positive,
    set_field,
    set_float_dtypes,
)
from jaxgen.models.mmdit_region import BlockCache, Cache, Region, check_region, make_region


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Shape and arithmetic of an `MMDiT`.

    Attributes:
        sample_size: side of the training pictures in latent pixels; other sizes run, too.
        patch_size: side of a patch in latent pixels.
        in_channels: latent channels read.
        out_channels: latent channels predicted; `in_channels` if None.
        num_layers: number of blocks.
        num_heads: number of attention heads.
        head_dim: size of a head; the width is num_heads*head_dim.
        joint_attention_dim: size of a text token.
        pooled_projection_dim: size of the pooled text vector.
        pos_embed_max_size: patches along each side of the position table.
        qk_norm: RMS-normalize queries and keys per head (SD3.5).
        dual_attention_layers: blocks with a second, image-only attention (SD3.5-Medium).
        attention: "exact" or "int8".
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan: compile one block of each kind and loop over the weights of all, so that compiling
            takes seconds at any depth. They are copied together first (samplers do that once, and
            need memory for both copies), as are the keys and values of a masked pass.
        dtype: computation dtype; norms and modulation are float32 in between.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    sample_size: int
    num_layers: int
    num_heads: int
    pos_embed_max_size: int
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = None
    head_dim: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    qk_norm: bool = False
    dual_attention_layers: tuple[int, ...] = ()
    attention: AttentionName = "exact"
    remat: bool = False
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        out_channels = self.in_channels if self.out_channels is None else self.out_channels
        set_field(self, "out_channels", out_channels)
        set_field(self, "dual_attention_layers", tuple(self.dual_attention_layers))
        set_float_dtypes(self)
        require_positive(self, *_POSITIVE)
        require_bool(self, "qk_norm", "remat", "scan")
        require_divides(self, "patch_size", "sample_size")
        if self.sample_size // self.patch_size > self.pos_embed_max_size:
            raise ValueError(
                f"sample_size={self.sample_size} is {self.sample_size // self.patch_size} patches "
                f"a side, more than pos_embed_max_size={self.pos_embed_max_size}"
            )
        if self.width % 4:
            raise ValueError(f"num_heads*head_dim must be a multiple of 4, got {self.width}")
        allowed = range(self.num_layers)
        if list(self.dual_attention_layers) != sorted(set(self.dual_attention_layers) & {*allowed}):
            raise ValueError(
                f"dual_attention_layers must be increasing block numbers below num_layers="
                f"{self.num_layers}, got {self.dual_attention_layers}"
            )
        attention_function(self.attention)

    @property
    def width(self) -> int:
        """Width of both token streams."""
        return self.num_heads * self.head_dim

    @property
    def patch_dim(self) -> int:
        """Values predicted for one patch."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)


_POSITIVE = (
    "sample_size",
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "num_heads",
    "head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
)


class MMDiTBlock(nnx.Module):
    """One block: joint attention and an MLP for each stream, modulated by the conditioning.

    Args:
        config: the model's configuration.
        index: position of the block; the last one has no text output, dual blocks have a second
            attention.
    """

    def __init__(self, config: MMDiTConfig, index: int, *, rngs: nnx.Rngs):
        dual = index in config.dual_attention_layers
        last = index == config.num_layers - 1
        width, heads = config.width, config.num_heads
        options: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        options["rngs"] = rngs
        attention = {"qk_norm": config.qk_norm, "attention": config.attention, **options}
        text_modulation = AdaLNScaleShift if last else AdaLNZero
        self.image_modulation = AdaLNZero(width, 3 if dual else 2, **options)
        self.text_modulation = text_modulation(width, **options)
        self.attention = JointAttention(width, heads, text_output=not last, **attention)
        self.image_attention = SelfAttention(width, heads, **attention) if dual else None
        self.image_mlp = FeedForward(width, **options)
        self.text_mlp = None if last else FeedForward(width, **options)

    def __call__(
        self,
        image: Float[Array, "batch image_tokens width"],
        text: Float[Array, "batch text_tokens width"],
        conditioning: Float[Array, "batch width"],
    ) -> tuple[Float[Array, "batch image_tokens width"], Float[Array, "batch text_tokens width"]]:
        """Returns both streams; the last block returns `text` as it was."""
        image, text_out, _ = self.cached(image, text, conditioning)
        assert text_out is not None  # as text was given
        return image, text_out

    def cached(
        self,
        image: Float[Array, "batch active width"],
        text: Float[Array, "batch text_tokens width"] | None,
        conditioning: Float[Array, "batch width"],
        cache: BlockCache | None = None,
    ) -> tuple[
        Float[Array, "batch active width"],
        Float[Array, "batch text_tokens width"] | None,
        BlockCache,
    ]:
        """Runs the block for some of the tokens, the others being keys in the cache.

        Args:
            image: all image tokens, or those of a region.
            text: all text tokens; None if the region keeps them.
            conditioning: time step and pooled text.
            cache: keys and values of a region's block; None if all tokens are here.

        Returns:
            Both streams, and the keys and values of all tokens or of the region.
        """
        joint, _, second = cache or (None, None, None)
        image_joint, image_feed, *image_dual = self.image_modulation(conditioning)
        text_joint, text_feed, text_in = None, [], None
        if text is not None:
            text_joint, *text_feed = self.text_modulation(conditioning)
            text_in = modulate(text, text_joint)
        image_out, text_out, of_image, of_text = self.attention.cached(
            modulate(image, image_joint), text_in, joint
        )

        # The second attention reads the tokens as they were before the first one's update.
        dual_out = None
        if self.image_attention is not None:
            dual_out, second = self.image_attention.cached(modulate(image, image_dual[0]), second)
        image = add_gated(image, image_out, image_joint)
        if dual_out is not None:
            image = add_gated(image, dual_out, image_dual[0])
        image = add_gated(image, self.image_mlp(modulate(image, image_feed)), image_feed)

        if text is not None and self.text_mlp is not None:
            assert text_out is not None  # the last block alone has neither
            assert text_joint is not None
            text = add_gated(text, text_out, text_joint)
            text = add_gated(text, self.text_mlp(modulate(text, text_feed[0])), text_feed[0])
        return image, text, BlockCache(of_image, of_text, second)


class MMDiT(nnx.Module):
    """Predicts the flow-matching velocity of noisy latents from time step and text.

    A new model predicts zero: the projections of AdaLN and the last layer start at zero.

    Args:
        config: shape and arithmetic.
    """

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        options["rngs"] = rngs
        width = config.width
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.patch_size, config.in_channels, width, config.pos_embed_max_size, **options
        )
        self.conditioning = TimestepTextEmbedding(config.pooled_projection_dim, width, **options)
        self.text_embedding = Linear(
            config.joint_attention_dim,
            width,
            kernel_init=nnx.initializers.xavier_uniform(),
            **options,
        )
        self.blocks = nnx.List([MMDiTBlock(config, i, rngs=rngs) for i in range(config.num_layers)])
        self.final_modulation = AdaLNScaleShift(width, **options)
        self.final_projection = Linear(
            width, config.patch_dim, kernel_init=nnx.initializers.zeros_init(), **options
        )

    def __call__(
        self,
        latents: Float[Array, "batch height width in_channels"],
        timestep: Float[Array, " batch"],
        context: Float[Array, "batch text_tokens joint_attention_dim"],
        pooled: Float[Array, "batch pooled_projection_dim"],
        skipped: tuple[int, ...] = (),
    ) -> Float[Array, "batch height width out_channels"]:
        """Predicts the velocity noise - data.

        Args:
            latents: noisy latents, channels last; sides are multiples of patch_size.
            timestep: 1000*sigma, in 0..1000; not rounded.
            context: encoded text tokens; any number of them.
            pooled: pooled text vector.
            skipped: numbers of blocks to leave out, for skip-layer guidance.

        Returns:
            The velocity, in the computation dtype `config.dtype`.

        Raises:
            ValueError: a shape that does not fit the configuration or the batch.
        """
        image, text, conditioning = self._embed(latents, timestep, context, pooled)

        def run(block, streams, _):
            apply = _rematerialized(block) if self.config.remat else block
            return apply(*streams, conditioning), None

        (image, _), _ = self._through(run, (image, text), skipped=skipped)
        patches = self._predict(image, conditioning)
        return unpatchify(patches, self.config.patch_size, *latents.shape[1:3])

    def with_cache(
        self,
        latents: Float[Array, "batch height width in_channels"],
        timestep: Float[Array, " batch"],
        context: Float[Array, "batch text_tokens joint_attention_dim"],
        pooled: Float[Array, "batch pooled_projection_dim"],
    ) -> tuple[Float[Array, "batch height width out_channels"], Cache]:
        """Returns what a call returns, and the keys and values of all tokens."""
        image, text, conditioning = self._embed(latents, timestep, context, pooled)

        def run(block, streams, _):
            *streams, of_block = block.cached(*streams, conditioning)
            return tuple(streams), of_block

        (image, _), cache = self._through(run, (image, text))
        patches = self._predict(image, conditioning)
        return unpatchify(patches, self.config.patch_size, *latents.shape[1:3]), tuple(cache)

    def region(
        self, rows: Int32[Array, "batch active"], cache: Cache, *, keep_text: bool = False
    ) -> Region:
        """Returns what masked passes need to predict some patches.

        Args:
            rows: rising, distinct numbers of the patches, row by row; see `patchify`.
            cache: keys and values from `with_cache`.
            keep_text: the text's keys and values stay as they are, so that masked passes need not
                run the text tokens; not in the paper.

        Raises:
            ValueError: shapes that do not belong together.
        """
        return make_region(self.config, rows, cache, keep_text=keep_text)

    def masked(
        self,
        latents: Float[Array, "batch height width in_channels"],
        timestep: Float[Array, " batch"],
        context: Float[Array, "batch text_tokens joint_attention_dim"],
        pooled: Float[Array, "batch pooled_projection_dim"],
        region: Region,
    ) -> tuple[Float[Array, "batch active patch"], Region]:
        """Predicts the velocity of some patches, while the others are only attended to.

        The masked pass of HybridStitch (arXiv 2603.07815, a reconstruction): a fresh cache gives
        the result of a call, an older one an approximation.

        Args:
            latents: as for a call, all of them.
            timestep: likewise.
            context: likewise.
            pooled: likewise.
            region: from the method `region` or an earlier masked pass.

        Returns:
            The velocity of these patches, as `patchify` orders their values, and the region with
            their new keys and values.

        Raises:
            ValueError: a shape that does not fit, also of the region.
        """
        image, text, conditioning = self._embed(latents, timestep, context, pooled)
        check_region(self.config, region, image, text)
        image = jnp.take_along_axis(image, region.rows[..., None], axis=1)
        running = None if region.keep_text else text

        def run(block, streams, of_block):
            *streams, of_block = block.cached(*streams, conditioning, of_block)
            return tuple(streams), of_block

        (image, _), updated = self._through(run, (image, running), region.cache)
        return self._predict(image, conditioning), dataclasses.replace(region, cache=tuple(updated))

    def _embed(self, latents, timestep, context, pooled) -> tuple[Array, Array, Array]:
        """Checks the inputs; returns image tokens, text tokens and the conditioning."""
        self._check(latents, timestep, context, pooled)
        image = self.patch_embedding(latents)
        return image, self.text_embedding(context), self.conditioning(timestep, pooled)

    def _through(
        self,
        run: Callable[..., Any],
        streams: tuple[Array, Array | None],
        cache: Sequence[BlockCache] | None = None,
        skipped: tuple[int, ...] = (),
    ) -> tuple[tuple[Array, Array | None], list[Any]]:
        """Runs all blocks; each gets both streams and its cache, and returns such."""
        kept = [number for number in range(self.config.num_layers) if number not in skipped]
        blocks, caches = list(self.blocks), [cache and cache[number] for number in kept]
        if skipped:
            apart = blocks_apart(blocks)
            blocks = [apart[number] for number in kept]
        if self.config.scan:
            return scan_neighbours(blocks, run, streams, caches)
        found = []
        for block, of_block in zip(blocks, caches, strict=True):
            streams, of_block = run(block, streams, of_block)
            found.append(of_block)
        return streams, found

    def _predict(self, image: Array, conditioning: Array) -> Array:
        """Returns the velocity of patches."""
        (modulation,) = self.final_modulation(conditioning)
        return self.final_projection(modulate(image, modulation))

    def _check(self, latents: Array, timestep: Array, context: Array, pooled: Array) -> None:
        """Checks what `PatchEmbedding` does not: ranks, text sizes and the common batch."""
        config, batch = self.config, latents.shape[0] if latents.ndim else 0
        shapes = {
            "latents": (latents, (batch, "height", "width", config.in_channels)),
            "timestep": (timestep, (batch,)),
            "context": (context, (batch, "tokens", config.joint_attention_dim)),
            "pooled": (pooled, (batch, config.pooled_projection_dim)),
        }
        for name, (value, expected) in shapes.items():
            pairs = zip(value.shape, expected, strict=False)
            fits = all(isinstance(want, str) or size == want for size, want in pairs)
            if value.ndim != len(expected) or not fits:
                wanted = ", ".join(map(str, expected))
                raise ValueError(f"{name} must have shape ({wanted}), got {value.shape}")


def _rematerialized(block: MMDiTBlock) -> Callable[..., tuple[Array, Array]]:
    """Returns `block` as a function that keeps only its inputs for the backward pass."""
    graph, state = nnx.split(block)
    run = jax.checkpoint(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
    return functools.partial(run, state)


_SD3 = MMDiTConfig(sample_size=128, num_layers=24, num_heads=24, pos_embed_max_size=192)
_OPENMOJI = MMDiTConfig(
    sample_size=64,
    patch_size=4,
    in_channels=3,
    num_layers=6,
    num_heads=4,
    joint_attention_dim=256,
    pooled_projection_dim=256,
    pos_embed_max_size=16,
    qk_norm=True,
)
_OPENMOJI_32 = dataclasses.replace(
    _OPENMOJI, sample_size=32, num_layers=4, num_heads=2, pos_embed_max_size=8
)

MMDIT_PRESETS: Mapping[str, MMDiTConfig] = MappingProxyType(
    {
        "sd3-medium": _SD3,
        "sd3.5-medium": dataclasses.replace(
            _SD3, pos_embed_max_size=384, qk_norm=True, dual_attention_layers=tuple(range(13))
        ),
        "sd3.5-large": dataclasses.replace(_SD3, num_layers=38, num_heads=38, qk_norm=True),
        "openmoji-large": _OPENMOJI,
        "openmoji-small": dataclasses.replace(_OPENMOJI, num_layers=4, num_heads=2),
        "openmoji-32": _OPENMOJI_32,
        "openmoji-32-small": dataclasses.replace(_OPENMOJI_32, num_layers=2, num_heads=1),
        "tiny": dataclasses.replace(
            _OPENMOJI,
            sample_size=16,
            num_layers=2,
            num_heads=1,
            head_dim=32,
            pos_embed_max_size=4,
        ),
    }
)
"""Named configurations: the released Stable Diffusion models, ours (at 64 pixels, and at 32 for
training on a CPU), and one for tests."""
