"""Damaged folders of language models."""

import json
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.checkpoints import (
    export_diffusion_lm,
    load_diffusion_lm_folder,
    load_safetensors,
    save_safetensors,
)
from tests.jaxgen.checkpoints.diffusion_lm_files import (
    FILES,
    NAMES,
    copy_golden,
    load_golden,
    weights_of,
)

# Damage, drawn at random: refused with a message that names a file, or harmless and exact.

JUNK = [0, -1, 1, 3, 7, 10**6, 2**31, 2**63, 10**30, 1.5, 1e300, float("nan"), float("inf")]
JUNK += [True, None, "", "x", "8", "\0", "\ud800", [], [1], [[]], {}, {"a": 1}]


def _is_json(path):
    return path.suffix == ".json"


def _choose(folder, dice, json_too=True):
    return dice.choice(
        [path for path in sorted(folder.iterdir()) if json_too or not _is_json(path)]
    )


def _truncate(folder, dice):
    path = _choose(folder, dice)
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: dice.randrange(len(content))])


def _lose(folder, dice):
    _choose(folder, dice).unlink()


def _rewrite(change):
    """Damages an array of one file, which stays a valid file."""

    def damage(folder, dice):
        path = _choose(folder, dice, json_too=False)
        arrays = {key: np.array(array) for key, array in load_safetensors(path).items()}
        change(arrays, dice.choice(sorted(arrays)), dice)
        save_safetensors(path, arrays)

    return damage


def _remove(arrays, key, dice):
    del arrays[key]


def _rename(arrays, key, dice):
    arrays[dice.choice([key + "x", key[:-1], key.upper(), f"module.{key}"])] = arrays.pop(key)


def _reshape(arrays, key, dice):
    array = arrays[key]
    choices = [array[..., None], array[:-1], array[:0], np.concatenate([array, array])]
    choices += [array.reshape(-1)] if array.ndim > 1 else [array.sum()]
    # A square kernel cannot be told from its transpose.
    choices += [array.T] if array.ndim > 1 and len(set(array.shape)) > 1 else []
    arrays[key] = dice.choice(choices)


def _enlarge(folder, dice):
    """A size of the configuration far beyond the weights."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    names = ["num_hidden_layers", "n_layers", "hidden_size", "d_model", "vocab_size", "head_dim"]
    names += ["embedding_size", "intermediate_size", "mlp_hidden_size"]
    name = dice.choice([name for name in names if name in values])
    values[name] = dice.choice([2**12, 2**20, 2**31, 10**30])
    if name == "vocab_size" and "embedding_size" in values:
        values["embedding_size"] = values["vocab_size"]
    path.write_text(json.dumps(values))


def _flip(folder, dice):
    """One bit of a document, or of the header of a file, its length included."""
    path = _choose(folder, dice)
    content = bytearray(path.read_bytes())
    end = len(content) if _is_json(path) else 8 + int.from_bytes(content[:8], "little")
    content[dice.randrange(end)] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _misconfigure(folder, dice):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name in dice.sample(sorted(values), dice.randrange(1, 3)):
        values[name] = dice.choice(JUNK)
    path.write_text(json.dumps(values))


def _misdescribe(folder, dice):
    """One entry of a header."""
    path = _choose(folder, dice, json_too=False)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    entry = entries[dice.choice(sorted(entries.keys() - {"__metadata__"}))]
    field = dice.choice(sorted(entry))
    if isinstance(entry[field], list) and dice.random() < 0.7:
        entry[field][dice.randrange(len(entry[field]))] = dice.choice(JUNK)
    else:
        entry[field] = dice.choice([*JUNK, [0, 2**62, 2**62], [2**70, 0], "F16", "F8_E4M3"])
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


# Those that no folder survives, and those that can be harmless.
FATAL = {
    "truncate": _truncate,
    "lose": _lose,
    "remove": _rewrite(_remove),
    "rename": _rewrite(_rename),
    "reshape": _rewrite(_reshape),
    "enlarge": _enlarge,
}
OTHER = {"flip": _flip, "misconfigure": _misconfigure, "misdescribe": _misdescribe}


@pytest.mark.parametrize("kind", [*FATAL, *OTHER])
def test_damaged_folders_are_refused_or_harmless(kind, tmp_path):
    refused = 0
    for seed in range(24):
        name, dice = NAMES[seed % 3], random.Random(f"{kind} {seed}")
        folder = copy_golden(name, tmp_path / str(seed))
        (FATAL | OTHER)[kind](folder, dice)
        try:
            model, message = load_golden(name, folder), ""
        except (ValueError, FileNotFoundError) as error:
            model, message = None, f"{type(error).__name__}: {error}"
        if model is None:
            # Not, for example, UnicodeDecodeError, which is a ValueError.
            assert message.startswith(("ValueError: ", "FileNotFoundError: ")), message
            assert str(folder) in message, message
            assert len(message) < 5000
            refused += 1
            continue
        assert kind in OTHER
        expected, loaded = weights_of(name), export_diffusion_lm(model)
        assert loaded.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(loaded[key], array, err_msg=key)
    assert refused == 24 if kind in FATAL else refused >= 12


@pytest.mark.parametrize("name", NAMES)
def test_sizes_far_beyond_the_weights_are_refused_at_once(name, tmp_path):
    path = copy_golden(name, tmp_path / "new") / "config.json"
    values = json.loads(path.read_text())
    layers = "n_layers" if name == "llada" else "num_hidden_layers"
    path.write_text(json.dumps(values | {layers: 10**6}))
    with pytest.raises(ValueError, match=r"config\.json, .*: the weights .* has 1000000 blocks"):
        load_golden(name, path.parent)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json"):
        load_golden("sdar", tmp_path)
    shutil.copy(FILES / "sdar/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_golden("sdar", tmp_path)
    folder = copy_golden("qwen3_tied", tmp_path / "new")
    with pytest.raises(ValueError, match=r"config\.json: .* missing: mask_token_id; mask_id can"):
        load_diffusion_lm_folder(folder, dtype=jnp.float32)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names .*model-00002-of-00002\.safe"):
        load_golden("qwen3_tied", folder)
