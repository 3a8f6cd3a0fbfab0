"""The training loop: it hands batches to a compiled step and reads results two steps late.

Reading late keeps the device busy: while the host waits for the metrics of one step, the next
ones are already queued. It also bounds how far the host runs ahead, so clocks and limits hold.
"""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from train.checkpoint import Checkpoints
from train.metrics import Meter, Row, Writer
from train.profile import Profiler, peak_memory
from train.state import Batch, Metrics, TrainState
from train.watchdog import Watchdog

STEPS_IN_FLIGHT = 2
"""Steps that may be queued on the device while the host prepares the next batch."""

type StopReason = Literal["finished", "time limit", "SIGINT", "SIGTERM"]
STOP_REASONS: tuple[StopReason | None, ...] = (None, "finished", "time limit", "SIGINT", "SIGTERM")


@dataclass(frozen=True)
class Hook:
    """Something to do every `every` steps (0: never) and after the last: `run(step, state)`.

    `ran_after` is the step after which it last ran before this call, 0 if that is not known. What
    was due with the checkpoint that is resumed, and did not come to its end, is done first.
    """

    every: int
    run: Callable[[int, TrainState], None]
    ran_after: int = 0

    def due(self, step: int, completed: bool) -> bool:
        """Whether it is to run after a step, which may have completed the training."""
        return self.every > 0 and (completed or step % self.every == 0)


@dataclass(frozen=True)
class Limits:
    """When to stop, to save and to give up.

    Attributes:
        steps: Total number of steps, those of resumed runs included.
        save_every: Steps between checkpoints.
        skips_in_a_row: Abort when so many updates in a row were skipped.
        deadline: Value of `time.monotonic()` after which no step is started; None: no limit.
        hung_after: Seconds without a step's result after which `Watchdog` reports; None: never.
    """

    steps: int
    save_every: int
    skips_in_a_row: int
    deadline: float | None = None
    hung_after: float | None = None


def run(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Any,
    place: Callable[[Any], Batch],
    *,
    limits: Limits,
    checkpoints: Checkpoints,
    meter: Meter,
    writers: Sequence[Writer] = (),
    hooks: Sequence[Hook] = (),
    extra: Callable[[], dict[str, Any]] = dict,
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
    together: bool = False,
    profiler: Profiler | None = None,
) -> tuple[TrainState, StopReason]:
    """Train until `limits.steps`, the deadline, or SIGINT or SIGTERM, and save a checkpoint.

    Args:
        state: Where to start; donated, so do not use it afterwards.
        train_step: Compiled; takes and returns the state, and metrics that are scalars on device.
        batches: Iterator with `get_state()`, whose value is saved with each checkpoint.
        place: Sends a batch to the devices without waiting.
        limits: When to stop, save and give up.
        checkpoints: Where to save.
        meter: Averages the metrics into rows.
        writers: Get each row.
        hooks: Run between steps, after the checkpoint of that step, with its state.
        extra: More to save with each checkpoint, as JSON; called when saving.
        on_row: Called with each row, for instance to draw a curve.
        show_progress: Show a progress bar on stderr.
        together: Several processes train: `place` gets a batch with the array "stop", which
            `train_step` reduces to the metric "stop", see `stop_flag`. All processes stop after the
            same step, a few steps after one of them wants to.
        profiler: Traces some of the steps.

    Returns:
        The last state, and why training stopped.

    Raises:
        FloatingPointError: Too many updates in a row were not finite or spiking. They left the
            parameters as they were, also in a checkpoint that was saved among them.
        CheckpointError: A checkpoint could not be saved.
    """
    done, profiler = int(state.step), profiler or Profiler()
    in_flight: deque[tuple[int, Metrics]] = deque()
    faults: set[str] = set()  # of the updates skipped in a row
    agreed: deque[StopReason | None] = deque([None], maxlen=1)
    reason = "finished" if done >= limits.steps else None

    with (
        watch_signals() as received,
        Watchdog(limits.hung_after) as watchdog,
        _progress_bar(done, limits.steps, show_progress) as bar,
    ):

        def read_oldest(last: bool) -> None:
            step, on_device = in_flight.popleft()
            metrics = {name: value.item() for name, value in on_device.items()}
            watchdog.saw(step)
            agreed.append(STOP_REASONS[metrics.pop("stop", 0)])
            row = meter.add(step, metrics, last)
            bar.update(1)
            if row:
                row |= peak_memory()
                bar.set_postfix(_summary(row), refresh=False)
                for writer in writers:
                    writer.write(row)
                if on_row:
                    on_row(row)
            if not metrics["skipped_in_a_row"]:
                faults.clear()
                return
            faults.add(_fault(metrics))
            if metrics["skipped_in_a_row"] >= limits.skips_in_a_row:
                raise FloatingPointError(
                    f"aborted at step {step}: {' or '.join(sorted(faults))} in "
                    f"{limits.skips_in_a_row} steps in a row; the newest checkpoint is step "
                    f"{max(checkpoints.steps(), default=0)}"
                )

        for hook in hooks:
            if done and hook.ran_after != done and hook.due(done, reason is not None):
                hook.run(done, state)
        profiler.switch(done)
        while reason is None:
            batch, wanted = next(batches), received() or _reached(done, limits)
            if together:
                batch = batch | {"stop": stop_flag(wanted, batch)}
            with profiler.step(done + 1):
                state, metrics = train_step(state, place(batch))
            for value in metrics.values():
                value.copy_to_host_async()
            done += 1
            in_flight.append((done, metrics))

            if together:
                reason = agreed[-1] or ("finished" if done >= limits.steps else None)
            else:
                reason = received() or _reached(done, limits)
            completed = reason in ("finished", "time limit")
            due = [hook for hook in hooks if hook.due(done, completed)]
            saving = reason is not None or done % limits.save_every == 0
            # The first step compiles; the meter's clock starts when it is done.
            wait = saving or due or meter.untouched or profiler.due(done)
            while len(in_flight) > (0 if wait else STEPS_IN_FLIGHT):
                read_oldest(last=reason is not None and len(in_flight) == 1)
            with meter.paused(), watchdog.paused():
                profiler.switch(done)
                if saving:
                    checkpoints.save(done, state, {"data": batches.get_state()} | extra())
                for hook in due:
                    hook.run(done, state)
    checkpoints.wait()
    return state, reason


