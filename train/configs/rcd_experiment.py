"""What is feeding back worth? RCD against its baseline of equal data and steps, over seeds.

For each seed a standard model is trained first. From its export every method goes on for equally
many steps on the same batches and masks: SeqD as before, RCD with that first model as its frozen
reference, and RCD's variants. All answer the same test problems at several thresholds.

Command    python -m train.configs.rcd_experiment --output runs/rcd-arithmetic
               --first.levels 2 3 4 --first.block-length 34 --first.steps 5000 --steps 3000
           python -m train.configs.rcd_experiment --output runs/rcd-sudoku --first.task sudoku
               --first.levels 1 2 3 --first.sight bidirectional --first.average row
               --first.block-length 81 --first.steps 5000 --steps 3000
           python -m train.configs.rcd_experiment --output runs/rcd-shallow
               --methods seqd rcd-stale rcd-own rcd-own-one --first.model shallow-medium
               --first.levels 3 4 5 --first.block-length 61 --first.steps 2500 --steps 2500
           python -m train.configs.rcd_experiment --output runs/rcd-every --seeds 0 1
               --methods seqd rcd-own-one rcd-every rcd-every-one rcd-every-one-2
               --first.model shallow --first.levels 3 4 5 --first.block-length 61
               --first.steps 4000 --steps 2500 (Sudoku: as above, 5000 and 3000)
           All resume when repeated; --time-limit cuts them into pieces, and --methods and --seeds
           into parts that may run at once into one folder, once the first models are there.
Hardware   three H200, two runs on each; jax 0.11.2; 8 minutes for three seeds of both tasks; the
           harder problems 18 and the shallow models 8 minutes on four; the last command, with
           Sudoku, 16 minutes on two for two seeds, three runs on each; rcd-every-one-2, seqd-double
           and rcd-stale for three seeds 16 minutes on three, two runs on each
Outcome    results/rcd_experiment.json, docs/residual_context.md: RCD as published, started from
           nothing, loses to SeqD by 34 to 50 points of arithmetic and 8 to 60 of Sudoku. rcd-stale
           and rcd-own lose 1 to 8 points with models of six layers at SeqD's steps of threshold
           0.9, and win 5 to 24 with two or three after short trainings; after the last command's
           rcd-stale loses 10 of arithmetic. Where every pass learns, RCD wins 10 to 28 of
           arithmetic (rcd-every-one-2: at best 98.4 ± 0.1 % where SeqD has 82.4 ± 0.7 and
           seqd-double 86.5 ± 0.7) and 14 to 23 of Sudoku, but not at SeqD's best, one cell a step
           (94.7 ± 1.2 %; 93.9 ± 0.3 with restarts). With thresholds up to 0.9999 SeqD has its best
           after 13 steps, and RCD does not reach it (one seed).
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from jaxgen.checkpoints import parse_json_object, write_atomically, write_json
from train import decoding_sweep, diffusion_lm, rcd_report
from train.decoding_sweep import Point, Sweep
from train.diffusion_lm_config import Config
from train.run_folder import claim

_AS_DECODED = {"cold_share": 0.25, "stale_share": 1.0}
_EVERY_PASS = {"learn_every_pass": True, "stale_share": 1.0}

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "seqd": {},
        "seqd-double": {"batches": 2},
        "seqd-triple": {"batches": 3},
        "rcd": {"reference": True},
        "rcd-warm": {"of": "rcd", "init": "reference"},
        "rcd-cold": {"reference": True, "cold_share": 0.5},
        "rcd-stale": {"reference": True, **_AS_DECODED},
        "rcd-own": {"own_passes": 1, **_AS_DECODED},
        "rcd-own-2": {"own_passes": 2, **_AS_DECODED},
        "rcd-own-one": {"own_passes": 1, "weighting": "one", **_AS_DECODED},
        "rcd-every": {"own_passes": 1, **_EVERY_PASS},
        "rcd-every-one": {"own_passes": 1, "weighting": "one", **_EVERY_PASS},
        "rcd-every-one-2": {"own_passes": 2, "weighting": "one", **_EVERY_PASS},
        "rcd-stale-restart": {"of": "rcd-stale", "restart": 2},
        "rcd-own-one-restart": {"of": "rcd-own-one", "restart": 2},
        "rcd-every-restart": {"of": "rcd-every", "restart": 2},
        "rcd-every-one-restart": {"of": "rcd-every-one", "restart": 2},
        "rcd-every-one-2-restart": {"of": "rcd-every-one-2", "restart": 3},
        "rcd-every-one-2-restart-often": {"of": "rcd-every-one-2", "restart": 2},
        "rcd-fixed": {"reference": True, "weighting": "fixed"},
        "rcd-one": {"reference": True, "weighting": "one"},
        "rcd-top1": {"reference": True, "source": "top1"},
        "rcd-stop-vector": {"reference": True, "stop_vector": True},
    }
)
"""Options of the second training by method; `reference`: the first model is one; `batches`: so
many times the problems of a step.

