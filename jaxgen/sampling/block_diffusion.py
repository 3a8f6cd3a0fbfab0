"""Decoding of diffusion language models, block by block, as one compiled loop.

An answer starts as masks. Each step predicts the tokens of a block, settles some of them
(`Unmasking`), and goes on to the next block when none is masked. Two ways to see the text:

- "bidirectional", LLaDA (arXiv:2502.09992): every token sees the prompt and the whole answer.
  Blocks are counted from the end of the prompt. `cache="prefix"` keeps keys and values of all that
  comes before the block from its first step on, "dual" also those of what follows it; both are
  approximations (Fast-dLLM, arXiv:2505.22618). `cfg_scale` guides towards the prompt.
- "block_causal", SDAR (arXiv:2510.06303): a token sees its own block and those before. Blocks are
  counted from the start of the prompt, whose last tokens may begin the first block. One more pass
  over a finished block stores its keys and values, which is exact.

Rows of a batch do not know of each other: each has its own prompt length, its own place, its own
random numbers, and stops at its own end. A token's slot is its position, so that nothing depends on
padding (INT8 attention rounds what is seen beside what is not, and may answer a little
differently). With "block_causal", and without a cache, rows also go on to their next block alone.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Int32

from jaxgen.models.diffusion_lm import DiffusionLM
from jaxgen.sampling.block_arguments import (
    check_prompts,
    check_reference,
    checked_decoder,
    checked_lengths,
    checked_seeds,
)
from jaxgen.sampling.block_decoder import BlockDiffusion
from jaxgen.sampling.block_passes import DecodingState, Setting, first_state, last_slots, one_pass
from jaxgen.sampling.residual_context import Int8Table, quantized_table


class Decoded(NamedTuple):
    """Answers.

    Attributes:
        tokens: the answers, `pad_id` after their end.
        lengths: tokens of each answer, the one that ended it among them.
        steps: steps of each row: predictions after which tokens were settled.
        passes: passes of the model, those that store keys and values among them; one with guidance
            is one of twice the rows.
    """

    tokens: Int32[Array, "batch new_tokens"]
    lengths: Int32[Array, " batch"]
    steps: Int32[Array, " batch"]
    passes: Int32[Array, ""]


def decode(
    model: DiffusionLM,
    prompts: Int[Array, "batch tokens"],
    decoder: BlockDiffusion,
    *,
    new_tokens: int,
    lengths: Int[Array, " batch"] | None = None,
    seeds: Int[Array, " batch"] | int = 0,
    reference: DiffusionLM | None = None,
) -> Decoded:
    """Decodes answers to prompts in one compiled program.

    Another prompt of the same shape, other lengths, seeds and numbers of the decoder's parts do not
    compile again.

    Args:
        model: predicts tokens.
        prompts: ids, each prompt at the start of its row (`left_aligned` moves padding there).
        decoder: how to decode.
        new_tokens: tokens of the longest answer.
        lengths: tokens of each prompt; all of the row if None.
        seeds: of each row, or of the first one: the next rows then get the numbers that follow.
        reference: predicts the first step of each block for `init="reference"`.

    Raises:
        ValueError: shapes, ids or options that do not fit; the message says which.
    """
    setting, state = _start(model, prompts, decoder, new_tokens, lengths, seeds, reference)
    return _run(setting, state)


def decode_steps(
    model: DiffusionLM,
    prompts: Int[Array, "batch tokens"],
    decoder: BlockDiffusion,
    *,
    new_tokens: int,
    lengths: Int[Array, " batch"] | None = None,
    seeds: Int[Array, " batch"] | int = 0,
    reference: DiffusionLM | None = None,
) -> Iterator[DecodingState]:
    """Decodes as `decode` does, and yields the state before the first and after every pass.

    The last state's answers are those of `decode`; `answers_of` takes them out of any.
    """
    setting, state = _start(model, prompts, decoder, new_tokens, lengths, seeds, reference)
    yield state
    while not bool(np.all(state.done)):
        state = _one_pass(setting, state)
        yield state


def answers_of(
    state: DecodingState,
    decoder: BlockDiffusion,
    lengths: Int[Array, " batch"],
    new_tokens: int,
) -> Decoded:
    """Returns the answers of a state, those of unfinished rows with masks in them.

    Args:
        state: what `decode_steps` yielded.
        decoder: how it was decoded.
        lengths: tokens of each prompt.
        new_tokens: tokens of the longest answer.
    """
    slots = lengths.astype(jnp.int32)[:, None] + jnp.arange(new_tokens)[None]
    tokens = jnp.take_along_axis(state.tokens, slots, axis=1)
    stops = jnp.isin(tokens, jnp.array(decoder.stop_ids, jnp.int32)).astype(jnp.int32)
    before = jnp.cumsum(stops, axis=1) - stops  # stops before each token
    kept = before == 0
    tokens = jnp.where(kept, tokens, decoder.pad_id)
    return Decoded(tokens, kept.sum(axis=1, dtype=jnp.int32), state.steps, state.passes)


def left_aligned(
    tokens: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"]
) -> tuple[Int32[Array, "batch tokens"], Int32[Array, " batch"]]:
    """Moves the tokens of prompts that were padded anywhere to the start of their rows.

    Args:
        tokens: ids, padding among them.
        mask: True for tokens of the prompt, False for padding ("attention mask").

    Returns:
        Prompts and their lengths, as `decode` takes them.
    """
    order = jnp.argsort(~mask.astype(bool), axis=1, stable=True)
    moved = jnp.take_along_axis(tokens, order, axis=1).astype(jnp.int32)
    return moved, mask.astype(bool).sum(axis=1, dtype=jnp.int32)


def _start(
    model: DiffusionLM,
    prompts: Array,
    decoder: BlockDiffusion,
    new_tokens: int,
    lengths: Array | None,
    seeds: Array | int,
    reference: DiffusionLM | None,
) -> tuple[Setting, DecodingState]:
    """Checks a call and makes the state before its first step."""
    prompts = jnp.asarray(prompts)
    check_prompts(prompts, new_tokens, model.config)
    decoder, new_tokens = checked_decoder(decoder, model.config), int(new_tokens)
    check_reference(decoder, model.config, None if reference is None else reference.config)
    lengths = checked_lengths(lengths, prompts)
    seeds = checked_seeds(seeds, len(prompts))
    graph, state = nnx.split(model)
    reference_graph, reference_state = (None, None) if reference is None else nnx.split(reference)
    narrow_table = None
    if decoder.residual is not None and decoder.residual.table == "int8":
        narrow_table = _quantized(graph, state)
    setting = Setting(
        graph=graph,
        reference_graph=reference_graph,
        new_tokens=new_tokens,
        mask_id=model.config.mask_id,
        state=state,
        reference_state=reference_state,
        decoder=decoder,
        lengths=lengths,
        end=last_slots(lengths, decoder, new_tokens),
        keys=jax.vmap(jax.random.key)(seeds),
        narrow_table=narrow_table,
    )
    return setting, _first_state(setting, prompts.astype(jnp.int32))


@jax.jit
def _run(setting: Setting, state: DecodingState) -> Decoded:
    """Decodes to the end."""
    state = jax.lax.while_loop(
        lambda state: ~jnp.all(state.done), lambda state: one_pass(setting, state), state
    )
    return answers_of(state, setting.decoder, setting.lengths, setting.new_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _quantized(graph: Any, state: Any) -> Int8Table:
    """The input embeddings of a model, narrow."""
    return quantized_table(nnx.merge(graph, state).input_table())


_first_state, _one_pass = jax.jit(first_state), jax.jit(one_pass)
