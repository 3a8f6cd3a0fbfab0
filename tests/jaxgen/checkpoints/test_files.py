import pytest

from jaxgen.checkpoints import parse_json_object, write_atomically


def test_content_is_written_in_order_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, [b"one", b"two"])
    write_atomically(path, iter([b"three"]))
    assert path.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_content_and_no_rest(tmp_path):
    def chunks():
        yield b"new"
        raise RuntimeError("interrupted")

    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="interrupted"):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "a.txt", [b""])


def test_json_with_a_repeated_inner_key_is_refused():
    assert parse_json_object('{"a": {"b": [1]}}', "x") == {"a": {"b": [1]}}
    with pytest.raises(ValueError, match=r"^x: not valid JSON: key 'b' occurs twice"):
        parse_json_object('{"a": {"b": 1, "b": 2}}', "x")
