"""The training loop: it hands batches to a compiled step and reads results two steps late.

Reading late keeps the device busy: while the host waits for the metrics of one step, the next
ones are already queued. It also bounds how far the host runs ahead, so clocks and limits hold.
"""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from train.checkpoint import Checkpoints
from train.metrics import Meter, Row, Writer
from train.state import Batch, Metrics, TrainState

STEPS_IN_FLIGHT = 2
"""Steps that may be queued on the device while the host prepares the next batch."""

type StopReason = Literal["finished", "time limit", "SIGINT", "SIGTERM"]


@dataclass(frozen=True)
class Hook:
    """Something to do every `every` steps (0: never) and after the last: `run(step, state)`."""

    every: int
    run: Callable[[int, TrainState], None]


@dataclass(frozen=True)
class Limits:
    """When to stop, to save and to give up.

    Attributes:
        steps: Total number of steps, those of resumed runs included.
        save_every: Steps between checkpoints.
        skips_in_a_row: Abort when so many updates in a row were not finite.
        deadline: Value of `time.monotonic()` after which no step is started; None: no limit.
    """

    steps: int
    save_every: int
    skips_in_a_row: int
    deadline: float | None = None


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
        hooks: Run between steps, with the state of that step.
        extra: More to save with each checkpoint, as JSON; called when saving.
        on_row: Called with each row, for instance to draw a curve.
        show_progress: Show a progress bar on stderr.

    Returns:
        The last state, and why training stopped.

    Raises:
        FloatingPointError: Too many updates in a row were not finite. They left the parameters as
            they were, also in a checkpoint that was saved among them.
    """
    done = int(state.step)
    in_flight: deque[tuple[int, Metrics]] = deque()
    reason = "finished" if done >= limits.steps else None

    with watch_signals() as received, _progress_bar(done, limits.steps, show_progress) as bar:

        def read_oldest(last: bool) -> None:
            step, on_device = in_flight.popleft()
            metrics = {name: value.item() for name, value in on_device.items()}
            row = meter.add(step, metrics, last)
            bar.update(1)
            if row:
                bar.set_postfix(_summary(row), refresh=False)
                for writer in writers:
                    writer.write(row)
                if on_row:
                    on_row(row)
            if metrics["skipped_in_a_row"] >= limits.skips_in_a_row:
                raise FloatingPointError(
                    f"aborted at step {step}: loss or gradients were not finite in "
                    f"{limits.skips_in_a_row} steps in a row; the newest checkpoint is step "
                    f"{max(checkpoints.steps(), default=0)}"
                )

        while reason is None:
            state, metrics = train_step(state, place(next(batches)))
            for value in metrics.values():
                value.copy_to_host_async()
            done += 1
            in_flight.append((done, metrics))

            reason = received() or _reached(done, limits)
            completed = reason in ("finished", "time limit")
            due = [hook for hook in hooks if hook.every and (completed or done % hook.every == 0)]
            saving = reason is not None or done % limits.save_every == 0
            # The first step compiles; the meter's clock starts when it is done.
            wait = saving or due or meter.untouched
            while len(in_flight) > (0 if wait else STEPS_IN_FLIGHT):
                read_oldest(last=reason is not None and len(in_flight) == 1)
            with meter.paused():
                if saving:
                    checkpoints.save(done, state, {"data": batches.get_state()} | extra())
                for hook in due:
                    hook.run(done, state)
    checkpoints.wait()
    return state, reason


def _reached(done: int, limits: Limits) -> StopReason | None:
    """Return which limit ends training after `done` steps, if any."""
    if done >= limits.steps:
        return "finished"
    if limits.deadline is not None and time.monotonic() >= limits.deadline:
        return "time limit"
    return None


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
    if row["skipped"]:
        shown["skipped"] = str(row["skipped"])
    return shown
