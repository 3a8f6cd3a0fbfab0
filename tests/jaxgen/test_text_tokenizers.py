import json
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from jaxgen.tokenizers import TextTokenizer

GOLDENS = Path(__file__).parents[1] / "goldens/text_tokenizers"
GOLDEN = json.loads((GOLDENS / "ids.json").read_text(encoding="utf-8"))
LAYOUTS = ("qwen", "qwen_old", "qwen_json", "llada")
MOST_LETTERS = 500  # of an error, besides the path


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param, TextTokenizer.from_folder(GOLDENS / request.param)


@pytest.fixture(scope="module")
def qwen():
    return TextTokenizer.from_folder(GOLDENS / "qwen")


def _copy(name, folder):
    shutil.copytree(GOLDENS / name, folder, dirs_exist_ok=True)
    return folder


def _change(path, **changes):
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def _refused(folder, message, kind=ValueError):
    with pytest.raises(kind, match=message) as caught:
        TextTokenizer.from_folder(folder)
    assert len(str(caught.value).replace(str(folder), "")) < MOST_LETTERS


def test_awkward_texts_have_the_ids_of_transformers(layout):
    name, tokenizer = layout
    for text, expected in zip(GOLDEN["texts"], GOLDEN[name]["ids"], strict=True):
        assert tokenizer.encode(text) == expected, text


def test_ids_have_the_texts_of_transformers(layout):
    name, tokenizer = layout
    golden = GOLDEN[name]
    rows = golden["ids"] + GOLDEN["rows"]
    for ids, skipped, shown in zip(rows, golden["skipped"], golden["shown"], strict=True):
        assert tokenizer.decode(ids) == skipped, ids
        assert tokenizer.decode(ids, skip_special=False) == shown, ids
    assert any("\ufffd" in text for text in golden["shown"])


def test_special_tokens_are_those_of_transformers(layout):
    name, tokenizer = layout
    golden = GOLDEN[name]
    assert {"eos": tokenizer.eos_id, "pad": tokenizer.pad_id} == golden["special"]
    assert tokenizer.size == golden["size"]


def test_texts_come_back(layout):
    name, tokenizer = layout
    for text in GOLDEN["texts"]:
        expected = text if name == "llada" else unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == expected


def test_tokens_by_their_text(qwen):
    assert qwen.token_id("<|im_end|>") == qwen.eos_id == 458
    assert qwen.encode("<|im_end|>") == [458]
    assert "<|im_end|>" in qwen
    assert "<|eot_id|>" not in qwen
    with pytest.raises(ValueError, match=r"the tokenizer has no token '<\|eot_id\|>'"):
        qwen.token_id("<|eot_id|>")
    # Added, but part of the text.
    assert qwen.decode(qwen.encode("<think>a<|MASK|></think>")) == "<think>a</think>"


def test_ids_of_any_kind_of_int_are_decoded(qwen):
    ids = qwen.encode("The answer")
    assert qwen.decode(np.array(ids, np.int32)) == qwen.decode(iter(ids)) == "The answer"
    assert qwen.decode([]) == qwen.decode([2**32 - 1, 5000]) == ""


def test_its_words_are_few(qwen):
    assert repr(qwen) == "TextTokenizer(eos_id=458, pad_id=456)"


@pytest.mark.parametrize("text", [None, b"a", 3, ["a"]])
def test_other_texts_are_refused(qwen, text):
    with pytest.raises(TypeError, match="text must be a string, got "):
        qwen.encode(text)


def test_half_a_surrogate_pair_is_refused(qwen):
    with pytest.raises(ValueError, match="got half of a surrogate pair at 1"):
        qwen.encode("a\ud83e")


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        ([1.0], TypeError, r"ids must be ints, got 1\.0"),
        ([True], TypeError, "ids must be ints, got True"),
        (["a"], TypeError, "ids must be ints, got 'a'"),
        ([3, -1], ValueError, r"ids must be from 0 to 2\*\*32 - 1, got -1"),
        ([2**32], ValueError, r"ids must be from 0 to 2\*\*32 - 1, got 4294967296"),
    ],
)
def test_other_ids_are_refused(qwen, ids, kind, message):
    with pytest.raises(kind, match=message):
        qwen.decode(ids)


def test_a_folder_needs_a_vocabulary(tmp_path):
    message = r"must hold tokenizer\.json, or vocab\.json and merges\.txt"
    _refused(tmp_path / "nowhere", message, FileNotFoundError)
    _copy("qwen", tmp_path)
    (tmp_path / "merges.txt").unlink()
    _refused(tmp_path, message, FileNotFoundError)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for name in ("qwen", "llada"):
        with pytest.raises(ImportError, match=r"pip install 'jaxgen\[hf\]'"):
            TextTokenizer.from_folder(GOLDENS / name)


def test_a_folder_may_name_no_special_tokens(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDENS / "qwen" / name, tmp_path)
    tokenizer = TextTokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.size) == (None, None, 456)
    assert "<|im_end|>" not in tokenizer
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"


