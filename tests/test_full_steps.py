"""Which steps compute everything, said by a list: every method that has such steps takes one."""

import pytest

from tcbench.errors import UserError
from tcbench.method import Artefacts, Method
from tcbench.registry import make_method, method_class, method_names
from tests.test_toca_tokens import run_of

LISTING = [name for name in method_names() if "full_steps" in method_class(name).model_fields]


def at(name: str, **options: object) -> Method:
    return make_method(name, options)


def test_who_takes_a_list() -> None:
    assert set(LISTING) == {
        *("fora", "no_tokens", "oracle_tokens", "random_tokens", "toca", "toca_tokens", "tokencache", "tome")
    }


@pytest.mark.parametrize("name", LISTING)
def test_a_list_is_what_is_computed(name: str) -> None:
    """Whatever else would place the full steps."""
    run = run_of(10, Artefacts(alpha_bar=(0.5,) * 10))
    assert at(name, full_steps=[0, 4, 9]).i_steps(run) == (0, 4, 9)
    with pytest.raises(UserError, match=r"full_steps: 9 is no step of 9, which are 0 to 8; remove it"):
        at(name, full_steps=[0, 4, 9]).i_steps(run_of(9))


@pytest.mark.parametrize("name", LISTING)
@pytest.mark.parametrize("steps", [[], [1, 2], [0, 4, 4], [0, 4, 2], [0, 1.5], [-1, 0]])
def test_a_list_begins_with_0_and_rises(name: str, steps: list[float]) -> None:
    with pytest.raises(UserError, match=f"methods/{name}.py: full_steps"):
        at(name, full_steps=steps)


@pytest.mark.parametrize("name", LISTING)
def test_a_list_and_a_number_exclude_each_other(name: str) -> None:
    other = "interval" if name == "toca" else "num_full_steps"
    with pytest.raises(UserError, match=f"give one of {other} and full_steps"):
        at(name, full_steps=[0, 2], **{other: 2})


def test_fora_by_number_is_anchored_as_its_published_rule() -> None:
    run = run_of(50)
    published, by_number = at("fora", interval=3).i_steps(run), at("fora", num_full_steps=18).i_steps(run)
    assert len(published) == len(by_number) == 18
    assert published[0] == by_number[0] == 0 and published[-1] == by_number[-1] == 49
    assert at("fora", num_full_steps=18, placement="start").i_steps(run)[-1] == 47


def test_placements_of_an_even_spread() -> None:
    last = {"start": 45, "end": 49, "interior": 47}
    for placement, step in last.items():
        assert at("no_tokens", num_full_steps=12, placement=placement).i_steps(run_of(50))[-1] == step


def test_toca_at_a_list_has_no_mixed_steps() -> None:
    run, steps = run_of(10), [0, 4, 5, 9]
    rows = at("toca", full_steps=steps).timetable(run)
    assert [step for step, row in enumerate(rows) if any(row.full)] == steps
    assert all(all(row.full) for row in rows if any(row.full)), "no step is full in some blocks alone"
