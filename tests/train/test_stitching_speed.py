"""The seconds that a picture takes with two models: tiny ones through the whole command."""

import dataclasses
import json
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import MMDIT_PRESETS, AutoencoderConfig, MMDiT, MMDiTConfig
from jaxgen.sampling import Alone, HybridStitch, SRDiffusion, TStitch
from train.configs import stitching_speed
from train.configs.random_weights import with_random_weights
from train.configs.stitching_speed import (
    Memory,
    Speed,
    carry_out,
    cost_of,
    measure,
    reaching,
    table,
    verdict,
)

LARGE = MMDiTConfig(
    sample_size=8, num_layers=2, num_heads=2, head_dim=8, joint_attention_dim=12,
    pooled_projection_dim=10, pos_embed_max_size=8, qk_norm=True,
)  # fmt: skip
SMALL = dataclasses.replace(LARGE, num_layers=1, num_heads=1, qk_norm=False)
LATENTS = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
TINY = {"large": "little", "small": "less", "pixels": 16, "text_tokens": 5, "steps": 10, "runs": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    presets = {**MMDIT_PRESETS, "little": LARGE, "less": SMALL}
    monkeypatch.setattr(stitching_speed, "MMDIT_PRESETS", presets)


@pytest.fixture
def tiny_autoencoder(monkeypatch):
    monkeypatch.setattr(stitching_speed, "AUTOENCODER_PRESETS", {"stable-diffusion-3": LATENTS})


@pytest.mark.usefixtures("tiny_autoencoder")
def test_measures_every_sampler_and_writes_after_each(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "speed.json"
    written = []
    save = stitching_speed.save
    monkeypatch.setattr(
        stitching_speed,
        "save",
        lambda *given: (
            save(*given),
            written.append(len(json.loads(output.read_text())["records"])),
        ),
    )
    # No other test has as many tokens, so all is compiled here.
    speed = Speed(
        **{**TINY, "text_tokens": 6},
        batch=2,
        splits=((0.3, 0.5),),
        keep_text=(False,),
        output=output,
    )
    records = carry_out(speed)
    assert written == [1, 2, 3, 4, 5, 6]
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line) for line in lines] == records

    names = ["alone", "alone", "T-Stitch", "SRDiffusion", "HybridStitch", "HybridStitch"]
    assert [record["method"] for record in records] == names
    steps = [tuple(record["steps"].values()) for record in records]
    assert steps == [(10, 0, 0), (0, 0, 10), (6, 0, 4), (5, 0, 5), (2, 3, 5), (3, 2, 5)]
    for record in records:
        runs = record["seconds_of_runs"]
        assert len(runs) == 2
        assert 0 < record["seconds_decoding"] < record["seconds_a_picture"]
        stages = record["seconds_of_stages"]
        assert set(stages) == {kind for kind, count in record["steps"].items() if count}
        assert min(stages.values()) > 0
        assert record["seconds_a_picture"] == pytest.approx(np.median(runs) / 2)
        alone = records[0]["seconds_a_picture"]
        assert record["speed_up"] == pytest.approx(alone / record["seconds_a_picture"])
        assert record["speed_up_in_operations"] >= 1
        assert record["gib"] is None
        assert record["gib_of_process"] is None
    assert records[0]["speed_up"] == 1
    # The first samplers compile one model each, and T-Stitch nothing; HybridStitch two programs.
    assert min(records[0]["seconds_compiling"], records[4]["seconds_compiling"]) > 0.2
    assert records[2]["seconds_compiling"] < records[0]["seconds_compiling"]

    rows = table(records).splitlines()
    assert rows[3].startswith("| small only | 0 + 0 + 10 | ")
    assert rows[7].startswith("| HybridStitch, 30% to 50%, 30%, x0_diff | 3 + 2 + 5 | ")
    assert all(row.endswith(" |  |") for row in rows[2:])  # CPUs do not tell their memory

    found = json.loads(output.read_text())
    assert found["records"] == records
    assert found["device"] == jax.devices()[0].device_kind
    assert found["jax"] == jax.__version__
    settings = found["settings"]
    splits = tuple(map(tuple, settings["splits"]))
    again = {
        **settings,
        "output": output,
        "splits": splits,
        "policies": tuple(settings["policies"]),
        "keep_text": tuple(settings["keep_text"]),
    }
    assert Speed(**again) == speed


