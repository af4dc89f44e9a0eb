"""Comparisons and verdicts: pairing, correction, and what a claim makes of differences."""

import copy
from dataclasses import replace

import pytest
from scipy import stats as scipy_stats

from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.report import claims, verdicts
from tcbench.report.compare import Comparison, compare, decide_in_families, decide_together, margins
from tcbench.report.findings import (
    CONTROL,
    NOT_DECIDED,
    NOT_REPRODUCED,
    NOT_TESTED,
    REPRODUCED,
    no_loss,
    superiority,
)
from tcbench.report.results import Results
from tcbench.report.rows import kept_shares
from tcbench.stats import Interval

from .test_ablations import SMOKE
from .test_report import FLOOR, make_rows, spread


def with_replicates(row, values):
    row = copy.deepcopy(row)
    row["group_sizes"] = [64] * 8
    row["quality"]["fid"] |= {"value": sum(values) / 8, "deleted": values}
    return row


def comparison(value, half, metric="fid", p=0.01, margin=None, p_equivalent=1.0, row="a"):
    interval = Interval(value, value - half, value + half, half / 2, 7)
    return Comparison(row, "b", metric, 20, interval, True, margin, p, p_equivalent)


def test_rows_on_the_same_batches_are_paired_and_their_shared_noise_cancels():
    first, second = make_rows()[1:3]
    noise = [3.0, 4.0, 2.0, 5.0, 3.0, 4.0, 2.0, 5.0]
    ours = with_replicates(first, noise)
    theirs = with_replicates(second, [value - 0.1 + 0.001 * group for group, value in enumerate(noise)])
    paired = compare(ours, theirs, "fid")
    assert paired.paired and paired.p < 1e-4
    theirs["quality"]["fid"]["deleted"] = theirs["quality"]["fid"]["deleted"][:4]
    theirs["group_sizes"] = [128] * 4  # other batches: nothing to pair
    unpaired = compare(ours, theirs, "fid")
    assert not unpaired.paired and unpaired.p > 0.05


def test_a_metric_that_was_not_run_compares_with_nothing():
    ours, theirs = make_rows()[1:3]
    del ours["quality"]["fid"]
    assert compare(ours, theirs, "fid") is None
    assert compare(ours, theirs, "vbench") is None


def test_comparisons_are_corrected_together():
    decided = decide_together([comparison(-1, 0.5, p=0.03), None, comparison(-1, 0.5, p=0.04)])
    assert [found.p for found in decided] == [0.06, 0.06]
    assert {found.outcome for found in decided} == {"?"}
    assert decide_together([comparison(-1, 0.5, p=0.03)])[0].outcome == "better"
    assert decide_together([comparison(-1, 0.5, "is", p=0.03)])[0].outcome == "worse"


def test_a_difference_that_is_not_shown_is_equivalent_only_where_that_is_shown():
    assert comparison(0.1, 0.5, p=0.5, p_equivalent=0.04).outcome == "equivalent"
    assert comparison(0.1, 0.5, p=0.5, p_equivalent=0.06).outcome == "?"
    assert comparison(0.1, 0.05, p=0.01, p_equivalent=0.01).outcome == "worse"
    decided = decide_together([comparison(0.1, 0.5, p=0.5, p_equivalent=0.03) for _ in range(2)])
    assert [found.outcome for found in decided] == ["?", "?"]


def test_a_row_that_is_added_is_corrected_with_the_others_and_not_they_with_it():
    own = [comparison(-1, 0.5, p=0.02, row="first"), comparison(-1, 0.5, p=0.04, row="second")]
    alone = decide_in_families(own, {"first", "second"})
    added = [comparison(-1, 0.5, p=0.015, row=name) for name in ("mine", "mine too")]
    decided = decide_in_families([added[0], *own, added[1]], {"first", "second"})
    assert decided[1:3] == alone and [found.outcome for found in alone] == ["better", "better"]
    assert [decided[0].p, decided[3].p] == pytest.approx([0.045, 0.045])


