"""Batches: every token once an epoch, orders, resuming, shards, one pass for validation."""

import collections
import itertools
import json

import numpy as np
import pytest

from tests.train.corpus.builders import (
    assert_equal,
    learned,
    make_documents,
    neighbors,
    some_lengths,
)
from train.corpus import Batches, one_pass

CONTEXT = 16
SPLITS = pytest.mark.parametrize("split", [True, False])


@pytest.fixture(scope="module")
def documents():
    return make_documents(some_lengths(0))


@pytest.fixture
def start(documents):
    def start(**options):
        chosen = {"context": CONTEXT, "batch_size": 6, "seed": 5, **options}
        return Batches(chosen.pop("documents", documents), **chosen)

    return start


def take(batches, count):
    return list(itertools.islice(batches, count))


def joined(some):
    return {name: np.concatenate([batch[name] for batch in some]) for name in some[0]}


def epochs_of(batches, count):
    """The rows of some epochs."""
    size = batches.rows_per_epoch
    rows = joined(take(batches, -(-count * size // 6)))
    return [
        {name: array[epoch * size : (epoch + 1) * size] for name, array in rows.items()}
        for epoch in range(count)
    ]


def test_every_token_is_once_in_every_epoch(start, documents):
    batches = start()
    assert batches.rows_per_epoch % 6  # so batches span epochs
    for epoch in epochs_of(batches, 3):
        tokens = epoch["tokens"][epoch["segment_ids"] > 0]
        assert sorted(tokens.tolist()) == list(range(documents.token_count))


@SPLITS
def test_every_token_is_learned_once_in_every_epoch(start, documents, split):
    for epoch in epochs_of(start(split=split), 3):
        assert sorted(learned(epoch)) == neighbors(documents)


def test_every_epoch_packs_in_another_order(start, documents):
    first, second = epochs_of(start(), 2)
    assert (first["tokens"] != second["tokens"]).any()
    # What is in one row with the first document, besides itself, is something else.
    companions = []
    for epoch in (first, second):
        rows = (np.isin(epoch["tokens"], documents[0])).any(axis=1)
        companions.append(set(epoch["tokens"][rows].ravel().tolist()))
    assert companions[0] != companions[1]


def test_whole_rows_come_in_another_order(start):
    first, second = epochs_of(start(split=False), 2)
    assert (first["tokens"] != second["tokens"]).any()


def test_a_long_document_does_not_fill_a_batch(start):
    lengths = [2000, *[16] * 375]  # a quarter of all tokens
    first = next(start(documents=make_documents(lengths), batch_size=48))
    share = (first["tokens"] < 2000).mean()
    assert 0 < share < 0.6


def test_the_seed_decides_everything(start):
    straight = take(start(), 12)
    assert_equal(take(start(), 12), straight)
    with pytest.raises(AssertionError):
        assert_equal(take(start(seed=6), 12), straight)


@SPLITS
def test_resumes_bit_for_bit_anywhere(start, split):
    straight = take(start(split=split), 43)  # about four epochs
    for step in np.random.default_rng(0).integers(0, 40, 8).tolist():
        batches = start(split=split)
        take(batches, step)
        state = json.loads(json.dumps(batches.get_state()))
        take(batches, 3)  # what is read after the checkpoint must not matter
        batches.set_state(state)
        assert_equal(take(batches, 3), straight[step : step + 3])
        resumed = start(split=split)
        resumed.set_state(state)
        assert_equal(take(resumed, 43 - step), straight[step:])


def test_resumes_inside_a_document(start):
    long = make_documents([10_000])
    straight = take(start(documents=long), 9)
    batches = start(documents=long)
    take(batches, 4)
    resumed = start(documents=long)
    resumed.set_state(batches.get_state())
    assert_equal(take(resumed, 5), straight[4:])


def test_forgetting_the_state_is_noticed(start):
    straight = take(start(), 12)
    with pytest.raises(AssertionError):
        assert_equal(take(start(), 5), straight[7:])


def test_a_position_is_small_and_says_what_it_is_about(start):
    batches = start()
    take(batches, 5)
    assert len(json.dumps(batches.get_state())) < 300
    for change, message in [
        ({"seed": 6}, "seed=5 before, 6 now"),
        ({"context": 8}, "context=16 before, 8 now"),
        ({"batch_size": 3}, "batch_size=6 before, 3 now"),
        ({"split": False}, "split=True before, False now"),
        ({"documents": make_documents([3], "other")}, "corpus='digest' before, 'other' now"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(**change).set_state(batches.get_state())


def test_batches_are_addressable(start):
    batches = start()
    assert_equal([start().at(step) for step in range(9)], take(batches, 9))


@SPLITS
@pytest.mark.parametrize("count", [2, 3, 6])
def test_shards_together_are_the_batches_of_one(start, split, count):
    whole = take(start(split=split), 9)
    shards = [
        take(start(split=split, shard_index=index, shard_count=count), 9) for index in range(count)
    ]
    assert shards[0][0]["tokens"].shape == (6 // count, CONTEXT)
    assert_equal([joined(parts) for parts in zip(*shards, strict=True)], whole)


def test_resumes_with_another_number_of_shards(start):
    straight = take(start(), 9)
    one = start(shard_index=1, shard_count=3)
    take(one, 4)
    parts = [start(shard_index=index, shard_count=2) for index in range(2)]
    for part in parts:
        part.set_state(one.get_state())
    resumed = [joined(pair) for pair in zip(*(take(part, 5) for part in parts), strict=True)]
    assert_equal(resumed, straight[4:])


def test_a_corpus_may_be_smaller_than_a_batch(start):
    tiny = make_documents([5, 4])
    batch = next(start(documents=tiny))
    counts = collections.Counter(learned(batch))
    assert counts == dict.fromkeys(neighbors(tiny), 6)


def test_batches_belong_to_the_caller(start, documents):
    batch = next(start())
    for array in batch.values():
        array[:] = 0
    assert_equal([start().at(0)], take(start(), 1))
    np.testing.assert_array_equal(documents.tokens, np.arange(documents.token_count))


@SPLITS
def test_one_pass_has_everything_once(documents, split):
    batches = list(one_pass(documents, context=CONTEXT, batch_size=7, split=split))
    assert {batch["tokens"].shape for batch in batches} == {(7, CONTEXT)}
    assert sorted(learned(joined(batches))) == neighbors(documents)
    assert_equal(list(one_pass(documents, context=CONTEXT, batch_size=7, split=split)), batches)


@SPLITS
def test_the_first_batches_of_one_pass_are_a_fair_sample(split):
    lengths = [3] * 200 + [15] * 200  # short documents are stored first
    first = next(one_pass(make_documents(lengths), context=CONTEXT, batch_size=40, split=split))
    short = (first["tokens"] < 600).sum() / (first["segment_ids"] > 0).sum()
    assert 0.05 < short < 0.35  # a sixth


def test_one_pass_in_shards(documents):
    whole = list(one_pass(documents, context=CONTEXT, batch_size=8))
    options = {"context": CONTEXT, "batch_size": 8, "shard_count": 4}
    shards = [one_pass(documents, shard_index=index, **options) for index in range(4)]
    assert_equal([joined(parts) for parts in zip(*shards, strict=True)], whole)
    assert (whole[-1]["segment_ids"][-1] == 0).all()  # the last batch is filled up


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**32}, "seed must be from 0"),
        ({"context": 0}, "context must be positive"),
        ({"batch_size": 0}, "batch_size and shard_count must be positive"),
        ({"shard_count": 4}, "the first a multiple of the second"),
        ({"shard_count": 0}, "must be positive"),
        ({"shard_count": 2, "shard_index": 2}, "shard_index must be from 0 to shard_count - 1 = 1"),
        ({"shard_index": -1}, "shard_index must be"),
    ],
)
def test_refuses_options_out_of_range(start, options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)