def test_the_command_takes_options_and_prints_a_table(monkeypatch, capsys):
    def record(policy, method, speed_up, steps):
        counts = dict(zip(("large", "hybrid", "small"), steps, strict=True))
        return {"method": method, "policy": dataclasses.asdict(policy), "steps": counts,
                "seconds_a_picture": 8.123 / speed_up, "seconds_compiling": 70.2,
                "speed_up": speed_up, "speed_up_in_operations": speed_up, "gib": 17.25}  # fmt: skip

    def measured(speed):
        assert (speed.large, speed.steps, speed.text_tokens) == ("little", 20, 5)
        assert speed.splits == ((0.3, 0.5), (0.4, 0.6))
        assert speed.policies == ("hybridstitch", "large")
        yield record(Alone(), "alone", 1.0, (20, 0, 0))
        yield record(HybridStitch(), "HybridStitch", 1.9, (4, 6, 10))

    options = "--large little --small less --pixels 128 --steps 20 --text-tokens 5 --runs 1"
    options += " --splits 0.3 0.5 0.4 0.6 --policies hybridstitch large"
    monkeypatch.setattr(stitching_speed, "measure", measured)
    monkeypatch.setattr(sys, "argv", ["stitching_speed", *options.split()])
    stitching_speed.main()
    *rows, _, last = capsys.readouterr().out.strip().splitlines()
    assert rows[2:] == [
        "| large only | 20 + 0 + 0 | 8.12 s | 70 s | 1.00 | 1.00 | 17.2 GiB |",
        "| HybridStitch, 22% to 52%, 30%, x0_diff | 4 + 6 + 10 | 4.28 s | 70 s | 1.90 | 1.90 "
        "| 17.2 GiB |",
    ]
    assert {row.count("|") for row in rows} == {8}
    assert last.startswith("HybridStitch with 4 + 6 + 10 steps is 1.90 times as fast")


def test_the_default_is_the_example_of_the_specification():
    speed = Speed()
    large, small = speed.config("large"), speed.config("small")
    assert (large.num_layers, small.num_layers) == (38, 24)
    assert large.dtype == large.param_dtype == small.param_dtype == jnp.bfloat16
    assert speed.patches == 4096
    expected = [Alone(), Alone("small"), TStitch(0.4), SRDiffusion(0.5), HybridStitch()]
    assert list(speed.samplers()[:5]) == expected
    assert tuple(HybridStitch().stages(50)) == (
        ("large", 0, 11),
        ("hybrid", 11, 26),
        ("small", 26, 50),
    )
    ratios = [round(1 / cost_of(speed, policy), 2) for policy in speed.samplers()[:5]]
    assert ratios == [1.0, 3.5, 1.4, 1.56, 1.82]
    hybrid = speed.samplers()[4:]
    assert [policy.keep_text for policy in hybrid] == [False] * 6 + [True] * 6
    costs = [[1 / cost_of(speed, policy) for policy in part] for part in (hybrid[:6], hybrid[6:])]
    assert costs == [sorted(part) for part in costs]
    assert all(less < more for less, more in zip(*costs, strict=True))
    assert min(costs[0][1], costs[1][0]) > 1.83


def test_layers_shorten_both_models():
    speed = Speed(large="sd3.5-medium", layers=2)
    assert speed.config("large").num_layers == speed.config("small").num_layers == 2
    assert speed.config("large").dual_attention_layers == (0, 1)


def test_all_weights_are_random_and_narrow():
    config = dataclasses.replace(LARGE, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = with_random_weights(lambda **given: MMDiT(config, **given))
    state = nnx.state(model)
    leaves = jax.tree.leaves(state)
    usual = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, nnx.state(usual))
    for leaf in leaves:
        assert leaf.dtype == jnp.bfloat16
        assert np.count_nonzero(leaf) > 0.9 * leaf.size
    velocity = nnx.jit(lambda model, *inputs: model(*inputs).astype(jnp.float32))(
        model, jnp.ones((1, 8, 8, 16), jnp.bfloat16), jnp.full((1,), 500.0),
        jnp.ones((1, 5, 12), jnp.bfloat16), jnp.ones((1, 10), jnp.bfloat16),
    )  # fmt: skip
    assert 0.1 < float(jnp.std(velocity)) < 100


