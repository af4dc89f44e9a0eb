"""Timing on a device: what can be repeated, seconds of a whole run, seconds of every step."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Prepared(Protocol):
    """One batch's run, prepared once and repeated (`tcbench.replay.Replay` and the peers)."""

    nfe: int

    def step(self, index: int) -> None:
        """Enqueue a sampling step; 0 starts again from the noise."""

    def run(self) -> Tensor:
        """All steps; the final latents."""


def run_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that the device takes for `work`: between CUDA events, or by the host's clock."""
    return marked_seconds(device, [work])[0]


def step_seconds(device: torch.device, prepared: Prepared) -> list[float]:
    """Seconds of every step of one run."""
    return marked_seconds(device, [lambda index=index: prepared.step(index) for index in range(prepared.nfe)])  # type: ignore[misc]


def marked_seconds(device: torch.device, works: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each of `works`, done in turn without waiting between them."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for work in works:
            work()
            marks.append(time.perf_counter())
        return np.diff(marks).tolist()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """JSON-able median, extremes and all values, in seconds."""
    return {
        "median_s": float(np.median(seconds)),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "times_s": [round(value, 7) for value in seconds],
    }


def machine(device: torch.device) -> dict[str, str]:
    """What latency depends on besides the code: device, driver-side libraries, threads."""
    if device.type != "cuda":
        return {"device": "cpu", "threads": str(torch.get_num_threads())}
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
