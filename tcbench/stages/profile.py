"""Where the time of a step goes: kernels of one full step and one P-step, by class."""

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from tcbench.config.speed import Part, SpeedSuite
from tcbench.errors import UserError
from tcbench.method import ModelShape
from tcbench.precision import products
from tcbench.record.provenance import collect
from tcbench.record.records import PROFILE
from tcbench.replay import ExecutionPath, Replay
from tcbench.stages.bench import device_of, is_full, prepare_row, random_adapter
from tcbench.stages.timing import machine

CLASSES = {
    "attention": r"flash|fmha|sdpa|attention|attn",
    "selection": r"(scores|count|share|choice)_kernel|topk|sort|radix|bincount|histogram|allocat|entropy|received",
    "gather, scatter": r"gather|scatter|index|take_tokens",
    "norm, modulate, gate": r"norm|modul|gate|adaln",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|addmm|::b?mm$|matmul|linear|splitk",
    "activation": r"gelu|silu|sigmoid|softmax",
    "copies": r"memcpy|memset|copy|cat",
    "elementwise": r"elementwise|pointwise|triton_poi|::(add|sub|mul|div|lerp)_?$",
}
"""Class of kernel -> what its names look like; the first that matches counts, and the rest is `other`."""


def kernel_class(name: str) -> str:
    """The class of a kernel or operator by its name."""
    return next((label for label, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_parts(
    suite: SpeedSuite, parts: Iterable[Part], rows: Sequence[str], folder: Path, path: ExecutionPath = "fused"
) -> None:
    """Profile the rows of `parts` that are named, or TokenCache's if none is: `folder/profile/<part>.<row>.json` each.

    Raises:
        UserError: no such row in these parts, or a model that cannot be run.
    """
    chosen = [
        (part, row)
        for part in parts
        for row, settings in suite.models[part.model].rows.items()
        if settings.nfe == part.nfe and (row in rows if rows else settings.method == "tokencache")
    ]
    if not chosen:
        raise UserError(f"--profile: no row {' or '.join(rows) or 'of tokencache'} in the selected parts")
    for part, row in tqdm(chosen, desc="profile", unit="row"):
        if needs := suite.models[part.model].needs:
            raise UserError(f"{part.model}: cannot be run; needs {needs}; select others with --model")
        started = time.time()
        with products(part.dtype):
            adapter = random_adapter(suite, part, device_of(suite))
            replay = prepare_row(suite, part, row, adapter, path)
            steps = profile_steps(replay, adapter.shape, adapter.device)
        record = {
            **{key: getattr(part, key) for key in ("model", "dtype", "batch_size", "nfe")},
            "row": row,
            "path": path,
            "machine": machine(adapter.device),
            "steps": steps,
            "provenance": collect(suite.model_dump(mode="json"), [suite.seed], started),
        }
        PROFILE.write(folder / "profile" / f"{part.setting}.{row}.json", record)


def profile_steps(replay: Replay, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    """The last full step and the last other step of a run, whichever exist, profiled."""
    full = is_full(replay, shape)
    replay.run()
    return {
        kind: _profile_step(replay, int(steps[-1]), device)
        for kind, steps in (("full", full.nonzero()[0]), ("partial", (~full).nonzero()[0]))
        if len(steps)
    }


def _profile_step(replay: Replay, index: int, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    for step in range(index):
        replay.step(step)
    if cuda:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        replay.step(index)
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        times = [(event.name, event.time_range.elapsed_us() * 1e-6, 1) for event in kernels]
        if not kernels:
            raise UserError("--profile: the profiler saw no kernel; it needs CUPTI and the right to use it")
        span, busy = covered([(event.time_range.start, event.time_range.end) for event in kernels])
    else:
        averages = profiler.key_averages()
        times = [(average.key, average.self_cpu_time_total * 1e-6, average.count) for average in averages]
        span, busy = None, sum(seconds for _, seconds, _ in times)
    classes = {label: {"time_s": 0.0, "launches": 0} for label in (*CLASSES, "other")}
    names: dict[str, float] = {}
    for name, seconds, launches in times:
        spent = classes[kernel_class(name)]
        spent["time_s"] += seconds
        spent["launches"] += launches
        names[name] = names.get(name, 0.0) + seconds
    largest = sorted(names.items(), key=lambda item: -item[1])[:15]
    return {
        "index": index,
        "span_s": span,
        "busy_s": busy,
        "classes": {label: spent for label, spent in classes.items() if spent["launches"]},
        "largest": [{"name": name[:160], "time_s": seconds} for name, seconds in largest],
    }


def covered(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(from first start to last end, time with at least one interval), in seconds from microseconds."""
    busy, reached = 0.0, min(start for start, _ in intervals)
    first = reached
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return (reached - first) * 1e-6, busy * 1e-6
