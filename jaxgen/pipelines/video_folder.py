"""A text-to-video model on disk: safetensors for weights, JSON for everything else.

With a text encoder of ours, as video training exports it:

card.json
tokenizer.json
transformer/config.json   transformer/diffusion_pytorch_model.safetensors   keys of diffusers' Wan
text_encoder/config.json  text_encoder/model.safetensors                    keys of our own module

Without one, as diffusers writes its `WanPipeline`, of which nothing else is read:

model_index.json
scheduler/scheduler_config.json    its shift of the noise levels; may be absent
transformer/config.json   transformer/diffusion_pytorch_model.safetensors

A folder `transformer` by itself is a model, too.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxgen.checkpoints import (
    config_from_json,
    config_to_json,
    export_flat,
    load_flat,
    load_safetensors,
    load_wan_folder,
    save_safetensors,
    save_wan_folder,
    write_json,
)
from jaxgen.layers import AttentionName
from jaxgen.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxgen.models.wan import Attend, Wan
from jaxgen.pipelines.diffusers_files import (
    EULER,
    load_schedule,
    read_json,
    save_schedule,
)
from jaxgen.pipelines.folder import is_there
from jaxgen.sampling import FlowMatchingSchedule
from jaxgen.text import WordTokenizer

_INDEX, _CARD, _TOKENIZER = "model_index.json", "card.json", "tokenizer.json"
_ENCODER_WEIGHTS = "text_encoder/model.safetensors"
_FILES = (
    _CARD,
    _TOKENIZER,
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    _ENCODER_WEIGHTS,
)
_PIPELINE = "WanPipeline"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a text-to-video model consists of; encoder and tokenizer are both there or neither."""

    transformer: Wan
    text_encoder: TextEncoder | None = None
    tokenizer: WordTokenizer | None = None
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: FlowMatchingSchedule = dataclasses.field(default_factory=FlowMatchingSchedule)


def load(
    folder: str | os.PathLike,
    attention: AttentionName | Callable[[int], Attend] | None,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    remat: bool,
    scan: bool,
) -> Parts:
    """Read a model; see `TextToVideo.from_pretrained`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    kind: dict[str, Any] = {"attend" if callable(attention) else "attention": attention}

    def transformer(path: Path) -> Wan:
        return load_wan_folder(path, remat=remat, scan=scan, **kind, **dtypes)

    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX)
        schedule = load_schedule(folder)
        return Parts(transformer(folder / "transformer"), schedule=schedule)
    if (folder / "config.json").is_file():
        return Parts(transformer(folder))
    _check_complete(folder)
    return Parts(
        transformer(folder / "transformer"),
        _load_text_encoder(folder, dtypes),
        WordTokenizer.load(folder / _TOKENIZER),
        read_json(folder / _CARD),
    )


def save(folder: str | os.PathLike, parts: Parts, dtype: DTypeLike) -> None:
    """Write a model; see `TextToVideo.save_pretrained`."""
    folder, ours = Path(folder), parts.text_encoder is not None
    other = folder / (_INDEX if ours else _CARD)
    if other.exists():
        raise FileExistsError(
            f"{other} belongs to a model {'without' if ours else 'with'} a text encoder of ours; "
            "one folder must not hold both"
        )
    save_wan_folder(folder / "transformer", _narrowed(parts.transformer, dtype))
    if parts.text_encoder is None or parts.tokenizer is None:
        save_schedule(folder, parts.schedule)
        write_json(folder / _INDEX, _index())
        return
    encoder = parts.text_encoder
    plain = dataclasses.replace(encoder.config, dtype=jnp.float32, param_dtype=jnp.float32)
    (folder / "text_encoder").mkdir(exist_ok=True)
    arrays, texts = export_flat(_narrowed(encoder, dtype)), {"config.json": config_to_json(plain)}
    save_safetensors(folder / _ENCODER_WEIGHTS, arrays, texts=texts)
    parts.tokenizer.save(folder / _TOKENIZER)
    write_json(folder / _CARD, parts.card)


def _check_complete(folder: Path) -> None:
    """Raise FileNotFoundError with all that a model with a text encoder of ours lacks."""
    missing = [name for name in _FILES if not is_there(folder / name)]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete text-to-video model, it lacks: {', '.join(missing)}; "
            f"nor is it a folder of diffusers, with {_INDEX} for a pipeline or config.json for a "
            "transformer"
        )


def _check_index(path: Path) -> None:
    """Raise ValueError for a pipeline whose videos are not made by one transformer from text."""
    index = read_json(path)
    if index.get("_class_name") != _PIPELINE:
        raise ValueError(
            f"{path}: _class_name must be {_PIPELINE!r}, got {index.get('_class_name')!r}"
        )
    second = index.get("transformer_2") or [None]
    if second != [None] * len(second):
        raise ValueError(
            f"{path}: transformer_2 must be null, got {second}: a second transformer for low "
            "noise, as that of Wan2.2, is not supported"
        )


def _load_text_encoder(folder: Path, dtypes: Mapping[str, Any]) -> TextEncoder:
    path, weights = folder / "text_encoder/config.json", folder / _ENCODER_WEIGHTS
    config = config_from_json(TextEncoderConfig, path.read_text(encoding="utf-8"), str(path))
    config = dataclasses.replace(config, **dtypes)
    return load_flat(
        lambda: TextEncoder(config, rngs=nnx.Rngs(0)), load_safetensors(weights), str(weights)
    )


def _narrowed[Module: nnx.Module](module: Module, dtype: DTypeLike) -> Module:
    """Return a module with floats of `dtype`; those of plugged-in attention stay as they are."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float dtype such as bfloat16, got {dtype!r}")
    graph, state = nnx.split(module)
    narrowed = [
        (path, variable.replace(jnp.asarray(variable[...], dtype)))
        if jnp.issubdtype(variable.dtype, jnp.floating) and "attend" not in path
        else (path, variable)
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(narrowed))


def _index() -> dict[str, Any]:
    """Return a `model_index.json` without the parts that a caller of diffusers has to pass."""
    parts = {name: [None, None] for name in ("text_encoder", "tokenizer", "vae")}
    ours = {"scheduler": EULER, "transformer": "WanTransformer3DModel"}
    parts |= {name: ["diffusers", kind] for name, kind in ours.items()}
    return {"_class_name": _PIPELINE} | dict(sorted(parts.items()))
