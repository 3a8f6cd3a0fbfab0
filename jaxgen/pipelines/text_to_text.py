"""Texts or conversations in, answers out, by block-wise decoding of a diffusion language model."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxgen.checkpoints.placement import Placement, Progress
from jaxgen.layers import AttentionName
from jaxgen.models.diffusion_lm import DiffusionLM
from jaxgen.pipelines import text_folder
from jaxgen.pipelines.arguments import seeds_and_indices
from jaxgen.pipelines.chat import CHATML, LLADA, ChatFormat, Message, check_chat_format
from jaxgen.pipelines.text_arguments import as_conversations, as_rows, as_texts
from jaxgen.pipelines.texts import Texts, text_of
from jaxgen.sampling import (
    BlockDiffusion,
    Decoded,
    ResidualContext,
    Unmasking,
    answers_of,
    decode,
    decode_steps,
)
from jaxgen.sampling.block_arguments import check_vocabulary, checked_decoder
from jaxgen.tokenizers import TextTokenizer

type Prompts = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]] | np.ndarray

_SDAR_BLOCK, _SDAR_THRESHOLD = 64, 0.85


class TextToText:
    """A diffusion language model that is ready to use: LLaDA, SDAR, with or without RCD.

    Prompts, their lengths, seeds and the numbers of a decoder are inputs of a compiled program and
    change freely; another number of prompts, of new tokens, or of 64s of prompt tokens compiles
    again.

    Args:
        model: Predicts tokens; with `qk_norm` it is taken for an SDAR, without for a LLaDA.
        tokenizer: Makes ids of texts.
        reference: Another model, for `ResidualContext(init="reference")`.
        block_length: Tokens of a block; if None, 64 for SDAR and the whole answer for LLaDA.
        residual: What the default decoder feeds back: `ResidualContext()` for models that were
            trained with RCD; if None, nothing, or with a reference its predictions.
        cfg_scale: How far the default decoder of a LLaDA goes beyond what it was trained to answer,
            at twice the price: 0 is as trained (see `BlockDiffusion`); None for no guidance.
        stop_ids: Tokens that end an answer, besides the end of a message.
        pad_id: Fills answers after their end; if None, what the tokenizer says.
        chat_format: How conversations are written; if None, that whose tokens the tokenizer has.

    Raises:
        TypeError: A part of the wrong type.
        ValueError: Parts that do not fit together.
    """

    def __init__(
        self,
        model: DiffusionLM,
        tokenizer: TextTokenizer,
        *,
        reference: DiffusionLM | None = None,
        block_length: int | None = None,
        residual: ResidualContext | None = None,
        cfg_scale: float | None = None,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        chat_format: ChatFormat | None = None,
    ):
        _check_parts(model, tokenizer, reference)
        text_folder.check_tokenizer(model.config, tokenizer)
        if reference is not None:
            check_vocabulary(model.config, reference.config)
        if chat_format is None:
            formats = (CHATML, LLADA) if model.config.qk_norm else (LLADA, CHATML)
            chat_format = next((one for one in formats if not one.missing(tokenizer)), None)
        else:
            check_chat_format(chat_format, tokenizer)
        if stop_ids is None:
            stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        end = () if chat_format is None else (tokenizer.token_id(chat_format.end),)
        choices = (pad_id, tokenizer.pad_id, tokenizer.eos_id, 0)
        self.model = model
        self.tokenizer = tokenizer
        self.reference = reference
        self.block_length = block_length
        self.residual = _as_residual(residual, reference is not None)
        self.cfg_scale = cfg_scale
        self.stop_ids = tuple(dict.fromkeys([*_as_stops(stop_ids), *end]))
        self.pad_id = next(number for number in choices if number is not None)
        self.chat_format = chat_format
        checked_decoder(self.default_decoder(1), model.config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        reference: str | os.PathLike | None = None,
        block_length: int | None = None,
        residual: ResidualContext | None = None,
        cfg_scale: float | None = None,
        chat_format: ChatFormat | None = None,
        mask_id: int | None = None,
        dtype: DTypeLike = "bfloat16",
        attention: AttentionName = "exact",
        sharding: Placement = None,
        progress: Progress = None,
    ) -> "TextToText":
        """Load a folder of a released LLaDA, SDAR or Qwen3, or what was saved like one.

        Args:
            folder: Holds `config.json`, `model.safetensors` or shards of it, and the files of the
                tokenizer (see `TextTokenizer.from_folder`). `eos_token_id` and `pad_token_id` of
                the configuration end and fill answers.
            reference: Folder of another model with the same vocabulary, whose tokenizer is not
                read.
            block_length: Tokens of a block. If None, an SDAR's is in the name of the folder
                ("-b32"), or `block_size` of its configuration, or 64; a LLaDA decodes its whole
                answer as one block.
            residual: As for the class. Nothing in a folder tells a model that was trained with
                RCD from another.
            cfg_scale: As for the class.
            chat_format: As for the class.
            mask_id: The mask token if the configuration does not name it, as Qwen3's.
            dtype: Floating dtype of weights and computation.
            attention: "exact" or "int8".
            sharding: Where the weights of both models go, as for
                `jaxgen.checkpoints.load_diffusion_lm_folder`; the default device if None.
            progress: Called with the bytes loaded and those of all, for each model; True for a bar
                on stderr.

        Raises:
            FileNotFoundError: No such folder, or files are missing from it.
            TypeError: An argument of the wrong type.
            ValueError: Another kind of model, a damaged file, weights that do not fit, or parts
                that do not fit together, for example another mask in the tokenizer unless
                `mask_id` is given.
            ImportError: The package `tokenizers` is not installed.
        """
        residual = _as_residual(residual, reference is not None)  # before weights are read
        parts = text_folder.load(
            folder,
            reference=reference,
            block_length=block_length,
            chat_format=chat_format,
            mask_id=mask_id,
            dtype=dtype,
            attention=attention,
            sharding=sharding,
            progress=progress,
        )
        return cls(**parts, residual=residual, cfg_scale=cfg_scale, chat_format=chat_format)

    def default_decoder(self, new_tokens: int) -> BlockDiffusion:
        """Return how answers are decoded unless the caller says otherwise.

        `dataclasses.replace` changes parts of it. SDAR settles all tokens that are surer than 0.85
        and at least one, LLaDA one a step; the likeliest is taken (arXiv:2601.22954, section 4.1).

        Args:
            new_tokens: Of an answer, which is LLaDA's block.
        """
        shared: dict[str, Any] = {"stop_ids": self.stop_ids, "pad_id": self.pad_id}
        shared |= {"residual": self.residual, "cfg_scale": self.cfg_scale}
        if self.model.config.qk_norm:
            return BlockDiffusion(
                block_length=_SDAR_BLOCK if self.block_length is None else self.block_length,
                sight="block_causal",
                unmasking=Unmasking(threshold=_SDAR_THRESHOLD),
                **shared,
            )
        return BlockDiffusion(
            block_length=new_tokens if self.block_length is None else self.block_length,
            sight="bidirectional",
            **shared,
        )

    def __call__(
        self,
        prompts: Prompts,
        *,
        new_tokens: int = 512,
        decoder: BlockDiffusion | None = None,
        seed: int | Sequence[int] = 0,
        chat: bool = True,
    ) -> Texts:
        """Answer each prompt.

        Args:
            prompts: Strings, also as an array, or conversations as lists of
                `{"role": ..., "content": ...}`; one alone counts as a list of one.
            new_tokens: Of the longest answer. Models that think aloud need thousands.
            decoder: How to decode; `default_decoder(new_tokens)` if None. Its `stop_ids` and
                `pad_id` count as they are.
            seed: From 0 to 2**32 - 1, for decoders that draw. With one seed, row i gets that of
                i more; with one for each prompt, an answer depends on its own only.
            chat: Write prompts in the model's chat format, strings as messages of the user; False
                goes on with strings as they are, for models that were not tuned on chats.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of range, no prompts, a prompt without tokens or one that
                leaves no room for the answer, a message that is none, or a chat format that the
                tokenizer does not have.
        """
        call = self._prepare(prompts, new_tokens, decoder, seed, chat)
        return self._texts(decode(**self._arguments(call)), call)

    def stream(
        self,
        prompts: Prompts,
        *,
        new_tokens: int = 512,
        decoder: BlockDiffusion | None = None,
        seed: int | Sequence[int] = 0,
        chat: bool = True,
        every: int = 1,
        placeholder: str = "\u2591",
    ) -> Iterator[Texts]:
        """Answer each prompt, and yield the answers on the way, the finished ones last.

        Tokens appear in place: one that is not known yet is a placeholder, up to the end of the
        block that is being decoded.

        Args:
            prompts: As for a call, and so are the others.
            new_tokens: Likewise.
            decoder: Likewise.
            seed: Likewise.
            chat: Likewise.
            every: Yield after so many passes of the model.
            placeholder: Stands for a token that is not known.

        Raises:
            TypeError: As for a call.
            ValueError: As for a call, or `every` is no positive int.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive int, got {every!r}")
        if not isinstance(placeholder, str):
            raise TypeError(f"placeholder must be a string, got {placeholder!r}")
        call = self._prepare(prompts, new_tokens, decoder, seed, chat)
        return self._stream(call, every, placeholder)

    def _prepare(
        self,
        prompts: Prompts,
        new_tokens: int,
        decoder: BlockDiffusion | None,
        seed: int | Sequence[int],
        chat: bool,
    ) -> "_Call":
        """Check a call and encode its prompts."""
        start = time.perf_counter()
        if decoder is not None and not isinstance(decoder, BlockDiffusion):
            raise TypeError(f"decoder must be a BlockDiffusion, got {type(decoder).__name__}")
        if chat and self.chat_format is None:
            raise ValueError(
                "the tokenizer does not have the tokens of a chat format that is known; give "
                "chat_format, or chat=False to go on with plain strings"
            )
        conversations = as_conversations(
            prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
        )
        rows, lengths = as_rows(
            as_texts(conversations, self.chat_format if chat else None),
            self.tokenizer,
            new_tokens=new_tokens,
            max_tokens=self.model.config.max_tokens,
        )
        seeds, indices = seeds_and_indices(seed, len(rows))
        decoder = self.default_decoder(new_tokens) if decoder is None else decoder
        return _Call(start, rows, lengths, seeds + indices, decoder, new_tokens)

    def _arguments(self, call: "_Call") -> dict[str, Any]:
        """Return what `decode` and `decode_steps` take."""
        return {
            "model": self.model,
            "prompts": jnp.asarray(call.prompts),
            "decoder": call.decoder,
            "new_tokens": call.new_tokens,
            "lengths": jnp.asarray(call.lengths),
            "seeds": call.seeds,
            "reference": self.reference if _starts_with_reference(call.decoder.residual) else None,
        }

    def _stream(self, call: "_Call", every: int, placeholder: str) -> Iterator[Texts]:
        block = call.decoder.block_length
        for number, state in enumerate(decode_steps(**self._arguments(call))):
            done = np.asarray(state.done)
            if number % every and not done.all():
                continue
            answers = _answers_of(state, call.decoder, call.lengths, call.new_tokens)
            reached = np.asarray(state.start) + block - call.lengths
            shown = np.where(done, call.new_tokens, reached)
            yield self._texts(answers, call, shown, placeholder)

    def _texts(
        self,
        answers: Decoded,
        call: "_Call",
        shown: np.ndarray | None = None,
        placeholder: str = "",
    ) -> Texts:
        """Decode ids, of each row those up to `shown`."""
        tokens, lengths, steps = (np.asarray(array) for array in answers[:3])
        texts = []
        for row, ids in enumerate(tokens):
            end = lengths[row] if shown is None else min(lengths[row], shown[row])
            text = text_of(
                ids[:end],
                self.tokenizer,
                stop_ids=call.decoder.stop_ids,
                mask_id=self.model.config.mask_id,
                placeholder=placeholder,
            )
            texts.append(text)
        seconds = time.perf_counter() - call.start
        return Texts(tuple(texts), tokens, lengths, steps, int(answers.passes), seconds)


