"""Runs of training programs drawn over each other: `python -m train.plot --help`."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.curves import Curve, Run, group_runs, label_runs, load_run, merge_curves
from train.metrics import final_loss

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any color vision tell apart, but for yellow."""
_DASHES = ("-", "--", ":", "-.")
_SUFFIXES = (".png", ".svg")
_VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the metrics of runs over each other, and print how far they got.

    Runs may still be going on. The legend names the options in which they differ. The same with
    exact and with INT8 attention, three seeds each, as means and ranges:

        python -m train.plot runs/exact-0 runs/exact-1 runs/exact-2 runs/int8-0 runs/int8-1
            runs/int8-2 --group seed --show loss gradient_norm --output int8.png
    """

    runs: tuple[Path, ...]
    """Folders of runs of `train.language_model` and other programs in `train`."""
    output: Path = Path("plot.png")
    """File of the picture: PNG or SVG."""
    show: tuple[str, ...] = ("loss",)
    """What to draw, each in a panel: loss (of training, and as points of validation) or anything
    else in the runs' metrics.jsonl, validation.jsonl or attention.jsonl, such as gradient_norm,
    tokens_per_second, mfu, sigma_q, dq_error; of layers mean and range."""
    over: Literal["step", "tokens", "seconds"] = "step"
    """Horizontal axis; seconds are those of training steps alone."""
    smooth: float | None = None
    """Steps to average over, 0: none; None: 2 % of the longest run."""
    group: str | None = None
    """Option, such as seed: of runs that differ in it alone, draw mean and range."""
    log_x: bool = False
    """Logarithmic horizontal axis."""
    log_y: bool = False
    """Logarithmic vertical axes."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that are drawn as one line.

    Attributes:
        label: What the legend says.
        runs: One, or several of which the mean is drawn.
        style: Keywords of a line.
    """

    label: str
    runs: Sequence[Run]
    style: dict[str, Any]

    def curve(self, name: str, plot: Plot, smooth: float = 0.0) -> Curve:
        """Return a quantity over what the horizontal axis shows."""
        curves = []
        for run in self.runs:
            curve = run.curve(name)
            if smooth and run.is_noisy(name):
                curve = curve.smoothed(smooth)
            curves.append(dataclasses.replace(curve, across=run.position(plot.over)(curve.across)))
        return merge_curves(curves)


def read_groups(plot: Plot) -> list[Group]:
    """Read the runs that are to be drawn, each alone or in its group.

    Raises:
        ValueError: A folder is no run, a file is damaged, or the runs do not hold what is asked
            for; the message is one line.
    """
    if plot.output.suffix not in _SUFFIXES:
        raise ValueError(f"output must end in {' or '.join(_SUFFIXES)}, got {plot.output}")
    if plot.smooth is not None and not 0 <= plot.smooth < math.inf:
        raise ValueError(f"smooth must be a number of steps, got {plot.smooth}")
    if not plot.runs or not plot.show:
        raise ValueError("give folders of runs, and something to show; --help has an example")
    runs = [load_run(folder) for folder in plot.runs]
    known = dict.fromkeys(name for run in runs for name in run.names())
    for name in plot.show:
        if name not in known:
            raise ValueError(f"no run holds {name!r}; they hold {', '.join(known)}")
    for run in runs:
        run.position(plot.over)
    members = group_runs(runs, plot.group)
    labels = label_runs([group[0] for group in members], without=[plot.group or ""])
    return [
        Group(
            label if len(group) == 1 else f"{label} ({len(group)} runs)",
            group,
            {
                "color": _COLORS[number % len(_COLORS)],
                "linestyle": _DASHES[number // len(_COLORS) % len(_DASHES)],
                # Thinner and thinner: a line that lies on another one leaves its rim to be seen.
                "linewidth": 2.2 - 1.1 * number / max(1, len(members) - 1),
            },
        )
        for number, (label, group) in enumerate(zip(labels, members, strict=True))
    ]


def make_figure(plot: Plot, groups: Sequence[Group]) -> Any:
    """Return a matplotlib figure with a panel for each name in `plot.show`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "jaxgen[train]"') from error
    count = len(plot.show)
    columns = count if count <= 3 else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (7.5, 4.8) if columns == 1 else (4.8 * columns, 3.6 * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(panels, plot.show, strict=False):
        _draw_panel(axes, plot, name, groups)
    for axes in panels[count:]:
        axes.set_axis_off()
    _add_legend(figure, groups)
    return figure


def _draw_panel(axes: Any, plot: Plot, name: str, groups: Sequence[Group]) -> None:
    smooth = plot.smooth
    if smooth is None:
        smooth = 0.02 * max(run.metrics[-1]["step"] for group in groups for run in group.runs)
    drawn = []
    for group in groups:
        curve = group.curve(name, plot, smooth)
        few = len(curve) < (2 if name == "loss" else 40)
        dots = {"marker": "o", "markersize": 3.5} if few else {}
        axes.plot(curve.across, curve.middle, **dots, **group.style)
        raw, color = group.curve(name, plot), {"color": group.style["color"], "linewidth": 0}
        if (curve.low < curve.high).any():
            axes.fill_between(curve.across, curve.low, curve.high, alpha=0.2, **color)
        elif smooth:
            style = group.style | {"linewidth": 0.7, "alpha": 0.25, "linestyle": "-", "zorder": 1}
            axes.plot(raw.across, raw.middle, **style)
            drawn.append(raw)
        drawn.append(curve)
        if name == "loss":
            drawn.append(_draw_validation(axes, plot, group))
    axes.set_xlabel(
        {"step": "steps", "seconds": "seconds of training steps"}.get(plot.over, plot.over)
    )
    axes.set_title(_title(name, groups), loc="left", fontsize="medium")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _set_scales(axes, plot, drawn)


def _draw_validation(axes: Any, plot: Plot, group: Group) -> Curve:
    curve = group.curve(_VALIDATION, plot)
    bars = np.stack([curve.middle - curve.low, curve.high - curve.middle])
    style = {"color": group.style["color"], "markeredgecolor": "white", "markeredgewidth": 0.8}
    size = 3.5 + 1.5 * group.style["linewidth"]
    axes.errorbar(
        curve.across, curve.middle, bars, fmt="o", markersize=size, elinewidth=1, zorder=3, **style
    )
    return curve


def _title(name: str, groups: Sequence[Group]) -> str:
    text = name.replace("_", " ")
    if name == "loss" and any(_VALIDATION in run.names() for g in groups for run in g.runs):
        return "loss: training (lines), validation (points)"
    return f"{text}: mean and range of the layers" if _of_layers(name, groups) else text


def _of_layers(name: str, groups: Sequence[Group]) -> bool:
    rows = (row for group in groups for run in group.runs for row in run.rows["attention.jsonl"])
    return any(name in row for row in rows)


def _set_scales(axes: Any, plot: Plot, curves: Sequence[Curve]) -> None:
    """Log scales if wanted, and limits that the spike of the first steps does not decide."""
    from matplotlib.ticker import EngFormatter, LogFormatter

    if plot.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
    else:
        axes.locator_params(axis="x", integer=True, nbins=7)
    if plot.over == "tokens" or not plot.log_x:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    limits = limits_of(curves, whole=plot.log_x, log=plot.log_y)
    if limits:
        axes.set_ylim(*limits)
        if limits[1] >= 1e4 and not plot.log_y:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def limits_of(
    curves: Sequence[Curve], *, whole: bool = False, log: bool = False
) -> tuple[float, float] | None:
    """Return limits of the vertical axis: quantiles of the curves after a twentieth of the axis.

    Args:
        curves: What is drawn.
        whole: Look at the first twentieth, too, which a logarithmic axis stretches.
        log: The vertical axis is logarithmic.
    """
    ends, last = [], max((curve.across[-1] for curve in curves if len(curve)), default=0.0)
    for curve in curves:
        late = curve.across > (0.0 if whole else 0.05 * last)
        values = np.concatenate([curve.low[late], curve.high[late]])
        values = values[values > 0] if log else values
        if len(values):
            ends.append(np.quantile(values, [0.005, 0.995]))
    if not ends:
        return None
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if log:
        margin = (high / low) ** 0.05 if high > low else 1.1
        return float(low / margin), float(high * margin)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _add_legend(figure: Any, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=group.label, **group.style) for group in groups]
    longest = max(len(group.label) for group in groups)
    columns = max(1, min(len(groups), int(13 * figure.get_figwidth() / (longest + 8))))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
        frameon=False,
    )


