"""Tables and plots of RCD against its baseline, from points."""

import json
import sys

import numpy as np
import pytest

from train.configs.rcd_experiment import METHODS
from train.rcd_report import Report, draw, main, methods_of, read, table


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


def test_the_table_has_no_number_where_there_is_none():
    low, high = _points((10, 0.0), (20, 0.0))
    found = {"seqd-0": [high | {"threshold": 1.0}], "rcd-0": [low, high]}
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(found).splitlines()]
    assert rows[3][4:] == ["", "", ""]  # swept at neither threshold, and nothing was reached


def test_the_table_says_how_many_seeds_have_a_number():
    found = {
        "seqd-0": _points((10, 0.5), (20, 0.8)),
        "rcd-0": _points((5, 0.7), (15, 0.9)),
        "seqd-1": _points((10, 0.6), (20, 0.95)),
        "rcd-1": _points((5, 0.6), (15, 0.9)),
    }
    row = [cell.strip() for cell in table(found).splitlines()[3].split("|")[1:-1]]
    assert row[6] == "0.50 (1 of 2)"  # 0.95 is never reached
    assert "of 2" not in row[4]


def test_methods_follow_the_baseline():
    found = {name: [] for name in ("rcd-own-2-1", "rcd-own-1", "seqd-1", "rcd-own-2-0", "rcd-1")}
    assert methods_of(found) == ["seqd", "rcd", "rcd-own", "rcd-own-2"]
    assert methods_of({f"{method}-0": [] for method in METHODS})[:2] == ["seqd", "seqd-double"]


def _record(folder):
    path = folder / "record.json"
    runs = {
        "arithmetic": {
            "rcd-0": _points((5, 0.7), (15, 0.9)),
            "rcd-1": _points((5, 0.8), (15, 0.9)),
            "seqd-0": _points((10, 0.5), (20, 0.8)),
        },
        "sudoku": {"rcd-own-0": _points((1, 0.1), (2, 0.2))},
    }
    path.write_text(json.dumps({"commit": "abc", "runs": runs}))
    return path


def test_parts_of_a_record_are_told_apart(tmp_path):
    path = _record(tmp_path)
    parts = read(Report(path, parts=("runs/arithmetic", "runs/sudoku")))
    assert list(parts) == ["runs/arithmetic", "runs/sudoku"]
    assert list(parts["runs/sudoku"]) == ["rcd-own-0"]
    shown = read(Report(path, parts=("runs/arithmetic",), methods=("rcd",)))
    assert list(shown["runs/arithmetic"]) == ["rcd-0", "rcd-1"]
    with pytest.raises(ValueError, match=r"no part 'runs/text': .*'text' there are arith.*, sudo"):
        read(Report(path, parts=("runs/text",)))
    with pytest.raises(ValueError, match=r"instead of 'x' there are points"):
        read(Report(path, parts=("runs/sudoku/rcd-own-0/x",)))
    with pytest.raises(ValueError, match="is not of runs: in it are points"):
        read(Report(path, parts=("runs/sudoku/rcd-own-0",)))
    with pytest.raises(ValueError, match=r"part 'runs' of .* is not of runs: in it are arithm"):
        read(Report(path, parts=("runs",)))
    with pytest.raises(ValueError, match=r"part '' of .* is not of runs: in it are commit, runs"):
        read(Report(path))
    with pytest.raises(ValueError, match=r"methods must be among seqd, rcd, got \['rcd-own'\]"):
        read(Report(path, parts=("runs/arithmetic",), methods=("rcd-own",)))
    with pytest.raises(ValueError, match="parts must name at least one"):
        Report(path, parts=())


def test_the_plot_has_means_of_the_common_thresholds(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = {}
    plain = Axes.plot

    def watch(self, across, up, *args, **options):
        if "label" in options:
            lines[self.get_subplotspec().colspan.start, options["label"]] = (*across, *up)
        return plain(self, across, up, *args, **options)

    monkeypatch.setattr(Axes, "plot", watch)
    parts = read(Report(_record(tmp_path), parts=("runs/arithmetic", "runs/sudoku")))
    parts["runs/arithmetic"]["rcd-1"].append({"steps": 40, "accuracy": 1.0, "threshold": 1.0})
    draw(parts, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert list(lines) == [
        (0, "seqd, 1 seed"), (0, "rcd, 2 seeds"), (1, "rcd-own, 1 seed"),
    ]  # fmt: skip
    assert lines[0, "rcd, 2 seeds"] == pytest.approx((5, 15, 75, 90))


def test_the_command_prints_what_the_record_has(tmp_path, monkeypatch, capsys):
    path, plot = _record(tmp_path), tmp_path / "plot.png"
    words = [str(path), "--parts", "runs/arithmetic", "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["rcd_report", *words])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith("runs/arithmetic\n\n| method |")
    assert "| rcd | 2 | 90.0 ± 0.0 % |" in printed
    assert plot.exists()
    for words in ([str(tmp_path / "none.json")], [str(path), "--parts", "x"]):
        monkeypatch.setattr(sys, "argv", ["rcd_report", *words])
        with pytest.raises(SystemExit, match=r"^train.rcd_report: .*(none.json|no part 'x')"):
            main()
