"""Choosing settings: what is tried, stored, looked up and refused; times are made up."""

import json

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import tune
from kernels_pallas.sage_attention import tuning
from kernels_pallas.sage_attention.tuning import Tuning


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._stored.cache_clear()
    yield tmp_path
    tuning._stored.cache_clear()


def test_stored_choices_are_read_and_chosen_ones_come_first(folder):
    (folder / "some_gpu_2.json").write_text('{"sage_attention": {"128": {"stages": 3}}}')
    assert tuning.tuning_for("Some GPU-2", 128) == tuning.tuning_for("Some GPU-2", 72) == Tuning(3)
    assert tuning.tuning_for("Some GPU-2", 64) == tuning.tuning_for("Other", 128) == Tuning()
    with tuning.using(Tuning(1, 5)):
        assert tuning.tuning_for("Some GPU-2", 128) == Tuning(1, 5)


def test_the_fastest_is_stored(folder, hopper, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: [hopper])
    time = lambda choice, size, runs: abs(choice.stagger - 900) + choice.stages + size[3]
    monkeypatch.setattr(tune, "measure", time)
    tune.main(["--head-dim", "128", "--stagger", "0", "1000", "--stages", "2", "3"])
    file = folder / "nvidia_h100_80gb_hbm3.json"
    stored = json.loads(file.read_text())["sage_attention"]
    assert stored == {"128": {"stages": 2, "stagger": 1000}}
    assert tuning.tuning_for(hopper.device_kind, 128) == Tuning(2, 1000)
    assert "head_dim 128, 3 stages, 0 ns: 1031.000 ms" in capsys.readouterr().out
    tune.main(["--head-dim", "64", "--stagger", "0", "--stages", "2"])  # keeps what was stored
    assert set(json.loads(file.read_text())["sage_attention"]) == {"64", "128"}


@pytest.mark.usefixtures("hopper")
def test_the_settings_reach_the_kernels():
    arrays = [jax.ShapeDtypeStruct((1, 300, 1, 64), jnp.bfloat16)] * 3

    def lowered(choice):
        with tuning.using(choice):
            loss = lambda *x: jnp.sum(tune.sage_attention(*x).astype(jnp.float32))
            traced = jax.jit(jax.grad(loss)).trace(*arrays)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    texts = {lowered(choice) for choice in (Tuning(2, 7), Tuning(2, 9), Tuning(3, 7))}
    assert len(texts) == 3


def test_refusals(capsys):
    with pytest.raises(ValueError, match=r"stages must be at least 1 .* got 0 and 5"):
        Tuning(0, 5)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "nothing to tune here: sage_attention runs as 'xla'" in capsys.readouterr().err