def table_of(groups: Sequence[Group]) -> str:
    """Return how far each group of runs got: a Markdown table.

    Losses are means over the last 200 steps and over the runs of a group, with their range; the
    differences are to the first group.
    """
    header = ["run", "steps", "final loss", "difference", _VALIDATION, "difference"]
    lines, first = [header, ["---"] * len(header)], {}
    for group in groups:
        steps = sorted({run.metrics[-1]["step"] for run in group.runs})
        cells = [group.label, " to ".join(f"{n:,}" for n in dict.fromkeys([steps[0], steps[-1]]))]
        losses = {
            "loss": [final_loss(run.metrics) for run in group.runs],
            _VALIDATION: [_last(run, _VALIDATION) for run in group.runs],
        }
        for name, found in losses.items():
            values = [value for value in found if value is not None and math.isfinite(value)]
            if not values:
                cells += ["-", "-"]
                continue
            mean = sum(values) / len(values)
            spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
            reference = first.setdefault(name, mean) if group is groups[0] else first.get(name)
            change = f"{mean / reference - 1:+.2%}" if reference else "-"
            cells += [f"{mean:.4f}{spread}", "-" if group is groups[0] else change]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    )


def _last(run: Run, name: str) -> float | None:
    values = run.curve(name).middle
    return float(values[-1]) if len(values) else None


def parse(arguments: Sequence[str] | None = None) -> Plot:
    """Return the options of the command line."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError('the command line needs tyro: pip install "jaxgen[train]"') from error
    positional = (tyro.conf.PositionalRequiredArgs,)
    return tyro.cli(Plot, prog="python -m train.plot", args=arguments, config=positional)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, print the table, and say where the picture is; exit with 1 after an error."""
    plot = parse(arguments)
    try:
        groups = read_groups(plot)
        make_figure(plot, groups).savefig(plot.output, dpi=150)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(table_of(groups))
    print(f"wrote {plot.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
