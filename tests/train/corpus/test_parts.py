"""What is held out: never trained on, whatever else is in the corpus."""

import numpy as np
import pytest

from tests.train.corpus.builders import write_json_lines
from train.corpus import Batches, ByteTokenizer, load_documents, one_pass, open_source

TEXTS = [chr(33 + number) * (5 + number) for number in range(60)]
LETTERS = {text[0] for text in TEXTS}


@pytest.fixture
def load(tmp_path):
    def load(texts=TEXTS):
        source = open_source(write_json_lines(tmp_path / "texts.jsonl", texts))
        return load_documents(source, ByteTokenizer(), cache_dir=tmp_path / "cache")

    return load


def texts_of(documents):
    return [
        bytes(documents[number][:-1].astype(np.uint8)).decode() for number in range(len(documents))
    ]


def letters_of(batches):
    """The letters in batches, where each document has one of its own."""
    arrays = [batch[name].ravel() for batch in batches for name in ("tokens", "targets")]
    return {chr(number) for number in np.concatenate(arrays) if number < 256}


@pytest.mark.parametrize("split", [True, False])
def test_held_out_documents_are_never_trained_on(load, split):
    documents = load()
    train, validation = documents.part("train", 0.2), documents.part("validation", 0.2)
    held_out = {text[0] for text in texts_of(validation)}
    assert 4 <= len(held_out) <= 20
    batches = Batches(train, context=16, batch_size=4, seed=0, split=split)
    trained = [batches.at(step) for step in range(2 * batches.rows_per_epoch // 4)]
    assert letters_of(trained) == LETTERS - held_out
    validated = one_pass(validation, context=16, batch_size=4, split=split)
    assert letters_of(validated) == held_out


def test_parts_do_not_depend_on_other_documents(load):
    def held_out(share, texts=TEXTS):
        return set(texts_of(load(texts).part("validation", share)))

    assert held_out(0.2) < held_out(0.4)
    assert held_out(0.4, TEXTS[::-2]) == held_out(0.4) & set(TEXTS[::-2])
    # Equal texts stay together.
    assert held_out(0.4, TEXTS * 2) == held_out(0.4)


def test_parts_have_digests_of_their_own(load):
    documents = load()
    parts = [documents, *(documents.part(part, 0.2) for part in ("train", "validation"))]
    parts.append(documents.part("train", 0.3))
    assert len({part.digest for part in parts}) == 4
    assert documents.part("all", 0.2).digest == documents.digest
    assert documents.part("train", 0.2).digest == parts[1].digest


@pytest.mark.parametrize(
    ("part", "held_out", "message"),
    [
        ("test", 0.1, "part must be one of all, train, validation, got 'test'"),
        ("train", 1.0, "held_out must be at least 0 and less than 1, got 1.0"),
        ("train", -0.1, "held_out must be at least 0"),
        ("validation", 0.0, "none of 60 documents is for validation with held_out=0.0"),
    ],
)
def test_refuses_parts_out_of_range(load, part, held_out, message):
    with pytest.raises(ValueError, match=message):
        load().part(part, held_out)
