"""Sign, bias, coverage and power of every comparison that is tested, by simulation at the suites' own sizes.

    python -m tests.coverage            # prints the table of docs/statistics.md; about a minute on one core
    python -m tests.coverage --write    # puts it there

Rows are made up of which the truth is known, as a model with and without a method would make them: the same noise on
both sides, so that samples correlate by `CORRELATION`. What the project's own code makes of their replicates is
compared with the truth. tests/test_coverage.py runs a quick version with tolerances from the binomial error.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tcbench.metrics.catalogue import METRICS, Metric
from tcbench.metrics.extractors import Features
from tcbench.metrics.inference import USABLE, paired_difference
from tcbench.metrics.samples import Real, Reference, Samples
from tcbench.metrics.scoring import prepare
from tcbench.stats import Indices, Interval, Statistic, batches, replicate, share_interval

CORRELATION = 0.97
DOCUMENT = Path(__file__).parent.parent / "docs" / "statistics.md"
ROWS_OWN = "one row's share of samples"
MARKS = "<!-- simulated -->", "<!-- end -->"

Array = NDArray[np.float64]
Rng = np.random.Generator


@dataclass(frozen=True)
class Size:
    """How many samples a suite's rows have.

    Attributes:
        suite: which one.
        samples, groups: of a row.
        features: of FID; where these are Inception's 2048, both are scaled down alike.
    """

    suite: str
    samples: int
    groups: int
    features: int

    @property
    def batches(self) -> list[Indices]:
        """The samples of every group."""
        return batches(self.samples, -(-self.samples // self.groups))

    def __str__(self) -> str:
        return f"{self.suite}: {self.samples} in {self.groups}, {self.features} features"


SIZES = (
    Size("`digits`", 96, 8, 64),
    Size("`scenes`", 24, 8, 64),
    Size("`moving`", 12, 6, 64),
    Size("5 000 images, scaled", 150, 25, 61),
    Size("50 000 images, scaled", 1563, 25, 64),
)


@dataclass(frozen=True)
class Result:
    """What came of one comparison.

    Attributes:
        what: the comparison.
        truth: the true difference.
        mean: of the estimates.
        wrong_sign: share of repeats whose interval excludes 0 on the wrong side, or at all if the truth is 0.
        coverage: share whose interval holds the truth.
        power: share whose interval excludes 0 on the right side; nan if the truth is 0.
        repeats: how many.
    """

    size: Size
    what: str
    truth: float
    mean: float
    wrong_sign: float
    coverage: float
    power: float
    repeats: int

    @property
    def tested(self) -> bool:
        """Whether tables have marks of it."""
        usable = self.size.samples >= USABLE * self.size.features
        return not self.what.startswith("FID") or (usable and self.what.endswith("bias taken out"))


def summary(size: Size, what: str, truth: float, intervals: list[Interval]) -> Result:
    """Of the intervals of every repeat."""
    low, high, value = (np.array([getattr(each, end) for each in intervals]) for end in ("low", "high", "value"))
    covered, repeats = float(((low <= truth) & (truth <= high)).mean()), len(intervals)
    if truth:
        above, below = float((low > 0).mean()), float((high < 0).mean())
        against, along = (below, above) if truth > 0 else (above, below)
        return Result(size, what, truth, float(value.mean()), against, covered, along, repeats)
    excluded = float(((low > 0) | (high < 0)).mean())
    return Result(size, what, truth, float(value.mean()), excluded, covered, float("nan"), repeats)


# --- metrics of features: real ones are N(0, 1) in every feature, a row's are scaled by `spread`


def frechet(samples: Array) -> float:
    """Frechet distance to N(0, 1): `tcbench.metrics.frechet.frechet_distance` for known moments."""
    eigenvalues = np.linalg.eigvalsh(np.cov(samples, rowvar=False)).clip(min=0)
    return float((samples.mean(0) ** 2).sum() + ((np.sqrt(eigenvalues) - 1) ** 2).sum())


def frechet_of(samples: Array, kept: Indices) -> float:
    """As a metric of those that are kept."""
    return frechet(samples[kept])


def pair(size: Size, spread: float, rng: Rng) -> tuple[Array, Array]:
    """Features of a row whose samples are `spread` times as far from the centre, and of the uncached one, [n, d]."""
    shared, own = rng.normal(size=(2, size.samples, size.features))
    return (CORRELATION * shared + (1 - CORRELATION**2) ** 0.5 * own) * spread, shared


def frechet_differences(size: Size, spread: float, repeats: int, rng: Rng) -> tuple[list[Interval], list[Interval]]:
    """(As measured, with the bias taken out.)"""
    plain, corrected = [], []
    for _ in range(repeats):
        row, uncached = (replicate(partial(frechet_of, x), size.batches) for x in pair(size, spread, rng))
        plain.append((row - uncached).interval())
        corrected.append(paired_difference(METRICS["fid"], row - uncached))
    return plain, corrected


def true_frechet(size: Size, spread: float) -> float:
    """Of the law itself, at infinitely many samples."""
    return size.features * (spread - 1) ** 2


def set_differences(name: str, size: Size, spread: float, repeats: int, rng: Rng) -> list[Interval]:
    """A metric of features, computed as scoring does, against 300 real images."""
    metric, real = METRICS[name], Real(features(rng.normal(size=(300, size.features))))
    found = []
    for _ in range(repeats):
        sides = (Samples(features(x), None, None, {}, {}) for x in pair(size, spread, rng))
        row, uncached = (replicate(prepare(metric, side, Reference(real)), size.batches) for side in sides)
        found.append(paired_difference(metric, row - uncached))
    return found


def features(pooled: Array) -> Features:
    """Features with nothing else; logits are the first ten."""
    values = torch.from_numpy(pooled).float()
    return Features(values, values, 3 * values[:, :10])


# --- means and shares


def mean_differences(size: Size, difference: float, repeats: int, rng: Rng) -> list[Interval]:
    """A mean over samples (MAE, CLIP score), a part of it shared by a batch; `difference` in standard deviations."""
    found = []
    for _ in range(repeats):
        shared = [np.full(len(group), 0.3 * rng.normal()) for group in size.batches]
        found.append(paired(METRICS["mae"], difference + rng.normal(size=size.samples) + np.concatenate(shared), size))
    return found


def share_differences(size: Size, lost: float, gained: float, repeats: int, rng: Rng) -> list[Interval]:
    """A share of samples (accuracy, alignment): so many are right on one side alone."""
    draws = rng.random((repeats, size.samples))
    changes = (draws < gained).astype(float) - (draws > 1 - lost)
    return [paired(METRICS["accuracy"], each, size) for each in changes]


def shares(size: Size, share: float, repeats: int, rng: Rng) -> list[Interval]:
    """A row's own share."""
    found = []
    for right in rng.random((repeats, size.samples)) < share:
        interval = replicate(mean_of(right), size.batches).interval()
        found.append(share_interval(interval.value, interval.se, interval.dof, size.samples))
    return found


