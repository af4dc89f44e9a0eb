"""Files that are either whole or absent and that vouch for their bytes: atomic writes, checked reads, digests.

A writer killed at any moment leaves at most a `.{name}.{pid}.tmp` beside the target, which nothing reads. The process
id is in the name because a killed workflow's orphan may still be writing when its successor starts.

A *sealed* file carries a digest: the SHA-256 of its own bytes, with zeros in the digest's place. JSON has it under its
last key, safetensors in the header's metadata, pictures and torch's own archives behind their end. Where a published
folder's `provenance.json` lists the digest of a file, that one counts. So readers notice what a disk, a copy or an
editor changed.

A file that is whole may still be another one, in the wrong place. So what a file is *of*, a suite, a row, is under its
digest, too: JSON and tensors have fields for it, a picture says it beside the digest. Readers say what they expect. A
published folder's list goes by path, which says the same.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tcbench.errors import UserError

if TYPE_CHECKING:  # readers of JSON (the report) must not pay for importing torch
    from torch import Tensor


BufferedIO = BufferedReader | BufferedRandom

_METADATA = "tcbench"
_DIGEST = "digest"
_ZEROS = "0" * 64
_PLACE = re.compile(rb"digest\W{1,8}([0-9a-f]{64})")
_WINDOW = 256  # bytes; the digest is within so many of the file's start or end
_BEHIND = {".png": "{}\n", ".pt": "{}\n", ".webp": "{}\n", ".svg": "<!-- {} -->\n"}
_OF = re.compile(rb"of: (\{.*\})\s+digest: [0-9a-f]{64}")
_DASHES = r"-\u002d"
_OF_WINDOW = 4096  # bytes before a picture's end, within which it says what it is of
PROVENANCE = "provenance.json"
"""The file of a published folder that lists the digests of the others under `files`."""


class Damaged(UserError):
    """A file that is not what was written: cut off, changed, or without a digest where one is due."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or fix permissions, then run again"
        ) from error
    finally:
        with suppress(OSError):  # what cannot be written cannot be removed either, and the error above says why
            temporary.unlink(missing_ok=True)


@contextmanager
def sealed(path: Path, of: Mapping[str, str] | None = None) -> Iterator[Path]:
    """As `atomic`; the file then carries its digest, where the writer left zeros for it, or behind a picture's end.

    Args:
        of: what a picture is of; it says so beside its digest (`check_seal`).

    Raises:
        UserError: as `atomic`.
    """
    with atomic(path) as temporary:
        yield temporary
        with open(temporary, "r+b") as handle:
            if path.suffix in _BEHIND:
                # a comment of XML ends at two dashes
                named = f"of: {json.dumps(of).replace('--', _DASHES)} " if of else ""
                handle.seek(0, os.SEEK_END)
                handle.write(_BEHIND[path.suffix].format(f"{named}{_DIGEST}: {_ZEROS}").encode())
            place = _digest_place(handle)
            assert place is not None, f"{path} leaves no place for its digest"
            digest = _own_digest(handle, place)
            handle.seek(place)
            handle.write(digest.encode())


def _digest_place(handle: BufferedIO) -> int | None:
    """Where in a file the digest of its bytes stands; None if it carries none."""
    for start in (0, max(0, handle.seek(0, os.SEEK_END) - _WINDOW)):
        handle.seek(start)
        if found := _PLACE.search(handle.read(_WINDOW)):
            return start + found.start(1)
    return None


def _own_digest(handle: BufferedIO, place: int) -> str:
    """The digest that a file should carry in this place."""
    handle.seek(0)
    content = hashlib.sha256(handle.read(place) + _ZEROS.encode())
    handle.seek(place + len(_ZEROS))
    return hashlib.file_digest(handle, lambda: content).hexdigest()


def _digest_at(handle: BufferedIO, place: int) -> str:
    handle.seek(place)
    return handle.read(len(_ZEROS)).decode()


