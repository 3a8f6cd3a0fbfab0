"""Prompts to ids for T5 and umT5: pieces of a SentencePiece unigram model.

Raffel et al. 2020, arXiv:1910.10683, section 2.3.2; Kudo 2018, arXiv:1804.10959. Spaces belong to
the pieces, as a mark at the beginning of a word; each text ends with `</s>`.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int32

from jaxgen.tokenizers.folder import (
    add_special_tokens,
    check_max_tokens,
    encode_rows,
    library,
    load_backend,
    read_special_tokens,
    save_backend,
    token_id,
)
from jaxgen.tokenizers.sentencepiece_file import read_unigram

_EOS, _PAD, _SPACE = "</s>", "<pad>", "\u2581"
_EXTRA_IDS = 100  # of T5, unless the folder says otherwise


@dataclasses.dataclass(frozen=True, eq=False)
class T5Tokenizer:
    """A tokenizer of T5 or umT5.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        eos_id: the id that ends a text, 1 in the released models.
        pad_id: the id after the end, 0 in the released models.
        max_tokens: length of every encoded prompt: 256 or 512 for SD3, 512 for Wan.

    Raises:
        ValueError: `max_tokens` is no int from 1 on.
    """

    backend: Any
    eos_id: int
    pad_id: int
    max_tokens: int = 256

    def __post_init__(self):
        check_max_tokens(self.max_tokens, 1)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, max_tokens: int = 256) -> Self:
        """Loads a tokenizer from a folder of transformers, such as `tokenizer_3` of SD3.

        Args:
            folder: holds `tokenizer.json`, or the SentencePiece model `spiece.model`, to which the
                sentinels `<extra_id_N>` are appended (100 unless `tokenizer_config.json` says
                otherwise). The package sentencepiece is not needed.
            max_tokens: length of every encoded prompt.

        Raises:
            ImportError: the package `tokenizers` is not installed.
            FileNotFoundError: no vocabulary in the folder.
            ValueError: a damaged file, another kind of model than unigram, or special tokens that
                the vocabulary does not have.
        """
        folder = Path(folder)
        special = read_special_tokens(folder)
        eos, pad = special.named.get("eos_token", _EOS), special.named.get("pad_token", _PAD)
        sentinels: list[str] = []
        if (folder / "tokenizer.json").exists():
            backend = load_backend(folder / "tokenizer.json")
        elif (folder / "spiece.model").exists():
            count = _EXTRA_IDS if special.extra_ids is None else special.extra_ids
            sentinels = [f"<extra_id_{number}>" for number in reversed(range(count))]
            backend = _unigram(folder / "spiece.model", sentinels)
        else:
            raise FileNotFoundError(f"{folder} must hold tokenizer.json or spiece.model")
        add_special_tokens(backend, special, [eos, pad, *sentinels])
        eos_id, pad_id = (token_id(backend, token, special.source) for token in (eos, pad))
        return cls(backend, eos_id, pad_id, max_tokens)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, for `load` and transformers."""
        ids = {"eos_token": self.eos_id, "pad_token": self.pad_id}
        save_backend(Path(folder), self.backend, "T5Tokenizer", ids, self.max_tokens)

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "batch tokens"], Bool[np.ndarray, "batch tokens"]]:
        """Encodes prompts, padded or cut to `max_tokens`; a cut prompt still has its end.

        Args:
            prompts: any texts; the empty one gives the end and padding.

        Returns:
            Token ids, int32, and a mask, True up to and with the end of each text; both of shape
            (len(prompts), max_tokens).

        Raises:
            TypeError: `prompts` is one string, or holds something that is not a string.

        Warns:
            UserWarning: once for all prompts that were cut, with the words that were cut off.
        """
        return encode_rows(
            self.backend,
            prompts,
            max_tokens=self.max_tokens,
            start=[],
            end=[self.eos_id],
            padding=self.pad_id,
        )


def _unigram(path: Path, sentinels: Sequence[str]) -> Any:
    """Builds the tokenizer from a SentencePiece model."""
    tokenizers, model = library(), read_unigram(path)
    known = {piece for piece, _ in model.pieces}
    pieces = [*model.pieces, *((name, 0.0) for name in sentinels if name not in known)]
    try:
        backend = tokenizers.Tokenizer(
            tokenizers.models.Unigram(pieces, model.unknown_id, model.byte_fallback)
        )
        if model.charsmap:
            backend.normalizer = tokenizers.normalizers.Precompiled(model.charsmap)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path}: not a unigram model: {error}") from error
    before = tokenizers.pre_tokenizers
    backend.pre_tokenizer = before.Sequence(
        [
            before.WhitespaceSplit(),
            before.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True),
        ]
    )
    return backend
