"""Tensors of which only the shape is known: what a method looks at while it is costed. Imports no torch.

`tcbench.plan`'s functions answer an unseen tensor with unseen ones, so that costing imports no torch. Whatever else a
method does with one is done with a tensor on torch's meta device, and only then is torch imported.
"""

from collections.abc import Callable
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

_OPERATORS = """add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul
    neg abs invert and rand or ror xor rxor lt le gt ge eq ne bool int float index"""


class _Unseen:
    """Stands for a tensor, and makes it when something else than its shape is asked for."""

    def __init__(self, shape: tuple[int, ...], dtype: str, values: Any = None) -> None:
        self.shape, self._dtype, self._values = shape, dtype, values

    @cached_property
    def tensor(self) -> "Tensor":
        import torch

        dtype = getattr(torch, self._dtype)
        if self._values is not None:
            return torch.tensor(self._values, dtype=dtype)
        return torch.empty(self.shape, dtype=dtype, device="meta")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if self._values is not None or not all(type(part) in (int, slice) for part in keys):
            return self.tensor[_made(key)]
        if len(keys) > len(self.shape):
            raise IndexError(f"{len(keys)} indices of {len(self.shape)} dimensions")
        shape = []
        for part, size in zip(keys, self.shape, strict=False):
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                shape.append(max(0, ceil((stop - start) / step)))
            elif not -size <= part < size:
                raise IndexError(f"index {part} of {size}")
        return _Unseen((*shape, *self.shape[len(keys) :]), self._dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python asks of any object
            raise AttributeError(name)
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*_made(args), **_made(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: _Unseen, *others: Any) -> Any:
        return getattr(self.tensor, name)(*_made(others))

    return operate


for _name in _OPERATORS.split():  # Python looks for operators in the class, not with __getattr__
    setattr(_Unseen, f"__{_name}__", _operator(f"__{_name}__"))


def _made(value: Any) -> Any:
    """The value with tensors in place of the unseen ones in it."""
    if isinstance(value, _Unseen):
        return value.tensor
    if isinstance(value, list | tuple):
        return type(value)(map(_made, value))
    return {name: _made(part) for name, part in value.items()} if isinstance(value, dict) else value


def unseen(*shape: int, dtype: str = "float32", values: Any = None) -> "Tensor":
    """A tensor of which only the shape is known.

    Args:
        shape: of the tensor.
        dtype: torch's name of its type.
        values: lists of its numbers, for a tensor that has some and is rarely read.
    """
    return cast("Tensor", _Unseen(shape, dtype, values))


def is_unseen(value: Any) -> bool:
    """Whether `unseen` made it."""
    return isinstance(value, _Unseen)


def on_values(function: "Callable[..., Tensor]", *values: Any, shape: tuple[int, ...]) -> "Tensor":
    """`function(*values)`, or an unseen tensor of that shape if one of the values is unseen.

    For a method's own arithmetic between what it looks at and what `tcbench.plan` chooses. A method may do without: it
    is then costed through torch, slower and to the same number.
    """
    return unseen(*shape) if any(map(is_unseen, values)) else function(*values)


def dtype_of(value: Any) -> str:
    """torch's name of a tensor's type, unseen or not ("int64"), or of what is no tensor the empty string."""
    if isinstance(value, _Unseen):
        return value._dtype
    return str(getattr(value, "dtype", "")).removeprefix("torch.")
