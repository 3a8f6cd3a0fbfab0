"""Token ids on disk: made once, never silently wrong, shared by processes; what is held out."""

import itertools
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.corpus.builders import write_json_lines
from train.corpus import (
    ByteTokenizer,
    DamagedDataError,
    ReleasedTokenizer,
    load_documents,
    open_source,
)

TEXTS = [f"Text number {number}.\n" * (1 + number % 5) for number in range(60)]
FOLDER = Path(__file__).parents[2] / "goldens" / "text_tokenizers" / "llada"
ROOT = Path(__file__).parents[3]


class Counting(ByteTokenizer):
    """Counts the texts that it encodes."""

    encoded = 0

    def encode(self, text):
        type(self).encoded += 1
        return super().encode(text)


class Wide(ByteTokenizer):
    """Has ids that need more than 16 bits."""

    size = 70_000

    def encode(self, text):
        return super().encode(text) + 69_000

    def fingerprint(self):
        return "wide"


@pytest.fixture
def source(tmp_path):
    write_json_lines(tmp_path / "texts" / "a.jsonl", TEXTS[:25])
    write_json_lines(tmp_path / "texts" / "b.jsonl", TEXTS[25:])
    return open_source(tmp_path / "texts")


@pytest.fixture
def load(source, tmp_path):
    Counting.encoded = 0

    def load(tokenizer=None, source=source, **options):
        return load_documents(
            source, tokenizer or Counting(), cache_dir=tmp_path / "cache", **options
        )

    return load


def caches(tmp_path):
    return sorted((tmp_path / "cache").glob("corpus-*/"))


def add_damage(source):
    with (source.root / "b.jsonl").open("ab") as file:
        file.write(b"{\n" * 30)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: ReleasedTokenizer(FOLDER), Wide])
def test_holds_the_ids_of_all_texts(load, make):
    tokenizer = make()
    documents = load(tokenizer)
    expected = [[*tokenizer.encode(text).tolist(), tokenizer.end_id] for text in TEXTS]
    assert [documents[number].tolist() for number in range(len(documents))] == expected
    assert documents.tokens.tolist() == list(itertools.chain(*expected))
    assert documents.tokens.dtype == (np.uint32 if make is Wide else np.uint16)
    assert documents.token_count == len(documents.tokens)
    assert documents.pad_id == tokenizer.pad_id
    assert documents.skipped == 0


def test_is_made_once(load):
    first, second = load(), load()
    assert Counting.encoded == len(TEXTS)
    assert first.digest == second.digest
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.split_numbers, second.split_numbers)


def test_cannot_be_written_to(load):
    with pytest.raises(ValueError, match="read-only"):
        load().tokens[0] = 1


def test_other_texts_or_tokens_are_another_cache(load, source, tmp_path):
    digests = [load().digest, load(ReleasedTokenizer(FOLDER)).digest]
    write_json_lines(source.root / "a.jsonl", [*TEXTS[:24], "another"])
    digests.append(load().digest)
    assert len(set(digests)) == len(caches(tmp_path)) == 3


def test_the_digest_follows_ids_not_file_times(load, source, tmp_path):
    before = load().digest
    path = source.root / "a.jsonl"
    content = path.read_bytes()
    path.write_bytes(b"\n" + content)  # a blank line
    assert load().digest == before
    assert len(caches(tmp_path)) == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-16])


def empty(path):
    path.write_bytes(b"")


def remove_key(path):
    index = json.loads(path.read_text())
    del index["sha256"]
    path.write_text(json.dumps(index))


def other_recipe(path):
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("tokens.bin", flip),
        ("tokens.bin", cut),
        ("tokens.bin", empty),
        ("tokens.bin", Path.unlink),
        ("documents.bin", flip),
        ("documents.bin", cut),
        ("documents.bin", Path.unlink),
        ("index.json", cut),
        ("index.json", empty),
        ("index.json", remove_key),
        ("index.json", other_recipe),
    ],
)
def test_a_damaged_cache_is_made_again(load, tmp_path, name, harm):
    before = load()
    tokens, digest = before.tokens.copy(), before.digest
    del before
    (folder,) = caches(tmp_path)
    harm(folder / name)
    with pytest.warns(
        UserWarning, match=f"{folder.name} cannot be used and is made again: .*{name}"
    ):
        after = load()
    assert Counting.encoded == 2 * len(TEXTS)
    assert after.digest == digest
    np.testing.assert_array_equal(after.tokens, tokens)
    load()  # without a warning


