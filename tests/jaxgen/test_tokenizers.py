import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgen.checkpoints import load_safetensors, read_safetensors_header
from jaxgen.tokenizers import ClipTokenizer, T5Tokenizer
from jaxgen.tokenizers.sentencepiece_file import read_unigram

GOLDENS = Path(__file__).parents[1] / "goldens/text_encoders"
CLIPS = ("tokenizer", "tokenizer_2", "tokenizer_old", "tokenizer_2_json")
T5S = ("tokenizer_3", "tokenizer_3_json")
BOS, EOS = 578, 579


def _load(name, **options):
    return (ClipTokenizer if name in CLIPS else T5Tokenizer).load(GOLDENS / name, **options)


def _rows(name, tokenizer, texts):
    return tokenizer.encode(texts) if name in CLIPS else tokenizer.encode(texts)[0]


def _copy(name, folder):
    shutil.copytree(GOLDENS / name, folder, dirs_exist_ok=True)
    return folder


def _change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


@pytest.mark.parametrize("name", [*CLIPS, *T5S])
@pytest.mark.filterwarnings("ignore:.* prompts have more than max_tokens")
def test_awkward_texts_have_the_ids_of_transformers(name):
    golden = json.loads((GOLDENS / "ids.json").read_text())
    expected = golden["ids"][name]
    rows = _rows(name, _load(name, max_tokens=len(expected[0])), golden["texts"])
    assert rows.dtype == np.int32
    for text, ours, theirs in zip(golden["texts"], rows.tolist(), expected, strict=True):
        assert ours == theirs, text


def test_prompts_have_the_ids_of_the_pipeline_of_diffusers():
    path = GOLDENS / "sd3.safetensors"
    prompts = json.loads(read_safetensors_header(path).metadata["about"])["prompts"]
    for name, rows in load_safetensors(path).items():
        if name.startswith("tokenizer"):
            tokenizer = _load(name, max_tokens=rows.shape[1])
            np.testing.assert_array_equal(_rows(name, tokenizer, prompts), rows)


@pytest.mark.parametrize(("name", "padding"), [("tokenizer", EOS), ("tokenizer_2", 0)])
def test_clip_rows(name, padding):
    tokenizer = _load(name)
    empty, text = tokenizer.encode(["", "a red cat"])
    assert empty.tolist() == [BOS, EOS] + [padding] * 75
    assert (text[0], text[-1], tokenizer.pad_id) == (BOS, padding, padding)
    assert tokenizer.encode([]).shape == (0, 77)
    short = dataclasses.replace(tokenizer, max_tokens=2)
    with pytest.warns(UserWarning, match=r"cut off: 'a red cat' \(prompt 0\)"):
        assert short.encode(["a red cat"]).tolist() == [[BOS, EOS]]


def test_t5_rows():
    tokenizer = _load("tokenizer_3")
    rows, mask = tokenizer.encode(["", "a red cat"])
    assert rows.shape == mask.shape == (2, 256)
    assert mask.dtype == bool
    assert mask.sum(axis=1).tolist() == [1, np.flatnonzero(rows[1] == 1)[0] + 1]
    assert rows[0, 0] == tokenizer.eos_id == 1
    assert not rows[~mask].any()


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
def test_what_is_cut_off_is_named(name, recwarn):
    prompt = "a red cat,  in the snow by \uff2eight \u2014 under the bright moon"
    tokenizer = _load(name, max_tokens=512)
    whole = _rows(name, tokenizer, [prompt])[0]
    before = _rows(name, tokenizer, ["a red cat,  in the snow by"])[0]
    used = np.flatnonzero(before == tokenizer.eos_id)[0]  # the end is not among the words
    assert not recwarn.list
    cut = dataclasses.replace(tokenizer, max_tokens=int(used) + 1)
    with pytest.warns(UserWarning, match="cut off") as caught:
        rows = _rows(name, cut, ["a red cat", prompt, "x"])
    assert rows[1].tolist() == [*whole[:used], tokenizer.eos_id]
    assert str(caught[0].message) == (
        f"1 of 3 prompts have more than max_tokens={used + 1} tokens; "
        "cut off: '\uff2eight \u2014 under the bright moon' (prompt 1)"
    )
    assert caught[0].filename == __file__


def test_a_warning_does_not_grow_with_the_prompts():
    tokenizer = _load("tokenizer", max_tokens=3)
    prompts = ["red " * 200, *["cat cat cat"] * 5]
    with pytest.warns(UserWarning, match=r"^6 of 6 prompts .* and the end of 2 more$") as caught:
        tokenizer.encode(prompts)
    assert len(str(caught[0].message)) < 450


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
def test_wrong_prompts_and_lengths_are_refused(name):
    tokenizer = _load(name)
    with pytest.raises(TypeError, match="must be a sequence of strings, got the one string 'cat'"):
        tokenizer.encode("cat")
    with pytest.raises(TypeError, match="prompts must be strings, got 3 at position 1"):
        tokenizer.encode(["cat", 3])
    fewest = 2 if name in CLIPS else 1
    with pytest.raises(ValueError, match=f"max_tokens must be an int from {fewest} on, got 0"):
        _load(name, max_tokens=0)
    with pytest.raises(ValueError, match=f"must be an int from {fewest} on, got 9"):
        dataclasses.replace(tokenizer, max_tokens=9.5)


