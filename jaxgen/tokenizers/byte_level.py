"""Byte-level tokenizers from their files: a `tokenizer.json`, or `vocab.json` and `merges.txt`.

The two are read as Qwen2's: a text is put into Unicode's composed form (NFC) and split into words,
single digits, punctuation and white space; the UTF-8 bytes of each are merged in pairs
(arXiv:2309.16609, section 2.2).
"""

from pathlib import Path
from typing import Any

from jaxgen.checkpoints.files import parse_json_object
from jaxgen.tokenizers.added_tokens import LARGEST_ID
from jaxgen.tokenizers.errors import refusing, short
from jaxgen.tokenizers.folder import library

_CONTRACTIONS = "|".join(f"'{end}" for end in ("s", "t", "re", "ve", "m", "ll", "d"))
_SPLIT = "|".join(
    [
        f"(?i:{_CONTRACTIONS})",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with what is before it
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the ends of lines after it
        r"\s*[\r\n]+",  # ends of lines
        r"\s+(?!\S)",  # white space up to the last one before something else
        r"\s+",
    ]
)


def load_json(path: Path) -> Any:
    """Loads a `tokenizer.json`; its padding and truncation are switched off.

    Raises:
        ValueError: no tokenizer.
    """
    tokenizers = library()
    with refusing(str(path), "not a tokenizer"):
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
        return backend


def load_pairs(folder: Path) -> Any:
    """Builds a tokenizer from `vocab.json` and `merges.txt`, one pair a line, as Qwen2 splits.

    Raises:
        ValueError: a damaged file, or two that do not fit.
    """
    tokenizers = library()
    path = folder / "vocab.json"
    vocabulary = parse_json_object(path.read_bytes(), str(path))
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < LARGEST_ID:
            raise ValueError(
                f"{path}: ids must be ints from 0 to {LARGEST_ID - 1}, got {short(number)} for "
                f"{short(token)}"
            )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{path}: two tokens have the same id")
    merges = _read_merges(folder / "merges.txt")
    with refusing(str(folder), "vocab.json and merges.txt do not fit"):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    before = tokenizers.pre_tokenizers
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = before.Sequence(
        [
            before.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            before.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a `merges.txt`, without the line with its version."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        first, gap, second = line.rstrip("\r").partition(" ")
        if not (first and gap and second) or " " in second:
            raise ValueError(f"{path}: line {number} must be two tokens, got {short(line)}")
        merges.append((first, second))
    return merges
