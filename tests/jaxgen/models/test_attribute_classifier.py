import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import AttributeClassifier, AttributeClassifierConfig

CONFIG = AttributeClassifierConfig(
    num_concepts=5, num_genders=3, num_skin_tones=4, widths=(8, 8, 16, 16)
)


def _classifier(config=CONFIG):
    return AttributeClassifier(config, rngs=nnx.Rngs(0))


def _images(*shape):
    return jax.random.uniform(jax.random.key(0), shape, minval=-1.0, maxval=1.0)


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (1, 8, 24, 3)])
def test_logits_and_features(shape):
    classifier = _classifier()
    logits = nnx.jit(lambda model, images: model(images))(classifier, _images(*shape))
    batch = shape[0]
    expected = {"concept": (batch, 5), "gender": (batch, 3), "skin_tone": (batch, 4)}
    assert {name: value.shape for name, value in logits.items()} == expected
    assert jax.eval_shape(classifier.features, _images(*shape)).shape == (batch, 16)


def test_default_size():
    config = AttributeClassifierConfig(num_concepts=1700, num_genders=6, num_skin_tones=7)
    shapes = nnx.eval_shape(lambda: AttributeClassifier(config, rngs=nnx.Rngs(0)))
    assert 1e6 < sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes))) < 2e6
    features = jax.eval_shape(
        lambda: AttributeClassifier(config, rngs=nnx.Rngs(0)).features(jnp.zeros((2, 64, 64, 3)))
    )
    assert features.shape == (2, 256)
    assert features.dtype == jnp.float32


def test_a_picture_is_classified_independently_of_its_batch():
    classifier, images = _classifier(), _images(3, 16, 16, 3)
    together = classifier(images)["concept"][1:2]
    np.testing.assert_allclose(together, classifier(images[1:2])["concept"], atol=1e-5)


def test_it_learns_to_tell_pictures_apart():
    graph, state = nnx.split(_classifier())
    images, labels = _images(5, 16, 16, 3), jnp.arange(5)

    def loss(state):
        log_probabilities = jax.nn.log_softmax(nnx.merge(graph, state)(images)["concept"])
        return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))

    @jax.jit
    def step(state):
        value, gradient = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda leaf, slope: leaf - 0.2 * slope, state, gradient), value

    values = []
    for _ in range(60):
        state, value = step(state)
        values.append(float(value))
    assert values[0] > 1.0
    assert values[-1] < 0.1


def test_bfloat16_gives_float32_features_close_to_float32():
    images = _images(2, 16, 16, 3)
    exact = _classifier().features(images)
    half = _classifier(dataclasses.replace(CONFIG, dtype="bfloat16")).features(images)
    assert half.dtype == jnp.float32
    assert jnp.linalg.norm(half - exact) < 0.02 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(2, 20, 16, 3), (2, 16, 16, 4), (16, 16, 3), (1, 0, 8, 3)])
def test_wrong_pictures_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 8, got"):
        _classifier()(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_concepts": 0}, "num_concepts must be a positive int, got num_concepts=0"),
        ({"widths": (8, 12, 16)}, r"positive multiples of 8, got \(8, 12, 16\)"),
        ({"widths": (8, 8)}, r"three or more positive multiples of 8, got \(8, 8\)"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
