"""Rehearsals: stand-ins are written, every stage runs, and what it took is laid beside the forecast."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tcbench import __version__
from tcbench.config.document import read_document
from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.forecast.estimate import STAGES, forecast
from tcbench.forecast.progress import card_of
from tcbench.forecast.text import duration
from tcbench.forecast.text import size as bytes_of
from tcbench.forecast.work import Job
from tcbench.outside.devices import jobs_per_gpu, said_of_gpu
from tcbench.outside.places import PACKAGE
from tcbench.record.files import digest, read_json, write_json
from tcbench.record.provenance import collect
from tcbench.rehearse.reduced import BATCHES, reduced
from tcbench.rehearse.sizes import SizeName, networks

FILES = "files"
"""The command that writes stand-ins; all others are `tcbench`'s."""

CONFIG, STATE, LOGS = "rehearsal.yaml", Path("rehearsal.json"), Path("logs")
RECORDS = Path("results") / "rehearsals"

CLOSE = 0.2
"""How far off a forecast may be, as a share of what was measured."""

Runner = Callable[[SizeName, Path, Sequence[str]], int]
"""(size, where to leave a note of memory, command) -> exit status; in the folder of the rehearsal."""


def rehearse(
    config: Path,
    into: Path,
    size: SizeName,
    only: Collection[str] = (),
    minutes: float | None = None,
    run: Runner | None = None,
    say: Callable[[str], object] = print,
    batches: int = BATCHES,
    rows: Sequence[str] = (),
    most_steps: int | None = None,
    card_memory: float | None = None,
) -> Path:
    """Write stand-ins for what a suite names into a folder and run every stage there that did not run yet.

    Args:
        only: stages, and `files`; all if none is named. Named ones run again.
        minutes: after so many no other job is begun.
        run: runs a stage; `in_a_process`, if not given.
        batches: of samples of each row.
        rows: of the suite, with what they refer to; a row of every method if none is named.
        most_steps: of a row, for models of which every step takes seconds.
        card_memory: GB of the card that `in_a_process` lets a stage take, as if the card had no more.

    Returns:
        results/rehearsals/<suite>.json of the working directory, which was added to after every stage; of tiny networks
        <suite>-tiny.json, and <suite>-shared.json where jobs share a card, whose seconds say nothing of a forecast.

    Raises:
        UserError: the config is wrong, a stage is unknown, or one failed; names the log.
    """
    if unknown := sorted(set(only) - {FILES, *STAGES}):
        raise UserError(f"--only {unknown[0]}: give some of {FILES}, {', '.join(STAGES)}")
    if batches < 2:
        raise UserError(f"--batches {batches}: an interval takes two shards, of a batch each; give 2 or more")
    run, sharing = run or partial(in_a_process, limit=_limit(card_memory)), jobs_per_gpu()
    settings = read_document(config).value
    with networks(size):
        small = reduced(load_suite(config), settings, size, batches, rows, most_steps)
        into.mkdir(parents=True, exist_ok=True)
        write_json(into / CONFIG, small)  # which is YAML, and names like 1e-5 stay names
        other = ("" if size == "full" else f"-{size}") + ("-shared" if sharing > 1 else "")
        target = (RECORDS / f"{small['suite']}{other}.json").resolve()
        with chdir(into):  # where the suite's paths lead
            reduced_to = {"batches": batches, "most_steps": most_steps, "card_memory": card_memory}
            reduced_to |= {"jobs_per_gpu": sharing} if sharing > 1 else {}
            _run_all(load_suite(CONFIG), size, reduced_to, target, only, minutes, run, say)
    return target


def _run_all(
    suite: Suite,
    size: SizeName,
    reduced_to: dict[str, Any],
    target: Path,
    only: Collection[str],
    minutes: float | None,
    run: Runner,
    say: Callable[[str], object],
) -> None:
    record, began, started = _begun(suite, size, reduced_to), time.monotonic(), time.time()
    for job in _jobs(suite):
        name = f"{job.stage} {job.of}".strip()
        files_too = job.stage == FILES and not only  # those that are there are left as they are
        if not (job.stage in only if only else files_too or name not in record["done"]):
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            say(f"{name} and what follows: not begun after {minutes:g} minutes; run the same command to go on")
            break
        record["done"][name] = _ran(job, name, size, run, say)
        record["provenance"] = collect(suite.model_dump(mode="json"), [suite.samples.seed], started)
        for path in (STATE, target):
            write_json(path, record)
    say(compared(record))


