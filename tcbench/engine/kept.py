"""The tensors that an object keeps."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tcbench.method import Method, Run


def kept(value: Any) -> Iterator[Tensor]:
    """Those in its attributes, mappings and sequences; not those of the run and the method, which it was given."""
    match value:
        case Tensor():
            yield value
        case Run() | Method() | str():
            return
        case Mapping():
            for entry in value.values():
                yield from kept(entry)
        case list() | tuple():
            for entry in value:
                yield from kept(entry)
        case _ if hasattr(value, "__dict__"):
            yield from kept(vars(value))
