"""Calls beside the caller: in order, no more waiting than allowed, and the first failure is not lost."""

from threading import Event, get_ident
from time import monotonic, sleep

import pytest

from tcbench.aside import Aside


@pytest.mark.parametrize("waiting", [0, 2])
def test_calls_are_made_in_order_and_all_of_them(waiting: int) -> None:
    made: list[tuple[int, int]] = []
    with Aside(waiting) as aside:
        for number in range(7):
            aside(lambda number: made.append((number, get_ident())), number)
    assert [number for number, _ in made] == list(range(7))
    assert {thread == get_ident() for _, thread in made} == {not waiting}


def test_a_failure_is_raised_and_what_waits_behind_the_caller_s_own_is_left() -> None:
    def fails() -> None:
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"), Aside(1) as aside:
        aside(fails)
    gate, made = Event(), list[int]()

    def ends_when_the_next_is_left() -> None:
        gate.wait()
        until = monotonic() + 10
        while not aside._calls[-1].cancelled() and monotonic() < until:
            sleep(0.001)

    with pytest.raises(KeyError), Aside(2) as aside:
        aside(ends_when_the_next_is_left)
        aside(made.append, 1)
        gate.set()
        raise KeyError
    assert made == []


def test_the_caller_waits_where_too_much_is_left() -> None:
    gate, made = Event(), list[str]()
    with Aside(1) as aside:
        aside(lambda: (gate.wait(), made.append("first")))  # type: ignore[arg-type]
        gate.set()
        aside(made.append, "second")
        assert made[0] == "first"
