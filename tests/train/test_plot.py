"""Plots of runs whose files are made up."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.curves import Curve, label_runs, load_run, merge_curves
from train.metrics import JsonLines
from train.plot import Plot, limits_of, main, make_figure, parse, read_groups, table_of

BATCH, CONTEXT, EVERY = 4, 32, 5


def make_run(folder, *, steps=100, offset=0.0, validate=50, extra=None, **options):
    """A run whose loss falls from about 10 to 1 + offset."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": "tiny", "attention": "exact", "batch_size": BATCH, "context": CONTEXT,
              "seed": 0, "learning_rate": 0.001, "devices": 0}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | options))
    writer = JsonLines(folder / "metrics.jsonl")
    for step in range(EVERY, steps + 1, EVERY):
        loss = 1 + offset + 9 * np.exp(-step / 5)
        row = {"step": step, "steps": EVERY, "loss": loss, "gradient_norm": 2.0, "skipped": 0}
        # The first steps are twice as slow; nothing is known of the very first.
        speed = None if step == EVERY else 2.0 if step <= 50 else 4.0
        writer.write(row | {"examples_per_second": speed} | (extra or {}))
    writer.close()
    if validate:
        writer = JsonLines(folder / "validation.jsonl")
        for step in range(validate, steps + 1, validate):
            writer.write({"step": step, "validation": 1.5 + offset, "validation_tokens": 64})
        writer.close()
    return folder


@pytest.fixture
def runs(tmp_path):
    """Exact and INT8 attention, two seeds each."""
    return {
        (attention, seed): make_run(
            tmp_path / f"{attention}-{seed}",
            attention=attention,
            seed=seed,
            offset=0.2 * seed + (0.1 if attention == "int8" else 0),
        )
        for attention in ("exact", "int8")
        for seed in (0, 1)
    }


def panels(plot):
    groups = read_groups(plot)
    figure = make_figure(plot, groups)
    figure.draw_without_rendering()
    return figure, figure.get_axes()


def strong(axes):
    """The lines that are not faint, and have no gaps as validation points do."""
    return [x for x in axes.get_lines() if x.get_alpha() is None and x.get_linestyle() != "None"]


def points(axes):
    return [line for line in axes.get_lines() if line.get_linestyle() == "None"]


