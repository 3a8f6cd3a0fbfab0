"""The word tokenizer: normalization, ids, warnings, files."""

import json
import warnings

import numpy as np
import pytest

from jaxgen.text import PADDING_ID, UNKNOWN_ID, WordTokenizer, split_words

CAPTIONS = ("red apple", "man firefighter dark skin tone", "flag of curaçao")


@pytest.fixture
def tokenizer():
    return WordTokenizer.from_captions(CAPTIONS, max_tokens=6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Man, medium-dark!", ["a", "man", "medium", "dark"]),
        ("eight o\u2019clock", ["eight", "oclock"]),
        ("man's shoe", ["mans", "shoe"]),
        ("Curaçao_Réunion", ["curacao", "reunion"]),
        ("keycap 10", ["keycap", "10"]),
        (" ,;- ", []),
        ("", []),
    ],
)
def test_split_words(text, words):
    assert split_words(text) == words


def test_splitting_twice_changes_nothing():
    words = split_words("Straße, naïve İstanbul ﬁre 東京 ½ x² Ωmega")
    assert [split_words(word) for word in words] == [[word] for word in words]


def test_vocabulary_is_sorted_and_ids_follow_it(tokenizer):
    expected = ["apple", "curacao", "dark", "firefighter", "flag"]
    expected += ["man", "of", "red", "skin", "tone"]
    assert tokenizer.vocabulary == tuple(expected)
    assert tokenizer.size == len(expected) + 2
    tokens = tokenizer.encode(expected)
    np.testing.assert_array_equal(tokens[:, 0], np.arange(2, tokenizer.size))


def test_encode_pads_and_keeps_order(tokenizer):
    tokens = tokenizer.encode(["red apple", "APPLE red", ""])
    assert tokens.shape == (3, 6)
    assert tokens.dtype == np.int32
    assert tokens[0, :2].tolist() == tokens[1, :2].tolist()[::-1]
    assert (tokens[:2, 2:] == PADDING_ID).all()
    assert (tokens[2] == PADDING_ID).all()


def test_encode_of_nothing(tokenizer):
    assert tokenizer.encode([]).shape == (0, 6)


def test_unknown_words_give_one_warning_with_near_words(tokenizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = tokenizer.encode(["red aple", "firefigther zzz", "aple"])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'aple' (near: apple)" in message
    assert "'firefigther' (near: firefighter)" in message
    assert "'zzz' (nothing near)" in message
    assert caught[0].filename == __file__
    assert tokens[0, 1] == UNKNOWN_ID
    assert tokens[1, :2].tolist() == [UNKNOWN_ID, UNKNOWN_ID]


def test_many_unknown_words_are_counted(tokenizer):
    with pytest.warns(UserWarning, match="and 4 more"):
        tokenizer.encode([f"q{index}" for index in range(12)])


def test_long_captions_are_cut_with_a_warning(tokenizer):
    long = "red " * 7
    with pytest.warns(UserWarning, match="1 of 2 captions have more than max_tokens=6") as caught:
        tokens = tokenizer.encode([long, "red " * 6])
    assert len(caught) == 1
    np.testing.assert_array_equal(tokens[0], tokens[1])


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert WordTokenizer.load(tmp_path / "tokenizer.json") == tokenizer


def test_saved_file_is_json_that_keeps_letters(tmp_path):
    WordTokenizer(("東京",)).save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(text)["vocabulary"] == ["東京"]
    assert "東京" in text


@pytest.mark.parametrize(
    ("vocabulary", "max_tokens", "error", "message"),
    [
        (("b", "a"), 4, ValueError, "sorted and without repetition, got 'b' before 'a'"),
        (("a", "a"), 4, ValueError, "without repetition, got 'a' before 'a'"),
        (("a b",), 4, ValueError, "single lower-case words of letters and digits, got 'a b'"),
        (("A",), 4, ValueError, "got 'A'"),
        (("",), 4, ValueError, "got ''"),
        ((), 4, ValueError, "at least one word, got an empty tuple"),
        (("a",), 0, ValueError, "max_tokens must be a positive integer, got 0"),
        (("a",), 2.0, ValueError, "max_tokens must be a positive integer, got 2.0"),
        (["a"], 4, TypeError, r"vocabulary must be a tuple of strings, got \['a'\]"),
        ((1,), 4, TypeError, r"vocabulary must be a tuple of strings, got \(1,\)"),
    ],
)
def test_refused_arguments(vocabulary, max_tokens, error, message):
    with pytest.raises(error, match=message):
        WordTokenizer(vocabulary, max_tokens)


def test_one_string_is_refused(tokenizer):
    with pytest.raises(TypeError, match="sequence of strings, got the one string 'red apple'"):
        tokenizer.encode("red apple")
    with pytest.raises(TypeError, match="got the one string"):
        WordTokenizer.from_captions("red apple")


def test_captions_that_are_no_strings_are_refused(tokenizer):
    with pytest.raises(TypeError, match="captions must be strings, got 3 at position 1"):
        tokenizer.encode(["red", 3])


def test_captions_without_words_are_refused():
    with pytest.raises(ValueError, match="at least one word"):
        WordTokenizer.from_captions(["", "!"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "jaxgen', "is not a JSON tokenizer file"),
        ("[]", r"must hold exactly the keys \['format', 'max_tokens', 'vocabulary'\], got list"),
        ('{"format": 1}', r"got \['format'\]"),
        ('{"format": "x", "max_tokens": 4, "vocabulary": ["a"]}', "must have the format"),
        (
            '{"format": "jaxgen word tokenizer 1", "max_tokens": 4, "vocabulary": "ab"}',
            "tokenizer.json: vocabulary must be a tuple of strings, got 'ab'",
        ),
        (
            '{"format": "jaxgen word tokenizer 1", "max_tokens": true, "vocabulary": ["a"]}',
            "tokenizer.json: max_tokens must be a positive integer, got True",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        WordTokenizer.load(path)


def test_binary_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a JSON tokenizer file"):
        WordTokenizer.load(path)
    with pytest.raises(FileNotFoundError):
        WordTokenizer.load(tmp_path / "absent.json")
