"""Table and plot of `train.configs.rcd_experiment`: `python -m train.rcd_report --help`."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.decoding_sweep import Point, accuracy_at, steps_at
from train.metrics import mean_and_deviation

type Found = Mapping[str, Sequence[Point]]
"""Points by the folder of their run, a method and a seed: rcd-own-0."""

STRICT, LOOSE = 0.9, 0.5
"""Thresholds of SeqD at whose steps methods are compared."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare RCD with SeqD again, from the points of earlier runs.

        python -m train.rcd_report train/configs/results/rcd_experiment.json
            --parts three_seeds/runs/arithmetic three_seeds/runs/sudoku --plot rcd.png

    prints the tables beside the figure of docs/residual_context.md, and draws it (there without
    rcd-stale-restart).
    """

    results: Path
    """File results.json of an experiment, or a record with several."""
    parts: tuple[str, ...] = ("",)
    """Where points are in a record: keys with slashes between them; a table and a panel each."""
    methods: tuple[str, ...] = ()
    """Methods to show; none: all."""
    plot: Path | None = None
    """Draw accuracy over steps there."""

    def __post_init__(self):
        if not self.parts:
            raise ValueError("parts must name at least one, got none")


def read(report: Report) -> dict[str, Found]:
    """Return the points of each part, by its name.

    Raises:
        ValueError: No such part, one without runs, or no such method in it.
    """
    found: dict[str, Found] = {}
    record = json.loads(report.results.read_text(encoding="utf-8"))
    for part in report.parts:
        points = record
        for key in filter(None, part.split("/")):
            if not isinstance(points, dict) or key not in points:
                raise ValueError(
                    f"{report.results} has no part {part!r}: instead of {key!r} there are "
                    f"{_names(points)}"
                )
            points = points[key]
        if not (isinstance(points, dict) and all(isinstance(p, list) for p in points.values())):
            raise ValueError(
                f"part {part!r} of {report.results} is not of runs: in it are {_names(points)}"
            )
        present = methods_of(points)
        unknown = [method for method in report.methods if method not in present]
        if unknown:
            raise ValueError(f"methods must be among {', '.join(present)}, got {unknown}")
        shown = report.methods or present
        found[part] = {name: line for name, line in points.items() if _method(name) in shown}
    return found


def _names(part: Any) -> str:
    return ", ".join(part) if isinstance(part, dict) else "points"


def methods_of(found: Found) -> list[str]:
    """Return the methods in order, the baseline first."""
    names = dict.fromkeys(map(_method, found))
    return sorted(names, key=lambda method: (not method.startswith("seqd"), method))


def _method(name: str) -> str:
    return name.rpartition("-")[0]


def table(found: Found) -> str:
    """Return a Markdown table of means over seeds, with standard deviations between them.

    The last columns compare with SeqD of the same seed: points of accuracy at the steps that SeqD
    takes with thresholds of 0.9 and 0.5, if it was swept there, and the share of the steps of
    SeqD's best accuracy that the method needs to reach it. "(1 of 3)" is where one of three seeds
    has such a number.
    """
    lines = [
        "| method | seeds | best accuracy | at steps | over SeqD at its steps, 0.9 "
        "| at its steps, 0.5 | share of its steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in methods_of(found):
        rows = [_row(name, found) for name in found if _method(name) == method]
        best, steps, strict, loose, share = zip(*rows, strict=True)
        cells = [
            method,
            str(len(rows)),
            mean_and_deviation(100 * np.array(best), "{:.1f}", " %"),
            mean_and_deviation(np.array(steps), "{:.1f}"),
            _of_known(strict, "{:+.1f}"),
            _of_known(loose, "{:+.1f}"),
            _of_known(share, "{:.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(name: str, found: Found) -> tuple[float | None, ...]:
    """Return the numbers of one run."""
    points, baseline = found[name], found.get(f"seqd-{name.rpartition('-')[2]}")
    best = _best(points)
    if baseline is None or _method(name) == "seqd":
        return best["accuracy"], best["steps"], None, None, None
    gains = []
    for threshold in (STRICT, LOOSE):
        theirs = next((point for point in baseline if point["threshold"] == threshold), None)
        ours = None if theirs is None else accuracy_at(points, theirs["steps"])
        gain = None if theirs is None or ours is None else 100 * (ours - theirs["accuracy"])
        gains.append(gain)
    top = _best(baseline)
    needed = steps_at(points, top["accuracy"]) if top["accuracy"] else None
    share = None if needed is None else needed / top["steps"]
    return best["accuracy"], best["steps"], *gains, share


def _best(points: Sequence[Point]) -> Point:
    return max(points, key=lambda point: (point["accuracy"], -point["steps"]))


def _of_known(values: Sequence[float | None], form: str) -> str:
    """Return mean and deviation of the values there are, and how many if some are missing."""
    known = np.array([value for value in values if value is not None])
    some = f" ({len(known)} of {len(values)})" if 0 < len(known) < len(values) else ""
    return mean_and_deviation(known, form) + some


def draw(parts: Mapping[str, Found], path: Path) -> None:
    """Draw accuracy over steps: a panel a part, a line a method, a dot a seed and threshold."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(5.5 * len(parts), 4), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    methods = methods_of({name: line for found in parts.values() for name, line in found.items()})
    for panel, (part, found) in zip(panels, parts.items(), strict=True):
        for number, method in enumerate(methods):
            lines = [line for name, line in found.items() if _method(name) == method]
            if not lines:
                continue
            seeds = f"{len(lines)} seed{'s' * (len(lines) > 1)}"
            style = {"color": f"C{number}", "ls": "--" if method.startswith("seqd") else "-"}
            panel.plot(*_means(lines), label=f"{method}, {seeds}", **style)
            for line in lines:
                steps, accuracies = _across(line)
                panel.plot(steps, accuracies, ".", color=f"C{number}", ms=4, alpha=0.5)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:g}"))
        panel.set(xlabel="steps per answer", ylabel="right answers, %", title=part.split("/")[-1])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _across(line: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and accuracies in percent by rising threshold."""
    ordered = sorted(line, key=lambda point: point["threshold"])
    steps = np.array([point["steps"] for point in ordered])
    return steps, 100 * np.array([point["accuracy"] for point in ordered])


def _means(lines: Sequence[Sequence[Point]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over seeds at the thresholds that all of them have."""
    common = set.intersection(*({point["threshold"] for point in line} for line in lines))
    shown = [[point for point in line if point["threshold"] in common] for line in lines]
    steps, accuracies = zip(*map(_across, shown), strict=True)
    return np.mean(steps, axis=0), np.mean(accuracies, axis=0)


def main() -> None:
    """Take the options, print a table for each part, draw the plot."""
    import tyro

    form = tyro.conf.PositionalRequiredArgs[Report]
    report = tyro.cli(form, prog="python -m train.rcd_report")
    try:
        parts = read(report)
    except (OSError, ValueError) as error:
        sys.exit(f"train.rcd_report: {error}")
    for part, found in parts.items():
        print(f"{part}\n\n{table(found)}" if part else table(found))
    if report.plot is not None:
        draw(parts, report.plot)


if __name__ == "__main__":
    main()