def refused(capsys, *arguments):
    """The one line that the command prints when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, str)  # Python prints it and exits with 1
    assert "\n" not in stopped.value.code
    assert capsys.readouterr().out == ""
    return stopped.value.code


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_command_draws_and_prints_a_table(runs, tmp_path, capsys, suffix):
    output = tmp_path / f"picture{suffix}"
    chosen = [runs["exact", 0], runs["int8", 0]]
    main([*map(str, chosen), "--output", str(output), "--show", "loss", "gradient_norm"])
    start = output.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in start
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[1].strip() == "attention=exact"
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert cells[:2] == ["attention=int8", "100"]
    loss = 1 + np.mean([9 * np.exp(-step / 5) for step in range(5, 101, 5)])
    assert cells[2:] == [f"{loss + 0.1:.4f}", f"{0.1 / loss:+.2%}", "1.6000", "+6.67%"]


def test_training_is_drawn_smooth_over_faint_and_validation_as_points(runs):
    plot = Plot((runs["exact", 0], runs["exact", 1]), smooth=20)
    figure, (axes,) = panels(plot)
    assert len(strong(axes)) == len(points(axes)) == 2
    faint = [line for line in axes.get_lines() if line.get_alpha()]
    np.testing.assert_allclose(faint[0].get_ydata()[0], 1 + 9 * np.exp(-1))
    smooth = strong(axes)[0].get_ydata()
    # A window of 20 steps holds the two rows before and the two after.
    expected = np.mean([1 + 9 * np.exp(-step / 5) for step in (40, 45, 50, 55, 60)])
    assert smooth[9] == pytest.approx(expected)
    np.testing.assert_allclose(points(axes)[1].get_xydata(), [[50, 1.7], [100, 1.7]])
    assert strong(axes)[0].get_color() != strong(axes)[1].get_color()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["seed=0", "seed=1"]


def test_without_smoothing_lines_are_the_rows(runs):
    _, (axes,) = panels(Plot((runs["exact", 0],), smooth=0))
    (line,) = strong(axes)
    rows = load_run(runs["exact", 0]).metrics
    assert list(line.get_ydata()) == [row["loss"] for row in rows]


def test_the_first_steps_do_not_decide_the_limits(runs):
    _, (axes,) = panels(Plot((runs["exact", 0],), smooth=0))
    low, high = axes.get_ylim()
    assert low < 1
    assert 1.5 < high < 3  # the loss begins at 4.3
    _, (axes,) = panels(Plot((runs["exact", 0],), smooth=0, log_x=True, log_y=True))
    assert axes.get_ylim()[1] > 4
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_limits_leave_room_and_skip_what_a_log_axis_cannot_show():
    curve = lambda *values: Curve(np.arange(1, len(values) + 1.0), *[np.array(values)] * 4)
    assert limits_of([curve(2.0, 2.0)]) == pytest.approx((1.9, 2.1))
    low, high = limits_of([curve(0.0, 1.0, 10.0)], log=True) or (0, 0)
    assert 0 < low < 1.1
    assert high > 9
    assert limits_of([curve(-1.0)], log=True) is None
    assert limits_of([]) is None


def test_seeds_become_mean_and_range(runs):
    plot = Plot(tuple(runs.values()), group="seed", smooth=0)
    figure, (axes,) = panels(plot)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["attention=exact (2 runs)", "attention=int8 (2 runs)"]
    exact, _ = strong(axes)
    rows = [load_run(runs["exact", seed]).metrics for seed in (0, 1)]
    means = [(a["loss"] + b["loss"]) / 2 for a, b in zip(*rows, strict=True)]
    np.testing.assert_allclose(exact.get_ydata(), means)
    bands = [x for x in axes.collections if x.get_alpha() == 0.2]
    band = bands[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 100][:, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((1, 1.2))
    table = table_of(read_groups(plot)).splitlines()
    assert "(1.5000 to 1.7000)" in table[2]
    assert "+6.25%" in table[3]  # validation 1.7 over 1.6


def test_runs_of_different_lengths_are_averaged_where_both_have_values(tmp_path):
    short = make_run(tmp_path / "short", steps=40, offset=1, validate=0)
    long = make_run(tmp_path / "long", steps=100, seed=1, validate=0)
    (group,) = read_groups(Plot((short, long), group="seed"))
    curve = group.curve("loss", Plot(()))
    assert (curve.across[0], curve.across[-1]) == (5, 40)
    np.testing.assert_allclose(curve.high - curve.low, 1)
    assert "40 to 100" in table_of([group])
    nothing = merge_curves([Curve(*[np.array([])] * 5), Curve(*[np.array([1.0])] * 5)])
    assert len(nothing) == 0


def test_across_tokens(runs):
    _, (axes,) = panels(Plot((runs["exact", 0],), over="tokens"))
    assert strong(axes)[0].get_xdata()[-1] == 100 * BATCH * CONTEXT
    assert points(axes)[0].get_xdata()[0] == 50 * BATCH * CONTEXT
    assert axes.get_xlabel() == "tokens"


def test_across_seconds_of_training(runs):
    """50 steps of 4 examples at 2 a second, and 50 at 4 a second."""
    _, (axes,) = panels(Plot((runs["exact", 0],), over="seconds"))
    np.testing.assert_allclose(points(axes)[0].get_xdata(), [100, 150])
    assert strong(axes)[0].get_xdata()[0] == pytest.approx(10)


def test_what_the_files_do_not_tell_is_refused(runs, tmp_path, capsys):
    folder = runs["exact", 0]
    (folder / "config.json").write_text('{"batch_size": 4}')
    message = refused(capsys, folder, "--over", "tokens", "--output", tmp_path / "x.png")
    assert message.startswith(f"{folder}: config.json does not say context, which --over tokens")
    assert "does not say seed; --group needs it" in refused(capsys, folder, "--group", "seed")
    (folder / "config.json").unlink()
    assert "does not say batch_size" in refused(capsys, folder, "--over", "seconds")
    silent = make_run(tmp_path / "silent", extra={"examples_per_second": None})
    assert "has no examples_per_second yet" in refused(capsys, silent, "--over", "seconds")
    assert not (tmp_path / "x.png").exists()


def test_panels_are_what_was_asked_for(runs, capsys):
    shown = ("loss", "gradient_norm", "validation", "examples_per_second")
    figure, axes = panels(Plot((runs["exact", 0],), show=shown))
    titles = [panel.get_title(loc="left") for panel in axes]
    assert titles[1:] == ["gradient norm", "validation", "examples per second"]
    assert len(figure.legends) == 1
    message = refused(capsys, runs["exact", 0], "--show", "loss", "mfu")
    assert message == (
        "no run holds 'mfu'; they hold loss, gradient_norm, skipped, examples_per_second, "
        "validation, validation_tokens"
    )


def test_layers_become_mean_and_range(runs):
    writer = JsonLines(runs["exact", 0] / "attention.jsonl")
    for step in (10, 20, 30):
        for layer in (0, 1, 2):
            writer.write({"step": step, "layer": layer, "sigma_q": step + layer})
    writer.close()
    _, (axes,) = panels(Plot((runs["exact", 0],), show=("sigma_q",)))
    np.testing.assert_allclose(strong(axes)[0].get_xydata(), [[10, 11], [20, 21], [30, 31]])
    assert axes.get_title(loc="left") == "sigma q: mean and range of the layers"
    assert axes.get_ylim()[0] < 10.1
    assert axes.get_ylim()[1] > 31.9


def test_values_that_were_not_finite_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", steps=20, validate=0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "steps": 5, "loss": null, "gradient_norm": Infinity}\n')
    run = load_run(folder)
    assert list(run.curve("loss").across) == [5, 10, 15, 20]
    assert len(run.curve("gradient_norm")) == 4
    panels(Plot((folder,), show=("loss", "gradient_norm")))


def test_a_run_that_is_just_beginning(tmp_path, capsys):
    folder = make_run(tmp_path / "run", steps=5, validate=0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "st')
    main([str(folder), "--output", str(tmp_path / "x.png")])
    assert "| 5 " in capsys.readouterr().out


def test_rows_that_say_less(tmp_path, capsys):
    """Without a loss, or without the number of steps it is the mean over."""
    folder = make_run(tmp_path / "run", validate=0)
    path, output = folder / "metrics.jsonl", str(tmp_path / "x.png")
    path.write_text('{"step": 1, "gradient_norm": 2.0}\n')
    main([str(folder), "--show", "gradient_norm", "--output", output])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    assert cells[1:] == ["1", "-", "-", "-", "-"]
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 3.0, "steps": null}\n\xff')
    main([str(folder), "--output", output])
    assert "| 2.5000 " in capsys.readouterr().out
    curve = load_run(folder).curve("loss").smoothed(10)
    np.testing.assert_allclose(curve.middle, 2.5)


def test_runs_that_were_watched_in_other_ways_are_of_one_group(tmp_path):
    watching = {"validate_every": 7, "validation_batches": 3, "export_dtype": "bfloat16",
                "workers": 8, "statistics_every": 9, "peak_teraflops": 312.0, "samples": False,
                "test_threshold": 0.5, "damaged": "skip"}  # fmt: skip
    plain = dict.fromkeys(watching, 0)
    one, other = make_run(tmp_path / "0", **plain), make_run(tmp_path / "1", seed=1, **watching)
    (group,) = read_groups(Plot((one, other), group="seed"))
    assert len(group.runs) == 2
    third = make_run(tmp_path / "2", seed=2, learning_rate=0.1)
    assert len(read_groups(Plot((one, other, third), group="seed"))) == 2


def test_folders_that_hold_no_run_are_refused(tmp_path, capsys):
    assert refused(capsys, tmp_path / "absent") == f"{tmp_path / 'absent'} is no folder"
    assert "holds no run: there is no metrics.jsonl" in refused(capsys, tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert "metrics.jsonl has no rows yet" in refused(capsys, tmp_path)
    assert "give folders of runs" in refused(capsys)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": 1}\nnonsense\n{"step": 2}\n', "line 2: not a row of metrics"),
        ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n', "step 1: loss is no number: 'low'"),
        ("metrics.jsonl", b'\xff\xfe\n{"step": 2}\n', "line 1: not a row of metrics"),
        ("validation.jsonl", b'[1]\n{"step": 2}\n', "line 1: not a row of metrics"),
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"[]", "config.json is damaged: it holds no options"),
    ],
)
def test_damaged_files_are_refused(tmp_path, capsys, file, content, message):
    folder = make_run(tmp_path / "run")
    (folder / file).write_bytes(content)
    error = refused(capsys, folder, "--output", tmp_path / "x.png")
    assert str(folder) in error
    assert message in error


def test_options_out_of_range_are_refused(runs, tmp_path, capsys):
    folder = runs["exact", 0]
    assert "output must end in .png or .svg" in refused(capsys, folder, "--output", "x.jpg")
    assert "smooth must be a number of steps" in refused(capsys, folder, "--smooth", "-1")
    assert "No such file" in refused(capsys, folder, "--output", tmp_path / "absent" / "x.png")


def test_labels_are_the_options_that_differ(tmp_path):
    def labels(*runs):
        folders = [make_run(tmp_path / str(n), **options) for n, options in enumerate(runs)]
        return label_runs([load_run(folder) for folder in folders])

    assert labels({"attention": "exact"}, {"attention": "int8"}) == [
        "attention=exact", "attention=int8",
    ]  # fmt: skip
    # Options that decide no update are told only if nothing else differs.
    assert labels({"devices": 1}, {"devices": 8, "seed": 1}) == ["seed=0", "seed=1"]
    assert labels({"devices": 1}, {"devices": 8}) == ["devices=1", "devices=8"]
    assert labels({"data": "/a/b/text.txt", "qk_norm": True}, {"data": None, "qk_norm": False}) == [
        "data=text.txt, qk_norm=true", "data=null, qk_norm=false",
    ]  # fmt: skip
    assert labels({"betas": [0.9, 0.95]}, {"betas": [0.9, 0.99]})[1] == "betas=0.9,0.99"
    assert labels({}, {}) == [(tmp_path / "0").as_posix(), (tmp_path / "1").as_posix()]
    same = labels({"seed": 1}, {"seed": 2}, {"seed": 1})
    assert same[0] == f"{(tmp_path / '0').as_posix()}, seed=1"
    # An option that one run does not know yet.
    assert labels({"spike": 2.0}, {"seed": 3})[1] == "seed=3"


def test_the_command_line(tmp_path):
    plot = parse(
        ["a", "b", "--show", "loss", "mfu", "--smooth", "50", "--log-x", "--group", "seed"]
    )
    assert plot == Plot(
        (Path("a"), Path("b")), show=("loss", "mfu"), smooth=50.0, log_x=True, group="seed"
    )
    done = subprocess.run(
        [sys.executable, "-m", "train.plot", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path} holds no run: there is no metrics.jsonl\n"


def test_without_matplotlib_the_error_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot = Plot((runs["exact", 0],))
    with pytest.raises(ImportError, match=r'pip install "jaxgen\[train\]"'):
        make_figure(plot, read_groups(plot))