class _Call(NamedTuple):
    """A call in one form, and when it began; arrays are on the host but for the seeds."""

    start: float
    prompts: np.ndarray
    lengths: np.ndarray
    seeds: jax.Array
    decoder: BlockDiffusion
    new_tokens: int


def _check_parts(model: Any, tokenizer: Any, reference: Any) -> None:
    """Refuses parts of the wrong type.

    Raises:
        TypeError: one of these.
    """
    kinds = {"model": DiffusionLM, "tokenizer": TextTokenizer, "reference": DiffusionLM | None}
    parts = {"model": model, "tokenizer": tokenizer, "reference": reference}
    for name, kind in kinds.items():
        if not isinstance(parts[name], kind):
            wanted = getattr(kind, "__name__", "DiffusionLM or None")
            raise TypeError(f"{name} must be a {wanted}, got {type(parts[name]).__name__}")


def _as_stops(stop_ids: Any) -> list[int]:
    """Tokens that end an answer, as a list.

    Raises:
        TypeError: no ints.
    """
    given = stop_ids.tolist() if isinstance(stop_ids, jax.Array | np.ndarray) else stop_ids
    numbers: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(number, int | np.integer) for number in numbers):
        raise TypeError(f"stop_ids must be a sequence of ints, got {stop_ids!r}")
    return numbers


def _as_residual(residual: ResidualContext | None, has_reference: bool) -> ResidualContext | None:
    """What the default decoder feeds back, which uses a reference if there is one.

    Raises:
        TypeError: something else.
        ValueError: it does not use the reference, or needs one.
    """
    if not isinstance(residual, ResidualContext | None):
        raise TypeError(f"residual must be a ResidualContext or None, got {residual!r}")
    if residual is None and has_reference:
        return ResidualContext(init="reference")
    if _starts_with_reference(residual) != has_reference:
        raise ValueError('a reference and residual=ResidualContext(init="reference") go together')
    return residual


def _starts_with_reference(residual: ResidualContext | None) -> bool:
    return residual is not None and residual.init == "reference"


_answers_of = jax.jit(answers_of, static_argnums=3)
