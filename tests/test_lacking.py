"""A row without what its method needs is refused: it would sample the method's floor, and say nothing."""

from pathlib import Path
from typing import Any

import pytest

from tcbench.attach.cached import _log_of
from tcbench.budget.borrowing import check_borrowing
from tcbench.budget.matching import solve
from tcbench.errors import UserError
from tcbench.method import Artefacts
from tcbench.models.specs import MODELS
from tcbench.registry import make_method
from tcbench.stages.ready import prepared_row
from tests.test_full_steps import suite_of

ROUTER = {"method": "learning_to_cache"}
SCORER = {"method": "tokencache", "options": {"num_full_steps": 3, "refiner_blocks": 2, "beta": -50}}
ON_ROUTER = {"base": "learning_to_cache"}
LACKING: dict[str, tuple[dict[str, Any], str]] = {
    "gates": ({"method": "lazydit", "artefacts_from": "scorer"}, "lazydit lacks gates: a row of lazydit trains them"),
    "router": ({"method": "goc", "options": ON_ROUTER}, "goc lacks a router: a row of learning_to_cache lends its own"),
    "another's": (
        {"method": "goc", "options": ON_ROUTER, "artefacts_from": "scorer"}, "goc lacks a router: a row of",
    ),
    "router of its own": (
        {"method": "learning_to_cache", "artefacts_from": "scorer"},
        "learning_to_cache lacks a router: a row of learning_to_cache trains one or imports it",
    ),
    "curves": ({"method": "smoothcache", "artefacts_from": "scorer"}, "smoothcache lacks errors of reuse: a row of"),
    "ratios": ({"method": "magcache", "artefacts_from": "scorer"}, "magcache lacks ratios of magnitudes: a row of"),
}  # fmt: skip


@pytest.mark.parametrize("what", LACKING)
def test_a_row_that_lacks_something_is_refused_before_it_samples(tmp_path: Path, what: str) -> None:
    row, says = LACKING[what]
    suite = suite_of(tmp_path, lacking=row, router=ROUTER, scorer=SCORER)
    for refuse in (lambda: check_borrowing(suite), lambda: prepared_row(suite["lacking"], None)):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"row lacking: {says}") as refused:
            refuse()
        assert "\n" not in str(refused.value)


def test_rows_that_have_it_pass(tmp_path: Path) -> None:
    borrowed = {"method": "goc", "options": ON_ROUTER, "artefacts_from": "router"}
    check_borrowing(suite_of(tmp_path, router=ROUTER, borrowed=borrowed, on_fora={"method": "goc"}))
    given = {"method": "magcache", "options": {"ratios": [1.0] * 6}, "artefacts_from": "router"}
    check_borrowing(suite_of(tmp_path, router=ROUTER, given=given))


def test_on_a_pipeline_too() -> None:
    shape = MODELS["tiny-dit"].shape
    with pytest.raises(UserError, match="goc lacks a router"):
        _log_of(None, make_method("goc", ON_ROUTER), shape)
    with pytest.raises(UserError, match="lazydit: is trained; give artefacts="):
        _log_of(None, make_method("lazydit", {}), shape)
    assert make_method("lazydit", {}).lacks(Artefacts(tables={"gates": ()})) is None


def test_costs_without_it_are_said_to_be_the_floors() -> None:
    for name, options in (("goc", ON_ROUTER), ("harmonica", {}), ("magcache", {})):
        said = make_method(name, options).macs_depend_on(Artefacts())
        assert said is not None and said.startswith("it lacks ") and said.endswith("this is the method's floor")


@pytest.mark.parametrize("options", [{"num_full_steps": 3}, {"reused_steps": [1, 3]}])
def test_goc_on_a_router_refuses_the_steps_of_its_other_base(options: dict[str, Any]) -> None:
    (option,) = options
    says = f"methods/goc.py: {option}: the steps of base learning_to_cache are its own; remove it, or set threshold"
    with pytest.raises(UserError, match=says):
        make_method("goc", ON_ROUTER | options)
    with pytest.raises(UserError, match="num_full_steps: the steps of base learning_to_cache are its own"):
        solve("digits-dit", make_method("goc", ON_ROUTER), 6, 1e9)
