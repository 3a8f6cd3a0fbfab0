"""Prompts to ids for the text models of CLIP: byte-level pairs, lower case, 77 tokens.

Radford et al. 2021, arXiv:2103.00020, section 2.4. A text is put into Unicode's composed form
(NFC), white space becomes single spaces and letters lower case; words, single digits and runs of
punctuation are then split into pieces of UTF-8 bytes, the last piece of each marked with `</w>`.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int32

from jaxgen.checkpoints.files import parse_json_object
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

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
# The two special tokens, English contractions, words, single digits, runs of anything else.
_SPLIT = "|".join(
    [
        r"<\|startoftext\|>",
        r"<\|endoftext\|>",
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        r"[\p{L}]+",
        r"[\p{N}]",
        r"[^\s\p{L}\p{N}]+",
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipTokenizer:
    """A tokenizer of CLIP.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        bos_id: the id that starts a text.
        eos_id: the id that ends it.
        pad_id: the id after the end: `eos_id` for CLIP-L, 0 for CLIP-G, as their folders say.
        max_tokens: length of every encoded prompt.

    Raises:
        ValueError: `max_tokens` is no int from 2 on.
    """

    backend: Any
    bos_id: int
    eos_id: int
    pad_id: int
    max_tokens: int = 77

    def __post_init__(self):
        check_max_tokens(self.max_tokens, 2)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, max_tokens: int = 77) -> Self:
        """Loads a tokenizer from a folder of transformers, such as `tokenizer` of SD3.

        Args:
            folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt`. Special tokens, of
                which padding differs between CLIP-L and CLIP-G, are read from
                `tokenizer_config.json` or `special_tokens_map.json` beside it.
            max_tokens: length of every encoded prompt.

        Raises:
            ImportError: the package `tokenizers` is not installed.
            FileNotFoundError: no vocabulary in the folder.
            ValueError: a damaged file, or special tokens that the vocabulary does not have.
        """
        folder = Path(folder)
        special = read_special_tokens(folder)
        eos = special.named.get("eos_token", _EOS)
        bos = special.named.get("bos_token", _BOS)
        if (folder / "tokenizer.json").exists():
            backend = load_backend(folder / "tokenizer.json")
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            backend = _byte_level_pairs(folder, special.named.get("unk_token", _EOS))
        else:
            raise FileNotFoundError(
                f"{folder} must hold tokenizer.json, or vocab.json and merges.txt"
            )
        add_special_tokens(backend, special, [bos, eos])
        padding = special.named.get("pad_token", eos)
        bos_id, eos_id, pad_id = (
            token_id(backend, token, special.source) for token in (bos, eos, padding)
        )
        return cls(backend, bos_id, eos_id, pad_id, max_tokens)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, for `load` and transformers."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        save_backend(Path(folder), self.backend, "CLIPTokenizer", ids, self.max_tokens)

    def encode(self, prompts: Sequence[str]) -> Int32[np.ndarray, "batch tokens"]:
        """Encodes prompts, padded or cut to `max_tokens`; a cut prompt still has its end.

        Args:
            prompts: any texts; the empty one gives start, end and padding.

        Returns:
            Token ids, int32, of shape (len(prompts), max_tokens).

        Raises:
            TypeError: `prompts` is one string, or holds something that is not a string.

        Warns:
            UserWarning: once for all prompts that were cut, with the words that were cut off.
        """
        tokens, _ = encode_rows(
            self.backend,
            prompts,
            max_tokens=self.max_tokens,
            start=[self.bos_id],
            end=[self.eos_id],
            padding=self.pad_id,
        )
        return tokens


def _byte_level_pairs(folder: Path, unknown: str) -> Any:
    """Builds the tokenizer from its vocabulary and its merges, one pair a line."""
    tokenizers = library()
    path = folder / "merges.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [tuple(line.split(" ")) for line in lines if line.strip()]
    vocabulary = parse_json_object((folder / "vocab.json").read_bytes(), str(folder / "vocab.json"))
    try:
        model = tokenizers.models.BPE(
            vocabulary, merges, unk_token=unknown, end_of_word_suffix=_SUFFIX
        )
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit: {error}") from error
    backend = tokenizers.Tokenizer(model)
    normal, before, regex = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.Regex
    backend.normalizer = normal.Sequence(
        [normal.NFC(), normal.Replace(regex(r"\s+"), " "), normal.Lowercase()]
    )
    backend.pre_tokenizer = before.Sequence(
        [
            before.Split(regex(_SPLIT), behavior="removed", invert=True),
            before.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend
