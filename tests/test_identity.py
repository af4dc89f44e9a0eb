"""A file's identity is its content's: of a large one looked at once, and again where the file may have changed."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tcbench.record import identity
from tcbench.record.files import sha256
from tcbench.record.identity import REMEMBERED, content_digest, content_digests


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read to the end; files are large from 100 bytes on."""
    found: list[Path] = []

    def counted(path: Path) -> str:
        found.append(path)
        return sha256(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(identity, "LARGE", 100)
    monkeypatch.setattr(identity, "SETTLED", 0.01)
    monkeypatch.setattr(identity, "sha256", counted)
    return found


def large(name: str = "weights.safetensors") -> Path:
    path = Path(name)
    path.write_bytes(os.urandom(1000))
    time.sleep(0.03)
    return path


def test_a_large_file_is_read_once(read: list[Path]) -> None:
    path = large()
    assert {content_digest(path) for _ in range(3)} == {sha256(path)} and read == [path]
    path.rename("elsewhere")
    assert content_digest(Path("elsewhere")) == sha256(Path("elsewhere")) and len(read) <= 2
    small = Path("small")
    small.write_bytes(b"few")
    assert [content_digest(small), content_digest(small)] == [sha256(small)] * 2 and len(
        list(REMEMBERED.iterdir())
    ) <= 2


def test_a_changed_weight_of_the_same_size_is_noticed(read: list[Path]) -> None:
    """One bit, whatever the file's own times are set to afterwards."""
    path = large()
    before, status = content_digest(path), path.stat()
    with open(path, "r+b") as handle:
        handle.seek(500)
        byte = handle.read(1)[0]
        handle.seek(500)
        handle.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_size == status.st_size
    assert content_digest(path) == sha256(path) != before


def test_another_file_in_its_place_is_noticed(read: list[Path]) -> None:
    path, other = large(), large("other")
    before, status = content_digest(path), path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert content_digest(path) == sha256(path) != before


def test_a_file_that_just_changed_is_not_remembered(read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second change could bear the same times."""
    monkeypatch.setattr(identity, "SETTLED", 3600)
    path = large()
    assert content_digest(path) == content_digest(path) and read == [path] * 2 and not REMEMBERED.exists()


def test_memories_that_are_swapped_are_not_believed(read: list[Path]) -> None:
    paths = large(), large("other")
    found = [content_digest(path) for path in paths]
    one, other = REMEMBERED.iterdir()
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert [content_digest(path) for path in paths] == found


def test_a_damaged_memory_is_not_believed_and_one_that_cannot_be_written_is_done_without(read: list[Path]) -> None:
    path = large()
    found = content_digest(path)
    (memory,) = REMEMBERED.iterdir()
    memory.write_text(memory.read_text().replace(found, "0" * 64))
    assert content_digest(path) == found
    memory.unlink()
    REMEMBERED.rmdir()
    REMEMBERED.touch()
    assert content_digest(path) == found and len(read) == 3


def test_the_folder_of_a_text_encoder_is_in_the_fingerprint(read: list[Path]) -> None:
    from tcbench.stages.ready import text_encoder_digests

    folder = Path("t5")
    folder.mkdir()
    files = {folder / name: os.urandom(200) for name in ("config.json", "spiece.model", "model.safetensors")}
    for path, content in files.items():
        path.write_bytes(content)
    suite = SimpleNamespace(model=SimpleNamespace(text_encoder=folder))
    before = text_encoder_digests(suite)  # type: ignore[arg-type]
    assert before == content_digests(files)
    for path, content in files.items():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert text_encoder_digests(suite) != before  # type: ignore[arg-type]
        path.write_bytes(content)
    suite.model.text_encoder = None
    assert text_encoder_digests(suite) == {}  # type: ignore[arg-type]
