"""Batches of packed documents: endless, shuffled, deterministic, resumable, sharded."""

import functools
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from train.corpus.documents import Documents
from train.corpus.packing import Packing, Row, StreamPacking, WholePacking, fill

try:
    import grain
except ImportError as error:
    raise ImportError(
        'train.corpus needs the package grain; install it with: pip install "jaxgen[train]"'
    ) from error

_STEPS = 2**40  # endless for every purpose, and small enough that step * batch_size is exact
_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64))


class Batches:
    """An endless iterator of batches, epoch after epoch.

    An epoch has every token once. Each epoch has an order of its own of the documents, which are
    cut into rows, and of the rows, so that a long document does not fill a batch; a batch may span
    two epochs. A batch is a function of the seed and its step, whatever the number of shards, so a
    checkpoint stores one number, and beside it what the number is about.

    Args:
        documents: what to learn from, for example `load_documents(...).part("train", 0.01)`.
        context: tokens of a row.
        batch_size: rows of a batch over all shards.
        seed: decides the orders, from 0 to 2**32 - 1.
        split: divide documents wherever a row is full. False keeps those whole that fit a row, with
            some padding; longer ones are divided, not shortened. All epochs then have the same
            rows.
        shard_index: which part of each batch to yield, `jax.process_index()` for instance.
        shard_count: number of parts, `jax.process_count()` for instance. Put together in order,
            the parts are the batch that one shard yields.

    Raises:
        ValueError: an argument out of range, or `batch_size` is no multiple of `shard_count`.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        context: int,
        batch_size: int,
        seed: int,
        split: bool = True,
        shard_index: int = 0,
        shard_count: int = 1,
    ):
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")
        self._part = _part(context, batch_size, shard_index, shard_count)
        self._documents, self._packing = documents, _packing(documents, context, seed, split)
        self._context, self._batch_size = context, batch_size
        self._about = {
            "corpus": documents.digest,
            "context": context,
            "batch_size": batch_size,
            "seed": seed,
            "split": split,
        }
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: _row_order(seed, epoch, self._packing)
        )
        # One thread prepares batches while the device computes; a few waiting batches hide that a
        # new epoch takes longer.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        dataset = grain.MapDataset.range(_STEPS).map(self.at).to_iter_dataset(options)
        self._iterator = iter(dataset)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all shards in which every token is once."""
        return self._packing.rows

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Row:
        """Returns this shard's part of the next batch, as `train.corpus.packing.fill` does."""
        return next(self._iterator)

    def at(self, step: int) -> Row:
        """Returns this shard's part of batch number `step`, from 0."""
        numbers = (step * self._batch_size + np.arange(self._batch_size))[self._part]
        places = (divmod(int(number), self._packing.rows) for number in numbers)
        rows = [
            self._packing.pieces(epoch, int(self._order(epoch)[place])) for epoch, place in places
        ]
        return fill(self._documents, rows, self._context)

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON: that of Grain, one number, and what it is about."""
        return {"position": self._iterator.get_state(), **self._about}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position; the number of shards may be another.

        Raises:
            ValueError: the position is one in other batches; the message says what differs.
        """
        differing = [
            f"{name}={state.get(name)!r} before, {value!r} now"
            for name, value in self._about.items()
            if state.get(name) != value
        ]
        if differing:
            raise ValueError(f"cannot go on in other batches: {'; '.join(differing)}")
        self._iterator.set_state(state["position"])


def one_pass(
    documents: Documents,
    *,
    context: int,
    batch_size: int,
    split: bool = True,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Row]:
    """Yields every token once, for validation.

    The order is random but always the same, so the first batches are a fair sample.

    Args:
        documents: for example `load_documents(...).part("validation", 0.01)`.
        context: tokens of a row.
        batch_size: rows of a batch over all shards; the last batch is filled up with padding.
        split: as in `Batches`.
        shard_index: as in `Batches`.
        shard_count: as in `Batches`.

    Raises:
        ValueError: an argument out of range, or `batch_size` is no multiple of `shard_count`.
    """
    part = _part(context, batch_size, shard_index, shard_count)
    packing = _packing(documents, context, 0, split)
    order = _row_order(0, 0, packing)

    def batch(first: int) -> Row:
        rows = [packing.pieces(0, int(row)) for row in order[first : first + batch_size]]
        rows += [_NOTHING] * (batch_size - len(rows))
        return fill(documents, rows[part], context)

    return map(batch, range(0, packing.rows, batch_size))


def _packing(documents: Documents, context: int, seed: int, split: bool) -> Packing:
    """How documents become rows."""
    if split:
        return StreamPacking(documents, context=context, seed=seed)
    return WholePacking(documents, context=context)


def _row_order(seed: int, epoch: int, packing: Packing) -> np.ndarray:
    """The order of an epoch's rows."""
    return np.random.default_rng((seed, epoch, 1)).permutation(packing.rows)


def _part(context: int, batch_size: int, shard_index: int, shard_count: int) -> slice:
    """The rows of a batch that a shard yields, if the arguments are in range."""
    if context < 1:
        raise ValueError(f"context must be positive, got {context}")
    if shard_count < 1 or batch_size < 1 or batch_size % shard_count:
        raise ValueError(
            "batch_size and shard_count must be positive, the first a multiple of the second, "
            f"got batch_size={batch_size} and shard_count={shard_count}"
        )
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index must be from 0 to shard_count - 1 = {shard_count - 1}, got {shard_index}"
        )
    rows = batch_size // shard_count
    return slice(shard_index * rows, (shard_index + 1) * rows)