def test_a_named_token_of_the_vocabulary_becomes_special(tmp_path):
    folder = _copy("qwen", tmp_path)
    _change(folder / "tokenizer_config.json", cls_token={"content": "the"})
    tokenizer = TextTokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("on the way")) == "on  way"


def test_merges_with_windows_ends_and_without_version(tmp_path, qwen):
    folder = _copy("qwen", tmp_path)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    (folder / "merges.txt").write_bytes("\r\n".join([*lines, ""]).encode())
    tokenizer = TextTokenizer.from_folder(folder)
    assert [tokenizer.encode(text) for text in GOLDEN["texts"]] == GOLDEN["qwen"]["ids"]


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", b"{", r"vocab\.json: not valid JSON"),
        ("vocab.json", b"[1]", r"vocab\.json: expected a JSON object, got list"),
        ("vocab.json", b'{"a": "b"}', r"ids must be ints from 0 to 16777215, got 'b' for 'a'"),
        ("vocab.json", b'{"a": true}', "got True for 'a'"),
        ("vocab.json", b'{"a": -1}', "got -1 for 'a'"),
        ("vocab.json", b'{"a": 4294967295}', "got 4294967295 for 'a'"),
        ("vocab.json", json.dumps({LONG: LONG}).encode(), r"got 'x+\.\.\. for 'x+\.\.\."),
        ("vocab.json", b'{"a": 0, "b": 0}', "two tokens have the same id"),
        (
            "vocab.json",
            b'{"a": 0}',
            r"vocab\.json and merges\.txt do not fit: .* out of vocabulary",
        ),
        ("merges.txt", b"a b c\n", r"merges\.txt: line 1 must be two tokens, got 'a b c'"),
        ("merges.txt", b"#version\nab\n", "line 2 must be two tokens, got 'ab'"),
        ("merges.txt", LONG.encode(), r"line 1 must be two tokens, got 'x+\.\.\."),
        ("merges.txt", b"a \xff\n", r"merges\.txt: not UTF-8: invalid start byte at byte 2"),
        ("merges.txt", b"a \xe2\x96\x81\n", "do not fit: .* out of vocabulary"),
        ("tokenizer_config.json", b"null", r"expected a JSON object, got NoneType"),
        ("tokenizer.json", b"", r"tokenizer\.json: not a tokenizer: EOF"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: not a tokenizer: Model missing"),
        ("tokenizer.json", b"\xff", r"tokenizer\.json: not a tokenizer: "),
    ],
)
def test_damaged_files_are_refused(file, content, message, tmp_path):
    folder = _copy("qwen", tmp_path)
    (folder / file).write_bytes(content)
    _refused(folder, message)


def test_a_panic_of_the_library_is_an_error(tmp_path, capfd):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    folder = _copy("qwen_json", tmp_path)
    _change(folder / "tokenizer.json", normalizer=normalizer)
    _refused(folder, r"tokenizer\.json: not a tokenizer: Precompiled")
    capfd.readouterr()  # what the library writes when it panics


def _listed(number, **token):
    return {"added_tokens_decoder": {str(number): token}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens_decoder": 3}, "added_tokens_decoder must be an object, got 3"),
        (_listed(456), r"the added token 456 must be a token, got \{\}"),
        (_listed(456, content=""), "the added token 456 must be a token, got "),
        (_listed(456, content=[LONG]), "the added token 456 must be a token, got "),
        (_listed("a", content="b"), "'b' must have an id of its own from 0 to 16777215, got 'a'"),
        (_listed("9" * 5000, content="b"), "'b' must have an id of its own .*, got '999"),
        (_listed(456, content="b", special=1), "flags of 'b' must be true or false"),
        (_listed(500, content="<b>"), "'<b>' must have the id 456 that follows .*, got 500"),
        (_listed(3, content="<b>"), "'<b>' must have the id 456 that follows .*, got 3"),
        (_listed(456, content="the"), "'the' must have the id .* that follows .*, got 456"),
        ({"pad_token": "<b>"}, "the special token '<b>' is not in the vocabulary"),
        ({"eos_token": 3}, "eos_token must be a token, got 3"),
        ({"additional_special_tokens": 3}, "additional_special_tokens must be a list of tokens"),
        ({"extra_special_tokens": {"image": 3}}, "extra_special_tokens must be a token, got 3"),
    ],
)
def test_wrong_special_tokens_are_refused(changes, message, tmp_path):
    folder = _copy("qwen", tmp_path)
    roles = dict.fromkeys(("eos_token", "pad_token", "mask_token", "additional_special_tokens"))
    _change(folder / "tokenizer_config.json", **(roles | changes))
    _refused(folder, message)


@pytest.mark.parametrize("number", ["a", None, -1, True, 456])
def test_wrong_added_tokens_of_older_folders_are_refused(number, tmp_path):
    folder = _copy("qwen_old", tmp_path)
    _change(folder / "added_tokens.json", **{"<b>": number})
    _refused(folder, r"added_tokens\.json: '<b>' must have an id of its own")
