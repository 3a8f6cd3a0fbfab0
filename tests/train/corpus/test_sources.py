"""Documents from files: order, kinds, and what is damaged."""

import json
import os
import sys

import pytest

from tests.train.corpus.builders import write_json_lines
from train.corpus import ByteTokenizer, DamagedDataError, load_documents, open_source
from train.corpus.folders import matches


def texts(source):
    return [document.text for document in source.documents()]


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_texts_come_in_order_of_their_paths(tmp_path):
    # Made in another order; upper case and folders sort by their letters' numbers.
    files = {"b.txt": "3", "a/z.md": "2", "B.txt": "1", "é.txt": "5", "c/a.rst": "4"}
    source = open_source(write(tmp_path, files))
    assert [(document.name, document.text) for document in source.documents()] == [
        ("B.txt", "1"),
        ("a/z.md", "2"),
        ("b.txt", "3"),
        ("c/a.rst", "4"),
        ("é.txt", "5"),
    ]


def test_hidden_and_other_files_are_not_read(tmp_path):
    files = {"a.txt": "a", ".b.txt": "b", ".git/c.txt": "c", "d.png": b"\xff", "e.tex": "e"}
    write(tmp_path, files)
    assert texts(open_source(tmp_path)) == ["a"]
    assert texts(open_source(tmp_path, kind="text", pattern="**/*.tex")) == ["e"]


def test_suffixes_may_be_upper_case(tmp_path):
    write(tmp_path, {"B.TXT": "b", "a.Md": "a"})
    assert texts(open_source(tmp_path)) == ["b", "a"]
    assert texts(open_source(tmp_path / "B.TXT")) == ["b"]


def test_links_to_folders_are_followed_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    write(data, {"a.txt": "a", "z/b.txt": "b"})
    write(other, {"deep/c.txt": "c", "deep/.d.txt": "d", ".hidden/e.txt": "e"})
    links = {"again": other, "alias": data / "z", "first": other / "deep", ".hidden": other}
    for name, target in links.items():
        (data / name).symlink_to(target)
    for folder in (data / "z", other / "deep"):
        (folder / "around").symlink_to(data)
    (data / "file.txt").symlink_to(other / "deep" / "c.txt")
    source = open_source(data)
    # What is in a folder has the path without a link, or else the first.
    assert source.paths == ("a.txt", "again/deep/c.txt", "file.txt", "z/b.txt")
    assert texts(source) == ["a", "c", "c", "b"]
    (tmp_path / "link").symlink_to(data)
    assert open_source(tmp_path / "link").paths == source.paths


def test_links_that_lead_nowhere_are_damage(tmp_path):
    write(tmp_path, {"a.txt": "a"})
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "c.txt")
    (tmp_path / "part").symlink_to(tmp_path / "gone")
    (tmp_path / "picture.png").symlink_to(tmp_path / "gone")
    source, damage = open_source(tmp_path), []
    with pytest.raises(DamagedDataError, match=r"b\.txt cannot be read: .*No such file"):
        texts(source)
    assert [document.text for document in source.documents(damage.append)] == ["a"]
    assert [str(error).split()[0] for error in damage] == ["b.txt", "c.txt", "part"]
    with pytest.warns(UserWarning, match="3 damaged texts are left out, the first: b.txt"):
        documents = load_documents(
            source, ByteTokenizer(), damaged="skip", cache_dir=tmp_path / "cache"
        )
    assert documents.skipped == 3
    write(tmp_path, {"gone.txt": "b"})
    assert open_source(tmp_path, pattern="b.txt").fingerprint() != source.fingerprint()
    assert texts(open_source(tmp_path, pattern="b.txt")) == ["b"]


