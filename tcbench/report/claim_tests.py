"""The tests that claims name. What takes arguments makes a test; a test says what it finds in a suite's results.

A claim is tested in one or more measures. The paper's own metric comes first; the distance to the uncached samples,
which separates methods with far fewer samples, is a control beside it wherever it bears on the claim. How comparisons
decide a measure is in `findings`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tcbench.metrics.catalogue import METRICS
from tcbench.report.compare import compare, comparison, margins, too_few
from tcbench.report.findings import (
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    better,
    hardly_worse,
    meets,
    metrics_lacking,
    superiority,
    told,
    untested,
)
from tcbench.report.log_statistics import Log
from tcbench.report.results import Results
from tcbench.report.rows import (
    Row,
    fewer_steps_matched,
    is_reference,
    kept_shares,
    macs_of,
    matched,
    name_of,
    paper_of,
    quality_of,
    reference_of,
    was_run,
)
from tcbench.stats import welch

Test = Callable[[Results], list[Finding]]
Criterion = Callable[[float], bool]

SELECTORS = ("random_tokens", "toca_tokens", "tome")
"""What stands in the predictor's place (Table VI)."""


# --- which rows are meant


def _tokencache(results: Results, nfes: Sequence[int] = ()) -> list[Row]:
    """TokenCache's rows in the paper's place: one per NFE, no variant; at all NFEs if none is given."""
    rows: dict[int, Row] = {}
    for row in results.rows:
        if row["method"] == "tokencache" and not row["control"] and was_run(row) and (not nfes or row["nfe"] in nfes):
            rows.setdefault(row["nfe"], row)
    return list(rows.values())


def _of_method(results: Results, method: str, nfe: int) -> list[Row]:
    return [row for row in results.rows if (row["method"], row["nfe"]) == (method, nfe) and was_run(row)]


def _rivals(ours: Row, results: Results, methods: Sequence[str]) -> list[Row]:
    """Rows of these methods at matched MACs; no controls."""
    return [row for row in matched(ours, results.rows) if row["method"] in methods and not row["control"]]


def _absent(methods: Sequence[str], pairs: Sequence[tuple[Row, Row]]) -> str:
    """Those of the methods that are no rival in any pair."""
    return ", ".join(method for method in methods if all(rival["method"] != method for _, rival in pairs))


# --- comparisons of quality


def best_at_matched_macs(nfes: Sequence[int], metrics: Sequence[str], rivals: Sequence[str]) -> Test:
    """TokenCache against the methods that the claim names, at its MACs; a win in FID must survive the guidance control.

    Args:
        rivals: methods; one that has no row at matched MACs keeps the claim from being reproduced.
    """

    def test(results: Results) -> list[Finding]:
        pairs = [(row, rival) for row in _tokencache(results, nfes) for rival in _rivals(row, results, rivals)]
        needs = f"rows of {' or '.join(rivals)} at NFE {' or '.join(map(str, nfes))} with matched MACs"
        findings = better(pairs, metrics, needs, _absent(rivals, pairs))
        won = any(finding.measure == METRICS["fid"].label and finding.verdict == REPRODUCED for finding in findings)
        return [*findings, *(_guidance_control(results) if won else [])]

    return test


def better_than_uncached(nfe: int, metrics: Sequence[str]) -> Test:
    """TokenCache against the uncached model itself, with the control of guidance."""

    def test(results: Results) -> list[Finding]:
        pairs = [(row, reference_of(row, results.rows)) for row in _tokencache(results, (nfe,))]
        return [*better(pairs, metrics, f"rows at NFE {nfe}"), *_guidance_control(results)]

    return test


def _guidance_control(results: Results) -> list[Finding]:
    """Does a lower FID survive a comparison of frontiers, every method at its best CFG scale?"""
    measure = "FID, each at its best CFG scale"
    sweep = [row for row in results.ablations.get("guidance", []) if quality_of(row, "fid")]
    best = {
        label: min((row for row in sweep if row["label"] == label), key=lambda row: row["quality"]["fid"]["value"])
        for label in dict.fromkeys(row["label"] for row in sweep)
    }
    ours = next((row for row in best.values() if row["method"] == "tokencache"), None)
    if ours is None:
        return [untested("the ablation `guidance`", measure)]
    compared = [compare(ours, rival, "fid") for rival in best.values() if rival is not ours]
    decided = [found for found in compared if found]
    if not decided:
        return [untested(too_few([ours], ["fid"]) or "rivals in the ablation `guidance`", measure)]
    scales = ", ".join(f"{label} at {row['guidance_scale']:g}" for label, row in best.items())
    return [Finding(measure, superiority(decided), f"{told(sweep, decided)}. Best scales: {scales}")]


