"""The experiment of RCD against its baseline: tiny models through everything."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tyro

from jaxgen.sampling import ResidualContext
from train import decoding_sweep
from train.configs.rcd_experiment import METHODS, Experiment, carry_out
from train.diffusion_lm_config import Config
from train.run_folder import ConfigChangedError
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


def test_a_warm_start_is_another_sweep_of_the_same_model(done, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(done[0], folder)
    monkeypatch.setattr("train.configs.rcd_experiment.claim", lambda *_, **__: None)
    monkeypatch.setattr(
        "train.diffusion_lm.train", lambda run, **_: pytest.fail(f"{run.output} is trained again")
    )
    found = carry_out(experiment(folder, methods=("rcd", "rcd-warm")), show_progress=False)
    assert found.keys() == {"seqd-4", "rcd-4", "rcd-warm-4"}
    cold, warm = found["rcd-4"][1], found["rcd-warm-4"][1]
    assert cold["threshold"] == warm["threshold"] == 1.0
    assert warm["steps"] > cold["steps"]  # the reference's passes count
    assert (folder / "rcd-warm-4" / "points.json").exists()
    assert not (folder / "rcd-warm-4" / "export").exists()


def test_other_options_do_not_pass_for_what_is_done(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0], folder)
    # The export's place is one of the options, and it is another one in a copy.
    with pytest.raises(ConfigChangedError, match=r"start_from: .* before, .*copy/first-4/export"):
        carry_out(experiment(folder), show_progress=False)
    with pytest.raises(ConfigChangedError, match=r"learning_rate: 0\.0005 before, 0\.1 now"):
        carry_out(experiment(done[0], learning_rate=0.1), show_progress=False)


def test_other_thresholds_and_problems_are_swept_again(done, monkeypatch):
    folder, swept = done[0], []

    def sweep(sweep, **_):
        swept.append((sweep.output.name, sweep.thresholds, sweep.problems))

    monkeypatch.setattr(decoding_sweep, "carry_out", sweep)
    carry_out(experiment(folder), show_progress=False)
    assert swept == []
    carry_out(experiment(folder, thresholds=(0.5,)), show_progress=False)
    carry_out(experiment(folder, problems=5), show_progress=False)
    runs = ("seqd-4", "rcd-4")
    assert swept == [*((run, (0.5,), 6) for run in runs), *((run, (0.5, 1.0), 5) for run in runs)]


def test_methods_differ_in_what_their_names_say(tmp_path):
    plan = experiment(tmp_path, methods=tuple(METHODS))
    runs = {method: plan.run(method, 1) for method in METHODS}
    warm = runs.pop("rcd-warm")
    assert warm == runs["rcd"]
    more = plan.sweep("rcd-every-one-2-restart-often", 1)
    assert more.models == plan.sweep("rcd-every-one-2", 1).models
    assert more.restart == 2
    assert runs.pop("rcd-every-one-2-restart-often") == runs["rcd-every-one-2"]
    for method in [method for method in METHODS if method.endswith("-restart")]:
        trained = method.removesuffix("-restart")
        assert runs.pop(method) == runs[trained]
        sweep = plan.sweep(method, 1)
        assert sweep.models == (tmp_path / f"{trained}-1" / "export",)
        assert sweep.output == tmp_path / f"{method}-1"
        # The reference's residual is one pass deep, as that of one own pass.
        assert sweep.restart == 1 + max(runs[trained].own_passes, 1)
        assert plan.sweep(trained, 1).restart == 0
    assert [m for m in METHODS if plan.sweep(m, 1).init == "reference"] == ["rcd-warm"]
    assert plan.sweep("rcd-warm", 1).models == (tmp_path / "rcd-1" / "export",)
    assert plan.sweep("rcd-warm", 1).output == tmp_path / "rcd-warm-1"
    assert runs["rcd-cold"].training().cold_share == 0.5
    assert runs["rcd-stale"].training().cold_share == 0.25
    assert runs["rcd-stale"].training().stale_share == 1.0
    export = tmp_path / "first-1" / "export"
    assert {run.start_from for run in runs.values()} == {export}
    assert [m for m, run in runs.items() if run.reference is None] == [
        "seqd", "seqd-double", "seqd-triple", "rcd-own", "rcd-own-2", "rcd-own-one",
        "rcd-every", "rcd-every-one", "rcd-every-one-2",
    ]  # fmt: skip
    own = {method: runs[method].training() for method in METHODS if method in runs}
    every = [m for m in own if own[m].learn_every_pass]
    assert every == ["rcd-every", "rcd-every-one", "rcd-every-one-2"]
    assert {own[m].cold_share for m in every} == {0.0}
    last_alone = [m for m in own if own[m].own_passes and m not in every]
    assert last_alone == ["rcd-own", "rcd-own-2", "rcd-own-one"]
    assert {own[m].cold_share for m in last_alone} == {0.25}
    assert {own[m].stale_share for m in every + last_alone} == {1.0}
    assert [m for m in own if own[m].own_passes == 2] == ["rcd-own-2", "rcd-every-one-2"]
    assert [m for m in every + last_alone if own[m].residual.weighting == "one"] == [
        "rcd-every-one", "rcd-every-one-2", "rcd-own-one",
    ]  # fmt: skip
    plain = [m for m, run in runs.items() if not run.feeds_back]
    assert plain == ["seqd", "seqd-double", "seqd-triple"]
    sizes = [runs[method].batch_size for method in plain]
    assert sizes == [size * runs["seqd"].batch_size for size in (1, 2, 3)]
    assert runs["rcd"].training().residual.weighting == "entropy"
    assert runs["rcd-fixed"].training().residual.weighting == "fixed"
    assert runs["rcd-one"].training().residual.weighting == "one"
    assert runs["rcd-top1"].training().residual.source == "top1"
    assert runs["rcd-stop-vector"].training().stop_vector
    left_out = ("output", "reference")
    same = {
        tuple((name, value) for name, value in vars(run).items() if name not in left_out)
        for run in runs.values()
    }
    assert len(same) == 15  # rcd and seqd differ in nothing else


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
        ({"methods": ()}, r"methods must be different ones, got \[\]"),
        ({"seeds": (1, 1)}, r"seeds must be different ones, got \[1, 1\]"),
        ({"seeds": (-1,)}, "seed must be at least 0, got seed=-1"),
        ({"steps": 0}, "steps must be at least 1, got steps=0"),
        ({"problems": 0}, "problems must be at least 1, got 0"),
        ({"thresholds": ()}, r"thresholds must be different numbers from 0 to 1, got \(\)"),
        ({"thresholds": (0.5, 2.0)}, r"from 0 to 1, got \(0.5, 2.0\)"),
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


def test_models_are_fed_back_what_they_learned_with():
    card = {"config": {"reference": None, "weighting": "one", "source": "top1"}}
    assert decoding_sweep.residual_of(card) is None  # a card older than own_passes
    card["config"]["own_passes"] = 2
    with pytest.raises(ValueError, match="needs the folder of a reference: the model was trained"):
        decoding_sweep.reference_of(card)
    assert decoding_sweep.reference_of(card, Path("now")) == Path("now")
    trained = {"config": {"reference": "then"}}
    assert decoding_sweep.reference_of(trained) == Path("then")
    assert decoding_sweep.reference_of(trained, Path("now")) == Path("now")
    assert decoding_sweep.residual_of(card) == ResidualContext(weighting="one", source="top1")
