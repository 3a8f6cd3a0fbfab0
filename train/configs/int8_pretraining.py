"""SageBwd's findings on pretraining, repeated: INT8 against exact attention, seeds and ablations.

The questions of arXiv:2603.02170: is the loss of INT8 attention that of exact attention, at few and
at many tokens a step; what do QK-norm and the smoothing of keys do.

Command    python -m train.configs.int8_pretraining --help
           python -m train.configs.int8_pretraining --output runs/int8-pretraining --batch-sizes 64
           python -m train.configs.int8_pretraining --output runs/int8-pretraining
               --batch-sizes 512 --each.accumulate 8
           python -m train.plot runs/int8-pretraining/*-64-* --group seed
           Repeating it goes on; --time-limit cuts it into pieces; --arms, --batch-sizes and --seeds
           into parts that may run at once into one folder, each on a GPU of its own.
Hardware   H200s, three trainings at once on each, jax 0.11.2
Outcome    results/int8_pretraining.json; validation loss over that of exact attention with QK-norm,
           mean and standard deviation of three seeds, at 64 rows (512 rows, which are 192 steps):
           INT8                         +0.27 ± 0.15 % (+0.5 ± 2.5)
           exact without QK-norm        +1.93 ± 0.30 % (+14.2 ± 1.2)
           INT8 without QK-norm         +1.87 ± 0.50 % (+14.5 ± 3.8)
           INT8 with keys not smoothed  +0.30 ± 0.19 % (+1.0 ± 3.8)
           int8-queries-smoothed, which has no kernels, was stopped at step 1,501 of 1,536: +0.08 ±
           0.08 % at step 1,500, where INT8 was at +0.27 ± 0.15.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxgen.checkpoints import write_atomically, write_json
from train.language_model import train
from train.language_model_config import Config
from train.metrics import mean_and_deviation
from train.run_folder import claim

ARMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "exact": {"attention": "exact"},
        "int8": {"attention": "int8"},
        "exact-no-qk-norm": {"attention": "exact", "qk_norm": False},
        "int8-no-qk-norm": {"attention": "int8", "qk_norm": False},
        "int8-keys-not-smoothed": {"attention": "int8", "smooth_keys": False},
        "int8-queries-smoothed": {"attention": "int8", "smooth_queries": True},
    }
)
"""What is compared; options of `train.language_model`."""

EACH = Config(
    model="10m",
    context=1024,
    batch_size=64,
    steps=1536,
    warmup_steps=100,
    learning_rate=1e-3,
    validate_every=500,
    validation_batches=32,
    statistics_every=250,
    across_documents=True,
)
"""As the paper trains, without a mask between documents."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train every arm at every batch size with every seed, skip what is done, print a table.

    All see the same number of tokens: steps and warm-up are those of `each` at its batch size.
    """

    each: Config = EACH
    """Options of every run; output, batch_size, steps, warmup_steps, seed and those of the arm are
    replaced."""
    output: Path = Path("runs/int8-pretraining")
    """Folder of all runs, and of table.md and results.json."""
    arms: tuple[str, ...] = tuple(ARMS)
    """What to compare."""
    batch_sizes: tuple[int, ...] = (64, 512)
    """Rows of an update: few and many tokens a step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initialization and order; the same for all arms."""
    time_limit: float | None = None
    """Seconds after which to stop; repeat the command to go on."""

    def __post_init__(self):
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown:
            raise ValueError(f"arms must be among {', '.join(ARMS)}, got {unknown}")
        rows = self.each.batch_size * self.each.steps
        uneven = [size for size in self.batch_sizes if size < 1 or rows % size]
        if uneven:
            raise ValueError(
                "batch_sizes must divide batch_size x steps of each, so that all see the same "
                f"tokens, got {uneven} for {rows} rows"
            )
        if not self.each.validate_every:
            raise ValueError(
                "the table compares validation losses, so each needs validate_every above 0"
            )

    def runs(self) -> list[Config]:
        """Return the runs, one seed after another."""
        return [
            dataclasses.replace(
                self.each,
                **ARMS[arm],
                output=self.output / f"{arm}-{size}-{seed}",
                batch_size=size,
                steps=self.each.batch_size * self.each.steps // size,
                warmup_steps=self.each.batch_size * self.each.warmup_steps // size,
                seed=seed,
            )
            for seed in self.seeds
            for size in self.batch_sizes
            for arm in self.arms
        ]


def carry_out(experiment: Experiment, *, show_progress: bool = True) -> list[dict[str, Any]]:
    """Do the runs that are not done; return what the folder holds, of these and of others.

    Raises:
        ConfigChangedError: A run was done with other options; the message lists them.
    """
    started = time.monotonic()
    for config in [config for config in experiment.runs() if not _is_done(config)]:
        if experiment.time_limit is not None:
            left = experiment.time_limit - (time.monotonic() - started)
            if left <= 0:
                break
            config = dataclasses.replace(config, time_limit=left)
        print(f"--- {config.output.name}", file=sys.stderr, flush=True)
        try:
            result = train(config, show_progress=show_progress)
        except FloatingPointError as error:  # a finding, not a fault: see its metrics.jsonl
            print(error, file=sys.stderr, flush=True)
            continue
        if result.stopped != "finished":
            break
    results = [
        _result(card)
        for path in sorted(experiment.output.glob("*/export/card.json"))
        if (card := _card(path.parent.parent))
    ]
    write_json(experiment.output / "results.json", results)
    write_atomically(experiment.output / "table.md", [table(results).encode()])
    return results


def _is_done(config: Config) -> bool:
    """Whether a run reached its last step, with these options."""
    if _card(config.output, config.steps) is None:
        return False
    claim(config, write=False)
    return True


def _card(folder: Path, steps: int | None = None) -> dict[str, Any] | None:
    """Return the card of a run that reached its last step."""
    path = folder / "export" / "card.json"
    if not path.exists():
        return None
    card = json.loads(path.read_text(encoding="utf-8"))
    return card if card["steps"] == (steps or card["config"]["steps"]) else None


def _result(card: Mapping[str, Any]) -> dict[str, Any]:
    config = card["config"]
    names = ("attention", "qk_norm", "smooth_keys", "smooth_queries")
    default = {name: getattr(Config, name) for name in names}
    return {
        "arm": next(
            arm
            for arm, options in ARMS.items()
            if all(config[name] == {**default, **options}[name] for name in names)
        ),
        "tokens_per_step": config["batch_size"] * config["context"],
        "seed": config["seed"],
        "steps": card["steps"],
        "loss": card["final_loss"],
        "validation": (card["validation"] or {}).get("validation"),
        "skipped": card["updates_skipped"],
        "hardware": card["hardware"],
        "jax": card["jax"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table, one row for each number of tokens a step and arm.

    "over exact" is the difference of the validation loss to that of exact attention with the same
    seed, in percent: mean and standard deviation over the seeds. Losses that a run does not have
    are left out; "-" is where no run has one.
    """
    lines = [
        "| tokens a step | attention | seeds | training loss | validation loss | over exact |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    key = lambda result: (result["tokens_per_step"], list(ARMS).index(result["arm"]))
    exact = {
        (result["tokens_per_step"], result["seed"]): result["validation"]
        for result in results
        if result["arm"] == "exact"
    }
    for group_key in sorted({key(result) for result in results}):
        group = [result for result in results if key(result) == group_key]
        pairs = [
            (result["validation"], exact.get((result["tokens_per_step"], result["seed"])))
            for result in group
        ]
        over = [100 * (one / other - 1) for one, other in pairs if None not in (one, other)]
        cells = [
            f"{group_key[0]:,}",
            group[0]["arm"],
            str(len(group)),
            _summary([result["loss"] for result in group], "{:.4f}"),
            _summary([result["validation"] for result in group], "{:.4f}"),
            _summary(over, "{:+.3f}", " %") if group[0]["arm"] != "exact" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _summary(values: Sequence[float | None], form: str, unit: str = "") -> str:
    known = [value for value in values if value is not None]
    return mean_and_deviation(known, form, unit) or "-"


def main() -> None:
    """Take the options of the command line, train, and print the table."""
    import tyro

    experiment = tyro.cli(Experiment, prog="python -m train.configs.int8_pretraining")
    print(table(carry_out(experiment)))


if __name__ == "__main__":
    main()