def check_seal(path: Path, of: Mapping[str, str] | None = None) -> None:
    """Compare a file with the digest that a published folder lists for it, or else with the one that it carries.

    Args:
        of: what a picture should be of, as far as it is known; where a published folder lists it, its place says that.

    Raises:
        Damaged: they differ, or there is none; or the picture is of something else.
        UserError: the file is missing or cannot be read.
    """
    listed, holder = _listed(path)
    with _opened(path) as handle:
        place = _digest_place(handle)
        if listed is not None:
            handle.seek(0)
            if hashlib.file_digest(handle, "sha256").hexdigest() != listed:
                raise Damaged(f"{path}: truncated or changed: it is not the file that {holder} lists")
        elif place is None:
            raise Damaged(f"{path}: truncated, changed or of an old version: it carries no digest of its content")
        elif _digest_at(handle, place) != _own_digest(handle, place):
            raise Damaged(f"{path}: truncated or changed: it does not fit the digest that it carries")
        elif of is not None:
            _check_of(handle, path, of)


def _check_of(handle: BufferedIO, path: Path, of: Mapping[str, str]) -> None:
    handle.seek(max(0, handle.seek(0, os.SEEK_END) - _OF_WINDOW))
    found = _OF.search(handle.read())
    said = json.loads(found[1]) if found else {}
    for what, expected in of.items():
        if what not in said:
            raise Damaged(f"{path}: of an old version: it does not say of which {what} it is")
        if said[what] != expected:
            raise Damaged(f"{path}: is of {what} {said[what]}, not {expected}")


def is_whole(path: Path, of: Mapping[str, str] | None = None) -> bool:
    """Whether a sealed file is there, undamaged and, of pictures, what it should be; where not, it has to be made."""
    try:
        check_seal(path, of)
    except UserError:
        return False
    return True


def _listed(path: Path) -> tuple[str | None, Path]:
    """(the digest that the published folder around a file lists for it, the list); no digest where there is none."""
    for folder in path.parents:
        holder = folder / PROVENANCE
        if holder != path and holder.is_file():
            status = holder.stat()
            files = _files_of(holder, status.st_mtime_ns, status.st_size)
            return files.get(path.relative_to(folder).as_posix()), holder
    return None, path


@lru_cache
def _files_of(holder: Path, *version: int) -> dict[str, str]:
    """What a provenance.json lists, nothing if it is damaged or another program's; `version` tells its states apart."""
    try:
        files = read_record(holder, "restore it").get("files")
    except UserError:
        return {}
    return files if isinstance(files, dict) else {}


@contextmanager
def _opened(path: Path, fix: str = "run the step that makes it first") -> Iterator[BufferedReader]:
    """A file to read; every refusal of the system is a line that names it."""
    try:
        with open(path, "rb") as handle:
            yield handle
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; {fix}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file that can be") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content atomically."""
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically, what holds no list or object on one line; NaN and infinity are refused."""
    write_text(path, _json(value) + "\n")


def _json(value: Any, indent: str = "\n") -> str:
    """A line for every innermost list or object: a tenth of the lines of `json.dumps(indent=1)`, still with short
    differences between versions."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(item, dict | list | tuple) for item in items):
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    inner = indent + " "
    if isinstance(value, dict):
        # json.dumps makes a key a string as it would inside an object
        lines = [f"{json.dumps({key: 0})[1:-2]}{_json(item, inner)}" for key, item in value.items()]
        return "{" + inner + f",{inner}".join(lines) + indent + "}"
    return "[" + inner + f",{inner}".join(_json(item, inner) for item in value) + indent + "]"


def shortened(value: Any, digits: int) -> Any:
    """A number, or nested lists of them, to so many significant digits, which is what a picture needs of it."""
    if isinstance(value, list):
        return [shortened(item, digits) for item in value]
    return float(f"{value:.{digits}g}")


def read_json(path: Path, fix: str | None = None) -> Any:
    """Read JSON.

    Args:
        fix: what makes the file, after "...; ".

    Raises:
        UserError: the file is missing or malformed, NaN and infinity included.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        with _opened(path, fix or "run the step that makes it first") as handle:
            return json.loads(handle.read().decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        fix = fix or "delete it and run the step that makes it"
        raise UserError(f"{path}: not valid JSON ({error}); {fix}") from error


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as sealed JSON, laid out as `write_json` does."""
    with sealed(path) as temporary:
        temporary.write_text(_json({**value, _DIGEST: _ZEROS}) + "\n", encoding="utf-8")


def read_record(path: Path, fix: str) -> dict[str, Any]:
    """Read what `write_record` wrote, or JSON that a published folder lists.

    Args:
        fix: what makes the file, after "...; ".

    Raises:
        UserError: it is missing, damaged, edited, or no mapping.
    """
    try:
        value = read_json(path, fix)
        check_seal(path)
    except Damaged as error:
        raise Damaged(f"{error}; {fix}, or keep an edit that was meant by `tcbench vouch {path}`") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a mapping of fields; {fix}")
    value.pop(_DIGEST, None)
    return value


