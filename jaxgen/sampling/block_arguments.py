"""Checks of what `decode` is called with. What is traced has its shape checked, not its values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32, UInt32

from jaxgen.models.diffusion_lm import DiffusionLMConfig
from jaxgen.sampling.block_decoder import BlockDiffusion
from jaxgen.sampling.residual_context import ResidualContext
from jaxgen.sampling.unmasking import TokenChoice, Unmasking


def check_prompts(prompts: Array, new_tokens: int, config: DiffusionLMConfig) -> None:
    """Refuses prompts that are no ids, and answers without tokens.

    Raises:
        ValueError: another rank or dtype, ids that the model does not have, or `new_tokens` < 1.
    """
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(
            f"prompts must be ids (batch, tokens), got {prompts.dtype} of shape {prompts.shape}"
        )
    if not _is_int(new_tokens) or new_tokens < 1:
        raise ValueError(f"new_tokens must be a positive int, got {new_tokens!r}")
    if not isinstance(prompts, Tracer) and prompts.size:
        low, high = int(prompts.min()), int(prompts.max())
        if low < 0 or high >= config.vocabulary_size:
            raise ValueError(
                f"prompts must be ids below {config.vocabulary_size}, got {low} to {high}"
            )


def checked_decoder(decoder: BlockDiffusion, config: DiffusionLMConfig) -> BlockDiffusion:
    """Returns a decoder whose numbers are float32, whatever they were: one program for all.

    Raises:
        ValueError: a part or a number that is none, ids out of range, the mask as an end or as
            padding, or nothing left to draw.
    """
    parts = {"choice": TokenChoice, "unmasking": Unmasking, "residual": ResidualContext | None}
    for name, kind in parts.items():
        value = getattr(decoder, name)
        if not isinstance(value, kind):
            wanted = getattr(kind, "__name__", "ResidualContext or None")
            raise ValueError(f"{name} must be of type {wanted}, got {value!r}")
    choice = decoder.choice
    ids = {"stop_ids": decoder.stop_ids, "pad_id": (decoder.pad_id,)}
    ids |= {"forbidden": choice.forbidden, "deferred": choice.deferred}
    for name, values in ids.items():
        if not isinstance(values, tuple) or not all(map(_is_int, values)):
            raise ValueError(f"{name} must be made of ints, got {values!r}")
        if not all(0 <= value < config.vocabulary_size for value in values):
            raise ValueError(f"{name} must be below {config.vocabulary_size}, got {values}")
    if config.mask_id in (decoder.pad_id, *decoder.stop_ids):
        raise ValueError(f"pad_id and stop_ids must not be the mask token, {config.mask_id}")
    if len({config.mask_id, *choice.forbidden}) == config.vocabulary_size:
        raise ValueError(
            f"forbidden must leave one of {config.vocabulary_size} tokens besides the mask to "
            f"draw, got {len(choice.forbidden)} tokens"
        )
    return jax.tree_util.tree_map_with_path(_number, decoder)


def _number(path: Any, value: Any) -> Array:
    """A number of a decoder as float32."""
    if not isinstance(value, int | float | np.number | np.ndarray | Array) or np.ndim(value):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        raise ValueError(f"{name} must be a number, got {value!r}")
    return jnp.asarray(value, jnp.float32)


def _is_int(value: Any) -> bool:
    """Whether this is an int of Python or NumPy, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_reference(
    decoder: BlockDiffusion, config: DiffusionLMConfig, reference: DiffusionLMConfig | None
) -> None:
    """Refuses a reference model that is missing, not asked for, or of another vocabulary.

    Raises:
        ValueError: one of these.
    """
    init = None if decoder.residual is None else decoder.residual.init
    if init == "reference" and reference is None:
        raise ValueError('init="reference" needs a reference model, got reference=None')
    if reference is None:
        return
    if init != "reference":
        raise ValueError(f'a reference model is for init="reference" only, got init={init!r}')
    check_vocabulary(config, reference)


def check_vocabulary(config: DiffusionLMConfig, reference: DiffusionLMConfig) -> None:
    """Refuses a reference model whose predictions are not about the tokens of the model.

    Raises:
        ValueError: another vocabulary or mask.
    """
    ours, theirs = ((one.vocabulary_size, one.mask_id) for one in (config, reference))
    if ours != theirs:
        raise ValueError(
            "the reference model must have the vocabulary_size and mask_id of the model, "
            f"{ours}, got {theirs}"
        )


def checked_lengths(lengths: Array | None, prompts: Array) -> Int32[Array, " batch"]:
    """Returns the tokens of each prompt, all of its row if None.

    Raises:
        ValueError: another shape or dtype, or lengths that do not fit the rows.
    """
    batch, longest = prompts.shape
    lengths = jnp.full(batch, longest) if lengths is None else jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be ints of shape ({batch},), got {lengths.dtype} of {lengths.shape}"
        )
    if not isinstance(lengths, Tracer) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > longest:
            raise ValueError(f"lengths must be from 0 to {longest}, got {low} to {high}")
    return lengths.astype(jnp.int32)


def checked_seeds(seeds: Array | int, batch: int) -> UInt32[Array, " batch"]:
    """Returns a seed for each row; from an int on, one after the other.

    Raises:
        ValueError: an int out of range, or another shape or dtype.
    """
    if not isinstance(seeds, Tracer):
        given = np.asarray(seeds)
        if given.dtype.kind not in "iu":
            raise ValueError(f"seeds must be ints, got {given.dtype}")
        low, high = (int(given.min()), int(given.max())) if given.size else (0, 0)
        if low < 0 or high >= 2**32:
            raise ValueError(f"seeds must be from 0 to 2**32 - 1, got {low} to {high}")
    seeds = jnp.asarray(seeds, jnp.uint32)
    seeds = seeds + jnp.arange(batch, dtype=jnp.uint32) if seeds.ndim == 0 else seeds
    if seeds.shape != (batch,):
        raise ValueError(f"seeds must be an int or have shape ({batch},), got {seeds.shape}")
    return seeds
