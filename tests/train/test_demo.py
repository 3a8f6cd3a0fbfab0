"""The demo, with a model of two small layers: it must end with pictures and a report."""

import functools
import re

import pytest
from flax import nnx
from PIL import Image

from jaxgen.models.mmdit import MMDIT_PRESETS, MMDiT
from jaxgen.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxgen.pipelines import TextToImage
from jaxgen.text import WordTokenizer
from train import demo, openmoji


@pytest.fixture
def few_emojis(monkeypatch):
    monkeypatch.setattr(openmoji, "load", functools.partial(openmoji.load, limit=256))
    return openmoji.load(64)


def test_demo_writes_pictures_and_a_report(few_emojis, tmp_path, capsys):
    tokenizer = WordTokenizer.from_captions(few_emojis.captions)
    rngs = nnx.Rngs(0)
    encoder = TextEncoder(TextEncoderConfig(vocabulary_size=tokenizer.size), rngs=rngs)
    model = TextToImage(MMDiT(MMDIT_PRESETS["tiny"], rngs=rngs), encoder, tokenizer)
    for name in ("large", "small"):
        model.save_pretrained(tmp_path / "weights" / f"openmoji-{name}")
    mine = tmp_path / "output" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")

    config = demo.Config(
        output=tmp_path / "output",
        weights=tmp_path / "weights",
        captions=3,
        steps=1,
        train_seconds=15.0,
        train_model="tiny",
    )
    report = demo.run(config).read_text(encoding="utf-8")

    assert mine.read_text() == "keep me"
    for name in ("grid.png", "loss.png", "after_a_minute.png"):
        assert f'src="{name}"' in report
        Image.open(config.output / name).verify()
    assert "openmoji.org" in report
    assert not re.search(r"\bnan\b|\bnone\b", report, re.IGNORECASE)
    printed = capsys.readouterr().out
    assert "large: " in printed
    assert "small: " in printed


@pytest.mark.parametrize(("count", "groups"), [(6, (2, 2, 2)), (8, (3, 3, 2)), (3, (1, 1, 1))])
def test_rows_are_things_then_people_then_held_out_people(few_emojis, count, groups):
    rows = demo.choose_rows(few_emojis, count)
    things, people, unseen = groups
    assert [bool(few_emojis.held_out[row]) for row in rows] == [False] * (things + people) + [
        True
    ] * unseen
    assert [bool(few_emojis.composed[row]) for row in rows] == [False] * things + [True] * (
        people + unseen
    )
    assert len(set(rows)) == count


def test_a_folder_without_models_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model \(openmoji-large, openmoji-small"):
        demo.run(demo.Config(weights=tmp_path))
    with pytest.raises(ValueError, match="captions must be at least 3, got 2"):
        demo.Config(captions=2)
