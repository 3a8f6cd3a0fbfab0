"""What a run of `train.language_model` is made of: text, model, loss, validation, the export."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.checkpoints import (
    config_from_json,
    config_to_json,
    export_flat,
    load_flat,
    load_safetensors,
    parse_json_object,
    save_safetensors,
    write_json,
)
from jaxgen.models import LanguageModel, LanguageModelConfig
from jaxgen.sampling import weighted_cross_entropy
from train.corpus import (
    ByteTokenizer,
    Documents,
    ReleasedTokenizer,
    Tokenizer,
    load_documents,
    one_pass,
    open_source,
    python_sources,
)
from train.language_model_config import Config, preset
from train.state import Arrays, Loss, Skeleton

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "card.json"
_MEASURED = 2  # rows on which attention is measured


def make_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer that the options ask for."""
    if config.tokenizer is None:
        return ByteTokenizer(multiple_of=config.vocabulary_multiple)
    return ReleasedTokenizer(
        config.tokenizer, end_token=config.end_token, multiple_of=config.vocabulary_multiple
    )


def open_documents(config: Config, tokenizer: Tokenizer) -> Documents:
    """Return all documents as tokens, encoded once and cached."""
    source = python_sources()
    if config.data is not None:
        source = open_source(
            config.data, kind=config.kind, field=config.field, pattern=config.pattern
        )
    return load_documents(source, tokenizer, damaged=config.damaged, workers=config.workers)


def model_config(config: Config, vocabulary_size: int) -> LanguageModelConfig:
    """Return the model's configuration."""
    return dataclasses.replace(
        preset(config.model),
        vocabulary_size=vocabulary_size,
        max_tokens=config.context,
        attention=config.attention,
        qk_norm=config.qk_norm,
        smooth_keys=config.smooth_keys,
        smooth_queries=config.smooth_queries,
        dtype=config.precision,
        remat=config.remat,
        scan=config.scan,
    )


def make_loss(skeleton: Skeleton, *, across_documents: bool, chunk: int) -> Loss:
    """Return the mean cross entropy of the next token, in nats.

    Args:
        skeleton: Of the model.
        across_documents: Tokens attend to the documents before theirs, and positions count on.
        chunk: Positions whose logits are computed at a time.
    """

    def loss(params, frozen, batch, key):
        del key
        model: LanguageModel = skeleton.join(params | frozen)
        inside = {} if across_documents else _inside(batch)
        hidden = model.hidden(batch["tokens"], **inside)
        weights = batch["weights"] / jnp.maximum(batch["weights"].sum(), 1.0)
        table, axis = model.output_table()
        return weighted_cross_entropy(
            hidden, table, batch["targets"], weights, axis=axis, chunk=chunk
        )

    return loss


def _inside(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What keeps tokens inside their documents."""
    return {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}


def validate(
    skeleton: Skeleton, config: Config, arrays: Arrays, documents: Documents
) -> dict[str, float]:
    """Return the mean loss on held-out text, in nats a token, and the number of tokens.

    The text is the first `config.validation_batches` batches of the documents, or all of it if
    there is less. One device computes them, in parts that have no more rows than a device gets at
    once in training.

    Args:
        skeleton: Of the model.
        config: Says how much text, and how it is packed.
        arrays: Of the model.
        documents: Those that are held out.
    """
    parts = math.gcd(config.batch_size, config.accumulate * (config.devices or jax.device_count()))
    batches = one_pass(
        documents,
        context=config.context,
        batch_size=config.batch_size // parts,
        split=not config.whole_documents,
    )
    total, count = 0.0, 0.0
    for batch in itertools.islice(batches, config.validation_batches * parts):
        tokens = float(batch["weights"].sum())
        total += tokens * float(
            _loss(skeleton, config.across_documents, config.chunk, arrays, batch)
        )
        count += tokens
    mean = total / max(count, 1.0)
    return {"validation": mean, "validation_tokens": count}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loss(skeleton: Skeleton, across_documents: bool, chunk: int, arrays, batch) -> jax.Array:
    loss = make_loss(skeleton, across_documents=across_documents, chunk=chunk)
    return loss(arrays, {}, batch, jax.random.key(0))


def statistics_batch(config: Config, documents: Documents) -> Mapping[str, np.ndarray]:
    """Return the few rows of held-out text on which attention is measured, always the same."""
    split = not config.whole_documents
    return next(one_pass(documents, context=config.context, batch_size=_MEASURED, split=split))


def save_export(folder: Path, model: LanguageModel, card: Mapping[str, Any], dtype: str) -> None:
    """Write a model in our own layout, with a card."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: array.astype(dtype) for name, array in export_flat(model).items()}
    save_safetensors(folder / _WEIGHTS, arrays, texts={_CONFIG: config_to_json(model.config)})
    write_json(folder / _CARD, card)


def load_export(folder: Path, **changes: Any) -> tuple[LanguageModel, dict[str, Any]]:
    """Read what `save_export` wrote: a model and its card.

    Args:
        folder: The folder `export` of a run.
        **changes: Of the configuration, for example `attention="int8"` or `dtype="float32"`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A damaged file, or weights that do not fit.
    """
    folder = Path(folder)
    path = folder / _CONFIG
    config = config_from_json(LanguageModelConfig, path.read_text(encoding="utf-8"), str(path))
    config = dataclasses.replace(config, **changes)
    model = load_flat(
        lambda: LanguageModel(config, rngs=nnx.Rngs(0)),
        load_safetensors(folder / _WEIGHTS),
        str(folder / _WEIGHTS),
    )
    card = folder / _CARD
    return model, parse_json_object(card.read_bytes(), str(card))