def without_loss(nfe: int, metrics: Sequence[str]) -> Test:
    """TokenCache hardly worse than the uncached model."""

    def test(results: Results) -> list[Finding]:
        rows = _tokencache(results, (nfe,))
        if not rows:
            return [untested(f"rows at NFE {nfe}")]
        return _hardly_worse_than_uncached(rows, metrics, results.rows, results) or [metrics_lacking(metrics)]

    return test


def shows_what_was_asked(metrics: Sequence[str]) -> Test:
    """TokenCache hardly worse than the uncached model at any NFE, in what a sample shows."""

    def test(results: Results) -> list[Finding]:
        findings = _hardly_worse_than_uncached(_tokencache(results), metrics, results.rows, results)
        return findings or [untested("Accuracy or an agreement with captions among the suite's metrics")]

    return test


def _hardly_worse_than_uncached(
    ours: Sequence[Row], metrics: Sequence[str], rows: Sequence[Row], results: Results
) -> list[Finding]:
    """Of rows of the suite or of an ablation, `rows`; the margins are the suite's."""
    margin = margins(results.own_rows)
    return [finding for row in ours for finding in hardly_worse(row, reference_of(row, rows), metrics, rows, margin)]


def worse_than_fewer_steps(method: str, nfe: int) -> Test:
    """A rival itself degrades: at matched MACs, taking fewer steps is better than it."""

    def test(results: Results) -> list[Finding]:
        pairs = [
            (fewer, rival)
            for rival in _of_method(results, method, nfe)
            if (fewer := fewer_steps_matched(rival, results.rows))
        ]
        return better(pairs, ("fid", "mae"), f"rows of {method} and fewer steps at NFE {nfe}")

    return test


def fewer_steps_degrade(nfe: int, metrics: Sequence[str]) -> Test:
    """The model loses by taking fewer steps, which is where methods that take them all gain."""

    def test(results: Results) -> list[Finding]:
        pairs = [(reference_of(row, results.rows), row) for row in _of_method(results, "fewer_steps", nfe)]
        return better(pairs, metrics, f"rows of fewer steps at NFE {nfe}")

    return test


# --- tokens and refiners


def selects_better(results: Results) -> list[Finding]:
    """Table VI: against other selectors with the same I-steps and r, then at equal MACs, with and without LoRA."""
    ours = _tokencache(results)
    alike = [(row, other) for row in ours for other in results.rows if _selects_alike(row, other)]
    found = better(alike, ("fid", "mae"), "rows with other selectors", _absent(SELECTORS, alike))
    findings = _named(found, ", equal I-steps and r")
    plain = [row for row in results.rows if row["method"] == "tokencache" and _without_lora(row)]
    for rows, lora in ((ours, "with LoRA"), (plain, "without LoRA")):
        for methods, against in ((SELECTORS, ""), (("no_tokens",), ", against no tokens")):
            pairs = [
                (row, rival)
                for row in rows
                for rival in matched(row, results.rows)
                if rival["method"] in methods and rival["refiners"] == row["refiners"]
            ]
            needs = f"rows {lora} of {' or '.join(methods)} at TokenCache's MACs"
            found = better(pairs, ("fid", "mae"), needs, _absent(methods, pairs))
            findings += _named(found, f", equal MACs, {lora}{against}")
    return findings


def _selects_alike(row: Row, other: Row) -> bool:
    """Whether the other row differs from this one in nothing but which tokens it selects."""
    return (
        other["method"] in SELECTORS
        and (other["nfe"], other["refiners"]) == (row["nfe"], row["refiners"])
        and other["settings"].get("num_full_steps") == row["settings"].get("num_full_steps")
    )


def _without_lora(row: Row) -> bool:
    return row["refiners"] is False and was_run(row)


def _named(findings: Sequence[Finding], suffix: str) -> list[Finding]:
    """The same findings, their measures said more precisely."""
    return [replace(finding, measure=(finding.measure + suffix).removeprefix(", ")) for finding in findings]


def better_with_lora(results: Results) -> list[Finding]:
    """Every row against the same row without its refiners' LoRA."""
    pairs = [
        (row, plain)
        for row in _tokencache(results)
        for plain in _of_method(results, "tokencache", row["nfe"])
        if _without_lora(plain) and plain["settings"] == row["settings"]
    ]
    return better(pairs, ("fid", "mae"), "a TokenCache row with `refiners: false`")


