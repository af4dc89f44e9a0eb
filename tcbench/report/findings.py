"""What is found about a claim: verdict words, and how comparisons, or numbers without intervals, become a verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tcbench.metrics.catalogue import METRICS
from tcbench.report.cells import difference_text
from tcbench.report.compare import (
    BETTER,
    WORSE,
    Comparison,
    Margins,
    compare,
    decide_together,
    too_few,
)
from tcbench.report.rows import Row, mac_ratio, name_of, quality_of, reference_of

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_DECIDED, NOT_TESTED = "not decided", "not tested"
CONTROL = {
    REPRODUCED: "control: better",
    NOT_REPRODUCED: "control: worse",
    NOT_DECIDED: "control: not decided",
    NOT_TESTED: NOT_TESTED,
}
"""What a verdict reads in a measure that the claim does not speak of (`is_control`)."""


@dataclass(frozen=True)
class Finding:
    """One measure of a claim.

    Attributes:
        measure: a metric, or the rule that numbers have to meet.
        verdict: one of the words above.
        evidence: the numbers that it rests on, or what a test would need.
    """

    measure: str
    verdict: str
    evidence: str


def untested(needs: str, measure: str = "") -> Finding:
    """What is said of a measure whose results are not there."""
    return Finding(measure, NOT_TESTED, f"needs {needs}")


def metrics_lacking(metrics: Sequence[str]) -> Finding:
    """What is said where the suite has none of these metrics."""
    return untested(f"{' or '.join(METRICS[metric].label for metric in metrics)} among the suite's metrics")


def superiority(comparisons: Sequence[Comparison]) -> str:
    """The verdict on "better than each of these".

    Reproduced if each by itself comes out better, which needs no correction: it takes a false "better" of every wrong
    one (an intersection-union test; Berger, Technometrics 24, 1982). Not reproduced if any comes out worse, which has
    as many chances to be an accident as there are comparisons, and is corrected for them (Holm).
    """
    if any(comparison.outcome == WORSE for comparison in decide_together(comparisons)):
        return NOT_REPRODUCED
    return REPRODUCED if {comparison.outcome for comparison in comparisons} == {BETTER} else NOT_DECIDED


def no_loss(comparison: Comparison) -> str:
    """The verdict on "not worse than": the whole interval of the loss lies below the margin, or above it."""
    if comparison.margin is None or not comparison.interval.has_spread:
        return NOT_DECIDED
    sign = METRICS[comparison.metric].sign
    low, high = sorted((-sign * comparison.interval.low, -sign * comparison.interval.high))
    if high < comparison.margin:
        return REPRODUCED
    return NOT_REPRODUCED if low >= comparison.margin else NOT_DECIDED


def better(pairs: Sequence[tuple[Row, Row]], metrics: Sequence[str], needs: str, absent: str = "") -> list[Finding]:
    """Is the first of every pair better than the second? A finding per metric.

    Args:
        pairs: the comparisons of a metric; a claim holds if all come out better.
        metrics: those that the suite lacks are left out; what repeats one with another network comes behind it.
        needs: what is said to be needed if there is no pair.
        absent: rivals of the claim without a row to compare with; while there are any, it is not reproduced.
    """
    if not pairs:
        return [untested(needs)]
    rows, findings = [row for pair in pairs for row in pair], []
    for metric in _repeated(metrics):
        label = METRICS[metric].label
        decided = [found for pair in pairs if (found := compare(*pair, metric))]
        if decided:
            verdict, evidence = superiority(decided), told(rows, decided)
            if absent:
                verdict = NOT_DECIDED if verdict == REPRODUCED else verdict
                evidence += f"; not compared: {absent}"
            findings.append(Finding(label, _worded(verdict, metric), evidence))
        elif reason := _why_not(pairs[0], metric):
            findings.append(Finding(label, NOT_TESTED, reason))
    return findings or [metrics_lacking(metrics)]


def is_control(metric: str) -> bool:
    """Whether the paper claims nothing in a metric: a distance to the uncached samples, or another network's view."""
    return METRICS[metric].distance or bool(METRICS[metric].repeats)


