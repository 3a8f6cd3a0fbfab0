"""The tables of documents are those of the committed records."""

import json
from pathlib import Path

import pytest

from train import rcd_report, scaling
from train.configs import decoding_speed, stitching_speed, wan_speed
from train.stitching_report import at_equal_cost

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "train" / "configs" / "results"


@pytest.mark.parametrize(
    ("program", "document"),
    [
        (decoding_speed, "residual_context.md"),
        (stitching_speed, "hybrid_stitch.md"),
        (wan_speed, "sparse_linear_attention.md"),
    ],
    ids=lambda given: given if isinstance(given, str) else given.__name__,
)
def test_a_document_shows_the_table_of_its_records(program, document):
    name = program.__name__.rpartition(".")[2]
    found = json.loads((RESULTS / f"{name}.json").read_text())
    records = found["records"] if isinstance(found, dict) else found
    _, *rows = program.table(records).strip().splitlines()
    assert "\n".join(rows) in (ROOT / "docs" / document).read_text()


@pytest.mark.parametrize("task", ["arithmetic", "sudoku"])
@pytest.mark.parametrize("group", ["three_seeds", "every_pass"])
def test_methods_are_compared_as_their_record_says(group, task):
    part = f"{group}/runs/{task}"
    found = rcd_report.read(rcd_report.Report(RESULTS / "rcd_experiment.json", parts=(part,)))
    table = rcd_report.table(found[part])
    assert table in (ROOT / "docs" / "residual_context.md").read_text()


def test_what_the_residual_of_the_shipped_pair_is_worth_is_as_recorded():
    pair = json.loads((RESULTS / "rcd_experiment.json").read_text())["shipped_pair"]
    baseline = {point["threshold"]: point for point in pair["runs"]["arithmetic"]["seqd-0"]}
    text = (ROOT / "docs" / "residual_context.md").read_text()
    for points in zip(*(pair["same_problems"][name] for name in ("with", "without")), strict=True):
        threshold = points[0]["threshold"]
        cells = [
            f"{100 * point['accuracy']:.1f} % after {point['steps']:.1f} steps"
            for point in (*points, baseline[threshold])
        ]
        assert f"| {threshold:g} | {' | '.join(cells)} |" in text


def test_strict_thresholds_are_compared_as_recorded():
    record = json.loads((RESULTS / "rcd_experiment.json").read_text())["strict_thresholds"]
    text = (ROOT / "docs" / "residual_context.md").read_text()
    sudoku, pair = record["runs"]["sudoku"], record["shipped_pair"]["runs"]
    names = ["seqd-1", *(f"rcd-every-one-2{end}-1" for end in ("", "-restart", "-restart-often"))]
    rows = list(zip(*(sudoku[name] for name in names), strict=True))[-8:]
    rows += zip(pair["arithmetic-seqd"], pair["arithmetic-rcd"], strict=True)
    assert len(rows) == 14
    for points in rows:
        cells = [f"{100 * q['accuracy']:.1f} % after {q['steps']:.1f}" for q in points]
        assert f"| {points[0]['threshold']:g} | {' | '.join(cells)} |\n" in text


@pytest.mark.parametrize("prompts", ["captions", "empty"])
def test_samplers_are_compared_as_their_records_say(prompts):
    found = json.loads((RESULTS / f"stitching_openmoji_{prompts}.json").read_text())
    assert found["config"]["prompts"] == prompts
    assert at_equal_cost(found["records"]) in (ROOT / "docs" / "hybrid_stitch.md").read_text()


def test_several_devices_gave_what_is_said():
    for record, page in (("", "README.md"), ("_without_scan", "docs/hybrid_stitch.md")):
        found = json.loads((RESULTS / f"scaling{record}.json").read_text())
        assert scaling.table(found["cases"]) in (ROOT / page).read_text()
