"""Training of a tiny diffusion language model, alone and with a reference (RCD)."""

import dataclasses
import json
import shlex
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from jaxgen.sampling import ResidualContext, decode
from train import decoding_sweep, diffusion_lm
from train.decoding_sweep import Sweep, accuracy_at, carry_out, steps_at
from train.diffusion_lm import train
from train.diffusion_lm_config import MODELS, Config
from train.diffusion_lm_parts import answer, load_export, make_decoder
from train.metrics import read_rows
from train.problem_data import make_table, verdict
from train.run_folder import ConfigChangedError
from train.state import take_apart

STEPS = 6


def config(folder, **changes):
    settings = {
        "output": folder, "model": "tiny", "precision": "float32", "levels": (1,), "problems": 64,
        "block_length": 8, "batch_size": 8, "steps": STEPS, "warmup_steps": 2, "devices": 1,
        "learning_rate": 1e-2, "log_every": 1, "save_every": 4, "validate_every": 3,
        "test_problems": 6,
    }  # fmt: skip
    return Config(**(settings | changes))


def run(folder, on_row=None, **changes):
    return train(config(folder, **changes), on_row=on_row, show_progress=False)


def losses(result):
    return [row["loss"] for row in result.rows]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return run(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def fed_back(first, tmp_path_factory):
    export = first.folder / "export"
    return run(tmp_path_factory.mktemp("rcd"), start_from=export, reference=export)


def test_a_run_leaves_its_folder(first):
    folder = first.folder
    assert (first.step, first.stopped) == (STEPS, "finished")
    assert read_rows(folder / "metrics.jsonl") == first.rows
    assert losses(first)[-1] < losses(first)[0]
    rows = read_rows(folder / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0].keys() == {"step", "accuracy", "steps_correct", "steps", "tokens_per_step"}
    card = json.loads((folder / "export" / "card.json").read_text())
    assert card["steps"] == STEPS
    assert card["validation"] == rows[1]
    assert card["final_loss"] == pytest.approx(np.mean(losses(first)))
    assert card["data"] == "generated arithmetic, levels 1"


def test_the_export_is_the_average(first):
    model, _ = load_export(first.folder / "export", precision="float32")
    _, arrays = take_apart(model)
    assert {"target." + name for name in arrays} == first.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, first.arrays["target." + name])


def test_a_reference_stays_as_it_is_and_the_model_starts_from_its_export(first, fed_back):
    for name, array in first.arrays.items():
        reference = fed_back.arrays[name.replace("target.", "reference.")]
        np.testing.assert_array_equal(reference, array)
    trained = [name for name in fed_back.state.params if not name.startswith("target.")]
    assert not trained
    # It goes on from there: a new model's first loss is that of a uniform guess or worse.
    assert losses(fed_back)[0] < losses(first)[0] - 0.3


def test_the_export_of_rcd_is_a_model_like_any_other(fed_back):
    model, card = load_export(fed_back.folder / "export", precision="float32")
    assert card["config"]["reference"].endswith("export")
    assert take_apart(model)[1].keys() == {
        name.removeprefix("target.") for name in fed_back.state.params
    }


