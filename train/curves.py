"""What the folders of runs hold, as curves over steps, tokens or seconds; for `train.plot`."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from train.metrics import Row, read_rows
from train.options import WATCHING

type Over = Literal["step", "tokens", "seconds"]
type Vector = Float[np.ndarray, " points"]

_METRICS, _OTHERS = "metrics.jsonl", ("validation.jsonl", "attention.jsonl")
_COUNTS = ("step", "steps", "layer")  # say where a row belongs
_STEADY = ("learning_rate", "skipped", "skipped_in_a_row", "memory_gib")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points from left to right.

    Attributes:
        across: Where they are, in steps or whatever `Run.position` makes of steps.
        middle: A value, or the mean of several at the same place: of layers or of runs.
        low: The smallest of these.
        high: The largest.
        weights: Steps that a value is the mean over.
    """

    across: Vector
    middle: Vector
    low: Vector
    high: Vector
    weights: Vector

    def __len__(self) -> int:
        return len(self.across)

    def smoothed(self, width: float) -> "Curve":
        """Average over windows of so many steps around each point, cut off at both ends."""
        left = np.searchsorted(self.across, self.across - width / 2, "left")
        right = np.searchsorted(self.across, self.across + width / 2, "right")

        def mean(values: Vector) -> Vector:
            sums = np.concatenate([[0.0], np.cumsum(values * self.weights)])
            counts = np.concatenate([[0.0], np.cumsum(self.weights)])
            return (sums[right] - sums[left]) / (counts[right] - counts[left])

        low, high = mean(self.low), mean(self.high)
        return Curve(self.across, mean(self.middle), low, high, self.weights)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a training program, finished or not.

    Attributes:
        folder: Its folder, as it was given.
        config: `config.json`; empty if there is none.
        rows: Those of each file of numbers, by its name.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: Mapping[str, list[Row]]

    @property
    def metrics(self) -> list[Row]:
        """The rows of training."""
        return self.rows[_METRICS]

    def names(self) -> list[str]:
        """Return what there are numbers of, each once."""
        rows = (row for rows in self.rows.values() for row in rows)
        return list(dict.fromkeys(name for row in rows for name in row if name not in _COUNTS))

    def is_noisy(self, name: str) -> bool:
        """Whether this is measured every few steps, and differs from step to step."""
        return name not in _STEADY and any(name in row for row in self.metrics)

    def curve(self, name: str) -> Curve:
        """Return a quantity over steps; values that were not finite are left out."""
        found: dict[int, list[float]] = {}
        steps: dict[int, int] = {}
        rows = next((r for r in self.rows.values() if any(name in row for row in r)), [])
        for row in rows:
            value = row.get(name)
            if value is not None and np.isfinite(value):
                found.setdefault(row["step"], []).append(value)
                steps[row["step"]] = row.get("steps") or 1
        order = sorted(found)
        summaries = ([f(found[step]) for step in order] for f in (np.mean, np.min, np.max))
        columns = (order, *summaries, [steps[step] for step in order])
        return Curve(*(np.array(column, np.float64) for column in columns))

    def position(self, over: Over) -> Callable[[Vector], Vector]:
        """Return the function from steps to what the horizontal axis shows.

        Seconds are those of the training steps: compiling, saving and validating do not count.

        Raises:
            ValueError: The files do not tell; the message says what is missing.
        """
        if over == "step":
            return lambda steps: steps
        batch_size = self._size("batch_size", over)
        if over == "tokens":
            tokens = float(batch_size * self._size("context", over))
            return lambda steps: steps * tokens
        speed = self.curve("examples_per_second")
        if not speed.middle.any():
            raise ValueError(
                f"{self.folder}: metrics.jsonl has no examples_per_second yet, which "
                "--over seconds needs; use --over step"
            )
        ends = np.array([0] + [row["step"] for row in self.metrics], np.float64)
        rates = np.interp(ends[1:], speed.across, np.maximum(speed.middle, 1e-9))
        seconds = np.concatenate([[0.0], np.cumsum(np.diff(ends) * batch_size / rates)])
        return lambda steps: np.interp(steps, ends, seconds)

    def _size(self, name: str, over: Over) -> int:
        size = self.config.get(name)
        if not isinstance(size, int):
            raise ValueError(
                f"{self.folder}: config.json does not say {name}, which --over {over} needs; "
                "use --over step"
            )
        return size


