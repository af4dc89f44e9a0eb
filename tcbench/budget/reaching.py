"""The nearest setting to a budget where every trial may be a run: bisection that ends as soon as it is near enough.

`matching.solve` finds the nearest setting there is and refuses MACs that do not rise or fall throughout. MACs that are
measured do not always: a threshold decides by sums of changes, and a larger one may compute a step more. Here the best
setting that was tried counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tcbench.budget.matching import TOLERANCE, knob_settings, with_knob
from tcbench.method import Method
from tcbench.registry import make_method
from tcbench.schedule import as_options


@dataclass(frozen=True)
class Reached:
    """A setting, its MACs, how far these are from the budget, as a share of it, and whether no other costs less."""

    method: Method
    macs: int
    off: float
    least: bool = False


def reach(
    method: Method,
    tried: Mapping[str, Sequence[Any]],
    nfe: int,
    target_macs: float,
    macs: Callable[[Method], int],
    near: float,
) -> Reached:
    """The first combination of options whose knob comes within `near` of a budget; if none does, the nearest.

    One that does so at the end of its knob where nothing costs less counts if no other does: a threshold there never
    computes again, and decides nothing any more.

    Args:
        tried: values of options besides the knob, in the order in which they are tried.
        macs: of one sample; remembers what it was asked.
        near: a share of the budget.

    Raises:
        UserError: the method has no knob that can be searched, or refuses an option's value.
    """
    found, free = list[Reached](), method.model_dump() | _freed(method)
    for values in product(*tried.values()):
        changed = make_method(method.name, free | dict(zip(tried, values, strict=True)))
        found.append(_nearest(changed, nfe, target_macs, macs))
        if abs(found[-1].off) <= near and not found[-1].least:
            return found[-1]
    return next((reached for reached in found if abs(reached.off) <= near), _best(found))


def _freed(method: Method) -> dict[str, Any]:
    """Where the knob says which steps are full, the other options that do are taken back."""
    say_which = as_options((), method).keys() & type(method).model_fields.keys()
    return dict.fromkeys(say_which - {method.knob}) if method.knob in say_which else {}


def _nearest(method: Method, nfe: int, target_macs: float, macs: Callable[[Method], int]) -> Reached:
    settings, trials = knob_settings(method, nfe), list[Reached]()

    def over(place: int) -> float:
        at = with_knob(method, settings[place])
        trials.append(Reached(at, count := macs(at), count / target_macs - 1))
        return trials[-1].off

    low, high = 0, len(settings) - 1
    first, last = over(low), over(high)
    sign = 1 if last >= first else -1
    end = 0 if sign > 0 else 1
    trials[end] = replace(trials[end], least=True)
    while high - low > 1 and sign * first < 0 < sign * last and abs(_best(trials).off) > TOLERANCE:
        middle = (low + high) // 2
        low, high = (middle, high) if sign * over(middle) < 0 else (low, middle)
    return _best(trials)


def _best(trials: Iterable[Reached]) -> Reached:
    return min(trials, key=lambda reached: abs(reached.off))
