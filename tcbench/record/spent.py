"""How long a piece of work has taken over all the processes that did a part of it: one that is killed and started again
counts both. The seconds are for provenance and enter no fingerprint."""

import time
from pathlib import Path

from tcbench.record.files import is_whole, read_record, write_record


class Spent:
    """The seconds of a piece of work that leaves finished parts on disk.

    Args:
        path: where they are kept.
        key: identifies the work; those of another one are not counted.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._began = path, key, time.monotonic()
        self.earlier = 0.0
        """Of processes before this one."""
        if is_whole(path) and (kept := read_record(path, "remove it")).get("key") == key:
            self.earlier = float(kept["wall_s"])

    def keep(self) -> None:
        """Write them down, after a part is finished.

        Raises:
            UserError: the file cannot be written.
        """
        write_record(self._path, {"key": self._key, "wall_s": self.earlier + time.monotonic() - self._began})

    def remove(self) -> None:
        """The work is over, and its record says how long it took."""
        self._path.unlink(missing_ok=True)