def test_padding_is_read_from_either_file(tmp_path):
    folder = _copy("tokenizer", tmp_path)
    settings = folder / "tokenizer_config.json"
    _change(settings, pad_token={"content": "!", "lstrip": False})
    assert ClipTokenizer.load(folder).pad_id == 0
    (folder / "special_tokens_map.json").write_text('{"pad_token": "a"}')
    assert ClipTokenizer.load(folder).pad_id == 0  # the settings list their tokens, so they count
    _change(settings, added_tokens_decoder="absent")
    assert ClipTokenizer.load(folder).pad_id == 64
    settings.unlink()
    assert ClipTokenizer.load(folder).pad_id == 64
    (folder / "special_tokens_map.json").unlink()
    assert ClipTokenizer.load(folder).pad_id == EOS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token": "[PAD]"}, r"special token '\[PAD\]' is not in the vocabulary"),
        ({"pad_token": 3}, r"config\.json: pad_token must be a token, got 3"),
        ({"eos_token": {"id": 3}}, r"eos_token must be a token, got \{\"id\": 3\}"),
        ({"added_tokens_decoder": []}, r"added_tokens_decoder must map ids to tokens, got \[\]"),
        ({"added_tokens_decoder": {"7": {"content": "!"}}}, "'!' must have the id 0 .*, got 7"),
        ({"extra_ids": -1}, "extra_ids must be an int from 0 on, got -1"),
    ],
)
def test_wrong_special_tokens_are_refused(changes, message, tmp_path):
    folder = _copy("tokenizer", tmp_path)
    _change(folder / "tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        ClipTokenizer.load(folder)


def test_incomplete_and_damaged_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer\.json, or vocab\.json and"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer\.json or spiece\.model"):
        T5Tokenizer.load(tmp_path)
    folder = _copy("tokenizer", tmp_path / "clip")
    (folder / "merges.txt").write_text("#version: 0.2\nno_such piece\n")
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt do not fit"):
        ClipTokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        ClipTokenizer.load(folder)
    with pytest.raises(ValueError, match=r"'<\|startoftext\|>' is not in the vocabulary"):
        ClipTokenizer.load(GOLDENS / "tokenizer_3_json")


def test_padding_and_truncation_of_a_file_do_not_count(tmp_path):
    folder = _copy("tokenizer_2_json", tmp_path)
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    _change(folder / "tokenizer.json", truncation=cut)
    prompts = ["a red cat in the snow"]
    expected = _load("tokenizer_2").encode(prompts)
    np.testing.assert_array_equal(ClipTokenizer.load(folder).encode(prompts), expected)


def test_sentinels_are_as_many_as_the_folder_says(tmp_path):
    folder = _copy("tokenizer_3", tmp_path)
    pieces = len(read_unigram(folder / "spiece.model").pieces)
    sizes = {}
    for count in (100, 3, 0, "absent"):
        _change(folder / "tokenizer_config.json", extra_ids=count)
        tokenizer = T5Tokenizer.load(folder)
        sizes[count] = tokenizer.backend.get_vocab_size() - pieces
    assert sizes == {100: 100, 3: 3, 0: 0, "absent": 100}


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3", "tokenizer_3_json"])
def test_a_missing_library_is_reported_with_what_to_do(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs the package tokenizers: pip install 'jaxgen\[hf"):
        _load(name)


def test_a_sentencepiece_model_is_read_without_its_package():
    model = read_unigram(GOLDENS / "tokenizer_3/spiece.model")
    assert [piece for piece, _ in model.pieces[:4]] == ["<pad>", "</s>", "<unk>", "\u2581"]
    assert model.unknown_id == 2
    assert not model.byte_fallback
    assert len(model.charsmap) > 100
    scores = [score for _, score in model.pieces]
    assert scores[:3] == [0.0, 0.0, 0.0]
    assert max(scores[3:]) < 0.0


def _piece(text, kind=1):
    content = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\xbf\x18" + bytes([kind])
    return b"\x0a" + bytes([len(content)]) + content


def test_fields_of_a_sentencepiece_model(tmp_path):
    path = tmp_path / "spiece.model"
    trainer, normalizer = b"\x12\x05\x18\x01\x98\x02\x01", b"\x1a\x05\x0a\x01x\x12\x00"
    path.write_bytes(_piece(b"<unk>", 2) + _piece(b"\xe2\x96\x81a") + trainer + normalizer)
    model = read_unigram(path)
    assert model.pieces == [("<unk>", -1.0), ("\u2581a", -1.0)]
    assert (model.unknown_id, model.byte_fallback, model.charsmap) == (0, True, b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x7f\x0a", "not a SentencePiece model: truncated at byte 3"),
        (b"\x0a", "not a SentencePiece model: no number at byte 1"),
        (b"\xff" * 12, "not a SentencePiece model: no number at byte 10"),
        (b"\x0b", "not a SentencePiece model: wire type 3 at byte 1"),
        (b"\x08\x01", "not a SentencePiece model: bytes expected, got the number 1"),
        (_piece(b"\xff\xfe", 2), "not a SentencePiece model: .* can't decode"),
        (_piece(b"a"), "one piece must be the unknown one, got 0"),
        (_piece(b"a", 2) + _piece(b"b", 2), "one piece must be the unknown one, got 2"),
        (_piece(b"a", 2) + b"\x12\x02\x18\x02", r"model type must be 1 \(unigram\), got 2"),
        (b"", "one piece must be the unknown one, got 0"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"spiece\.model: .*{message}"):
        read_unigram(path)
