"""The demo, with models of two small layers: it must end with pictures and a report."""

import dataclasses
import functools
import html
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxgen.models.mmdit import MMDIT_PRESETS, MMDiT
from jaxgen.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxgen.pipelines import StitchedTextToImage, TextToImage
from jaxgen.sampling import Alone, HybridStitch, SRDiffusion, TStitch
from jaxgen.text import WordTokenizer
from train import demo, demo_samplers, demo_sums, openmoji, stitching
from train.decoding_history import TOKEN_NAMES, colored, history
from train.diffusion_lm_parts import answer
from train.problems import EOS, MASK
from train.scores import peak_signal_to_noise


@pytest.fixture
def few_emojis(monkeypatch):
    monkeypatch.setattr(openmoji, "load", functools.partial(openmoji.load, limit=256))
    return openmoji.load(64)


def tiny_model(captions, seed, num_layers=2):
    """A model whose weights are random throughout; new ones start with zeros and see no caption."""
    tokenizer = WordTokenizer.from_captions(captions)
    encoder = TextEncoder(TextEncoderConfig(tokenizer.size), rngs=nnx.Rngs(seed))
    config = dataclasses.replace(MMDIT_PRESETS["tiny"], num_layers=num_layers)
    transformer = MMDiT(config, rngs=nnx.Rngs(seed))
    random = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(transformer, nnx.Param)):
        if path[-1] == "kernel":
            variable[...] = (random.normal(size=variable.shape) * 0.1).astype(np.float32)
    return TextToImage(transformer, encoder, tokenizer)


@pytest.fixture
def weights(few_emojis, tmp_path):
    """The folder of two models that draw different pictures."""
    for seed, (name, layers) in enumerate((("large", 2), ("small", 1))):
        model = tiny_model(few_emojis.captions, seed, layers)
        model.save_pretrained(tmp_path / "weights" / f"openmoji-{name}")
    return tmp_path / "weights"


def test_demo_writes_pictures_and_a_report(few_emojis, weights, tmp_path, capsys, monkeypatch):
    show = demo_sums.show
    monkeypatch.setattr(demo_sums, "show", lambda *given: show(*given) + "<p>sums</p>")
    mine = tmp_path / "output" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")

    config = demo.Config(
        output=tmp_path / "output",
        weights=weights,
        captions=3,
        sampler_captions=3,
        steps=10,
        sums=3,
        train_seconds=15.0,
        train_model="tiny",
    )
    report = demo.run(config).read_text(encoding="utf-8")

    assert mine.read_text() == "keep me"
    for name in ("grid.png", "samplers.png", "loss.png", "after_a_minute.png"):
        assert f'src="{name}"' in report
        Image.open(config.output / name).verify()
    assert "openmoji.org" in report
    assert not re.search(r"\bnan\b|\bnone\b", report, re.IGNORECASE)
    printed = capsys.readouterr().out
    assert "large: " in printed
    assert "small: " in printed
    for text in (report, printed):
        samplers = re.findall(r"large only|T-Stitch, 40|SRDiffusion, 50|HybridStitch, 22", text)
        assert samplers == ["large only", "T-Stitch, 40", "SRDiffusion, 50", "HybridStitch, 22"]
        assert "reconstruction from the abstract" in text
    assert "3. 3 sums" in printed
    assert "skipped, there is no model arithmetic-seqd" in printed
    assert report.index("samplers.png") < report.index("<p>sums</p>") < report.index("loss.png")
    assert "writes in any order" not in report
    numbers = [printed.index(f"{number}. ") for number in range(1, 5)]
    assert numbers == sorted(numbers)


def test_samplers_draw_what_their_policies_draw(few_emojis):
    captions = few_emojis.captions[:3]
    models = (tiny_model(few_emojis.captions, 0), tiny_model(few_emojis.captions, 1, 1))
    pair = StitchedTextToImage(*models)
    samples = list(demo_samplers.compare(pair, captions, steps=10))

    assert [type(one.policy) for one in samples] == [Alone, TStitch, SRDiffusion, HybridStitch]
    large = pair.large(captions, steps=10, seed=[0, 1, 2])
    for one in samples:
        wanted = pair(captions, policy=one.policy, steps=10, seed=[0, 1, 2])
        assert np.abs(one.pictures.astype(int) - wanted).max() <= 1
        np.testing.assert_allclose(
            one.decibels, peak_signal_to_noise(one.pictures, samples[0].pictures)
        )
        assert one.speed_up == samples[0].seconds / one.seconds
    assert np.abs(samples[0].pictures.astype(int) - large).max() <= 1
    assert samples[0].decibels.tolist() == [100.0] * 3
    assert all(one.decibels.max() < 50 for one in samples[1:])


