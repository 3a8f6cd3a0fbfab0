"""What all problems share: their characters, the records of problems and verdicts, and the splits.

A token is a character, so a model sees every digit of a number, and no step of a solution hides in
a token. One vocabulary serves all tasks: a model may learn several at once.

**Splits.** A key of each problem (its task says which) decides where it belongs, by BLAKE2 of the
key: no random generator does, so the splits are disjoint for all seeds, levels and numbers.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

PAD = EOS = 0
"""One id: the end of a text, and everything after it."""
MASK = 1
CHARACTERS = "0123456789+-*()=;. \n"
"""The characters; their ids follow `MASK` in this order."""
SPLITS = ("train", "validation", "test")

_FIRST_CHARACTER_ID = MASK + 1
_ID_OF = {character: _FIRST_CHARACTER_ID + index for index, character in enumerate(CHARACTERS)}
_CHARACTER_OF = "\0_" + CHARACTERS  # the first is never seen: decoding stops before EOS
_HELD_OUT_SHARE = 0.05  # of validation and of test, each
_SALT = "split 1"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem and a solution of it, both without special tokens.

    Attributes:
        task: "arithmetic" or "sudoku".
        level: How hard it is, from 1.
        prompt: What the model is given.
        solution: What it may answer; the task's `verify` accepts it.
    """

    task: str
    level: int
    prompt: str
    solution: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an exact check says about an answer.

    Attributes:
        correct: Whether the final answer is right.
        steps_correct: Whether the steps, if the task has any, derive the right answer.
        reason: The first thing that is wrong; empty if nothing is.
    """

    correct: bool
    steps_correct: bool
    reason: str = ""


class Vocabulary:
    """Texts to token ids and back, one token a character."""

    size = _FIRST_CHARACTER_ID + len(CHARACTERS)
    """Number of ids: the rows that an embedding table needs."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Encodes a text, without `EOS`.

        Args:
            text: Characters of `CHARACTERS`.

        Returns:
            Token ids, int32, of shape (len(text),).

        Raises:
            ValueError: If a character has no id.
        """
        try:
            return np.array([_ID_OF[character] for character in text], np.int32)
        except KeyError as error:
            raise ValueError(
                f"text must consist of the characters {CHARACTERS!r}, got {error.args[0]!r}"
            ) from error

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> str:
        """Decodes token ids up to the first `EOS`, which need not be there.

        Args:
            ids: Integers of shape (tokens,). What follows `EOS` may be anything.

        Returns:
            The text, with "_" for every `MASK`.

        Raises:
            ValueError: If `ids` has another shape or dtype, or an id is out of range.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(
                f"ids must be integers of shape (tokens,), got {array.dtype} of shape {array.shape}"
            )
        ends = np.flatnonzero(array == EOS)
        kept = array[: ends[0]] if ends.size else array
        wrong = kept[(kept < 0) | (kept >= self.size)]
        if wrong.size:
            raise ValueError(f"ids must be from 0 to {self.size - 1}, got {wrong[0]}")
        return "".join(_CHARACTER_OF[index] for index in kept.tolist())


def split_of(key: str) -> str:
    """Which split a problem belongs to.

    Args:
        key: What must not be in two splits.

    Returns:
        One of `SPLITS`: "validation" for 5 % of all keys, "test" for 5 %.
    """
    digest = hashlib.blake2b(f"{_SALT} {key}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < _HELD_OUT_SHARE:
        return "test"
    return "validation" if share < 2 * _HELD_OUT_SHARE else "train"


def check_request(level: int, levels: Collection[int], number: int, seed: int, split: str) -> None:
    """Refuses to make a problem that does not exist.

    Args:
        level: Must be one of `levels`.
        levels: The levels of the task.
        number: Must not be negative.
        seed: Must not be negative.
        split: Must be one of `SPLITS`.

    Raises:
        ValueError: If one of them is wrong.
    """
    if level not in levels:
        raise ValueError(f"level must be one of {', '.join(map(str, levels))}, got {level}")
    for name, value in (("number", number), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
