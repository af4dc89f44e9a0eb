import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tcbench.errors import UserError
from tcbench.stats import (
    Interval,
    batches,
    holm,
    jackknife,
    over_trainings,
    replicate,
    share_difference,
    share_error,
    share_interval,
)


def mean_of(values):
    return lambda indices: values[indices].mean()


def test_groups_of_one_give_the_classical_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=50)
    interval = jackknife(mean_of(values), batches(50, 1))
    low, high = scipy_stats.t.interval(0.95, 49, values.mean(), scipy_stats.sem(values))
    np.testing.assert_allclose([interval.value, interval.se], [values.mean(), scipy_stats.sem(values)])
    np.testing.assert_allclose([interval.low, interval.high], [low, high])
    assert interval.dof == 49


def test_equal_groups_reduce_to_the_textbook_formula_for_a_nonlinear_statistic():
    values = np.random.default_rng(1).normal(size=64)
    replicates = replicate(lambda indices: np.exp(values[indices].mean()), batches(64, 8))
    deviations = replicates.deleted - replicates.deleted.mean()
    assert replicates.interval().se == pytest.approx(np.sqrt(7 / 8 * (deviations**2).sum()))


def test_a_short_last_batch_counts_as_what_it_is():
    values = np.random.default_rng(2).normal(size=66)
    means = np.array([values[group].mean() for group in batches(66, 8)])
    sizes = np.array([8] * 8 + [2])
    weighted = sizes * (means - values.mean()) ** 2 / (66 - sizes)  # Busing et al. 1999 for a mean, written out
    assert jackknife(mean_of(values), batches(66, 8)).se == pytest.approx(np.sqrt(weighted.mean()))


@pytest.mark.parametrize("num_samples, batch_size, sizes", [(8, 4, [4, 4]), (9, 4, [4, 4, 1]), (3, 4, [3])])
def test_batches_hold_every_sample_once(num_samples, batch_size, sizes):
    groups = batches(num_samples, batch_size)
    assert [len(group) for group in groups] == sizes
    np.testing.assert_array_equal(np.concatenate(groups), np.arange(num_samples))


def test_a_paired_difference_cancels_what_is_shared():
    rng = np.random.default_rng(3)
    noise, effect = rng.normal(size=80), 0.1 + 0.01 * rng.normal(size=80)
    groups = batches(80, 10)
    row, reference = replicate(mean_of(noise + effect), groups), replicate(mean_of(noise), groups)
    paired = (row - reference).interval()
    assert paired.distinguishable and paired.se < row.interval().se / 20
    direct = jackknife(lambda indices: mean_of(noise + effect)(indices) - mean_of(noise)(indices), groups)
    np.testing.assert_allclose([paired.value, paired.se], [direct.value, direct.se])


def test_a_difference_from_itself_is_exactly_zero():
    replicates = replicate(mean_of(np.random.default_rng(4).normal(size=30)), batches(30, 7))
    interval = (replicates - replicates).interval()
    assert (interval.value, interval.low, interval.high, interval.se) == (0, 0, 0, 0)
    assert not interval.distinguishable


@pytest.mark.parametrize("statistic", [np.mean, np.std], ids=["mean", "std"])
def test_coverage_is_nominal_when_batches_share_a_decision(statistic):
    rng = np.random.default_rng(5)
    groups, trials, covered = batches(128, 16), 1500, 0
    draws = rng.normal(size=(trials, 8, 16)) + 0.5 * rng.normal(size=(trials, 8, 1))  # a shared shift in every batch
    draws = draws.reshape(trials, 128)
    truth = {np.mean: 0.0, np.std: np.std(draws, axis=1).mean()}[statistic]
    for values in draws:
        interval = jackknife(lambda indices, values=values: float(statistic(values[indices])), groups)
        covered += interval.low <= truth <= interval.high
    assert 0.925 < covered / trials < 0.97


@pytest.mark.parametrize("trainings", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0], ids=["same", "some", "dominant"])
@pytest.mark.parametrize("mixed", [0.0, 1.0], ids=["additive", "mixed"])
def test_coverage_is_nominal_when_trainings_vary(trainings: int, spread: float, mixed: float):
    """A shift per training, one per sample, and one per both, which counts twice: if at all, the interval is wide."""
    rng, trials, covered = np.random.default_rng(6), 600, 0
    groups = batches(32, 4)
    for _ in range(trials):
        shared = rng.normal(size=32)
        rows = [
            replicate(mean_of(shared + spread * rng.normal() + mixed * rng.normal(size=32)), groups)
            for _ in range(trainings)
        ]
        interval = over_trainings(rows).interval()
        covered += interval.low <= 0 <= interval.high
    assert 0.925 < covered / trials <= (1 if mixed else 0.99)


def test_one_training_does_not_cover_the_others():
    rng, covered, groups = np.random.default_rng(6), 0, batches(32, 4)
    for _ in range(300):
        interval = replicate(mean_of(rng.normal(size=32) + rng.normal()), groups).interval()
        covered += interval.low <= 0 <= interval.high
    assert covered < 150


def test_trainings_are_paired_where_both_sides_have_them():
    rng, groups = np.random.default_rng(9), batches(24, 4)
    noise, trained = rng.normal(size=24), rng.normal(size=3)
    row, control = (
        over_trainings([replicate(mean_of(noise + shift + effect), groups) for shift in trained]) for effect in (0.5, 0)
    )
    fixed = replicate(mean_of(noise), groups)
    same = (row - control).interval()
    assert same.value == pytest.approx(0.5) and same.se == pytest.approx(0, abs=1e-12)
    against = row - fixed
    assert against.trainings == pytest.approx(trained + 0.5)
    assert against.interval().se == pytest.approx(np.std(trained, ddof=1) / math.sqrt(3))
    assert (fixed - row).interval().value == pytest.approx(-against.interval().value)
    with pytest.raises(UserError, match="3 and 2 trainings"):
        row - over_trainings([fixed, fixed])
    with pytest.raises(UserError, match="two or more with the same groups"):
        over_trainings([fixed])


