"""Comparisons and verdicts: pairing, correction, and what a claim makes of differences."""

import copy
from dataclasses import replace

import pytest

from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.report import claims, verdicts
from tcbench.report.compare import Comparison, compare, decide_together
from tcbench.report.findings import (
    NOT_DISTINGUISHABLE,
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
from .test_report import FLOOR, make_rows


def with_replicates(row, values):
    row = copy.deepcopy(row)
    row["group_sizes"] = [64] * 8
    row["quality"]["fid"] |= {"value": sum(values) / 8, "deleted": values}
    return row


def comparison(value, half, metric="fid", p=0.01):
    return Comparison("a", "b", metric, Interval(value, value - half, value + half, half / 2, 7), True, p)


def test_rows_on_the_same_batches_are_paired_and_their_shared_noise_cancels():
    first, second = make_rows()[1:3]
    noise = [3.0, 4.0, 2.0, 5.0, 3.0, 4.0, 2.0, 5.0]
    ours = with_replicates(first, noise)
    theirs = with_replicates(second, [value - 0.1 + 0.001 * group for group, value in enumerate(noise)])
    paired = compare(ours, theirs, "fid")
    assert paired.paired and paired.p < 1e-4
    theirs["group_sizes"] = [128] * 4  # other batches: nothing to pair
    unpaired = compare(ours, theirs, "fid")
    assert not unpaired.paired and unpaired.p > 0.05
    assert unpaired.interval.value == pytest.approx(paired.interval.value)


def test_the_stored_difference_to_the_reference_is_the_one_compared():
    rows = make_rows()
    found = compare(rows[2], rows[0], "fid")
    assert found.paired and found.interval.value == 0.166
    assert found.interval.high == pytest.approx(0.666)


def test_a_metric_that_was_not_run_compares_with_nothing():
    ours, theirs = make_rows()[1:3]
    del ours["quality"]["fid"]
    assert compare(ours, theirs, "fid") is None
    assert compare(ours, theirs, "vbench") is None


def test_comparisons_are_corrected_together():
    decided = decide_together([comparison(-1, 0.5, p=0.03), None, comparison(-1, 0.5, p=0.04)])
    assert [found.p for found in decided] == [0.06, 0.06]
    assert {found.outcome for found in decided} == {"≈"}
    assert decide_together([comparison(-1, 0.5, p=0.03)])[0].outcome == "better"
    assert decide_together([comparison(-1, 0.5, "is", p=0.03)])[0].outcome == "worse"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([(-1, 0.01), (-2, 0.01)], REPRODUCED),
        ([(-1, 0.01), (-2, 0.5)], NOT_DISTINGUISHABLE),
        ([(-1, 0.01), (2, 0.01)], NOT_REPRODUCED),
        ([(2, 0.5)], NOT_DISTINGUISHABLE),
    ],
)
def test_superiority(values, verdict):
    assert superiority([comparison(value, 0.5, p=p) for value, p in values]) == verdict


@pytest.mark.parametrize(
    ("value", "half", "metric", "verdict"),
    [
        (0.1, 0.2, "fid", REPRODUCED),  # at most .3 worse of 10
        (0.4, 0.3, "fid", NOT_REPRODUCED),
        (0.2, 0.4, "fid", NOT_DISTINGUISHABLE),
        (-2, 1, "fid", REPRODUCED),
        (-2, 1, "is", NOT_REPRODUCED),
    ],
)
def test_no_loss_is_a_bound_not_a_missing_difference(value, half, metric, verdict):
    assert no_loss(comparison(value, half, metric), 10, 0.05) == verdict


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
    assert findings["MAE to uncached"].verdict == NOT_REPRODUCED
    assert "8 worse" not in findings["MAE to uncached"].evidence
    assert findings["FID"].verdict == REPRODUCED  # 2.5 against 4.1, 3.4 and 3.9, every interval .2 wide
    assert "against" not in findings["FID"].evidence or "NFE 50" in findings["FID"].evidence


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


def test_rows_without_lora_are_compared_among_themselves(results):
    (ours,) = (row for row in results.rows if row["row"] == "nfe20-tokencache")
    (random,) = (row for row in results.rows if row["row"] == "nfe20-random")
    random["settings"] = ours["settings"]
    worse = {"fid": {"value": 9.0, "low": 8.9, "high": 9.1, "se": 0.05}}
    assert found(results, "LoRA on the refiner blocks")[""].evidence == "needs a TokenCache row with `refiners: false`"
    plain = [
        row | {"row": f"{row['row']}-plain", "label": f"{row['label']}, no LoRA", "refiners": False, "quality": worse}
        for row in (ours, random)
    ]
    results.rows.extend(plain)
    findings = found(results, "The Cache Predictor selects better")
    assert "no LoRA" not in findings["FID, equal I-steps and r"].evidence
    assert findings["FID, equal MACs, with LoRA"].verdict == REPRODUCED  # 2.5 against 3.8
    assert findings["FID, equal MACs, without LoRA"].verdict == NOT_DISTINGUISHABLE  # 9 against 9
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
    assert set(table["verdict"]) <= {REPRODUCED, NOT_REPRODUCED, NOT_DISTINGUISHABLE, NOT_TESTED}


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
            copied = with_replicates(row, [value + 0.01 * (-1) ** group for group in range(8)])
            sweep.append(copied | {"row": f"guidance-{label}-{scale}", "label": label, "guidance_scale": scale})
    results.ablations["guidance"] = sweep
    finding = found(results, "better than the uncached model itself")["FID, each at its best CFG scale"]
    assert finding.verdict == NOT_REPRODUCED  # 2.5 at its best, the uncached model 2.0 at another scale
    assert "uncached at 1.5" in finding.evidence and "TokenCache at 1" in finding.evidence


def test_minimum_detectable_difference_grows_with_the_spread():
    rows = make_rows()
    size, share = verdicts.minimum_detectable(rows)["fid"]
    half = 0.5  # of the stored 95 % interval over 8 groups
    assert size == pytest.approx(half / 2.3646 * (2.3646 + 0.8960), rel=1e-3)
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
    assert line["other"].endswith(": reproduced")
    assert len(table) == len(all_claims())
    with pytest.raises(UserError, match="no suite has verdicts"):
        verdicts.across_suites(tmp_path / "smoke")
