"""What is found about a claim: verdict words, and how comparisons, or numbers without intervals, become a verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tcbench.metrics.catalogue import METRICS
from tcbench.report.cells import difference_text
from tcbench.report.compare import Comparison, compare, decide_together
from tcbench.report.rows import Row, mac_ratio, name_of, reference_of

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_DISTINGUISHABLE, NOT_TESTED = "not distinguishable", "not tested"
MARGIN = 0.05
""""Without loss" allows this share of the uncached value; the paper's 250-step row loses 1.2 % of Precision at most."""


@dataclass(frozen=True)
class Finding:
    """One measure of a claim.

    Attributes:
        measure: a metric, or the rule that numbers have to meet.
        verdict: one of the four words above.
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
    """The verdict on "better than each of these": all better; any worse; otherwise it cannot be told."""
    outcomes = [comparison.outcome for comparison in comparisons]
    if "worse" in outcomes:
        return NOT_REPRODUCED
    return REPRODUCED if set(outcomes) == {"better"} else NOT_DISTINGUISHABLE


def no_loss(comparison: Comparison, value: float, margin: float) -> str:
    """The verdict on "not worse than": the whole interval of the loss lies below `margin` times the other's value."""
    sign = METRICS[comparison.metric].sign
    low, high = sorted((-sign * comparison.interval.low, -sign * comparison.interval.high))
    if high < margin * abs(value):
        return REPRODUCED
    return NOT_REPRODUCED if low > 0 else NOT_DISTINGUISHABLE


def better(pairs: Sequence[tuple[Row, Row]], metrics: Sequence[str], needs: str) -> list[Finding]:
    """Is the first of every pair better than the second? A finding per metric.

    Args:
        pairs: the comparisons of a metric, which are corrected together.
        metrics: those that the suite lacks are left out.
        needs: what is said to be needed if there is no pair.
    """
    if not pairs:
        return [untested(needs)]
    rows, findings = [row for pair in pairs for row in pair], []
    for metric in metrics:
        decided = decide_together([compare(ours, theirs, metric) for ours, theirs in pairs])
        if decided:
            findings.append(Finding(METRICS[metric].label, superiority(decided), told(rows, decided)))
        elif reason := pairs[0][0]["metrics_not_run"].get(metric):
            findings.append(Finding(METRICS[metric].label, NOT_TESTED, reason))
    return findings or [metrics_lacking(metrics)]


def hardly_worse(row: Row, other: Row, metrics: Sequence[str], rows: Sequence[Row]) -> list[Finding]:
    """Is a row at most `MARGIN` worse than another? A finding per metric that both have, so there may be none.

    Args:
        rows: those among which the row's reference is, to which its MAC ratio is taken.
    """
    findings = []
    against = "uncached" if other is reference_of(row, rows) else name_of(other)
    for metric in metrics:
        if comparison := compare(row, other, metric):
            value = other["quality"][metric]["value"]
            evidence = (
                f"NFE {row['nfe']} − {against}: {difference_text(comparison.interval)} on {value:.4g}; "
                f"margin {MARGIN:.0%}, MAC ratio {mac_ratio(row, rows):.2f}"
            )
            findings.append(Finding(METRICS[metric].label, no_loss(comparison, value, MARGIN), evidence))
    return findings


def meets(numbers: Mapping[str, float], criterion: Callable[[float], bool], form: str, rule: str) -> Finding:
    """A claim about numbers that carry no interval: it holds where every number meets the criterion.

    Args:
        numbers: by what each is of.
        form: how a number is printed.
        rule: the criterion in words.
    """
    holds = [criterion(value) for value in numbers.values()]
    verdict = REPRODUCED if all(holds) else NOT_REPRODUCED if not any(holds) else NOT_DISTINGUISHABLE
    return Finding(rule, verdict, "; ".join(f"{name}: {value:{form}}" for name, value in numbers.items()))


def told(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """Comparisons of these rows in words: how many came out how, then each difference with its interval."""
    outcomes = [comparison.outcome for comparison in comparisons]
    counts = {outcome: outcomes.count(outcome) for outcome in ("better", "≈", "worse") if outcome in outcomes}
    unpaired = sum(not comparison.paired for comparison in comparisons)
    how = "paired" if not unpaired else "unpaired" if unpaired == len(comparisons) else f"{unpaired} unpaired"
    by_name = {row["row"]: row for row in rows}
    parts, last_nfe = [], None
    for comparison in comparisons:
        ours, theirs = by_name[comparison.row], by_name[comparison.other]
        at = f"NFE {ours['nfe']} less " if ours["nfe"] != last_nfe else ""
        last_nfe = ours["nfe"]
        outcome = f" {comparison.outcome}" if len(counts) > 1 else ""
        parts.append(f"{at}{name_of(theirs)} {difference_text(comparison.interval)}{outcome}")
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{summary} of {len(comparisons)} ({how}): {'; '.join(parts)}"
