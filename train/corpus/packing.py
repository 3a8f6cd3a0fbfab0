"""Documents to rows of a fixed length. Nothing is thrown away.

A row is made of pieces of documents. It has `context` tokens that a model reads and one more, the
target of the last. So each row's last token, if its document goes on, is the first of another row:
every token of a document but the first is the target of the one before it exactly once an epoch.
"""

import bisect
import functools
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from train.corpus.documents import Documents

type Pieces = tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"]]
type Row = dict[str, np.ndarray]


class Packing(Protocol):
    """Decides which pieces make a row."""

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        ...

    def pieces(self, epoch: int, row: int) -> Pieces:
        """Where the pieces of a row begin in `Documents.tokens`, and their lengths.

        Together at most `context + 1` tokens.
        """
        ...


class StreamPacking:
    """Cuts all documents, one after the other in a new order each epoch, into rows.

    Documents are divided wherever a row is full, so no row has padding but the last of an epoch,
    and no document is always divided at the same places.

    Args:
        documents: what to pack.
        context: tokens of a row.
        seed: decides the orders.
    """

    def __init__(self, documents: Documents, *, context: int, seed: int):
        self._documents, self._context, self._seed = documents, context, seed
        self.rows = -(-documents.token_count // context)
        self._stream = functools.lru_cache(maxsize=2)(self._draw)  # a batch may span two epochs

    def pieces(self, epoch: int, row: int) -> Pieces:
        """As in `Packing`; all rows but the last have `context + 1` tokens."""
        order, ends = self._stream(epoch)
        first = row * self._context
        last = min(first + self._context + 1, int(ends[-1]))
        inside = slice(
            np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1
        )
        chosen, stops = order[inside], ends[inside]
        begins = stops - self._documents.lengths[chosen]
        left, right = np.maximum(begins, first), np.minimum(stops, last)
        return self._documents.starts[chosen] + left - begins, right - left

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents, and where each then ends."""
        generator = np.random.default_rng((self._seed, epoch, 0))
        order = generator.permutation(len(self._documents))
        return order, np.cumsum(self._documents.lengths[order])


class WholePacking:
    """Puts documents that fit a row into one row whole, at the price of some padding.

    Longer documents are divided into full rows and a rest. Each piece goes, the longest first, to
    the fullest row that has room (best-fit packing: Ding et al., 2024, arXiv:2404.10830, section
    3). Rows do not see each other's documents, so these rows stay and only their order changes.

    Args:
        documents: what to pack.
        context: tokens of a row.
    """

    def __init__(self, documents: Documents, *, context: int):
        starts, lengths = _divide(documents, context)
        row_of = _best_fit(lengths, context + 1)
        order = np.argsort(row_of, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self.rows = int(row_of.max()) + 1
        self._first = np.searchsorted(row_of[order], np.arange(self.rows + 1))

    def pieces(self, epoch: int, row: int) -> Pieces:
        """As in `Packing`; the epoch does not matter."""
        del epoch
        inside = slice(self._first[row], self._first[row + 1])
        return self._starts[inside], self._lengths[inside]


def fill(documents: Documents, rows: list[Pieces], context: int) -> Row:
    """Makes arrays of rows.

    Args:
        documents: what the pieces are of.
        rows: the pieces of each row; none makes a row of padding.
        context: tokens of a row.

    Returns:
        Arrays (rows, context):

        - `tokens`, int32; `pad_id` after the last piece.
        - `targets`, int32: the tokens after them.
        - `segment_ids`, int32: the number of each token's piece within its row from 1; 0 is
          padding.
        - `positions`, int32: from 0 in each piece, because the model does not see what came before.
        - `weights`, float32: 1 where the target belongs to the same piece; 0 where it is padding or
          another document's first token.
    """
    shape = (len(rows), context + 1)
    tokens = np.full(shape, documents.pad_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, (starts, lengths) in enumerate(rows):
        count = int(lengths.sum())
        within = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens[row, :count] = documents.tokens[np.repeat(starts, lengths) + within]
        segments[row, :count] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions[row, :count] = within
    before, after = segments[:, :-1], segments[:, 1:]
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "segment_ids": before.copy(),
        "positions": positions[:, :-1].copy(),
        "weights": ((before == after) & (before > 0)).astype(np.float32),
    }


def _divide(documents: Documents, context: int) -> Pieces:
    """Documents as pieces of at most `context + 1` tokens, which overlap by one."""
    counts = np.maximum(-(-(documents.lengths - 1) // context), 1)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = number * context
    rests = np.repeat(documents.lengths, counts) - offsets
    return np.repeat(documents.starts, counts) + offsets, np.minimum(rests, context + 1)


def _best_fit(lengths: np.ndarray, capacity: int) -> Int64[np.ndarray, " pieces"]:
    """The row of each piece."""
    row_of = np.empty(len(lengths), np.int64)
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys, in order
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room, count = count, capacity, count + 1
        else:
            room = rooms[place]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[place]
        row_of[piece] = row
        if (left := room - length) > 0:
            if left not in rows_by_room:
                rows_by_room[left] = []
                bisect.insort(rooms, left)
            rows_by_room[left].append(row)
    return row_of