def load_run(folder: Path) -> Run:
    """Read the folder of a run, which may still be written.

    Raises:
        ValueError: It is no run, has no row yet, or a file is damaged; the message is one line.
    """
    if not (folder / _METRICS).is_file():
        what = "holds no run: there is no metrics.jsonl" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}")
    rows = {name: _numbers(folder / name) for name in (_METRICS, *_OTHERS)}
    if not rows[_METRICS]:
        raise ValueError(f"{folder / _METRICS} has no rows yet")
    path, config = folder / "config.json", {}
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} is damaged: it holds no options")
    return Run(folder, config, rows)


def _numbers(path: Path) -> list[Row]:
    rows = read_rows(path)
    for row in rows:
        for name, value in row.items():
            if value is not None and not isinstance(value, int | float):
                raise ValueError(f"{path}, step {row['step']}: {name} is no number: {value!r:.60}")
    return rows


def group_runs(runs: Sequence[Run], option: str | None) -> list[list[Run]]:
    """Return the runs in groups that are equal but for an option, in order; alone without one.

    Options that decide no update do not count.

    Raises:
        ValueError: A run does not have the option.
    """
    if option is None:
        return [[run] for run in runs]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if option not in run.config:
            raise ValueError(f"{run.folder}: config.json does not say {option}; --group needs it")
        counts = {n: v for n, v in run.config.items() if n not in WATCHING and n != option}
        groups.setdefault(json.dumps(counts, sort_keys=True), []).append(run)
    return list(groups.values())


def label_runs(runs: Sequence[Run], without: Collection[str] = ()) -> list[str]:
    """Return for each run the options in which it differs from others, or its folder.

    Args:
        runs: The runs.
        without: Options that are not to appear.
    """
    names = dict.fromkeys(name for run in runs for name in run.config if name not in without)
    texts = lambda name: [_shown(run.config[name]) for run in runs if name in run.config]
    differing = [name for name in names if len(set(texts(name))) > 1]
    # What decides no update is told only of runs that have no other difference.
    for chosen in ([name for name in differing if name not in WATCHING], differing):
        labels = [
            ", ".join(f"{name}={_shown(run.config[name])}" for name in chosen if name in run.config)
            for run in runs
        ]
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    named = zip((run.folder.as_posix() for run in runs), labels, strict=True)
    return [", ".join(filter(None, parts)) for parts in named]


def _shown(value: Any) -> str:
    match value:
        case str():
            return value.rstrip("/").rpartition("/")[2]
        case float():
            return f"{value:g}"
        case list():
            return ",".join(map(_shown, value))
        case _:
            return json.dumps(value)


def merge_curves(curves: Sequence[Curve]) -> Curve:
    """Return mean, smallest and largest value of several curves where all have values."""
    if len(curves) == 1:
        return curves[0]
    first = max((curve.across[0] for curve in curves if len(curve)), default=np.inf)
    last = min((curve.across[-1] if len(curve) else -np.inf for curve in curves), default=0.0)
    across = np.unique(np.concatenate([curve.across for curve in curves]))
    across = across[(across >= first) & (across <= last)]
    at = lambda part: np.array([np.interp(across, c.across, getattr(c, part)) for c in curves])
    if not len(across):
        return Curve(*[across] * 5)
    low, high = at("low").min(0), at("high").max(0)
    return Curve(across, at("middle").mean(0), low, high, np.ones_like(across))
