"""A text-to-image model on disk: safetensors for weights, JSON for everything else.

card.json
tokenizer.json
transformer/config.json   transformer/model.safetensors    keys of diffusers' SD3 transformer
text_encoder/config.json  text_encoder/model.safetensors   keys of our own module
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxgen.checkpoints import (
    config_from_json,
    config_to_json,
    export_flat,
    export_mmdit,
    load_flat,
    load_mmdit,
    load_safetensors,
    save_safetensors,
    write_json,
)
from jaxgen.layers import AttentionName
from jaxgen.models.mmdit import MMDiT, MMDiTConfig
from jaxgen.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxgen.pipelines.diffusers_files import read_json
from jaxgen.text import WordTokenizer

_WEIGHTS = "model.safetensors"
_FILES = (
    "card.json",
    "tokenizer.json",
    "transformer/config.json",
    f"transformer/{_WEIGHTS}",
    "text_encoder/config.json",
    f"text_encoder/{_WEIGHTS}",
)


def save(
    folder: str | os.PathLike,
    transformer: MMDiT,
    text_encoder: TextEncoder,
    tokenizer: WordTokenizer,
    card: Mapping[str, Any],
    *,
    dtype: DTypeLike,
) -> None:
    """Write a model; see `TextToImage.save_pretrained`.

    The saved configurations describe the architecture. How to compute (dtype, attention, remat,
    scan) is chosen by whoever loads it.
    """
    folder = Path(folder)
    arrays = {"transformer": export_mmdit(transformer), "text_encoder": export_flat(text_encoder)}
    plain = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    configs = {
        "transformer": dataclasses.replace(
            transformer.config, attention="exact", remat=False, scan=False, **plain
        ),
        "text_encoder": dataclasses.replace(text_encoder.config, **plain),
    }
    for name, config in configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        texts = {"config.json": config_to_json(config)}
        save_safetensors(folder / name / _WEIGHTS, _cast(arrays[name], dtype), texts=texts)
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "card.json", card)


def load(
    folder: str | os.PathLike, attention: AttentionName, dtype: DTypeLike
) -> tuple[MMDiT, TextEncoder, WordTokenizer, dict[str, Any]]:
    """Read a model; see `TextToImage.from_pretrained`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    missing = [name for name in _FILES if not is_there(folder / name)]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete text-to-image model, it lacks: {', '.join(missing)}"
        )
    computation = {"dtype": dtype, "param_dtype": dtype}
    path = folder / "transformer"
    transformer = load_mmdit(
        dataclasses.replace(_config(MMDiTConfig, path), attention=attention, **computation),
        load_safetensors(path / _WEIGHTS),
        str(path / _WEIGHTS),
    )
    path = folder / "text_encoder"
    config = dataclasses.replace(_config(TextEncoderConfig, path), **computation)
    text_encoder = load_flat(
        lambda: TextEncoder(config, rngs=nnx.Rngs(0)),
        load_safetensors(path / _WEIGHTS),
        str(path / _WEIGHTS),
    )
    tokenizer = WordTokenizer.load(folder / "tokenizer.json")
    return transformer, text_encoder, tokenizer, read_json(folder / "card.json")


def is_there(path: Path) -> bool:
    """Whether a file exists, be it as shards with an index."""
    return path.is_file() or path.with_name(path.name + ".index.json").is_file()


def _config[Config](kind: type[Config], folder: Path) -> Config:
    path = folder / "config.json"
    return config_from_json(kind, path.read_text(encoding="utf-8"), str(path))


def _cast(arrays: Mapping[str, np.ndarray], dtype: DTypeLike) -> dict[str, np.ndarray]:
    """Convert floats, leave the rest."""
    return {
        key: array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for key, array in arrays.items()
    }
