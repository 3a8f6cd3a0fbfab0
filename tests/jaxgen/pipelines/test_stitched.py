"""Two tiny models that draw one picture together."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import MMDiT, MMDiTConfig, TextEncoder, TextEncoderConfig
from jaxgen.pipelines import StitchedTextToImage, TextToImage
from jaxgen.sampling import Alone, FlowMatchingSchedule, HybridStitch, TStitch
from jaxgen.text import WordTokenizer

TOKENIZER = WordTokenizer(("apple", "blue", "red"), 4)
LARGE = MMDiTConfig(
    sample_size=8, in_channels=3, num_layers=2, num_heads=2, head_dim=8, joint_attention_dim=12,
    pooled_projection_dim=10, pos_embed_max_size=6,
)  # fmt: skip
SMALL = dataclasses.replace(LARGE, num_layers=1, num_heads=1)
STEPS = 4


def pipeline(config, seed, schedule=None):
    text = TextEncoderConfig(TOKENIZER.size, 4, width=8, num_layers=1, num_heads=1, hidden_dim=12,
                             pooled_dim=10)  # fmt: skip
    rngs = nnx.Rngs(seed)
    transformer = MMDiT(config, rngs=rngs)
    random = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(transformer, nnx.Param)):
        if path[-1] == "kernel":
            variable[...] = (random.normal(size=variable.shape) * 0.2).astype(np.float32)
    return TextToImage(transformer, TextEncoder(text, rngs=rngs), TOKENIZER, schedule=schedule)


@pytest.fixture(scope="module")
def pair():
    return StitchedTextToImage(pipeline(LARGE, 0), pipeline(SMALL, 1))


CAPTIONS = ["red apple", "blue"]


@pytest.mark.parametrize("name", ["large", "small"])
def test_one_model_alone_is_its_own_pipeline(pair, name):
    found = pair(CAPTIONS, policy=Alone(name), steps=STEPS, seed=3, guidance_scale=2.5)
    wanted = getattr(pair, name)(CAPTIONS, steps=STEPS, seed=3, guidance_scale=2.5)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


def test_the_default_is_hybrid_and_previews_end_in_the_result(pair):
    policy = HybridStitch(2, 3)
    previews = list(pair.stream(CAPTIONS, policy=policy, steps=STEPS, every=1))
    assert [preview.step for preview in previews] == [1, 2, 3, 4]
    assert [preview.stage.kind for preview in previews] == ["large", "large", "hybrid", "small"]
    assert [preview.mask is not None for preview in previews] == [False, False, True, False]
    assert previews[2].mask.shape == (2, 4, 4)
    assert previews[2].mask.sum(axis=(1, 2)).tolist() == [5, 5]
    whole = pair(CAPTIONS, policy=policy, steps=STEPS)
    np.testing.assert_array_equal(previews[-1].pictures, whole)
    np.testing.assert_array_equal(
        pair(CAPTIONS, steps=10), pair(CAPTIONS, steps=10, policy=HybridStitch())
    )


def test_seeds_scales_and_scores(pair):
    policy = HybridStitch(1, 3, share=0.25, score="user")
    scores = np.zeros((2, 4, 4))
    scores[:, 1:3, 1:3] = 1.0
    *_, preview, _ = pair.stream(CAPTIONS, policy=policy, steps=STEPS, scores=scores)
    np.testing.assert_array_equal(preview.mask, scores > 0)
    one = pair(CAPTIONS[:1], policy=TStitch(0.5), steps=STEPS, seed=7)
    two = pair(CAPTIONS, policy=TStitch(0.5), steps=STEPS, seed=[7, 7])
    assert np.abs(one[0].astype(int) - two[0].astype(int)).max() <= 1
    differ = pair(CAPTIONS, policy=TStitch(0.5), steps=STEPS, guidance_scale=(4.0, 1.0))
    assert (differ != pair(CAPTIONS, policy=TStitch(0.5), steps=STEPS)).any()


def test_the_large_model_is_released_before_the_small_one_draws(pair):
    released = []
    for preview in pair.stream(
        CAPTIONS, policy=HybridStitch(2, 3), steps=STEPS, every=1, release=released.append
    ):
        assert released == (["large"] if preview.step == STEPS else [])
    assert released == ["large", "small"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda large, small: (large, pipeline(dataclasses.replace(SMALL, sample_size=4), 0)),
         "large and small must have one sample_size, got 8 and 4"),
        (lambda large, small: (large, pipeline(SMALL, 0, FlowMatchingSchedule(1.0))),
         r"must have one schedule, got .*shift=3.0\) and .*shift=1.0\)"),
    ],
)  # fmt: skip
def test_refuses_models_that_do_not_fit(pair, make, message):
    with pytest.raises(ValueError, match=message):
        StitchedTextToImage(*make(pair.large, pair.small))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": (1.0, 2.0, 3.0)}, r"must be one number or two, got \(1.0, 2.0, 3.0\)"),
        ({"guidance_scale": (1.0, float("nan"))}, "guidance_scale must be a finite number"),
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"policy": HybridStitch(1, 3, score="user"), "scores": np.zeros((2, 16))},
         r"scores must have shape \(2, 4, 4\), got \(2, 16\)"),
        ({"policy": HybridStitch(0, 3)}, "needs 2 large steps before it"),
    ],
)  # fmt: skip
def test_refuses_arguments(pair, options, message):
    with pytest.raises(ValueError, match=message):
        pair(CAPTIONS, **({"steps": STEPS} | options))


def test_every_option_works_with_strict_promotion(pair):
    with jax.numpy_dtype_promotion("strict"):
        pair(CAPTIONS, policy=HybridStitch(2, 3, refresh=1, update=True, blend=1), steps=STEPS)