def test_families_are_of_one_metric_at_one_number_of_steps():
    rest = [comparison(-1, 0.5, "is", p=0.9), replace(comparison(-1, 0.5, p=0.9, row="c"), nfe=50)]
    assert [found.p for found in decide_in_families([comparison(-1, 0.5, p=0.03), *rest], "ac")] == [0.03, 0.9, 0.9]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([(-1, 0.01), (-2, 0.01)], REPRODUCED),
        ([(-1, 0.04), (-2, 0.04)], REPRODUCED),  # each by itself: no correction
        ([(-1, 0.01), (-2, 0.5)], NOT_DECIDED),
        ([(-1, 0.01), (2, 0.01)], NOT_REPRODUCED),
        ([(-1, 0.2), (2, 0.04)], NOT_DECIDED),  # worse, of two, at .08
        ([(2, 0.5)], NOT_DECIDED),
    ],
)
def test_superiority(values, verdict):
    assert superiority([comparison(value, 0.5, p=p) for value, p in values]) == verdict


@pytest.mark.parametrize(
    ("value", "half", "metric", "verdict"),
    [
        (0.1, 0.2, "fid", REPRODUCED),  # at most .3 worse
        (0.25, 0.2, "fid", REPRODUCED),  # worse, by less than the margin
        (0.4, 0.3, "fid", NOT_DECIDED),  # worse, by .1 to .7
        (0.2, 0.4, "fid", NOT_DECIDED),
        (0.8, 0.3, "fid", NOT_REPRODUCED),
        (-2, 1, "fid", REPRODUCED),
        (-2, 1, "is", NOT_REPRODUCED),
        (0, 0, "fid", NOT_DECIDED),  # no spread shows nothing
    ],
)
def test_no_loss_is_a_bound_not_a_missing_difference(value, half, metric, verdict):
    assert no_loss(comparison(value, half, metric, margin=0.5)) == verdict


def test_margins_are_a_share_of_what_the_fewest_steps_lose():
    rows = make_rows()
    found = margins(rows)
    assert found["fid", 50] == pytest.approx((4.1 - 3.234) / 4)
    assert found["mae", 20] == pytest.approx(0.017 / 4) and found["accuracy", 20] == 0.05
    assert ("is", 50) not in found, "fewer steps lose nothing that can be told"
    assert ("fid", 20) not in margins([row for row in rows if row["row"] != "nfe20-steps"])


def test_a_frechet_distance_of_few_samples_is_not_tested():
    ours, theirs = make_rows()[1:3]
    assert compare(ours, theirs, "fid").paired
    assert compare(ours | {"samples": 127}, theirs, "fid") is None  # 64 features
    assert compare(ours | {"samples": 127}, theirs, "is") is not None


def test_shares_that_agree_in_every_batch_are_not_equal_beyond_their_number():
    """19 of 24 on both sides bound a loss by 14 %, not by 0."""
    ours, theirs = make_rows()[1:3]
    for row, samples in ((ours, 24), (theirs, 24)):
        row |= {"samples": samples, "group_sizes": [3] * 8}
        row["quality"]["alignment"] = {"value": 19 / 24, "se": 0.0, "deleted": [19 / 24] * 8}
    found = compare(ours, theirs, "alignment", {("alignment", 50): 0.05})
    assert found.interval.high > 0.14 and (found.p, no_loss(found)) == (1, NOT_DECIDED)


@pytest.fixture
def results() -> Results:
    rows = make_rows()
    suite = load_suite(SMOKE)
    known = {"uncached", "fewer_steps", "fora", "toca", "tokencache", "random_tokens"}
    rows = [row for row in rows if row["method"] in known and "literal" not in row["row"]]
    for row in rows:
        row["macs"] = make_rows()[1]["macs"] if row["method"] != "uncached" else row["macs"]
    return Results(Suite.model_validate(suite.model_dump(by_alias=True)), rows, {}, {}, {}, None, FLOOR)


def all_claims():
    return [claim for under_a_heading in claims.CLAIMS.values() for claim in under_a_heading]


def found(results, words):
    (claim,) = [claim for claim in all_claims() if words in claim.words]
    return {finding.measure: finding for finding in claim.test(results)}


def test_a_method_far_from_the_uncached_samples_does_not_reproduce(results):
    findings = found(results, "At matched acceleration TokenCache has the best FID")
    assert findings["MAE to uncached"].verdict == "control: worse"
    assert "8 worse" not in findings["MAE to uncached"].evidence
    assert findings["FID"].verdict == NOT_DECIDED  # 2.5 against 4.1, 3.4 and 3.9, every interval .7 to either side
    assert findings["FID"].evidence.endswith("; not compared: learning_to_cache")
    router = {"row": "nfe20-l2c", "method": "learning_to_cache"}
    results.rows.append(next(row for row in results.rows if row["row"] == "nfe20-steps") | router)
    findings = found(results, "At matched acceleration TokenCache has the best FID")
    assert findings["FID"].verdict == REPRODUCED and "not compared" not in findings["FID"].evidence


