"""Accuracy over tokens per step: `python -m train.decoding_sweep --help`.

A lower threshold settles more tokens at each step and makes more mistakes. Sweeping it shows what a
model reaches for how many steps (figure 4 of arXiv:2601.22954), which one threshold does not. The
steps count until the last block is full, with the ends of text that fill it, and a pass that makes
a block's first residual (--init self or reference) counts; the tokens are those of the answer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxgen.checkpoints import write_atomically, write_json
from jaxgen.sampling import ResidualContext
from jaxgen.sampling.residual_context import Init
from train.diffusion_lm_parts import Answers, answer, load_export, make_decoder
from train.problem_data import TASKS, Table, make_table

type Point = dict[str, Any]

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Answer problems with one or more models at several thresholds.

    Writes `points.json`, `curve.png` and `table.md` to --output. A model trained with residuals
    (RCD) is fed back its discarded predictions; --without-residual shows it without.
    """

    models: tuple[Path, ...]
    """Exports of runs of `train.diffusion_lm`: their folders `export`."""
    output: Path = Path("runs/decoding-sweep")
    """Folder of the results."""
    thresholds: tuple[float, ...] = THRESHOLDS
    """Tokens surer than this are settled at once; 1: one token a step."""
    problems: int = 1000
    """Number of problems."""
    levels: tuple[int, ...] = ()
    """Their levels; those that each model was trained on if none are given."""
    split: Literal["validation", "test"] = "test"
    """Problems that no training has seen."""
    temperature: float = 1.0
    """T_res of the residual: above 1 feeds more back, below 1 less."""
    init: Init = "zero"
    """What is fed back at the first step of a block; reference: what the frozen model of the
    model's training predicts."""
    restart: int = 0
    """Steps of a block after which the next one begins as the first did; 0: never. For a model that
    learned from residuals of K passes, K + 1."""
    reference: Path | None = None
    """Where that model is now, if not where it was; for --init reference."""
    without_residual: bool = False
    """Feed nothing back."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation."""
    batch_size: int = 512
    """Problems at a time."""
    workers: int = 0
    """Processes that make problems; 0: the main one does."""

    def __post_init__(self):
        names = list(map(name_of, self.models))
        if not names or len(set(names)) < len(names):
            raise ValueError(f"models must be folders of runs with different names, got {names}")
        check_thresholds(self.thresholds)
        if self.reference is not None and self.init != "reference":
            raise ValueError(
                f"reference={self.reference} needs init='reference', got {self.init!r}"
            )
        for name, least in {"problems": 1, "batch_size": 1, "restart": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.restart and self.init in ("self", "reference"):
            raise ValueError(
                f"init={self.init!r} takes restart=0, got {self.restart}: the passes that begin "
                "anew would not be counted as steps"
            )


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Refuses thresholds that no sweep can have.

    Raises:
        ValueError: none, one twice, or one that is not from 0 to 1.
    """
    different = len(set(thresholds)) == len(thresholds) > 0
    if not different or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(
            f"thresholds must be different numbers from 0 to 1, got {tuple(thresholds)}"
        )


def residual_of(card: Mapping[str, Any], **options: Any) -> ResidualContext | None:
    """Returns what a model was trained to be fed back, None for a standard one.

    Args:
        card: of its export.
        **options: of `ResidualContext` that training does not decide, such as `temperature`.
    """
    config = card["config"]
    if config["reference"] is None and not config.get("own_passes"):
        return None
    return ResidualContext(weighting=config["weighting"], source=config["source"], **options)


def table_for(
    card: Mapping[str, Any], problems: int, *, levels: Sequence[int] = (), **options: Any
) -> Table:
    """Returns problems of the kind that a model was trained on, in rows as it learned them.

    Args:
        card: of its export.
        problems: how many.
        levels: theirs; those that it was trained on if none are given.
        **options: of `make_table`; the problems are test problems unless `split` says otherwise.
    """
    config = card["config"]
    block = config["block_length"] if config["sight"] == "block_causal" else 1
    options = {"split": "test", "block_length": block} | options
    return make_table(config["task"], levels or config["levels"], problems, **options)


def reference_of(card: Mapping[str, Any], place: Path | None = None) -> Path:
    """Returns the folder of the model whose predictions start blocks with --init reference.

    Args:
        card: of the export of the model that answers.
        place: where that folder is now; None: where it was in training.

    Raises:
        ValueError: no place, of a model that learned from its own predictions.
    """
    place = place or card["config"]["reference"]
    if place is None:
        raise ValueError(
            "init='reference' needs the folder of a reference: the model was trained without one, "
            "got reference=None"
        )
    return Path(place)


def carry_out(sweep: Sweep, *, show_progress: bool = True) -> list[Point]:
    """Answers all problems with every model at every threshold, and writes the results.

    Returns:
        A point for each model and threshold: `model`, `rcd`, `threshold`, what `Answers.summary`
        says, and `accuracy_of_level`.

    Raises:
        FileNotFoundError: A folder without a model.
        ValueError: A damaged one, or a model that was not trained on problems.
    """
    from tqdm import tqdm

    points: list[Point] = []
    rounds = len(sweep.models) * len(sweep.thresholds)
    with tqdm(total=rounds, unit="threshold", disable=not show_progress) as bar:
        for folder in sweep.models:
            model, card = load_export(folder, precision=sweep.precision)
            config = card.get("config", {})
            if config.get("task") not in TASKS:
                raise ValueError(f"{folder} holds no model that was trained on problems")
            options = {"levels": sweep.levels, "split": sweep.split, "workers": sweep.workers}
            table = table_for(card, sweep.problems, **options)
            residual = None
            if not sweep.without_residual:
                residual = residual_of(
                    card, temperature=sweep.temperature, init=sweep.init, restart=sweep.restart
                )
            reference = None
            if residual is not None and residual.init == "reference":
                place = reference_of(card, sweep.reference)
                reference, _ = load_export(place, precision=sweep.precision)
            for threshold in sweep.thresholds:
                decoder = make_decoder(config["sight"], config["block_length"], threshold, residual)
                answers = answer(
                    model, table, decoder, batch_size=sweep.batch_size, reference=reference
                )
                levels = np.array([problem.level for problem in table.problems])
                points.append(
                    {
                        "model": name_of(folder),
                        "rcd": residual is not None,
                        "threshold": threshold,
                        **answers.summary(),
                        "accuracy_of_level": by_level(levels, answers),
                    }
                )
                bar.set_postfix(accuracy=f"{points[-1]['accuracy']:.3f}")
                bar.update(1)
    sweep.output.mkdir(parents=True, exist_ok=True)
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "problems": sweep.problems,
        "init": sweep.init,
        "restart": sweep.restart,
        "points": points,
    }
    write_json(sweep.output / "points.json", record)
    write_atomically(sweep.output / "table.md", [table_of(points).encode()])
    draw(points, sweep.output / "curve.png")
    return points


def name_of(folder: Path) -> str:
    """Returns the name of a run from the folder of its export."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "export" else folder.name


def by_level(levels: np.ndarray, answers: Answers) -> dict[str, float]:
    """Returns the accuracy on each level."""
    return {str(n): float(answers.correct[levels == n].mean()) for n in np.unique(levels)}


def steps_at(points: Sequence[Point], accuracy: float) -> float | None:
    """Returns the fewest steps at which one model's points reach an accuracy, None if none does.

    Between two neighboring thresholds, steps and accuracy are taken to change together.
    """
    ordered = sorted(points, key=lambda point: point["steps"])
    reached = [n for n, point in enumerate(ordered) if point["accuracy"] >= accuracy]
    if not reached:
        return None
    above = ordered[reached[0]]
    if reached[0] == 0 or above["accuracy"] == ordered[reached[0] - 1]["accuracy"]:
        return above["steps"]
    below = ordered[reached[0] - 1]
    share = (accuracy - below["accuracy"]) / (above["accuracy"] - below["accuracy"])
    return below["steps"] + share * (above["steps"] - below["steps"])


def accuracy_at(points: Sequence[Point], steps: float) -> float | None:
    """Returns the accuracy of one model's points at a number of steps, None beyond them.

    Between two neighboring thresholds, steps and accuracy are taken to change together. More steps
    than one token at a time has are no help, so that the last accuracy holds from there on.
    """
    ordered = sorted(points, key=lambda point: point["steps"])
    if steps < ordered[0]["steps"]:
        return None
    across = [point["steps"] for point in ordered]
    return float(np.interp(steps, across, [point["accuracy"] for point in ordered]))


def table_of(points: Sequence[Point]) -> str:
    """Returns the points as a Markdown table."""
    lines = [
        "| model | residual | threshold | accuracy | all steps right | steps | tokens a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        cells = [
            point["model"],
            "yes" if point["rcd"] else "no",
            f"{point['threshold']:g}",
            f"{point['accuracy']:.1%}",
            f"{point['steps_correct']:.1%}",
            f"{point['steps']:.1f}",
            f"{point['tokens_per_step']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """Draws accuracy over tokens per step, a line for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(point["model"] for point in points):
        line = [point for point in points if point["model"] == name]
        style = "o-" if line[0]["rcd"] else "s--"
        across = [point["tokens_per_step"] for point in line]
        axes.plot(across, [100 * point["accuracy"] for point in line], style, label=name, ms=4)
    axes.set_xlabel("tokens per step")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Take the options, answer, print the table."""
    import tyro

    sweep = tyro.cli(Sweep, prog="python -m train.decoding_sweep")
    print(table_of(carry_out(sweep)))


if __name__ == "__main__":
    main()
