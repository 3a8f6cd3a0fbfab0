"""Documents to ids, in this process or in several; the order stays."""

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np

from train.corpus.sources import Document
from train.corpus.tokenizers import Tokenizer

_LETTERS_AT_ONCE = 2**18  # that a process gets: much longer to encode than to send
_CHUNKS_A_WORKER = 3  # enough that none waits, few enough for memory

_kept: list[Tokenizer] = []  # the tokenizer of a worker process


def encode_all(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Document, np.ndarray]]:
    """Encodes documents.

    Args:
        documents: read as they are needed.
        tokenizer: pickled to the processes.
        workers: processes; 0 encodes in this one.

    Yields:
        Each document and its ids, int32 (tokens,), in the order given.
    """
    if not workers:
        for document in documents:
            yield document, tokenizer.encode(document.text)
        return
    waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    chunks = _chunks(documents)
    # Not forked: JAX has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_keep, initargs=(tokenizer,)
    ) as pool:
        try:
            while True:
                for chunk in itertools.islice(chunks, workers * _CHUNKS_A_WORKER - len(waiting)):
                    texts = [document.text for document in chunk]
                    waiting.append((chunk, pool.submit(_encode, texts)))
                if not waiting:
                    return
                chunk, future = waiting.popleft()
                yield from zip(chunk, future.result(), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists that have about `_LETTERS_AT_ONCE`."""
    chunk, letters = [], 0
    for document in documents:
        chunk.append(document)
        letters += len(document.text) + 1
        if letters >= _LETTERS_AT_ONCE:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def _keep(tokenizer: Tokenizer) -> None:
    """Starts a worker process."""
    _kept.append(tokenizer)


def _encode(texts: list[str]) -> list[np.ndarray]:
    """Encodes in a worker process."""
    return [_kept[0].encode(text) for text in texts]
