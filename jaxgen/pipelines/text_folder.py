"""The folder of a released diffusion language model: weights, tokenizer, how to decode."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from jaxgen.checkpoints import diffusion_lm_config_from_json, load_diffusion_lm_folder
from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.layers import AttentionName
from jaxgen.models.diffusion_lm import DiffusionLMConfig
from jaxgen.pipelines.chat import ChatFormat, check_chat_format
from jaxgen.pipelines.diffusers_files import read_json
from jaxgen.sampling.block_arguments import check_vocabulary
from jaxgen.tokenizers import TextTokenizer

_NAMED_BLOCK = re.compile(r"-b(\d{1,5})(?:-|$)")


def load(
    folder: str | os.PathLike,
    *,
    reference: str | os.PathLike | None,
    block_length: int | None,
    chat_format: ChatFormat | None,
    mask_id: int | None,
    dtype: DTypeLike,
    attention: AttentionName,
    sharding: Placement,
    progress: Progress,
) -> dict[str, Any]:
    """Reads a model; see `TextToText.from_pretrained`.

    What is cheap to read is checked before any weights are. The chat format is checked only.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be callable, True, False or None, got {progress!r}")
    folders = {"model": Path(folder)}
    if reference is not None:
        folders["reference"] = Path(reference)
    for path in folders.values():
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"there is no file {path / 'config.json'}")
    configs = {
        role: diffusion_lm_config_from_json(
            (path / "config.json").read_bytes(), str(path / "config.json"), mask_id=mask_id
        )
        for role, path in folders.items()
    }
    if reference is not None:
        check_vocabulary(configs["model"], configs["reference"])
    tokenizer = TextTokenizer.from_folder(folder)
    check_tokenizer(configs["model"], tokenizer)
    if mask_id is None:
        check_mask(configs["model"], tokenizer)
    if chat_format is not None:
        check_chat_format(chat_format, tokenizer)
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    parts |= _settings(folders["model"], configs["model"], tokenizer, block_length)
    for role, path in folders.items():
        parts[role] = load_diffusion_lm_folder(
            path,
            dtype=dtype,
            mask_id=mask_id,
            attention=attention,
            sharding=sharding,
            progress=progress,
        )
    return parts


def check_tokenizer(config: DiffusionLMConfig, tokenizer: TextTokenizer) -> None:
    """Refuses a tokenizer that has more tokens than the model; models often have more.

    Raises:
        ValueError: ids that the model does not have.
    """
    if tokenizer.size > config.vocabulary_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.size - 1}, the model only "
            f"{config.vocabulary_size} tokens"
        )


def check_mask(config: DiffusionLMConfig, tokenizer: TextTokenizer) -> None:
    """Refuses a tokenizer that names another mask token than the model; it may name none.

    Raises:
        ValueError: two different tokens.
    """
    if tokenizer.mask_id not in (None, config.mask_id):
        raise ValueError(
            f"the mask of the tokenizer, {tokenizer.mask_id}, must be that of the model, "
            f"{config.mask_id}; mask_id can be given by the caller"
        )


def _settings(
    folder: Path, config: DiffusionLMConfig, tokenizer: TextTokenizer, block_length: int | None
) -> dict[str, Any]:
    """The block length, and the tokens that end and fill answers, as the folder says."""
    path = folder / "config.json"
    values, size = read_json(path), config.vocabulary_size
    stops = _ids(values, "eos_token_id", size, path)
    if tokenizer.eos_id is not None:
        stops.append(tokenizer.eos_id)
    padding = _ids(values, "pad_token_id", size, path)[:1] or [tokenizer.pad_id]
    if block_length is None and config.qk_norm:
        # The name counts first: 4 is the only block_size that released configurations are known
        # to hold, and there are models for 32 and 64.
        named = _NAMED_BLOCK.search(_name(folder))
        block_length = values.get("block_size") if named is None else int(named[1])
        if block_length is not None and (type(block_length) is not int or block_length < 1):
            source = f"{path}: block_size" if named is None else f"{folder}: -b<number> in the name"
            raise ValueError(f"{source} must be a positive int, got {block_length!r}")
    return {"block_length": block_length, "stop_ids": stops, "pad_id": padding[0]}


def _name(folder: Path) -> str:
    """The name of a folder, or of the repository whose snapshot Hugging Face's cache has there."""
    folder = Path(os.path.abspath(folder))
    return folder.parents[1].name if folder.parent.name == "snapshots" else folder.name


def _ids(values: Mapping[str, Any], name: str, size: int, path: Path) -> list[int]:
    """Ids in a configuration: none, one, or a list."""
    given = values.get(name)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(number) is not int or not 0 <= number < size for number in ids):
        raise ValueError(f"{path}: {name} must be ids below {size}, got {str(given)[:200]}")
    return list(ids)
