"""Measured latency: whole runs of one batch, rows interleaved in one process, so that drift hits all rows alike."""

import statistics
import time

import torch
from tqdm import tqdm

from tcbench.config.suite import Suite
from tcbench.record.provenance import collect
from tcbench.record.records import LATENCY
from tcbench.sampling import sample_batch
from tcbench.stages.conditioning import load_shown
from tcbench.stages.ready import load_adapter, ready_row, sampler_settings
from tcbench.watch.checking import values_unchecked
from tcbench.watch.undisturbed import undisturbed


def measure_latency(suite: Suite) -> None:
    """Write results/<suite>/latency.json: seconds per batch for every row, median and all repeats.

    A time spans from the prompt, which a captioned suite's text encoder reads, to the last latent; the decoder is not
    in it. The first `warmup` rounds are dropped.
    """
    started = time.time()
    protocol = suite.latency
    adapter, shown = load_adapter(suite), load_shown(suite)
    rows = {entry.name: ready_row(entry, adapter) for entry in suite.entries}
    index = torch.arange(protocol.batch_size)
    times: dict[str, list[float]] = {row: [] for row in rows}
    rounds = protocol.warmup + protocol.repeats
    with tqdm(total=rounds * len(rows), desc="latency", unit="run", mininterval=1) as bar:
        for number in range(rounds):
            for row, ready in rows.items():
                run = ready.adapter, ready.method, ready.nfe, sampler_settings(suite[row]), index, ready.artefacts
                timed = number >= protocol.warmup
                watched = (ready.adapter.model, *ready.artefacts.scorers.values())
                with undisturbed(ready.method, *watched), values_unchecked(timed):
                    _wait(suite)
                    began = time.perf_counter()
                    sample_batch(*run, prompts=shown)
                    _wait(suite)
                    if timed:
                        times[row].append(time.perf_counter() - began)
                bar.update()
    LATENCY.write(
        suite.folder / "latency.json",
        {
            "suite": suite.suite,
            "protocol": {
                "device": torch.cuda.get_device_name() if suite.model.device == "cuda" else "cpu",
                "dtype": suite.sampling_dtypes["denoiser"],
                "cfg": True,
                "threads": torch.get_num_threads(),
                **protocol.model_dump(),
            },
            "rows": {
                row: {
                    "median_s": statistics.median(seconds),
                    "min_s": min(seconds),
                    "max_s": max(seconds),
                    "times_s": seconds,
                }
                for row, seconds in times.items()
            },
            "provenance": collect(suite.model_dump(mode="json"), [suite.samples.seed], started, suite.sampling_dtypes),
        },
    )


def _wait(suite: Suite) -> None:
    if suite.model.device == "cuda":
        torch.cuda.synchronize()
