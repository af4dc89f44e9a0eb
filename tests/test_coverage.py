"""The simulation behind docs/statistics.md, quickly: signs, errors and coverage within what so few repeats allow."""

import math

import numpy as np
import pytest
import torch

from tcbench.metrics.extractors import Features
from tcbench.metrics.frechet import Gaussian, frechet_distance
from tests.coverage import DOCUMENT, MARKS, ROWS_OWN, SIZES, features, frechet, simulate


@pytest.fixture(scope="module")
def results():
    """Of all sizes but the largest, fewer repeats."""
    return list(simulate(0.15, SIZES[:4]))


def too_many(share, nominal, repeats):
    """Whether a share of repeats is above a nominal one by more than three binomial standard errors."""
    return share > nominal + 3 * math.sqrt(nominal * (1 - nominal) / repeats)


def test_what_is_tested_has_its_level_and_its_sign(results):
    for found in (each for each in results if each.tested):
        assert not too_many(1 - found.coverage, 0.05, found.repeats), found
        assert found.what == ROWS_OWN or not too_many(found.wrong_sign, 0.05, found.repeats), found
        if found.truth and found.power > 0.2:
            assert np.sign(found.mean) == np.sign(found.truth), found


def test_what_is_tested_finds_large_differences(results):
    power = {(found.size.suite, found.what): found.power for found in results}
    assert power["`digits`", "mean over samples, difference of 0.5 standard deviations"] > 0.7
    assert power["5 000 images, scaled", "FID, samples spread 0.9 times as far, bias taken out"] > 0.8


def test_a_frechet_difference_as_measured_has_the_wrong_sign_and_is_not_tested(results):
    for suite, at_least in (("`digits`", 0.3), ("`scenes`", 0.9), ("`moving`", 0.9)):
        (found,) = (each for each in results if each.size.suite == suite and "0.9 times as far, as" in each.what)
        assert found.mean < 0 < found.truth and found.wrong_sign > at_least and not found.tested


def test_the_bias_is_taken_out_where_it_is_tested(results):
    for found in results:
        if found.what.endswith("0.9 times as far, bias taken out") and found.tested:
            assert found.mean == pytest.approx(found.truth, rel=0.25)


def test_the_simulated_distance_is_the_one_that_scores_have():
    samples = np.random.default_rng(1).normal(size=(200, 8))
    exact = Gaussian(torch.zeros(8).double(), torch.eye(8).double())
    assert frechet(samples) == pytest.approx(frechet_distance(torch.from_numpy(samples), exact), rel=1e-6)
    assert isinstance(features(samples), Features)


def test_the_document_has_every_size_and_comparison(results):
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text.split(MARKS[0])[1].split(MARKS[1])[0]
    assert all(f"| {found.size} | {found.what}" in table for found in results)
