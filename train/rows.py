"""Rows of tokens to learn from, and endless batches of them: deterministic, resumable.

The rows are in memory. A batch is a function of the rows, the seed and its step, so a checkpoint
stores that number and a hash of the rows.
"""

import dataclasses
import functools
import hashlib
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int32

from train.run_folder import ConfigChangedError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts of which a part is learned.

    Attributes:
        tokens: the texts, and padding after them.
        maskable: True for what is learned.
        lengths: tokens of each text; those after it are not seen.
    """

    tokens: Int32[np.ndarray, "rows tokens"]
    maskable: Bool[np.ndarray, "rows tokens"]
    lengths: Int32[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | np.ndarray) -> Self:
        return type(self)(self.tokens[rows], self.maskable[rows], self.lengths[rows])

    def batch(self) -> dict[str, np.ndarray]:
        """Returns the arrays by name, as the loss gets them."""
        return {"tokens": self.tokens, "maskable": self.maskable, "lengths": self.lengths}

    def digest(self) -> str:
        """Returns a hash of the arrays and their shapes."""
        found = hashlib.sha256(str(self.tokens.shape).encode())
        for array in self.batch().values():
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


class RowBatches:
    """An endless iterator of batches, epoch after epoch, each in another order.

    Args:
        rows: what to learn from.
        batch_size: rows of a batch.
        seed: decides the order.

    Raises:
        ValueError: fewer rows than a batch has.
    """

    def __init__(self, rows: Rows, *, batch_size: int, seed: int):
        if len(rows) < batch_size:
            raise ValueError(f"batch_size={batch_size} needs as many rows, got {len(rows)}")
        self._rows, self._batch_size, self._seed, self._step = rows, batch_size, seed, 0
        self._digest = rows.digest()
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def __iter__(self) -> Self:
        return self

    def get_state(self) -> dict[str, Any]:
        """Returns the position, which is the number of batches taken, and the hash of the rows."""
        return {"step": self._step, "rows": self._digest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position.

        Raises:
            ConfigChangedError: it is a position in other rows.
        """
        if state.get("rows", self._digest) != self._digest:
            raise ConfigChangedError(
                "the run learned from other rows than these: the file, or how many texts of it are "
                "held out, has changed; restore it, or choose another --output"
            )
        self._step = state["step"]

    def __next__(self) -> dict[str, np.ndarray]:
        epoch, start = divmod(self._step * self._batch_size, len(self._rows))
        chosen = self._order(epoch)[start : start + self._batch_size]
        if len(chosen) < self._batch_size:
            more = self._order(epoch + 1)[: self._batch_size - len(chosen)]
            chosen = np.concatenate([chosen, more])
        self._step += 1
        return self._rows[chosen].batch()

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
