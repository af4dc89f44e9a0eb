"""A suite's config with few rows, samples and iterations: every batch, network and stage as large as the suite's."""

from collections.abc import Mapping, Sequence
from typing import Any

from tcbench.config.preview import with_needed
from tcbench.config.suite import Suite
from tcbench.rehearse.sizes import SizeName

ITERATIONS, BATCHES, LEARNING_RATE = 12, 4, 1e-4
"""Of everything that is trained; of samples; of a predictor, so that what few iterations learn shows."""


def reduced(
    suite: Suite,
    settings: Mapping[str, Any],
    size: SizeName,
    batches: int = BATCHES,
    asked: Sequence[str] = (),
    most_steps: int | None = None,
) -> dict[str, Any]:
    """The config of a rehearsal.

    Args:
        suite: as `settings` says it.
        batches: of samples, and no more samples to calibrate with.
        asked: rows, which bring what they refer to; a row of every method if none is named.
        most_steps: of a row, whose NFE is at most that.

    Raises:
        UserError: the suite has no such row.
    """
    rows, tiny = _rows(suite, asked), size == "tiny"
    batch = 1 if tiny else suite.samples.batch_size
    short = {name: _row(suite, settings["rows"][name], name, tiny, batches * batch, most_steps) for name in rows}
    samples = {
        "count": 8 if tiny else batches * batch,
        "batch_size": batch,
        "shard_batches": 2 if tiny else 1,
        "traced": 2,
    }
    tables = {
        name: table.model_dump(mode="json", exclude_unset=True, exclude={"rows"})
        for name, table in suite.show.tables.items()  # which `settings` need not name
    }
    changed: dict[str, Any] = {
        "samples": {**settings["samples"], **samples},
        "scoring": {**settings["scoring"], "floor_draws": 2},
        "search": {"samples": 2 if tiny else suite.search.samples, "trials": 4},
        "latency": {"batch_size": 1 if tiny else suite.latency.batch_size, "warmup": 1, "repeats": 1},
        "diagnostics": {"pairs": 2, "trajectories": 2},
        "show": {"figure": {"nfe": next(iter(short.values()))["nfe"], "columns": 2}, "tables": tables},
        "trainings": 1,
        "jobs": "row",
        "ablations": {},
        "rivals": None,
        "rows": short,
    }
    if tiny:
        changed["model"] = {**settings["model"], "device": "cpu"}
    return {**settings, **changed}


def _rows(suite: Suite, asked: Sequence[str]) -> Sequence[str]:
    """Those asked for, or a row of every method at as few steps as it has any; with what these refer to, in order."""
    if asked:
        return with_needed(suite, asked)
    chosen: dict[str, str] = {}
    for name, row in sorted(suite.rows.items(), key=lambda item: item[1].nfe):
        chosen.setdefault(row.method, name)
    needed = {*chosen.values()}
    for name in chosen.values():
        needed |= {entry.name for entry in (suite[name].reference, suite[name].trained_as) if entry}
    needed |= {suite[name].reference.name for name in needed}
    return [name for name in suite.rows if name in needed]


def _row(
    suite: Suite, row: Mapping[str, Any], name: str, tiny: bool, samples: int, most_steps: int | None
) -> dict[str, Any]:
    """A row with options that make its training short, and no references to rows that are not there."""
    entry = suite[name]
    kept = {key: value for key, value in row.items() if key not in ("target", "full_steps_of", "searched")}
    kept["nfe"] = min(entry.nfe, most_steps or entry.nfe)
    fields = type(entry.method).model_fields
    short: dict[str, Any] = {field: ITERATIONS for field in fields if field.endswith("iterations")}
    for field in ("calibration_samples", "alpha_samples"):
        if field in fields:
            short[field] = min(samples, getattr(entry.method, field))
    short |= {"patience": None} if "patience" in fields else {}
    short |= {"predictor_learning_rate": LEARNING_RATE} if "predictor_learning_rate" in fields else {}
    if tiny:  # four blocks, and batches that a CPU is done with at once
        small = {"refiner_blocks": 1, "refiner_rank": 2, "training_batch_size": 2, "batch_size": 2, "alpha_samples": 2}
        short |= {field: value for field, value in small.items() if field in fields}
        short |= {field: 2 for field in fields if field.endswith("iterations")}
        if "beta" in fields and getattr(entry.method, "num_full_steps", 0) is None:  # published for the large model
            short |= {"num_full_steps": kept["nfe"] // 2, "beta": -2000}
    return {**kept, "options": {**row.get("options", {}), **short}} if short else kept
