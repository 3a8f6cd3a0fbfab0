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
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxgen.checkpoints import parse_json_object
from train import distributed, loop, run_folder
from train.checkpoint import CheckpointError, Checkpoints, abstract, without_stray_errors
from train.metrics import (
    JsonLines,
    Meter,
    OutputError,
    Row,
    TensorBoard,
    Writer,
    final_loss,
    read_rows,
    writing,
)
from train.options import Options
from train.profile import Profiler
from train.sharding import (
    Place,
    gather,
    largest_axis,
    make_mesh,
    place_batch,
    rows_shared,
    state_shardings,
)
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
        place: Where parameters lie on a mesh.
        traceable: Whether JAX can compile `make`, so that each device makes its part alone.
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
    place: Callable[[Mesh], Place] = largest_axis
    traceable: bool = False


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended.

    Attributes:
        folder: The run's folder.
        step: Steps done in total.
        first_step: Steps done before this call.
        stopped: "finished", "time limit", "SIGINT" or "SIGTERM".
        seconds: Time spent in total, with compilation.
        devices: Number of devices, those of all processes.
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
        ValueError: The devices are fewer than asked for, or do not fit the batch, each other or the
            processes.
    """
    processes, devices = jax.process_count(), config.devices or jax.device_count()
    if devices > jax.device_count():
        raise ValueError(f"there are {jax.device_count()} devices, got devices={config.devices}")
    if processes > 1 and devices < jax.device_count():
        raise ValueError(f"{processes} processes use all devices, got devices={config.devices}")
    mesh = make_mesh(config.fsdp, config.tensor, config.context_parallel, jax.devices()[:devices])
    groups = rows_shared(mesh)
    if groups % processes:
        raise ValueError(
            "tensor x context_parallel must fit the devices of one process, got "
            f"{config.tensor} x {config.context_parallel} and {jax.local_device_count()} devices"
        )
    if config.batch_size % groups:
        raise ValueError(
            "batch_size must be a multiple of the number of devices that share its rows, got "
            f"batch_size={config.batch_size} and {groups} devices"
        )
    return mesh


def carry_out(
    config: Options,
    plan: Plan,
    stream: Any,
    *,
    hooks: Sequence[Hook] = (),
    started: float | None = None,
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
) -> Finished:
    """Train in `config.output`, resuming exactly if the folder holds a run.

    Args:
        config: The options.
        plan: What is trained.
        stream: Iterator of batches, dictionaries of NumPy arrays, with `get_state()` and
            `set_state()`.
        hooks: Done between steps; in a resumed run their order tells which is which.
        started: `time.monotonic()` from which time counts; now by default.
        on_row: Called with each row of metrics.
        show_progress: Say what happens and show a progress bar, on stderr.

    Raises:
        ValueError: The options do not fit the devices, or processes differ in them or the data.
        FolderError: The folder holds a run with other options or something else, another run is at
            work there, or processes see different folders.
        FloatingPointError: `config.skips_in_a_row` updates in a row were not finite or spiking.
        CheckpointError: A checkpoint could not be saved, or there are some and none can be read.
        OutputError: Something else in the folder cannot be written.
    """
    started = time.monotonic() if started is None else started
    mesh = mesh_of(config)
    distributed.require_alike(run_folder.to_json(config), stream.get_state())
    with run_folder.reserved(config.output):
        return _carry_out(config, plan, stream, mesh, hooks, started, on_row, show_progress)


def _carry_out(
    config: Options,
    plan: Plan,
    stream: Any,
    mesh: Mesh,
    hooks: Sequence[Hook],
    started: float,
    on_row: Callable[[Row], None] | None,
    show_progress: bool,
) -> Finished:
    """Do what `carry_out` says in a folder that no other run uses."""
    say = printer(show_progress)
    with writing(config.output):
        folder = run_folder.claim(config, write=distributed.first())
    distributed.wait_for_all("claimed")  # before anything is written beside the configuration
    rate = config.learning_rate_schedule()
    optimizer = plan.optimizer(rate)
    seed = np.uint32(config.seed)

    def initialize(arrays: Arrays, seed: Array) -> TrainState:
        params = {name: array for name, array in arrays.items() if name in plan.trained}
        frozen = {name: array for name, array in arrays.items() if name not in plan.trained}
        return create_state(params, frozen, optimizer, seed)

    shapes = jax.eval_shape(initialize, dict(plan.shapes), seed)
    shardings = state_shardings(shapes, mesh, plan.place(mesh))
    update = make_train_step(
        plan.loss,
        optimizer,
        learning_rate=rate,
        ema_decay=config.ema_decay,
        accumulate=plan.accumulate,
        spike_factor=config.spike_factor,
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        learned = {name: array for name, array in batch.items() if name != "stop"}
        state, metrics = update(state, learned)
        return state, metrics | {"stop": jnp.max(batch["stop"])} if "stop" in batch else metrics

    train_step = jax.jit(
        step,
        in_shardings=(shardings, None),
        out_shardings=(shardings, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )

    def step_on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):  # not around the hooks, which run on one device
            return train_step(state, batch)

    with writing(folder / "checkpoints"):
        checkpoints = Checkpoints(folder / "checkpoints", config.keep)
    with checkpoints:
        restored = checkpoints.restore(abstract(shapes, shardings))
        if restored:
            state, extra = restored
            stream.set_state(extra["data"])
            say(f"resuming {folder} at step {int(state.step)} of {config.steps}")
        else:
            state = _new_state(plan, initialize, seed, shardings)
            extra = {"seconds": 0.0}
        first_step = int(state.step)
        ran_after = run_folder.steps_of_hooks(folder, len(hooks))

        def seconds() -> float:
            return extra["seconds"] + time.monotonic() - started

        def averaged(state: TrainState) -> Arrays:
            return gather(state.ema | state.frozen, mesh)

        def on_first(number: int, step: int, arrays: Arrays) -> None:
            if distributed.first():
                hooks[number].run(step, arrays)
                ran_after[number] = step
                run_folder.write_steps_of_hooks(folder, ran_after)
            distributed.wait_for_all(f"step {step}")  # or a long one looks like a step that hangs

        writers: list[Writer] = []
        if distributed.first():
            writers.append(JsonLines(folder / "metrics.jsonl", first_step))
        if distributed.first() and config.tensorboard:
            with writing(folder / "tensorboard"):
                writers.append(TensorBoard(folder / "tensorboard", first_step))
        millions = sum(array.size for array in shapes.params.values()) / 1e6
        say(
            f"{plan.title}: {millions:.2f} M trained parameters, {mesh.size} x "
            f"{jax.devices()[0].device_kind}; compiling the training step"
        )
        limit = config.time_limit
        profiler = Profiler(folder / "profile", config.profile_steps, write=distributed.first())
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
                    hung_after=config.hung_after,
                ),
                checkpoints=checkpoints,
                meter=Meter(config.batch_size, config.log_every, plan.per_example),
                writers=writers,
                hooks=[
                    loop.Hook(
                        hook.every,
                        lambda step, state, number=number: on_first(number, step, averaged(state)),
                        ran_after[number],
                    )
                    for number, hook in enumerate(hooks)
                ],
                extra=lambda: {"seconds": seconds()},
                on_row=on_row,
                show_progress=show_progress and distributed.first(),
                together=jax.process_count() > 1,
                profiler=profiler,
            )
        finally:
            profiler.close()
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


def _new_state(
    plan: Plan, initialize: Callable[..., TrainState], seed: Any, shardings: Any
) -> TrainState:
    """Return the state before the first step, on the mesh."""
    if plan.traceable:
        make = lambda seed: initialize(plan.make(), seed)
        return jax.jit(make, out_shardings=shardings)(seed)
    # As NumPy arrays, the same in every process.
    arrays = jax.device_get(plan.make()) if jax.process_count() > 1 else plan.make()
    return jax.jit(initialize, out_shardings=shardings)(arrays, seed)


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


def needs_export(config: Options, result: Finished) -> bool:
    """Whether a run that ended by itself has no complete export of its last step yet.

    The card is written last, so what it says holds for the rest. One that is complete stays as it
    is, with what was added to its card.
    """
    if result.stopped not in ("finished", "time limit"):
        return False
    path, new = result.folder / "export" / "card.json", run_folder.to_json(config)
    try:
        card = parse_json_object(path.read_bytes(), str(path))
    except (OSError, ValueError):
        return True
    old = card.get("config", new)
    made_steps = result.step > result.first_step
    other_dtype = old.get("export_dtype") != new.get("export_dtype")
    return made_steps or other_dtype or card.get("steps") != result.step


def printer(show: bool) -> Callable[[str], Any]:
    """Return a function that prints to stderr, in the first process, or does nothing."""
    if show and distributed.first():
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
    if the folder is not one for this run, is used by another, cannot be written, or holds
    checkpoints of which none can be read, or if too many updates were skipped.
    `train.distributed.PEER_FAILED` if another process of the run went away.
    """
    expected = run_folder.FolderError, CheckpointError, OutputError, FloatingPointError
    try:
        with without_stray_errors():
            stopped = distributed.ending_together(train, expected)
    except expected as error:
        raise SystemExit(str(error)) from None
    if stopped in ("SIGINT", "SIGTERM"):
        raise SystemExit(128 + signal.Signals[stopped])
