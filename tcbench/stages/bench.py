"""The speed suite: every row's run repeated and timed beside the uncached one, rows interleaved."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.budget.untrained import random_captions, random_reads, untrained_artefacts
from tcbench.config.speed import Part, SpeedSuite
from tcbench.engine.fastest import fastest
from tcbench.errors import NotRun, UserError
from tcbench.ledger import plan_macs
from tcbench.method import ModelShape
from tcbench.models.adapter import Adapter
from tcbench.models.networks import build_transformer, make_adapter
from tcbench.models.specs import MODELS
from tcbench.plan import Plan
from tcbench.precision import products, weights_dtype
from tcbench.record.files import digest, is_whole
from tcbench.record.provenance import collect
from tcbench.record.records import RUN
from tcbench.record.sources import source_digest
from tcbench.replay import ExecutionPath, Replay
from tcbench.samplers import SamplerSettings
from tcbench.stages.device import leased_device
from tcbench.stages.peers import PEERS, macs_per_sample
from tcbench.stages.timing import Prepared, machine, run_seconds, spread, step_seconds

Record = dict[str, Any]


def bench(
    suite: SpeedSuite, parts: Iterable[Part], folder: Path, path: ExecutionPath = "fused", peers: bool = True
) -> None:
    """Time `parts` and, at each of their settings, the suite's peers; what is timed already is kept.

    Writes `folder/runs/<part>.json` and `folder/peers/<model>.<dtype>.b<batch>.json`.

    Raises:
        UserError: the device is not there, or a method or a setting is refused.
    """
    device = device_of(suite)
    made: tuple[str, str] | None = None
    for part in [part for part in parts if not suite.models[part.model].needs]:
        jobs = [(folder / "runs" / f"{part.name}.json", run_fingerprint(suite, part, path), _time_part)]
        if peers and part.peers:
            jobs.append((folder / "peers" / f"{part.setting}.json", peers_fingerprint(suite, part), _time_peers))
        for target, fingerprint, measure in jobs:
            if _is_fresh(target, fingerprint):
                continue
            with products(part.dtype):
                if made != (wanted := (suite.network(part.model), part.dtype)):
                    adapter, made = random_adapter(suite, part, device), wanted
                started = time.time()
                record = measure(suite, part, adapter, path)
            provenance = collect(suite.model_dump(mode="json"), [suite.seed], started)
            RUN.write(target, {"fingerprint": fingerprint, **record, "provenance": provenance})


def device_of(suite: SpeedSuite) -> torch.device:
    """The suite's device, as `leased_device`, shared with no other job."""
    return leased_device(suite.suite, suite.device, alone=True)


def random_adapter(suite: SpeedSuite, part: Part, device: torch.device) -> Adapter:
    """The part's model with random weights in its dtype, every layer drawn."""
    spec = MODELS[suite.network(part.model)]
    weights = weights_dtype(part.dtype)
    model = build_transformer(spec, device=device, dtype=weights, seed=suite.seed, zero_init=False, drawn_there=True)
    return make_adapter(model, spec)


def prepare_row(suite: SpeedSuite, part: Part, row: str, adapter: Adapter, path: ExecutionPath) -> Replay:
    """A row's run, with stand-ins for what it would have trained."""
    settings, method = suite.models[part.model].rows[row], suite.models[part.model].method(row)
    artefacts = untrained_artefacts(adapter, method, part.nfe, suite.seed, settings.open_branches)
    index = torch.arange(part.batch_size)
    return Replay(
        adapter,
        method,
        part.nfe,
        sampler_settings(suite, part),
        index,
        artefacts,
        prompts=random_captions(adapter.spec, suite.seed),
        path=path,
        stand_in=partial(random_reads, suite.seed, 0.5 if settings.open_branches is None else settings.open_branches),
    )


def sampler_settings(suite: SpeedSuite, part: Part) -> SamplerSettings:
    """What all rows of a model share."""
    model = suite.models[part.model]
    return SamplerSettings(model.guidance_scale, suite.seed, solver=model.solver)


