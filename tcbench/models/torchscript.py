"""Tensors of TorchScript archives, as OpenAI publishes CLIP, read without loading the code that such files carry."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcbench.errors import UserError

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of torch.jit.save; False if it is not there, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # what other bytes make of the reader has no bounds; who reads the file says so
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of an archive by their names in its module, on the CPU.

    Raises:
        UserError: the file is damaged, or holds more than modules of dense tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(pickled) as file:
                module = _Reader(file, archive, f"{pickled.removesuffix('.pkl')}/").load()
        if not isinstance(module, _Module):
            raise pickle.UnpicklingError("its content is no module")
        return dict(_tensors(module))
    except Exception as error:  # what a damaged pickle makes of its few building blocks has no bounds
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: a TorchScript archive that cannot be read ({reason}); download it again") from error


class _Module:
    """Stands for every class of the archive: attributes, and none of its code."""


class _Reader(pickle.Unpickler):
    """Knows modules, tensors and lists by name, and refuses every other one."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists with a type
            return lambda values, *_: values
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a module's weights")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            self._storages[key] = torch.frombuffer(bytearray(self._archive.read(self._folder + key)), dtype=dtype)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
