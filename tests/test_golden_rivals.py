"""Methods that others published, against outputs of their own code: the cases of tests/golden-rivals."""

from pathlib import Path

import pytest

from tcbench.golden.case import Case
from tcbench.golden.check import case_names, check_case
from tests.floors import note

GOLDEN = Path(__file__).parent / "golden-rivals"

GIVEN = {"router_prob", "draw", "lazy_weight", "initial_centroid_token", "kth_gap", "eps_at_steps"}
"""Tensors of cases that are shown to a method, or say which others are compared."""


@pytest.mark.parametrize("name", case_names(GOLDEN))
def test_case(name: str) -> None:
    """Everything that the reference's code left is compared, and nothing is further off than rounding."""
    report = check_case(GOLDEN, name)
    for quantity, entry in report["quantities"].items():
        if entry["tolerance"]:
            note(f"{report['kind']} {quantity}", entry["error"], entry["tolerance"])
    assert report["passed"], report
    assert set(Case(GOLDEN, name).expected) - GIVEN <= set(report["quantities"])
