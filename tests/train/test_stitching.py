"""The comparison of samplers, in miniature and with models that were never trained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxgen.models import MMDIT_PRESETS, MMDiT, MMDiTConfig, TextEncoder, TextEncoderConfig
from jaxgen.models.attribute_classifier import AttributeClassifier, AttributeClassifierConfig
from jaxgen.pipelines import StitchedTextToImage, TextToImage, stitched_cost
from jaxgen.sampling import Alone, HybridStitch, SRDiffusion, TStitch
from jaxgen.text import WordTokenizer
from train import openmoji, stitching_report
from train.scores import (
    AttributeScorer,
    bootstrap_interval,
    peak_signal_to_noise,
    structural_similarity,
)
from train.stitching import Config, compare, draw, perceptual_distance
from train.stitching_report import METHODS, TARGETS, at_equal_cost, describe, plot, table

LARGE = MMDiTConfig(
    sample_size=16, in_channels=3, num_layers=2, num_heads=2, head_dim=8, joint_attention_dim=12,
    pooled_projection_dim=10, pos_embed_max_size=8,
)  # fmt: skip
SMALL = dataclasses.replace(LARGE, num_layers=1, num_heads=1)


@pytest.fixture(scope="module")
def emojis():
    """Eight pictures of noise with made-up attributes."""
    random = np.random.default_rng(0)
    number = np.arange(8)
    return openmoji.Emojis(
        images=random.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        captions=tuple(f"{who} cook" for who in ("man", "woman") * 4),
        concept=np.zeros(8, np.int32),
        gender=(1 + number % 2).astype(np.int32),
        skin_tone=(1 + number // 2 % 2).astype(np.int32),
        held_out=number >= 4,
        concept_names=("cook",),
        gender_names=("none", "man", "woman"),
        skin_tone_names=("none", "light", "dark"),
    )


@pytest.fixture(scope="module")
def pair(emojis):
    tokenizer = WordTokenizer.from_captions(emojis.captions, max_tokens=4)

    def pipeline(config, seed):
        text = TextEncoderConfig(tokenizer.size, 4, width=8, num_layers=1, num_heads=1,
                                 hidden_dim=12, pooled_dim=10)  # fmt: skip
        transformer = MMDiT(config, rngs=nnx.Rngs(seed))
        random = np.random.default_rng(seed)
        for path, variable in nnx.to_flat_state(nnx.state(transformer, nnx.Param)):
            if path[-1] == "kernel":
                variable[...] = (random.normal(size=variable.shape) * 0.2).astype(np.float32)
        return TextToImage(transformer, TextEncoder(text, rngs=nnx.Rngs(seed)), tokenizer)

    return StitchedTextToImage(pipeline(LARGE, 0), pipeline(SMALL, 1))


@pytest.fixture(scope="module")
def scorer(emojis):
    config = AttributeClassifierConfig(1, 3, 3, widths=(8, 8, 8))
    names = {name: getattr(emojis, f"{name}_names") for name in ("concept", "gender", "skin_tone")}
    return AttributeScorer(AttributeClassifier(config, rngs=nnx.Rngs(0)), names, {})


def test_every_policy_is_measured_against_the_large_model(pair, scorer, emojis, tmp_path):
    config = Config(captions=6, steps=10, batch_size=4, quick=True)
    seen = {}
    records = compare(
        pair,
        scorer,
        emojis,
        config,
        lambda record, pictures, _: seen.update({str(record): pictures}),
    )
    assert [record["method"] for record in records] == [
        "alone", "alone", "T-Stitch", "SRDiffusion", "HybridStitch"
    ]  # fmt: skip
    large, *others = records
    assert (large["distance"], large["psnr"], large["speed_up"]) == (0.0, 100.0, 1.0)
    assert large["ssim"] == pytest.approx(1.0)
    assert large["speed_up_in_operations"] == pytest.approx(1.0)
    for record in others:
        assert record["distance"] > 0
        low, high = record["distance_interval"]
        assert low <= record["distance"] <= high
        assert record["psnr"] < 100
        assert record["speed_up_in_operations"] > 1
    assert all(pictures.shape == (6, 16, 16, 3) for pictures in seen.values())
    alone = pair.large(
        [emojis.captions[0]], steps=10, seed=[0], guidance_scale=config.guidance_scale
    )
    assert alone.shape == (1, 16, 16, 3)
    rows = table(records).splitlines()
    assert len(rows) == 7
    assert any(row.startswith("| HybridStitch, 22% to 52%, 30%, x0_diff |") for row in rows)
    plot({"captions": records}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    json.dumps(records, allow_nan=False)


def test_batches_of_any_size_draw_the_same(pair, emojis):
    config = Config(captions=4, steps=10, batch_size=3)
    captions = list(emojis.captions[:4])
    some, seconds = draw(pair, TStitch(), captions, config)
    whole, _ = draw(pair, TStitch(), captions, dataclasses.replace(config, batch_size=4))
    assert seconds > 0
    assert np.abs(some.astype(int) - whole.astype(int)).max() <= 1


def test_costs_count_both_models(pair):
    costs = [pair.cost(policy, 50) for policy in (Alone(), SRDiffusion(0.5), Alone("small"))]
    assert costs[0] == 1
    assert costs[1] == pytest.approx((1 + costs[2]) / 2)
    hybrid = pair.cost(HybridStitch(0.2, 0.6, 1e-9 + 0.5), 50)
    assert costs[2] < hybrid < 1


def test_all_settings_differ_and_have_names():
    policies = Config().policies()
    names = [describe(METHODS[type(p)], dataclasses.asdict(p)) for p in policies]
    assert len(set(names)) == len(names) == len(set(policies))
    assert names[:3] == ["large only", "small only", "T-Stitch, 20% small"]
    assert "SRDiffusion, adaptive" in names
    for policy in policies:
        assert policy.stages(Config().steps)


def test_measures_of_pictures():
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    assert peak_signal_to_noise(a, a).tolist() == [100.0] * 3
    np.testing.assert_allclose(structural_similarity(a, a), 1.0)
    other = np.where(a < 200, a + 10, a - 10).astype(np.uint8)
    np.testing.assert_allclose(peak_signal_to_noise(a, other), 28.13, atol=0.01)
    noise = random.integers(0, 256, a.shape, dtype=np.uint8)
    assert np.abs(structural_similarity(a, noise)).max() < 0.1
    # Constant pictures differ in their means only: (2 ab + c) / (a² + b² + c).
    flat = [np.full((1, 16, 16, 3), level, np.uint8) for level in (100, 150)]
    wanted = (2 * 100 * 150 + 6.5025) / (100**2 + 150**2 + 6.5025)
    np.testing.assert_allclose(structural_similarity(*flat), wanted)
    low, high = bootstrap_interval(random.normal(5, 1, 400))
    assert low < 5 < high
    assert high - low == pytest.approx(4 * 1 / 20, rel=0.2)
    features, moved = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[0.0, 5.0], [0.0, 0.0]])
    np.testing.assert_allclose(perceptual_distance(features + moved, features), [1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": 3}, "captions must be at least 4, got 3"),
        ({"steps": 9}, "steps must be at least 10, got 9"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_the_shipped_models_are_the_default():
    root = Path(__file__).parents[2]
    for folder in (Config().large, Config().small, Config().classifier):
        assert (root / folder / "card.json").is_file()


def test_methods_are_compared_at_equal_cost():
    def record(method, policy, cost, even, odd):
        return {
            "method": method, "policy": policy,
            "speed_up_in_operations": cost, "distances": [even, odd] * 20,
        }  # fmt: skip

    hybrid = dataclasses.asdict(HybridStitch())
    records = [
        record("alone", {"model": "large"}, 1.0, 0.0, 0.0),
        record("T-Stitch", {"share": 0.4}, 1.49, 0.5, 0.7),
        record("T-Stitch", {"share": 0.9}, 3.0, 0.1, 0.1),
        record("HybridStitch", {**hybrid, "start": 0.3}, 1.5, 0.2, 0.4),
        record("HybridStitch", {**hybrid, "keep_text": True}, 1.52, 0.1, 0.5),
    ]
    rows = at_equal_cost(records).splitlines()[2:]
    assert rows == [
        "| 1.49 | T-Stitch, 40% small | 0.700 (0.700 to 0.700) | +0.200 (+0.200 to +0.200) |",
        "| 1.52 | HybridStitch, 22% to 52%, 30%, x0_diff, text kept | 0.500 (0.500 to 0.500) |  |",
    ]


def test_reports_on_earlier_runs(tmp_path, monkeypatch, capsys):
    record = {"method": "T-Stitch", "policy": {"share": 0.4}, "speed_up_in_operations": 1.5,
              "distance": 0.25, "distances": [0.2, 0.3] * 20, "psnr": 20.0}  # fmt: skip
    result = {"config": {"prompts": "empty"}, "records": [record]}
    (tmp_path / "stitching.json").write_text(json.dumps(result))
    given = ["report", str(tmp_path / "stitching.json"), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr("sys.argv", given)
    stitching_report.main()
    printed = capsys.readouterr().out
    assert "stitching, prompts: empty" in printed
    assert at_equal_cost([record]) in printed
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="at least one file"):
        stitching_report.Report(())


def test_every_method_has_policies_of_the_compared_costs():
    shape = {"large": MMDIT_PRESETS["openmoji-large"], "small": MMDIT_PRESETS["openmoji-small"]}
    for target in TARGETS:
        costs = {
            (type(policy), getattr(policy, "keep_text", False))
            for policy in Config().policies()
            for cost in [1 / stitched_cost(policy, 50, **shape, patches=(256, 256), text_tokens=16)]
            if abs(cost / target - 1) < 0.03
        }
        assert {TStitch, SRDiffusion, HybridStitch} <= {method for method, _ in costs}
        assert (HybridStitch, True) in costs


def test_prompts_may_be_empty(pair, scorer, emojis):
    seen = []
    config = Config(captions=6, steps=10, batch_size=6, quick=True, prompts="empty")
    records = compare(pair, scorer, emojis, config, lambda *given: seen.append(given[2]))
    assert seen == [[""] * 6] * len(records)
    assert all(record["accuracy"] is None for record in records)
    assert len(set(records[2]["distances"])) > 1
    assert all(row.split("|")[7].strip() == "" for row in table(records).splitlines()[2:])
