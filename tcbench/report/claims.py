"""The paper's checkable claims as data, each with the test that decides it.

A claim is tested in one or more measures. The paper's own metric comes first; the distance to the uncached samples,
which separates methods with far fewer samples, is a measure of its own wherever it bears on the claim. Comparisons that
decide a measure together are corrected together (Holm).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tcbench.metrics.catalogue import METRICS
from tcbench.report.compare import (
    NOT_DISTINGUISHABLE,
    NOT_REPRODUCED,
    NOT_TESTED,
    REPRODUCED,
    Comparison,
    compare,
    decide_together,
    no_loss,
    superiority,
)
from tcbench.report.scores import Results, Row, kept_shares, mac_ratio, name_of, quality_of, reference_of
from tcbench.report.tables import interval_text
from tcbench.stats import welch

MATCHED = 0.05
"""MACs within this share of each other are matched acceleration."""
MARGIN = 0.05
""""Without loss" allows this share of the uncached value; the paper's 250-step row loses 1.2 % of Precision at most."""
CLIP = ("clip_score", "digits_clip_score", "alignment")
"""Agreement of image and caption: the paper's metric, and what stands in for it on suites of digits."""
SELECTORS = ("random_tokens", "toca_tokens", "tome")


@dataclass(frozen=True)
class Finding:
    """One measure of a claim: the verdict and what it rests on."""

    measure: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Claim:
    """Something the paper says that results can bear out or not.

    Attributes:
        claim, place: what, and where in the paper.
        topic: heading that groups claims.
        test: the findings of a suite.
        model, resolution: only suites whose rows stand beside this model's (and resolution's) can test it; None: any.
    """

    topic: str
    claim: str
    place: str
    test: Callable[[Results], list[Finding]]
    model: str | None = None
    resolution: int | None = None


def untested(needs: str, measure: str = "") -> Finding:
    """What is said of a measure whose results are not there."""
    return Finding(measure, NOT_TESTED, f"needs {needs}")


def _tokencache(results: Results, nfes: Sequence[int] | None = None) -> list[Row]:
    """TokenCache's rows in the paper's place: one per NFE, no variant."""
    rows: dict[int, Row] = {}
    for row in results.rows:
        if row["method"] == "tokencache" and not row["control"] and (nfes is None or row["nfe"] in nfes):
            rows.setdefault(row["nfe"], row)
    return list(rows.values())


def _macs(row: Row) -> float:
    return row["macs"]["per_sample"]


def _refiners(row: Row) -> bool | str:
    return row.get("refiners", True)


