"""Documents from Parquet files."""

import numpy as np
import pytest

from train.corpus import DamagedDataError, open_source

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"text {number} " * (number % 7) for number in range(200)]


def write(path, texts, column="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    parquet.write_table(table, path, row_group_size=90, **options)
    return path


def read(path, **options):
    damage = []
    documents = list(open_source(path, **options).documents(damage.append))
    return documents, list(map(str, damage))


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_rows_in_order(tmp_path, kind):
    texts = pyarrow.array(TEXTS)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    write(tmp_path / "b.parquet", texts)
    write(tmp_path / "a.parquet", ["first"])
    documents, damage = read(tmp_path)
    assert [document.text for document in documents] == ["first", *TEXTS]
    assert [document.name for document in documents[:3]] == [
        "a.parquet, row 0",
        "b.parquet, row 0",
        "b.parquet, row 1",
    ]
    assert documents[-1].name == "b.parquet, row 199"
    assert not damage


def test_another_column(tmp_path):
    path = write(tmp_path / "a.parquet", ["x", "y"], column="content")
    assert [document.text for document in read(path, field="content")[0]] == ["x", "y"]
    with pytest.raises(
        DamagedDataError, match=r"a\.parquet has no column 'text', only id, content"
    ):
        list(open_source(path).documents())


def test_rows_without_text_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", ["x", None, "y"])
    with pytest.raises(DamagedDataError, match=r"a\.parquet, row 1 must hold a string, got NoneT"):
        list(open_source(path).documents())
    documents, damage = read(path)
    assert [document.name for document in documents] == ["a.parquet, row 0", "a.parquet, row 2"]
    assert len(damage) == 1


def test_a_column_of_numbers_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(DamagedDataError, match=r"a\.parquet, row 0 must hold a string, got int"):
        list(open_source(path, field="id").documents())


def test_bytes_that_are_no_text_are_named(tmp_path):
    raw = pyarrow.array([b"good", b"ab\xff"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    path = write(tmp_path / "a.parquet", texts)
    with pytest.raises(DamagedDataError, match=r"a\.parquet, row 1 is not UTF-8: .* at byte 2"):
        list(open_source(path).documents())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = write(tmp_path / "b.parquet", TEXTS)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    write(tmp_path / "a.parquet", ["before"])
    write(tmp_path / "c.parquet", ["after"])
    with pytest.raises(DamagedDataError, match=r"b\.parquet cannot be read from row 0 on"):
        list(open_source(tmp_path).documents())
    documents, damage = read(tmp_path)
    assert [document.text for document in documents] == ["before", "after"]
    assert len(damage) == 1


def test_changed_bytes_are_never_read_as_text(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    noticed = 0
    for place in np.random.default_rng(0).integers(4, footer, 40).tolist():
        damaged = content.copy()
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        documents, damage = read(path)
        read_texts = [document.text for document in documents]
        assert read_texts == TEXTS[: len(read_texts)]
        noticed += bool(damage)
        assert damage or read_texts == TEXTS
    assert noticed > 10  # the others hit the other column, or what nobody reads
