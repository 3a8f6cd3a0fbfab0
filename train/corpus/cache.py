"""A corpus as token ids on disk: made once, memory-mapped by every process.

With the ids in a file, a batch is a function of its number: any position in the corpus is reached
at once, and a checkpoint stores one number. Reading and encoding texts while training goes on would
be slower, and its position would have to name a file, a line, a token and the state of a shuffle
buffer.

A cache is a folder named after a hash of everything that decides the ids. It is written beside its
place and renamed when complete, so nobody sees half of it. Each opening compares hashes, which
takes about a second a gigabyte, so damage shows before training starts.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from train.cached_arrays import cache_folder
from train.corpus import token_files
from train.corpus.damage import DamagedDataError, refuse
from train.corpus.documents import Documents
from train.corpus.encoding import encode_all
from train.corpus.sources import Source
from train.corpus.tokenizers import Tokenizer

_FORMAT = 1

type Damaged = Literal["refuse", "skip"]


def load_documents(
    source: Source,
    tokenizer: Tokenizer,
    *,
    damaged: Damaged = "refuse",
    cache_dir: Path | None = None,
    workers: int = 0,
) -> Documents:
    """Returns the token ids of a corpus, from a cache once they were made.

    Processes that start at once make one cache: the first encodes, the others wait for it.

    Args:
        source: the texts. Empty ones are left out.
        tokenizer: encodes them.
        damaged: "refuse" raises an error at the first file, line or row without text; "skip"
            passes over and counts them.
        cache_dir: folder of the caches; None is the environment variable JAXGEN_CACHE, or else
            `~/.cache/jaxgen`.
        workers: processes that encode; 0 encodes in this one, which is fast enough for bytes.

    Returns:
        All documents, those that `Documents.part` holds out too.

    Raises:
        DamagedDataError: damaged data is to be refused, also if the cache was made without it.
        ValueError: an argument out of range, no text, or files that changed while they were read.
        OSError: the cache cannot be written or locked.

    Warns:
        UserWarning: damaged data was skipped, or the cache was damaged and is made again.
    """
    if damaged not in ("refuse", "skip"):
        raise ValueError(f"damaged must be refuse or skip, got {damaged!r}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    recipe = {
        "format": _FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
    }
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    folder = cache_folder(cache_dir) / f"corpus-{key}"
    found = _read(folder, tokenizer, recipe, warn=False)
    if found is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            # Perhaps another process was faster.
            found = _read(folder, tokenizer, recipe, warn=True)
            if found is None:
                _build(folder, source, tokenizer, recipe, damaged, workers)
                found = token_files.read(folder, tokenizer, recipe)
    if found is None:
        raise FileNotFoundError(f"{folder} disappeared")
    documents, damage = found
    if documents.skipped and damaged == "refuse":
        raise DamagedDataError(damage[0])
    if documents.skipped:
        warnings.warn(
            f"{documents.skipped} damaged texts are left out, the first: {damage[0]}", stacklevel=2
        )
    return documents


def _read(
    folder: Path, tokenizer: Tokenizer, recipe: dict[str, Any], *, warn: bool
) -> tuple[Documents, list[str]] | None:
    """The content of a cache, None if it is absent or damaged."""
    try:
        return token_files.read(folder, tokenizer, recipe)
    except ValueError as error:
        if warn:
            message = f"the cache {folder} cannot be used and is made again: {error}"
            warnings.warn(message, stacklevel=3)
        return None


def _build(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    damaged: Damaged,
    workers: int,
) -> None:
    """Makes a cache."""
    from tqdm import tqdm

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    damage: list[DamagedDataError] = []
    try:
        documents = source.documents(refuse if damaged == "refuse" else damage.append)
        encoded = encode_all(documents, tokenizer, workers)
        bar = tqdm(encoded, desc="encoding the corpus", unit="document", disable=None)
        token_files.write(temporary, bar, tokenizer, recipe, damage)
        if source.fingerprint() != recipe["source"]:
            raise ValueError("the files of the source changed while they were read")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from making the same cache at the same time."""
    with folder.with_name(f"{folder.name}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, also by a crash
        # Only a process that was killed leaves such a folder.
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield
