"""The tokens that a fused block recomputes, with their number on the device."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device: a CUDA GPU that Triton compiles for, and Triton installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that the host knows where kernels read them, int32 [n]; kept: a captured graph cannot copy them."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Chosen:
    """The first `used` columns of `index_RK` are the tokens recomputed in each row.

    Attributes:
        index_RK: int64, distinct within a row, on the model's device.
        used: int32 [1] on the same device, at most K; a kernel reads it there, so that no count has to come back.
        tokens: N, of which the index chooses.
        expected: how many are likely used, by which kernels choose their tiles; the result does not depend on it.
    """

    index_RK: Tensor
    used: Tensor
    tokens: int
    expected: int

    @property
    def capacity(self) -> int:
        """M: rows of a compact buffer that holds any number of chosen tokens."""
        return self.index_RK.numel()

    def flat(self) -> Tensor:
        """Flat positions r * N + n of the chosen tokens in compact order, int64 [R * used]; waits for the device."""
        index = self.index_RK[:, : int(self.used)]
        return (index + self.tokens * torch.arange(len(index), device=index.device)[:, None]).flatten()

    def rows(self) -> Tensor:
        """The row of each chosen token in compact order, int64 [R * used]; waits for the device."""
        return self.flat() // self.tokens
