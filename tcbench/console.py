"""What `tcbench run` prints: a line when a job starts, a line every while for what runs, and failures in full.

A logger plugin of Snakemake's. Percent is of expected time, by kind of job; how far a job is, its own progress bar
says, which is the end of its log.
"""

import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from logging import WARNING, LogRecord
from pathlib import Path
from typing import Any

from snakemake.logging import DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

EVERY_S = 20.0
"""Seconds between two lines about a job that goes on."""
EXPECTED = {
    **{"encode": 120, "pretrain": 300, "train": 40, "search": 40, "sample": 60, "score": 30, "floor": 5},
    **{"latency": 60, "ablate": 60, "diagnose": 10, "render": 5, "vbench": 120, "speed": 600},
    **{"rival": 60, "seed": 10, "diagnostics": 5},
}
"""Seconds of a job by the first such word of its rule's name, as embedded suites take on two cores; only their ratios
matter. Others, which only name targets, take none."""
SAID = ("Nothing to be done", "unlock", "Unlock", "cannot be locked", "forecast of")
"""What is passed on of other notes: Snakemake's own, and what a run will take."""
ROWS_NAMED = 3
LAST_BYTES = 4000
WIDTH = 150


@dataclass
class Running:
    """A job that runs: what it is called, its log, when it began, what it counts for."""

    name: str
    log: str
    began: float
    counts: float


def expected(rule: str) -> float:
    """Seconds that a rule's job is expected to take."""
    return next((float(EXPECTED[word]) for word in rule.split("_") if word in EXPECTED), 0.0)


def name_of(record: Mapping[str, Any]) -> str:
    """A job in words: its rule, and the rows that its files are of, a few by name."""
    found = (
        re.search(r"/(?:samples|scores|trained|searched|diagnostics)/([^/]+?)(?:/|\.json$)", path)
        for path in record["output"]
    )
    rows = list(dict.fromkeys(match[1] for match in found if match))
    more = f" and {len(rows) - ROWS_NAMED} more rows" if len(rows) > ROWS_NAMED else ""
    return f"{record['rule_name']}{': ' if rows else ''}{', '.join(rows[:ROWS_NAMED])}{more}"


def last_line(log: str) -> str:
    """The last thing that a log says, of a progress bar its last state; empty if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, Path(log).stat().st_size - LAST_BYTES))
            lines = re.split(r"[\r\n]+", file.read().decode("utf-8", "replace"))
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def as_time(seconds: float) -> str:
    """Minutes, of long spans hours."""
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


class LogHandler(LogHandlerBase):
    """Prints to standard error; knows which jobs run."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.running: dict[int, Running] = {}
        self.total = self.done = 0.0
        self.began = time.monotonic()
        self.held, self.ended = threading.Lock(), threading.Event()
        self.setFormatter(DefaultFormatter(show_failed_logs=True))
        threading.Thread(target=self._tell, daemon=True).start()

    def close(self) -> None:
        """No more lines about what runs."""
        self.ended.set()
        super().close()

    def emit(self, record: LogRecord) -> None:
        """Say what a reader wants to know of an event."""
        event, fields = getattr(record, "event", None), record.__dict__
        with self.held:
            if event == LogEvent.RUN_INFO:
                self._plan(fields["stats"])
            elif event == LogEvent.JOB_INFO:
                self._start(fields)
            elif event == LogEvent.JOB_FINISHED:
                if job := self.running.pop(fields["job_id"], None):
                    self.done += job.counts
            elif event in (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR) or record.levelno >= WARNING:
                self._print(self.format(record))
            elif event is None and any(word in str(record.msg) for word in SAID):
                self._print(str(record.msg))

    def _plan(self, stats: Mapping[str, int]) -> None:
        jobs = {rule: count for rule, count in stats.items() if rule != "total" and expected(rule)}
        self.total, self.began = sum(expected(rule) * count for rule, count in jobs.items()), time.monotonic()
        self._print(f"{sum(jobs.values())} jobs; one line each when it starts, and every {EVERY_S:.0f} s while it runs")

    def _start(self, fields: Mapping[str, Any]) -> None:
        if counts := expected(fields["rule_name"]):
            log = next(iter(fields["log"]), "")
            self.running[fields["jobid"]] = Running(name_of(fields), log, time.monotonic(), counts)
            self._print(f"[{self._share()}] {name_of(fields)}" + (f"; log: {log}" if log else ""))

    def _share(self) -> str:
        """Percent by expected time, and what is left by the pace so far."""
        now = time.monotonic()
        part = sum(min(now - job.began, 0.9 * job.counts) for job in self.running.values())
        share = min(0.99, (self.done + part) / self.total) if self.total else 0.0
        left = f", {as_time((now - self.began) * (1 / share - 1))} left" if share > 0.05 else ""
        return f"{share:4.0%}{left}"

    def _tell(self) -> None:
        while not self.ended.wait(EVERY_S):
            with self.held:
                for job in self.running.values():
                    if time.monotonic() - job.began >= EVERY_S and (line := last_line(job.log)):
                        self._print(f"[{self._share()}]   {job.name.partition(':')[0]}: {line}")

    def _print(self, text: str) -> None:
        one_line = "\n" not in text and len(text) > WIDTH
        print(f"{text[: WIDTH - 1]}…" if one_line else text, file=sys.stderr, flush=True)
