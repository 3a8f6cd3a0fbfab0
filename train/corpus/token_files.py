"""Token ids of documents in files.

A folder holds

    tokens.bin     the ids of all documents, each with its end; uint16 or uint32, little-endian
    documents.bin  for each document where it ends and its split number; two uint64, little-endian
    index.json     what the ids depend on, counts, and the SHA-256 of the other two
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoints import parse_json_object, write_json
from train.corpus.damage import DamagedDataError
from train.corpus.documents import Documents, split_number
from train.corpus.sources import Document
from train.corpus.tokenizers import Tokenizer

_TOKENS, _DOCUMENTS, _INDEX = "tokens.bin", "documents.bin", "index.json"
_EXAMPLES = 20  # of damage


def write(
    folder: Path,
    encoded: Iterable[tuple[Document, np.ndarray]],
    tokenizer: Tokenizer,
    recipe: Mapping[str, Any],
    damage: list[DamagedDataError],
) -> None:
    """Writes the files, `index.json` last.

    Args:
        folder: exists and is empty.
        encoded: documents and their ids. Those without ids are left out.
        tokenizer: what encoded them.
        recipe: what the ids depend on, as JSON.
        damage: what was passed over, complete when `encoded` ends.

    Raises:
        ValueError: no document with ids, or an id out of the tokenizer's range.
    """
    dtype, end = _dtype(tokenizer), np.array([tokenizer.end_id])
    total = count = empty = 0
    hashes = {_TOKENS: hashlib.sha256(), _DOCUMENTS: hashlib.sha256()}
    with (folder / _TOKENS).open("xb") as tokens, (folder / _DOCUMENTS).open("xb") as documents:
        for document, ids in encoded:
            if not len(ids):
                empty += 1
                continue
            if ids.min() < 0 or ids.max() >= tokenizer.size:
                raise ValueError(
                    f"ids must be from 0 to {tokenizer.size - 1}, got {ids.min()} to {ids.max()} "
                    f"for {document.name}"
                )
            total, count = total + len(ids) + 1, count + 1
            content = np.concatenate([ids, end]).astype(dtype).tobytes()
            entry = struct.pack("<QQ", total, split_number(document.split_key))
            for file, name, part in [(tokens, _TOKENS, content), (documents, _DOCUMENTS, entry)]:
                file.write(part)
                hashes[name].update(part)
    if not count:
        first = f"; the first: {damage[0]}" if damage else ""
        raise ValueError(
            f"the source has no text, {empty} empty and {len(damage)} damaged ones{first}"
        )
    index = {
        "recipe": recipe,
        "tokens": total,
        "documents": count,
        "empty": empty,
        "skipped": len(damage),
        "damage": [str(error) for error in damage[:_EXAMPLES]],
        "sha256": {name: digest.hexdigest() for name, digest in hashes.items()},
    }
    write_json(folder / _INDEX, index)


def read(
    folder: Path, tokenizer: Tokenizer, recipe: Mapping[str, Any]
) -> tuple[Documents, list[str]] | None:
    """Opens the files, after reading them once to compare their hashes.

    Args:
        folder: what `write` wrote.
        tokenizer: what encoded the documents.
        recipe: what the ids must depend on.

    Returns:
        The documents, their tokens memory-mapped, and examples of damage that was passed over; None
        if the folder has no index.

    Raises:
        ValueError: a file is damaged or missing, or the recipe is another.
    """
    try:
        content = (folder / _INDEX).read_bytes()
    except FileNotFoundError:
        return None
    index = parse_json_object(content, _INDEX)
    try:
        skipped, damage, hashes = index["skipped"], index["damage"], index["sha256"]
        expected = hashes[_TOKENS], hashes[_DOCUMENTS]
        found = index["recipe"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{_INDEX} is incomplete: {error}") from error
    if found != recipe:
        raise ValueError(f"{_INDEX} is that of another corpus")
    for name, digest in zip((_TOKENS, _DOCUMENTS), expected, strict=True):
        if _sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    dtype = _dtype(tokenizer)
    entries = np.fromfile(folder / _DOCUMENTS, "<u8").reshape(-1, 2)
    ends = entries[:, 0].astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    documents = Documents(
        tokens=np.asarray(np.memmap(folder / _TOKENS, dtype, "r")),
        starts=starts,
        lengths=ends - starts,
        split_numbers=entries[:, 1].copy(),
        pad_id=tokenizer.pad_id,
        digest=hashlib.sha256(" ".join([*expected, dtype]).encode()).hexdigest(),
        skipped=skipped,
    )
    return documents, damage


def _dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds all ids."""
    return "<u2" if tokenizer.size <= 2**16 else "<u4"


def _sha256(path: Path) -> str:
    """The hash of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