def _jobs(suite: Suite) -> Iterator[Job]:
    """Stand-ins first: a forecast counts images."""
    yield Job(FILES, "", (FILES,), (), (), tuple)
    yield from forecast(suite, card_of(suite), 1).jobs


def compared(record: dict[str, Any]) -> str:
    """How the forecast did: in all, and stage by stage."""
    done = [found for found in record["done"].values() if found.get("forecast_s")]
    took, foreseen = (sum(found[key] for found in done) for key in ("seconds", "forecast_s"))
    if not took:
        return "nothing to compare with a forecast yet"
    close = sum(abs(found["forecast_s"] - found["seconds"]) <= CLOSE * found["seconds"] for found in done)
    verdict = "within" if abs(foreseen / took - 1) <= CLOSE else "not within"
    return (
        f"{record['suite']}, {record['size']}: {duration(took)} in all, forecast {duration(foreseen)} "
        f"({foreseen / took - 1:+.0%}, {verdict} {CLOSE:.0%}); {close} of {len(done)} jobs within {CLOSE:.0%}"
    )


def in_a_process(
    size: SizeName, note: Path, command: Sequence[str], limit: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Run a stage as the workflow does, in a process of its own, with the working directory as the home.

    Args:
        limit: environment variables that bound what it takes.
    """
    log = LOGS / f"{note.stem}.log"
    log.parent.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    offline = {"HOME": str(Path.cwd()), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    module = [sys.executable, "-m", "tcbench.rehearse.child", size, str(note), CONFIG, *command]
    with log.open("wb") as file:
        return subprocess.run(module, env=os.environ | limit | offline, stdout=file, stderr=file).returncode


def _limit(card_memory: float | None) -> dict[str, str]:
    """What bids torch take no more of a card than so many GB."""
    if card_memory is None:
        return {}
    if not (said := said_of_gpu("memory.total")).isdecimal():
        raise UserError("--card-memory: nvidia-smi finds no GPU here whose memory could be bounded; leave it out")
    if not 0 < card_memory * 1e9 <= (there := int(said) * 2**20):
        raise UserError(f"--card-memory {card_memory:g}: give GB, of the {bytes_of(there)} that the card has")
    return {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{card_memory * 1e9 / there:.4f}"}


def _begun(suite: Suite, size: SizeName, reduced_to: dict[str, Any]) -> dict[str, Any]:
    """The record of such a rehearsal of this suite in this folder, or the beginning of one."""
    key = digest([suite.digest(), size, reduced_to, __version__])
    if STATE.exists() and (found := read_json(STATE)).get("key") == key:
        return found
    about = {"suite": suite.suite, "size": size, "key": key, "tcbench": __version__, "reduced_to": reduced_to}
    return {**about, "done": {}}


def _ran(job: Job, name: str, size: SizeName, run: Runner, say: Callable[[str], object]) -> dict[str, Any]:
    note = Path(f"{name.replace(' ', '-')}.json")
    note.unlink(missing_ok=True)
    before = time.perf_counter()
    status = run(size, note, job.command)
    seconds = time.perf_counter() - before
    if status or not note.exists():
        log = LOGS / f"{note.stem}.log"
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.exists() else []
        raise UserError(f"{name}: failed, {' '.join(last) or f'status {status}'}; see {log.resolve()}")
    found = {"seconds": round(seconds, 2), **read_json(note), "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
    note.unlink()
    foreseen = ""
    if job.work:
        found["forecast_s"] = round(job.seconds, 2)
        foreseen = f", forecast {duration(job.seconds)}"
    on_card = f"{bytes_of(found['gpu_bytes'])} of the card, " if found["gpu_bytes"] else ""
    say(f"{name}: {seconds:.1f} s{foreseen}; {on_card}{bytes_of(found['host_bytes'])} of memory")
    return found
