"""How long a piece of work has taken over all the processes that did a part of it: one that is killed and started again
counts both. The seconds are for provenance and enter no fingerprint."""

import time
from pathlib import Path

from tcbench.record.files import is_whole, read_record, write_record


def seconds_kept(path: Path, key: str) -> float:
    """What is written down there of the work that `key` identifies; nothing is 0."""
    if is_whole(path) and (kept := read_record(path, "remove it")).get("key") == key:
        return float(kept["wall_s"])
    return 0.0


class Spent:
    """The seconds of a piece of work that leaves finished parts on disk.

    Args:
        path: where they are kept.
        key: identifies the work; those of another one are not counted.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key, self._began = path, key, time.monotonic()
        self.earlier = seconds_kept(path, key)
        """Of processes before this one."""

    def keep(self) -> None:
        """Write them down, after a part is finished.

        Raises:
            UserError: the file cannot be written.
        """
        write_record(self.path, {"key": self._key, "wall_s": self.earlier + time.monotonic() - self._began})

    def remove(self) -> None:
        """The work is over, and its record says how long it took."""
        self.path.unlink(missing_ok=True)
