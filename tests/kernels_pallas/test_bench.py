"""The benchmark: what it prints, writes and refuses; its speed is nobody's business here."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
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
        (64, "backward"),
        (64, "forward_backward"),
        (128, "forward"),
        (128, "backward"),
        (128, "forward_backward"),
    ]
    for record in records:
        assert record["ratio"] == pytest.approx(record["exact_ms"] / record["ms"], rel=0.2)
        assert record["causal"] is True
    Image.open(tmp_path / "x.png").verify()
    printed = capsys.readouterr()
    assert "sage_attention runs as 'xla', not as 'mosaic_gpu'" in printed.err
    assert printed.out.count("causal") == 6


def test_documents_show_the_records():
    root = Path(__file__).parents[2]
    records = json.loads((root / "kernels_pallas/results/h100.json").read_text())
    for op in bench.OPERATIONS:
        shown = bench.markdown([record for record in records if record["op"] == op])
        assert shown in (root / "README.md").read_text()
    for record in records:
        assert record["ratio"] == pytest.approx(record["cudnn_ms"] / record["ms"], abs=0.01)


def test_sparse_linear_attention(tmp_path, capsys):
    options = "--tokens 256 --head-dim 16 --heads 1 --runs 1 --sparsity 0.5 0.75"
    file = tmp_path / "x.json"
    bench.main(["sparse_linear_attention", *options.split(), "--json", str(file)])
    records = json.loads(file.read_text())
    assert [(r["sparsity"], r["pass"]) for r in records[::3]] == [
        (0.5, "forward"),
        (0.75, "forward"),
    ]
    assert all(record["op"] == "sparse_linear_attention" for record in records)
    assert records[2]["mib"] > 0
    assert records[2]["exact_mib"] > 0
    assert capsys.readouterr().out.count("75%") == 3
    line = bench.markdown(records).splitlines()[-1]
    assert line.startswith("| 1, 256, 1, 16 | 75% |")


def test_shows_records_again(tmp_path, capsys):
    record = {
        "pass": "forward", "batch": 1, "tokens": 8, "heads": 2, "head_dim": 64, "causal": True,
        "ms": 2.0, "cudnn_ms": 3.0, "ratio": 1.5, "tops": 7.0,
    }  # fmt: skip
    file = tmp_path / "records.json"
    file.write_text(json.dumps([record, {**record, "pass": "forward_backward"}]))
    bench.main(["sage_attention", "--records", str(file), "--markdown"])
    line = "| 1, 8, 2, 64 | causal | 2.00 ms | 3.00 ms | 1.50 | 2.00 ms | 3.00 ms | 1.50 |"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_calls_are_chained():
    """Each of three calls sees a number of the one before."""
    x, y = np.array([0.5, 1.0], np.float32), np.float32(2.0)
    with jax.numpy_dtype_promotion("standard"):
        result = jax.jit(functools.partial(bench.repeat, lambda x, y: (x * y, [x]), 3))(x, y)
    expected = 0.5
    for _ in range(3):
        expected = np.tanh(2 * expected + expected)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_counts_operations():
    shape = bench.Shape(batch=1, tokens=1000, heads=2, head_dim=64, causal=False)
    assert shape.operations("forward") == 4 * 2 * 1000 * 1000 * 64
    causal = bench.Shape(batch=1, tokens=1000, heads=2, head_dim=64, causal=True)
    assert causal.operations("forward_backward") == 3.5 * shape.operations("forward") / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flash"], "flash"),
        (["sage_attention", "--tokens", "0"], "at least 1"),
        (["sparse_linear_attention", "--sparsity", "1"], "less than 1, got"),
    ],
)
def test_refuses_what_it_cannot_time(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
