"""The MMDiT in the original layout of Stable Diffusion 3 and 3.5: one file for a whole pipeline.

The transformer's keys start with `model.diffusion_model.`, or with nothing in a file of its own.
Against the layout of diffusers, query, key and value are one matrix, in this order along its rows.
The modulation of the last layer, and that of the text in the last block, give the shift before the
scale; diffusers gives the scale before the shift in these two, and only there. What the
configuration is, keys and shapes tell.
"""

import collections
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxgen.checkpoints.mmdit import load_mmdit, mmdit_shapes
from jaxgen.checkpoints.mmdit_folder import check_size
from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.checkpoints.safetensors_files import check_arrays, load_safetensors
from jaxgen.layers import AttentionName
from jaxgen.models.mmdit import MMDiT, MMDiTConfig

_PREFIX = "model.diffusion_model."
_OTHER_PARTS = ("first_stage_model.", "text_encoders.")
_TABLE = "pos_embed.pos_embed", "pos_embed"
_MODEL_KEYS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK_KEYS = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
# Parts of a matrix: which one, and the number of the part.
_FUSED_KEYS = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
}
_BLOCK = re.compile(r"joint_blocks\.(\d{1,6})\.(.*)")
_NORMS = (".ln_q.weight", ".ln_k.weight")
# What tells the sizes, with the number of dimensions.
_TELLING = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "context_embedder.weight": 2,
    "y_embedder.mlp.0.weight": 2,
    "final_layer.linear.weight": 2,
}


class _Place(NamedTuple):
    """Where an array of diffusers is in the original layout.

    Attributes:
        key: the original key.
        third: which third of the rows it is; all rows if None.
        swapped: the halves of the rows are the other way round.
    """

    key: str
    third: int | None = None
    swapped: bool = False


def mmdit_from_single_file(
    arrays: Mapping[str, Any],
    source: str = "arrays",
    *,
    sample_size: int | None = None,
    head_dim: int | None = None,
) -> tuple[MMDiTConfig, dict[str, Any]]:
    """Translates the transformer of an original single file to the layout of diffusers.

    Args:
        arrays: NumPy or JAX arrays by original key. If keys start with `model.diffusion_model.`,
            those are the transformer; if none does, all are. Those of the autoencoder
            (`first_stage_model.`) and the text encoders (`text_encoders.`) are passed over.
        source: what to call the arrays in an error, for example the path of their file.
        sample_size: side of the training pictures in latent pixels, which arrays do not tell and
            outputs do not depend on; 128, or less if the position table is smaller, if None.
        head_dim: size of a head; that of the norms of the heads, or without norms 64, if None.

    Returns:
        The configuration (in float32; `dataclasses.replace` changes that), and the weights by
        diffusers key, which `load_mmdit` takes. They are views of `arrays`, except for the four
        whose halves change places: the modulation of the last layer, and that of the text in the
        last block.

    Raises:
        ValueError: keys of no part of a pipeline, or missing, unused or misshapen arrays of the
            transformer, all listed with their original keys.
    """
    prefix = _PREFIX if any(key.startswith(_PREFIX) for key in arrays) else ""
    chosen = {
        key.removeprefix(prefix): array
        for key, array in arrays.items()
        if key.startswith(prefix) and not key.startswith(_OTHER_PARTS)
    }
    strangers = {
        key: array for key, array in arrays.items() if not key.startswith((prefix, *_OTHER_PARTS))
    }
    config = _detect(chosen, prefix, source, sample_size, head_dim)
    check_size(config, chosen, source)
    shapes = mmdit_shapes(config)
    places = {key: _place(key, config) for key in shapes}
    expected = {prefix + place.key: _original(shapes[key], place) for key, place in places.items()}
    check_arrays({prefix + key: chosen[key] for key in chosen} | strangers, expected, source)
    return config, {key: _take(chosen[place.key], place) for key, place in places.items()}


def load_mmdit_single_file(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    attention: AttentionName = "exact",
    remat: bool = False,
    scan: bool = False,
    sharding: Placement = None,
    progress: Progress = None,
    sample_size: int | None = None,
    head_dim: int | None = None,
) -> MMDiT:
    """Loads the transformer of an original single file, such as `sd3.5_large.safetensors`.

    Names and shapes are checked first. Then every array is read, converted and put in its place
    before the next one: next to the model itself, the host holds about one array.

    Args:
        path: the file.
        dtype: computation dtype.
        param_dtype: dtype of the parameters; `dtype` if None.
        attention: "exact" or "int8".
        remat: recompute each block in the backward pass.
        scan: compile one block of each kind and loop over the weights of all.
        sharding: where the parameters go, as for `load_mmdit_folder`.
        progress: called with the bytes loaded and those of all after each array; True for a bar
            on stderr.
        sample_size: as for `mmdit_from_single_file`.
        head_dim: likewise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, weights that do not fit, or a sharding that does not.
        TypeError: a `sharding` that is none.
    """
    source = str(path)
    config, arrays = mmdit_from_single_file(
        load_safetensors(path), source, sample_size=sample_size, head_dim=head_dim
    )
    config = dataclasses.replace(
        config,
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
        attention=attention,
        remat=remat,
        scan=scan,
    )
    return load_mmdit(config, arrays, source, sharding=sharding, progress=progress)