def test_stopping_and_resuming_gives_the_same_bits(first, fed_back, tmp_path):
    def interrupt(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    export = first.folder / "export"
    part = run(tmp_path, on_row=interrupt, start_from=export, reference=export)
    assert part.stopped == "SIGTERM"
    assert 2 < part.step < STEPS
    assert not (tmp_path / "export").exists()
    resumed = run(tmp_path, start_from=export, reference=export)
    assert (resumed.step, resumed.stopped) == (STEPS, "finished")
    ours, theirs = jax.tree.leaves(resumed.state), jax.tree.leaves(fed_back.state)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses(resumed) == losses(fed_back)


def test_two_devices_with_fsdp_have_the_same_losses(first, fed_back, tmp_path):
    export = first.folder / "export"
    options = {"start_from": export, "reference": export, "validate_every": 0}
    result = run(tmp_path, devices=2, fsdp=2, **options)
    np.testing.assert_allclose(losses(result), losses(fed_back), rtol=1e-4)


def test_two_devices_learn_every_pass_alike(first, tmp_path):
    options = {
        "start_from": first.folder / "export",
        "own_passes": 2,
        "learn_every_pass": True,
        "stale_share": 1.0,
        "weighting": "one",
        "validate_every": 0,
        "steps": 3,
    }
    one, two = (run(tmp_path / str(n), devices=n, fsdp=n, **options) for n in (1, 2))
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    _, card = load_export(two.folder / "export", precision="float32")
    assert card["config"]["learn_every_pass"]
    last = run(tmp_path / "last", **options | {"learn_every_pass": False})
    assert abs(losses(last)[0] - losses(one)[0]) > 1e-3


def test_bidirectional_training_with_rates_of_rows_and_int8_attention(tmp_path):
    options = {"sight": "bidirectional", "average": "row", "validate_every": 0, "steps": 3}
    exact = run(tmp_path / "exact", **options)
    int8 = run(tmp_path / "int8", attention="int8", **options)
    np.testing.assert_allclose(losses(int8), losses(exact), rtol=0.02)
    assert losses(int8) != losses(exact)


def test_answers_are_checked_one_by_one_whatever_the_batch(first):
    model, _ = load_export(first.folder / "export", precision="float32")
    table = make_table("arithmetic", (1,), 7)
    decoder = make_decoder("block_causal", 8, 0.9, ResidualContext())
    answers = answer(model, table, decoder, batch_size=3)
    whole = answer(model, table, decoder)
    for one, other in zip(dataclasses.astuple(answers), dataclasses.astuple(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    decoded = decode(model, table.prompts, decoder, new_tokens=table.layout.answer)
    np.testing.assert_array_equal(answers.tokens, decoded.tokens)
    verdicts = [verdict(p, row) for p, row in zip(table.problems, answers.tokens, strict=True)]
    assert answers.correct.tolist() == [verdict.correct for verdict in verdicts]
    assert answers.summary()["steps"] == pytest.approx(np.mean(answers.steps))


@pytest.mark.parametrize("sight", ["block_causal", "bidirectional"])
def test_passes_that_make_first_residuals_count_as_steps(first, monkeypatch, sight):
    model, _ = load_export(first.folder / "export", precision="float32")
    table, seen = make_table("arithmetic", (1,), 5, block_length=8), []

    def watch(*args, **options):
        seen.append(decode(*args, **options))
        return seen[-1]

    monkeypatch.setattr("train.diffusion_lm_parts.decode", watch)
    for init in ("zero", "reference"):
        decoder = make_decoder(sight, 8, 0.0, ResidualContext(init=init))
        reference = model if init == "reference" else None
        answers = answer(model, table, decoder, reference=reference)
        extra = answers.steps - np.asarray(seen[-1].steps)
        # Everything is surer than 0: a block takes one step, and one pass before it.
        assert (
            extra.tolist() == (0 * answers.steps if init == "zero" else answers.steps / 2).tolist()
        )


def test_a_right_answer_counts(first, monkeypatch):
    model, _ = load_export(first.folder / "export", precision="float32")
    table = make_table("arithmetic", (1,), 4)
    solutions = table.tokens[:, table.layout.prompt :]

    def cheat(*args, **options):
        decoded = decode(*args, **options)
        tokens = decoded.tokens.at[0].set(solutions[0]).at[2].set(solutions[2])
        return decoded._replace(tokens=tokens)

    monkeypatch.setattr("train.diffusion_lm_parts.decode", cheat)
    answers = answer(model, table, make_decoder("block_causal", 8, 0.9, None))
    assert answers.correct.tolist() == [True, False, True, False]
    assert answers.summary()["accuracy"] == 0.5


def test_a_sweep_writes_points_a_table_and_a_picture(first, fed_back, tmp_path):
    models = tuple(result.folder / "export" for result in (first, fed_back))
    sweep = Sweep(models, tmp_path / "sweep", thresholds=(0.0, 1.0), problems=6)
    points = carry_out(sweep, show_progress=False)
    assert [(point["rcd"], point["threshold"]) for point in points] == [
        (False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)
    ]  # fmt: skip
    # Nothing is surer than 1: one token a step. Everything is surer than 0: one step a block. The
    # first block has two tokens of the answer at least.
    for fast, slow in (points[:2], points[2:]):
        assert fast["steps"] <= slow["steps"] / 2
        assert fast["tokens_per_step"] > slow["tokens_per_step"]
    record = json.loads((tmp_path / "sweep" / "points.json").read_text())
    assert record["points"] == points
    assert (record["init"], record["restart"]) == ("zero", 0)
    assert (tmp_path / "sweep" / "curve.png").stat().st_size > 5000
    assert len((tmp_path / "sweep" / "table.md").read_text().splitlines()) == 6
    without = dataclasses.replace(sweep, without_residual=True, thresholds=(1.0,))
    assert [point["rcd"] for point in carry_out(without, show_progress=False)] == [False, False]


def test_a_sweep_decodes_as_its_options_say(fed_back, tmp_path, monkeypatch):
    decoded = []

    def watch(sight, block_length, threshold, residual):
        decoded.append((threshold, residual))
        return make_decoder(sight, block_length, threshold, residual)

    monkeypatch.setattr(decoding_sweep, "make_decoder", watch)
    options = {"thresholds": (0.9,), "problems": 2}
    sweep = Sweep((fed_back.folder / "export",), tmp_path, **options, restart=3, temperature=2.0)
    carry_out(sweep, show_progress=False)
    assert decoded == [(0.9, ResidualContext(temperature=2.0, restart=3))]


def test_accuracy_at_steps_lies_between_the_points():
    points = [{"steps": 10, "accuracy": 0.5}, {"steps": 20, "accuracy": 0.8}]
    assert accuracy_at(points, 15) == pytest.approx(0.65)
    assert accuracy_at(points, 30) == pytest.approx(0.8)
    assert accuracy_at(points, 5) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, r"models must be folders of runs with different names, got \[\]"),
        ({"models": (Path("a/rcd/export"), Path("b/rcd"))}, r"got \['rcd', 'rcd'\]"),
        ({"thresholds": (0.5, 0.5)}, r"thresholds must be different numbers from 0 to 1, got \(0"),
        ({"problems": 0}, "problems must be at least 1, got 0"),
        ({"reference": Path("a")}, "reference=a needs init='reference', got 'zero'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"restart": -1}, "restart must be at least 0, got -1"),
        ({"restart": 2, "init": "self"}, "init='self' takes restart=0, got 2"),
    ],
)
def test_refuses_sweeps(changes, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**({"models": (Path("a/export"),)} | changes))


def test_steps_at_an_accuracy_lie_between_the_points():
    points = [{"steps": 10.0, "accuracy": 0.5}, {"steps": 20.0, "accuracy": 0.7}]
    assert steps_at(points, 0.6) == pytest.approx(15)
    assert steps_at(points[::-1], 0.7) == pytest.approx(20)
    assert steps_at(points, 0.2) == 10
    assert steps_at(points, 0.8) is None


def test_refuses_an_export_of_another_shape(first, tmp_path):
    with pytest.raises(ValueError, match="holds a model of another shape"):
        run(tmp_path, model="small", start_from=first.folder / "export")


def test_a_changed_configuration_is_refused(first):
    with pytest.raises(ConfigChangedError, match=r"\n  block_length: 8 before, 4 now\n"):
        run(first.folder, block_length=4)
    again = run(first.folder, test_problems=8, time_limit=1e6)
    assert losses(again) == losses(first)


def test_a_run_from_before_an_option_had_its_default(first, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(first.folder, folder)
    path = folder / "config.json"
    options = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in options.items() if k != "learn_every_pass"}))
    assert run(folder).step == STEPS
    assert json.loads(path.read_text())["learn_every_pass"] is False
    path.write_text(json.dumps({k: v for k, v in options.items() if k != "block_length"}))
    with pytest.raises(ConfigChangedError, match=r"\n  block_length: 32 before, 8 now\n"):
        run(folder)


