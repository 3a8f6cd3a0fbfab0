"""Scores of pictures: Frechet distance, attribute accuracy, and the classifier on disk."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models.attribute_classifier import AttributeClassifier, AttributeClassifierConfig
from train import attribute_classifier, evaluate, openmoji
from train.scores import (
    AttributeScorer,
    acceptable_genders,
    attribute_accuracy,
    frechet_distance,
)


def normal(shape, mean=0.0, scale=1.0, seed=0):
    return mean + scale * np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def emojis():
    """Three concepts; the first two pictures are one drawing for two genders."""
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images[1] = images[0]
    ids = lambda *values: np.array(values, np.int32)
    return openmoji.Emojis(
        images=images,
        captions=("a", "man a", "b", "c"),
        concept=ids(0, 0, 1, 2),
        gender=ids(1, 2, 1, 0),
        skin_tone=ids(0, 0, 0, 1),
        concept_names=("a", "b", "c"),
        gender_names=("none", "neutral", "male"),
        skin_tone_names=("none", "light"),
        held_out=np.array([False, False, True, False]),
    )


def make_scorer(emojis):
    config = AttributeClassifierConfig(3, 3, 2, widths=(8, 8, 16))
    names = {name: getattr(emojis, f"{name}_names") for name in ("concept", "gender", "skin_tone")}
    return AttributeScorer(AttributeClassifier(config, rngs=nnx.Rngs(0)), names, {"task": "test"})


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: |difference of means|² + sum of (difference of deviations)²."""
    first = normal((200_000, 2)) * np.array([1.0, 2.0])
    second = normal((200_000, 2), seed=1) * np.array([3.0, 2.0]) + np.array([0.0, 1.0])
    assert frechet_distance(first, second) == pytest.approx(1.0 + 4.0, rel=0.03)


def test_frechet_distance_is_zero_for_one_sample_and_symmetric():
    first, second = normal((100, 8)), normal((60, 8), 0.5, seed=2)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


def test_frechet_distance_with_fewer_samples_than_features_is_finite():
    assert 0 < frechet_distance(normal((5, 64)), normal((7, 64), 1.0)) < np.inf


@pytest.mark.parametrize(
    ("message", "first", "second"),
    [
        (r"at least 2 feature vectors.*\(1, 4\)", np.zeros((1, 4)), np.zeros((5, 4))),
        (r"got shapes \(5, 3\) and \(5, 4\)", np.zeros((5, 3)), np.zeros((5, 4))),
        ("must be finite", np.full((5, 4), np.nan), np.zeros((5, 4))),
    ],
)
def test_frechet_distance_errors(message, first, second):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)


def test_genders_that_no_picture_can_tell_apart_are_both_right(emojis):
    expected = [[0, 1, 1], [0, 1, 1], [0, 1, 0], [1, 0, 0]]
    np.testing.assert_array_equal(acceptable_genders(emojis), np.array(expected, bool))


def test_attribute_accuracy_counts_each_attribute_and_all_at_once(emojis):
    rows = np.array([0, 1, 2, 3])
    ids = {
        "concept": np.array([0, 0, 1, 1]),  # the last one is wrong
        "gender": np.array([2, 0, 1, 0]),  # the second one is wrong
        "skin_tone": np.array([0, 0, 0, 1]),
    }
    accuracy = attribute_accuracy(ids, emojis, rows, acceptable_genders(emojis))
    assert accuracy == {
        "concept": 0.75,
        "gender": 0.75,
        "skin_tone": 1.0,
        "attributes": pytest.approx(10 / 12),
        "all": 0.5,
    }


def test_scorer_round_trip(emojis, tmp_path):
    scorer = make_scorer(emojis)
    scorer.save(tmp_path)
    loaded = AttributeScorer.load(tmp_path)
    assert loaded.names == scorer.names
    assert loaded.card == scorer.card
    ids, features = scorer.read(emojis.images)
    loaded_ids, loaded_features = loaded.read(emojis.images, batch_size=3)
    assert features.shape == (4, 16)
    np.testing.assert_allclose(loaded_features, features, rtol=0.1, atol=0.02)  # stored as bf16
    assert all(ids[name].shape == loaded_ids[name].shape == (4,) for name in ids)


def test_scorer_with_a_missing_file(emojis, tmp_path):
    make_scorer(emojis).save(tmp_path)
    (tmp_path / "names.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"names\.json"):
        AttributeScorer.load(tmp_path)


def test_augmentation_keeps_size_range_and_paper(emojis):
    import jax

    white = jnp.ones((6, 32, 32, 3))
    result = attribute_classifier.augment(white, jax.random.key(0))
    assert result.shape == white.shape
    noise = np.asarray(result) - 1
    assert np.abs(noise).max() < 1.0
    assert np.std(noise) < 0.2
    picture = jnp.asarray(emojis.images).astype(jnp.float32) / 127.5 - 1
    assert not np.allclose(attribute_classifier.augment(picture, jax.random.key(1)), picture)


def test_classifier_learns_what_it_sees(emojis):
    """A few steps on four pictures: the loss falls and the pictures are recognized."""
    config = attribute_classifier.Config(steps=60, batch_size=8, learning_rate=3e-3)
    small = dataclasses.replace(emojis, concept_names=("a", "b", "c"))
    scorer = attribute_classifier.train(config, small, show_progress=False)
    assert scorer.card["accuracy_on_training_pictures"]["concept"] >= 0.75
    assert scorer.card["pictures"] == 4


def test_rows_of_the_evaluation(tmp_path):
    emojis = openmoji.load(32, limit=256)
    groups = evaluate.choose_rows(emojis, 40)
    assert all(len(rows) == 40 for rows in groups.values())
    assert emojis.held_out[groups["held_out"]].all()
    composed = emojis.composed & ~emojis.held_out
    assert composed[groups["train"]].all()
    assert not emojis.held_out[groups["all_train"]].any()


def test_a_classifier_of_other_classes_is_refused(emojis):
    scorer = make_scorer(emojis)
    evaluate.check_classes(scorer, emojis)
    other = dataclasses.replace(emojis, concept_names=("a", "b", "z"))
    with pytest.raises(
        ValueError, match="3 classes of concept, the data has 3; they differ in 'c'"
    ):
        evaluate.check_classes(scorer, other)


@pytest.mark.parametrize("field", ["samples", "steps", "batch_size"])
def test_evaluation_settings_are_checked(field, tmp_path):
    with pytest.raises(ValueError, match=f"{field} must be at least [12], got 0"):
        evaluate.Config(model=tmp_path, **{field: 0})
