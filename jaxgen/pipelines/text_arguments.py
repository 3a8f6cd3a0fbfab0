"""What the caller of a text pipeline may pass, checked and brought into one form."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxgen.pipelines.chat import ChatFormat, Message
from jaxgen.tokenizers import TextTokenizer

_UNIT = 64


def as_conversations(prompts: Any) -> list[str | Sequence[Message]]:
    """Returns prompts as a list; a string or a conversation alone counts as a list of one.

    Raises:
        TypeError: neither strings nor conversations.
        ValueError: no prompt.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts must be a string, a list of strings or a list of conversations, "
            f"got {type(prompts).__name__}"
        )
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, got none")
    if all(isinstance(prompt, Mapping) for prompt in prompts):
        return [prompts]
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Sequence):
            raise TypeError(
                f"a prompt must be a string or a list of messages, got {type(prompt).__name__} "
                f"at position {row}"
            )
    return list(prompts)


def as_texts(
    conversations: Sequence[str | Sequence[Message]], chat_format: ChatFormat | None
) -> list[str]:
    """Returns what the model reads: conversations in its format, or, without one, plain strings.

    Raises:
        TypeError: a message of another type.
        ValueError: messages without a format, or a message that is none.
    """
    texts = []
    for row, prompt in enumerate(conversations):
        if chat_format is None:
            if not isinstance(prompt, str):
                raise ValueError(f"messages need chat=True, got a list of them at position {row}")
            texts.append(prompt)
            continue
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            texts.append(chat_format.text(messages))
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompt {row}: {error}") from error
    return texts


def as_rows(
    texts: Sequence[str], tokenizer: TextTokenizer, *, new_tokens: int, max_tokens: int
) -> tuple[Int32[np.ndarray, "batch tokens"], Int32[np.ndarray, " batch"]]:
    """Encodes texts, each at the start of a row.

    Rows have a multiple of 64 tokens, so that prompts of similar lengths run the same program.

    Args:
        texts: what the model reads.
        tokenizer: makes ids of them.
        new_tokens: of an answer.
        max_tokens: of a text with its answer.

    Returns:
        Ids, 0 behind each text, and the lengths of the texts.

    Raises:
        TypeError: `new_tokens` is no int.
        ValueError: `new_tokens` is not positive, a text has no tokens, or is too long.
    """
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int):
        raise TypeError(f"new_tokens must be an int, got {new_tokens!r}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be positive, got {new_tokens}")
    rows = [tokenizer.encode(text) for text in texts]
    for row, ids in enumerate(rows):
        if not ids:
            raise ValueError(f"prompt {row} has no tokens")
        room = max_tokens - len(ids)
        if new_tokens > room:
            allowed = f"at most {room} new ones" if room > 0 else "no new ones"
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens, which allows {allowed} "
                f"(max_tokens={max_tokens}), got new_tokens={new_tokens}"
            )
    lengths = np.array([len(ids) for ids in rows], np.int32)
    padded = np.zeros((len(rows), -(-int(lengths.max()) // _UNIT) * _UNIT), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded, lengths
