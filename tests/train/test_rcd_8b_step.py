"""The program that trains an 8B model for a few steps, with a tiny one."""

import dataclasses
import json
import sys

import jax
import pytest

from jaxgen.models import DIFFUSION_LM_PRESETS
from train.configs import rcd_8b_step
from train.configs.rcd_8b_step import Step, measure

TINY = dataclasses.replace(
    DIFFUSION_LM_PRESETS["sdar-1.7b"],
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, width=16, ffn_dim=32,
    vocabulary_size=24, mask_id=23,
)  # fmt: skip


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    known = {"sdar-8b": TINY, "sdar-1.7b": TINY, "llada-8b": TINY}
    monkeypatch.setattr(rcd_8b_step, "DIFFUSION_LM_PRESETS", known)
    # jax.nn.dot_product_attention itself promotes bfloat16 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_steps_are_compiled_once_and_the_same_on_two_devices(monkeypatch):
    made, make = [], rcd_8b_step.make_step

    def watched(*arguments):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(rcd_8b_step, "make_step", watched)
    sizes = {"tokens": 32, "block_length": 8, "chunk": 16, "batch": 2, "steps": 2}
    one, two = (measure(Step(fsdp=count, **sizes)) for count in (1, 2))
    assert [run._cache_size() for run in made] == [1, 1]
    assert len(one["losses"]) == 3
    assert len(set(one["losses"])) == 3
    assert one["losses"] == pytest.approx(two["losses"], rel=0.02)
    assert [record["device"].split()[0] for record in (one, two)] == ["1", "2"]
    assert one["tokens_per_second"] == pytest.approx(64 / one["seconds"], rel=0.1)


def test_the_record_is_printed_and_written(monkeypatch, capsys, tmp_path):
    path = tmp_path / "new" / "record.json"
    options = ["--tokens", "16", "--block-length", "8", "--chunk", "8", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["rcd_8b_step", *options, "--output", str(path)])
    rcd_8b_step.main()
    record = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert (record["model"], record["tokens"], record["fsdp"]) == ("sdar-8b", 16, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "sdar"}, "models must be among .*, got 'sdar'"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"fsdp": 2}, "batch must be a multiple of fsdp, got batch=1 and fsdp=2"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Step(**options)