def test_memory_is_the_most_in_use_while_watching(monkeypatch):
    seen, more = threading.Event(), iter([3, 7, 5])
    values = {"bytes_in_use": 0, "peak_bytes_in_use": 9}

    def memory_stats():
        values["bytes_in_use"] = next(more, 0)
        if not values["bytes_in_use"]:
            seen.set()
        return dict(values)

    device = SimpleNamespace(memory_stats=memory_stats)
    monkeypatch.setattr(stitching_speed.jax, "local_devices", lambda: [device])
    with Memory() as memory:
        assert seen.wait(10)
    assert (memory.bytes, memory.mark) == (7, 9)


@pytest.mark.usefixtures("tiny_autoencoder")
def test_weights_of_the_model_not_used_do_not_count(monkeypatch):
    device = SimpleNamespace(
        memory_stats=lambda: {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**31}
    )
    monkeypatch.setattr(stitching_speed.jax, "local_devices", lambda: [device])
    records = list(measure(Speed(**TINY, policies=("large", "small", "t-stitch"))))
    large, small, both = (record["gib"] for record in records)
    assert both == 1
    assert small < large < both
    assert {record["gib_of_process"] for record in records} == {2}
    assert " | 1.0 GiB |" in table(records)


@pytest.mark.usefixtures("tiny_autoencoder")
def test_the_small_model_may_be_on_another_device(monkeypatch):
    policies = ("large", "t-stitch", "hybridstitch")
    weights = []
    stitch = stitching_speed.stitch

    def watched(large, small, *rest):
        models = [model and jax.tree.leaves(model.weights)[0].devices() for model in (large, small)]
        weights.append(models)
        return stitch(large, small, *rest)

    monkeypatch.setattr(stitching_speed, "stitch", watched)
    speed = Speed(**TINY, policies=policies, splits=(), keep_text=(False,), small_device=1)
    assert [record["method"] for record in measure(speed)] == ["alone", "T-Stitch", "HybridStitch"]
    first, second = ({device} for device in jax.devices()[:2])
    assert [first, second] in weights
    for record in measure(speed, alone=2.0):  # as it was found before
        assert record["method"] != "alone"
        assert record["speed_up"] == 2 / record["seconds_a_picture"]
    assert all(models in ([first, None], [first, second]) for models in weights)


def test_names_the_split_that_leaves_most_to_the_large_model():
    def record(method, speed_up, in_operations):
        steps = {"large": 2, "hybrid": 3, "small": 5}
        return {"method": method, "speed_up": speed_up, "speed_up_in_operations": in_operations,
                "steps": steps}  # fmt: skip

    records = [record("alone", 3.0, 3.5), record("HybridStitch", 1.7, 1.8)]
    assert reaching(records, 1.83) is None
    assert verdict(records, 1.83) == (
        "No split of HybridStitch that was measured is 1.83 times as fast."
    )
    records += [record("HybridStitch", 2.1, 2.2), record("HybridStitch", 1.9, 2.0)]
    assert reaching(records, 1.83) is records[3]
    assert "with 2 + 3 + 5 steps is 1.90 times" in verdict(records, 1.83)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"large": "sd4"}, "large must be one of sd3-medium, .* got 'sd4'"),
        ({"small": "tiny"}, "large and small must have the same latent channels, got 16 and 3"),
        ({"large": "tiny"}, "same latent channels, as the autoencoder, got 3 and 16"),
        ({"small": "less"}, "same joint_attention_dim, got 4096 and 12"),
        ({"pixels": 1000}, "pixels must be a multiple of 16 and at most 3072, got 1000"),
        ({"pixels": 4096}, "pixels must be a multiple of 16 and at most 3072, got 4096"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"small_device": 4}, "small_device must be below the number of devices, 4, got 4"),
        ({"attention": "fast"}, "attention must be one of 'exact', 'int8', got 'fast'"),
        ({"policies": ("large", "fast")}, r"policies must be among large, .* got \['fast'\]"),
        ({"policies": ("small",)}, r"policies must include 'large', .* got \('small',\)"),
        ({"steps": 4}, "needs 2 large steps before it, got start=0.22 of 4 steps"),
        ({"splits": ((0.5, 0.2),)}, "start must not come after end, got steps 25 and 10"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Speed(**changes)
