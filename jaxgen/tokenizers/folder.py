"""What the tokenizers share: the library, the special tokens of a folder, rows of fixed length."""

import dataclasses
import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoints.files import parse_json_object, write_atomically

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = {"lstrip", "rstrip", "single_word", "normalized", "special"}
_MOST_PROMPTS_IN_A_WARNING = 4
_MOST_LETTERS_IN_A_WARNING = 200


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Which tokens a folder calls special.

    Attributes:
        named: the token of each role that the folder names, for example `pad_token`.
        added: what to find in a text before it is split, with the id and the flags of
            `tokenizers.AddedToken`; empty if the folder does not say.
        extra_ids: number of sentinels of T5, None if the folder does not say.
        source: the path of the file.
    """

    named: Mapping[str, str]
    added: Mapping[int, Mapping[str, Any]]
    extra_ids: int | None
    source: str


def library() -> Any:
    """Returns the module `tokenizers`.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(
            "jaxgen.tokenizers needs the package tokenizers: pip install 'jaxgen[hf]'"
        ) from error


def save_backend(
    folder: Path, backend: Any, kind: str, ids: Mapping[str, int], length: int
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers does.

    Args:
        folder: made if it does not exist.
        backend: the `tokenizers.Tokenizer`.
        kind: class of transformers.
        ids: ids of the special tokens, by role.
        length: tokens of a prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"tokenizer_class": kind, "model_max_length": length}
    settings |= {role: backend.id_to_token(number) for role, number in ids.items()}
    text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(folder / "tokenizer.json", [backend.to_str(pretty=True).encode()])
    write_atomically(folder / "tokenizer_config.json", [text.encode()])


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Reads `tokenizer_config.json` and, of older folders, `special_tokens_map.json`.

    The second counts if the first does not list its tokens (`added_tokens_decoder`), as in
    transformers. Both may be missing; other settings in them are of no use here.

    Raises:
        ValueError: a file that is not a JSON object, or a token that is neither a string nor an
            object with its `content`.
    """
    path = folder / "tokenizer_config.json"
    settings = _read(path)
    if "added_tokens_decoder" not in settings:
        settings |= _read(folder / "special_tokens_map.json")
    named = {}
    for name in _NAMES:
        if settings.get(name) is not None:
            named[name] = _content(settings[name], f"{path}: {name}")
    added = settings.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or not all(key.isdecimal() for key in added):
        raise ValueError(f"{path}: added_tokens_decoder must map ids to tokens, got {added!r}")
    for key, token in added.items():
        _content(token, f"{path}: added_tokens_decoder[{key}]")
    extra_ids = settings.get("extra_ids")
    if extra_ids is not None and (type(extra_ids) is not int or extra_ids < 0):
        raise ValueError(f"{path}: extra_ids must be an int from 0 on, got {extra_ids!r}")
    by_id = {int(key): token for key, token in added.items()}
    return SpecialTokens(named, by_id, extra_ids, str(path))


def load_backend(path: Path) -> Any:
    """Loads a `tokenizer.json`; its padding and truncation are switched off.

    Raises:
        ValueError: no tokenizer.
    """
    tokenizer = library().Tokenizer
    try:
        backend = tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def add_special_tokens(backend: Any, special: SpecialTokens, names: Sequence[str]) -> None:
    """Makes a tokenizer find special tokens in a text; all must have an id already.

    Args:
        backend: the `tokenizers.Tokenizer`.
        special: the tokens of the folder.
        names: more of them, found as they are written.

    Raises:
        ValueError: a token without id, or with another one than the folder says.
    """
    make = library().AddedToken
    tokens = []
    for number, token in sorted(special.added.items()):
        found = token_id(backend, token["content"], special.source)
        if found != number:
            raise ValueError(
                f"{special.source}: {token['content']!r} must have the id {found} that the "
                f"vocabulary gives it, got {number}"
            )
        flags = {name: value for name, value in token.items() if name in _FLAGS}
        tokens.append(make(token["content"], **flags))
    known = {token["content"] for token in special.added.values()}
    known |= {token.content for token in backend.get_added_tokens_decoder().values()}
    for name in dict.fromkeys([*special.named.values(), *names]):
        token_id(backend, name, special.source)
        if name not in known:
            tokens.append(make(name, special=True))
    backend.add_special_tokens(tokens)


def token_id(backend: Any, token: str, source: str) -> int:
    """Returns the id of a token.

    Raises:
        ValueError: it has none.
    """
    number = backend.token_to_id(token)
    if number is None:
        raise ValueError(f"{source}: the special token {token!r} is not in the vocabulary")
    return number


def encode_rows(
    backend: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    start: Sequence[int],
    end: Sequence[int],
    padding: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes prompts to rows of `max_tokens`: start, text, end, padding.

    Returns:
        The ids, int32, and which of them are no padding, bool; both (len(prompts), max_tokens).

    Raises:
        TypeError: `prompts` is one string, or holds something that is not a string.

    Warns:
        UserWarning: once for all prompts that were cut, with the words that were cut off.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence of strings, got the one string {prompts!r}")
    ids = np.full((len(prompts), max_tokens), padding, np.int32)
    mask = np.zeros((len(prompts), max_tokens), bool)
    room, cut = max_tokens - len(start) - len(end), {}
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be strings, got {prompt!r} at position {row}")
        encoded = backend.encode(prompt, add_special_tokens=False)
        if len(encoded.ids) > room:
            cut[row] = prompt[encoded.offsets[room][0] :].strip()
        filled = [*start, *encoded.ids[:room], *end]
        ids[row, : len(filled)] = filled
        mask[row, : len(filled)] = True
    if cut:
        warnings.warn(_describe_cut(cut, len(prompts), max_tokens), stacklevel=3)
    return ids, mask


def check_max_tokens(max_tokens: int, fewest: int) -> None:
    """Raises ValueError unless a row has room for the special tokens."""
    if type(max_tokens) is not int or max_tokens < fewest:
        raise ValueError(f"max_tokens must be an int from {fewest} on, got {max_tokens!r}")


def _describe_cut(cut: Mapping[int, str], total: int, max_tokens: int) -> str:
    """The warning about prompts that are too long."""
    parts = []
    for row, words in list(cut.items())[:_MOST_PROMPTS_IN_A_WARNING]:
        if len(words) > _MOST_LETTERS_IN_A_WARNING:
            words = words[:_MOST_LETTERS_IN_A_WARNING] + "..."
        parts.append(f"{words!r} (prompt {row})")
    more = len(cut) - len(parts)
    rest = f" and the end of {more} more" if more else ""
    return (
        f"{len(cut)} of {total} prompts have more than max_tokens={max_tokens} tokens; "
        f"cut off: {', '.join(parts)}{rest}"
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    return parse_json_object(path.read_bytes(), str(path)) if path.exists() else {}


def _content(token: Any, source: str) -> str:
    """The text of a token that is a string or an object."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ValueError(f"{source} must be a token, got {json.dumps(token)}")
    return content