"rcd" learns with residuals alone and starts blocks from nothing, as the paper's SDAR does.
"rcd-warm" is the same model (`of`) whose blocks start from the reference's predictions, as the
paper's LLaDA does; that pass counts as a step. "rcd-cold" learns to start from nothing, too, and
"rcd-stale" furthermore to be fed back what was predicted before the last tokens were known;
"rcd-own" is fed back its own such predictions, where the others are fed the first model's,
"rcd-own-2" those of two passes, and "rcd-own-one" nothing but them, without the mask's embedding.
Of "rcd-every" all passes learn, the first, cold one as well: its steps cost two of SeqD's, those of
"rcd-every-one-2" three. "seqd-double" and "seqd-triple" have batches two and three times as large:
as costly as those, with more data.
Those that end in "-restart" are the same models (`of`), decoded with `ResidualContext.restart`: as
many steps with a residual follow one another as they learned from. "-restart-often": every other
step begins with nothing.
"""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a first model and every method for each seed, sweep the threshold, print the table."""

    first: Config = dataclasses.field(default_factory=Config)
    """Options of the first training; its output and seed are replaced."""
    output: Path = Path("runs/rcd-experiment")
    """Folder of all runs, and of results.json, table.md and curve.png."""
    steps: int = 5000
    """Updates of each second training."""
    learning_rate: float = 5e-4
    """Its peak learning rate."""
    methods: tuple[str, ...] = ("seqd", "rcd")
    """Methods to compare: seqd, rcd, rcd-warm (from the reference's predictions), rcd-cold (learns
    to start from nothing), rcd-stale (and from older predictions), rcd-own (its own ones),
    rcd-own-2 (after two passes), rcd-own-one (with weight 1), rcd-every, rcd-every-one and
    rcd-every-one-2 (all passes learn), rcd-stale, rcd-own-one and the three rcd-every with -restart
    after their names (the same models, decoded with restarts; with more of them in
    rcd-every-one-2-restart-often), seqd-double and seqd-triple (larger batches), and the
    ablations rcd-fixed, rcd-one, rcd-top1, rcd-stop-vector."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initialization, order and masks."""
    thresholds: tuple[float, ...] = decoding_sweep.THRESHOLDS
    """Tokens surer than this are settled at once."""
    problems: int = 1000
    """Test problems."""
    time_limit: float | None = None
    """Seconds after which to stop; repeat the command to go on."""

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {unknown}")
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, got {list(values)}")
        if self.problems < 1:
            raise ValueError(f"problems must be at least 1, got {self.problems}")
        decoding_sweep.check_thresholds(self.thresholds)
        if self.first.reference is not None or self.first.start_from is not None:
            raise ValueError("the first model is a standard one: no reference and no start_from")
        for seed in self.seeds:
            for method in self.methods:
                self.run(method, seed)  # refused now rather than after the first training

    def first_run(self, seed: int) -> Config:
        """Return the first training of a seed."""
        return dataclasses.replace(self.first, output=self.output / f"first-{seed}", seed=seed)

    def run(self, method: str, seed: int) -> Config:
        """Return the second training of a method and seed."""
        method = METHODS[method].get("of", method)
        export = self.first_run(seed).output / "export"
        options = dict(METHODS[method])
        if options.pop("reference", False):
            options["reference"] = export
        return dataclasses.replace(
            self.first,
            batch_size=self.first.batch_size * options.pop("batches", 1),
            output=self.output / f"{method}-{seed}",
            seed=seed,
            start_from=export,
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.first.warmup_steps, self.steps // 5),
            **options,
        )

    def sweep(self, method: str, seed: int) -> Sweep:
        """Return what is asked of a method's model when it is trained."""
        run = self.run(method, seed)
        return Sweep(
            (run.output / "export",),
            self.output / f"{method}-{seed}",
            thresholds=self.thresholds,
            problems=self.problems,
            init=METHODS[method].get("init", "zero"),
            restart=METHODS[method].get("restart", 0),
            precision=run.precision,
            workers=run.workers,
        )


