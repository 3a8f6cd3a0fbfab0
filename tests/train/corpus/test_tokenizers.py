"""Tokenizers of corpora: bytes, and that of a released model."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from train.corpus import ByteTokenizer, ReleasedTokenizer

FOLDER = Path(__file__).parents[2] / "goldens" / "text_tokenizers" / "llada"
TEXT = 'naïve("日本語 🤖")\r\n\tx = "<|endoftext|>"\n'


@pytest.fixture(params=["bytes", "released"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else ReleasedTokenizer(FOLDER)


def test_texts_come_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < tokenizer.size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


def test_special_ids_are_none_of_a_text(tokenizer):
    assert not np.isin([tokenizer.end_id, tokenizer.pad_id], tokenizer.encode(TEXT)).any()
    assert max(tokenizer.end_id, tokenizer.pad_id) < tokenizer.size
    ids = [*tokenizer.encode("a"), tokenizer.end_id, tokenizer.pad_id, tokenizer.size]
    assert tokenizer.decode(ids) == "a"


def test_copies_in_other_processes_do_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode(TEXT), tokenizer.encode(TEXT))
    assert (copy.size, copy.end_id, copy.pad_id) == (
        tokenizer.size,
        tokenizer.end_id,
        tokenizer.pad_id,
    )
    assert copy.fingerprint() == tokenizer.fingerprint()


def test_bytes_are_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.size) == (256, 257, 258)
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    with pytest.raises(ValueError, match="ids must not be negative, got -1"):
        tokenizer.decode([-1])


def test_sizes_are_rounded_up():
    assert ByteTokenizer(multiple_of=128).size == 384
    assert ByteTokenizer(multiple_of=258).size == 258
    plain = ReleasedTokenizer(FOLDER).size
    assert ReleasedTokenizer(FOLDER, multiple_of=128).size == -(-plain // 128) * 128 > plain
    for make in (
        ByteTokenizer,
        lambda multiple_of: ReleasedTokenizer(FOLDER, multiple_of=multiple_of),
    ):
        with pytest.raises(ValueError, match="multiple_of must be positive, got 0"):
            make(multiple_of=0)


def test_the_token_that_ends_a_text_can_be_chosen(tmp_path):
    with pytest.raises(ValueError, match="has no token '<nothing>'"):
        ReleasedTokenizer(FOLDER, end_token="<nothing>")
    # A tokenizer.json alone names none.
    path = Path(shutil.copy(FOLDER / "tokenizer.json", tmp_path))
    with pytest.raises(ValueError, match="names no token that ends a text; give it as end_token"):
        ReleasedTokenizer(path)
    tokenizer = ReleasedTokenizer(path, end_token="<|endoftext|>")
    assert tokenizer.end_id == tokenizer.pad_id == ReleasedTokenizer(FOLDER).end_id


def test_a_file_must_be_the_one_that_is_read(tmp_path):
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    mine = Path(shutil.copy(FOLDER / "tokenizer.json", tmp_path / "mine.json"))
    with pytest.raises(ValueError, match=r"the tokenizer\.json in it, got the file .*mine\.json"):
        ReleasedTokenizer(mine, end_token="<|endoftext|>")


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    path = Path(shutil.copy(FOLDER / "tokenizer.json", tmp_path))
    same = ReleasedTokenizer(path, end_token="<|endoftext|>").fingerprint()
    assert same == ReleasedTokenizer(FOLDER, multiple_of=128).fingerprint()
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content), encoding="utf-8")
    assert same != ReleasedTokenizer(path, end_token="<|endoftext|>").fingerprint()
    assert same != ByteTokenizer().fingerprint()