def test_a_claim_about_rivals_is_decided_against_these_alone(results):
    beside = replace(results, rows=[row for row in results.rows if row["method"] not in ("fora", "toca")])
    (finding,) = found(beside, "Higher VBench score than FORA and ToCa").values()
    needs = "needs rows of fora or toca at NFE 50 with matched MACs"
    assert (finding.verdict, finding.evidence) == (NOT_TESTED, needs)


def test_no_loss_needs_a_margin_and_samples(results):
    findings = found(results, "2.4× acceleration at 50 steps")
    assert findings["IS"].verdict == NOT_TESTED and findings["IS"].evidence.startswith("needs a margin: fewer steps")
    assert findings["FID"].verdict == REPRODUCED and "margin 0.22" in findings["FID"].evidence
    for row in results.rows:
        row["samples"] = 96
    finding = found(results, "2.4× acceleration at 50 steps")["FID"]
    assert (finding.verdict, finding.evidence) == (NOT_TESTED, "needs 128 samples for FID (2 per feature)")


def test_what_was_not_run_is_said_to_need_it(results):
    (finding,) = found(results, "The adaptive schedule beats").values()
    assert (finding.verdict, finding.evidence) == (NOT_TESTED, "needs the ablation `schedule`")
    (finding,) = found(results, "3× acceleration at 250 steps").values()
    assert finding.evidence == "needs rows at NFE 250"


def test_an_ablation_without_the_variant_or_the_metric_says_so(results):
    ours = next(row for row in results.rows if row["method"] == "tokencache")
    results.ablations["cache_ratio"] = [ours | {"row": f"cache_ratio-r0.{ratio}"} for ratio in (9, 7)]
    (finding,) = found(results, "r = 0.8 has the lowest FID").values()
    assert finding.evidence == "needs variants r0.8, r0.6, r0.5 of the ablation `cache_ratio`"
    for row in results.ablations["cache_ratio"]:
        row["quality"] = {"fid": row["quality"]["fid"]}
    (finding,) = found(results, "r = 0.9 has the highest Precision").values()
    assert finding.evidence == "needs Precision among the suite's metrics"
    for row in results.ablations["cache_ratio"]:
        row["metrics_not_run"] = {"precision": "needs X"}
    (finding,) = found(results, "r = 0.9 has the highest Precision").values()
    assert (finding.measure, finding.verdict, finding.evidence) == ("Precision", NOT_TESTED, "needs X")


