"""Documents as token ids, and which of them are held out."""

import dataclasses
import hashlib
from typing import Literal, Self

import numpy as np
from jaxtyping import Int64, UInt16, UInt32, UInt64

type Part = Literal["all", "train", "validation"]

PARTS: tuple[Part, ...] = ("all", "train", "validation")


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Token ids of documents, each with its end.

    Attributes:
        tokens: the ids of all documents, one after the other; not changed, usually in a file.
        starts: where each document begins in `tokens`.
        lengths: its number of tokens.
        split_numbers: evenly spread numbers that decide which documents are held out.
        pad_id: the id where a row has no text.
        digest: identifies all of this.
        skipped: files, lines and rows that were damaged and passed over when these were read.
    """

    tokens: UInt16[np.ndarray, " tokens"] | UInt32[np.ndarray, " tokens"] = dataclasses.field(
        repr=False
    )
    starts: Int64[np.ndarray, " documents"] = dataclasses.field(repr=False)
    lengths: Int64[np.ndarray, " documents"] = dataclasses.field(repr=False)
    split_numbers: UInt64[np.ndarray, " documents"] = dataclasses.field(repr=False)
    pad_id: int
    digest: str
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, document: int) -> np.ndarray:
        """The ids of a document with its end, as they are stored."""
        start = self.starts[document]
        return self.tokens[start : start + self.lengths[document]]

    @property
    def token_count(self) -> int:
        """Tokens of all documents, ends included."""
        return int(self.lengths.sum())

    def part(self, part: Part, held_out: float) -> Self:
        """Selects the documents to learn from, or those held out.

        A document is held out or not whatever the others are. A larger share holds out the same
        documents and more.

        Args:
            part: "train", "validation", or "all" for both.
            held_out: the share to hold out, at least 0 and less than 1.

        Raises:
            ValueError: an argument out of range, or no document in the part.
        """
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be at least 0 and less than 1, got {held_out}")
        if part == "all":
            return self
        is_held_out = self.split_numbers < np.uint64(held_out * 2.0**64)
        chosen = np.flatnonzero(is_held_out == (part == "validation"))
        if not len(chosen):
            raise ValueError(
                f"none of {len(self)} documents is for {part} with held_out={held_out}"
            )
        recipe = f"{self.digest} {part} {held_out!r}"
        return dataclasses.replace(
            self,
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            split_numbers=self.split_numbers[chosen],
            digest=hashlib.sha256(recipe.encode()).hexdigest(),
        )


def split_number(key: str) -> int:
    """Returns the number from 0 to 2**64 - 1 that decides whether a document is held out."""
    # Names of files may hold bytes that are no text.
    content = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
