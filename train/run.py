"""One training run in its folder: a mesh, a compiled step, checkpoints, metrics, hooks.

What is trained is a `Plan`. A program makes one (`train.text_to_image`, `train.text_to_video`), or
one for each thing that it trains (`train.sla2`).
"""

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from train import loop, run_folder
from train.checkpoint import Checkpoints, abstract
from train.metrics import JsonLines, Meter, Row, TensorBoard, Writer, final_loss, read_rows
from train.options import Options
from train.sharding import BATCH_SPEC, gather, make_mesh, place_batch, state_shardings
from train.state import (
    Arrays,
    Batch,
    Loss,
    Metrics,
    Skeleton,
    TrainState,
    create_state,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        title: What to call it in messages.
        skeleton: The module that hooks get; the names of its arrays.
        shapes: Shape and dtype of every array by name: those of the skeleton, and more if the loss
            needs them.
        make: Makes these arrays for a new run; not called when one is resumed.
        trained: Names of those that are trained.
        loss: Gets the trained arrays and the others.
        optimizer: Made for a learning rate.
        accumulate: Parts of a batch that are computed one after the other.
        per_example: Speeds to report besides examples a second, see `train.metrics.Meter`.
    """

    title: str
    skeleton: Skeleton
    shapes: Mapping[str, Any]
    make: Callable[[], Arrays]
    trained: frozenset[str]
    loss: Loss
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    accumulate: int = 1
    per_example: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended.

    Attributes:
        folder: The run's folder.
        step: Steps done in total.
        first_step: Steps done before this call.
        stopped: "finished", "time limit", "SIGINT" or "SIGTERM".
        seconds: Time spent in total, with compilation.
        devices: Number of devices.
        rows: The rows of `metrics.jsonl`.
        arrays: Averages of what was trained, and everything else, by name; NumPy.
        state: The last training state, on the mesh.
    """

    folder: Path
    step: int
    first_step: int
    stopped: loop.StopReason
    seconds: float
    devices: int
    rows: list[Row]
    arrays: Arrays = dataclasses.field(repr=False)
    state: TrainState = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Hook:
    """Done every `every` steps (0: never) and after the last: `run(step, averaged arrays)`."""

    every: int
    run: Callable[[int, Arrays], None]


def mesh_of(config: Options) -> Mesh:
    """Return the mesh that the options ask for.

    Raises:
        NotImplementedError: JAX was started with several processes.
        ValueError: More devices than there are, or the batch does not fit them.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(f"training runs in one process, got {jax.process_count()}")
    if config.devices > jax.device_count():
        raise ValueError(f"there are {jax.device_count()} devices, got devices={config.devices}")
    mesh = make_mesh(config.fsdp, jax.devices()[: config.devices or None])
    if config.batch_size % mesh.size:
        raise ValueError(
            "batch_size must be a multiple of the number of devices, got "
            f"batch_size={config.batch_size} and {mesh.size} devices"
        )
    return mesh


def carry_out(
    config: Options,
    plan: Plan,
    stream: Any,
    *,
    hooks: Sequence[Hook] = (),
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
) -> Finished:
    """Train in `config.output`, resuming exactly if the folder holds a run.

    Args:
        config: The options.
        plan: What is trained.
        stream: Iterator of batches, dictionaries of NumPy arrays, with `get_state()` and
            `set_state()`.
        hooks: Done between steps.
        on_row: Called with each row of metrics.
        show_progress: Say what happens and show a progress bar, on stderr.

    Raises:
        ValueError: The options do not fit the devices, or the folder holds a run with others.
        FloatingPointError: `config.skips_in_a_row` updates in a row were not finite.
    """
    started, say = time.monotonic(), printer(show_progress)
    mesh = mesh_of(config)
    folder = run_folder.claim(config)
    rate = config.learning_rate_schedule()
    optimizer = plan.optimizer(rate)
    seed = jnp.uint32(config.seed)

    def initialize(arrays: Arrays, seed: Array) -> TrainState:
        params = {name: array for name, array in arrays.items() if name in plan.trained}
        frozen = {name: array for name, array in arrays.items() if name not in plan.trained}
        return create_state(params, frozen, optimizer, seed)

    shapes = jax.eval_shape(initialize, dict(plan.shapes), seed)
    shardings = state_shardings(shapes, mesh)
    step = make_train_step(
        plan.loss,
        optimizer,
        learning_rate=rate,
        ema_decay=config.ema_decay,
        accumulate=plan.accumulate,
    )
    train_step = jax.jit(
        step,
        in_shardings=(shardings, jax.NamedSharding(mesh, BATCH_SPEC)),
        out_shardings=(shardings, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )

    def step_on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):  # not around the hooks, which run on one device
            return train_step(state, batch)

    with Checkpoints(folder / "checkpoints", config.keep) as checkpoints:
        restored = checkpoints.restore(abstract(shapes, shardings))
        if restored:
            state, extra = restored
            stream.set_state(extra["data"])
            say(f"resuming {folder} at step {int(state.step)} of {config.steps}")
        else:
            state = jax.jit(initialize, out_shardings=shardings)(plan.make(), seed)
            extra = {"seconds": 0.0}
        first_step = int(state.step)

        def seconds() -> float:
            return extra["seconds"] + time.monotonic() - started

        def averaged(state: TrainState) -> Arrays:
            return gather(state.ema | state.frozen, mesh)

        writers: list[Writer] = [JsonLines(folder / "metrics.jsonl", first_step)]
        if config.tensorboard:
            writers.append(TensorBoard(folder / "tensorboard", first_step))
        millions = sum(array.size for array in shapes.params.values()) / 1e6
        say(
            f"{plan.title}: {millions:.2f} M trained parameters, {mesh.size} x "
            f"{jax.devices()[0].device_kind}; compiling the training step"
        )
        limit = config.time_limit
        try:
            state, stopped = loop.run(
                state,
                step_on_mesh,
                stream,
                lambda batch: place_batch(batch, mesh),
                limits=loop.Limits(
                    steps=config.steps,
                    save_every=config.save_every,
                    skips_in_a_row=config.skips_in_a_row,
                    deadline=None if limit is None else started + limit,
                ),
                checkpoints=checkpoints,
                meter=Meter(config.batch_size, config.log_every, plan.per_example),
                writers=writers,
                hooks=[
                    loop.Hook(
                        hook.every,
                        lambda step, state, hook=hook: hook.run(step, averaged(state)),
                    )
                    for hook in hooks
                ],
                extra=lambda: {"seconds": seconds()},
                on_row=on_row,
                show_progress=show_progress,
            )
        finally:
            for writer in writers:
                writer.close()
        say(f"stopped ({stopped}) at step {int(state.step)} after {seconds():.0f} s")
    return Finished(
        folder=folder,
        step=int(state.step),
        first_step=first_step,
        stopped=stopped,
        seconds=seconds(),
        devices=mesh.size,
        rows=read_rows(folder / "metrics.jsonl"),
        arrays=averaged(state),
        state=state,
    )


def run_record(config: Options, result: Finished) -> dict[str, Any]:
    """Return what every model card says of a run: how, how long, and the losses it reached."""
    validation = read_rows(result.folder / "validation.jsonl")
    return {
        "steps": result.step,
        "command": config.command(),
        "config": run_folder.to_json(config),
        "final_loss": final_loss(result.rows),
        "validation": validation[-1] if validation else None,
        "updates_skipped": result.rows[-1]["skipped"] if result.rows else 0,
        "hardware": f"{result.devices} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "seconds": round(result.seconds, 1),
    }


def printer(show: bool) -> Callable[[str], Any]:
    """Return a function that prints to stderr, or does nothing."""
    if show:
        return lambda message: print(message, file=sys.stderr, flush=True)
    return lambda message: None


def parse(config: type[Any]) -> Any:
    """Return the options of the command line; `config` is a dataclass of `Options`."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError('the command line needs tyro: pip install "jaxgen[train]"') from error
    return tyro.cli(config, prog=f"python -m {config.program}")


def as_command(train: Callable[[], loop.StopReason]) -> None:
    """Train as a command, whose exit code tells how it ended.

    0 when finished or out of time, 128 + the signal's number after a signal, and 1 with a message
    if the folder holds a run with other options.
    """
    try:
        stopped = train()
    except run_folder.ConfigChangedError as error:
        raise SystemExit(str(error)) from None
    if stopped in ("SIGINT", "SIGTERM"):
        raise SystemExit(128 + signal.Signals[stopped])
