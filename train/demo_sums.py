"""The part of the demo about text: sums by a diffusion language model, with residuals and without.

Both models answer the same problems, which neither saw in training; a program checks each answer.
"""

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from jaxgen.models import DiffusionLM
from jaxgen.sampling import BlockDiffusion
from train.decoding_history import history, table_row
from train.decoding_sweep import residual_of, table_for
from train.diffusion_lm_parts import answer, load_export, make_decoder
from train.problem_data import Table

MODELS: Mapping[str, str] = {"seqd": "without residual", "rcd": "with residual (RCD)"}
"""Models in words, by the end of the name of their folder."""

THRESHOLDS = (0.7, 0.9)
"""Tokens surer than this are settled at once."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """A model and what it answers."""

    name: str
    model: DiffusionLM
    table: Table
    decoders: Mapping[float, BlockDiffusion]

    @classmethod
    def load(cls, name: str, folder: Path, problems: int) -> Self:
        """Returns the model of a folder, with test problems of the kind that it learned."""
        model, card = load_export(folder, precision="float32")
        config, residual = card["config"], residual_of(card)
        how = config["sight"], config["block_length"]
        decoders = {at: make_decoder(*how, at, residual) for at in THRESHOLDS}
        return cls(MODELS[name], model, table_for(card, problems), decoders)


@dataclasses.dataclass(frozen=True)
class Solved:
    """How well a model answers with one threshold.

    Attributes:
        name: of the model, in words.
        threshold: tokens surer than this were settled at once.
        accuracy: share of right answers.
        steps: mean steps of an answer.
    """

    name: str
    threshold: float
    accuracy: float
    steps: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """A row of the table."""
        return self.name, f"{self.threshold:g}", f"{self.accuracy:.0%}", f"{self.steps:.1f}"


def solve(solver: Solver) -> Iterator[Solved]:
    """Answer all problems with each threshold."""
    for threshold, decoder in solver.decoders.items():
        found = answer(solver.model, solver.table, decoder).summary()
        yield Solved(solver.name, threshold, found["accuracy"], found["steps"])


def line(solver: Solver, row: int) -> str:
    """Return one answer with the last threshold, as a row of an HTML table."""
    decoder = solver.decoders[THRESHOLDS[-1]]
    table = solver.table
    states = history(solver.model, table.prompts[row], decoder, table.layout.answer)
    return table_row(solver.name, table.problems[row], states)


def section(solvers: Sequence[Solver], solved: Sequence[Solved], examples: Sequence[int]) -> str:
    """Return the part of the report, as HTML."""
    rows = "".join("<tr>" + "".join(f"<td>{cell}" for cell in one.cells) for one in solved)
    problems = solvers[0].table.problems
    shown = "".join(
        f"<p><b>{html.escape(problems[row].prompt)}</b></p>"
        f"<table>{''.join(line(solver, row) for solver in solvers)}</table>"
        for row in examples
    )
    return f"""<h2>A language model that writes in any order</h2>
<p>Two diffusion language models do {len(problems)} sums, one operation after the other. At each
step they predict all tokens and settle those surer than a threshold. The first model drops the
other predictions; the second feeds them back to its next step (Residual Context Diffusion, arXiv
2601.22954, where every pass learns). Both trained on as many problems, of which the second one made
three passes where the first made one.</p>
<table><tr><th>model<th>threshold<th>right<th>steps an answer</tr>{rows}</table>
<p>The color of a character is the step that settled it, from dark to bright, with a threshold of
{THRESHOLDS[-1]:g}:</p>
{shown}"""


def show(weights: Path, problems: int) -> str:
    """Let both models answer and print a row for each threshold as it is done.

    Args:
        weights: folder with the models arithmetic-seqd and arithmetic-rcd.
        problems: how many to answer.

    Returns:
        The part of the report, as HTML; empty unless there are both models.
    """
    folders = {name: weights / f"arithmetic-{name}" for name in MODELS}
    for folder in folders.values():
        if not all((folder / name).is_file() for name in ("card.json", "config.json")):
            print(f"   skipped, there is no model {folder.name}")
            return ""
    _print_row("model", "threshold", "right", "steps")
    solvers = [Solver.load(name, folder, problems) for name, folder in folders.items()]
    solved = []
    for solver in solvers:
        for one in solve(solver):
            solved.append(one)
            _print_row(*one.cells)
    hardest = np.argsort([-problem.level for problem in solvers[0].table.problems], kind="stable")
    return section(solvers, solved, hardest[:3].tolist())


def _print_row(model: str, threshold: str, right: str, steps: str) -> None:
    print(f"   {model:<24}{threshold:>10}{right:>8}{steps:>8}", flush=True)
