"""Forecasts in words and as JSON."""

from typing import Any

from tcbench.forecast.estimate import Estimate
from tcbench.forecast.rates import Rate, known_cards


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(amount: float) -> str:
    """Bytes, in the unit that reads best."""
    return (
        f"{amount / 1e9:.0f} GB"
        if amount >= 1e10
        else f"{amount / 1e9:.1f} GB"
        if amount >= 1e8
        else f"{amount / 1e6:.0f} MB"
    )


def slots(told: Estimate) -> str:
    """What it runs on, e.g. "8 x H100 SXM"."""
    name = known_cards()[told.card].name
    return f"{told.count} {name}{'s' if told.count > 1 else ''}" if told.card == "cpu" else f"{told.count} x {name}"


def summary(told: Estimate) -> str:
    """Three lines, which the workflow says before its first job."""
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in told.by_stage().items())
    of = "cores" if told.card == "cpu" else "GPUs"
    peak = f", at most {size(told.memory.memory)} on a card" if told.memory.memory else ""
    return (
        f"forecast of {told.suite}: {duration(told.wall)} on {slots(told)}, {duration(told.seconds)} of {of}; "
        f"disk {size(told.disk)}{peak}\n"
        f"  {stages}\n"
        f"  {told.measured_share():.0%} of it at measured rates, the rest derived; `tcbench forecast` says from what"
    )


def whole(told: Estimate) -> str:
    """Every stage, what it is made of, and every rate."""
    unit = "core hours" if told.card == "cpu" else "GPU hours"
    lines = [f"forecast of {told.suite} on {slots(told)}", f"  {'':34}{unit:>10}"]
    for stage, seconds in told.by_stage().items():
        lines.append(f"  {stage:34}{seconds / 3600:10.2f}")
        parts = {of: taken for of, taken in told.parts_of(stage).items() if taken >= 1}
        lines += [f"    {of:32}{taken / 3600:10.2f}" for of, taken in parts.items() if len(parts) > 1]
    lines += [
        f"  {'all':34}{told.seconds / 3600:10.2f}",
        f"  on the clock: {duration(told.wall)}; disk: {size(told.disk)}",
    ]
    if told.memory.memory:
        lines.append(f"  peak on a card: {size(told.memory.memory)} ({told.memory.stage} {told.memory.of})")
    lines.append(f"rates; {told.measured_share():.0%} of the hours are at measured ones:")
    lines += [f"  {_rate(rate)}" for rate in told.used()]
    return "\n".join(lines)


def _rate(rate: Rate) -> str:
    of = " ".join(filter(None, (rate.model, rate.dtype, rate.method)))
    return f"{rate.kind:9}{rate.what}{f' of {of}' if of else ''}: {rate.value:.4g} {rate.unit} ({rate.source})"


def as_json(told: Estimate) -> dict[str, Any]:
    """All of it, in seconds and bytes."""
    return {
        "suite": told.suite,
        "card": told.card,
        "count": told.count,
        "seconds": told.seconds,
        "wall_seconds": told.wall,
        "disk_bytes": told.disk,
        "memory_bytes": told.memory.memory,
        "measured_share": told.measured_share(),
        "stages": told.by_stage(),
        "parts": {stage: told.parts_of(stage) for stage in told.by_stage()},
        "jobs": [
            {"stage": job.stage, "of": job.of, "seconds": job.seconds, "disk_bytes": job.disk,
             "memory_bytes": job.memory, "outputs": job.outputs, "needs": job.needs}
            for job in told.jobs
        ],
        "rates": [rate.model_dump(exclude_defaults=True) for rate in told.used()],
    }  # fmt: skip
