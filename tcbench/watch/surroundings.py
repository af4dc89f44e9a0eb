"""What of the process a method may not change, because what runs later depends on it. Imports no torch by itself."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import string_at
from functools import cache, partial
from typing import Any, NamedTuple, cast

from tcbench.errors import UserError

_MT19937_BYTES = 4 * 624 + 4
"""What numpy's generator keeps in memory: its words, and the position among them."""


class _Setting(NamedTuple):
    """How a setting is read and set again, and its value in a fresh process where that is known."""

    read: Callable[[], Any]
    restore: Callable[[Any], Any]
    fresh: Any = None


@contextmanager
def kept_surroundings(author: str = "") -> Iterator[None]:
    """Set again what is changed inside, and refuse it.

    Args:
        author: whose code runs inside, if the message shall name it.

    Raises:
        UserError: something was changed; names it.
    """
    before = {name: setting.read() for name, setting in _settings().items()}
    changed: list[str] = []
    try:
        yield
    finally:
        for name, setting in _settings().items():
            value = before.get(name, setting.fresh)  # torch may have been imported inside
            if value is not None and setting.read() != value:
                setting.restore(value)
                changed.append(name)
    if changed:
        what = f"changes {' and '.join(changed)}, on which what runs later depends; leave it as it is"
        raise UserError(": ".join(filter(None, (author, what))))


def _settings() -> dict[str, _Setting]:
    settings = {
        "the working directory": _Setting(os.getcwd, os.chdir),
        "Python's random generator": _Setting(random.getstate, random.setstate),
    }
    for module, of_module in (("numpy", _of_numpy), ("torch", _of_torch)):
        if module in sys.modules:
            settings |= of_module()
    return settings


@cache
def _of_numpy() -> dict[str, _Setting]:
    import numpy as np
    from numpy.random.mtrand import get_bit_generator

    memory: bytes | None = None
    known: tuple[Any, ...] = ()

    def state() -> tuple[Any, ...]:
        """As numpy tells it, which takes 0.1 ms: so asked again only where it may have changed.

        It did not if the generator's memory did not, unless a normal number is left, of the two that are drawn at once.
        """
        nonlocal memory, known
        now = string_at(get_bit_generator().ctypes.state_address, _MT19937_BYTES)
        if now != memory:
            name, keys, position, normal_left, normal = cast("tuple[Any, ...]", np.random.get_state())
            known = (name, keys.tobytes(), position, normal_left, normal)
            memory = None if normal_left else now
        return known

    def restore(old: tuple[Any, ...]) -> None:
        np.random.set_state((old[0], np.frombuffer(old[1], dtype=np.uint32), *old[2:]))

    return {"numpy's random generator": _Setting(state, restore)}


@cache
def _of_torch() -> dict[str, _Setting]:
    import torch

    cudnn = torch.backends.cudnn
    flags = {
        f"torch.backends.cudnn.{flag}": _Setting(partial(getattr, cudnn, flag), partial(setattr, cudnn, flag))
        for flag in ("enabled", "benchmark", "deterministic", "allow_tf32")
    }
    return flags | {
        "torch's number of threads": _Setting(torch.get_num_threads, torch.set_num_threads),
        "torch's default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        "torch's default device": _Setting(
            torch.get_default_device,
            lambda old: torch.set_default_device(None if old.type == "cpu" else old),
            torch.device("cpu"),
        ),
        "torch's grad mode": _Setting(torch.is_grad_enabled, torch.set_grad_enabled, True),
        "torch's inference mode": _Setting(torch.is_inference_mode_enabled, lambda _: None, False),
        "torch's deterministic algorithms": _Setting(
            torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0
        ),
        "torch's precision of products": _Setting(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
        ),
        "torch's random generator": _Setting(
            lambda: torch.get_rng_state().numpy().tobytes(), lambda old: torch.set_rng_state(_tensor_of(old))
        ),
        "torch's random generator of the GPU": _Setting(
            lambda: torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else None,
            lambda old: torch.cuda.set_rng_state(_tensor_of(old)),
        ),
    }


def _tensor_of(state: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