# --- ablations


def best_variant(ablation: str, ours: str, others: Sequence[str], metrics: Sequence[str]) -> Test:
    """A variant of an ablation against others of it; while one was not run, the claim is not reproduced."""

    def test(results: Results) -> list[Finding]:
        if ablation not in results.ablations:
            return [untested(f"the ablation `{ablation}`")]
        variants = {key: results.variant(ablation, key) for key in (ours, *others)}
        variant = variants[ours]
        pairs = [(variant, rival) for key, rival in variants.items() if variant and rival and key != ours]
        absent = [key for key, row in variants.items() if row is None]
        needs = f"{'variants' if absent[1:] else 'variant'} {', '.join(absent)} of the ablation `{ablation}`"
        return better(pairs, metrics, needs, ", ".join(absent))

    return test


def best_schedule(metrics: Sequence[str]) -> Test:
    """Table VIII: Eq. (13) against its own gaps reversed and against every even spread that the ablation has.

    An even spread leaves a remainder somewhere, and where it lies decides more than the method does. So "better than
    uniform" means better than the best of several placements; of one alone, the claim is not reproduced.
    """

    def test(results: Results) -> list[Finding]:
        rows = [row for row in results.ablations.get("schedule", []) if was_run(row) and not is_reference(row)]
        by_kind = {kind: [row for row in rows if _places(row) == kind] for kind in ("adaptive", "even", "reversed")}
        pairs = [(ours, other) for ours in by_kind["adaptive"][:1] for other in by_kind["even"] + by_kind["reversed"]]
        absent = [*(["even spreads at other places"] if len(by_kind["even"]) < 2 else [])]
        absent += [] if by_kind["reversed"] else ["reversed"]
        return better(pairs, metrics, "the ablation `schedule`", ", ".join(absent))

    return test


def _places(row: Row) -> str | None:
    """By which rule a row's full steps are placed; None if they are listed one by one."""
    return None if row["settings"].get("full_steps") else row["settings"].get("schedule")


def small_drop(ablation: str, ours: str, other: str, metrics: Sequence[str]) -> Test:
    """A variant of an ablation hardly worse than another one."""

    def test(results: Results) -> list[Finding]:
        row, against = results.variant(ablation, ours), results.variant(ablation, other)
        if row is None or against is None:
            return [untested(f"variants {ours} and {other} of the ablation `{ablation}`")]
        findings = hardly_worse(row, against, metrics, results.ablations[ablation], margins(results.own_rows))
        return findings or [metrics_lacking(metrics)]

    return test


def without_loss_at_ratios(ratios: Sequence[float], metrics: Sequence[str]) -> Test:
    """Table VII: TokenCache hardly worse than the uncached model, whatever share of the tokens it reuses."""

    def test(results: Results) -> list[Finding]:
        findings = []
        for ratio in ratios:
            if row := results.variant("cache_ratio", f"r{ratio}"):
                found = _hardly_worse_than_uncached([row], metrics, results.ablations["cache_ratio"], results)
                findings += _named(found, f", r = {ratio}")
        return findings or [untested("the ablation `cache_ratio`")]

    return test


# --- numbers that carry no interval


def at_least(bound: float) -> Criterion:
    """Whether a number is no smaller."""
    return lambda number: number >= bound


def at_most(bound: float) -> Criterion:
    """Whether a number is no larger."""
    return lambda number: number <= bound


def predicted(statistic: Callable[[Log], float], criterion: Criterion, form: str, rule: str) -> Test:
    """A statistic of the trained predictor's scores, one per NFE (`log_statistics`); `form`, `rule` as of `meets`."""

    def test(results: Results) -> list[Finding]:
        scores = {row: log["scores"] for row, log in results.predictors.items()}
        numbers = {f"NFE {results.row(row)['nfe']}": statistic(log) for row, log in scores.items()}
        return [meets(numbers, criterion, form, rule) if numbers else untested("a trained predictor")]

    return test


def diagnosed(statistic: Callable[[Log], float], criterion: Criterion, form: str, rule: str) -> Test:
    """A statistic of the diagnostics, one per NFE (`log_statistics`); `form`, `rule` as of `meets`."""

    def test(results: Results) -> list[Finding]:
        numbers = {f"NFE {results.row(row)['nfe']}": statistic(log) for row, log in results.diagnostics.items()}
        return [meets(numbers, criterion, form, rule) if numbers else untested("the diagnostics", rule)]

    return test


