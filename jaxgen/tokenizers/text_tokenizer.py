"""Texts to ids and back, for released language models."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from jaxgen.tokenizers.added_tokens import add_tokens, read_added_tokens
from jaxgen.tokenizers.byte_level import load_json, load_pairs
from jaxgen.tokenizers.errors import refusing


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer of a language model, such as SDAR, Qwen3 or LLaDA.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        eos_id: the id that ends a text, None if the folder names none.
        pad_id: the id of padding, None if the folder names none.
        mask_id: the id of a token that is not known yet, None if the folder names none.
    """

    backend: Any = dataclasses.field(repr=False)
    eos_id: int | None = None
    pad_id: int | None = None
    mask_id: int | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Self:
        """Loads a tokenizer from a folder of transformers.

        Args:
            folder: holds `tokenizer.json`; or `vocab.json` and `merges.txt`, which are read as
                those of Qwen2. Added and special tokens are read from `tokenizer_config.json`, in
                older folders from `added_tokens.json` and `special_tokens_map.json`.

        Raises:
            ImportError: the package `tokenizers` is not installed.
            FileNotFoundError: no vocabulary in the folder.
            ValueError: a damaged file, or added tokens that do not fit the vocabulary.
        """
        folder = Path(folder)
        whole, parts = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"]
        if not whole.is_file() and not all(part.is_file() for part in parts):
            raise FileNotFoundError(
                f"{folder} must hold tokenizer.json, or vocab.json and merges.txt"
            )
        added = read_added_tokens(folder)
        backend = load_json(whole) if whole.is_file() else load_pairs(folder)
        add_tokens(backend, added)
        eos, pad, mask = (
            None if role not in added.roles else backend.token_to_id(added.roles[role])
            for role in ("eos", "pad", "mask")
        )
        return cls(backend, eos, pad, mask)

    @functools.cached_property
    def size(self) -> int:
        """Rows that an embedding needs: one more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def __contains__(self, token: str) -> bool:
        return self.backend.token_to_id(token) is not None

    def token_id(self, token: str) -> int:
        """Returns the id of one token, for example `<|im_end|>`.

        Raises:
            ValueError: the vocabulary does not have it.
        """
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return number

    def finds(self, token: str) -> bool:
        """Returns whether `encode` makes one id of a token; some of the vocabulary it splits."""
        return token in self and self.encode(token) == [self.token_id(token)]

    def encode(self, text: str) -> list[int]:
        """Encodes a text. Nothing is added; special tokens that it spells out become their ids.

        The same as transformers with `add_special_tokens=False`.

        Args:
            text: any text. The empty one gives no ids.

        Raises:
            TypeError: no string.
            ValueError: half of a surrogate pair, which no encoding of Unicode has.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must be Unicode, got half of a surrogate pair at {error.start}"
            ) from error
        with refusing("the tokenizer", "cannot encode the text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int] | jax.Array, *, skip_special: bool = True) -> str:
        """Decodes ids. Bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: any ids of one text, also as an array. Those that no token has, of which released
                models have a few, are passed over.
            skip_special: leave special tokens out.

        Raises:
            TypeError: ids that are no ints.
            ValueError: ids out of the range of uint32.
        """
        numbers = list(np.asarray(ids) if isinstance(ids, jax.Array) else ids)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | np.integer):
                raise TypeError(f"ids must be ints, got {number!r}")
            if not 0 <= number < 2**32:
                raise ValueError(f"ids must be from 0 to 2**32 - 1, got {number}")
        with refusing("the tokenizer", "cannot decode the ids"):
            return self.backend.decode(list(map(int, numbers)), skip_special_tokens=skip_special)
