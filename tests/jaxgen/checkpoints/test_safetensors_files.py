import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.checkpoints import (
    check_arrays,
    load_safetensors,
    read_safetensors_header,
    save_safetensors,
)

ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.asarray(jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "mask": np.array([True, False, True]),
    "bytes": np.arange(3, dtype=np.uint8),
}


def _file(tmp_path, header, data=b"", length=None):
    """A file with this header, JSON text or an object, and these bytes of arrays."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def _entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _equal(first, second):
    assert first.keys() == second.keys()
    for key, array in first.items():
        assert array.dtype == second[key].dtype, key
        np.testing.assert_array_equal(array, second[key], err_msg=key)


def test_round_trip_is_exact(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, ARRAYS, {"author": "someone"})
    _equal(load_safetensors(path), ARRAYS)
    header = read_safetensors_header(path)
    assert header.metadata == {"author": "someone"}
    assert header.arrays["half"] == jax.ShapeDtypeStruct((5,), jnp.bfloat16)


def test_jax_arrays_are_saved(tmp_path):
    arrays = {"x": jnp.arange(4.0, dtype=jnp.bfloat16), "y": jnp.ones((2, 3)).T}
    save_safetensors(tmp_path / "a.safetensors", arrays)
    _equal(
        load_safetensors(tmp_path / "a.safetensors"), {k: np.asarray(v) for k, v in arrays.items()}
    )


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    arrays = {key: array for key, array in ARRAYS.items() if key != "half"}
    save_safetensors(tmp_path / "ours.safetensors", arrays, {"format": "pt"})
    _equal(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
    _equal(load_safetensors(tmp_path / "theirs.safetensors"), arrays)


def test_loaded_arrays_are_read_only(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ARRAYS)
    with pytest.raises(ValueError, match="read-only"):
        load_safetensors(tmp_path / "a.safetensors")["weight"][0, 0] = 1.0


def test_every_truncation_is_refused_with_the_file_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, ARRAYS)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_safetensors(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"truncated or damaged: .* the file has"):
        load_safetensors(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_headers_raise_value_errors_or_load_whole_arrays(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_safetensors(path, {"a": np.arange(4.0), "b": np.arange(3, dtype=np.int8)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 36))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        arrays = load_safetensors(path)
    except ValueError as error:
        assert "damaged.safetensors" in str(error)  # noqa: PT017
    else:
        assert sum(array.nbytes for array in arrays.values()) == 35


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[1]", b"", "expected a JSON object, got list"),
        (b"{", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "key 'a' occurs twice"),
        ({"a": 1}, b"", "header entry of 'a' is not"),
        ({"a": _entry(dtype="F31")}, bytes(8), "header entry of 'a' is not a dtype of F64, F32"),
        ({"a": _entry(shape=(3,))}, bytes(8), "data_offsets of its size"),
        ({"a": _entry(shape=(-2,), offsets=(8, 0))}, bytes(8), "header entry of 'a'"),
        ({"a": _entry(shape=(2.0,))}, bytes(8), "header entry of 'a'"),
        ({"a": _entry(shape=(True,), offsets=(0, 4))}, bytes(4), "header entry of 'a'"),
        ({"a": _entry() | {"extra": 1}}, bytes(8), "header entry of 'a'"),
        ({"a": _entry(), "b": _entry()}, bytes(8), "'b' begins at byte 0, expected 8"),
        ({"a": _entry(offsets=(4, 12))}, bytes(12), "'a' begins at byte 4, expected 0"),
        ({"a": _entry(shape=(2**61,), offsets=(0, 2**63))}, bytes(8), "truncated or damaged"),
        ({"a": _entry()}, bytes(9), "promises .* bytes, the file has"),
        ({"__metadata__": {"k": 1}}, b"", "__metadata__ must map strings to strings"),
        ({"__metadata__": []}, b"", "__metadata__ must map strings to strings"),
    ],
)
def test_lying_headers_are_refused(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_safetensors(_file(tmp_path, header, data))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [3, 2**40, 2**64 - 1])
def test_a_lying_header_length_is_refused(tmp_path, length):
    with pytest.raises(ValueError, match=f"cannot hold a header of {length} bytes"):
        load_safetensors(_file(tmp_path, b"{}", length=length))


def test_the_header_size_is_capped(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgen.checkpoints.safetensors_format.MAX_HEADER_BYTES", 50)
    path = tmp_path / "model.safetensors"
    save_safetensors(path, ARRAYS)
    with pytest.raises(ValueError, match=r"at most 50 are allowed"):
        load_safetensors(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_safetensors(tmp_path / "nowhere.safetensors")


def test_one_error_lists_everything_that_does_not_fit():
    expected = {
        "lost": jax.ShapeDtypeStruct((1,), jnp.float32),
        "weight": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "scalar": jax.ShapeDtypeStruct((), jnp.float32),
        "half": jax.ShapeDtypeStruct((5,), jnp.float32),
        "mask": jax.ShapeDtypeStruct((3,), jnp.bool_),
        "bytes": jax.ShapeDtypeStruct((3,), jnp.uint8),
    }
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        check_arrays(ARRAYS, expected, "here")
    assert str(caught.value) == (
        "here: the weights do not fit the model; missing (1): lost; unused (1): empty; "
        "wrong shape or dtype (2): scalar (expected float32[], got int64[]), "
        "weight (expected float32[3, 2], got float32[2, 3])"
    )


def test_long_lists_are_shortened_but_counted():
    expected = {f"k{i:02d}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(30)}
    with pytest.raises(ValueError, match=r"missing \(30\): k00, .*, k19 and 10 more$"):
        check_arrays({}, expected)


def test_loading_checks_expected(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": np.zeros(2, np.float32)})
    load_safetensors(path, {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"model\.safetensors: .* missing \(1\): b; unused \(1\)"):
        load_safetensors(path, {"b": jax.ShapeDtypeStruct((2,), jnp.float32)})


def _sharded(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {f"x{i}": np.full((4,), i, np.float32) for i in range(5)}
    save_safetensors(path, arrays, max_shard_bytes=40)
    return path, arrays


def test_sharded_round_trip(tmp_path):
    path, arrays = _sharded(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    _equal(load_safetensors(path), arrays)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 80}


def test_an_array_larger_than_a_shard_gets_its_own(tmp_path):
    arrays = {"a": np.zeros(100, np.int8), "b": np.zeros(3, np.int8), "c": np.zeros(3, np.int8)}
    path = tmp_path / "model.safetensors"
    save_safetensors(path, arrays, max_shard_bytes=10)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    _equal(load_safetensors(path), arrays)


def test_the_newest_save_is_the_one_that_loads(tmp_path):
    path, _ = _sharded(tmp_path)
    small = {"a": np.zeros(1, np.float32)}
    save_safetensors(path, small)
    _equal(load_safetensors(path), small)
    _, arrays = _sharded(tmp_path)
    _equal(load_safetensors(path), arrays)


def test_files_of_an_older_save_are_removed(tmp_path):
    path, arrays = _sharded(tmp_path)
    other = tmp_path / "other-00001-of-00003.safetensors"
    other.write_bytes(b"")
    for limit, number in ((20, 5), (40, 3), (None, 0), (20, 5)):
        save_safetensors(path, arrays, max_shard_bytes=limit)
        names = [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]
        names += ["model.safetensors.index.json"] if number else ["model.safetensors"]
        assert sorted(file.name for file in tmp_path.iterdir()) == [*names, other.name]
        _equal(load_safetensors(path), arrays)


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("name", ["../other.safetensors", "notes.txt", "", 3, {}])
def test_an_older_index_cannot_remove_other_files(tmp_path, name, limit):
    folder = tmp_path / "new"
    folder.mkdir()
    others = [tmp_path / "other.safetensors", folder / "notes.txt"]
    for other in others:
        other.write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x0": name}}))
    path, arrays = folder / "model.safetensors", {f"x{i}": np.zeros(9, np.int8) for i in range(5)}
    save_safetensors(path, arrays, max_shard_bytes=limit)
    assert all(other.exists() for other in others)
    _equal(load_safetensors(path), arrays)


def test_an_older_index_may_be_damaged(tmp_path):
    path, arrays = _sharded(tmp_path)
    for content in (b"{", b"\xff", b"[]", b"{}"):
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        save_safetensors(path, arrays, max_shard_bytes=40)
        _equal(load_safetensors(path), arrays)


def test_texts_are_written_with_the_arrays(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ARRAYS, texts={"config.json": "{}\n", "b": "é"})
    assert (tmp_path / "config.json").read_text() == "{}\n"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "é"
    assert len(list(tmp_path.iterdir())) == 3


def test_the_folder_of_a_save_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_safetensors(tmp_path / "nowhere/a.safetensors", ARRAYS)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", 3, ".."]
)
def test_index_entries_outside_the_folder_are_refused(tmp_path, name):
    path, _ = _sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x0": name}}))
    with pytest.raises(ValueError, match=r"must name a \.safetensors file of the same folder, got"):
        load_safetensors(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x9": "model-00001-of-00003.safetensors"}, "not those of the index: x9"),
        ({"x0": "model-00002-of-00003.safetensors"}, "not those of the index: x0"),
    ],
)
def test_index_and_shards_must_agree(tmp_path, change, message):
    path, _ = _sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= change
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_safetensors(path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_weight_map_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="weight_map must be a non-empty object"):
        load_safetensors(tmp_path / "model.safetensors")


def test_missing_shard_is_named(tmp_path):
    path, _ = _sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        load_safetensors(path)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"": np.zeros(1)}, {}, "'' cannot be the key of an array"),
        ({"__metadata__": np.zeros(1)}, {}, "'__metadata__' cannot be the key"),
        ({"a": np.zeros(1, np.complex128)}, {}, "a: dtype complex128 is none of F64, F32"),
        ({"a": np.zeros(1)}, {"metadata": {"k": 1}}, "metadata must map strings to strings"),
        (
            {"a": np.zeros(1)},
            {"max_shard_bytes": 0},
            "max_shard_bytes must be a positive int, got 0",
        ),
        ({"a": np.zeros(1)}, {"max_shard_bytes": "5GB"}, "must be a positive int, got '5GB'"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path, arrays, options, message):
    with pytest.raises(ValueError, match=message):
        save_safetensors(tmp_path / "a.safetensors", arrays, **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path):
    class Unreadable:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, *args, **kwargs):
            raise RuntimeError("device lost")

    path = tmp_path / "model.safetensors"
    save_safetensors(path, ARRAYS)
    with pytest.raises(RuntimeError, match="device lost"):
        save_safetensors(path, {"a": Unreadable()})
    _equal(load_safetensors(path), ARRAYS)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