def _worded(verdict: str, metric: str) -> str:
    return CONTROL[verdict] if is_control(metric) else verdict


def _repeated(metrics: Sequence[str]) -> list[str]:
    """Behind each metric those that repeat it with another network."""
    repeats = {metric: [name for name, other in METRICS.items() if other.repeats == metric] for metric in metrics}
    return [name for metric in metrics for name in (metric, *repeats[metric])]


def _why_not(pair: tuple[Row, Row], metric: str) -> str:
    """Why rows that might be compared in a metric are not; empty if the suite does not have it."""
    if reason := pair[0]["metrics_not_run"].get(metric):
        return reason
    scored = all(quality_of(row, metric) for row in pair)
    return f"needs {needed}" if scored and (needed := too_few(pair, (metric,))) else ""


def hardly_worse(row: Row, other: Row, metrics: Sequence[str], rows: Sequence[Row], margins: Margins) -> list[Finding]:
    """Is a row worse than another by less than the margin? A finding per metric that both have, so there may be none.

    Args:
        rows: those among which the row's reference is, to which its MAC ratio is taken.
    """
    findings = []
    against = "uncached" if other is reference_of(row, rows) else name_of(other)
    for metric in _repeated(metrics):
        label = METRICS[metric].label
        found = compare(row, other, metric, margins)
        if found is None:
            if reason := _why_not((row, other), metric):
                findings.append(Finding(label, NOT_TESTED, reason))
            continue
        if found.margin is None:
            findings.append(Finding(label, NOT_TESTED, "needs a margin: fewer steps lose nothing that shows"))
            continue
        evidence = (
            f"NFE {row['nfe']} − {against}: {difference_text(found.interval)}; margin {found.margin:.2g}, "
            f"MAC ratio {mac_ratio(row, rows):.2f}"
        )
        findings.append(Finding(label, _worded(no_loss(found), metric), evidence))
    return findings


def meets(numbers: Mapping[str, float], criterion: Callable[[float], bool], form: str, rule: str) -> Finding:
    """A claim about numbers that carry no interval: it holds where every number meets the criterion.

    Args:
        numbers: by what each is of.
        form: how a number is printed.
        rule: the criterion in words.
    """
    holds = [criterion(value) for value in numbers.values()]
    verdict = REPRODUCED if all(holds) else NOT_REPRODUCED if not any(holds) else NOT_DECIDED
    return Finding(rule, verdict, "; ".join(f"{name}: {value:{form}}" for name, value in numbers.items()))


def told(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """Comparisons of these rows in words: how many came out how, then each difference with its interval."""
    outcomes = [_in_words(comparison) for comparison in comparisons]
    counts = {name: outcomes.count(name) for name in (BETTER, NOT_DECIDED, WORSE) if name in outcomes}
    unpaired = sum(not comparison.paired for comparison in comparisons)
    how = "paired" if not unpaired else "unpaired" if unpaired == len(comparisons) else f"{unpaired} unpaired"
    by_name = {row["row"]: row for row in rows}
    parts, last_nfe = [], None
    for comparison in comparisons:
        ours, theirs = by_name[comparison.row], by_name[comparison.other]
        at = f"NFE {ours['nfe']} less " if ours["nfe"] != last_nfe else ""
        last_nfe = ours["nfe"]
        outcome = f" {_in_words(comparison)}" if len(counts) > 1 else ""
        parts.append(f"{at}{name_of(theirs)} {difference_text(comparison.interval)}{outcome}")
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{summary} of {len(comparisons)} ({how}): {'; '.join(parts)}"


def _in_words(comparison: Comparison) -> str:
    return comparison.outcome if comparison.outcome in (BETTER, WORSE) else NOT_DECIDED
