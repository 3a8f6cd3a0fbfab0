"""A Stable Diffusion 3 pipeline on disk, in the folder layout of diffusers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxgen.checkpoints import (
    load_autoencoder_folder,
    load_clip_text_folder,
    load_mmdit_folder,
    load_t5_folder,
    save_autoencoder_folder,
    save_clip_text_folder,
    save_mmdit_folder,
    save_t5_folder,
    write_json,
)
from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.layers import AttentionName
from jaxgen.models import SD3Text
from jaxgen.pipelines.diffusers_files import (
    EULER,
    load_schedule,
    read_json,
    save_schedule,
)
from jaxgen.tokenizers import ClipTokenizer, T5Tokenizer

_INDEX, _PIPELINE = "model_index.json", "StableDiffusion3Pipeline"


class Tokenizers(NamedTuple):
    """The tokenizers of the three text encoders.

    Attributes:
        clip_l: Of the first CLIP model.
        clip_g: Of the second.
        t5: Of T5; None without it.
    """

    clip_l: ClipTokenizer
    clip_g: ClipTokenizer
    t5: T5Tokenizer | None = None

    def encode(self, prompts: Sequence[str], with_t5: bool) -> tuple[np.ndarray, ...]:
        """Return the ids that `SD3Text` takes."""
        tokens = self.clip_l.encode(prompts), self.clip_g.encode(prompts)
        if not with_t5 or self.t5 is None:
            return tokens
        return (*tokens, self.t5.encode(prompts)[0])


def load(
    folder: str | os.PathLike,
    *,
    small: str | os.PathLike | None,
    dtype: DTypeLike,
    attention: AttentionName,
    scan: bool,
    with_t5: bool,
    t5_tokens: int,
    sharding: Placement,
    small_sharding: Placement,
    progress: Progress,
) -> dict[str, Any]:
    """Read the parts of a pipeline; see `StableDiffusion3.from_pretrained`."""
    folder = Path(folder)
    check_index(folder)
    options: dict[str, Any] = {"dtype": dtype, "attention": attention}
    options |= {"scan": scan, "progress": progress}
    transformer = load_mmdit_folder(folder / "transformer", sharding=sharding, **options)
    other = None
    if small is not None:
        place = sharding if small_sharding is None else small_sharding
        other = load_mmdit_folder(Path(small), sharding=place, **options)
    with_t5 = with_t5 and (folder / "text_encoder_3").is_dir()
    text = SD3Text(
        load_clip_text_folder(folder / "text_encoder", dtype=dtype),
        load_clip_text_folder(folder / "text_encoder_2", dtype=dtype),
        load_t5_folder(folder / "text_encoder_3", dtype=dtype) if with_t5 else None,
        hidden_dim=transformer.config.joint_attention_dim,
    )
    tokenizers = Tokenizers(
        ClipTokenizer.load(folder / "tokenizer"),
        ClipTokenizer.load(folder / "tokenizer_2"),
        T5Tokenizer.load(folder / "tokenizer_3", max_tokens=t5_tokens) if with_t5 else None,
    )
    return {
        "transformer": transformer,
        "autoencoder": load_autoencoder_folder(folder / "vae", dtype=dtype),
        "text": text,
        "tokenizers": tokenizers,
        "schedule": load_schedule(folder),
        "small": other,
    }


def save(folder: str | os.PathLike, parts: dict[str, Any], *, max_shard_bytes: int | None) -> None:
    """Write the parts of a pipeline; see `StableDiffusion3.save_pretrained`."""
    folder = Path(folder)
    text, tokenizers = parts["text"], parts["tokenizers"]
    save_mmdit_folder(folder / "transformer", parts["transformer"], max_shard_bytes=max_shard_bytes)
    save_autoencoder_folder(folder / "vae", parts["autoencoder"])
    save_clip_text_folder(folder / "text_encoder", text.clip_l)
    save_clip_text_folder(folder / "text_encoder_2", text.clip_g)
    tokenizers.clip_l.save(folder / "tokenizer")
    tokenizers.clip_g.save(folder / "tokenizer_2")
    if text.t5 is not None and tokenizers.t5 is not None:
        save_t5_folder(folder / "text_encoder_3", text.t5, max_shard_bytes=max_shard_bytes)
        tokenizers.t5.save(folder / "tokenizer_3")
    save_schedule(folder, parts["schedule"])
    write_json(folder / _INDEX, _index(text.t5 is not None))


def _index(with_t5: bool) -> dict[str, Any]:
    """Return a `model_index.json`."""
    classes = {
        "scheduler": ("diffusers", EULER),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": ("transformers", "T5EncoderModel") if with_t5 else (None, None),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": ("transformers", "T5TokenizerFast") if with_t5 else (None, None),
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    return {"_class_name": _PIPELINE, **classes}


def check_index(folder: Path) -> None:
    """Raise unless a folder is that of a Stable Diffusion 3 pipeline."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    path = folder / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no pipeline of diffusers, it lacks {_INDEX}")
    found = read_json(path).get("_class_name")
    if found != _PIPELINE:
        raise ValueError(f"{path}: _class_name must be {_PIPELINE!r}, got {found!r}")
