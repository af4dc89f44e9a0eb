"""A row's samples on disk: row.json and the shards that it lists. Imports no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tcbench.errors import UserError
from tcbench.record.files import digest, is_whole, load_tensors, seal
from tcbench.record.records import MANIFEST, Manifest

_TENSORS = {"image", "label", "index", "x0", "xt"}


def read_manifest(samples: Path, settings: Mapping[str, Any] | None = None) -> Manifest:
    """The row.json of a folder of samples.

    Args:
        settings: what they should have been sampled with (`Entry.sample_settings`), so that those of a sibling, of
            another suite or of a config that has changed since are not taken for the row's.

    Raises:
        UserError: it is missing, damaged, another row's, or of other settings.
    """
    path = samples / "row.json"
    manifest = MANIFEST.read(path, row=samples.name)
    if settings is not None and digest(manifest["settings"]) != digest(settings):
        fix = f"run `tcbench sample` for {samples.name} again"
        raise UserError(f"{path}: was sampled with other settings than the config has; {fix}")
    return manifest


def samples_digest(manifest: Manifest) -> str:
    """Identifies a row's samples, by what their shards carry."""
    return digest(manifest["shards"])


def shard_files(samples: Path) -> Iterator[Path]:
    """The files of a row's samples in order, each compared with its digest.

    Raises:
        UserError: a shard is missing, damaged or not the one that row.json lists; says how it is made again.
    """
    manifest = read_manifest(samples)
    for name, expected in manifest["shards"].items():
        path = samples / manifest.get("shards_in", "") / name
        if not is_whole(path) or seal(path) != expected:
            raise UserError(
                f"{path}: is not the shard that row.json lists; run `tcbench sample` for {samples.name} again"
            )
        yield path


def read_shards(samples: Path, framework: Literal["pt", "np"] = "pt") -> Iterator[dict[str, Any]]:
    """A row's tensors, or numpy's arrays, shard by shard.

    Raises:
        UserError: as `shard_files`; or a shard holds other tensors than samples have or other samples than follow those
            before it, or they are not as many as in row.json.
    """
    count = 0
    for path in shard_files(samples):
        tensors = load_tensors(path, framework)[0]
        if wrong := misshapen(tensors):
            raise UserError(f"{path}: {wrong}; run `tcbench sample` for {samples.name} again")
        if tensors["index"].tolist() != list(range(count, count + len(tensors["index"]))):
            raise UserError(
                f"{path}: its samples are not those from {count} on; run `tcbench sample` for {samples.name} again"
            )
        count += len(tensors["index"])
        yield tensors
    if count != (said := read_manifest(samples)["samples"]):
        fix = f"run `tcbench sample` for {samples.name} again"
        raise UserError(f"{samples}: the shards hold {count} samples, row.json says {said}; {fix}")


def misshapen(tensors: Mapping[str, Any]) -> str:
    """How a shard's tensors differ from what samples have: image [n, ...], label [n, ...], index [n], and of the first
    k samples at S steps x0 and xt [S, k, ...]; of decoded videos mp4 and mp4_bytes [n]. Empty if they do not."""
    if lacking := _TENSORS - tensors.keys():
        return f"holds no tensor {min(lacking)!r}"
    kinds = {name: str(tensors[name].dtype).removeprefix("torch.") for name in _TENSORS}
    odd = [name for name in ("index", "label") if kinds[name] != "int64"]
    odd += [name for name in ("image", "x0", "xt") if kinds[name] == "float64" or kinds[name].startswith("int")]
    if odd:
        return f"{odd[0]} holds {kinds[odd[0]]}"
    shapes = {name: tuple(tensors[name].shape) for name in _TENSORS}
    n = shapes["index"][:1]
    if len(shapes["index"]) != 1 or any(shapes[name][:1] != n for name in ("image", "label")):
        return f"index, label and image do not fit: {shapes['index']}, {shapes['label']}, {shapes['image']}"
    if shapes["x0"] != shapes["xt"] or len(shapes["x0"]) < 2 or shapes["x0"][1] > n[0]:
        return f"x0 and xt do not fit {n[0]} samples: {shapes['x0']}, {shapes['xt']}"
    if "mp4" in tensors:
        sizes = tensors.get("mp4_bytes")
        if sizes is None or tuple(sizes.shape) != n or int(sizes.sum()) != len(tensors["mp4"]):
            return "mp4 and mp4_bytes do not fit"
    return ""
