"""What the jobs of a suite come to: hours of cards and of the clock, disk, memory."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tcbench.config.suite import Suite
from tcbench.forecast.rates import Rate, Rates
from tcbench.forecast.work import Job, Work, jobs_of

STAGES = ("encode", "train", "search", "sample", "decode", "score", "latency", "diagnose", "ablate", "render")


@dataclass(frozen=True, eq=False)
class Estimate:
    """A suite on some cards.

    Attributes:
        suite: its name.
        card, count: which, and how many; of `cpu`, cores.
        jobs: of the workflow, as one process each.
        rates: every rate that it rests on.
    """

    suite: str
    card: str
    count: int
    jobs: tuple[Job, ...]
    rates: Rates

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """Of all jobs."""
        return tuple(work for job in self.jobs for work in job.work)

    @cached_property
    def seconds(self) -> float:
        """Of cards, all jobs one after the other."""
        return sum(work.seconds for work in self.work)

    @cached_property
    def wall(self) -> float:
        """Of the clock."""
        return wall_seconds([part for job in self.jobs for part in job.cut(self.count)], self.count)

    @property
    def disk(self) -> float:
        """Bytes that are left."""
        return sum(job.disk for job in self.jobs)

    @property
    def memory(self) -> Job:
        """The job with the highest peak on a card."""
        return max(self.jobs, key=lambda job: job.memory)

    def by_stage(self) -> dict[str, float]:
        """Seconds of cards by stage, of which there are any."""
        total = dict.fromkeys(STAGES, 0.0)
        for work in self.work:
            total[work.stage] += work.seconds
        return {stage: seconds for stage, seconds in total.items() if seconds}

    def parts_of(self, stage: str) -> dict[str, float]:
        """Seconds of cards by row, or by what is trained, of a stage."""
        total: dict[str, float] = {}
        for work in self.work:
            if work.stage == stage and work.of:
                total[work.of] = total.get(work.of, 0) + work.seconds
        return total

    def used(self) -> list[Rate]:
        """The rates that it rests on, the weightiest first."""
        weight: dict[Rate, float] = {}
        for work in self.work:
            weight[work.rate] = weight.get(work.rate, 0) + work.seconds
        return sorted(weight, key=lambda rate: -weight[rate])

    def measured_share(self) -> float:
        """The share of its seconds that measured rates make."""
        measured = sum(work.seconds for work in self.work if work.rate.kind == "measured")
        return measured / self.seconds if self.seconds else 1.0


def forecast(suite: Suite, card: str, count: int, calibrated: Sequence[Rate] = ()) -> Estimate:
    """A suite on `count` cards.

    Args:
        calibrated: rates measured on the card at hand.

    Raises:
        UserError: the card is unknown, or the images to train on cannot be counted.
    """
    rates = Rates(card, calibrated)
    return Estimate(suite.suite, card, count, tuple(jobs_of(suite, rates)), rates)


def wall_seconds(jobs: Sequence[Job], slots: int) -> float:
    """How long jobs take on so many cards or cores, each begun as soon as what it needs is there and a slot is free; of
    those that could begin, the one with the longest way to the end first. A job that runs alone waits for all slots."""
    producer = {output: number for number, job in enumerate(jobs) for output in job.outputs}
    before = [_producers(job, jobs, producer) for job in jobs]
    after: list[set[int]] = [set() for _ in jobs]
    for number, needed in enumerate(before):
        for other in needed:
            after[other].add(number)
    seconds = [job.seconds for job in jobs]
    rank: dict[int, float] = {}
    for number in reversed(_in_order(before)):
        rank[number] = seconds[number] + max((rank[other] for other in after[number]), default=0)
    waiting = [len(needed) for needed in before]
    ready = [number for number, count in enumerate(waiting) if not count]
    running: list[tuple[float, int]] = []
    now, alone = 0.0, False
    while ready or running:
        for number in sorted(ready, key=lambda number: -rank[number]):
            fits = not running if jobs[number].alone else not alone and len(running) < slots
            if fits:
                ready.remove(number)
                heapq.heappush(running, (now + seconds[number], number))
                alone = jobs[number].alone
        now, done = heapq.heappop(running)
        alone = alone and bool(running)
        for other in after[done]:
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)
    return now


def _producers(job: Job, jobs: Sequence[Job], producer: dict[str, int]) -> set[int]:
    """Jobs that make what a job needs, all parts of them."""
    needed = {producer[path] for path in job.needs if path in producer}
    parts = {name for path in job.needs for name in producer if name.startswith(f"{path}#")}
    return needed | {producer[name] for name in parts}


def _in_order(before: Sequence[set[int]]) -> list[int]:
    """Numbers, each behind those that it needs."""
    order: dict[int, None] = {}

    def visit(number: int) -> None:
        for other in before[number]:
            if other not in order:
                visit(other)
        order[number] = None

    for number in range(len(before)):
        if number not in order:
            visit(number)
    return list(order)


def minutes(seconds: float, spare: float = 1.5) -> int:
    """Minutes to ask a cluster for: half more than the forecast, and five for what no forecast knows."""
    return round(seconds * spare / 60) + 5
