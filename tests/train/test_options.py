"""Options of training programs: what binds a run, and what says which files are read."""

import pytest
import tyro

from train.corpus import ByteTokenizer
from train.language_model_config import Config
from train.language_model_parts import open_documents


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_what_decides_no_update_does_not_bind_a_run():
    watching = {"damaged", "export_dtype", "peak_teraflops", "statistics_every", "validate_every",
                "validation_batches", "workers"}  # fmt: skip
    assert watching <= Config.may_change
    deciding = {"data", "kind", "pattern", "field", "seed", "batch_size", "accumulate", "held_out"}
    assert not deciding & Config.may_change


def test_kind_and_pattern_choose_the_files(tmp_path):
    files = {"a.txt": "one", "b.jsonl": '{"text": "two"}\n', "c/d.tex": "three"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    def read(*words):
        config = tyro.cli(Config, args=["--data", str(tmp_path), *words])
        documents = open_documents(config, ByteTokenizer())
        return [ByteTokenizer().decode(ids) for ids in documents]

    assert read("--kind", "jsonl") == ["two"]
    assert read("--kind", "text") == ["one"]
    assert read("--kind", "text", "--pattern", "**/*.tex") == ["three"]
    assert read("--pattern", "*.txt") == ["one"]
    with pytest.raises(ValueError, match=r"choose one as kind \(--kind\), or .*\(--pattern\)"):
        read()
    with pytest.raises(ValueError, match=r"give it as kind \(--kind\): one of text, jsonl"):
        read("--pattern", "**/*.tex")


def test_kind_and_pattern_need_data(tmp_path):
    with pytest.raises(ValueError, match=r"need data, got kind=None and pattern=\*\.txt"):
        Config(pattern="*.txt")
    with pytest.raises(ValueError, match="kind must be one of"):
        Config(data=tmp_path, kind="csv")  # pyright: ignore[reportArgumentType]
