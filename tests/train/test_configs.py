"""Experiment files are records: they agree with the cards of the models that they made."""

import dataclasses
from pathlib import Path

import pytest

from jaxgen.pipelines import TextToImage
from train import run_folder
from train.configs import int8_against_exact, openmoji_large, openmoji_small
from train.text_to_image_config import Config

WEIGHTS = Path(__file__).parent.parent.parent / "weights"


@pytest.mark.parametrize(
    ("name", "config"),
    [("large", openmoji_large.CONFIG), ("small", openmoji_small.CONFIG)],
    ids=["large", "small"],
)
def test_shipped_models_have_the_settings_of_their_experiment(name, config):
    model = TextToImage.from_pretrained(WEIGHTS / f"openmoji-{name}")
    known, now = model.card["config"], run_folder.to_json(config)
    assert known == {option: now[option] for option in known}
    assert now.keys() - known.keys() <= config.may_change  # newer ones, which decide no update
    assert model.card["steps"] == config.steps
    assert model.card["name"] == config.model


def test_comparing_refuses_runs_that_did_not_finish(monkeypatch, tmp_path):
    @dataclasses.dataclass
    class Stopped:
        rows: list
        stopped: str = "SIGINT"
        step: int = 3

    rows = [{"step": 3, "steps": 1, "loss": 1.0}]
    monkeypatch.setattr(int8_against_exact, "train", lambda config: Stopped(rows))
    with pytest.raises(RuntimeError, match=r"exact run stopped at step 3 \(SIGINT\)"):
        int8_against_exact.compare(Config(output=tmp_path))


def test_comparing_reports_the_relative_difference(monkeypatch, tmp_path):
    @dataclasses.dataclass
    class Finished:
        rows: list
        stopped: str = "finished"
        step: int = 1

    losses = {"exact": 2.0, "int8": 2.1}
    monkeypatch.setattr(
        int8_against_exact,
        "train",
        lambda config: Finished([{"step": 1, "steps": 1, "loss": losses[config.attention]}]),
    )
    result = int8_against_exact.compare(Config(output=tmp_path))
    assert result == losses | {"relative_difference": pytest.approx(0.05)}
