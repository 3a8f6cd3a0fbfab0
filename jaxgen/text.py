"""Captions to token ids: whole words from a fixed vocabulary.

The captions that the small models learn from use about two thousand distinct words, so a word is a
token. Sub-word pieces would lengthen every caption and would hide from the user which words the
model has never seen; here an unknown word is reported, with the words it may have been meant to be.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Int32

from jaxgen.checkpoints.files import write_atomically

PADDING_ID = 0
UNKNOWN_ID = 1
_FIRST_WORD_ID = 2
_FORMAT = "jaxgen word tokenizer 1"
_WORD = re.compile(r"[^\W_]+")
_APOSTROPHES = str.maketrans("", "", "'\u2018\u2019\u02bc")
_MOST_WORDS_IN_A_WARNING = 8


def split_words(text: str) -> list[str]:
    """Splits a text into plain lower-case words.

    Accents and apostrophes are dropped ("Curaçao" becomes "curacao", "o'clock" becomes "oclock");
    everything else that is neither a letter nor a digit separates words ("medium-dark" is two).

    Args:
        text: Any text.

    Returns:
        The words in order; an empty list for a text without letters and digits.
    """
    decomposed = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES))
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    return _WORD.findall(plain.casefold())


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """A word-level tokenizer: id 0 is padding, 1 is an unknown word, known words follow from 2.

    Attributes:
        vocabulary: The known words, sorted, each as `split_words` returns it.
        max_tokens: Length of every encoded caption; longer captions are cut.

    Raises:
        TypeError: If `vocabulary` is not a tuple of strings.
        ValueError: If `max_tokens` is not positive, or `vocabulary` is empty, not sorted, has a
            word twice, or has an entry that is not one plain word.
    """

    vocabulary: tuple[str, ...]
    max_tokens: int = 16

    def __post_init__(self) -> None:
        words = self.vocabulary
        if not isinstance(words, tuple) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"vocabulary must be a tuple of strings, got {_shorten(words)}")
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be a positive integer, got {self.max_tokens!r}")
        if not words:
            raise ValueError("vocabulary must hold at least one word, got an empty tuple")
        for word in words:
            if split_words(word) != [word]:
                raise ValueError(
                    "vocabulary entries must be single lower-case words of letters and digits, "
                    f"got {word!r}"
                )
        for previous, word in itertools.pairwise(words):
            if previous >= word:
                raise ValueError(
                    "vocabulary must be sorted and without repetition, "
                    f"got {previous!r} before {word!r}"
                )

    @classmethod
    def from_captions(cls, captions: Iterable[str], max_tokens: int = 16) -> Self:
        """Builds a tokenizer that knows every word of some captions.

        Args:
            captions: The captions, for instance those of a training set.
            max_tokens: Length of every encoded caption.

        Returns:
            The tokenizer.

        Raises:
            TypeError: If `captions` is one string.
            ValueError: If no caption holds a word, or `max_tokens` is not positive.
        """
        _refuse_one_string(captions)
        words = {word for caption in captions for word in split_words(caption)}
        return cls(tuple(sorted(words)), max_tokens)

    @property
    def size(self) -> int:
        """Number of ids: the rows that an embedding table needs."""
        return _FIRST_WORD_ID + len(self.vocabulary)

    @functools.cached_property
    def _id_of(self) -> dict[str, int]:
        """The id of each known word."""
        return {word: _FIRST_WORD_ID + index for index, word in enumerate(self.vocabulary)}

    def encode(self, captions: Sequence[str]) -> Int32[np.ndarray, "batch tokens"]:
        """Encodes captions, padded or cut to `max_tokens`.

        Args:
            captions: The captions. An empty one gives a row of padding: the unconditional caption.

        Returns:
            Token ids, int32, of shape (len(captions), max_tokens).

        Raises:
            TypeError: If `captions` is one string, or holds something that is not a string.

        Warns:
            UserWarning: Once for all unknown words, once for all captions that were cut.
        """
        _refuse_one_string(captions)
        tokens = np.full((len(captions), self.max_tokens), PADDING_ID, np.int32)
        unknown: dict[str, None] = {}
        cut: list[str] = []
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise TypeError(f"captions must be strings, got {caption!r} at position {row}")
            words = split_words(caption)
            if len(words) > self.max_tokens:
                cut.append(caption)
                words = words[: self.max_tokens]
            unknown.update(dict.fromkeys(word for word in words if word not in self._id_of))
            tokens[row, : len(words)] = [self._id_of.get(word, UNKNOWN_ID) for word in words]
        if unknown:
            warnings.warn(self._describe_unknown(list(unknown)), stacklevel=2)
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(captions)} captions have more than max_tokens="
                f"{self.max_tokens} words and were cut; the first is {cut[0]!r}",
                stacklevel=2,
            )
        return tokens

    def _describe_unknown(self, words: list[str]) -> str:
        """The warning about unknown words, with the nearest known ones."""
        parts = []
        for word in words[:_MOST_WORDS_IN_A_WARNING]:
            near = difflib.get_close_matches(word, self.vocabulary, n=3, cutoff=0.6)
            hint = f" (near: {', '.join(near)})" if near else " (nothing near)"
            parts.append(f"{word!r}{hint}")
        more = len(words) - len(parts)
        rest = f" and {more} more" if more else ""
        return f"words outside the vocabulary become the unknown token: {', '.join(parts)}{rest}"

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer as JSON.

        Args:
            path: The file to write; an existing one is replaced.
        """
        content = {
            "format": _FORMAT,
            "max_tokens": self.max_tokens,
            "vocabulary": list(self.vocabulary),
        }
        text = json.dumps(content, ensure_ascii=False, indent=0) + "\n"
        write_atomically(path, [text.encode()])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a tokenizer that `save` wrote.

        Args:
            path: The JSON file.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not JSON, has other keys or another format, or holds a
                vocabulary or length that `WordTokenizer` refuses.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors.
            raise ValueError(f"{path} is not a JSON tokenizer file: {error}") from error
        expected = {"format", "max_tokens", "vocabulary"}
        if not isinstance(content, dict) or set(content) != expected:
            given = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} must hold exactly the keys {sorted(expected)}, got {given}")
        if content["format"] != _FORMAT:
            raise ValueError(f"{path} must have the format {_FORMAT!r}, got {content['format']!r}")
        words = content["vocabulary"]
        try:
            return cls(tuple(words) if isinstance(words, list) else words, content["max_tokens"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def _refuse_one_string(captions: object) -> None:
    """A string is a sequence of strings too: encoding its letters is never what was meant."""
    if isinstance(captions, str):
        raise TypeError(f"captions must be a sequence of strings, got the one string {captions!r}")


def _shorten(value: object) -> str:
    """A representation that fits into an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
