import json
import math
import sys
import time

import pytest

from train.metrics import JsonLines, Meter, TensorBoard, final_loss, read_rows


def step_metrics(loss=1.0, norm=1.0, **others):
    return {"loss": loss, "gradient_norm": norm, "learning_rate": 0.1, "skipped": 0, **others}


def test_rows_become_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write({"step": 10, "loss": 0.5})
    assert path.read_text() == '{"step": 10, "loss": 0.5}\n'  # readable while the run goes on
    writer.write({"step": 20, "loss": math.nan, "gradient_norm": math.inf, "speed": None})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "loss": 0.5},
        {"step": 20, "loss": None, "gradient_norm": None, "speed": None},
    ]
    assert read_rows(path)[0] == {"step": 10, "loss": 0.5}


def test_resuming_drops_what_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"step": 4')
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]  # the last line was cut off
    writer = JsonLines(path, from_step=20)
    writer.write({"step": 30, "again": 1})
    writer.close()
    assert read_rows(path) == [{"step": 10}, {"step": 20}, {"step": 30, "again": 1}]


@pytest.mark.parametrize("torn", [b'{"step": 4', b'{"step": 4\xc3', b"\xff\xfe", b"\0\0\0"])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n' + torn)
    assert read_rows(path) == [{"step": 10}]
    path.write_bytes(torn + b'\n{"step": 10}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not a row of metrics"):
        read_rows(path)


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_meter_averages_over_its_rows():
    meter = Meter(batch_size=8, every=3)
    assert meter.untouched
    assert meter.add(1, step_metrics(1.0)) is None
    assert not meter.untouched
    assert meter.add(2, step_metrics(2.0)) is None
    row = meter.add(3, step_metrics(6.0, norm=4.0, skipped=2))
    assert row is not None
    assert (row["step"], row["steps"], row["loss"], row["gradient_norm"]) == (3, 3, 3.0, 2.0)
    assert row["skipped"] == 2
    row = meter.add(4, step_metrics(5.0), last=True)
    assert row is not None
    assert (row["step"], row["steps"], row["loss"]) == (4, 1, 5.0)


def test_meter_leaves_out_losses_that_are_not_finite():
    meter = Meter(batch_size=1, every=2)
    meter.add(1, step_metrics(math.nan, math.inf))
    row = meter.add(2, step_metrics(3.0, 2.0))
    assert row is not None
    assert (row["loss"], row["gradient_norm"]) == (3.0, 2.0)
    meter.add(3, step_metrics(math.nan))
    row = meter.add(4, step_metrics(math.inf))
    assert row is not None
    assert row["loss"] is None


def test_speed_counts_neither_compilation_nor_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(batch_size=10, every=1)
    now[0] = 100.0  # compiling
    row = meter.add(1, step_metrics())
    assert row is not None
    assert row["examples_per_second"] is None
    with meter.paused():
        now[0] += 50.0
    now[0] += 2.0
    row = meter.add(2, step_metrics())
    assert row is not None
    assert row["examples_per_second"] == pytest.approx(10 / 2)


def test_final_loss_weighs_rows_by_their_steps():
    rows = [
        {"step": 100, "steps": 100, "loss": 9.0},
        {"step": 250, "steps": 150, "loss": 2.0},
        {"step": 300, "steps": 50, "loss": 4.0},
        {"step": 301, "steps": 1, "loss": None},
    ]
    assert final_loss(rows, 200) == pytest.approx((150 * 2 + 50 * 4) / 200)
    assert final_loss([]) is None
    assert final_loss(rows[-1:]) is None


def test_final_loss_of_rows_that_say_less():
    assert final_loss([{"step": 1, "gradient_norm": 2.0}]) is None
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 4.0, "steps": None}]
    assert final_loss(rows) == pytest.approx(3.0)


def test_tensorboard_files_hold_the_values(tmp_path):
    writer = TensorBoard(tmp_path)
    writer.write({"step": 3, "loss": 0.5, "missing": None, "endless": math.inf})
    writer.close()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert b"loss" in content
    assert b"missing" not in content
    assert b"endless" not in content


def test_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install \"jaxgen\[train\]\""):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '{"loss": 1.0}'])
def test_a_file_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = line + '\n{"step": 2}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not a row of metrics"):
        JsonLines(path)
    assert path.read_text() == content