def test_a_cache_without_its_index_is_made_again(load, tmp_path):
    digest = load().digest
    (caches(tmp_path)[0] / "index.json").unlink()
    assert load().digest == digest
    assert Counting.encoded == 2 * len(TEXTS)


def test_damaged_texts_are_refused(load, source, tmp_path):
    add_damage(source)
    with pytest.raises(DamagedDataError, match=r"b\.jsonl, line 36: not valid JSON"):
        load()
    assert not caches(tmp_path)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_damaged_texts_can_be_skipped_and_are_counted(load, source):
    digest = load().digest
    add_damage(source)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(
            UserWarning, match=r"30 damaged texts are left out, .*line 36: not valid"
        ):
            documents = load(damaged="skip")
        assert documents.skipped == 30
        assert documents.digest == digest
    assert Counting.encoded == 2 * len(TEXTS)
    with pytest.raises(DamagedDataError, match=r"b\.jsonl, line 36"):
        load()


def test_empty_texts_are_left_out(load, tmp_path):
    path = write_json_lines(tmp_path / "some.jsonl", ["", "a", "", "b"])
    assert load(source=open_source(path)).lengths.tolist() == [2, 2]
    path = write_json_lines(tmp_path / "none.jsonl", ["", ""])
    with pytest.raises(ValueError, match="the source has no text, 2 empty and 0 damaged ones"):
        load(source=open_source(path))
    path.write_text("{\n")
    with pytest.raises(
        ValueError, match=r"0 empty and 1 damaged ones; the first: none\.jsonl, line"
    ):
        load(source=open_source(path), damaged="skip")


def test_files_must_not_change_while_they_are_read(load, source, tmp_path):
    class Meddling(ByteTokenizer):
        def encode(self, text):
            write_json_lines(source.root / "b.jsonl", ["other"])
            return super().encode(text)

    with pytest.raises(ValueError, match="files of the source changed while they were read"):
        load(Meddling())
    assert not caches(tmp_path)


def test_ids_must_be_in_range(load):
    class Broken(ByteTokenizer):
        size = 100

    with pytest.raises(ValueError, match=r"ids must be from 0 to 99, got 10 to 120 for a\.jsonl"):
        load(Broken())


def test_refuses_options_out_of_range(load):
    with pytest.raises(ValueError, match="damaged must be refuse or skip, got 'keep'"):
        load(damaged="keep")
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        load(workers=-1)


def test_what_a_killed_process_left_is_removed(load, tmp_path):
    load()
    (folder,) = caches(tmp_path)
    left = folder.with_name(f".{folder.name}.1-abc.tmp")
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"half")
    (folder / "index.json").unlink()
    load()
    assert not left.exists()


def test_several_processes_encode_the_same(load, tmp_path):
    texts = [f"{number} " * 20_000 for number in range(20)]  # many chunks
    source = open_source(write_json_lines(tmp_path / "long.jsonl", texts))
    one = load(ReleasedTokenizer(FOLDER), source)
    (folder,) = caches(tmp_path)
    (folder / "index.json").unlink()
    assert load(ReleasedTokenizer(FOLDER), source, workers=1).digest == one.digest


PROCESS = """
    import sys, time
    from pathlib import Path
    from train.corpus import ByteTokenizer, load_documents, open_source

    folder, name = Path(sys.argv[1]), sys.argv[2]

    class Slow(ByteTokenizer):
        def encode(self, text):
            time.sleep(0.01)
            with (folder / "encoded").open("a") as log:
                log.write(name)
            return super().encode(text)

    (folder / f"ready-{name}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    print(load_documents(open_source(folder / "texts"), Slow(), cache_dir=folder / "cache").digest)
"""


def test_two_processes_at_once_make_one_cache(load, source, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(tmp_path)]
    processes = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        for name in "ab"
    ]
    while not all((tmp_path / f"ready-{name}").exists() for name in "ab"):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    digests = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "encoded").read_text() in ("a" * len(TEXTS), "b" * len(TEXTS))
    assert digests == {load(ByteTokenizer()).digest}
    assert len(caches(tmp_path)) == 1
    assert not list((tmp_path / "cache").glob(".*"))