def reused_blocks(results: Results) -> list[Finding]:
    """Fig. 9(b): blocks that keep few tokens at (nearly) every P-step."""
    row = results.variant("cache_ratio", "r0.7")
    rule = "blocks recomputing less than half of their even share of tokens at 9 of 10 P-steps"
    if row is None:
        return [untested("the ablation `cache_ratio`", rule)]
    kept_SL = kept_shares(row)
    partial = kept_SL[(kept_SL < 1).any(1)]
    often = (partial < 0.5 * partial.mean(1, keepdims=True)).mean(0) >= 0.9
    verdict = REPRODUCED if often.any() else NOT_REPRODUCED
    blocks = ", ".join(map(str, np.flatnonzero(often))) or "none"
    return [Finding(rule, verdict, f"r = 0.7, NFE {row['nfe']}: {blocks} of {kept_SL.shape[1]} blocks")]


def papers_speedups(results: Results) -> list[Finding]:
    """MAC ratios to the uncached model against the paper's, which are without the predictor."""
    without: dict[str, float] = {}
    charged: dict[str, float] = {}
    for row in _tokencache(results):
        if speedup := paper_of(row).get("speedup"):
            uncached = macs_of(reference_of(row, results.rows))
            for off, macs in ((without, row["macs"]["per_sample_without_overheads"]), (charged, macs_of(row))):
                off[f"NFE {row['nfe']} {uncached / macs:.3f} for {speedup}"] = uncached / macs / speedup - 1
    latency = untested("the paper's model on a GPU (suite `speed`)", "measured latency")
    if not without:
        return [untested("rows with the paper's speedup"), latency]
    return [
        meets(off, lambda number: abs(number) <= 0.01, "+.1%", f"MAC ratio {how}, within 1 %")
        for off, how in ((without, "without the predictor"), (charged, "with the predictor charged"))
    ] + [latency]


def highest_speedup(results: Results) -> list[Finding]:
    """MACs carry no interval: TokenCache's are below those of every row of the paper's table or they are not."""
    numbers = {}
    for row in _tokencache(results):
        for other in results.rows:
            in_table = other["nfe"] == row["nfe"] and paper_of(other) and was_run(other)
            if in_table and other["method"] not in ("tokencache", "uncached"):
                numbers[f"{name_of(other)}, NFE {row['nfe']}"] = macs_of(other) / macs_of(row)
    rule = "MACs of the table's rows over TokenCache's, predictor charged, above 1"
    return [meets(numbers, lambda ratio: ratio > 1, ".3f", rule) if numbers else untested("the table's rows")]


# --- deviation over steps


def smaller_deviation_than_toca(results: Results) -> list[Finding]:
    """Fig. 10: TokenCache against every ToCa row at its MACs, the mean over steps of both deviations.

    Deviations of one sample at different steps are taken as fully dependent, and those of the two rows as independent,
    which both err on wide.
    """
    findings = []
    samples = results.suite.samples.traced
    for quantity, name in (("x0", "predicted x0, mean over steps"), ("xt", "x_t, mean over steps")):
        compared, evidence = [], []
        for row in _tokencache(results):
            for rival in _rivals(row, results, ("toca",)):
                if row["trajectory"] and rival["trajectory"]:
                    ours, se = _mean_over_steps(row["trajectory"], quantity, samples)
                    theirs, other_se = _mean_over_steps(rival["trajectory"], quantity, samples)
                    interval = welch(ours, se, theirs, other_se, samples - 1)
                    compared.append(comparison(row, rival, "mae", interval, False))
                    evidence.append(f"NFE {row['nfe']}: {ours:.4f} against {theirs:.4f} of {name_of(rival)}")
        if compared:
            findings.append(Finding(name, superiority(compared), "; ".join(evidence)))
    return findings or [untested("rows of TokenCache and ToCa at matched MACs, with trajectories")]


def _mean_over_steps(trajectory: dict[str, Any], quantity: str, samples: int) -> tuple[float, float]:
    """(mean over steps of a deviation's mean over samples, its standard error)."""
    mean, std = np.array(trajectory[f"{quantity}_mae_mean"]), np.array(trajectory[f"{quantity}_mae_std"])
    return float(mean.mean()), float(std.mean() / samples**0.5)


def not_testable(needs: str) -> Test:
    """No suite has what a test would need."""
    return lambda results: [untested(needs)]
