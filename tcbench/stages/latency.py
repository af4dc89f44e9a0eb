"""Measured latency: whole runs of one batch, rows interleaved in one process, so that drift hits all rows alike.

Times compare within a session alone. A row that is added, or changed, is timed in a later session, beside the uncached
row that it is compared with once more; its latency ratio is to that one, and no other row is timed again.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from tcbench.artefacts import artefacts_digest
from tcbench.config.suite import Entry, Suite
from tcbench.record.files import digest
from tcbench.record.provenance import collect
from tcbench.record.records import LATENCY, Latency, Session
from tcbench.record.sources import source_digest
from tcbench.sampling import sample_batch
from tcbench.stages.conditioning import load_shown
from tcbench.stages.images import device_of
from tcbench.stages.ready import (
    files_digests,
    load_adapter,
    ready_row,
    sampled_method,
    sampler_settings,
    weights_digest,
)
from tcbench.watch.checking import values_unchecked
from tcbench.watch.undisturbed import undisturbed


def measure_latency(suite: Suite, missing: bool = False) -> None:
    """Write results/<suite>/latency.json: seconds per batch for every row, median and all repeats.

    A time spans from the prompt, which a captioned suite's text encoder reads, to the last latent; the decoder is not
    in it. The first `warmup` rounds are dropped.

    Args:
        missing: rows that were timed on this machine with these settings and this code keep their times.
    """
    device_of(suite, alone=True)  # leases a GPU, before anything asks CUDA for its name
    path, keys = suite.folder / "latency.json", {entry.name: _key(entry) for entry in suite.entries}
    protocol = _protocol(suite)
    sessions = [kept for each in (_sessions(suite) if missing else ()) if (kept := _kept(each, suite, keys, protocol))]
    timed = {name for session in sessions for name in session["rows"]}
    lacking = [entry for entry in suite.entries if entry.name not in timed]
    if lacking:
        beside = dict.fromkeys(name for entry in lacking for name in (entry.reference.name, entry.name))
        if sessions:
            tqdm.write(f"latency: {len(timed)} rows keep their times; timed now: {', '.join(beside)}", file=sys.stderr)
        sessions.append(_session(suite, [suite[name] for name in suite.rows if name in beside], keys, protocol))
    first, *later = sessions
    LATENCY.write(path, {"suite": suite.suite, **first, **({"later": later} if later else {})})


def _protocol(suite: Suite) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if suite.model.device == "cuda" else "cpu",
        "dtype": suite.sampling_dtypes["denoiser"],
        "cfg": suite.computes_halves,
        "threads": torch.get_num_threads(),
        **suite.latency.model_dump(),
    }


def _key(entry: Entry) -> str:
    """Identifies what a row's time depends on besides the machine."""
    suite, folder = entry.suite, entry.artefacts
    return digest(
        {
            "settings": entry.settings("latency"),
            "weights": weights_digest(suite.model.name, suite.model.weights),
            "method": sampled_method(entry).model_dump(mode="json"),
            "artefacts": artefacts_digest(folder) if folder else None,
            "read": files_digests(entry),
            "code": source_digest("latency", entry.row.method, data=suite.data.name),
        }
    )


def _sessions(suite: Suite) -> list[Session]:
    """What was timed before; nothing, if its file is not there."""
    path = suite.folder / "latency.json"
    if not path.exists():
        return []
    before: Latency = LATENCY.read(path, suite=suite.suite)
    first: Session = {"protocol": before["protocol"], "rows": before["rows"], "provenance": before["provenance"]}
    return [first, *before.get("later", [])]


def _kept(session: Session, suite: Suite, keys: dict[str, str], protocol: dict[str, Any]) -> Session | None:
    """A session with the rows that would be timed alike now, and whose uncached row would; None if there are none."""
    here, there = collect({}, [], time.time()), session["provenance"]
    same = all(there.get(part) == here[part] for part in ("packages", "cpu", "gpu"))
    if not same or session["protocol"] != protocol:
        return None
    fits = {name for name, timing in session["rows"].items() if timing.get("key", "") == keys.get(name)}
    rows = {name: timing for name, timing in session["rows"].items() if {name, _reference(suite, name)} <= fits}
    return {**session, "rows": rows} if rows else None


def _reference(suite: Suite, name: str) -> str | None:
    return suite[name].reference.name if name in suite.rows else None


def _session(suite: Suite, entries: Sequence[Entry], keys: dict[str, str], protocol: dict[str, Any]) -> Session:
    """Time some rows together."""
    started, settings = time.time(), suite.latency
    adapter, shown = load_adapter(suite), load_shown(suite)
    rows = {entry.name: ready_row(entry, adapter) for entry in entries}
    index = torch.arange(settings.batch_size)
    times: dict[str, list[float]] = {row: [] for row in rows}
    rounds = settings.warmup + settings.repeats
    with tqdm(total=rounds * len(rows), desc="latency", unit="run", mininterval=1) as bar:
        for number in range(rounds):
            for row, ready in rows.items():
                run = ready.adapter, ready.method, ready.nfe, sampler_settings(suite[row]), index, ready.artefacts
                timed = number >= settings.warmup
                watched = (ready.adapter.model, *ready.artefacts.scorers.values())
                with undisturbed(ready.method, *watched), values_unchecked(timed):
                    _wait(suite)
                    began = time.perf_counter()
                    sample_batch(*run, prompts=shown)
                    _wait(suite)
                    if timed:
                        times[row].append(time.perf_counter() - began)
                bar.update()
    provenance = collect(suite.model_dump(mode="json"), [suite.samples.seed], started, suite.sampling_dtypes)
    session: dict[str, Any] = {
        "protocol": protocol,
        "rows": {
            row: {
                "median_s": statistics.median(seconds),
                "min_s": min(seconds),
                "max_s": max(seconds),
                "times_s": seconds,
                "key": keys[row],
            }
            for row, seconds in times.items()
        },
        "provenance": provenance,
    }
    return session  # type: ignore[return-value]


def _wait(suite: Suite) -> None:
    if suite.model.device == "cuda":
        torch.cuda.synchronize()