def test_times_become_speed_ups(weights, tmp_path, monkeypatch, capsys):
    seconds = {Alone: 3.0, TStitch: 2.0, SRDiffusion: 1.5, HybridStitch: 1.2}
    levels = {Alone: 100, TStitch: 110, SRDiffusion: 90, HybridStitch: 151}

    def draw(pair, policy, captions, config):
        layers = [model.transformer.config.num_layers for model in (pair.large, pair.small)]
        assert (layers, config.steps, config.batch_size) == ([2, 1], 12, 1)
        pictures = np.full((len(captions), 8, 8, 3), levels[type(policy)], np.uint8)
        return pictures, seconds[type(policy)]

    monkeypatch.setattr(stitching, "draw", draw)
    folders = {name: weights / f"openmoji-{name}" for name in ("small", "large")}
    captions = ["red apple", "ant"]
    page = demo_samplers.show(folders, captions, captions, 12, tmp_path)

    printed = capsys.readouterr().out
    for cells in (
        ("large only", "3.00 s", "1.00", ""),
        ("T-Stitch, 40% small", "2.00 s", "1.50", "28.1 dB"),
        ("SRDiffusion, 50% large", "1.50 s", "2.00", "28.1 dB"),
        ("HybridStitch, 22% to 52%, 30%, x0_diff", "1.20 s", "2.50", "14.0 dB"),
    ):
        assert re.search(r" +".join(cell for cell in cells if cell) + "\n", printed)
        assert "<tr><td>" + "<td>".join(cells) + "<" in page
    assert "medians over 2 pictures" in page
    assert "Compilation is not counted" in printed
    picture = np.asarray(Image.open(tmp_path / "samplers.png"))
    gray = picture[:, picture.shape[1] // 4, 0]  # a column of pixels through the first pictures
    places = [np.flatnonzero(gray == level) for level in levels.values()]
    assert min(map(len, places)) >= 170
    middles = [np.median(place) for place in places]
    assert middles == sorted(middles)


def test_one_model_alone_has_nothing_to_share(tmp_path, capsys):
    folders = {"small": tmp_path}
    assert demo_samplers.show(folders, ["ant"], ["ant"], 10, tmp_path) == ""
    assert "skipped, there is no large model" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("name", "smallest"), [("captions", 3), ("sampler_captions", 3), ("steps", 10), ("sums", 3)]
)
def test_refuses_too_few(name, smallest):
    demo.Config(**{name: smallest})
    with pytest.raises(ValueError, match=f"{name} must be at least {smallest}, got {smallest - 1}"):
        demo.Config(**{name: smallest - 1})


def test_sums_are_what_the_shipped_models_answer(capsys):
    weights = Path(__file__).parents[2] / "weights"
    page = demo_sums.show(weights, 3)
    printed = capsys.readouterr().out
    for name in demo_sums.MODELS:
        solver = demo_sums.Solver.load(name, weights / f"arithmetic-{name}", 3)
        for threshold, decoder in solver.decoders.items():
            found = answer(solver.model, solver.table, decoder).summary()
            cells = f"{threshold:g}", f"{found['accuracy']:.0%}", f"{found['steps']:.1f}"
            assert "<td>".join((solver.name, *cells)) in page
            assert re.search(rf"{re.escape(solver.name)} +" + " +".join(cells), printed)
        states = history(solver.model, solver.table.prompts[0], decoder, solver.table.layout.answer)
        alone = answer(solver.model, solver.table, decoder)
        assert (states[-1] == alone.tokens[0]).all()
        assert len(states) - 1 == alone.steps[0]
        text = "".join(TOKEN_NAMES[token] for token in states[-1]).partition("end")[0]
        assert re.sub("<[^>]+>", "", colored(states)) == html.escape(text)
        assert html.escape(solver.table.problems[0].prompt) in page
        assert colored(states) in page


def test_colors_tell_the_step():
    digit, other = 5, 6
    states = [
        np.full(4, MASK),
        np.array([digit, MASK, MASK, EOS]),
        np.array([digit, other, EOS, EOS]),
    ]
    found = re.findall(r"rgb\((\d+),(\d+),(\d+)\);color:(\w+)\">(.)<", colored(states))
    assert [cells[4] for cells in found] == [TOKEN_NAMES[digit], TOKEN_NAMES[other]]
    early, late = (np.array(cells[:3], int) for cells in found)
    assert late.sum() > early.sum()  # bright is late
    assert found[1][3] == "black"