def _told(results: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """Comparisons in words: how many came out how, then each difference with its interval."""
    rows = {row["row"]: row for row in results}
    counts = {outcome: sum(c.outcome == outcome for c in comparisons) for outcome in ("better", "≈", "worse")}
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    unpaired = sum(not c.paired for c in comparisons)
    how = "paired" if not unpaired else "unpaired" if unpaired == len(comparisons) else f"{unpaired} unpaired"
    parts, nfe = [], None
    for c in comparisons:
        at = f"NFE {rows[c.row]['nfe']} less " if rows[c.row]["nfe"] != nfe else ""
        nfe = rows[c.row]["nfe"]
        interval = interval_text(c.interval.value, c.interval.low, c.interval.high)
        parts.append(
            f"{at}{name_of(rows[c.other])} {interval}"
            + (f" {c.outcome}" if max(counts.values()) < len(comparisons) else "")
        )
    return f"{summary} of {len(comparisons)} ({how}): " + "; ".join(parts)


def _superior(
    rows: Sequence[Row], pairs: Sequence[tuple[Row, Row]], metrics: Sequence[str], needs: str
) -> list[Finding]:
    """One finding per metric: is the first of every pair better than the second? `needs` is said without pairs."""
    findings = []
    for metric in metrics if pairs else ():
        decided = decide_together([compare(ours, theirs, metric) for ours, theirs in pairs])
        if decided:
            findings.append(Finding(METRICS[metric].label, superiority(decided), _told(rows, decided)))
        elif reason := pairs[0][0].get("metrics_not_run", {}).get(metric):
            findings.append(Finding(METRICS[metric].label, NOT_TESTED, reason))
    if findings:
        return findings
    return [untested(f"{' or '.join(METRICS[m].label for m in metrics)} among the suite's metrics" if pairs else needs)]


def _rivals(results: Results, ours: Row, methods: Sequence[str] | None = None) -> list[Row]:
    """Rows at the same NFE and matched MACs, with refiners as this one has them: of some methods, or of all that the
    paper's tables compare, which leaves out controls and what stands in the predictor's place alone (Table VI)."""
    return [
        row
        for row in results.rows
        if row["nfe"] == ours["nfe"]
        and (
            row["method"] in methods
            if methods
            else row["method"] not in ("uncached", "tokencache", *SELECTORS) and not row["control"]
        )
        and (methods is None or _refiners(row) == _refiners(ours))
        and not row.get("not_run")
        and abs(_macs(row) / _macs(ours) - 1) <= MATCHED
    ]


def _best_at_matched_macs(nfes: Sequence[int], metrics: Sequence[str]) -> Callable[[Results], list[Finding]]:
    def test(results: Results) -> list[Finding]:
        pairs = [(row, rival) for row in _tokencache(results, nfes) for rival in _rivals(results, row)]
        needs = f"rows at NFE {' or '.join(map(str, nfes))} with matched MACs"
        findings = _superior(results.rows, pairs, metrics, needs)
        won = any(finding.measure == METRICS["fid"].label and finding.verdict == REPRODUCED for finding in findings)
        return [*findings, *(_guidance_control(results) if won else [])]

    return test


def _three_times_without_loss(results: Results) -> list[Finding]:
    rows = _tokencache(results, (250,))
    if not rows:
        return [untested("rows at NFE 250")]
    return _no_loss(results.rows, rows[0], ("fid", "sfid", "is", "precision", "recall"))


def _no_loss(rows: Sequence[Row], row: Row, metrics: Sequence[str], other: Row | None = None) -> list[Finding]:
    """Is a row hardly worse than another one, the uncached if none is given?"""
    against, findings = other or reference_of(row, rows), []
    for metric in metrics:
        comparison = compare(row, against, metric)
        if comparison is None:
            continue
        value = against["quality"][metric]["value"]
        interval = interval_text(comparison.interval.value, comparison.interval.low, comparison.interval.high)
        findings.append(
            Finding(
                METRICS[metric].label,
                no_loss(comparison, value, MARGIN),
                f"NFE {row['nfe']} − {name_of(against) if other else 'uncached'}: {interval} on {value:.4g}; margin "
                f"{MARGIN:.0%}, MAC ratio {mac_ratio(row, rows):.2f}",
            )
        )
    return findings or [untested(f"{' or '.join(METRICS[m].label for m in metrics)} among the suite's metrics")]


def _little_loss_at_50(results: Results) -> list[Finding]:
    rows = _tokencache(results, (50,))
    metrics = ("fid", "is", "precision", "recall")
    return _no_loss(results.rows, rows[0], metrics) if rows else [untested("rows at NFE 50")]


def _no_collapse(results: Results) -> list[Finding]:
    """What a sample shows stays what it was asked for."""
    findings = []
    for row in _tokencache(results):
        found = _no_loss(results.rows, row, ("accuracy", *CLIP))
        findings += [f for f in found if f.verdict != NOT_TESTED]
    return findings or [untested("Accuracy or an agreement with captions among the suite's metrics")]


def _better_than_uncached(results: Results) -> list[Finding]:
    pairs = [(row, reference_of(row, results.rows)) for row in _tokencache(results, (20,))]
    findings = _superior(results.rows, pairs, ("fid", "is"), "rows at NFE 20")
    return [*findings, *_guidance_control(results)]


def _worse_than_fewer_steps(method: str, nfe: int) -> Callable[[Results], list[Finding]]:
    """The rival itself degrades: at matched MACs, taking fewer steps is better than it."""

    def test(results: Results) -> list[Finding]:
        rivals = [row for row in results.rows if row["method"] == method and row["nfe"] == nfe]
        fewer = [row for row in results.rows if row["method"] == "fewer_steps" and row["nfe"] == nfe]
        pairs = []
        for rival in rivals:
            off = {row["row"]: abs(_macs(row) / _macs(rival) - 1) for row in fewer}
            pairs += [(row, rival) for row in fewer if off[row["row"]] == min(off.values()) <= MATCHED]
        return _superior(results.rows, pairs, ("fid", "mae"), f"rows of {method} and fewer steps at NFE {nfe}")

    return test


def _guidance_control(results: Results) -> list[Finding]:
    """Does a lower FID survive a comparison of frontiers, every method at its best CFG scale?"""
    measure = "FID, each at its best CFG scale"
    sweep = [row for row in results.ablations.get("guidance", []) if quality_of(row, "fid")]
    best: dict[str, Row] = {}
    for row in sweep:
        if row["label"] not in best or row["quality"]["fid"]["value"] < best[row["label"]]["quality"]["fid"]["value"]:
            best[row["label"]] = row
    ours = next((row for row in best.values() if row["method"] == "tokencache"), None)
    if ours is None:
        return [untested("the ablation `guidance`", measure)]
    rivals = [row for row in best.values() if row is not ours]
    decided = decide_together([compare(ours, rival, "fid") for rival in rivals])
    scales = ", ".join(f"{label} at {row['guidance_scale']:g}" for label, row in best.items())
    return [Finding(measure, superiority(decided), f"{_told(sweep, decided)}. Best scales: {scales}")]


def _selection(results: Results) -> list[Finding]:
    """Table VI: against other selectors with the same I-steps and r, then at equal MACs, with and without LoRA."""
    ours = _tokencache(results)
    alike = [(row, other) for row in ours for other in results.rows
             if other["nfe"] == row["nfe"] and other["method"] in SELECTORS and _refiners(other) == _refiners(row)
             and other["settings"].get("num_full_steps") == row["settings"].get("num_full_steps")]  # fmt: skip
    findings = _named(
        _superior(results.rows, alike, ("fid", "mae"), "rows with other selectors"), ", equal I-steps and r"
    )
    plain = [row for row in results.rows if row["method"] == "tokencache" and _refiners(row) is False]
    for rows, lora in ((ours, "with LoRA"), (plain, "without LoRA")):
        for methods, what in ((SELECTORS, ""), (("no_tokens",), ", against no tokens")):
            pairs = [(row, rival) for row in rows for rival in _rivals(results, row, methods)]
            needs = f"rows {lora} of {' or '.join(methods)} at TokenCache's MACs"
            findings += _named(_superior(results.rows, pairs, ("fid", "mae"), needs), f", equal MACs, {lora}{what}")
    return findings


def _named(findings: Sequence[Finding], suffix: str) -> list[Finding]:
    """The same findings, their measures said more precisely."""
    return [replace(finding, measure=(finding.measure + suffix).removeprefix(", ")) for finding in findings]


def _lora(results: Results) -> list[Finding]:
    """Every row without its refiners' LoRA against the same row with it."""
    pairs = [(row, other) for row in _tokencache(results) for other in results.rows
             if other["method"] == row["method"] and other["nfe"] == row["nfe"] and _refiners(other) is False
             and other["settings"] == row["settings"]]  # fmt: skip
    return _superior(results.rows, pairs, ("fid", "mae"), "a TokenCache row with `refiners: false`")


def _within(results: Results, ablation: str, ours: str, others: Sequence[str], metrics: Sequence[str]) -> list[Finding]:
    """Is a variant of an ablation better than others of it, as far as these were run?"""
    if ablation not in results.ablations:
        return [untested(f"the ablation `{ablation}`")]
    variant, rivals = results.variant(ablation, ours), [results.variant(ablation, other) for other in others]
    pairs = [(variant, rival) for rival in rivals if variant and rival]
    absent = [key for key in (ours, *others) if results.variant(ablation, key) is None]
    return _superior(
        results.ablations[ablation],
        pairs,
        metrics,
        f"{'variants' if absent[1:] else 'variant'} {', '.join(absent)} of the ablation `{ablation}`",
    )


def _ablation(
    name: str, ours: str, others: Sequence[str], metrics: Sequence[str] = ("fid", "mae")
) -> Callable[[Results], list[Finding]]:
    return lambda results: _within(results, name, ours, others, metrics)


def _measured(rows: dict[str, float], criterion: Callable[[float], bool], form: str, rule: str) -> Finding:
    """A claim about numbers that carry no interval: it holds where every number meets the criterion."""
    holds = [criterion(value) for value in rows.values()]
    verdict = REPRODUCED if all(holds) else NOT_REPRODUCED if not any(holds) else NOT_DISTINGUISHABLE
    return Finding(rule, verdict, "; ".join(f"{name}: {value:{form}}" for name, value in rows.items()))


def _of_predictors(
    value: Callable[[dict[str, Any]], float], criterion: Callable[[float], bool], form: str, rule: str
) -> Callable[[Results], list[Finding]]:
    """A statistic of the trained predictor's scores, one per NFE."""

    def test(results: Results) -> list[Finding]:
        if not results.predictors:
            return [untested("a trained predictor")]
        rows = {f"NFE {results.row(row)['nfe']}": value(log["scores"]) for row, log in results.predictors.items()}
        return [_measured(rows, criterion, form, rule)]

    return test


def _share_below(scores: dict[str, Any], threshold: float = 0.1) -> float:
    counts, edges = np.array(scores["histogram"]["counts"]), np.array(scores["histogram"]["edges"])
    return float(counts[edges[1:] <= threshold + 1e-9].sum() / counts.sum())


def _block_curves(scores: dict[str, Any]) -> float:
    """How much of the scores' spread over steps is not shared by the blocks: 0 if all blocks move as one."""
    alpha_SL = np.array(scores["per_block"])
    own_SL = alpha_SL - alpha_SL.mean(1, keepdims=True)
    return float((own_SL - own_SL.mean(0)).std() / (alpha_SL - alpha_SL.mean(0)).std())


def _of_diagnostics(
    value: Callable[[dict[str, Any]], float | None], criterion: Callable[[float], bool], form: str, rule: str
) -> Callable[[Results], list[Finding]]:
    def test(results: Results) -> list[Finding]:
        numbers = {f"NFE {results.row(row)['nfe']}": value(log) for row, log in results.diagnostics.items()}
        known = {name: number for name, number in numbers.items() if number is not None}
        return [_measured(known, criterion, form, rule)] if known else [untested("the diagnostics", rule)]

    return test


def _smallest_deviation(results: Results) -> list[Finding]:
    """Fig. 10: TokenCache against ToCa, the mean over steps of both deviations.

    Deviations of one sample at different steps are taken as fully dependent, which errs on wide.
    """
    findings = []
    for key, name in (("x0", "predicted x0, mean over steps"), ("xt", "x_t, mean over steps")):
        decided, told = [], []
        for row in _tokencache(results):
            rival = next((r for r in results.rows if (r["method"], r["nfe"]) == ("toca", row["nfe"])), None)
            paths = [path for each in (row, rival) if each and (path := each.get("trajectory"))]
            if not rival or len(paths) < 2:
                continue
            count = results.suite.samples.traced
            (ours, se), (theirs, other_se) = (_mean_over_steps(each, key, count) for each in paths)
            interval = welch(ours, se, theirs, other_se, count - 1)
            decided.append(Comparison(row["row"], rival["row"], "mae", interval, False, interval.p_value))
            told.append(f"NFE {row['nfe']}: {ours:.4f} against {theirs:.4f}")
        if decided:
            findings.append(Finding(name, superiority(decide_together(decided)), "; ".join(told)))
    return findings or [untested("rows of TokenCache and ToCa with trajectories")]


def _mean_over_steps(trajectory: dict[str, Any], key: str, count: int) -> tuple[float, float]:
    mean, std = np.array(trajectory[f"{key}_mae_mean"]), np.array(trajectory[f"{key}_mae_std"])
    return float(mean.mean()), float(std.mean() / count**0.5)


def _mac_ratios(results: Results) -> list[Finding]:
    """The paper's speedups, which are MAC ratios without the predictor."""
    off = {}
    for row in _tokencache(results):
        if speedup := (row.get("paper") or {}).get("speedup"):
            reference = reference_of(row, results.rows)
            ratio = _macs(reference) / row["macs"]["per_sample_without_overheads"]
            off[f"NFE {row['nfe']} {ratio:.3f} for {speedup}"] = ratio / speedup - 1
    if not off:
        return [untested("rows with the paper's speedup")]
    return [_measured(off, lambda number: abs(number) <= 0.01, "+.1%", "MAC ratio without the predictor, within 1 %")]


def _charged_ratios(results: Results) -> list[Finding]:
    off = {}
    for row in _tokencache(results):
        if speedup := (row.get("paper") or {}).get("speedup"):
            ratio = mac_ratio(row, results.rows)
            off[f"NFE {row['nfe']} {ratio:.3f} for {speedup}"] = (ratio or 0) / speedup - 1
    rule = "MAC ratio with the predictor charged, within 1 %"
    return [_measured(off, lambda number: abs(number) <= 0.01, "+.1%", rule)] if off else []


def _acceleration(results: Results) -> list[Finding]:
    findings = _mac_ratios(results) + _charged_ratios(results)
    return [*findings, untested("the paper's model on a GPU (suite `speed`)", "measured latency")]


RATIOS = ("r0.9", "r0.8", "r0.7", "r0.6", "r0.5")


def _ratio_metric(best: str, *metrics: str) -> Callable[[Results], list[Finding]]:
    """Table VII: one cache ratio is the best of all that were run."""
    return _ablation("cache_ratio", best, [ratio for ratio in RATIOS if ratio != best], metrics)


def _ratio_small_drop(results: Results) -> list[Finding]:
    """Table VII: r = 0.9 against r = 0.8."""
    ours, other = (results.variant("cache_ratio", ratio) for ratio in ("r0.9", "r0.8"))
    if ours is None or other is None:
        return [untested("variants r0.9 and r0.8 of the ablation `cache_ratio`")]
    return _no_loss(results.ablations["cache_ratio"], ours, ("fid", "sfid"), other)


def _kept_at_all_ratios(results: Results) -> list[Finding]:
    findings = []
    for ratio in RATIOS:
        if row := results.variant("cache_ratio", ratio):
            found = _no_loss(results.ablations["cache_ratio"], row, ("fid", "is"))
            findings += [replace(f, measure=f"{f.measure}, r = {ratio[1:]}") for f in found if f.verdict != NOT_TESTED]
    return findings or [untested("the ablation `cache_ratio`")]


def _fewer_steps_degrade(results: Results) -> list[Finding]:
    """PixArt-α loses by taking fewer steps, which is where methods that take them all gain."""
    rows = [row for row in results.rows if row["method"] == "fewer_steps" and row["nfe"] == 20]
    pairs = [(reference_of(row, results.rows), row) for row in rows]
    return _superior(results.rows, pairs, ("fid", *CLIP), "rows of fewer steps at NFE 20")


def _highest_acceleration(results: Results) -> list[Finding]:
    """MACs carry no interval: ours is below those of every row of the paper's table or it is not."""
    numbers = {}
    for row in _tokencache(results):
        for other in results.rows:
            if other["nfe"] == row["nfe"] and other.get("paper") and other["method"] not in ("tokencache", "uncached"):
                numbers[f"{name_of(other)}, NFE {row['nfe']}"] = _macs(other) / _macs(row)
    rule = "MACs of the table's rows over TokenCache's, predictor charged, above 1"
    return [_measured(numbers, lambda ratio: ratio > 1, ".3f", rule)] if numbers else [untested("the table's rows")]


def _busiest_block(diagnostics: dict[str, Any]) -> float | None:
    """Tokens kept in the busiest block over the mean of blocks, at r = 0.7 (Fig. 8a)."""
    if "alpha" not in diagnostics:
        return None
    kept = [len(tokens) for tokens in diagnostics["alpha"]["kept_at_0.7"]["tokens"]]
    return max(kept) * len(kept) / sum(kept)


def _unevenness_over_steps(diagnostics: dict[str, Any]) -> float | None:
    """The largest change between neighbouring steps over the mean one, blocks pooled."""
    if "updates" not in diagnostics:
        return None
    change_S = 1 - np.array(diagnostics["updates"]["similarity"]).mean(1)
    return float(change_S.max() / change_S.mean())


def _reused_blocks(results: Results) -> list[Finding]:
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


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Class-conditional images (Table II)",
        "At matched acceleration TokenCache has the best FID and a higher IS than all compared methods.",
        "Sec. IV-C, Table II, 256×256",
        _best_at_matched_macs((250, 50, 20, 10), ("fid", "is", "mae")),
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "With 20 and 10 steps it beats fewer steps and all other methods at equal acceleration.",
        "Sec. IV-C, Table II",
        _best_at_matched_macs((20, 10), ("fid", "mae")),
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "3× acceleration at 250 steps without a reduction in performance.",
        "Sec. IV-C, Table II",
        _three_times_without_loss,
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "At 250 steps it surpasses both FORA and ToCa at the same acceleration.",
        "Sec. IV-C, Table II",
        _best_at_matched_macs((250,), ("fid", "is", "mae")),
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "2.4× acceleration at 50 steps at hardly any loss (FID 2.33 for 2.25).",
        "Table II",
        _little_loss_at_50,
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "At 20 steps TokenCache is better than the uncached model itself (FID 3.41 for 3.51, IS 232 for 223).",
        "Table II",
        _better_than_uncached,
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "FORA deteriorates with fewer sampling steps: at 50 it is far worse than taking fewer steps.",
        "Sec. IV-C, Table II",
        _worse_than_fewer_steps("fora", 50),
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "ToCa degrades with few steps: at 10 it is far worse than taking fewer steps.",
        "Sec. IV-C, Table II",
        _worse_than_fewer_steps("toca", 10),
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Class-conditional images (Table II)",
        "The same holds at 512×512.",
        "Sec. IV-C, Table II",
        _best_at_matched_macs((50, 20), ("fid", "is", "mae")),
        "DiT-XL/2",
        512,
    ),
    Claim(
        "Acceleration",
        "Speedups of Table II: 3.01, 2.40, 1.73 and 1.45 at 250, 50, 20 and 10 steps.",
        "Table II",
        _acceleration,
        "DiT-XL/2",
        256,
    ),
    Claim(
        "Acceleration",
        "Speedups of Tables III and IV: 1.95 at 256×256 and 20 steps, 1.97 at 1024×1024 and 50.",
        "Sec. IV-C, Tables III and IV",
        _acceleration,
        "PixArt-alpha",
    ),
    Claim("Acceleration", "Speedup of Table V: 2.31.", "Sec. IV-C, Table V", _acceleration, "Open-Sora-Plan"),
    Claim(
        "Text-to-image and text-to-video",
        "Best FID and CLIP score of all methods on PixArt-α at 256×256.",
        "Sec. IV-C, Table III",
        _best_at_matched_macs((20,), ("fid", *CLIP, "mae")),
        "PixArt-alpha",
        256,
    ),
    Claim(
        "Text-to-image and text-to-video",
        "Taking fewer steps degrades PixArt-α at 256×256 (12 of 20 steps: FID 43.67 for 40.00).",
        "Sec. IV-C, Table III",
        _fewer_steps_degrade,
        "PixArt-alpha",
        256,
    ),
    Claim(
        "Text-to-image and text-to-video",
        "Highest ImageReward and CLIP score of all methods on PixArt-α at 1024×1024.",
        "Sec. IV-C, Table IV",
        _best_at_matched_macs((50,), ("image_reward", *CLIP, "mae")),
        "PixArt-alpha",
        1024,
    ),
    Claim(
        "Text-to-image and text-to-video",
        "Higher VBench score than FORA and ToCa on Open-Sora-Plan.",
        "Sec. IV-C, Table V",
        _best_at_matched_macs((50,), ("vbench", "temporal_flickering", *CLIP, "mae")),
        "Open-Sora-Plan",
    ),
    Claim(
        "Text-to-image and text-to-video",
        "The highest speedup of all methods on Open-Sora-Plan.",
        "Sec. IV-C, Table V",
        _highest_acceleration,
        "Open-Sora-Plan",
    ),
    Claim(
        "Which tokens",
        "The Cache Predictor selects better than random tokens, ToCa's score and ToMe at similar cost.",
        "Sec. IV-D.1, Table VI (PixArt-α)",
        _selection,
    ),
    Claim(
        "Which tokens",
        "ToMe without a cache, merging tokens, leads to poor quality.",
        "Sec. IV-D.1",
        lambda results: [untested("a method that merges tokens; `tome` reuses them")],
    ),
    Claim(
        "Which tokens",
        "Quality stays stable without semantic collapse.",
        "Sec. IV-D.1",
        _no_collapse,
    ),
    Claim(
        "Which tokens",
        "Tokens differ in how much their updates change.",
        "Sec. III-B, Fig. 3(a, b)",
        _of_diagnostics(
            lambda log: log.get("share_of_change_in_top_tenth"),
            lambda share: share >= 0.2,
            ".0%",
            "the tenth of all tokens that change most holds at least twice its even share of the change",
        ),
    ),
    Claim(
        "Which tokens",
        "The score reflects how much a token's update changes between steps.",
        "Sec. III-C, Eq. (11)",
        _of_diagnostics(
            lambda log: float(np.mean(log["rank_correlation_per_block"])),
            lambda number: number >= 0.5,
            ".2f",
            "rank correlation of score and change over tokens, mean over blocks, at least .5",
        ),
    ),
    Claim(
        "Which tokens",
        "Scores are sparse.",
        "Sec. IV-D.1, Fig. 8(b, c)",
        _of_predictors(_share_below, lambda share: share >= 0.5, ".0%", "at least half of all scores below .1"),
    ),
    Claim(
        "Which tokens",
        "Scores follow the same trend in different batches at the same timestep.",
        "Sec. IV-D.1, Fig. 8(d)",
        _of_predictors(
            lambda scores: scores["std_over_samples"] / scores["std_over_steps"],
            lambda ratio: ratio <= 0.25,
            ".2f",
            "spread over samples at most a quarter of the spread over steps",
        ),
    ),
    Claim(
        "Which blocks",
        "Each block follows a distinct trend over timesteps.",
        "Sec. IV-D.1, Fig. 8(e)",
        _of_predictors(
            _block_curves,
            lambda share: share >= 0.25,
            ".2f",
            "blocks' own movement at least a quarter of all movement over steps",
        ),
    ),
    Claim(
        "Which blocks",
        "Certain blocks cache more tokens than others.",
        "Sec. IV-D.1, Fig. 8(a)",
        _of_diagnostics(
            _busiest_block,
            lambda ratio: ratio >= 1.5,
            ".2f",
            "tokens recomputed in the busiest block over the mean of blocks at r = 0.7, at least 1.5",
        ),
    ),
    Claim(
        "Which blocks",
        "Some blocks are reused almost wholly throughout denoising.",
        "Sec. IV-D.2, Fig. 9(b)",
        _reused_blocks,
    ),
    Claim(
        "Which blocks",
        "Adaptive allocation of tokens to blocks beats the same number for every block.",
        "Sec. III-D, Eq. (12)",
        _ablation("allocation", "batch", ["uniform"]),
    ),
    Claim(
        "Which timesteps",
        "Token updates are similar at neighbouring timesteps.",
        "Sec. III-B, Fig. 3(c, d)",
        _of_diagnostics(
            lambda log: float(np.median(log["updates"]["similarity"])) if "updates" in log else None,
            lambda number: number >= 0.9,
            ".2f",
            "median cosine similarity of a block's updates at consecutive steps at least .9",
        ),
    ),
    Claim(
        "Which timesteps",
        "Token updates change unevenly over timesteps.",
        "Sec. III-B, Fig. 3(a, b)",
        _of_diagnostics(
            _unevenness_over_steps,
            lambda ratio: ratio >= 2,
            ".2f",
            "largest change between neighbouring steps over the mean one, at least 2",
        ),
    ),
    Claim(
        "Which timesteps",
        "I-steps chosen by the scores beat I-steps chosen by local errors.",
        "Sec. III-D",
        lambda results: [untested("a schedule from local errors, which no method here has")],
    ),
    Claim(
        "Which timesteps",
        "The adaptive schedule beats uniform and reversed ones.",
        "Sec. IV-D.3, Table VIII",
        _ablation("schedule", "adaptive", ["uniform", "reversed"], ("fid", "sfid", "is", "mae")),
    ),
    Claim(
        "Cache ratio",
        "r = 0.8 has the lowest FID and sFID of r = 0.5 to 0.9.",
        "Sec. IV-D.2, Table VII, Fig. 9(a)",
        _ratio_metric("r0.8", "fid", "sfid"),
    ),
    Claim(
        "Cache ratio",
        "r = 0.9 has the highest Precision.",
        "Sec. IV-D.2, Table VII",
        _ratio_metric("r0.9", "precision"),
    ),
    Claim(
        "Cache ratio",
        "r = 0.9 is only a small drop from r = 0.8.",
        "Sec. IV-D.2, Table VII",
        _ratio_small_drop,
    ),
    Claim(
        "Cache ratio",
        "Ratios below 0.8 degrade IS and Precision.",
        "Sec. IV-D.2, Table VII",
        _ablation("cache_ratio", "r0.8", ["r0.7", "r0.6", "r0.5"], ("is", "precision")),
    ),
    Claim(
        "Cache ratio",
        "Generation quality is maintained at all tested ratios.",
        "Sec. IV-D.2",
        _kept_at_all_ratios,
    ),
    Claim(
        "Cache ratio",
        "Reusing less than r = 0.8 does not help: FID and sFID do not improve with more recomputed tokens.",
        "Sec. IV-D.2, Fig. 9(a)",
        _ablation("cache_ratio", "r0.8", ["r0.5"], ("fid", "sfid", "is", "mae")),
    ),
    Claim(
        "Refiners",
        "Quality rises with the number K of refiner blocks; K = 4 is best.",
        "Sec. IV-D.4, Table IX",
        _ablation("refiner_blocks", "K4", ["K1", "K2", "K3"], ("fid", "is", "mae")),
    ),
    Claim(
        "Refiners",
        "LoRA on the refiner blocks improves quality.",
        "Sec. III-C, IV-D.4",
        _lora,
    ),
    Claim(
        "Deviation",
        "Smaller deviation from the uncached run than ToCa, in predicted x0 and in x_t.",
        "Sec. IV-E, Fig. 10",
        _smallest_deviation,
    ),
)