def test_trainings_that_agree_leave_the_interval_of_the_samples():
    groups = batches(24, 4)
    one = replicate(mean_of(np.random.default_rng(10).normal(size=24)), groups)
    mean, alone = over_trainings([one, one, one]).interval(), one.interval()
    np.testing.assert_allclose([mean.value, mean.low, mean.high, mean.dof], [alone.value, alone.low, alone.high, 5])


def test_bad_groups_and_values_are_named():
    values = np.arange(4.0)
    with pytest.raises(UserError, match="at least 2 batches"):
        jackknife(mean_of(values), [np.arange(4)])
    with pytest.raises(UserError, match="share a sample"):
        jackknife(mean_of(values), [np.array([0, 1]), np.array([1, 2])])
    with pytest.raises(UserError, match="empty"):
        jackknife(mean_of(values), [np.array([0, 1]), np.array([], dtype=int)])
    with pytest.raises(UserError, match="all must be finite"):
        jackknife(lambda indices: float("nan") if len(indices) == 2 else 1.0, [np.array([0, 1]), np.array([2, 3])])
    with pytest.raises(UserError, match="different groups"):
        replicate(mean_of(values), batches(4, 2)) - replicate(mean_of(values), batches(4, 1))


def test_the_module_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, tcbench.stats; assert 'torch' not in sys.modules"], check=True)


def test_p_values_agree_with_the_t_test():
    rng = np.random.default_rng(7)
    differences = rng.normal(0.3, 1, size=12)
    interval = jackknife(mean_of(differences), batches(12, 1))  # the jackknife of a mean is the t test
    reference = scipy_stats.ttest_1samp(differences, 0)
    assert interval.p_value == pytest.approx(reference.pvalue)
    assert (interval.p_value < 0.05) == interval.distinguishable


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_of_the_detectable_size_is_found_four_times_out_of_five():
    rng = np.random.default_rng(8)
    groups, trials = batches(24, 3), 2000
    size = Interval(0, 0, 0, 1 / math.sqrt(24), 7).detectable()
    found = sum(jackknife(mean_of(values), groups).distinguishable for values in rng.normal(size, 1, size=(trials, 24)))
    assert 0.76 < found / trials < 0.84


def test_no_spread_is_no_evidence():
    for value, se in ((0.0, 0.0), (0.1, 0.0), (0.1, 1e-17)):
        interval = Interval.student(value, se, 7)
        assert (interval.p_value, interval.p_equivalent(1.0), interval.distinguishable) == (1, 1, False)


def test_equivalence_is_the_interval_inside_the_margin():
    rng = np.random.default_rng(9)
    for value, se, margin in rng.uniform(0.1, 1, size=(200, 3)) * (1, 0.3, 1):
        interval = Interval.student(value, se, 7)
        assert (interval.p_equivalent(margin) <= 0.05) == (-margin < interval.low and interval.high < margin)


def test_the_bias_of_the_first_order_is_taken_out():
    """A variance with the divisor n is too small by its n-th part: the jackknife's textbook case."""
    values = np.random.default_rng(10).normal(size=20)
    replicates = replicate(lambda indices: float(values[indices].var()), batches(20, 1))
    assert replicates.centre == pytest.approx(values.var(ddof=1))
    corrected = replicates.interval(corrected=True)
    assert corrected.value == replicates.centre and corrected.se == replicates.interval().se
    uneven = replicate(mean_of(values), batches(20, 6))
    assert uneven.centre == pytest.approx(uneven.value)  # a mean has no bias, however the groups are


@pytest.mark.parametrize("right", [0, 1, 5, 23, 24])
def test_a_share_of_independent_samples_has_clopper_and_pearsons_interval(right):
    exact = scipy_stats.binomtest(right, 24).proportion_ci(method="exact")
    interval = share_interval(right / 24, 0.0, 23, 24)
    np.testing.assert_allclose([interval.low, interval.high], [exact.low, exact.high], atol=1e-12)


def test_a_share_whose_samples_hang_together_has_a_wider_interval_in_its_range():
    narrow, wide = (share_interval(0.9, se, 7, 96) for se in (0.001, 0.08))
    assert wide.low < narrow.low < 0.9 < narrow.high < wide.high < 1


@pytest.mark.parametrize(("samples", "bound"), [(24, 0.1425), (72, 0.05), (96, 0.0377)])
def test_what_no_pair_showed_is_bounded_by_how_many_there_are(samples, bound):
    nothing = share_difference(Interval.student(0.0, 0.0, 23), np.zeros(24), samples)
    assert nothing.high == -nothing.low >= bound - 1e-3
    assert nothing.high < 1.3 * bound


def test_shares_that_differ_alike_in_every_group_are_no_certainty():
    """All four pairs differ, two in either batch: the jackknife's standard error is 0, McNemar's exact p is 1/8."""
    replicates = replicate(mean_of(np.ones(4)), batches(4, 2))
    assert replicates.interval().se == 0
    interval = share_difference(replicates.interval(), replicates.group_sums, 4)
    assert interval.p_value > 0.1 and interval.high == 1
    assert share_error(1.0, 0.0, 4) > 0.1


def test_a_range_cuts_an_interval_and_not_its_error():
    interval = Interval.student(5.0, 4.0, 7).within(0, math.inf)
    assert (interval.low, interval.se) == (0, 4) and interval.high > 14
