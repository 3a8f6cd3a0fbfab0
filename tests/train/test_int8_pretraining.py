"""The experiments on pretraining, with a tiny model and a few steps."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.train import commands
from train.configs import int8_pretraining, pretraining_speed
from train.configs.int8_pretraining import ARMS, EACH, Experiment, carry_out, table
from train.run_folder import ConfigChangedError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return commands.write_text(tmp_path_factory.mktemp("text") / "files")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def small(text):
    return dataclasses.replace(
        EACH, data=text, model="tiny", precision="float32", context=32, batch_size=4, steps=8,
        warmup_steps=2, learning_rate=1e-2, devices=1, held_out=0.2, validate_every=8,
        statistics_every=0, log_every=2,
    )  # fmt: skip


def test_runs_see_the_same_tokens_and_differ_in_what_they_say(text, tmp_path):
    experiment = Experiment(each=small(text), output=tmp_path, batch_sizes=(2, 8), seeds=(0, 3))
    runs = experiment.runs()
    assert len({run.output for run in runs}) == len(runs) == 2 * 2 * len(ARMS)
    assert {run.batch_size * run.steps for run in runs} == {32}
    assert {run.batch_size * run.warmup_steps for run in runs} == {8}
    kinds = {(run.attention, run.qk_norm, run.smooth_keys, run.smooth_queries) for run in runs}
    assert len(kinds) == len(ARMS)


def test_an_experiment_goes_on_and_ends_in_a_table(text, tmp_path, monkeypatch):
    experiment = Experiment(
        each=small(text), output=tmp_path, arms=("exact", "int8"), batch_sizes=(4,), seeds=(0,)
    )
    results = carry_out(experiment, show_progress=False)
    assert [result["arm"] for result in results] == ["exact", "int8"]
    assert results[0]["validation"] != results[1]["validation"]
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "table.md").read_text() == table(results)
    monkeypatch.setattr(int8_pretraining, "train", None)  # nothing is left to train
    assert carry_out(experiment, show_progress=False) == results
    each = dataclasses.replace(experiment.each, log_every=3, export_dtype="bfloat16")
    watched = dataclasses.replace(experiment, each=each, time_limit=100.0)
    assert carry_out(watched, show_progress=False) == results
    each = dataclasses.replace(each, learning_rate=1e-5, betas=(0.8, 0.9), kind="text")
    message = (
        r"exact-4-0 holds a run with another configuration:\n"
        r"  betas: \[0\.9, 0\.95\] before, \[0\.8, 0\.9\] now\n"
        r"  kind: None before, 'text' now\n"
        r"  learning_rate: 0\.01 before, 1e-05 now\nrepeat"
    )
    with pytest.raises(ConfigChangedError, match=message):
        carry_out(dataclasses.replace(experiment, each=each), show_progress=False)


def test_the_table_compares_equal_seeds():
    results = [
        {"arm": arm, "tokens_per_step": 1024, "seed": seed, "loss": loss, "validation": loss}
        for arm, losses in (("int8", (2.02, 1.01)), ("exact", (2.0, 1.0)))
        for seed, loss in enumerate(losses)
    ]
    rows = table(results).splitlines()
    assert rows[2].startswith("| 1,024 | exact | 2 | 1.5000 ± 0.7071 |")
    assert rows[3].endswith("| +1.000 ± 0.000 % |")


def test_the_table_shows_what_is_missing():
    losses = {("exact", 0): 2.0, ("exact", 1): None, ("int8", 0): None, ("int8", 1): 4.0}
    results = [
        {"arm": arm, "tokens_per_step": 1024, "seed": seed, "loss": 3.0, "validation": loss}
        for (arm, seed), loss in losses.items()
    ]
    rows = table(results).splitlines()
    assert rows[2].endswith("| 3.0000 ± 0.0000 | 2.0000 |  |")
    assert rows[3].endswith("| 3.0000 ± 0.0000 | 4.0000 | - |")
    lost = [result | {"loss": None, "validation": None} for result in results]
    assert table(lost).splitlines()[2].endswith("| 2 | - | - |  |")


def test_the_experiment_as_it_is_can_be_made():
    runs = Experiment().runs()
    assert len(runs) == len(ARMS) * 2 * 3
    assert len({run.batch_size * run.steps for run in runs}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"each": dataclasses.replace(EACH, validate_every=0), "batch_sizes": (64,)},
            "each needs validate_every above 0",
        ),
        ({"arms": ("fp8",)}, "arms must be among exact, .*got \\['fp8'\\]"),
        ({"batch_sizes": (7,)}, "got \\[7\\] for 98304 rows"),
    ],
)
def test_refuses_experiments(changes, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**changes)


def test_speed_is_measured_for_both(text):
    speed = pretraining_speed.Speed(
        model="tiny", context=32, batch_size=4, steps=20, precision="float32", data=text
    )
    found = pretraining_speed.measure(speed, show_progress=False)
    assert [result["attention"] for result in found] == ["exact", "int8"]
    assert all(result["tokens_per_second"] > 0 and result["mfu"] > 0 for result in found)


def test_the_document_shows_the_table_of_the_record():
    record = json.loads((ROOT / "train/configs/results/int8_pretraining.json").read_text())
    assert table(record["results"]) in (ROOT / "docs/pretraining.md").read_text()
    finished = {f"{arm}-{rows}-{seed}" for arm, rows, seed in _runs(record)}
    assert finished == set(record["curves"]) == set(record["validation"])
    assert {arm for arm, _, _ in _runs(record)} == set(ARMS) - set(record["not_finished"])


def _runs(record):
    context = record["settings"]["context"]
    return [
        (result["arm"], result["tokens_per_step"] // context, result["seed"])
        for result in record["results"]
    ]
