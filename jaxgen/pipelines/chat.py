"""How the messages of a conversation become the text that a chat model was tuned on.

A message is a mapping with `role` ("system", "user" or "assistant") and `content`. The text ends
where the answer of the assistant begins. Special tokens that a content spells out become special
tokens, as with the templates of transformers: take them out of text that is not trusted.

`LLADA` is the template in `tokenizer_config.json` of LLaDA-8B-Instruct, as a public copy of that
folder has it (yinj66/support_basis); those of other LLaDA were not seen. Public code that spells
prompts out does not always agree with it.

`CHATML` is Qwen3's template without tools, and how public code spells prompts for SDAR out (the
dLLM-RL family). The templates in the folders of SDAR and of the RCD models were not seen. Qwen3's
also takes the thoughts out of earlier answers; here a content is kept as it is.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.tokenizers import TextTokenizer

type Message = Mapping[str, str]
"""`{"role": "user", "content": "..."}`."""

_ROLES = ("system", "user", "assistant")
_ANSWERS = "assistant"


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The text around messages.

    Attributes:
        before_role: begins a message.
        after_role: between its role and its content.
        end: the token that ends a message, and with it an answer.
        after_end: between messages.
        start: begins the conversation.
        strip: leave out white space around a content.
    """

    before_role: str
    after_role: str
    end: str
    after_end: str = ""
    start: str = ""
    strip: bool = False

    @property
    def tokens(self) -> tuple[str, ...]:
        """The special tokens, each of which a tokenizer must have."""
        text = self.start + self.before_role + self.after_role + self.end + self.after_end
        return tuple(dict.fromkeys([*re.findall(r"<\|.*?\|>", text), self.end]))

    def missing(self, tokenizer: TextTokenizer) -> tuple[str, ...]:
        """Returns those of its tokens of which a tokenizer does not make one id."""
        return tuple(token for token in self.tokens if not tokenizer.finds(token))

    def text(self, messages: Sequence[Message]) -> str:
        """Returns a conversation up to where the assistant answers.

        Args:
            messages: at least one, the last one the user's.

        Raises:
            TypeError: a message that is no mapping, or a content that is no string.
            ValueError: no message, other keys, an unknown role, or another's last message.
        """
        parts = [self.start]
        for role, content in map(_checked, messages):
            content = content.strip() if self.strip else content
            parts += [self.before_role, role, self.after_role, content, self.end, self.after_end]
        if len(parts) == 1:
            raise ValueError("a conversation must have at least one message, got none")
        if messages[-1]["role"] != "user":
            raise ValueError(
                f"the last message must be the user's, got one of {messages[-1]['role']!r}"
            )
        return "".join([*parts, self.before_role, _ANSWERS, self.after_role])


CHATML = ChatFormat("<|im_start|>", "\n", "<|im_end|>", after_end="\n")
"""SDAR, Qwen."""

LLADA = ChatFormat(
    "<|start_header_id|>",
    "<|end_header_id|>\n\n",
    "<|eot_id|>",
    start="<|startoftext|>",
    strip=True,
)
"""LLaDA-8B-Instruct."""


def check_chat_format(chat_format: ChatFormat, tokenizer: TextTokenizer) -> None:
    """Refuses a chat format that a tokenizer cannot write.

    Raises:
        TypeError: no chat format.
        ValueError: the tokenizer does not make one id of each of its tokens.
    """
    if not isinstance(chat_format, ChatFormat):
        raise TypeError(f"chat_format must be a ChatFormat, got {chat_format!r}")
    missing = chat_format.missing(tokenizer)
    if missing:
        raise ValueError(
            "the tokenizer must make one id of each token of the chat format, it does not of "
            f"{', '.join(map(repr, missing))}"
        )


def _checked(message: Any) -> tuple[str, str]:
    """The role and the content of a message."""
    if not isinstance(message, Mapping):
        raise TypeError(f"a message must be a mapping, got {type(message).__name__}")
    if set(message) != {"role", "content"}:
        raise ValueError(f"a message must have role and content, got {list(message)}")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise ValueError(f"role must be one of {', '.join(_ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise TypeError(f"content must be a string, got {type(content).__name__}")
    return role, content