def stop_flag(reason: StopReason | None, batch: Mapping[str, Any]) -> np.ndarray:
    """Return for each row of a batch the number of a reason in `STOP_REASONS`; the largest wins."""
    rows = len(next(iter(batch.values())))
    return np.full(rows, STOP_REASONS.index(reason), np.int32)


def _reached(done: int, limits: Limits) -> StopReason | None:
    """Return which limit ends training after `done` steps, if any."""
    if done >= limits.steps:
        return "finished"
    if limits.deadline is not None and time.monotonic() >= limits.deadline:
        return "time limit"
    return None


def _fault(metrics: dict[str, float]) -> str:
    """Return why an update was skipped."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
        return "the gradient norm was spiking"
    return "loss or gradients were not finite"


@contextmanager
def watch_signals() -> Iterator[Callable[[], Literal["SIGINT", "SIGTERM"] | None]]:
    """Turn the first SIGINT or SIGTERM into a name that the yielded function returns.

    A second signal acts as it would have before. Outside the main thread, where Python allows no
    signal handlers, nothing is watched.
    """
    received: list[Literal["SIGINT", "SIGTERM"]] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        received.append("SIGINT" if number == signal.SIGINT else "SIGTERM")
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()


def _progress_bar(done: int, steps: int, show: bool) -> Any:
    """Return a tqdm bar, silent if not wanted, and rarely drawn in log files."""
    from tqdm import tqdm

    return tqdm(
        total=steps,
        initial=done,
        unit="step",
        dynamic_ncols=True,
        disable=not show,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        maxinterval=60.0,
    )


def _summary(row: Row) -> dict[str, str]:
    """Return what the progress bar shows."""
    shown = {}
    if row["loss"] is not None:
        shown["loss"] = f"{row['loss']:.4f}"
    for name, value in row.items():
        if name.endswith("_per_second") and value is not None:
            shown[f"{name.removesuffix('_per_second')}/s"] = f"{value:,.0f}"
    if row.get("mfu") is not None:
        shown["MFU"] = f"{row['mfu']:.1%}"
    if "memory_gib" in row:
        shown["memory"] = f"{row['memory_gib']:.1f} GiB"
    if row["skipped"]:
        shown["skipped"] = str(row["skipped"])
    return shown
