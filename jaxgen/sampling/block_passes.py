"""One pass of block-wise decoding: what the model computes, and what follows for each row."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from jaxgen.models.diffusion_lm import Cache, DiffusionLM
from jaxgen.sampling.block_decoder import BlockDiffusion
from jaxgen.sampling.residual_context import (
    Int8Table,
    Residual,
    ResidualContext,
    Table,
    mix_residual,
    no_residual,
)

_PREFILL = 1024


class DecodingState(NamedTuple):
    """Where a decoding run is; a pytree.

    Attributes:
        tokens: of every slot; a slot is a position. The mask's id where a token is not known.
        start: first slot of each row's block.
        step: steps that the block had.
        total: tokens of the block that were masked at its first step.
        steps: steps of each row, those that only store keys and values left out.
        done: rows that are finished.
        passes: passes of the model so far, those for `init` among them, that of prompts left out.
        cache: keys and values, None if none are kept. With guidance there are twice the rows,
            those behind a prompt of masks last.
        residual: what the next step gets in the masked positions of the block, unless it starts
            again; None without RCD.
    """

    tokens: Int32[Array, "batch slots"]
    start: Int32[Array, " batch"]
    step: Int32[Array, " batch"]
    total: Int32[Array, " batch"]
    steps: Int32[Array, " batch"]
    done: Bool[Array, " batch"]
    passes: Int32[Array, ""]
    cache: Cache | None
    residual: Residual | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run does not change: models as graph and state, decoder, prompts' lengths, keys."""

    graph: Any = dataclasses.field(metadata={"static": True})
    reference_graph: Any = dataclasses.field(metadata={"static": True})
    new_tokens: int = dataclasses.field(metadata={"static": True})
    mask_id: int = dataclasses.field(metadata={"static": True})
    state: Any
    reference_state: Any
    decoder: BlockDiffusion
    lengths: Array
    end: Array  # slots of each row from here on are not decoded, and not seen
    keys: Array
    narrow_table: Int8Table | None  # input embeddings for the residual; None: those of the model

    @property
    def model(self) -> DiffusionLM:
        """The model that decodes."""
        return nnx.merge(self.graph, self.state)

    @property
    def reference(self) -> DiffusionLM:
        """The model of `init="reference"`."""
        return nnx.merge(self.reference_graph, self.reference_state)

    @property
    def table(self) -> Table:
        """Input embeddings as the residual reads them."""
        return self.model.input_table() if self.narrow_table is None else self.narrow_table


