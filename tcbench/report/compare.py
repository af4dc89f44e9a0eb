"""Differences between two rows: paired where they can be, tested for a difference and for being equivalent.

**Families.** Comparisons that are read together are corrected together (Holm): those of one metric at one number of
steps, over the rows that the suite's tables list. A row that somebody adds is corrected with all of these, and none of
these with it, so that adding a row changes no mark of the others.

**Equivalent** means inside a margin. Metrics whose unit says what matters have one of their own (`Metric.margin`); for
others it is a share of what the uncached model loses by taking fewer steps. A metric in which fewer steps lose nothing
that can be told has none: it cannot tell a small loss from a large one.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tcbench.metrics.catalogue import METRICS
from tcbench.metrics.inference import USABLE, independent_difference, paired_difference, samples_needed
from tcbench.report.rows import Row, interval_of, is_reference, reference_of, replicates_of, sampled, was_run
from tcbench.stats import Interval, holm

LEVEL = 0.05
"""Of every test, after Holm's correction over its family."""
MARGIN = 0.25
"""What is equivalent, as a share of what the row of fewest steps loses against the uncached one."""
MARGIN_RULE = f"{MARGIN:g} of what the fewest steps lose; of shares that are right, .05"
"""The rule in words."""
BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "?"

Margins = Mapping[tuple[str, int], float]
"""By metric and NFE, the difference below which two rows are equivalent."""


@dataclass(frozen=True)
class Comparison:
    """One row against another in one metric.

    Attributes:
        row, other: row ids.
        metric: a name in the catalogue.
        nfe: of the row.
        interval: this row less the other.
        paired: same noise, labels and batches on both sides, so that what they share cancelled.
        margin: what is equivalent; None if the metric has no margin there.
        p: two-sided, of no difference; adjusted if it was decided in a family.
        p_equivalent: of a difference of the margin or more, likewise; 1 without a margin.
    """

    row: str
    other: str
    metric: str
    nfe: int
    interval: Interval
    paired: bool
    margin: float | None
    p: float
    p_equivalent: float

    @property
    def outcome(self) -> str:
        """The mark: `better` or `worse` if they differ; else `equivalent` if that is shown; else `?`, not decided."""
        if self.p <= LEVEL:
            return BETTER if self.interval.value * METRICS[self.metric].sign > 0 else WORSE
        return EQUIVALENT if self.p_equivalent <= LEVEL else UNDECIDED


def comparison(
    row: Row, other: Row, metric: str, interval: Interval, paired: bool, margins: Margins | None = None
) -> Comparison:
    """A comparison whose difference is known, with its p-values before any correction."""
    margin = (margins or {}).get((metric, row["nfe"]))
    p_equivalent = 1.0 if margin is None else interval.p_equivalent(margin)
    names = row["row"], other["row"], metric, row["nfe"]
    return Comparison(*names, interval, paired, margin, interval.p_value, p_equivalent)


def compare(row: Row, other: Row, metric: str, margins: Margins | None = None) -> Comparison | None:
    """`row` less `other`; None if either lacks the metric, or has too few samples for it (`too_few`).

    Paired by the jackknife's stored replicates where both rows hold them for the same batches; otherwise the two are
    taken as independent, which errs on wide.
    """
    quality = METRICS[metric]
    value, other_value = interval_of(row, metric), interval_of(other, metric)
    if value is None or other_value is None or too_few((row, other), (metric,)):
        return None
    ours, theirs = replicates_of(row, metric), replicates_of(other, metric)
    if ours and theirs and row["group_sizes"] == other["group_sizes"]:
        return comparison(row, other, metric, paired_difference(quality, ours - theirs), True, margins)
    if quality.moments:
        if ours is None or theirs is None:
            return None  # without replicates the bias cannot be taken out
        value, other_value = ours.interval(corrected=True), theirs.interval(corrected=True)
    interval = independent_difference(quality, value, other_value, (row["samples"], other["samples"]))
    return comparison(row, other, metric, interval, False, margins)


def too_few(rows: Iterable[Row], metrics: Iterable[str]) -> str:
    """What the rows lack for these metrics to be tested, as "128 samples for FID"; empty if nothing."""
    needed = {
        METRICS[metric].label: samples
        for row in rows
        for metric in metrics
        if was_run(row) and (samples := samples_needed(METRICS[metric], sampled(row)))
    }
    told = " and ".join(f"{samples} samples for {label}" for label, samples in needed.items())
    return told and f"{told} ({USABLE} per feature)"


def margins(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """What is equivalent in every metric at every NFE of these rows (module's text)."""
    found = {}
    for nfe in dict.fromkeys(row["nfe"] for row in rows):
        fewer = [row for row in rows if row["method"] == "fewer_steps" and row["nfe"] == nfe and was_run(row)]
        fewest = min(fewer, key=lambda row: row["sampled_steps"], default=None)
        for name, metric in METRICS.items():
            lost = fewest and _lost(fewest, reference_of(fewest, rows), name)
            if metric.margin is not None:
                found[name, nfe] = metric.margin
            elif lost and lost.p_value <= LEVEL:
                found[name, nfe] = MARGIN * abs(lost.value)
    return found


def _lost(fewest: Row, uncached: Row, metric: str) -> Interval | None:
    """What fewer steps change in a metric; a distance to the uncached samples is 0 for the uncached row."""
    if METRICS[metric].distance:
        return interval_of(fewest, metric) if METRICS[metric].better == "lower" else None
    compared = compare(fewest, uncached, metric)
    return compared.interval if compared else None


def against_references(rows: Sequence[Row], metrics: Iterable[str], margins: Margins) -> list[Comparison]:
    """Every row against its uncached one in these metrics, before any correction."""
    beside = [(row, reference_of(row, rows)) for row in rows if was_run(row) and not is_reference(row)]
    found = [compare(row, other, metric, margins) for metric in metrics for row, other in beside]
    return [comparison for comparison in found if comparison is not None]


def decide_together(comparisons: Sequence[Comparison | None]) -> list[Comparison]:
    """Those that exist, with both p-values adjusted over all of them (Holm).

    A comparison is wrongly called different or wrongly called equivalent, never both, so the two are not added up.
    """
    found = [comparison for comparison in comparisons if comparison is not None]
    adjusted = (holm([getattr(each, kind) for each in found]) for kind in ("p", "p_equivalent"))
    return [replace(each, p=p, p_equivalent=q) for each, p, q in zip(found, *adjusted, strict=True)]


def families(comparisons: Iterable[Comparison], own: Collection[str]) -> dict[tuple[str, int], list[Comparison]]:
    """Comparisons of the suite's own rows that are corrected together, by metric and NFE."""
    found: dict[tuple[str, int], list[Comparison]] = {}
    for each in comparisons:
        found.setdefault((each.metric, each.nfe), [])
        if each.row in own:
            found[each.metric, each.nfe].append(each)
    return found


def decide_in_families(comparisons: Sequence[Comparison], own: Collection[str]) -> list[Comparison]:
    """The same, with p-values adjusted: of own rows within their family, of another with the family and itself."""
    together = families(comparisons, own)
    decided = {(each.row, each.metric): each for family in together.values() for each in decide_together(family)}
    return [
        decided.get((each.row, each.metric)) or decide_together([*together[each.metric, each.nfe], each])[-1]
        for each in comparisons
    ]