def carry_out(experiment: Experiment, *, show_progress: bool = True) -> dict[str, list[Point]]:
    """Do what is not done yet.

    Returns:
        The points of every method and seed in the folder, by the name of their folder.

    Raises:
        ConfigChangedError: A run in the folder had other options.
    """
    started = time.monotonic()

    def left() -> float | None:
        if experiment.time_limit is None:
            return None
        return max(experiment.time_limit - (time.monotonic() - started), 0.0)

    for seed in experiment.seeds:
        work: list[tuple[Config, Sweep | None]] = [(experiment.first_run(seed), None)]
        for method in experiment.methods:
            work.append((experiment.run(method, seed), experiment.sweep(method, seed)))
        if not all(_carry_out_run(run, sweep, left, show_progress) for run, sweep in work):
            break
    found = {
        path.parent.name: json.loads(path.read_text())["points"]
        for path in sorted(experiment.output.glob("*/points.json"))
    }
    write_json(experiment.output / "results.json", found)
    write_atomically(experiment.output / "table.md", [rcd_report.table(found).encode()])
    if found:
        rcd_report.draw({str(experiment.first.task): found}, experiment.output / "curve.png")
    return found


def _carry_out_run(
    run: Config, sweep: Sweep | None, left: Callable[[], float | None], show_progress: bool
) -> bool:
    """Train and sweep what is not trained and swept yet; return whether it is finished."""
    trained = _is_trained(run)
    if trained and (sweep is None or _is_swept(sweep)):
        return True
    limit = left()
    if limit == 0:
        return False
    if show_progress:
        print(f"--- {(sweep or run).output.name}", file=sys.stderr, flush=True)
    if not trained:
        limited = dataclasses.replace(run, time_limit=limit)
        if diffusion_lm.train(limited, show_progress=show_progress).stopped != "finished":
            return False
    if sweep is not None:
        decoding_sweep.carry_out(sweep, show_progress=show_progress)
    return True


def _is_trained(run: Config) -> bool:
    """Whether a run reached its last step.

    Raises:
        ConfigChangedError: It had other options.
    """
    path = run.output / "export" / "card.json"
    if not path.exists():
        return False
    claim(run, write=False)
    return parse_json_object(path.read_bytes(), str(path))["steps"] == run.steps


def _is_swept(sweep: Sweep) -> bool:
    """Whether a sweep was carried out with these thresholds and problems."""
    path = sweep.output / "points.json"
    if not path.exists():
        return False
    record = parse_json_object(path.read_bytes(), str(path))
    swept = tuple(point["threshold"] for point in record["points"])
    return (swept, record.get("problems")) == (sweep.thresholds, sweep.problems)


def main() -> None:
    """Take the options, carry out the experiment, print the table."""
    import tyro

    experiment = tyro.cli(Experiment, prog="python -m train.configs.rcd_experiment")
    # Runs that differ in their seed share compiled programs.
    jax.config.update("jax_compilation_cache_dir", str(experiment.output / "compiled"))
    print(rcd_report.table(carry_out(experiment)))


if __name__ == "__main__":
    main()
