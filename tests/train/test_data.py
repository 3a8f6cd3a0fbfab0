"""Batches: contents, determinism, resuming, epochs, caption dropout, sharding."""

import importlib
import itertools
import sys

import numpy as np
import pytest
from grain.experimental import assert_equal_output_after_checkpoint

from jaxgen.text import PADDING_ID, WordTokenizer
from train.data import batch_dataset, batches
from train.openmoji import Emojis

COUNT = 23


@pytest.fixture(scope="module")
def emojis():
    """Emoji number n is a picture of color n with the caption "word<n>"."""
    numbers = np.arange(COUNT)
    zeros = np.zeros(COUNT, np.int32)
    return Emojis(
        np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (COUNT, 4, 4, 3)),
        tuple(f"word{number:02d}" for number in numbers),
        *(zeros, zeros, zeros),
        *(("thing",), ("none",), ("none",)),
        np.zeros(COUNT, bool),
    )


@pytest.fixture(scope="module")
def tokenizer(emojis):
    return WordTokenizer.from_captions(emojis.captions, max_tokens=3)


@pytest.fixture
def start(emojis, tokenizer):
    def start(**options):
        return batches(emojis, tokenizer, **{"batch_size": 6, "seed": 5, **options})

    return start


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def numbers_of(some):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in some])


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_pictures_and_captions_stay_together(start):
    for batch in take(start(caption_dropout=0.0), 8):
        assert batch["image"].shape == (6, 4, 4, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["tokens"].shape == (6, 3)
        assert batch["tokens"].dtype == np.int32
        numbers = batch["image"][:, 0, 0, 0].astype(np.int32)
        np.testing.assert_array_equal(batch["tokens"][:, 0], numbers + 2)
        assert (batch["tokens"][:, 1:] == PADDING_ID).all()


def test_every_epoch_is_another_order_of_everything(start):
    rows = numbers_of(take(start(), COUNT))  # 23 batches of 6 are 6 epochs of 23
    epochs = rows.reshape(6, COUNT)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(COUNT))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6
    assert (epochs[0] != np.arange(COUNT)).any()


def test_seed_decides_everything(start):
    assert_equal(take(start(), 12), take(start(), 12))
    other = numbers_of(take(start(seed=6), 12))
    assert (numbers_of(take(start(), 12)) != other).any()


def test_resumes_bit_for_bit(start):
    straight = take(start(), 20)
    iterator = start()
    take(iterator, 9)
    state = iterator.get_state()
    take(iterator, 4)  # what was read after the checkpoint must not matter
    resumed = start()
    resumed.set_state(state)
    assert_equal(take(resumed, 11), straight[9:])
    iterator.set_state(state)
    assert_equal(take(iterator, 11), straight[9:])


def test_forgetting_the_state_is_noticed(start):
    iterator = start()
    straight = take(iterator, 20)
    with pytest.raises(AssertionError):
        assert_equal(take(start(), 11), straight[9:])


def test_grain_agrees_that_it_resumes(emojis, tokenizer):
    dataset = batch_dataset(emojis, tokenizer, batch_size=6, seed=5)
    assert_equal_output_after_checkpoint(dataset[:9].to_iter_dataset())


def test_steps_are_addressable(emojis, tokenizer, start):
    dataset = batch_dataset(emojis, tokenizer, batch_size=6, seed=5)
    assert_equal([dataset[step] for step in range(10)], take(start(), 10))


def test_caption_dropout_drops_the_asked_share(start):
    some = take(start(caption_dropout=0.3, batch_size=20), 200)
    dropped = np.array([(batch["tokens"] == PADDING_ID).all(axis=1) for batch in some])
    assert abs(dropped.mean() - 0.3) < 0.04  # 4,000 draws: 5.5 standard deviations
    assert dropped.std(axis=0).min() > 0.3  # no position is always or never dropped
    assert 0.2 < dropped.mean(axis=1).std() / (0.3 * 0.7 / 20) ** 0.5 < 2.0
    kept = np.concatenate([batch["tokens"] for batch in some])[~dropped.ravel()]
    np.testing.assert_array_equal(kept[:, 0], numbers_of(some)[~dropped.ravel()].astype(int) + 2)


def test_caption_dropout_leaves_the_order_alone(start):
    none, every = take(start(caption_dropout=0.0), 9), take(start(caption_dropout=1.0), 9)
    np.testing.assert_array_equal(numbers_of(none), numbers_of(every))
    assert all((batch["tokens"][:, 0] != PADDING_ID).all() for batch in none)
    assert all((batch["tokens"] == PADDING_ID).all() for batch in every)


@pytest.mark.parametrize("shard_count", [2, 3])
def test_shards_together_are_the_unsharded_batches(start, shard_count):
    whole = take(start(), 9)
    shards = [
        take(start(shard_index=index, shard_count=shard_count), 9) for index in range(shard_count)
    ]
    assert shards[0][0]["image"].shape[0] == 6 // shard_count
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in ("image", "tokens")}
        for parts in zip(*shards, strict=True)
    ]
    assert_equal(joined, whole)


def test_batches_do_not_alias_the_data_set(start, emojis):
    before = emojis.images.copy()
    batch = next(start())
    batch["image"][:] = 255
    np.testing.assert_array_equal(emojis.images, before)


def test_a_batch_may_be_the_whole_data_set(start):
    first, second = take(start(batch_size=COUNT), 2)
    assert sorted(numbers_of([first]).tolist()) == list(range(COUNT))
    assert (first["image"] != second["image"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"batch_size": -6}, "batch_size must be positive, got -6"),
        ({"batch_size": 24}, "batch_size must not exceed the 23 emojis given, got 24"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "seed must be from 0 to"),
        ({"caption_dropout": 1.5}, "caption_dropout must be from 0 to 1, got 1.5"),
        ({"caption_dropout": float("nan")}, "caption_dropout must be from 0 to 1, got nan"),
        ({"shard_count": 4}, "divide batch_size, got shard_count=4 and batch_size=6"),
        ({"shard_count": 0}, "shard_count must be positive .* got shard_count=0"),
        (
            {"shard_index": 2, "shard_count": 2},
            "shard_index must be from 0 to shard_count - 1 = 1, got 2",
        ),
        ({"shard_index": -1}, "got -1"),
    ],
)
def test_wrong_arguments_are_refused(start, options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_missing_grain_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.delitem(sys.modules, "train.data")
    with pytest.raises(
        ImportError, match=r'needs the package grain.*pip install "jaxgen\[train\]"'
    ):
        importlib.import_module("train.data")
