"""Methods that others published, against outputs of their own code: the cases of tests/golden-rivals."""

from pathlib import Path

import pytest

from tcbench.golden.case import Case, Unsupported
from tcbench.golden.check import case_names, check_case
from tcbench.record.files import read_json, write_json
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


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("duca_ddim20_n4_r0.07", {"ratio_scheduler": "exp"}, "ratio_scheduler 'exp' is none of ToCa, "),
        ("speca_ddim20_b1.0_d0.2_min1_max6_o2", {"error_metric": "other"}, "methods/speca.py: metric: "),
    ],
)
def test_settings_that_ours_has_not_are_skipped(tmp_path: Path, name: str, settings: dict, says: str) -> None:
    case = read_json(GOLDEN / f"{name}.json")
    write_json(tmp_path / f"{name}.json", case | {"hyperparameters": case["hyperparameters"] | settings})
    with pytest.raises(Unsupported) as caught:
        check_case(tmp_path, name)
    assert says in str(caught.value)
