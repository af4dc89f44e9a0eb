"""What the workflow says of its time: a forecast before the first job, and how much is left as jobs finish."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.forecast.estimate import Estimate, forecast, minutes, wall_seconds
from tcbench.forecast.rates import known_cards
from tcbench.forecast.text import duration, summary
from tcbench.forecast.work import Job
from tcbench.outside.devices import jobs_per_gpu, said_of_gpu

EVERY = 60.0
"""Seconds between two lines about what is left."""


def card_of(suite: Suite) -> str:
    """The card of a suite on this machine, as far as a name says it; on an unknown GPU an H100's rates are taken."""
    if suite.model.device != "cuda":
        return "cpu"
    name = said_of_gpu("name")
    return next(
        (card for card, known in known_cards().items() if known.name.split()[0] in name and card != "cpu"), "h100"
    )


class Left:
    """What is left of a run, from which jobs are done.

    Args:
        left: a forecast of the jobs that will run, by suite.
        outputs: of Snakemake's jobs, by its number.
        say: prints a line.
        clock: seconds.
    """

    def __init__(
        self,
        left: Iterable[Estimate],
        outputs: Mapping[int, Iterable[str]],
        say: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left, self._say, self._clock = list(left), say, clock
        self._outputs = {number: {*map(str, files)} for number, files in outputs.items()}
        self._jobs: dict[str, Job] = {output: job for told in self._left for job in told.jobs for output in job.outputs}
        self._began = self._said = clock()
        self._total = sum(told.wall for told in self._left)
        self._done: set[Job] = set()

    def finished(self, number: int) -> None:
        """A job is done; says what is left, but not every time."""
        self._done |= {self._jobs[path] for path in self._outputs.get(number, ()) if path in self._jobs}
        now = self._clock()
        if now - self._said >= EVERY and self._done:
            self._said = now
            self._say(self.line())

    def line(self) -> str:
        """How long the rest takes, at the pace of what is done."""
        rest = sum(wall_seconds([job for job in told.jobs if job not in self._done], told.count) for told in self._left)
        elapsed, foreseen = self._clock() - self._began, self._total - rest
        pace = elapsed / foreseen if foreseen > 0 else 1.0
        at = time.strftime("%H:%M", time.localtime(time.time() + rest * pace))
        return f"about {duration(rest * pace)} left, until {at} ({pace:.2f} times the forecast so far)"


def announce(
    suites: Iterable[Suite], outputs: Mapping[int, Iterable[str]], cores: int, gpus: int, say: Callable[[str], object]
) -> Left | None:
    """Say the forecast of what is to run, suite by suite; None if nothing of it takes time that is known.

    Args:
        outputs: of the jobs that will run, by Snakemake's number.
        gpus: jobs that may have a GPU at once. Those that share one take turns on it and count as one.
    """
    seats = jobs_per_gpu()
    wanted = {path for files in outputs.values() for path in map(str, files)}
    told: list[Estimate] = []
    for suite in suites:
        card = card_of(suite)
        count = cores if card == "cpu" else max(1, gpus // seats)
        try:
            every = forecast(suite, card, count)
            jobs = tuple(job for job in every.jobs if any(_makes(output, wanted) for output in job.outputs))
            if jobs:
                told.append(replace(every, jobs=jobs))
                say(summary(told[-1]))
                if card != "cpu" and seats > 1:
                    say(f"  {seats} jobs share a card: their starts overlap, so that it may take less")
        except UserError as error:  # a run needs no forecast
            say(f"no forecast of {suite.suite}: {error}")
    if rivals := sum("/rivals/" in str(path) for files in outputs.values() for path in files):
        say(f"no forecast of {rivals} files of rivals, whose steps are solved for as they run")
    return Left(told, outputs, say) if told else None


def _makes(output: str, wanted: set[str]) -> bool:
    """Whether a job that will run makes an output: the file, or some in that folder."""
    return output in wanted or any(path.startswith(f"{output}/") for path in wanted)


class Listener(logging.Handler):
    """Tells `Left` what Snakemake logs about finished jobs."""

    def __init__(self, left: Left) -> None:
        super().__init__()
        self._left = left

    def emit(self, record: logging.LogRecord) -> None:
        """One record of Snakemake's."""
        event: Any = getattr(record, "event", None)
        if getattr(event, "value", event) == "job_finished":
            self._left.finished(record.job_id)  # type: ignore[attr-defined]


_FORECASTS: dict[str, Estimate] = {}


def minutes_of(suite: Suite, output: str, card: str | None = None) -> int:
    """Minutes to ask a cluster for, for the job that makes a file; a rule's `runtime`.

    Args:
        card: of the cluster; if not given, of this machine.

    Raises:
        UserError: as `forecast`.
    """
    card = card or card_of(suite)
    key = f"{card} {suite.digest()}"
    if key not in _FORECASTS:
        _FORECASTS[key] = forecast(suite, card, 1)
    job = next((job for job in _FORECASTS[key].jobs if output in job.outputs), None)
    return minutes(job.seconds if job else 0)
