"""Saves over an older model that stop before every file that they move or remove."""

import contextlib
import dataclasses
import errno
import itertools
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.checkpoints import (
    load_autoencoder_folder,
    load_clip_text_folder,
    load_diffusion_lm_folder,
    load_mmdit_folder,
    load_safetensors,
    load_t5_folder,
    load_wan_folder,
    save_autoencoder_folder,
    save_clip_text_folder,
    save_diffusion_lm_folder,
    save_mmdit_folder,
    save_safetensors,
    save_t5_folder,
    save_wan_folder,
    write_atomically,
)

GOLDENS = Path(__file__).parents[2] / "goldens"
OLD = {f"x{i}": np.full(4, i, np.float32) for i in range(5)}
NEW = {key: array.astype(np.int32) for key, array in OLD.items()}
SAVERS = {
    "autoencoder_folder/vae": (
        load_autoencoder_folder,
        save_autoencoder_folder,
        {"scaling_factor": 0.5},
    ),
    "language_models/llada": (
        load_diffusion_lm_folder,
        save_diffusion_lm_folder,
        {"rope_theta": 99.0},
    ),
    "language_models/sdar": (load_diffusion_lm_folder, save_diffusion_lm_folder, {"eps": 0.1}),
    "sd3_files/plain/transformer": (load_mmdit_folder, save_mmdit_folder, {"sample_size": 8}),
    "text_encoders/clip_l": (load_clip_text_folder, save_clip_text_folder, {"eps": 0.1}),
    "text_encoders/t5": (load_t5_folder, save_t5_folder, {"eps": 0.1}),
    "wan_folder/transformer": (load_wan_folder, save_wan_folder, {"eps": 0.1}),
}


@contextlib.contextmanager
def _stopped(monkeypatch, step):
    """Stops before the move or removal of this number; tells whether it came to that."""
    numbers, stopped = itertools.count(), []

    def stopping(act):
        def run(*args, **options):
            if next(numbers) >= step:
                stopped.append(step)
                raise KeyboardInterrupt
            return act(*args, **options)

        return run

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, stopping(getattr(Path, name)))
        yield stopped


def _dtypes(path):
    """The dtype of each array of a folder's weights; None if they are refused as missing."""
    try:
        return {key: array.dtype.name for key, array in load_safetensors(path).items()}
    except FileNotFoundError:
        return None


def _states(monkeypatch, folder, save_old, save_new, weights):
    """The configuration and the dtypes of the weights after every interruption, and at last."""
    save_old(folder / "old")
    for step in itertools.count():
        here = shutil.copytree(folder / "old", folder / str(step))
        with _stopped(monkeypatch, step) as stopped:
            save_new(here)
        yield (here / "config.json").read_text(), _dtypes(here / weights)
        if not stopped:
            return


@pytest.mark.parametrize("text", ["old", "new"])
@pytest.mark.parametrize("after", [None, 20, 40])
@pytest.mark.parametrize("before", [None, 40])
def test_an_interrupted_save_leaves_the_old_the_new_or_no_weights(
    tmp_path, monkeypatch, before, after, text
):
    name = "model.safetensors"
    states = _states(
        monkeypatch,
        tmp_path,
        lambda folder: (
            folder.mkdir(),
            save_safetensors(
                folder / name, OLD, max_shard_bytes=before, texts={"config.json": "old"}
            ),
        ),
        lambda folder: save_safetensors(
            folder / name, NEW, max_shard_bytes=after, texts={"config.json": text}
        ),
        name,
    )
    kinds = [kind for kind, _ in itertools.groupby(states)]
    old, new = [kind for kind in kinds if kind[1] is not None]
    assert old == kinds[0] == ("old", dict.fromkeys(OLD, "float32"))
    assert new == kinds[-1] == (text, dict.fromkeys(NEW, "int32"))
    # A single file that needs no other one replaces whatever was there at once.
    assert (len(kinds) == 2) == (after is None and text == "old")


@pytest.mark.parametrize("limit", [None, 10_000])
@pytest.mark.parametrize("name", SAVERS)
def test_a_configuration_never_meets_the_weights_of_another_model(
    tmp_path, monkeypatch, name, limit
):
    load, save, change = SAVERS[name]
    old, new = (
        load(GOLDENS / name, dtype=jnp.float32, param_dtype=dtype)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    new.config = dataclasses.replace(new.config, **change)
    weights = next((GOLDENS / name).glob("*model.safetensors")).name
    states = _states(
        monkeypatch,
        tmp_path,
        lambda folder: save(folder, old, max_shard_bytes=limit),
        lambda folder: save(folder, new, max_shard_bytes=limit),
        weights,
    )
    kinds = [kind for kind, _ in itertools.groupby(states)]
    first, last = [kind for kind in kinds if kind[1] is not None]
    assert first == kinds[0]
    assert last == kinds[-1]
    assert first[0] != last[0]
    assert "bfloat16" in last[1].values()
    assert "bfloat16" not in first[1].values()


def test_a_full_disk_leaves_the_older_model(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, OLD, max_shard_bytes=40)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    calls = itertools.count()

    def write(*args):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(*args)

    monkeypatch.setattr("jaxgen.checkpoints.safetensors_files.write_atomically", write)
    with pytest.raises(OSError, match="No space left on device"):
        save_safetensors(path, NEW, max_shard_bytes=40)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_missing_after_an_interruption_is_named(tmp_path, monkeypatch):
    golden = GOLDENS / "language_models/sdar"
    model = load_diffusion_lm_folder(golden, dtype=jnp.float32)
    for step in itertools.count():
        folder = shutil.copytree(golden, tmp_path / str(step))
        with _stopped(monkeypatch, step):
            save_diffusion_lm_folder(folder, model, max_shard_bytes=10_000)
        if _dtypes(folder / "model.safetensors") is None:
            break
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_diffusion_lm_folder(folder, dtype=jnp.float32)
    save_diffusion_lm_folder(folder, model, max_shard_bytes=10_000)
    assert load_diffusion_lm_folder(folder, dtype=jnp.float32).config == model.config
