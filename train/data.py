"""Batches of pictures and caption tokens: endless, shuffled, deterministic, resumable.

The data set is in memory, so Grain moves nothing but step numbers. A batch is a function of the
seed and its step: the step gives positions in an endless row of epochs, each epoch a permutation of
its own, and pictures and tokens are gathered with two NumPy look-ups. A checkpoint therefore stores
one number. Grain's own `shuffle` permutes row by row: on these few thousand rows that was measured
to take five times longer than all the rest.
"""

import functools

import numpy as np
from jaxtyping import Int32, UInt8

from jaxgen.text import PADDING_ID, WordTokenizer
from train.openmoji import Emojis

try:
    import grain
except ImportError as error:
    raise ImportError(
        'train.data needs the package grain; install it with: pip install "jaxgen[train]"'
    ) from error

_STEPS = 2**40  # endless for every purpose, and small enough that step * batch_size is exact

type Batch = dict[str, UInt8[np.ndarray, "batch size size 3"] | Int32[np.ndarray, "batch tokens"]]


def batch_dataset(
    emojis: Emojis,
    tokenizer: WordTokenizer,
    *,
    batch_size: int,
    seed: int,
    caption_dropout: float = 0.1,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.MapDataset:
    """Describes an endless sequence of batches, addressable by step number.

    Rows are drawn epoch after epoch, each epoch in another order; a batch may span two epochs, so
    every emoji is seen equally often. A dropped caption is a row of padding, which teaches the
    model its unconditional prediction for classifier-free guidance (Ho & Salimans, 2022).

    Args:
        emojis: The data set, for instance `load(64).train`.
        tokenizer: Encodes the captions, once.
        batch_size: Rows of a batch over all shards.
        seed: Decides the order and the dropped captions, from 0 to 2**32 - 1.
        caption_dropout: Share of captions to drop, from 0 to 1.
        shard_index: Which part of each batch to yield, `jax.process_index()` for instance.
        shard_count: Number of parts, `jax.process_count()` for instance. Put together in order,
            the parts are the batch that one shard yields.

    Returns:
        Element `step` is a dict of `image`, uint8 (batch_size / shard_count, size, size, 3), and
        `tokens`, int32 (batch_size / shard_count, tokens).

    Raises:
        ValueError: If the data set is empty or smaller than a batch, or an argument is out of
            range, or `batch_size` is no multiple of `shard_count`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if batch_size > len(emojis):
        raise ValueError(
            f"batch_size must not exceed the {len(emojis)} emojis given, got {batch_size}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")
    if not 0.0 <= caption_dropout <= 1.0:
        raise ValueError(f"caption_dropout must be from 0 to 1, got {caption_dropout}")
    if shard_count < 1 or batch_size % shard_count:
        raise ValueError(
            "shard_count must be positive and divide batch_size, "
            f"got shard_count={shard_count} and batch_size={batch_size}"
        )
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index must be from 0 to shard_count - 1 = {shard_count - 1}, got {shard_index}"
        )
    images, tokens = emojis.images, tokenizer.encode(emojis.captions)
    rows_a_shard = batch_size // shard_count
    part = slice(shard_index * rows_a_shard, (shard_index + 1) * rows_a_shard)

    @functools.lru_cache(maxsize=2)  # a batch touches at most two epochs
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(emojis))

    def gather(step: int, generator: np.random.Generator) -> Batch:
        epoch, start = divmod(step * batch_size, len(emojis))
        rows = order(epoch)[start : start + batch_size]
        if rows.size < batch_size:
            rows = np.concatenate([rows, order(epoch + 1)[: batch_size - rows.size]])
        # The whole batch draws, then the shard cuts: shards need no streams of their own.
        rows, dropped = rows[part], generator.random(batch_size)[part] < caption_dropout
        batch_tokens = np.where(dropped[:, None], np.int32(PADDING_ID), tokens[rows])
        return {"image": images[rows], "tokens": batch_tokens}

    return grain.MapDataset.range(_STEPS).seed(seed).random_map(gather)


def batches(
    emojis: Emojis,
    tokenizer: WordTokenizer,
    *,
    batch_size: int,
    seed: int,
    caption_dropout: float = 0.1,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator:
    """Starts iterating over `batch_dataset`; arguments, batches and errors are described there.

    Returns:
        An endless iterator; `get_state()` and `set_state()` store and restore its position.
    """
    dataset = batch_dataset(
        emojis,
        tokenizer,
        batch_size=batch_size,
        seed=seed,
        caption_dropout=caption_dropout,
        shard_index=shard_index,
        shard_count=shard_count,
    )
    # One thread prepares batches while the device computes; a few waiting batches hide its jitter.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))
