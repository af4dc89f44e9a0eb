"""One of several jobs that share a piece of work: each takes a range of its shards and knows nothing of the others."""

from dataclasses import dataclass
from pathlib import Path

from tcbench.record.spent import Spent, seconds_kept


@dataclass(frozen=True)
class Part:
    """`Part(2, 8)` is the second of eight."""

    number: int = 1
    of: int = 1

    def shards(self, total: int) -> range:
        """Its shards by number: a range of them all, as long as the other parts' or one shorter."""
        return range((self.number - 1) * total // self.of, self.number * total // self.of)

    def spent(self, folder: Path, key: str) -> Spent:
        """Its seconds, kept beside those of the other parts."""
        return Spent(self._kept(folder), key)

    def spent_by_others(self, folder: Path, key: str) -> dict[Path, float]:
        """Theirs, of however many parts, by file."""
        return {path: seconds_kept(path, key) for path in folder.glob("spent-*.json") if path != self._kept(folder)}

    def _kept(self, folder: Path) -> Path:
        return folder / f"spent-{self.number}-of-{self.of}.json"


WHOLE = Part()
"""One job does it all."""
