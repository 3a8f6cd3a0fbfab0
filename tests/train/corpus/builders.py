"""Documents whose tokens say which they are, and files of texts."""

import json

import numpy as np

from train.corpus import Documents
from train.corpus.documents import split_number

PAD = 1_000_000


def make_documents(lengths, digest="digest"):
    """Token number n of the corpus has the id n, so no two are equal."""
    lengths = np.array(lengths, np.int64)
    return Documents(
        tokens=np.arange(lengths.sum(), dtype=np.uint32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        split_numbers=np.array(
            [split_number(str(number)) for number in range(len(lengths))], np.uint64
        ),
        pad_id=PAD,
        digest=digest,
    )


def some_lengths(seed, count=40, longest=60):
    """Lengths of documents, from the shortest there can be, a token and its end."""
    return np.random.default_rng(seed).integers(2, longest + 1, count)


def neighbors(documents):
    """Every token of a document but its first, as a pair with the one before it."""
    return sorted(
        pair
        for document in range(len(documents))
        for pair in zip(documents[document][:-1], documents[document][1:], strict=True)
    )


def learned(batch):
    """The pairs of a token and a target that a batch teaches."""
    chosen = batch["weights"] == 1
    return list(zip(batch["tokens"][chosen], batch["targets"][chosen], strict=True))


def assert_equal(left, right):
    """Compares two lists of batches bit for bit."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def write_json_lines(path, texts, field="text"):
    """Writes a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path