def _detect(
    arrays: Mapping[str, Any],
    prefix: str,
    source: str,
    sample_size: int | None,
    head_dim: int | None,
) -> MMDiTConfig:
    """Finds the configuration that keys without prefix and shapes tell."""
    missing = [prefix + key for key in _TELLING if key not in arrays]
    if missing:
        raise ValueError(
            f"{source}: the weights do not fit the model; of those that tell the sizes of an MMDiT "
            f"in the original layout are missing ({len(missing)}): {', '.join(missing)}"
        )
    shapes = {key: tuple(arrays[key].shape) for key in _TELLING}
    for key, shape in shapes.items():
        if len(shape) != _TELLING[key] or 0 in shape:
            raise ValueError(
                f"{source}: {prefix}{key} must have {_TELLING[key]} dimensions, none of them 0, "
                f"got {list(shape)}"
            )
    width, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    side = math.isqrt(shapes["pos_embed"][1])
    largest = min(128, side * patch_size) // patch_size * patch_size

    blocks = [(int(found[1]), found[2]) for found in map(_BLOCK.fullmatch, arrays) if found]
    # One key alone is a stranger rather than a block; as such it is named.
    counts = collections.Counter(number for number, _ in blocks)
    num_layers = 1 + max((number for number, count in counts.items() if count > 3), default=0)
    dual = {number for number, part in blocks if part.startswith("x_block.attn2.")}
    norms = [key for key in sorted(arrays) if _BLOCK.match(key) and key.endswith(_NORMS)]
    if head_dim is None:
        head_dim = math.prod(arrays[norms[0]].shape) if norms else 64
    if head_dim < 1 or width % head_dim:
        raise ValueError(
            f"{source}: {prefix}x_embedder.proj.weight gives a width of {width}, which is no "
            f"multiple of head_dim={head_dim}"
        )
    try:
        return MMDiTConfig(
            sample_size=largest if sample_size is None else sample_size,
            num_layers=num_layers,
            num_heads=width // head_dim,
            head_dim=head_dim,
            pos_embed_max_size=side,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=max(1, shapes["final_layer.linear.weight"][0] // patch_size**2),
            joint_attention_dim=shapes["context_embedder.weight"][1],
            pooled_projection_dim=shapes["y_embedder.mlp.0.weight"][1],
            qk_norm=bool(norms),
            dual_attention_layers=tuple(sorted(dual & {*range(num_layers)})),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _place(key: str, config: MMDiTConfig) -> _Place:
    """Finds the array of a diffusers key in the original layout."""
    if key == _TABLE[0]:
        return _Place(_TABLE[1])
    layer, _, parameter = key.rpartition(".")
    if not layer.startswith("transformer_blocks."):
        return _Place(f"{_MODEL_KEYS[layer]}.{parameter}", swapped=layer == "norm_out.linear")
    _, number, part = layer.split(".", 2)
    block = f"joint_blocks.{number}"
    if part in _FUSED_KEYS:
        fused, third = _FUSED_KEYS[part]
        return _Place(f"{block}.{fused}.{parameter}", third)
    swapped = part == "norm1_context.linear" and int(number) == config.num_layers - 1
    return _Place(f"{block}.{_BLOCK_KEYS[part]}.{parameter}", swapped=swapped)


def _original(shape: jax.ShapeDtypeStruct, place: _Place) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the original array, of which an array of diffusers is all or a part."""
    if place.third is None:
        return shape
    return jax.ShapeDtypeStruct((3 * shape.shape[0], *shape.shape[1:]), shape.dtype)


def _take(array: Any, place: _Place) -> Any:
    """Takes an array of diffusers from the original one."""
    if place.third is not None:
        rows = array.shape[0] // 3
        return array[place.third * rows : (place.third + 1) * rows]
    if place.swapped:
        shift, scale = array[: array.shape[0] // 2], array[array.shape[0] // 2 :]
        join = jnp.concatenate if isinstance(array, jax.Array) else np.concatenate
        return join([scale, shift])
    return array
