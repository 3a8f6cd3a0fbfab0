"""The experiment of RCD against its baseline: tiny models through everything, and its table."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tyro

from train.configs.rcd_experiment import METHODS, Experiment, carry_out, table
from train.decoding_sweep import accuracy_at
from train.diffusion_lm_config import Config
from train.state import take_apart

FIRST = Config(
    model="tiny",
    precision="float32",
    levels=(1,),
    problems=32,
    block_length=8,
    batch_size=8,
    steps=2,
    warmup_steps=1,
    devices=1,
    validate_every=0,
)


def experiment(folder, **changes):
    settings = {"steps": 2, "seeds": (4,), "thresholds": (0.5, 1.0), "problems": 6}
    return Experiment(FIRST, folder, **(settings | changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    return folder, carry_out(experiment(folder), show_progress=False)


def test_a_first_model_then_every_method_from_it(done):
    folder, found = done
    assert found.keys() == {"seqd-4", "rcd-4"}
    for name, points in found.items():
        assert [point["threshold"] for point in points] == [0.5, 1.0]
        assert {point["rcd"] for point in points} == {name.startswith("rcd")}
        card = json.loads((folder / name / "export" / "card.json").read_text())
        assert card["config"]["start_from"].endswith("first-4/export")
        assert card["steps"] == 2
    assert {path.name for path in folder.iterdir()} == {
        "first-4", "seqd-4", "rcd-4", "results.json", "table.md", "curve.png"
    }  # fmt: skip


def test_what_is_done_stays_and_a_time_limit_of_zero_does_nothing(done, tmp_path):
    folder, found = done
    again = carry_out(experiment(folder, time_limit=0), show_progress=False)
    assert again == found
    assert carry_out(experiment(tmp_path / "new", time_limit=0), show_progress=False) == {}


def test_methods_differ_in_what_their_names_say(tmp_path):
    plan = experiment(tmp_path, methods=tuple(METHODS))
    runs = {method: plan.run(method, 1) for method in METHODS}
    export = tmp_path / "first-1" / "export"
    assert {run.start_from for run in runs.values()} == {export}
    assert [m for m, run in runs.items() if run.reference is None] == ["seqd"]
    assert runs["rcd"].training().residual.weighting == "entropy"
    assert runs["rcd-fixed"].training().residual.weighting == "fixed"
    assert runs["rcd-one"].training().residual.weighting == "one"
    assert runs["rcd-top1"].training().residual.source == "top1"
    assert runs["rcd-stop-vector"].training().stop_vector
    same = {dataclasses.replace(run, output=Path(), reference=None) for run in runs.values()}
    assert len(same) == 5  # rcd and seqd differ in nothing else


def _points(*pairs):
    thresholds = (0.5, 0.9)
    return [
        {"steps": steps, "accuracy": accuracy, "threshold": threshold}
        for (steps, accuracy), threshold in zip(pairs, thresholds, strict=True)
    ]


def test_the_table_compares_seeds_one_by_one():
    found = {
        "seqd-0": _points((10, 0.5), (20, 0.8)),
        "rcd-0": _points((5, 0.7), (15, 0.9)),
        "seqd-1": _points((10, 0.6), (20, 0.8)),
        "rcd-1": _points((5, 0.6), (15, 1.0)),
    }
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(found).splitlines()]
    assert rows[2][0] == "seqd"
    assert rows[2][2] == "80.0 ± 0.0 %"
    rcd = rows[3]
    assert rcd[0] == "rcd"
    assert rcd[2].startswith("95.0")
    # At 20 steps 0.9 and 1.0 against 0.8; at 10 steps 0.8 against 0.5 and 0.6.
    assert rcd[4] == f"+15.0 ± {np.std([10, 20], ddof=1):.1f}"
    assert rcd[5] == f"+25.0 ± {np.std([30, 20], ddof=1):.1f}"
    # 0.8 is reached at 10 steps, at 10 of 20 in both seeds.
    assert rcd[6] == "0.50 ± 0.00"


def test_accuracy_at_steps_lies_between_the_points():
    points = _points((10, 0.5), (20, 0.8))
    assert accuracy_at(points, 15) == pytest.approx(0.65)
    assert accuracy_at(points, 30) == pytest.approx(0.8)
    assert accuracy_at(points, 5) is None


def test_the_command_line_reaches_the_first_training():
    words = [
        "--first.task",
        "sudoku",
        "--first.levels",
        "1",
        "2",
        "--methods",
        "rcd",
        "--steps",
        "7",
    ]
    found = tyro.cli(Experiment, args=words)
    assert (found.first.task, found.first.levels) == ("sudoku", (1, 2))
    assert (found.methods, found.steps) == (("rcd",), 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("sft",)}, r"methods must be among seqd, .* got \['sft'\]"),
        ({"first": dataclasses.replace(FIRST, reference=Path("a"))}, "no reference and no start"),
    ],
)
def test_refuses_experiments(changes, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**changes)


def test_the_reference_of_every_method_is_the_first_model(done):
    folder, _ = done
    from train.diffusion_lm_parts import load_export

    first, _ = load_export(folder / "first-4" / "export", precision="float32")
    rcd, _ = load_export(folder / "rcd-4" / "export", precision="float32")
    ours, theirs = take_apart(first)[1], take_apart(rcd)[1]
    assert ours.keys() == theirs.keys()
    assert any((ours[name] != theirs[name]).any() for name in ours)
