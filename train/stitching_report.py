"""Tables and plots of `train.stitching`: what methods are called, and which are compared.

    python -m train.stitching_report train/configs/results/stitching_openmoji_*.json --plot out.png

compares the samplers of earlier runs at equal cost.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.sampling import Alone, HybridStitch, SRDiffusion, TStitch
from train.scores import bootstrap_interval

type Record = dict[str, Any]

METHODS = {Alone: "alone", TStitch: "T-Stitch", SRDiffusion: "SRDiffusion",
           HybridStitch: "HybridStitch"}  # fmt: skip
"""What policies are called in tables and plots."""

TARGETS = (1.5, 1.83)
"""Speed-ups in operations at which methods are compared, each within 3 %."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare the samplers of earlier runs of `train.stitching` at equal cost."""

    results: tuple[Path, ...]
    """Files `stitching.json`."""
    plot: Path | None = None
    """Draw distances over speed-ups there."""

    def __post_init__(self):
        if not self.results:
            raise ValueError("results must name at least one file stitching.json, got none")


def plot(runs: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Plot distances from the large model's pictures over the speed-up in operations.

    Args:
        runs: Records by what the models were told; a row of panels each.
        path: Of the picture.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 3.6 * len(runs)), layout="constrained")
    rows = figure.subplots(len(runs), 2, squeeze=False)
    for row, (title, records) in zip(rows, runs.items(), strict=True):
        for name in METHODS.values():
            _draw(row, [record for record in records if record["method"] == name], name)
        row[0].set(xlabel="speed-up in operations", ylabel="distance from the large model's")
        row[1].set(xlabel="speed-up in operations", ylabel="PSNR against the large model's")
        for panel in row:
            panel.grid(alpha=0.3)
            panel.set_title(title)
    rows[0][0].legend()
    figure.savefig(path, dpi=120)


def _draw(panels: Sequence[Any], records: Sequence[Record], name: str) -> None:
    """Draw a method's distances and PSNR; policies of several settings are not joined."""
    line = "o" if name in ("alone", "HybridStitch") else "o-"
    records = sorted(records, key=lambda record: record["speed_up_in_operations"])
    for panel, measure in zip(panels, ("distance", "psnr"), strict=True):
        shown = [r for r in records if measure == "distance" or r["distance"] > 0]
        costs = [record["speed_up_in_operations"] for record in shown]
        panel.plot(costs, [record[measure] for record in shown], line, label=name)


def table(records: Sequence[Record]) -> str:
    """Return a Markdown table, fastest last."""
    lines = [
        "| sampler | speed-up | in operations | distance | PSNR | SSIM | accuracy | Frechet |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in sorted(records, key=lambda record: record["speed_up"]):
        low, high = record["distance_interval"]
        cells = [
            describe(record["method"], record["policy"]),
            f"{record['speed_up']:.2f}",
            f"{record['speed_up_in_operations']:.2f}",
            f"{record['distance']:.3f} ({low:.3f} to {high:.3f})",
            f"{record['psnr']:.1f}" if record["distance"] else "",
            f"{record['ssim']:.3f}",
            f"{record['accuracy']['attributes']:.3f}" if record["accuracy"] else "",
            f"{record['frechet_distance']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def at_equal_cost(records: Sequence[Record], targets: Sequence[float] = TARGETS) -> str:
    """Return a Markdown table: the best policy of every method among those of one cost.

    Policies are chosen by the distance in even pictures and shown by that in odd ones, so that a
    method does not gain by having more of them. The difference is that to HybridStitch, picture by
    picture.
    """
    lines = [
        "| in operations | sampler | distance | more than HybridStitch |",
        "| --- | --- | --- | --- |",
    ]
    for target in targets:
        best: dict[str, Record] = {}
        for record in records:
            if abs(record["speed_up_in_operations"] / target - 1) > 0.03:
                continue
            name = record["method"]
            better = lambda record: np.mean(record["distances"][::2])
            if name not in best or better(record) < better(best[name]):
                best[name] = record
        for name, record in best.items():
            apart = np.asarray(record["distances"][1::2])
            low, high = bootstrap_interval(apart)
            difference = ""
            if "HybridStitch" in best and name != "HybridStitch":
                more = apart - np.asarray(best["HybridStitch"]["distances"][1::2])
                bounds = bootstrap_interval(more)
                difference = f"{more.mean():+.3f} ({bounds[0]:+.3f} to {bounds[1]:+.3f})"
            cells = [
                f"{record['speed_up_in_operations']:.2f}",
                describe(name, record["policy"]),
                f"{apart.mean():.3f} ({low:.3f} to {high:.3f})",
                difference,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(method: str, policy: Mapping[str, Any]) -> str:
    """Return a policy in a few words."""
    match method:
        case "alone":
            return f"{policy['model']} only"
        case "T-Stitch":
            return f"T-Stitch, {policy['share']:.0%} small"
        case "SRDiffusion":
            switch = policy["switch"]
            return f"SRDiffusion, {'adaptive' if switch is None else f'{switch:.0%} large'}"
        case _:
            bounds = f"{policy['start']:.0%} to {policy['end']:.0%}"
            text = ", text kept" if policy.get("keep_text") else ""
            return f"HybridStitch, {bounds}, {policy['share']:.0%}, {policy['score']}{text}"


def main() -> None:
    """Take the options, print a table for each run, and draw the plot."""
    import tyro

    form = tyro.conf.PositionalRequiredArgs[Report]
    report = tyro.cli(form, prog="python -m train.stitching_report")
    runs = {}
    for path in report.results:
        result = json.loads(path.read_text(encoding="utf-8"))
        title = f"{path.stem}, prompts: {result['config']['prompts']}"
        runs[title] = result["records"]
        print(f"{title}\n\n{at_equal_cost(result['records'])}")
    if report.plot:
        plot(runs, report.plot)


if __name__ == "__main__":
    main()
