"""Texts to token ids for pretraining: bytes, or the tokenizer of a released model."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from jaxgen.tokenizers import TextTokenizer

_BYTES = 256


class Tokenizer(Protocol):
    """What the corpus needs of a tokenizer. It can be pickled, to encode in other processes."""

    @property
    def size(self) -> int:
        """Rows that an embedding needs."""
        ...

    @property
    def end_id(self) -> int:
        """The token after each document."""
        ...

    @property
    def pad_id(self) -> int:
        """The token where a row has no text; the model never learns it."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Encodes a text, without an end."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; ends, padding and ids that no token has are left out."""
        ...

    def fingerprint(self) -> str:
        """Returns what changes when ids do."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8, and two ids more.

    Attributes:
        multiple_of: `size` is rounded up to a multiple of it; 128 suits matrix units.

    Raises:
        ValueError: `multiple_of` is not positive.
    """

    multiple_of: int = 1

    def __post_init__(self) -> None:
        _check(self.multiple_of)

    @property
    def size(self) -> int:
        """258, rounded up."""
        return _round_up(_BYTES + 2, self.multiple_of)

    @property
    def end_id(self) -> int:
        """256."""
        return _BYTES

    @property
    def pad_id(self) -> int:
        """257."""
        return _BYTES + 1

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Encodes a text.

        Raises:
            UnicodeEncodeError: half of a surrogate pair, which UTF-8 does not have.
        """
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; bytes that are no UTF-8 become U+FFFD, other ids are left out.

        Raises:
            ValueError: a negative id.
        """
        numbers = [int(number) for number in ids]
        if min(numbers, default=0) < 0:
            raise ValueError(f"ids must not be negative, got {min(numbers)}")
        return bytes(number for number in numbers if number < _BYTES).decode(errors="replace")

    def fingerprint(self) -> str:
        """Returns "bytes": the ids do not depend on the size."""
        return "bytes"


class ReleasedTokenizer:
    """The tokenizer of a released model, such as GPT-2 or Qwen3.

    A text that spells a special token, as source code about tokenizers does, gets the ids of its
    letters: only real ends end a document.

    Attributes:
        end_id: the id of the token after each document.
        pad_id: the id of padding; that of the end if the folder names none.
    """

    def __init__(
        self, folder: str | os.PathLike, *, end_token: str | None = None, multiple_of: int = 1
    ):
        """Loads a tokenizer.

        Args:
            folder: what `jaxgen.tokenizers.TextTokenizer.from_folder` reads, or the
                `tokenizer.json` in it.
            end_token: the token that ends a document, "<|endoftext|>" for instance; None is the
                folder's `eos_token`.
            multiple_of: `size` is rounded up to a multiple of it.

        Raises:
            ImportError: the package `tokenizers` is not installed.
            FileNotFoundError: no vocabulary in the folder.
            ValueError: a damaged file, one of another name than `tokenizer.json`, no token that
                ends a document, or `multiple_of` is not positive.
        """
        _check(multiple_of)
        path = Path(folder)
        if path.is_file() and path.name != "tokenizer.json":
            raise ValueError(
                f"a tokenizer is a folder, or the tokenizer.json in it, got the file {path}"
            )
        self._arguments = path, end_token, multiple_of
        self._text = TextTokenizer.from_folder(path.parent if path.is_file() else path)
        self._text.backend.encode_special_tokens = True
        end = self._text.eos_id if end_token is None else self._text.token_id(end_token)
        if end is None:
            raise ValueError(f"{folder} names no token that ends a text; give it as end_token")
        self.end_id = end
        self.pad_id = end if self._text.pad_id is None else self._text.pad_id

    def __reduce__(self):
        # A pickled backend forgets how to treat special tokens.
        return _load, self._arguments

    @property
    def size(self) -> int:
        """One more than the largest id, rounded up."""
        return _round_up(self._text.size, self._arguments[2])

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Encodes a text.

        Raises:
            ValueError: half of a surrogate pair.
        """
        return np.array(self._text.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special tokens and ids that no token has are left out.

        Raises:
            ValueError: ids out of the range of uint32.
        """
        return self._text.decode(ids)

    def fingerprint(self) -> str:
        """Returns a hash of everything that decides ids."""
        parts = self._text.backend.to_str(), str(self.end_id)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _load(folder: Path, end_token: str | None, multiple_of: int) -> ReleasedTokenizer:
    """Loads a pickled tokenizer."""
    return ReleasedTokenizer(folder, end_token=end_token, multiple_of=multiple_of)


def _check(multiple_of: int) -> None:
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be positive, got {multiple_of}")


def _round_up(size: int, multiple_of: int) -> int:
    return -(-size // multiple_of) * multiple_of