def vouch(path: Path) -> None:
    """Let a record that was edited on purpose count again: its digest and a published folder's list are made anew.

    Raises:
        UserError: it is missing, not JSON, or not a mapping; or the list is damaged itself.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a mapping of fields; give a record of results")
    listed, holder = _listed(path)
    if listed is None or _DIGEST in value:
        write_record(path, {key: field for key, field in value.items() if key != _DIGEST})
    if listed is not None:
        record = read_record(holder, "restore it")
        record["files"][path.relative_to(holder.parent).as_posix()] = sha256(path)
        write_record(holder, record)


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a sealed safetensors file; equal contents give equal bytes.

    The metadata goes under one key, as JSON, because safetensors writes several keys in random order.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with sealed(path) as temporary:
        try:
            own = {_DIGEST: _ZEROS} | dict(sorted((metadata or {}).items()))  # first, where readers look for it
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, {_METADATA: json.dumps(own)})
        except SafetensorError as error:  # safetensors reports a full disk in its own exception type
            raise UserError(
                f"{path}: cannot be written ({error}); free space or fix permissions, then run again"
            ) from error


def write_shards(folder: Path, tensors: "dict[str, Tensor]", max_bytes: int) -> None:
    """Write tensors as files of at most `max_bytes` each and their index, as diffusers lays a large model out."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_bytes)
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key] for key in keys})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def read_tensors(
    path: Path, framework: Literal["pt", "np"] = "pt", fix: str = "delete it and make it again"
) -> "tuple[dict[str, Any], dict[str, str]]":
    """Read a safetensors file: (tensors on the CPU, metadata that `write_tensors` was given).

    A file that carries a digest is compared with it; one of somebody else's need not carry any.

    Args:
        framework: whether the tensors are torch's or numpy's arrays.
        fix: what makes the file again, after "...; ".

    Raises:
        Damaged: the file is truncated, changed or not safetensors.
        UserError: the file is missing or cannot be read.
    """
    try:
        if seal(path):
            check_seal(path)
    except Damaged as error:
        raise Damaged(f"{error}; {fix}") from error
    return load_tensors(path, framework, fix)


def load_tensors(
    path: Path, framework: Literal["pt", "np"] = "pt", fix: str = "delete it and make it again"
) -> "tuple[dict[str, Any], dict[str, str]]":
    """As `read_tensors`, of a file that was just compared with its digest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework) as handle:
            metadata = json.loads((handle.metadata() or {}).get(_METADATA, "{}"))
            metadata.pop(_DIGEST, None)
            return {name: handle.get_tensor(name) for name in handle.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise Damaged(f"{path}: truncated or not a safetensors file ({error}); {fix}") from error


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, with no word on whether its content is what was written.

    Attributes:
        values: of a small tensor, as nested lists.
    """

    metadata: dict[str, str]
    shapes: dict[str, list[int]]
    values: dict[str, Any]


def peek(path: Path, *tensors: str, values: Sequence[str] = ()) -> Header | None:
    """The metadata that `write_tensors` was given, the shapes of some tensors and the values of small ones; None where
    they are not there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as handle:
            shapes = {name: handle.get_slice(name).get_shape() for name in tensors}
            small = {name: handle.get_tensor(name).tolist() for name in values}
            return Header(json.loads((handle.metadata() or {}).get(_METADATA, "{}")), shapes, small)
    except (SafetensorError, OSError, ValueError):
        return None


def kept_tensors(path: Path) -> "tuple[dict[str, Any], dict[str, str]] | None":
    """What `write_tensors` wrote; None where the file is absent or damaged, so that it has to be made (again)."""
    return load_tensors(path) if is_whole(path) else None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone that `write_tensors` was given, of a file that was just compared with its digest."""
    from safetensors import safe_open

    with safe_open(path, "np") as handle:
        metadata: dict[str, str] = json.loads(handle.metadata()[_METADATA])
    del metadata[_DIGEST]
    return metadata


def seal(path: Path) -> str:
    """The digest that a file carries, uncompared; empty if it carries none."""
    with _opened(path) as handle:
        place = _digest_place(handle)
        return "" if place is None else _digest_at(handle, place)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """16 hex characters that identify a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