def last_slots(lengths: Array, decoder: BlockDiffusion, new_tokens: int) -> Array:
    """The slot after the last one of each row; SDAR decodes whole blocks."""
    end, block = lengths + new_tokens, decoder.block_length
    return -(-end // block) * block if decoder.sight == "block_causal" else end


def first_state(setting: Setting, prompts: Array) -> DecodingState:
    """The state before the first step: prompts, masks, and what is known of the prompts."""
    model, decoder, lengths = setting.model, setting.decoder, setting.lengths
    batch, longest = prompts.shape
    block, causal = decoder.block_length, decoder.sight == "block_causal"
    slots = longest + decoder.blocks(setting.new_tokens) * block
    place = jnp.arange(slots)[None]
    padded = jnp.pad(prompts, ((0, 0), (0, slots - longest)))
    masked = (place >= lengths[:, None]) & (place < setting.end[:, None])
    tokens = jnp.where(place < lengths[:, None], padded, decoder.pad_id)
    tokens = jnp.where(masked, setting.mask_id, tokens)
    start = lengths // block * block if causal else lengths
    cache = None
    if causal or decoder.cache != "none":
        cache = model.empty_cache(batch if decoder.cfg_scale is None else 2 * batch, slots)
    if causal and longest >= block:
        cache = _prefill(model, tokens, cache, longest // block * block, block)
    residual = None
    if decoder.residual is not None:
        residual = no_residual((batch, block), model.config.width)
    zeros = jnp.zeros(batch, jnp.int32)
    done = jnp.zeros(batch, bool)
    state = DecodingState(tokens, start, zeros, zeros, zeros, done, jnp.int32(0), cache, residual)
    return state._replace(total=_masked(setting, state).sum(axis=1, dtype=jnp.int32))


def _prefill(model: DiffusionLM, tokens: Array, cache: Any, length: int, block: int) -> Cache:
    """Stores keys and values of the prompts' blocks, some blocks at a time.

    The last tokens of shorter prompts and masks are stored with them; their blocks are decoded
    later, which overwrites them before anybody sees them.
    """
    batch, slots = tokens.shape
    size = min(max(_PREFILL // block, 1) * block, length)
    place = jnp.arange(slots)

    def store(cache: Cache, first: Array) -> tuple[Cache, None]:
        rows = first + jnp.arange(size)
        seen = rows[:, None] // block >= place[None] // block
        ids = jnp.take(tokens, rows, axis=1, mode="clip")
        rows = jnp.broadcast_to(rows, (batch, size)).astype(jnp.int32)
        return model.cached(ids, rows, cache, seen[None])[1], None

    return jax.lax.scan(store, cache, jnp.arange(0, length, size))[0]


def one_pass(setting: Setting, state: DecodingState) -> DecodingState:
    """One pass of the model over the block of each row, and what follows from it."""
    model, decoder = setting.model, setting.decoder
    masked = _masked(setting, state)
    denoising = masked.any(axis=1) & ~state.done
    passes, residual = state.passes + 1, state.residual
    if decoder.residual is not None and residual is not None:
        passes, residual = _opened(setting, decoder.residual, state, masked)
    logits, cache = _predicted(model, setting, state, residual, masked)

    keys = _keys(setting, state.start, state.step)
    draw = functools.partial(decoder.choice.draw, mask_id=setting.mask_id)
    tokens, confidence = jax.vmap(draw)(logits, keys)
    order_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    settle = jax.vmap(decoder.unmasking.settle)
    settled = settle(confidence, masked, state.step, state.total, order_keys)
    settled &= denoising[:, None]
    rows = _rows(setting, state)
    written = _put(state.tokens, rows, jnp.where(settled, tokens, _take(state.tokens, rows)))
    if decoder.residual is not None and residual is not None:
        # Positions that are no longer masked do not read theirs.
        fresh = decoder.residual.residual(logits, setting.table, setting.mask_id)
        residual = jax.tree.map(
            lambda new, old: jnp.where(_along(denoising, new), new, old), fresh, residual
        )
    count = denoising.astype(jnp.int32)
    state = state._replace(
        tokens=written,
        step=state.step + count,
        steps=state.steps + count,
        passes=passes,
        cache=cache,
        residual=residual,
    )
    return _moved_on(setting, state, stored=~denoising)


def _moved_on(setting: Setting, state: DecodingState, stored: Array) -> DecodingState:
    """Sends rows whose block is finished to their next one, or home."""
    decoder = setting.decoder
    clean = ~_masked(setting, state).any(axis=1) & ~state.done
    rows = _rows(setting, state)
    answer = (rows >= setting.lengths[:, None]) & (rows < setting.end[:, None])
    stops = jnp.isin(_take(state.tokens, rows), jnp.array(decoder.stop_ids, jnp.int32)) & answer
    last = state.start + decoder.block_length >= setting.end
    done = state.done | (clean & (last | stops.any(axis=1)))
    if decoder.sight == "block_causal":
        go = clean & stored  # after the pass that stored its keys and values
    elif decoder.cache == "none":
        go = clean
    else:
        go = clean & jnp.all(clean | done)  # rows begin blocks together: that pass is a full one
    go &= ~done
    start = jnp.where(go, state.start + decoder.block_length, state.start)
    residual = state.residual
    if residual is not None:
        residual = jax.tree.map(lambda a: jnp.where(_along(go, a), 0.0, a), residual)
    state = state._replace(
        start=start, step=jnp.where(go, 0, state.step), done=done, residual=residual
    )
    total = _masked(setting, state).sum(axis=1, dtype=jnp.int32)
    return state._replace(total=jnp.where(go, total, state.total))


def _opened(
    setting: Setting, settings: ResidualContext, state: DecodingState, masked: Array
) -> tuple[Array, Residual]:
    """The passes with this one, and its residual: `init` where a block begins, or starts again."""
    model, passes, residual = setting.model, state.passes + 1, state.residual
    assert residual is not None
    first = state.step % settings.restart == 0 if settings.restart else state.step == 0
    first &= ~state.done & masked.any(axis=1)
    if settings.init == "zero":
        weight = jnp.where(first[:, None], 0.0, residual.weight)
        return passes, residual._replace(weight=weight)
    table = setting.table

    def begin() -> Residual:
        match settings.init:
            case "self":
                logits, _ = _predicted(model, setting, state, None, masked)
            case "reference":
                other = setting.reference
                hidden = _uncached(other, *_without_prompts(setting, state))
                logits = _guided(setting.decoder, other.logits(hidden))
            case _:
                keys = _keys(setting, state.start, 2**31 - 1 - state.step)  # that no step has
                shape = (setting.decoder.block_length,)
                draw = lambda key: settings.random_residual(key, shape, table, setting.mask_id)
                return jax.vmap(draw)(keys)
        return settings.residual(logits, table, setting.mask_id)

    fresh = jax.lax.cond(first.any(), begin, lambda: residual)
    if settings.init != "dirichlet":
        passes += first.any().astype(jnp.int32)
    return passes, jax.tree.map(
        lambda new, old: jnp.where(_along(first, new), new, old), fresh, residual
    )


def _predicted(
    model: DiffusionLM,
    setting: Setting,
    state: DecodingState,
    residual: Residual | None,
    masked: Array,
) -> tuple[Float[Array, "batch block vocabulary"], Cache | None]:
    """Predicts the block of each row, with guidance if there is any; and what is kept of it."""
    decoder = setting.decoder
    if decoder.cfg_scale is not None:
        setting, state = _without_prompts(setting, state)
        residual, masked = _twice((residual, masked))
    hidden, cache = _hidden(model, setting, state, residual, masked)
    return _guided(decoder, model.logits(hidden)), cache


def _without_prompts(setting: Setting, state: DecodingState) -> tuple[Setting, DecodingState]:
    """Puts every row behind a prompt of masks after all rows, as in the cache, for guidance."""
    if setting.decoder.cfg_scale is None:
        return setting, state
    prompt = jnp.arange(state.tokens.shape[1])[None] < setting.lengths[:, None]
    tokens = jnp.concatenate([state.tokens, jnp.where(prompt, setting.mask_id, state.tokens)])
    start, step, done, lengths, end = _twice(
        (state.start, state.step, state.done, setting.lengths, setting.end)
    )
    state = state._replace(tokens=tokens, start=start, step=step, done=done)
    return dataclasses.replace(setting, lengths=lengths, end=end), state


def _guided(
    decoder: BlockDiffusion, logits: Float[Array, "rows block vocabulary"]
) -> Float[Array, "batch block vocabulary"]:
    """Goes from what the last half of the rows predicts beyond the first; alike without a scale."""
    if decoder.cfg_scale is None:
        return logits
    scale = jnp.asarray(decoder.cfg_scale, jnp.float32)
    given, masked = jnp.split(logits, 2)
    return given + scale * (given - masked)  # exactly `given` where the scale is 0


def _hidden(
    model: DiffusionLM,
    setting: Setting,
    state: DecodingState,
    residual: Residual | None,
    masked: Array,
) -> tuple[Float[Array, "batch block width"], Cache | None]:
    """Computes the block of each row up to the head, and what is kept of it."""
    decoder, cache, rows = setting.decoder, state.cache, _rows(setting, state)
    batch, slots = state.tokens.shape
    place = jnp.arange(slots)[None]
    block = model.embed(_take(state.tokens, rows))
    if residual is not None:
        block = mix_residual(block, masked, residual)
    if decoder.sight == "block_causal":
        assert cache is not None
        seen = place < (state.start + decoder.block_length)[:, None]
        return model.cached(block, rows, cache, seen[:, None])

    seen = (place < setting.end[:, None])[:, None]
    everywhere = jnp.broadcast_to(place, (batch, slots)).astype(jnp.int32)

    def everything() -> tuple[Array, Cache | None]:
        x = _put(model.embed(state.tokens), rows, block)
        if cache is None:
            hidden, kept = model.hidden(x, mask=seen), None
        else:
            hidden, kept = model.cached(x, everywhere, cache, seen)
        return _take(hidden, rows), kept

    if cache is None:
        return everything()

    def window(size: int) -> tuple[Array, Cache | None]:
        # From the block on; tokens beyond the end are computed, but never seen.
        wide = state.start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        x = jnp.concatenate(
            [block, model.embed(_take(state.tokens, wide[:, decoder.block_length :]))], axis=1
        )
        hidden, kept = model.cached(x, wide, cache, seen)
        return hidden[:, : decoder.block_length], kept

    first = ((state.step == 0) & ~state.done).any()
    sizes = decoder.windows(setting.new_tokens)
    left = jnp.max(jnp.where(state.done, 0, setting.end - state.start))
    fitting = jnp.minimum(jnp.searchsorted(jnp.array(sizes), left), len(sizes) - 1)
    branches = [everything, *(functools.partial(window, size) for size in sizes)]
    return jax.lax.switch(jnp.where(first, 0, 1 + fitting), branches)


def _uncached(model: DiffusionLM, setting: Setting, state: DecodingState) -> Array:
    """Computes the block of each row, up to the head, from all tokens as they are."""
    place = jnp.arange(state.tokens.shape[1])
    if setting.decoder.sight == "block_causal":
        number = place // setting.decoder.block_length
        seen = (number[:, None] >= number[None])[None]
    else:
        seen = (place[None] < setting.end[:, None])[:, None]
    return _take(model.hidden(state.tokens, mask=seen), _rows(setting, state))


def _keys(setting: Setting, start: Array, step: Array) -> Array:
    """A random key for each row and step of a block."""
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(setting.keys, start), step)


def _rows(setting: Setting, state: DecodingState) -> Int32[Array, "batch block"]:
    """The slots of each row's block; the last block may reach beyond all slots."""
    return state.start[:, None] + jnp.arange(setting.decoder.block_length, dtype=jnp.int32)[None]


def _masked(setting: Setting, state: DecodingState) -> Bool[Array, "batch block"]:
    """Where the block has tokens that are not known. Those of a prompt are, whatever they are."""
    rows = _rows(setting, state)
    inside = (rows >= setting.lengths[:, None]) & (rows < setting.end[:, None])
    return inside & (_take(state.tokens, rows) == setting.mask_id)


def _take(array: Array, rows: Array) -> Array:
    """Some slots of each row; those beyond the last one are copies of it."""
    index = rows.reshape(*rows.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1, mode="clip")


def _put(array: Array, rows: Array, new: Array) -> Array:
    """Replaces some slots of each row; those beyond the last one are left out."""
    return array.at[jnp.arange(len(array))[:, None], rows].set(new, mode="drop")


def _twice(arrays: Any) -> Any:
    """Every array of a pytree with all its rows again after the last one."""
    return jax.tree.map(lambda array: jnp.concatenate([array, array]), arrays)


def _along(rows: Array, array: Array) -> Array:
    """One flag for each row, in the rank of an array."""
    return rows.reshape(-1, *(1,) * (array.ndim - 1))
