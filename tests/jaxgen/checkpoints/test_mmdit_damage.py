"""Damaged files, at random: refused with a message that names a file, or harmless and exact."""

import functools
import json
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.checkpoints import (
    export_mmdit,
    load_mmdit_folder,
    load_mmdit_single_file,
    load_safetensors,
    save_safetensors,
)

FILES = Path(__file__).parents[2] / "goldens/sd3_files"
FOLDERS = ["plain", "dual"]
JUNK = [0, -1, 1, 3, 7, 10**6, 2**31, 2**63, 10**30, 1.5, 1e300, float("nan"), float("inf")]
JUNK += [True, None, "", "x", "8", "\0", "\ud800", [], [1], [[]], {}, {"a": 1}]
POINTERS = ["", ".", "..", "config.json", "C:\\x", "~x", "\0", "\ud800", "x" * 300, "gone"]
POINTERS += ["../model", "/etc/model", "a/b", "diffusion_pytorch_model"]
POINTERS = [3, None, [], {}] + [
    name + end for name in POINTERS for end in (".safetensors", "") if end or "." in name
]


def _is_json(path):
    return path.suffix == ".json"


def _header(path):
    """The header of a safetensors file, and what follows it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def _write_header(path, text, rest):
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def _files(folder, json_too=True):
    return [path for path in sorted(folder.iterdir()) if json_too or not _is_json(path)]


def _truncate(folder, dice):
    path = dice.choice(_files(folder))
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: dice.randrange(len(content))])


def _flip(folder, dice):
    """One bit of a header, its length included, or of a JSON document."""
    path = dice.choice(_files(folder))
    content = bytearray(path.read_bytes())
    end = len(content) if _is_json(path) else 8 + len(_header(path)[0])
    content[dice.randrange(end)] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _garble(folder, dice):
    """Some bytes of a header or of a JSON document."""
    path = dice.choice(_files(folder))
    content = bytearray(path.read_bytes())
    end = len(content) if _is_json(path) else 8 + len(_header(path)[0])
    start = dice.randrange(end)
    for position in range(start, min(end, start + dice.randrange(2, 40))):
        content[position] = dice.randrange(256)
    path.write_bytes(content)


def _rewrite(change):
    """Damages the arrays of one file, which stays a valid file."""

    def damage(folder, dice):
        path = dice.choice(_files(folder, json_too=False))
        arrays = {key: np.array(array) for key, array in load_safetensors(path).items()}
        candidates = [key for key in sorted(arrays) if not key.startswith(("first_", "text_enc"))]
        change(arrays, dice.choice(candidates), dice)
        save_safetensors(path, arrays)

    return damage


def _remove(arrays, key, dice):
    del arrays[key]


def _rename(arrays, key, dice):
    renamed = [key + "x", key[:-1], key.upper(), key.replace("0", "7").replace("_", "-"), "é" + key]
    arrays[dice.choice(renamed)] = arrays.pop(key)


def _add(arrays, key, dice):
    arrays[dice.choice([f"module.{key}", f"{key}.1", "scale", key.replace("s", "S") + "-"])] = (
        arrays[key]
    )


def _reshape(arrays, key, dice):
    array = arrays[key]
    choices = [array[..., None], array[None], array[:-1], array[:0], np.concatenate([array, array])]
    choices += [array.reshape(-1)] if array.ndim > 1 else [array.sum()]
    arrays[key] = dice.choice(choices)


def _retype(arrays, key, dice):
    dtypes = [np.int8, np.int64, np.uint16, np.bool_]
    arrays[key] = arrays[key].astype(dice.choice(dtypes))


def _duplicate(folder, dice):
    """The same key twice, in one header, in two shards or in a document."""
    path = dice.choice(_files(folder))
    text, rest = (path.read_bytes(), b"") if _is_json(path) else _header(path)
    pairs = list(json.loads(text).items())
    key, value = dice.choice(pairs)
    doubled = text.strip()[:-1] + f",{json.dumps(key)}:{json.dumps(value)}}}".encode()
    shards = _files(folder, json_too=False)
    if len(shards) > 1 and dice.random() < 0.5:
        arrays = load_safetensors(shards[0])
        key = dice.choice(sorted(arrays))
        other = load_safetensors(shards[1]) | {key: arrays[key]}
        save_safetensors(shards[1], {key: np.array(array) for key, array in other.items()})
    elif _is_json(path):
        path.write_bytes(doubled)
    else:
        _write_header(path, doubled, rest)


def _lose(folder, dice):
    path = dice.choice(_files(folder))
    path.unlink()
    if dice.random() < 0.4:
        path.mkdir()
    elif dice.random() < 0.4:
        path.symlink_to(path)


def _misdirect(folder, dice):
    """Entries of an index, where there is one, otherwise an index instead of the weights."""
    index = next(folder.glob("*.index.json"), None)
    if index is None:
        weights = folder / "diffusion_pytorch_model.safetensors"
        keys = load_safetensors(weights)
        weights.unlink()
        index = weights.with_name(weights.name + ".index.json")
        values = {"weight_map": dict.fromkeys(keys, "gone.safetensors")}
    else:
        values = json.loads(index.read_text())
    weight_map = values["weight_map"]
    for key in dice.sample(sorted(weight_map), dice.randrange(1, 5)):
        shards = [name for name in set(map(str, weight_map.values())) if name != weight_map[key]]
        weight_map[key] = dice.choice([*POINTERS, *sorted(shards)])
    if dice.random() < 0.1:
        values["weight_map"] = dice.choice(JUNK)
    index.write_text(json.dumps(values))


def _misconfigure(folder, dice):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name in dice.sample(sorted(values), dice.randrange(1, 3)):
        values[name] = dice.choice(JUNK)
    if dice.random() < 0.2:
        values[dice.choice(["dropout", "image_dim", "Num_layers"])] = dice.choice(JUNK)
    path.write_text(json.dumps(values))


def _misdescribe(folder, dice):
    """One number or word of an entry of a header."""
    path = dice.choice(_files(folder, json_too=False))
    text, rest = _header(path)
    entries = json.loads(text)
    entry = entries[dice.choice(sorted(entries.keys() - {"__metadata__"}))]
    field = dice.choice(sorted(entry))
    if isinstance(entry[field], list) and entry[field] and dice.random() < 0.7:
        entry[field][dice.randrange(len(entry[field]))] = dice.choice(JUNK)
    else:
        entry[field] = dice.choice(
            [*JUNK, [0, 2**62, 2**62], [2**70, 0], [1] * 70, "F16", "F8_E4M3"]
        )
    _write_header(path, json.dumps(entries).encode(), rest)


def _hollow(folder, dice):
    """An array without values, but with sides beyond all numbers."""
    path = dice.choice(_files(folder, json_too=False))
    text, rest = _header(path)
    entries = json.loads(text)
    shape = dice.choice([[0, 2**62, 2**62], [2**70, 0], [0] + [2**40] * 40, [0] * 64])
    entries["hollow"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    _write_header(path, json.dumps(entries).encode(), rest)


# Those that no file survives, and those that can be harmless.
FATAL = {
    "truncate": _truncate,
    "remove": _rewrite(_remove),
    "rename": _rewrite(_rename),
    "add": _rewrite(_add),
    "reshape": _rewrite(_reshape),
    "retype": _rewrite(_retype),
    "duplicate": _duplicate,
    "lose": _lose,
    "hollow": _hollow,
}
OTHER = {"flip": _flip, "garble": _garble, "misdescribe": _misdescribe}
ONLY_FOLDERS = {"misdirect": _misdirect, "misconfigure": _misconfigure}


@functools.cache
def _expected(name):
    """The weights and the configuration of a golden."""
    model = load_mmdit_folder(FILES / name, dtype=jnp.float32)
    return export_mmdit(model), model.config


def _check(name, load, folder, fatal):
    """Loads what is damaged; returns whether it was refused."""
    expected, config = _expected(name)
    names = {path.name for path in (FILES / name).rglob("*.*")} | {"model.safetensors"}
    try:
        model, message = load(), None
    except (ValueError, FileNotFoundError) as error:
        model, message = None, f"{type(error).__name__}: {error}"
    if model is None:
        # Not, for example, UnicodeDecodeError, which is a ValueError.
        assert message.startswith(("ValueError: ", "FileNotFoundError: ")), message
        assert str(folder) in message, message
        assert any(name in message for name in names), message
        assert len(message) < 5000
        return True
    assert not fatal
    loaded = export_mmdit(model)
    assert loaded.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(loaded[key], array, err_msg=key)
    for field in ("num_layers", "num_heads", "qk_norm", "dual_attention_layers", "patch_size"):
        assert getattr(model.config, field) == getattr(config, field)
    return False


@pytest.mark.parametrize("kind", [*FATAL, *OTHER, *ONLY_FOLDERS])
def test_damaged_folders_are_refused_or_harmless(kind, tmp_path):
    damage = (FATAL | OTHER | ONLY_FOLDERS)[kind]
    refused = 0
    for seed in range(40):
        name = FOLDERS[seed % 2]
        folder = tmp_path / str(seed)
        shutil.copytree(FILES / name / "transformer", folder)
        damage(folder, random.Random(f"{kind} {seed}"))
        load = functools.partial(load_mmdit_folder, folder, dtype=jnp.float32)
        refused += _check(name, load, folder, kind in FATAL)
    assert refused >= 20


@pytest.mark.parametrize("kind", [*FATAL, *OTHER])
def test_damaged_single_files_are_refused_or_harmless(kind, tmp_path):
    damage = (FATAL | OTHER)[kind]
    refused = 0
    for seed in range(20):
        name = FOLDERS[seed % 2]
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = folder / "model.safetensors"
        shutil.copy(FILES / name / "single_file.safetensors", path)
        damage(folder, random.Random(f"single {kind} {seed}"))
        load = functools.partial(load_mmdit_single_file, path, dtype=jnp.float32, head_dim=4)
        refused += _check(name, load, folder, kind in FATAL)
    assert refused >= 10
