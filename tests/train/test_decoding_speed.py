"""The speed of decoding: tiny models through the whole command."""

import dataclasses

import pytest

from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLMConfig
from train.configs import decoding_speed
from train.configs.decoding_speed import Speed, measure, table

TINY = DiffusionLMConfig(
    num_layers=1,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_dim=8,
    vocabulary_size=20,
    mask_id=19,
)


def test_measures_every_method_with_and_without_rcd(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding_speed, "DIFFUSION_LM_PRESETS", {"sdar-8b": TINY, "llada-8b": TINY})
    output = tmp_path / "speed.json"
    options = {"prompt_tokens": 6, "new_tokens": 4, "block_length": 2, "runs": 1}
    speed = Speed(methods=("block", "dual"), batches=(2,), output=output, **options)
    records = measure(speed)
    assert [(r["method"], r["table"]) for r in records] == [
        (method, table) for method in ("block", "dual") for table in (None, "exact", "int8")
    ]
    assert {record["steps"] for record in records} == {4}
    for plain, *fed_back in (records[:3], records[3:]):
        assert plain["over_plain"] == 0
        for record in fed_back:
            expected = record["ms_a_step"] / plain["ms_a_step"] - 1
            assert record["over_plain"] == pytest.approx(expected, abs=1e-3)
    assert output.exists()
    assert len(table(records).splitlines()) == 8


def test_the_defaults_are_the_released_sizes():
    config = Speed().config("llada-8b")
    assert (
        dataclasses.replace(config, dtype="float32", param_dtype="float32")
        == (DIFFUSION_LM_PRESETS["llada-8b"])
    )
    assert Speed(layers=2).config("sdar-8b").num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sdar": "qwen"}, "models must be among llada-8b, .* got 'qwen'"),
        ({"methods": ("full",)}, r"methods must be among block, .* got \['full'\]"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Speed(**changes)
