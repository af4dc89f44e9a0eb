"""Randomness keyed by what it is for, never by when it is drawn.

Sample i of a run is the same image whatever the batch size, the shard or the number of GPUs, because everything random
about it is a function of (seed, i) and, inside a run, of (step, block, token).
"""

import numpy as np
import torch
from torch import Tensor

_GAMMA, _MULTIPLY_1, _MULTIPLY_2 = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # as signed 64 bit


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64; >> is arithmetic, so the sign is masked off."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MULTIPLY_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MULTIPLY_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _key(seed: int, index_n: Tensor, *purpose: int | Tensor) -> Tensor:
    """One well-mixed int64 per sample for this purpose, or for each of several: numbers broadcast with the indices."""
    key = _mix(index_n + _mix(torch.full_like(index_n, seed) + _GAMMA))
    for number in purpose:
        key = _mix(key + (torch.as_tensor(number) + 1) * _GAMMA)  # in int64, which wraps around
    return key


def gaussian(seed: int, index_n: Tensor, shape: tuple[int, ...], *purpose: int) -> Tensor:
    """Standard normal numbers [n, *shape], drawn on the CPU so that they are the same on every device."""
    keys = _key(seed, index_n.cpu(), *purpose).tolist()
    # Once per sample and run. Not torch's CPU generator, which looks at 32 bits of its seed only: two of 50 000 samples
    # would share their noise.
    streams = [np.random.Generator(np.random.Philox(key=key % (1 << 64))) for key in keys]
    return torch.from_numpy(np.stack([stream.standard_normal(shape, np.float32) for stream in streams]))


def uniform(seed: int, index_n: Tensor, count: int, *purpose: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), [n, count], computed without a loop or a host synchronisation on index_n's device.

    With indices [n, 1] and a purpose [m], [n, m, count]: the numbers of m purposes at once.
    """
    counter = torch.arange(1, count + 1, device=index_n.device) * _GAMMA
    bits = _mix(_key(seed, index_n, *purpose).unsqueeze(-1) + counter)
    return ((bits >> 40) & 0xFFFFFF).float() / (1 << 24)