def run_fingerprint(suite: SpeedSuite, part: Part, path: ExecutionPath) -> str:
    """Identifies everything that a part's numbers depend on: settings, code, machine."""
    rows = {name: row for name, row in suite.models[part.model].rows.items() if row.nfe == part.nfe}
    settings = suite.model_dump(include={"seed", "protocol", "device"}, mode="json")
    code = source_digest("bench", *sorted({row.method for row in rows.values()}))
    described = {name: row.model_dump(exclude={"paper", "label"}) for name, row in rows.items()}
    shared = asdict(sampler_settings(suite, part))
    return digest([settings, shared, part.name, path, described, code, machine(device_of(suite)), torch.__version__])


def peers_fingerprint(suite: SpeedSuite, part: Part) -> str:
    """The same for the peers at a part's setting."""
    settings = suite.model_dump(include={"seed", "protocol", "device", "peers"}, mode="json")
    installed = [find_spec(name) is not None for name in ("cache_dit", "tomesd")]
    code = source_digest("bench", "uncached", "tome_merge")
    shared = asdict(sampler_settings(suite, part))
    return digest([settings, shared, part.setting, code, installed, machine(device_of(suite)), torch.__version__])


def _is_fresh(path: Path, fingerprint: str) -> bool:
    return is_whole(path) and RUN.read(path).get("fingerprint") == fingerprint


def _time_part(suite: SpeedSuite, part: Part, adapter: Adapter, path: ExecutionPath) -> Record:
    model = suite.models[part.model]
    makers: dict[str, Callable[[], Prepared]] = {
        name: lambda name=name: prepare_row(suite, part, name, adapter, path)  # type: ignore[misc]
        for name, row in model.rows.items()
        if row.nfe == part.nfe
    }
    prepared, rows = time_interleaved(suite, part.name, adapter, makers)
    for name, replay in prepared.items():
        assert isinstance(replay, Replay)
        kinds = by_kind(replay, adapter.shape, rows[name]["step_s"])
        rows[name] |= {"macs": replay.macs, "sampled_steps": replay.nfe, "host_reads": replay.reads, "steps": kinds}
        rows[name]["captured"] = replay.captured
    executed = fastest(adapter).execution if path == "fused" else "plain"
    return _described(suite, part, adapter) | {"nfe": part.nfe, "path": path, "executed": executed, "rows": rows}


def _time_peers(suite: SpeedSuite, part: Part, adapter: Adapter, path: ExecutionPath) -> Record:
    index, settings = torch.arange(part.batch_size), sampler_settings(suite, part)
    makers: dict[str, Callable[[], Prepared]] = {
        name: lambda name=name: PEERS[name].prepare(adapter, suite.peers.nfe, settings, index)  # type: ignore[misc]
        for name in suite.peers.names
    }
    prepared, rows = time_interleaved(suite, f"{part.setting} peers", adapter, makers)
    for name in suite.peers.names:
        rows[name]["label"] = PEERS[name].label
        if name in prepared:
            rows[name]["macs_per_sample"] = macs_per_sample(prepared[name])
    return _described(suite, part, adapter) | {"nfe": suite.peers.nfe, "rows": rows}


def _described(suite: SpeedSuite, part: Part, adapter: Adapter) -> Record:
    return {
        "model": part.model,
        "dtype": part.dtype,
        "batch_size": part.batch_size,
        "protocol": suite.protocol.model_dump(),
        "machine": machine(adapter.device),
    }


