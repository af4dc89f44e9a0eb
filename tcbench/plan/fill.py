"""How: what stands in for what is not recomputed."""

from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Literal, get_args

from tcbench.plan.refusal import is_count, wrong
from tcbench.tensors.unseen import dtype_of

if TYPE_CHECKING:  # configs name methods; checking them must not pay for importing torch
    from torch import Tensor

Of = Literal["computed", "used"]
"""Which values a `Mix` remembers: those that were computed, or those of every step, whatever stood there."""

_OF = get_args(Of)


@dataclass(frozen=True, slots=True)
class Hold:
    """Reuse the last computed value, however old (docs/reproduction-notes.md, reading 9)."""

    order: int = field(default=0, init=False)


HOLD = Hold()


HIGHEST_ORDER = 10
"""Of a forecast: published are 1 to 4, and an order stores as many differences."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Extrapolate with a Taylor polynomial of this order in the step index (TaylorSeer, arXiv 2503.06923, Eq. 4)."""

    order: int

    def __post_init__(self) -> None:
        if not (is_count(self.order) and self.order <= HIGHEST_ORDER):
            raise wrong("Forecast.order", f"a whole number, 0 to {HIGHEST_ORDER}", self.order)


@dataclass(frozen=True, slots=True)
class Mix:
    """A weighted sum of a unit's last values, the latest first: (1,) holds, (1 + a, -a) goes on along a line.

    Where a unit is computed, the fill says how many of its values are kept, so all steps of a run name one length
    (`keeping`); a weight of 0 asks for no value. Weights belong to a step and are made when it is planned
    (`tcbench.extrapolate`): nothing is computed on the host or the device for them.

    Attributes:
        weights: of the last values.
        of: which values those are. Of those that were `used`, what this fill makes is one of the next step.
    """

    weights: tuple[float, ...]
    of: Of = "computed"

    def __post_init__(self) -> None:
        numbers = isinstance(self.weights, tuple) and all(isinstance(weight, int | float) for weight in self.weights)
        if not numbers or not self.weights or not all(isfinite(weight) for weight in self.weights):
            raise wrong("Mix.weights", "a tuple of finite numbers, one or more", self.weights)
        if self.of not in _OF:
            raise wrong("Mix.of", f"one of {', '.join(_OF)}", self.of)

    @classmethod
    def keeping(cls, count: int, of: Of = "computed") -> "Mix":
        """The last value as it is, with `count` remembered."""
        return cls((1.0, *[0.0] * (count - 1)), of)

    @property
    def holds(self) -> bool:
        """Whether it is the last value as it is."""
        return self.weights[0] == 1 and not any(self.weights[1:])


Fill = Hold | Forecast | Mix


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """What recomputed tokens tell the others of their group (ClusCa): value <- ratio * told + (1 - ratio) * value.

    `told` is the sum of the fresh values of the group's recomputed tokens, and it is of all tokens, those that were
    recomputed too. An index with a spread may name a token twice; it is computed twice, charged twice, and counts twice
    in the sum. The sums themselves are additions, which the ledger does not count; at a ratio of 0 nothing is told.

    Attributes:
        group_RN: the number of every token's group, 0 to N - 1, int64 [R, N].
        ratio: how far the values go towards what is told, 0 to 1.
    """

    group_RN: "Tensor"
    ratio: float

    def __post_init__(self) -> None:
        if dtype_of(self.group_RN) != "int64" or len(self.group_RN.shape) != 2:
            raise wrong("Spread.group_RN", "an int64 tensor [R, N]", self.group_RN)
        if not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise wrong("Spread.ratio", "a number from 0 to 1", self.ratio)
