"""The speed of a denoising step: a tiny model through the whole command."""

import pytest

from jaxgen.models import WAN_PRESETS
from train.configs.wan_speed import Speed, measure, table


def test_measures_full_and_sparse_attention(monkeypatch):
    speed = Speed(
        "moving-emoji", frames=4, height=16, width=16, kept_fractions=(0.5,), runs=1, layers=1
    )
    records = measure(speed)
    assert [record["kept_fraction"] for record in records] == [1.0, 0.5]
    assert {record["tokens"] for record in records} == {64}
    assert all(record["ms"] > 0 for record in records)
    assert records[0]["ratio"] == 1
    assert records[1]["ratio"] == pytest.approx(records[0]["ms"] / records[1]["ms"], rel=0.02)
    rows = table(records).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| full", "| SLA2, 50% sparse"]


def test_the_default_is_wan_at_480_pixels():
    config, speed = Speed().config(), Speed()
    assert speed.frames * speed.height * speed.width // config.patch_pixels == 32_760
    assert config.num_layers == WAN_PRESETS["wan2.1-t2v-1.3b"].num_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "wan"}, "model must be one of wan2.1-t2v-1.3b, .* got 'wan'"),
        ({"kept_fractions": ()}, r"kept_fractions must be between 0 and 1, got \(\)"),
        ({"kept_fractions": (1.0,)}, "kept_fractions must be between 0 and 1"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Speed(**changes)
