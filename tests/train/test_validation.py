"""Validation of language models: the same number, whatever the parts it is computed in."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import LanguageModel
from tests.train.corpus.builders import make_documents, some_lengths
from train import language_model_parts
from train.corpus import one_pass
from train.language_model_config import Config
from train.language_model_parts import model_config, validate
from train.state import take_apart

CONTEXT, ROWS, BATCHES = 16, 12, 2


@pytest.fixture(scope="module")
def documents():
    found = make_documents(some_lengths(seed=0, count=30))
    return found.__class__(**vars(found) | {"tokens": found.tokens % 250, "pad_id": 257})


def config(**changes):
    settings = {
        "model": "tiny", "precision": "float32", "context": CONTEXT, "batch_size": ROWS,
        "steps": 1, "warmup_steps": 0, "devices": 1, "validation_batches": BATCHES,
    }  # fmt: skip
    return Config(**(settings | changes))


@pytest.fixture(scope="module")
def model():
    return take_apart(LanguageModel(model_config(config(), 384), rngs=nnx.Rngs(0)))


@pytest.fixture
def shapes(monkeypatch):
    """The rows of each part that is computed."""
    found, real = [], language_model_parts._loss

    def watch(*arguments):
        found.append(arguments[-1]["tokens"].shape[0])
        return real(*arguments)

    monkeypatch.setattr(language_model_parts, "_loss", watch)
    return found


def test_parts_have_as_many_rows_as_a_device_gets_in_training(model, documents, shapes):
    whole = validate(model[0], config(), dict(model[1]), documents)
    assert shapes == [ROWS] * BATCHES
    weights = [b["weights"] for b in one_pass(documents, context=CONTEXT, batch_size=ROWS)]
    assert len(weights) > BATCHES
    assert whole["validation_tokens"] == np.sum(weights[:BATCHES])
    for changes, rows in (
        ({"accumulate": 3}, 4),
        ({"accumulate": 3, "devices": 4}, 1),
        ({"devices": 0}, ROWS // jax.device_count()),
        ({"devices": 8, "tensor": 4}, 3),
    ):
        shapes.clear()
        found = validate(model[0], config(**changes), dict(model[1]), documents)
        assert shapes == [rows] * (ROWS * BATCHES // rows)
        assert found["validation_tokens"] == whole["validation_tokens"]
        assert found["validation"] == pytest.approx(whole["validation"], rel=1e-6)


def test_a_short_text_is_validated_once(model, documents):
    both = [
        validate(model[0], config(validation_batches=1000, **changes), dict(model[1]), documents)
        for changes in ({}, {"accumulate": 4})
    ]
    batches = one_pass(documents, context=CONTEXT, batch_size=ROWS)
    assert both[0]["validation_tokens"] == sum(batch["weights"].sum() for batch in batches)
    assert both[1]["validation_tokens"] == both[0]["validation_tokens"]
    assert both[1]["validation"] == pytest.approx(both[0]["validation"], rel=1e-6)
