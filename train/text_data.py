"""Prompts and answers from a file as rows of tokens, to fine-tune a released model on.

The file has a JSON object on each line, with the strings `prompt` and `answer`. A row is the prompt
(in the model's chat format, or as it is), the answer with the token that ends it, and padding up to
a whole number of blocks, which is learned too: so SDAR learns to end. Beyond that a row is filled
up with padding that is neither learned nor seen.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxgen.checkpoints import parse_json_object
from jaxgen.pipelines.chat import ChatFormat, check_chat_format
from jaxgen.tokenizers import TextTokenizer
from train.rows import Rows


def read_rows(
    path: Path,
    tokenizer: TextTokenizer,
    *,
    max_tokens: int,
    block_length: int,
    chat: ChatFormat | None,
    mask_id: int | None = None,
) -> tuple[Rows, int]:
    """Reads a file of prompts and answers.

    Args:
        path: the file, JSON lines.
        tokenizer: that of the model.
        max_tokens: longer texts, with their padding, are dropped.
        block_length: tokens of a block.
        chat: how a prompt becomes a conversation; None leaves it as it is.
        mask_id: the mask token of the model; if None, that which the tokenizer names.

    Returns:
        The rows, all as long as the longest, and how many texts were dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such object, spells out the mask or has an end in its answer,
            named by its number; no text that is short enough; or a tokenizer without the tokens
            that are needed, or that fills or ends texts with the mask.
    """
    pad, end = _special_tokens(tokenizer, chat)
    ends = {end, tokenizer.eos_id}
    mask_id = tokenizer.mask_id if mask_id is None else mask_id
    if mask_id in (pad, end):
        raise ValueError(f"padding and ends must not be the mask token, {mask_id}")
    samples: list[tuple[list[int], list[int]]] = []
    dropped = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{path}, line {number}"
            prompt, answer = _encode(*_parse(line, source), source, tokenizer, chat)
            if mask_id in [*prompt, *answer]:
                raise ValueError(f"{source} must not spell out the mask token, {mask_id}")
            if not ends.isdisjoint(answer):
                raise ValueError(f"{source} must not spell out a token that ends its answer")
            sample = prompt, [*answer, end]
            if _padded(sample, block_length) > max_tokens:
                dropped += 1
            else:
                samples.append(sample)
    if not samples:
        raise ValueError(
            f"{path} has no text of at most max_tokens={max_tokens} tokens, {dropped} longer ones"
        )
    return _rows(samples, block_length, pad), dropped


def _special_tokens(tokenizer: TextTokenizer, chat: ChatFormat | None) -> tuple[int, int]:
    """The ids of padding and of what ends an answer."""
    if chat is not None:
        check_chat_format(chat, tokenizer)
    end = tokenizer.eos_id if chat is None else tokenizer.token_id(chat.end)
    pad = end if tokenizer.pad_id is None else tokenizer.pad_id
    if end is None or pad is None:
        raise ValueError("the tokenizer names no token that ends a text")
    return pad, end


def _parse(line: bytes, source: str) -> tuple[str, str]:
    """The prompt and the answer of a line."""
    values = parse_json_object(line, source)
    prompt, answer = values.get("prompt"), values.get("answer")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ValueError(f"{source} must be an object with the strings prompt and answer")
    return prompt, answer


def _encode(
    prompt: str, answer: str, source: str, tokenizer: TextTokenizer, chat: ChatFormat | None
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, in its conversation, and of its answer."""
    try:
        if chat is not None:
            prompt = chat.text([{"role": "user", "content": prompt}])
        return tokenizer.encode(prompt), tokenizer.encode(answer)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _padded(sample: tuple[list[int], list[int]], block_length: int) -> int:
    """The tokens of a text with the padding that fills its last block."""
    return -(-sum(map(len, sample)) // block_length) * block_length


def _rows(samples: Sequence[tuple[list[int], list[int]]], block_length: int, pad: int) -> Rows:
    """Puts texts into arrays."""
    lengths = np.array([_padded(sample, block_length) for sample in samples], np.int32)
    tokens = np.full((len(samples), lengths.max()), pad, np.int32)
    maskable = np.zeros(tokens.shape, bool)
    for row, (prompt, answer) in enumerate(samples):
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        maskable[row, len(prompt) : lengths[row]] = True
    return Rows(tokens, maskable, lengths)
