"""What a training run carries from step to step, and the function that advances it.

State is plain pytrees: NNX modules are taken apart once (`take_apart`) into a hashable skeleton
and dictionaries of arrays by name, and put together inside the loss. Nothing is mutated.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, UInt32

type Arrays = dict[str, Array]
type Batch = Mapping[str, Array]
type Metrics = dict[str, Array]
type Loss = Callable[[Arrays, Arrays, Batch, PRNGKeyArray], Float[Array, ""]]
"""`loss(params, frozen, batch, key)`, a float32 scalar."""

SPIKE_WARMUP = 50
"""Updates that are made whatever their gradient norm, before spikes are looked for."""
_NORM_DECAY = 0.99  # of the average gradient norm: over about the last 100 updates


@dataclass(frozen=True)
class Skeleton:
    """A module without its arrays. `join` puts them back; `trained` names the parameters."""

    graphdef: Any
    treedef: Any
    names: tuple[str, ...]
    trained: frozenset[str]

    def join(self, arrays: Mapping[str, Array]) -> Any:
        """Return the module that holds `arrays`, which must have every name of the skeleton."""
        leaves = [arrays[name] for name in self.names]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def take_apart(module: nnx.Module) -> tuple[Skeleton, Arrays]:
    """Split a module into its skeleton and its arrays, named by their dotted path."""
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    names = _dotted_names(state)
    trained = frozenset(_dotted_names(nnx.state(module, nnx.Param)))
    return Skeleton(graphdef, treedef, names, trained), dict(zip(names, leaves, strict=True))


def names_of(module: nnx.Module, kind: type[nnx.Variable]) -> frozenset[str]:
    """Return the names, as in `take_apart`, of the variables of a kind."""
    return frozenset(_dotted_names(nnx.state(module, kind)))


def _dotted_names(state: Any) -> tuple[str, ...]:
    """Return the path of each leaf; attribute keys belong to the variable, not to the path."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    dictionary_key = jax.tree_util.DictKey
    return tuple(
        ".".join(str(part.key) for part in path if isinstance(part, dictionary_key))
        for path in paths
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A pytree; everything that a resumed run needs, except the position in the data.

    Attributes:
        step: Batches seen. Random keys are folded from the seed and this number.
        seed: Of the run; an array, so that runs which differ in it share a compiled step.
        params: Trained arrays by name.
        ema: Their exponential moving average.
        frozen: Arrays that are not trained (position tables, a borrowed text encoder).
        optimizer: State of the optax transformation.
        skipped: Updates skipped so far because they were not finite or spiking.
        skipped_in_a_row: Those since the last good update.
        average_norm: Exponential average of the gradient norms of the updates that were made, from
            0 and without the correction for that; stays 0 if spikes are not looked for.
    """

    step: Int32[Array, ""]
    seed: UInt32[Array, ""]
    params: Arrays
    ema: Arrays
    frozen: Arrays
    optimizer: Any
    skipped: Int32[Array, ""]
    skipped_in_a_row: Int32[Array, ""]
    average_norm: Float[Array, ""]


def create_state(
    params: Arrays,
    frozen: Arrays,
    optimizer: optax.GradientTransformation,
    seed: int | UInt32[Array, ""] = 0,
) -> TrainState:
    """Return the state before the first step; the average starts at the parameters."""
    return TrainState(
        step=jnp.int32(0),
        seed=jnp.asarray(seed, jnp.uint32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        frozen=frozen,
        optimizer=optimizer.init(params),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
        average_norm=jnp.float32(0),
    )


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
    gradient_clip: float = 1.0,
    undecayed: Container[str] = (),
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm.

    Vectors (biases, norm scales) do not decay, nor do the parameters in `undecayed`.
    """

    def decayed(path: tuple[Any, ...], array: Array) -> bool:
        return array.ndim >= 2 and path[-1].key not in undecayed

    return optax.chain(
        optax.clip_by_global_norm(gradient_clip),
        optax.adamw(
            learning_rate,
            b1=betas[0],
            b2=betas[1],
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map_with_path(decayed, params),
        ),
    )


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: optax.Schedule,
    ema_decay: float,
    accumulate: int = 1,
    spike_factor: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the function of one update, to be compiled by the caller.

    An update whose loss or gradient norm is not finite, or whose gradient norm spikes, leaves
    parameters, average and optimizer as they were and is counted. The decay of the average warms up
    as (1 + n) / (10 + n) after n updates, so that early averages forget the initialization.

    Args:
        loss: Called once under `jax.value_and_grad` with a key of its own for each step.
        optimizer: Applied to the gradients of `params`.
        learning_rate: Reported in the metrics; the one that `optimizer` was built with.
        ema_decay: Largest decay of the average, in [0, 1).
        accumulate: Parts of a batch that are computed one after the other, to need less memory;
            divides its rows. The loss is the mean of their losses.
        spike_factor: A gradient norm, before clipping, spikes if it is more than this times the
            running average of those of the updates made before, of which there must be
            `SPIKE_WARMUP`. 0: never.
    """
    differentiate = jax.value_and_grad(loss)
    if accumulate > 1:
        differentiate = _accumulated(differentiate, accumulate)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        value, gradients = differentiate(state.params, state.frozen, batch, key)
        norm = _global_norm(gradients)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates_done = (state.step - state.skipped).astype(jnp.float32)
        average_norm = state.average_norm
        if spike_factor:
            good &= ~_spikes(norm, average_norm, updates_done, spike_factor)
            average_norm = norm + _NORM_DECAY * (average_norm - norm)

        # optax raises float decays to int32 counts, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            rate = jnp.asarray(learning_rate(state.step - state.skipped), jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + updates_done) / (10 + updates_done))
        ema = jax.tree.map(lambda old, new: new + decay * (old - new), state.ema, params)

        def keep_if_good(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        skip = 1 - good.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            seed=state.seed,
            params=keep_if_good(params, state.params),
            ema=keep_if_good(ema, state.ema),
            frozen=state.frozen,
            optimizer=keep_if_good(optimizer_state, state.optimizer),
            skipped=state.skipped + skip,
            skipped_in_a_row=(state.skipped_in_a_row + skip) * skip,
            average_norm=keep_if_good(average_norm, state.average_norm),
        )
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": rate,
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        return new_state, metrics

    return train_step


def _spikes(
    norm: Float[Array, ""], average: Float[Array, ""], updates: Float[Array, ""], factor: float
) -> Bool[Array, ""]:
    """Whether a norm is more than `factor` times the average of `updates` norms before it."""
    # An average that starts at 0 has to be divided by the weights that the norms have in it.
    corrected = average / (1 - _NORM_DECAY ** jnp.maximum(updates, 1.0))
    return (updates >= SPIKE_WARMUP) & (norm > factor * corrected)


def _accumulated(differentiate: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Makes a function that differentiates a loss go through a batch in parts."""

    def run(params: Arrays, frozen: Arrays, batch: Batch, key: PRNGKeyArray) -> Any:
        # Neighboring rows go to different parts: each part lies on all devices, as the batch does.
        cut = lambda rows: jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)

        def add(sums: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
            number, rows = part
            found = differentiate(params, frozen, rows, jax.random.fold_in(key, number))
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype) / parts, sums, found), None

        zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), params)
        sums, _ = jax.lax.scan(
            add, (jnp.float32(0), zeros), (jnp.arange(parts), jax.tree.map(cut, dict(batch)))
        )
        return sums

    return run


def _global_norm(gradients: Arrays) -> Float[Array, ""]:
    """Return the L2 norm over all gradients, accumulated in float32."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))