def mean_of(values: NDArray[Any]) -> Statistic:
    """The mean of those that are kept."""
    return lambda kept: float(values[kept].mean())


def paired(metric: Metric, differences: Array, size: Size) -> Interval:
    """What the project makes of a difference per sample."""
    return paired_difference(metric, replicate(mean_of(differences), size.batches))


# --- all of it


def simulate(effort: float = 1.0, sizes: Sequence[Size] = SIZES) -> Iterator[Result]:
    """Every comparison at every size; `effort` scales the number of repeats."""
    rng = np.random.default_rng(0)
    many, few = int(effort * 1000), int(effort * 200)
    for size in sizes:
        for spread in (0.98 if size.samples > 1000 else 0.9, 1.0):
            truth = true_frechet(size, spread)
            plain, corrected = frechet_differences(size, spread, few, rng)
            name = f"FID, samples spread {spread:g} times as far"
            yield summary(size, f"{name}, as measured", truth, plain)
            yield summary(size, f"{name}, bias taken out", truth, corrected)
        for metric in ("kid", "is", "precision", "recall") if 50 < size.samples < 1000 else ():
            found = set_differences(metric, size, 1.0, few, rng)
            yield summary(size, f"{METRICS[metric].label}, no difference", 0.0, found)
        for difference in (0.0, 0.5):
            found = mean_differences(size, difference, many, rng)
            yield summary(
                size, f"mean over samples, difference of {difference:g} standard deviations", difference, found
            )
        for lost, gained in ((0.02, 0.02), (0.2, 0.02)):
            found = share_differences(size, lost, gained, many, rng)
            yield summary(size, f"share of samples, {lost:.0%} lost and {gained:.0%} gained", gained - lost, found)
        yield summary(size, ROWS_OWN, 0.95, shares(size, 0.95, many, rng))


def table(results: Iterator[Result]) -> str:
    """Markdown."""
    lines = [
        "| size | comparison | true | mean | wrong sign | coverage | power | repeats |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for found in results:
        power = "—" if np.isnan(found.power) or found.what == ROWS_OWN else f"{found.power:.0%}"
        wrong = "—" if found.what == ROWS_OWN else f"{found.wrong_sign:.1%}"
        what = found.what + ("" if found.tested else " (not tested)")
        numbers = f"{found.truth:.3g} | {found.mean:.3g} | {wrong} | {found.coverage:.0%} | {power} | {found.repeats}"
        lines.append(f"| {found.size} | {what} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    text = table(simulate())
    if not parser.parse_args().write:
        print(text)
        return
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
