"""The tables of documents are those of the committed records."""

import json
from pathlib import Path

import pytest

from train.configs import decoding_speed, stitching_speed, wan_speed

ROOT = Path(__file__).parents[2]


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
    found = json.loads((ROOT / "train" / "configs" / "results" / f"{name}.json").read_text())
    records = found["records"] if isinstance(found, dict) else found
    _, *rows = program.table(records).strip().splitlines()
    assert "\n".join(rows) in (ROOT / "docs" / document).read_text()
