"""A row's samples on disk: row.json and the shards that it lists. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tcbench.errors import UserError
from tcbench.record.files import is_whole, load_tensors, seal
from tcbench.record.records import MANIFEST, Manifest


def read_manifest(samples: Path) -> Manifest:
    """The row.json of a folder of samples.

    Raises:
        UserError: it is missing, damaged, or another row's.
    """
    return MANIFEST.read(samples / "row.json", row=samples.name)


def shard_files(samples: Path) -> Iterator[Path]:
    """The files of a row's samples in order, each compared with its digest.

    Raises:
        UserError: a shard is missing, damaged or not the one that row.json lists; says how it is made again.
    """
    for name, expected in read_manifest(samples)["shards"].items():
        path = samples / name
        if not is_whole(path) or seal(path) != expected:
            raise UserError(
                f"{path}: is not the shard that row.json lists; run `tcbench sample` for {samples.name} again"
            )
        yield path


def read_shards(samples: Path, framework: Literal["pt", "np"] = "pt") -> Iterator[dict[str, Any]]:
    """A row's tensors, or numpy's arrays, shard by shard; raises UserError as `shard_files`."""
    for path in shard_files(samples):
        yield load_tensors(path, framework)[0]
