"""Files are whole or absent."""

import errno
import json
import os
import resource

import pytest
import torch

from tcbench.errors import UserError
from tcbench.record.files import atomic, digest, read_json, read_tensors, shortened, write_json, write_tensors


def test_round_trips(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "a" / "b.json") == {"x": [1, 2.5, None]}
    write_tensors(tmp_path / "t.safetensors", {"t": torch.arange(3)}, {"key": "value"})
    tensors, metadata = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(tensors["t"], torch.arange(3)) and metadata == {"key": "value"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "t.safetensors"]


def test_json_has_a_line_for_every_innermost_list(tmp_path):
    value = {"a": [1, 2.5, None], 'b"': {"c": {}, "d": [[], [1, "x\n"]], 5: (1, 2)}, "e": "f"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(value))
    assert text.splitlines()[:3] == ["{", ' "a": [1,2.5,null],', ' "b\\"": {'] and len(text.splitlines()) == 12


def test_numbers_are_shortened_in_nested_lists():
    assert shortened([[1234.5678, 1e-9 / 3], [2]], 3) == [[1230.0, 3.33e-10], [2.0]]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(KeyError), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"x\.json: cannot be written \(No space left on device\); free space"):
        write_json(tmp_path / "x.json", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_really_fails(tmp_path):
    """A file size limit fails the write inside safetensors, which reports it in its own exception type."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"t\.safetensors: cannot be written"):
            write_tensors(tmp_path / "t.safetensors", {"t": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", float("nan"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [("a.json", b"{", "not valid JSON"), ("a.safetensors", b"\x08\0\0\0", "truncated or not a safetensors file")],
)
def test_damaged_and_missing_files_are_named(tmp_path, name, content, problem):
    read = read_json if name.endswith("json") else read_tensors
    with pytest.raises(UserError, match=f"{name}: not found"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {problem}"):
        read(tmp_path / name)


def test_digest_ignores_key_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
