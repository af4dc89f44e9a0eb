"""Files are whole or absent."""

import errno
import json
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from tcbench.errors import UserError
from tcbench.record.files import (
    Damaged,
    atomic,
    check_seal,
    digest,
    is_whole,
    kept_tensors,
    read_json,
    read_metadata,
    read_record,
    read_tensors,
    seal,
    sealed,
    sha256,
    shortened,
    vouch,
    write_json,
    write_record,
    write_tensors,
)


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


# --- seals

FIX = "run it again"
VALUE = {"row": "a", "values": [1.5, None], "nested": {"digest": "of something else"}}


def damages(content: bytes) -> dict[str, bytes]:
    """Ways in which disks, copies and editors change a file."""
    flipped = bytearray(content)
    flipped[len(content) * 7 // 10] ^= 4
    return {"cut": content[:-1], "half": content[: len(content) // 2], "empty": b"", "flipped": bytes(flipped)}


@pytest.fixture
def written(tmp_path):
    """A file of every kind that carries a digest."""
    write_record(tmp_path / "a.json", VALUE)
    write_tensors(tmp_path / "a.safetensors", {"t": torch.arange(300)}, {"key": "value", "aaa": "first by name"})
    for name, content in (("a.svg", "<svg></svg>\n"), ("a.png", "pixels")):
        with sealed(tmp_path / name) as temporary:
            temporary.write_text(content)
    return tmp_path


NAMES = ("a.json", "a.safetensors", "a.svg", "a.png")


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_of_a_sealed_file_is_vouched_for(written, name):
    path, content = written / name, (written / name).read_bytes()
    check_seal(path)
    assert is_whole(path) and len(seal(path)) == 64
    for place in [*range(0, len(content), 41), *range(len(content) - 90, len(content))]:
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert not is_whole(path), place
    for changed in damages(content).values():
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=rf"{name}: truncated.* digest"):
            check_seal(path)
    path.unlink()
    assert not is_whole(path)


def test_equal_contents_have_equal_digests(tmp_path):
    for folder in ("one", "two"):
        write_record(tmp_path / folder / "a.json", VALUE)
        write_tensors(tmp_path / folder / "a.safetensors", {"t": torch.arange(3)}, {"key": "value"})
    for name in ("a.json", "a.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    write_tensors(tmp_path / "a.safetensors", {"t": torch.arange(3)}, {"key": "other"})
    assert seal(tmp_path / "a.safetensors") != seal(tmp_path / "one" / "a.safetensors")  # of the metadata, too


def test_a_record_reads_as_it_was_written_and_says_its_fix(written):
    assert read_record(written / "a.json", FIX) == VALUE
    for how, content in damages((written / "a.json").read_bytes()).items():
        (written / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json: .*(run it again|run the step that makes it)") as caught:
            read_record(written / "a.json", FIX)
        assert "\n" not in str(caught.value), how


@pytest.mark.parametrize("text", ["[]", "null", "3", "NaN", '{"a": Infinity}', "[" * 100_000, "1" * 10_000, "\ufeff{}"])
def test_what_is_no_record_is_a_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json: ") as caught:
        read_record(tmp_path / "a.json", FIX)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_json_without_a_digest_is_no_record(tmp_path):
    write_json(tmp_path / "a.json", VALUE)
    with pytest.raises(Damaged, match=r"carries no digest.*; run it again, or keep .* `tcbench vouch"):
        read_record(tmp_path / "a.json", FIX)


def test_damaged_tensors_are_made_again_and_files_of_others_are_read(written):
    path, content = written / "a.safetensors", (written / "a.safetensors").read_bytes()
    tensors, metadata = kept_tensors(path)
    assert torch.equal(tensors["t"], torch.arange(300)) and metadata == read_metadata(path)
    assert read_tensors(path, "np")[0]["t"].tolist() == list(range(300))
    for changed in damages(content).values():
        path.write_bytes(changed)
        assert kept_tensors(path) is None
    save_file({"t": torch.zeros(1)}, path)  # no digest: somebody else's
    assert kept_tensors(path) is None and read_tensors(path)[0].keys() == {"t"}


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_a_picture_says_what_it_is_of(tmp_path, name):
    path, of = tmp_path / name, {"suite": "digits", "row": "a--b", "shows": 'samples "1"'}
    with sealed(path, of) as temporary:
        temporary.write_text("<svg></svg>\n")
    check_seal(path, of)
    check_seal(path, {"row": "a--b"})
    check_seal(path)
    assert is_whole(path, of) and not is_whole(path, of | {"row": "a"})
    assert name == "a.png" or path.read_text().count("--") == 2, "a comment of XML ends at two dashes"
    with pytest.raises(Damaged, match="is of row a--b, not c"):
        check_seal(path, {"row": "c"})
    with pytest.raises(Damaged, match="it does not say of which nfe it is"):
        check_seal(path, {"nfe": "20"})
    with sealed(path) as temporary:  # as older versions left it
        temporary.write_text("<svg></svg>\n")
    with pytest.raises(Damaged, match="of an old version: it does not say of which suite it is"):
        check_seal(path, of)
    write_record(tmp_path / "provenance.json", {"files": {name: sha256(path)}})
    check_seal(path, of)  # what a published folder lists under its path


def test_a_published_folders_list_counts(tmp_path):
    """Files need no digest of their own there; one that is not listed does."""
    folder = tmp_path / "published"
    write_json(folder / "scores" / "a.json", VALUE)
    write_json(folder / "scores" / "b.json", VALUE)
    write_record(folder / "provenance.json", {"files": {"scores/a.json": sha256(folder / "scores" / "a.json")}})
    assert read_record(folder / "scores" / "a.json", FIX) == VALUE
    with pytest.raises(Damaged, match="carries no digest"):
        read_record(folder / "scores" / "b.json", FIX)
    write_json(folder / "scores" / "a.json", VALUE | {"row": "edited"})
    with pytest.raises(Damaged, match=r"not the file that .*provenance\.json lists"):
        read_record(folder / "scores" / "a.json", FIX)
    vouch(folder / "scores" / "a.json")
    assert read_record(folder / "scores" / "a.json", FIX)["row"] == "edited"
    (folder / "provenance.json").write_text('{"files": {}}')
    with pytest.raises(Damaged, match="carries no digest"):
        read_record(folder / "scores" / "a.json", FIX)


def test_an_edit_that_was_meant_is_vouched_for(written):
    path = written / "a.json"
    path.write_text(path.read_text().replace("1.5", "2.5"))
    with pytest.raises(Damaged, match="does not fit the digest"):
        read_record(path, FIX)
    vouch(path)
    assert read_record(path, FIX) == VALUE | {"values": [2.5, None]}


@pytest.mark.parametrize("write", [lambda path: write_json(path, 1), lambda path: write_record(path, VALUE)])
def test_a_folder_that_is_a_file_is_one_sentence(tmp_path, write):
    (tmp_path / "results").touch()
    with pytest.raises(UserError, match=r"results/x\.json: cannot be written \((Not a directory|File exists)\)"):
        write(tmp_path / "results" / "x.json")
    with pytest.raises(UserError, match=r"x\.json: cannot be read \(Not a directory\)"):
        read_json(tmp_path / "results" / "x.json")
