"""Options of training programs: what binds a run, and what says which files are read."""

import shlex
from pathlib import Path

import pytest
import tyro

from train import (
    diffusion_lm_config,
    language_model_config,
    sla2_config,
    text_to_image_config,
    text_to_video_config,
)
from train.corpus import ByteTokenizer
from train.language_model_config import Config
from train.language_model_parts import open_documents

CONFIGS = {
    module.__name__.removeprefix("train."): module.Config
    for module in (
        diffusion_lm_config,
        language_model_config,
        sla2_config,
        text_to_image_config,
        text_to_video_config,
    )
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_what_decides_no_update_does_not_bind_a_run():
    watching = {"damaged", "export_dtype", "peak_teraflops", "statistics_every", "validate_every",
                "validation_batches", "workers"}  # fmt: skip
    assert watching <= Config.may_change
    deciding = {"data", "kind", "pattern", "field", "seed", "batch_size", "accumulate", "held_out"}
    assert not deciding & Config.may_change


@pytest.mark.parametrize("name", CONFIGS)
def test_every_program_can_be_profiled_and_watched(name):
    needed = {"pretrained": Path("model")} if name == "sla2_config" else {}
    words = [word for key, value in needed.items() for word in (f"--{key}", str(value))]
    config = tyro.cli(
        CONFIGS[name], args=[*words, "--profile-steps", "10", "12", "--hung-after", "30"]
    )
    assert (config.profile_steps, config.hung_after) == ((10, 12), 30)
    assert tyro.cli(CONFIGS[name], args=shlex.split(config.command())[3:]) == config
    assert {"profile_steps", "hung_after"} <= config.may_change
    assert tyro.cli(CONFIGS[name], args=[*words, "--hung-after", "None"]).hung_after is None
    with pytest.raises(ValueError, match=r"steps from 1, got profile_steps=\(5, 4\)"):
        CONFIGS[name](**needed, profile_steps=(5, 4))
    with pytest.raises(ValueError, match=r"hung_after must be at least 1, got hung_after=0.5"):
        CONFIGS[name](**needed, hung_after=0.5)


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
