"""Training metrics: one JSON object a line, TensorBoard if wanted, and the means in between."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

type Row = dict[str, Any]
"""Numbers by name; None for what has no finite value."""


class OutputError(OSError):
    """A file of the run's folder cannot be written."""


class Writer(Protocol):
    """Anything that accepts a row of numbers; `row["step"]` counts from 1."""

    def write(self, row: Row) -> None:
        """Record one row."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class JsonLines:
    """Appends rows to a file. Rows after `from_step`, of a run now resumed there, are dropped.

    A value that is not finite is written as null, which keeps every line standard JSON.

    Raises:
        OutputError: The file cannot be written, here and in each method.
        ValueError: What is there is no file of metrics.
    """

    def __init__(self, path: Path, from_step: int = 0):
        self._path = path
        with writing(path):
            kept = [row for row in read_rows(path) if row["step"] <= from_step]
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(_line(row) for row in kept))
            temporary.replace(path)
            self._file = path.open("a")

    def write(self, row: Row) -> None:
        """Append one line and hand it to the operating system."""
        with writing(self._path):
            self._file.write(_line(row))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into one that says what to do about `path`.

    Raises:
        OutputError: Instead of another OSError.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; make room or give permission there, "
            "or choose another --output"
        ) from error


class TensorBoard:
    """Writes event files; needs the package tensorboardX.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, from_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard metrics need tensorboardX: pip install "jaxgen[train]"'
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def write(self, row: Row) -> None:
        """Add one scalar for each finite value except the step."""
        for name, value in row.items():
            if name != "step" and value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Meter:
    """Turns the metrics of single steps into one row every `every` steps.

    Losses and gradient norms are means over the finite steps since the last row; other values
    are the last ones. The speed counts neither the first step, which compiles, nor what happens
    under `paused`.

    Args:
        batch_size: Examples a step, for the speed.
        every: Steps a row.
        per_example: Other speeds by name: how much of it an example a second is.
    """

    def __init__(
        self, batch_size: int, every: int, per_example: Mapping[str, float] = MappingProxyType({})
    ):
        self._batch_size, self._every, self._per_example = batch_size, every, dict(per_example)
        self._steps: list[Mapping[str, float]] = []
        self._clock: float | None = None
        self._timed_steps = 0

    @property
    def untouched(self) -> bool:
        """Whether no step was added yet."""
        return self._clock is None

    def add(self, step: int, metrics: Mapping[str, float], last: bool = False) -> Row | None:
        """Take in the metrics of a finished step; return a row if one is due."""
        self._steps.append(metrics)
        now = time.perf_counter()
        if self._clock is None:
            self._clock = now
        else:
            self._timed_steps += 1
        if step % self._every and not last:
            return None
        row: Row = {"step": step, "steps": len(self._steps)}
        row |= self._steps[-1]
        for name in ("loss", "gradient_norm"):
            row[name] = _finite_mean([metrics[name] for metrics in self._steps])
        elapsed = now - self._clock
        speed = self._timed_steps * self._batch_size / elapsed if elapsed > 0 else 0.0
        for name, share in {"examples_per_second": 1.0, **self._per_example}.items():
            row[name] = speed * share if self._timed_steps else None
        self._steps, self._clock, self._timed_steps = [], now, 0
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the speed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._clock is not None:
                self._clock += time.perf_counter() - start


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a metrics file; a last line cut off by a crash is left out.

    Raises:
        ValueError: Another line is no row; the message names it.
    """
    rows = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode())
        except ValueError:  # no JSON, or no UTF-8
            row = None
            if number == len(lines):
                break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            text = line[:60].decode(errors="replace")
            raise ValueError(f"{path}, line {number}: not a row of metrics: {text!r}")
        rows.append(row)
    return rows


def final_loss(rows: list[Row], steps: int = 200) -> float | None:
    """Return the mean loss over about the last `steps` steps of `rows`; None without losses.

    A row that does not say over how many steps it is a mean counts as one.
    """
    recent = [row for row in rows if row["step"] > rows[-1]["step"] - steps]
    losses = [(row["loss"], row.get("steps") or 1) for row in recent if row.get("loss") is not None]
    count = sum(number for _, number in losses)
    return sum(loss * number for loss, number in losses) / count if count else None


def mean_and_deviation(values: Sequence[float] | np.ndarray, form: str, unit: str = "") -> str:
    """Return "mean ± standard deviation unit", the latter of several values; "" of none."""
    if not len(values):
        return ""
    deviation = form.format(np.std(values, ddof=1)).lstrip("+") if len(values) > 1 else ""
    return form.format(np.mean(values)) + (f" ± {deviation}" if deviation else "") + unit


def _finite_mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _line(row: Row) -> str:
    finite = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