def test_the_models_have_the_sizes_that_the_help_names():
    sizes = {
        name: c.num_layers
        * c.width
        * (2 * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.ffn_dim)
        + 2 * c.vocabulary_size * c.width
        for name, c in MODELS.items()
    }
    assert sizes["tiny"] == pytest.approx(0.08e6, rel=0.1)
    assert sizes["small"] == pytest.approx(0.86e6, rel=0.05)
    assert sizes["medium"] == pytest.approx(4.8e6, rel=0.01)
    assert sizes["base"] == pytest.approx(10.6e6, rel=0.02)


def test_command_line_round_trip():
    original = Config(
        model="tiny", task="sudoku", levels=(1, 2), sight="bidirectional", weighting="fixed",
        reference=Path("a/export"), stop_vector=True, time_limit=12.5,
    )  # fmt: skip
    words = shlex.split(original.command())
    assert words[:3] == ["python", "-m", "train.diffusion_lm"]
    assert tyro.cli(Config, args=words[3:]) == original


def test_main_exits_with_the_signal(monkeypatch, first):
    result = dataclasses.replace(first, stopped="SIGTERM")
    monkeypatch.setattr(diffusion_lm, "train", lambda config: result)
    monkeypatch.setattr("sys.argv", ["diffusion_lm", "--model", "tiny"])
    with pytest.raises(SystemExit) as caught:
        diffusion_lm.main()
    assert caught.value.code == 143


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "llada"},
            r"model must be one of tiny, small, .*, base, got 'llada'",
        ),
        ({"levels": (9,)}, r"levels of arithmetic must be some of .* got \(9,\)"),
        ({"sight": "causal"}, "sight must be one of block_causal, bidirectional, got 'causal'"),
        ({"block_length": 0}, "block_length must be a positive int, got block_length=0"),
        ({"weighting": "fixed", "stop_vector": True}, "weighting and stop_vector decide what is"),
        ({"cold_share": 0.5}, "cold_share decide what is fed back, got reference=None and own_"),
        ({"learn_every_pass": True}, "learn_every_pass decide what is fed back"),
        ({"stale_share": 0.5}, "stale_share decide what is fed back"),
        ({"own_passes": 1, "reference": Path("a")}, "own_passes=1 takes no reference, got refer"),
        ({"stale_share": -1.0}, "stale_share must be from 0 to 1, got stale_share=-1.0"),
        ({"cold_share": 1.5}, "cold_share must be from 0 to 1, got cold_share=1.5"),
        ({"source": "top1"}, "source decide what is fed back, got reference=None"),
        ({"levels": (2, 2)}, r"levels must be different ones, got \(2, 2\)"),
        ({"attention": "int8"}, 'attention="int8" needs sight="bidirectional"'),
        ({"weighting": "none", "reference": Path("a")}, "weighting must be one of entropy, "),
        ({"problems": 0}, "problems must be at least 1, got problems=0"),
        ({"mask_id": 5}, "mask_id is of task=text, got mask_id=5"),
        ({"test_threshold": 1.5}, "test_threshold must be from 0 to 1, got test_threshold=1.5"),
    ],
)
def test_refuses_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(output=Path("unused"), **changes)