def time_interleaved(
    suite: SpeedSuite, title: str, adapter: Adapter, makers: dict[str, Callable[[], Prepared]]
) -> tuple[dict[str, Prepared], dict[str, Record]]:
    """Prepare all rows, then time whole runs and steps, in rounds that each begin with another row.

    Returns:
        what was prepared, and a record for every row: times or why it was not run.

    Raises:
        UserError: a method or a setting is refused.
    """
    device, protocol = adapter.device, suite.protocol
    prepared: dict[str, Prepared] = {}
    records: dict[str, Record] = {}
    rounds = protocol.warmup + protocol.repeats + protocol.step_rounds
    with tqdm(total=len(makers) * (1 + rounds), desc=title, unit="run", mininterval=1) as bar:
        for name, make in makers.items():
            with _peak_memory(adapter) as peak:
                try:
                    prepared[name] = make()
                    latents = _first_latents(prepared[name])
                    if not latents.isfinite().all():
                        raise NotRun("latents became NaN or infinite; change the seed of the weights")
                except Exception as error:
                    prepared.pop(name, None)
                    records[name] = {"not_run": _why(error, device)}
                    bar.update(1 + rounds)
                    continue
            records[name] = {"peak_bytes": peak()}
            if isinstance(replay := prepared[name], Replay):
                records[name]["cache_bytes"] = replay.cache_bytes + replay.policy_bytes
            _release(prepared[name])
            bar.update()
        runs: dict[str, list[float]] = {name: [] for name in prepared}
        steps: dict[str, list[list[float]]] = {name: [] for name in prepared}
        for number in range(rounds):
            first = number % max(1, len(prepared))
            for name in [*list(prepared)[first:], *list(prepared)[:first]]:
                if number < protocol.warmup + protocol.repeats:
                    runs[name].append(run_seconds(device, prepared[name].run))
                else:
                    steps[name].append(step_seconds(device, prepared[name]))
                _release(prepared[name])
                bar.update()
    for name in prepared:
        records[name] |= spread(runs[name][protocol.warmup :])
        records[name]["step_s"] = np.median(steps[name], axis=0).round(8).tolist()
    return prepared, records


def _why(error: Exception, device: torch.device) -> str:
    """Why a row was not run: one of many, so the others are timed all the same.

    Raises:
        UserError: the error is one that running other rows does not excuse.
    """
    match error:
        case NotRun():
            return str(error)
        case torch.OutOfMemoryError():
            total = torch.cuda.get_device_properties(device).total_memory / 2**30
            return f"needs more than {total:.0f} GiB of GPU memory"
        case UserError():
            raise error
    traceback.print_exception(error)
    said = str(error).strip().partition("\n")[0]
    return f"failed with {type(error).__name__}: {said}"


def _first_latents(prepared: Prepared) -> Tensor:
    """Those of a first run; where nothing is captured, preparing was one."""
    return prepared.latents if isinstance(prepared, Replay) and not prepared.captured else prepared.run()


def _release(prepared: Prepared) -> None:
    """Let rows that wait hold no features: those of a video of 32 760 tokens are 20 GB."""
    if isinstance(prepared, Replay):
        prepared.release()


def is_full(replay: Replay, shape: ModelShape) -> np.ndarray:
    """Whether each step computes at least all of the model, bool [S]."""
    return np.array(replay.step_macs) >= plan_macs(Plan(), shape).matmul * replay.rows_per_sample


def by_kind(replay: Replay, shape: ModelShape, step_s: list[float]) -> Record:
    """Number, median seconds and mean MACs per sample of full steps and of the others, where there are any."""
    macs, seconds, full = np.array(replay.step_macs), np.array(step_s), is_full(replay, shape)
    return {
        kind: {
            "count": int(chosen.sum()),
            "median_s": float(np.median(seconds[chosen])),
            "macs": round(float(macs[chosen].mean())),
        }
        for kind, chosen in (("full", full), ("partial", ~full))
        if chosen.any()
    }


@contextmanager
def _peak_memory(adapter: Adapter) -> Iterator[Callable[[], int | None]]:
    """Peak bytes of one row as if it were alone: the weights and what preparing and running it adds."""
    if adapter.device.type != "cuda":
        yield lambda: None
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in adapter.model.parameters())
    yield lambda: weights + torch.cuda.max_memory_allocated() - before
