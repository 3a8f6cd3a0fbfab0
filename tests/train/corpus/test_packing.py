"""Rows of packed documents against rows made one token at a time."""

import itertools

import numpy as np
import pytest

from tests.train.corpus.builders import (
    PAD,
    learned,
    make_documents,
    neighbors,
    some_lengths,
)
from train.corpus.packing import StreamPacking, WholePacking, fill

CASES = [
    pytest.param([5, 3, 9], 4, id="small"),
    pytest.param([2], 8, id="shorter than a row"),
    pytest.param([8, 8], 4, id="exact rows"),
    pytest.param([9, 8], 4, id="one token in the last row"),
    pytest.param([5, 6, 9, 10], 4, id="one token longer than rows"),
    pytest.param([100], 7, id="one long document"),
    pytest.param([2, 2, 2, 3], 1, id="rows of one token"),
    pytest.param(some_lengths(0), 16, id="random"),
    pytest.param(some_lengths(1), 5, id="random, long documents"),
    pytest.param(some_lengths(2), 300, id="random, long rows"),
]


def all_rows(documents, packing, context):
    return fill(documents, [packing.pieces(1, row) for row in range(packing.rows)], context)


def row_by_hand(tokens, context):
    """A row of (document, token) pairs, one token at a time."""
    row = {name: [] for name in ("tokens", "targets", "segment_ids", "positions", "weights")}
    number = position = 0
    before = None
    padded = [*tokens, *[(None, PAD)] * (context + 1 - len(tokens))]
    for (document, token), (after, target) in itertools.pairwise(padded):
        number, position = (number, position + 1) if document == before else (number + 1, 0)
        before = document
        inside = document is not None
        row["tokens"].append(token)
        row["targets"].append(target)
        row["segment_ids"].append(number if inside else 0)
        row["positions"].append(position if inside else 0)
        row["weights"].append(1 if inside and document == after else 0)
    return row


def test_rows_by_example():
    documents = make_documents([3, 4])
    pieces = [([0, 3], [3, 3]), ([5], [2]), ([], [])]
    rows = [tuple(np.array(part, np.int64) for part in row) for row in pieces]
    expected = {
        "tokens": [[0, 1, 2, 3, 4], [5, 6, PAD, PAD, PAD], [PAD] * 5],
        "targets": [[1, 2, 3, 4, 5], [6, PAD, PAD, PAD, PAD], [PAD] * 5],
        "segment_ids": [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0], [0] * 5],
        "positions": [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0] * 5],
        "weights": [[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0] * 5],
    }
    found = fill(documents, rows, 5)
    assert {name: array.tolist() for name, array in found.items()} == expected


@pytest.mark.parametrize(("lengths", "context"), CASES)
def test_shuffled_documents_are_cut_into_rows_as_by_hand(lengths, context):
    documents = make_documents(lengths)
    rows = all_rows(documents, StreamPacking(documents, context=context, seed=3), context)
    tokens = rows["tokens"][rows["segment_ids"] > 0].tolist()
    number_of = np.repeat(np.arange(len(lengths)), lengths)
    order = list(dict.fromkeys(number_of[tokens].tolist()))
    assert sorted(order) == list(range(len(lengths)))
    assert len(lengths) < 10 or order != sorted(order)
    stream = [(number, token) for number in order for token in documents[number].tolist()]
    expected = [
        row_by_hand(stream[start : start + context + 1], context)
        for start in range(0, len(stream), context)
    ]
    assert len(rows["tokens"]) == len(expected)
    for name, array in rows.items():
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
        np.testing.assert_array_equal(array, [row[name] for row in expected], err_msg=name)


@pytest.mark.parametrize(("lengths", "context"), CASES)
def test_whole_documents_stay_whole_and_long_ones_lose_nothing(lengths, context):
    documents = make_documents(lengths)
    rows = all_rows(documents, WholePacking(documents, context=context), context)
    assert sorted(learned(rows)) == neighbors(documents)
    # Rows with their last target, which may be the end of a document.
    whole = np.concatenate([rows["tokens"], rows["targets"][:, -1:]], axis=1)
    for number in range(len(documents)):
        tokens = documents[number]
        if len(tokens) <= context + 1:
            places = np.argwhere(np.isin(whole, tokens))
            assert len(set(places[:, 0])) == 1
            np.testing.assert_array_equal(whole[tuple(places.T)], tokens)
            np.testing.assert_array_equal(np.diff(places[:, 1]), 1)


@pytest.mark.parametrize("seed", range(5))
def test_whole_rows_are_as_full_as_best_fit_by_hand(seed):
    context = 20
    lengths = some_lengths(seed, count=60, longest=21)
    documents = make_documents(lengths)
    packing = WholePacking(documents, context=context)
    by_hand = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row in by_hand if sum(row) + length <= context + 1]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            by_hand.append([length])
    found = [packing.pieces(0, row)[1].tolist() for row in range(packing.rows)]
    assert sorted(map(sum, found)) == sorted(map(sum, by_hand))
    assert sum(map(len, found)) == len(lengths)