def test_what_is_no_file_is_not_read(tmp_path):
    write(tmp_path, {"a.txt": "a"})
    os.mkfifo(tmp_path / "b.txt")
    assert texts(open_source(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("name", "pattern", "matching"),
    [
        ("a.tex", "*.tex", True),
        ("b/a.tex", "*.tex", False),
        ("b/a.tex", "b/[a-c].tex", True),
        ("a.tex", "**/*.tex", True),
        ("c/b/a.tex", "**/*.tex", True),
        ("c/b/a.tex", "c/**/b/**/a.?ex", True),
        ("c/b/a.TEX", "**/*.tex", False),
        ("a.tex", "", False),
        ("a.tex", "/**/*.tex", False),
    ],
)
def test_patterns(name, pattern, matching):
    assert matches(name, pattern) == matching


def test_texts_about_data_are_no_data(tmp_path):
    """The layout of a data set of Hugging Face."""
    about = ("README.md", "README_zh.md", "LICENSE.txt", "data/Readme.md", ".gitattributes")
    write(tmp_path, dict.fromkeys(about, "about") | {"data/a.jsonl": '{"text": "a"}'})
    assert texts(open_source(tmp_path)) == ["a"]
    assert len(texts(open_source(tmp_path, kind="text"))) == 4
    write(tmp_path, {"notes.md": "perhaps data"})
    with pytest.raises(ValueError, match=r"several kinds, jsonl \(data/a\.jsonl\), text \(notes"):
        open_source(tmp_path)
    # Alone they are text as others are.
    (tmp_path / "data" / "a.jsonl").unlink()
    assert len(texts(open_source(tmp_path))) == 5


def test_texts_are_not_changed(tmp_path):
    text = "\ta\r\nb\rc \n\n日本\0"
    write(tmp_path, {"a.txt": text, "b.txt": b"\xef\xbb\xbf" + text.encode()})
    assert texts(open_source(tmp_path)) == [text, text]


def test_lines_of_json(tmp_path):
    write_json_lines(tmp_path / "b" / "1.jsonl", ["x\ny", ""])
    write_json_lines(tmp_path / "a.ndjson", ["日本"])
    with (tmp_path / "a.ndjson").open("ab") as file:
        file.write(b'\n  \r\n{"other": 1, "text": "last, without an end"}')
    source = open_source(tmp_path)
    assert [(document.name, document.text) for document in source.documents()] == [
        ("a.ndjson, line 1", "日本"),
        ("a.ndjson, line 4", "last, without an end"),
        ("b/1.jsonl, line 1", "x\ny"),
        ("b/1.jsonl, line 2", ""),
    ]


def test_another_field_and_a_single_file(tmp_path):
    path = write_json_lines(tmp_path / "a.json", ["one", "two"], field="content")
    assert texts(open_source(path, kind="jsonl", field="content")) == ["one", "two"]
    with pytest.raises(ValueError, match=r"cannot tell the kind of a\.json .* as kind \(--kind\)"):
        open_source(path)


def test_files_are_read_as_they_are_needed(tmp_path):
    write(tmp_path, {"a.jsonl": '{"text": "a"}\n{', "b.jsonl": '{"text": "b"}'})
    documents = open_source(tmp_path).documents()
    assert next(documents).text == "a"
    with pytest.raises(DamagedDataError):
        next(documents)


GOOD = b'{"text": "good"}\n'
DAMAGE = [
    pytest.param(
        {"a.jsonl": GOOD + b'{"text": "cut o'}, "a.jsonl, line 2: not valid JSON", id="cut"
    ),
    pytest.param(
        {"a.jsonl": GOOD + b"\n[1]\n"}, "a.jsonl, line 3: expected a JSON object", id="list"
    ),
    pytest.param(
        {"a.jsonl": GOOD + b'{"Text": "x", "id": 1}\n'},
        "a.jsonl, line 2 has no field 'text', only Text, id",
        id="missing",
    ),
    pytest.param(
        {"a.jsonl": GOOD + b'{"text": null}\n'},
        "a.jsonl, line 2 must hold a string, got NoneType",
        id="null",
    ),
    pytest.param(
        {"a.jsonl": GOOD + b'{"text": "a", "text": "b"}\n'}, "key 'text' occurs twice", id="twice"
    ),
    pytest.param(
        {"a.jsonl": GOOD + b'{"text": "ab\xff"}\n'},
        "a.jsonl, line 2 is not UTF-8: invalid start byte at byte 12",
        id="bytes",
    ),
    pytest.param(
        {"a.jsonl": GOOD + b'{"text": "ab\\ud800"}\n'},
        "a.jsonl, line 2 holds half of a surrogate pair at letter 2",
        id="surrogate",
    ),
    pytest.param({"a.jsonl": GOOD + b"[" * 100_000}, "a.jsonl, line 2: not valid JSON", id="deep"),
    pytest.param(
        {"a.txt": "good", "b/c.txt": "Grüße".encode("latin-1")},
        r"b/c.txt is not UTF-8: .* at byte 2$",
        id="latin-1",
    ),
    pytest.param(
        {"a.txt": "good", "b.txt": "text".encode("utf-16")},
        "b.txt is not UTF-8: .* at byte 0; it looks like UTF-16",
        id="utf-16",
    ),
    pytest.param(
        {"a.txt": "good", "b.txt": "text".encode("utf-32")}, "it looks like UTF-32", id="utf-32"
    ),
]


@pytest.mark.parametrize(("files", "message"), DAMAGE)
def test_damage_is_refused_by_name_and_number(tmp_path, files, message):
    source = open_source(write(tmp_path, files))
    with pytest.raises(DamagedDataError, match=message):
        texts(source)


@pytest.mark.parametrize(("files", "message"), DAMAGE)
def test_damage_can_be_passed_over(tmp_path, files, message):
    first = next(iter(files))
    more = {first: files[first] + b"\n" + GOOD} if first == "a.jsonl" else {"z.txt": "good"}
    source = open_source(write(tmp_path, files | more))
    damage = []
    assert [document.text for document in source.documents(damage.append)] == ["good", "good"]
    assert len(damage) == 1


def test_files_that_disappear_are_damage(tmp_path):
    write(tmp_path, {"a.jsonl": GOOD, "b.jsonl": GOOD})
    source = open_source(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DamagedDataError, match=r"a\.jsonl cannot be read"):
        texts(source)
    with pytest.raises(FileNotFoundError):
        source.fingerprint()


def test_refuses_what_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no files whose names end in \.txt, .*\.parquet"):
        open_source(tmp_path)
    write(tmp_path, {"a.txt": "a", "b.jsonl": GOOD})
    with pytest.raises(ValueError, match=r"kinds, text \(a\.txt\), jsonl \(b\.jsonl\).*--kind"):
        open_source(tmp_path)
    assert texts(open_source(tmp_path, kind="jsonl")) == ["good"]
    with pytest.raises(ValueError, match=r"names match '\*\.tex'"):
        open_source(tmp_path, pattern="*.tex")
    with pytest.raises(ValueError, match="kind must be one of text, jsonl, parquet, got 'csv'"):
        open_source(tmp_path, kind="csv")  # pyright: ignore[reportArgumentType]


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path, {"a.parquet": b""})
    with pytest.raises(ImportError, match=r"pip install \"jaxgen\[parquet\]\""):
        open_source(tmp_path)


def test_fingerprints_follow_files_and_settings(tmp_path):
    path = write_json_lines(tmp_path / "one" / "a.jsonl", ["a"])
    found = [
        open_source(path.parent).fingerprint(),
        open_source(path.parent, field="b").fingerprint(),
    ]
    assert found[0] == open_source(path).fingerprint()
    write_json_lines(path, ["b"])
    found.append(open_source(path).fingerprint())
    write_json_lines(tmp_path / "one" / "b.jsonl", ["a"])
    found.append(open_source(path.parent).fingerprint())
    assert len(set(found)) == 4
    # The same files elsewhere are the same corpus.
    (tmp_path / "one").rename(tmp_path / "two")
    assert open_source(tmp_path / "two").fingerprint() == found[-1]


def test_equal_texts_have_equal_keys(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["x", "y", "x"])
    keys = [document.split_key for document in open_source(tmp_path).documents()]
    assert keys[0] == keys[2] != keys[1]
    assert json.dumps(keys)