def test_beating_uniform_means_the_best_of_several_even_spreads(results):
    """The adaptive row beats the first even spread clearly, and ties with the second."""
    ours = next(row for row in results.rows if row["row"] == "nfe50-tokencache")

    def variant(name, value, schedule, **settings):
        copied = with_replicates(ours, [value + 0.01 * (-1) ** (group // 2) for group in range(8)])
        return copied | {"row": f"schedule-{name}", "label": name, "settings": {"schedule": schedule} | settings}

    adaptive, reversed_gaps = variant("adaptive", 2.0, "adaptive"), variant("reversed", 4.0, "reversed")
    first, second = variant("uniform", 3.0, "even"), variant("end", 1.9, "even", placement="end")
    for row, pattern in zip((adaptive, reversed_gaps, first, second), (1, 3, 5, 6), strict=True):
        spread(row, "fid", 0.02, pattern)
    searched = variant("searched", 1.0, "even", full_steps=[0, 9])
    results.ablations["schedule"] = [adaptive, first, reversed_gaps, searched]
    finding = found(results, "The adaptive schedule beats")["FID"]
    assert finding.verdict == NOT_DECIDED and finding.evidence.endswith("; not compared: even spreads at other places")
    assert finding.evidence.startswith("2 better of 2")
    results.ablations["schedule"].append(second)
    assert found(results, "The adaptive schedule beats")["FID"].verdict == NOT_REPRODUCED
    second["quality"]["fid"] = first["quality"]["fid"]
    assert found(results, "The adaptive schedule beats")["FID"].verdict == REPRODUCED


def test_merging_is_poor_if_reusing_the_same_tokens_is_better_in_every_setting(results):
    words = "ToMe without a cache, merging tokens"
    (finding,) = found(results, words).values()
    assert (finding.verdict, finding.evidence) == (NOT_TESTED, "needs the ablation `merging`")
    ours = next(row for row in results.rows if row["row"] == "nfe50-tokencache")

    def variant(name, fid, pattern):
        row = copy.deepcopy(ours) | {"row": f"merging-{name}", "label": name}
        row["quality"]["fid"]["value"] = fid
        spread(row, "fid", 0.02, pattern)
        return row

    reused, merged, published = (
        variant("reused", 2.5, 1),
        variant("merged", 9.0, 3),
        variant("merged-attention", 4.0, 5),
    )
    results.ablations["merging"] = [reused, merged]
    finding = found(results, words)["FID"]
    assert finding.verdict == NOT_DECIDED and finding.evidence.endswith("; not compared: merged-attention")
    results.ablations["merging"] = [reused, merged, published]
    assert found(results, words)["FID"].verdict == REPRODUCED
    assert "MAE to uncached" in found(results, words)
    published["quality"]["fid"] = reused["quality"]["fid"]
    assert found(results, words)["FID"].verdict == NOT_DECIDED
    results.ablations["merging"][2] = variant("merged-attention", 1.5, 5)
    assert found(results, words)["FID"].verdict == NOT_REPRODUCED


def test_deviations_are_compared_with_the_toca_that_costs_as_much(results):
    """The published row is cheaper and nearer; the matched one is what TokenCache is held against."""
    toca = next(row for row in results.rows if row["row"] == "nfe50-toca")
    ours = next(row for row in results.rows if row["row"] == "nfe50-tokencache")

    def moved(factor):
        return {name: [factor * number for number in numbers] for name, numbers in ours["trajectory"].items()}

    far = toca | {"row": "nfe50-toca-matched", "label": "ToCa, matched", "trajectory": moved(9)}
    cheaper = ours["macs"] | {"per_sample": round(0.86 * ours["macs"]["per_sample"])}
    results.rows[results.rows.index(toca)] = toca | {"macs": cheaper, "trajectory": moved(0.1)}
    results.rows.append(far)
    results.rows[:] = [row for row in results.rows if row["nfe"] == 50]
    findings = found(results, "Smaller deviation from the uncached run than ToCa")
    assert {finding.verdict for finding in findings.values()} == {REPRODUCED}
    assert all("of ToCa, matched" in finding.evidence for finding in findings.values())
    results.rows.remove(far)
    (finding,) = found(results, "Smaller deviation from the uncached run than ToCa").values()
    assert finding.evidence == "needs rows of TokenCache and ToCa at matched MACs, with trajectories"


def test_rows_without_lora_are_compared_among_themselves(results):
    (ours,) = (row for row in results.rows if row["row"] == "nfe20-tokencache")
    (random,) = (row for row in results.rows if row["row"] == "nfe20-random")
    random["settings"] = ours["settings"]
    assert found(results, "LoRA on the refiner blocks")[""].evidence == "needs a TokenCache row with `refiners: false`"
    plain = [
        row | {"row": f"{row['row']}-plain", "label": f"{row['label']}, no LoRA", "refiners": False}
        for row in (ours, random)
    ]
    for row, pattern in zip(plain, (4, 6), strict=True):
        row["quality"] = {"fid": {"value": 9.0, "se": 0.05}}
        spread(row, "fid", 0.2, pattern)
    results.rows.extend(plain)
    findings = found(results, "The Cache Predictor selects better")
    assert "no LoRA" not in findings["FID, equal I-steps and r"].evidence
    assert findings["FID, equal MACs, with LoRA"].verdict == NOT_DECIDED  # 2.5 against 3.8, but of one selector
    assert findings["FID, equal MACs, with LoRA"].evidence.endswith("; not compared: toca_tokens, tome")
    assert findings["FID, equal MACs, without LoRA"].verdict == NOT_DECIDED  # 9 against 9
    assert findings["equal MACs, with LoRA, against no tokens"].evidence.startswith("needs rows with LoRA of no_tokens")
    assert found(results, "LoRA on the refiner blocks")["FID"].verdict == REPRODUCED  # 2.5 against 9


def test_an_uneven_allocation_is_read_from_the_diagnostics(results):
    tokens = [[1, 2, 3, 4], [5], [6]]
    updates = {"similarity": [[0.9, 0.9], [0.99, 0.99], [0.99, 0.99]]}
    results.diagnostics["nfe20-tokencache"] = {"alpha": {"kept_at_0.7": {"tokens": tokens}}, "updates": updates}
    (finding,) = found(results, "Certain blocks cache more tokens").values()
    assert (finding.verdict, finding.evidence) == (REPRODUCED, "NFE 20: 2.00")
    (finding,) = found(results, "change unevenly over timesteps").values()
    assert (finding.verdict, finding.evidence) == (REPRODUCED, "NFE 20: 2.50")


def test_claims_on_other_models_are_not_tested_here(results):
    table = verdicts.verdict_table(results).tidy.set_index("claim")
    line = table.loc[next(claim for claim in table.index if "Open-Sora-Plan" in claim)]
    assert line["verdict"] == NOT_TESTED and "Open-Sora-Plan" in line["evidence"]
    assert set(table["verdict"]) <= {REPRODUCED, NOT_REPRODUCED, NOT_DECIDED, NOT_TESTED, *CONTROL.values()}


def test_a_suite_beside_no_model_of_the_paper_tests_no_claim(results):
    about = results.suite.about.model_copy(update={"stands_for": None})
    alone = replace(results, suite=results.suite.model_copy(update={"about": about}))
    findings = [finding for _, _, finding in verdicts.verdicts(alone)]
    assert {finding.verdict for finding in findings} == {NOT_TESTED} and len(findings) == len(all_claims())
    assert "needs a suite whose rows stand for a model of the paper" in {finding.evidence for finding in findings}


def test_a_win_on_fid_must_survive_the_guidance_control(results):
    uncached, tokencache = results.rows[0], next(row for row in results.rows if row["method"] == "tokencache")
    sweep = []
    for row, label, values in ((uncached, "uncached", (3.0, 2.0)), (tokencache, "TokenCache", (2.5, 2.6))):
        for scale, value in zip((1.0, 1.5), values, strict=True):
            period = 1 + (label == "uncached")
            copied = with_replicates(row, [value + 0.01 * (-1) ** (group // period) for group in range(8)])
            sweep.append(copied | {"row": f"guidance-{label}-{scale}", "label": label, "guidance_scale": scale})
    results.ablations["guidance"] = sweep
    finding = found(results, "better than the uncached model itself")["FID, each at its best CFG scale"]
    assert finding.verdict == NOT_REPRODUCED  # 2.5 at its best, the uncached model 2.0 at another scale
    assert "uncached at 1.5" in finding.evidence and "TokenCache at 1" in finding.evidence


def test_minimum_detectable_difference_grows_with_the_spread():
    rows = make_rows()
    size, share = verdicts.minimum_detectable(rows)["fid"]
    se, level = 0.5 / 2.3646, 0.05 / 6  # over 8 groups, of six rows at either NFE
    assert size == pytest.approx(se * (scipy_stats.t.ppf(1 - level / 2, 7) + 0.8960), rel=1e-3)
    assert share == pytest.approx(size / 3.234)


def test_kept_shares_reads_the_executed_plan():
    row = {"tokens": 64, "plan": {"block 0": "all 16 none", "block 1": "all none 64"}}
    assert kept_shares(row).tolist() == [[1, 1], [0.25, 0], [0, 1]]
    row["plan"]["block 1"] = "all forecast 2 forecast 1"  # what is extrapolated is not recomputed
    assert kept_shares(row).tolist() == [[1, 1], [0.25, 0], [0, 0]]


def test_tables_say_what_the_suite_cannot_show(results):
    table = verdicts.verdict_table(results)
    text = table.markdown()
    assert "Minimum detectable difference" in text and "smoke" in text
    assert table.latex().isascii()
    assert "guidance sweep was not run" in text


def test_suites_side_by_side(results, tmp_path):
    first = verdicts.verdict_table(results)
    first.write(tmp_path / "smoke" / "tables", "verdicts")
    first.tidy["verdict"] = first.tidy["verdict"].replace(NOT_TESTED, REPRODUCED)
    first.write(tmp_path / "other" / "tables", "verdicts")
    table = verdicts.across_suites(tmp_path).tidy.set_index("claim")
    line = table.loc[next(claim for claim in table.index if "adaptive schedule" in claim)]
    assert line["smoke"] == "not tested: needs the ablation `schedule`"
    assert line["other (of suite smoke)"] == "reproduced", "in a folder of another name"
    assert len(table) == len(all_claims())
    with pytest.raises(UserError, match="no suite has verdicts"):
        verdicts.across_suites(tmp_path / "smoke")
