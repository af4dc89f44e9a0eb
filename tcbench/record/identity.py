"""What identifies a file of the user's that numbers depend on: its content, whatever its size.

A text encoder has 19 GB, and every process of a run asks whether it is still the same. To sample blocks of it would be
quick and would miss most changed weights. So the digest is always that of all bytes, and of a large file it is computed
once and remembered beside the results, under what the file system says of the file: device, inode, size, and when its
content (mtime) and it itself (ctime) last changed, in nanoseconds. Writing to a file sets both times, replacing it
gives another inode, and a tool that puts mtime back (`cp -p`, `touch -d`) cannot put ctime back. A file that changed
shortly before it was read is not remembered, because a second change could bear the same times. What is left is a clock
that was turned back to the nanosecond, or a disk that was written to below its file system.
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from os import stat_result
from pathlib import Path

from tcbench.errors import UserError
from tcbench.record.files import digest, is_whole, read_record, sha256, write_record

LARGE = 2**28
"""Bytes from which on a file's digest is remembered; others are read in less than a second."""
SETTLED = 10.0
"""Seconds that a file must have been left alone, for its times to say that it is the same."""
REMEMBERED = Path("results") / "digests"
"""Where, relative to the working directory: a file of a few bytes for each. It may be removed at any time."""


def content_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, of a large file as remembered from when it was last read.

    Raises:
        OSError: it cannot be read.
    """
    before, now = path.stat(), time.time()
    if before.st_size < LARGE:
        return sha256(path)
    key = digest(_state(before))
    memory = REMEMBERED / f"{key}.json"
    if is_whole(memory) and (kept := read_record(memory, "remove it")).get("key") == key:
        return str(kept["sha256"])
    found = sha256(path)
    if _state(path.stat()) == _state(before) and now - max(before.st_mtime, before.st_ctime) > SETTLED:
        with suppress(UserError):  # where nothing can be written, it is read again next time
            write_record(memory, {"key": key, "sha256": found, "bytes": before.st_size})
    return found


def content_digests(paths: Iterable[Path]) -> dict[str, str]:
    """By name, of those files that are there."""
    return {path.name: content_digest(path) for path in paths if path.exists()}


def _state(status: stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
