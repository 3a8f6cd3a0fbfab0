"""What a text pipeline returns: texts and what they took, which notebooks show as they are."""

import dataclasses
import html
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from jaxgen.tokenizers import TextTokenizer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Texts:
    """Answers, finished or on the way; a sequence of their texts.

    Attributes:
        texts: one for each prompt, without special tokens; on the way with a placeholder for every
            token that is not known yet.
        tokens: their ids, padding after the end of each, the mask where one is not known yet.
        lengths: tokens of each, the one that ended it among them; on the way that of all tokens
            if none ends it yet.
        steps: of each row: predictions after which tokens were settled.
        passes: passes of the model for all rows together, those that only store keys among them.
        seconds: since the call, with the time to compile.
    """

    texts: tuple[str, ...]
    tokens: Int32[np.ndarray, "batch new_tokens"]
    lengths: Int32[np.ndarray, " batch"]
    steps: Int32[np.ndarray, " batch"]
    passes: int
    seconds: float

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> str:
        return self.texts[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __repr__(self) -> str:
        lines = [f"[{self._facts(row)}]\n{text}" for row, text in enumerate(self.texts)]
        return "\n\n".join([*lines, f"({self._summary()})"])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        style = "white-space: pre-wrap; word-break: break-word; margin: 0 0 1em 0"
        parts = [
            f"<small>{self._facts(row)}</small><pre style='{style}'>{html.escape(text)}</pre>"
            for row, text in enumerate(self.texts)
        ]
        return f"<div>{''.join(parts)}<small>{self._summary()}</small></div>"

    def _facts(self, row: int) -> str:
        return f"{row}: {self.lengths[row]} tokens, {self.steps[row]} steps"

    def _summary(self) -> str:
        return f"{self.passes} passes, {self.seconds:.1f} s"


def text_of(
    ids: Int32[np.ndarray, " tokens"],
    tokenizer: TextTokenizer,
    *,
    stop_ids: Sequence[int],
    mask_id: int,
    placeholder: str,
) -> str:
    """Returns the text of an answer.

    Args:
        ids: the answer, with or without the token that ends it.
        tokenizer: decodes ids; special tokens are left out.
        stop_ids: tokens that end an answer.
        mask_id: a token that is not known yet.
        placeholder: stands for each of these.
    """
    if len(ids) and ids[-1] in stop_ids:
        ids = ids[:-1]
    masks = np.flatnonzero(ids == mask_id)
    # Every second piece is a mask. A letter of which not all tokens are known is U+FFFD.
    pieces = np.split(ids, np.stack([masks, masks + 1], axis=1).ravel())
    return "".join(
        placeholder if number % 2 else tokenizer.decode(piece)
        for number, piece in enumerate(pieces)
    )
