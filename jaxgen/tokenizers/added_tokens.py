"""Tokens that a folder adds to a vocabulary, for example `<|im_end|>`, and which are special.

They are found in a text before it is split.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgen.checkpoints.files import parse_json_object
from jaxgen.tokenizers.errors import refusing, short
from jaxgen.tokenizers.folder import library

LARGEST_ID = 2**24
"""No id is as large: what is, is damaged."""

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class AddedTokens:
    """The tokens that a folder adds to a vocabulary.

    Attributes:
        tokens: text and flags of `tokenizers.AddedToken` by id.
        roles: the token of each role that the folder names, for example "eos".
        special: tokens that a text does not show, found as they are written.
        source: the path of the folder.
    """

    tokens: Mapping[int, tuple[str, Mapping[str, bool]]]
    roles: Mapping[str, str]
    special: frozenset[str]
    source: str


def read_added_tokens(folder: Path) -> AddedTokens:
    """Reads `tokenizer_config.json`, and what older folders have in two more files.

    `special_tokens_map.json` and `added_tokens.json` count if the first does not list its tokens
    (`added_tokens_decoder`), as in transformers. All may be missing.

    Raises:
        ValueError: a file that is not a JSON object, or tokens that are none.
    """
    path = folder / "tokenizer_config.json"
    settings = _read(path)
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        settings |= _read(folder / "special_tokens_map.json")
    roles = {
        role: _content(settings[f"{role}_token"], f"{path}: {role}_token")
        for role in _ROLES
        if settings.get(f"{role}_token") is not None
    }
    special = set(roles.values())
    for name in _LISTS:
        more = settings.get(name) or []
        more = list(more.values()) if isinstance(more, dict) else more
        if not isinstance(more, list):
            raise ValueError(f"{path}: {name} must be a list of tokens, got {short(more)}")
        special |= {_content(token, f"{path}: {name}") for token in more}
    if listed is None:
        path = folder / "added_tokens.json"
        # What is not special is found in the normalized text, as transformers reads these.
        pairs = [
            (
                number,
                {"content": text, "special": text in special, "normalized": text not in special},
            )
            for text, number in _read(path).items()
        ]
    elif isinstance(listed, dict):
        number_of = lambda key: int(key) if re.fullmatch("[0-9]{1,9}", key) else key
        pairs = [(number_of(key), token) for key, token in listed.items()]
    else:
        raise ValueError(f"{path}: added_tokens_decoder must be an object, got {short(listed)}")
    tokens = {}
    for number, token in pairs:
        text = _content(token, f"{path}: the added token {short(number)}")
        if type(number) is not int or not 0 <= number < LARGEST_ID or number in tokens:
            raise ValueError(
                f"{path}: {short(text)} must have an id of its own from 0 to {LARGEST_ID - 1}, "
                f"got {short(number)}"
            )
        given = token if isinstance(token, dict) else {}
        flags = {name: given[name] for name in _FLAGS if name in given}
        flags |= {"special": True} if text in special else {}
        if not all(isinstance(value, bool) for value in flags.values()):
            raise ValueError(f"{path}: flags of {short(text)} must be true or false, got {flags}")
        tokens[number] = text, flags
    return AddedTokens(tokens, roles, frozenset(special), str(folder))


def add_tokens(backend: Any, added: AddedTokens) -> None:
    """Makes a tokenizer find added tokens in a text.

    Args:
        backend: the `tokenizers.Tokenizer`.
        added: the tokens; those that have no id yet get the ones after the vocabulary.

    Raises:
        ValueError: a token gets another id than the folder says, or has none.
    """
    make = library().AddedToken
    tokens = [make(text, **flags) for _, (text, flags) in sorted(added.tokens.items())]
    with refusing(added.source, "the added tokens do not fit the vocabulary"):
        backend.add_tokens(tokens)
    for number, (text, _) in added.tokens.items():
        found = backend.token_to_id(text)
        if found != number or backend.id_to_token(number) != text:
            raise ValueError(
                f"{added.source}: {short(text)} must have the id {found} that follows from the "
                f"vocabulary, got {number}"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = sorted(added.special - known)
    for text in missing:
        if backend.token_to_id(text) is None:
            raise ValueError(
                f"{added.source}: the special token {short(text)} is not in the vocabulary"
            )
    backend.add_tokens([make(text, special=True) for text in missing])


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    return parse_json_object(path.read_bytes(), str(path)) if path.exists() else {}


def _content(token: Any, source: str) -> str:
    """The text of a token that is a string or an object."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ValueError(f"{source} must be a token, got {short(token)}")
    return content
