"""Files that are either whole or absent: atomic writes, checked reads, digests.

A writer killed at any moment leaves at most a `.{name}.{pid}.tmp` beside the target, which nothing reads. The process
id is in the name because a killed workflow's orphan may still be writing when its successor starts.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcbench.errors import UserError

if TYPE_CHECKING:  # readers of JSON (the report) must not pay for importing torch
    from torch import Tensor


_METADATA = "tcbench"


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
            f"{path}: cannot be written ({error.strerror}); free space or fix permissions, then run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def read_json(path: Path) -> Any:
    """Read JSON; raises UserError naming the file if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; run the step that makes it first") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run the step that makes it") from error


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; equal contents give equal bytes.

    The metadata goes under one key, as JSON, because safetensors writes several keys in random order.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        try:
            header = {_METADATA: json.dumps(metadata, sort_keys=True)} if metadata else None
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, header)
        except SafetensorError as error:  # safetensors reports a full disk in its own exception type
            raise UserError(f"{path}: cannot be written ({error}); free space, then run again") from error


def write_shards(folder: Path, tensors: "dict[str, Tensor]", max_bytes: int) -> None:
    """Write tensors as files of at most `max_bytes` each and their index, as diffusers lays a large model out."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_bytes)
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key] for key in keys})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def read_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Read a safetensors file: (tensors on the CPU, metadata that `write_tensors` was given).

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get(_METADATA, "{}"))
            return {name: handle.get_tensor(name) for name in handle.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; run the step that makes it first") from error
    except SafetensorError as error:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({error}); delete it and make it again"
        ) from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """16 hex characters that identify a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
