"""How a plan says what is wrong with it."""

from numbers import Integral
from typing import Any

from tcbench.tensors.unseen import dtype_of


class PlanError(ValueError):
    """A plan that says nothing, or what cannot be executed; where a method made it, the line also names the method."""


def wrong(what: str, wanted: str, value: Any) -> PlanError:
    """The error of a field that is not what it must be."""
    return PlanError(f"{what} is {described(value)}; give {wanted}")


def described(value: Any) -> str:
    """A value in a few words: a tensor's type and shape, what is short as it is written, else the type."""
    if shape := getattr(value, "shape", None):
        return f"a {dtype_of(value)} tensor {list(shape)}"
    try:
        text = repr(value)
    except Exception:
        text = ""
    telling = 0 < len(text) <= 60 and "\n" not in text and " at 0x" not in text
    return text if telling else f"of type {type(value).__name__}"


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 0 or more."""
    return isinstance(value, int | Integral) and int(value) >= 0
