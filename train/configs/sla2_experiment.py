"""What is each part of SLA2 worth? Methods x sparsities x seeds on one pretrained video model.

Command    python -m train.configs.sla2_experiment --output runs/sla2-experiment
               --methods full sparse sla1 sla2 --kept-fractions 0.05 0.03
               --each.pretrained weights/moving-emoji --each.per-head-routers
               --each.block-q 16 --each.block-k 8 --each.token-cube 2 2 2
               --each.router-batch-size 8 --each.steps 800 --each.batch-size 32
               --each.learning-rate 1e-3 --each.warmup-steps 50 --each.log-every 50
               --each.validation-clips 128 --each.workers 12 --each.no-samples
           It resumes when repeated; --time-limit cuts it into pieces, and --methods,
           --kept-fractions and --seeds into parts that may run at once into one folder, each on
           a GPU of its own (CUDA_VISIBLE_DEVICES) or several on one
           (XLA_PYTHON_CLIENT_MEM_FRACTION). The table always shows what the folder holds.
Hardware   one H100 a run (one run on an H200), jax 0.11.2. Both stages: full attention 83 to 114 s,
           SLA2 186 to 331, the others 125 to 200. The records of the others are without
           --each.per-head-routers: an identity for each head is the identity.
Outcome    validation loss over full attention: SLA2 +4.0 % with 5 % of the blocks and +6.3 % with
           3 %, SLA +6.0 and +10.3 %, the blocks alone +6.2 and +10.6 %. SLA2 with 10 %: +1.8 %;
           with 5 % and an untrained router +5.3, a fixed ratio +11.4, no quantization +3.8 % (one
           seed each). Every run is in results/sla2_experiment.json; --records shows them again.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxgen.checkpoints import write_atomically, write_json
from train import sla2
from train.metrics import mean_and_deviation
from train.sla2_config import METHODS, Config


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Run methods x sparsities x seeds, skip what is done, and print the table.

    Full attention does not depend on the sparsity and runs once for each seed.
    """

    each: Config
    """Options of every run; its output, method, kept_fraction and seed are replaced, and the first
    seed alone draws samples."""
    output: Path = Path("runs/sla2-experiment")
    """Folder of all runs, and of table.md and results.json."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    kept_fractions: tuple[float, ...] = (0.05, 0.1)
    """Shares of the blocks of keys that get softmax attention."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of noise and noise levels while training."""
    time_limit: float | None = None
    """Seconds after which to stop; repeat the command to go on."""
    records: Path | None = None
    """Run nothing; print the table of this results.json."""

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {unknown}")

    def runs(self) -> list[Config]:
        """Return the runs in order, one seed after another."""
        found = []
        for seed in self.seeds:
            for method in self.methods:
                fractions = (1.0,) if METHODS[method].kind == "full" else self.kept_fractions
                found += [
                    dataclasses.replace(
                        self.each,
                        output=self.output / f"{method}-{fraction:g}-{seed}",
                        method=method,
                        kept_fraction=fraction,
                        seed=seed,
                        samples=self.each.samples and seed == self.seeds[0],
                    )
                    for fraction in fractions
                ]
        return found


def carry_out(experiment: Experiment, **options: Any) -> list[sla2.Report]:
    """Do the runs that are not done.

    Args:
        experiment: What to run.
        **options: For `train.sla2.train`.

    Returns:
        The reports in the folder, of these and of other runs.
    """
    started = time.monotonic()
    for config in experiment.runs():
        if (config.output / "report.json").exists():
            continue
        if experiment.time_limit is not None:
            left = experiment.time_limit - (time.monotonic() - started)
            if left <= 0:
                break
            config = dataclasses.replace(config, time_limit=left)
        print(f"--- {config.output.name}", file=sys.stderr, flush=True)
        if isinstance(sla2.train(config, **options), str):
            break
    reports = [
        json.loads(path.read_text()) for path in sorted(experiment.output.glob("*/report.json"))
    ]
    write_json(experiment.output / "results.json", reports)
    write_atomically(experiment.output / "table.md", [table(reports).encode()])
    return reports


def table(reports: list[sla2.Report]) -> str:
    """Return a Markdown table, one row for each method and sparsity.

    Losses are means over seeds, with the standard deviation between them where there are several.
    "over full" is how much higher the loss is than that of full attention with the same seed.
    """
    lines = [
        "| method | kept | seeds | error of attention | loss before | validation | over full "
        "| held out | over full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    full = {report["seed"]: report["finished"] for report in reports if report["method"] == "full"}
    order = list(METHODS)
    groups: dict[tuple[int, float], list[sla2.Report]] = {}
    for report in reports:
        place = order.index(report["method"]), report["kept_fraction"]
        groups.setdefault(place, []).append(report)
    for (place, fraction), group in sorted(groups.items()):
        errors = [list(report["attention_error"].values()) for report in group]
        cells = [
            order[place],
            f"{fraction:.0%}" if fraction >= 0.1 else f"{fraction:.1%}",
            str(len(group)),
            mean_and_deviation([values[-1] for values in errors], "{:.5f}") if all(errors) else "",
            mean_and_deviation([report["at_start"]["validation"] for report in group], "{:.5f}"),
        ]
        for split in ("validation", "held_out"):
            cells.append(
                mean_and_deviation([report["finished"][split] for report in group], "{:.5f}")
            )
            excess = [
                100 * (report["finished"][split] / full[report["seed"]][split] - 1)
                for report in group
                if report["seed"] in full and report["method"] != "full"
            ]
            cells.append(mean_and_deviation(excess, "{:+.2f}", " %"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take the options, carry out the experiment, print the table."""
    import tyro

    experiment = tyro.cli(Experiment, prog="python -m train.configs.sla2_experiment")
    if experiment.records is not None:
        print(table(json.loads(experiment.records.read_text())))
        return
    # Runs that differ in their seed share compiled programs.
    jax.config.update("jax_compilation_cache_dir", str(experiment.output / "compiled"))
    print(table(carry_out(experiment)))


if __name__ == "__main__":
    main()
