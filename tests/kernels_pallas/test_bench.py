"""The benchmark: what it prints, writes and refuses; its speed is nobody's business here."""

import json

import pytest
from PIL import Image

from kernels_pallas import bench


def test_writes_records_table_and_plot(tmp_path, capsys):
    arguments = "sage_attention --tokens 64 128 --head-dim 64 --heads 1 --runs 1 --mask causal"
    files = ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    bench.main([*arguments.split(), *files])
    records = json.loads((tmp_path / "x.json").read_text())
    assert [(r["tokens"], r["pass"]) for r in records] == [
        (64, "forward"),
        (64, "forward_backward"),
        (128, "forward"),
        (128, "forward_backward"),
    ]
    for record in records:
        assert record["ratio"] == pytest.approx(record["exact_ms"] / record["ms"], rel=0.2)
        assert record["causal"] is True
    Image.open(tmp_path / "x.png").verify()
    printed = capsys.readouterr()
    assert "sage_attention runs as 'xla', not as 'mosaic_gpu'" in printed.err
    assert printed.out.count("causal") == 4


def test_counts_operations():
    shape = bench.Shape(batch=1, tokens=1000, heads=2, head_dim=64, causal=False)
    assert shape.operations("forward") == 4 * 2 * 1000 * 1000 * 64
    causal = bench.Shape(batch=1, tokens=1000, heads=2, head_dim=64, causal=True)
    assert causal.operations("forward_backward") == 3.5 * shape.operations("forward") / 2


@pytest.mark.parametrize("arguments", [["flash"], ["sage_attention", "--tokens", "0"]])
def test_refuses_what_it_cannot_time(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "flash" in (error := capsys.readouterr().err) or "at least 1" in error
