"""Batches of clips and caption tokens: endless, deterministic, resumable, rendered in parallel.

Clips are drawn while training goes on, in order of their numbers, which is a random order already
(`train.moving_emoji`). A batch is a function of the seed and its step, whatever the number of
processes that render it, so a checkpoint stores one number.
"""

import multiprocessing
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Protocol, Self, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from jaxgen.text import PADDING_ID, WordTokenizer

type Batch = dict[str, np.ndarray]


class Clips(Protocol):
    """A data set such as `train.moving_emoji.MovingEmoji`."""

    def __len__(self) -> int:
        """Number of clips."""
        ...

    def __getitem__(self, index: SupportsIndex, /) -> Any:
        """`video`, uint8 (frames, height, width, 3), and `caption`."""
        ...


class ClipBatches:
    """An endless iterator of batches; a context manager that ends its processes.

    Each batch has `video`, uint8 (batch, frames, height, width, 3), and `tokens`, int32 (batch,
    tokens). Dropped captions are rows of padding, for classifier-free guidance.

    Args:
        clips: The data set; pickled to the processes.
        tokenizer: Encodes the captions.
        batch_size: Clips a batch.
        seed: Decides which captions are dropped.
        caption_dropout: Share of captions to drop.
        workers: Processes that render; 0 renders in this one, when a batch is asked for.
        ahead: Batches rendered ahead of time.
    """

    def __init__(
        self,
        clips: Clips,
        tokenizer: WordTokenizer,
        *,
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.1,
        workers: int = 0,
        ahead: int = 4,
    ):
        self._clips, self._tokenizer = clips, tokenizer
        self._batch_size, self._seed, self._dropout = batch_size, seed, caption_dropout
        self._workers, self._ahead, self._step = workers, ahead, 0
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[list[Future]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def get_state(self) -> dict[str, int]:
        """Return the position: the number of batches taken."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self._step = state["step"]
        self._waiting.clear()

    def __next__(self) -> Batch:
        parts = self._rendered()
        videos = np.concatenate([videos for videos, _ in parts])
        tokens = self._tokenizer.encode([caption for _, captions in parts for caption in captions])
        generator = np.random.default_rng((self._seed, self._step))
        dropped = generator.random(self._batch_size) < self._dropout
        self._step += 1
        return {
            "video": videos,
            "tokens": np.where(dropped[:, None], np.int32(PADDING_ID), tokens),
        }

    def _rendered(self) -> list[tuple[np.ndarray, list[str]]]:
        if not self._workers:
            return [render(self._clips, self._numbers(self._step))]
        if self._pool is None:
            # Not forked: JAX has threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context)
        while len(self._waiting) <= self._ahead:
            numbers = self._numbers(self._step + len(self._waiting))
            parts = [part for part in np.array_split(numbers, self._workers) if len(part)]
            self._waiting.append([self._pool.submit(render, self._clips, part) for part in parts])
        return [future.result() for future in self._waiting.popleft()]

    def _numbers(self, step: int) -> np.ndarray:
        return (step * self._batch_size + np.arange(self._batch_size)) % len(self._clips)


def render(
    clips: Clips, numbers: Sequence[int] | np.ndarray
) -> tuple[UInt8[np.ndarray, "clips frames height width 3"], list[str]]:
    """Return the videos and the captions of some clips."""
    found = [clips[int(number)] for number in numbers]
    return np.stack([clip["video"] for clip in found]), [clip["caption"] for clip in found]
