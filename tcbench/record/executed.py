"""The record of what a run computed: by step and unit of its plans. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


Execution = Literal["fused", "compiled", "plain"]
"""What executes units: kernels of this project, the model's own layers compiled, or those as they are."""

AND = ", "
_WORDS = re.compile(r"(?:forecast|mix|rows) [\d/]+|\S+")


@dataclass(frozen=True)
class Executed:
    """What a step did in a unit.

    Attributes:
        who: whether all tokens were computed, none, some that were chosen, or all of some rows.
        count: how many tokens of each row, if some; how many rows.
        order: of the forecast in the place of what was not computed, if none was; 0: the held value stood there.
        mixed: how many values the weighted sum was of that stood there instead; 0: it was none.
        of: how many rows there were, if only some were computed.
    """

    who: Literal["all", "none", "some", "rows"]
    count: int = 0
    order: int = 0
    mixed: int = 0
    of: int = 0

    def share(self, tokens: int) -> float:
        """The computed share of so many tokens."""
        return {"all": 1.0, "none": 0.0}.get(self.who, self.count / (self.of or tokens))

    def to_json(self) -> str | int:
        """ "all", "none", "forecast N" (order N), "mix N" (values), "rows K/R" or the number of tokens."""
        if self.who == "some":
            return self.count
        if self.who == "rows":
            return f"rows {self.count}/{self.of}"
        return f"forecast {self.order}" if self.order else f"mix {self.mixed}" if self.mixed else self.who

    @classmethod
    def from_json(cls, said: str | int) -> "Executed":
        """The inverse of `to_json`, for numbers in digits too.

        Raises:
            ValueError: it says nothing of the kind.
        """
        word = str(said)
        if word in ("all", "none"):
            return ALL if word == "all" else cls("none")
        if word.startswith("forecast "):
            return cls("none", order=int(word.removeprefix("forecast ")))
        if word.startswith("mix "):
            return cls("none", mixed=int(word.removeprefix("mix ")))
        if word.startswith("rows "):
            count, _, of = word.removeprefix("rows ").partition("/")
            return cls("rows", int(count), of=int(of))
        return cls("some", int(word))

    def __str__(self) -> str:
        return str(self.to_json())


ALL = Executed("all")


@dataclass(frozen=True)
class PlanRecord:
    """What a run computed.

    Attributes:
        steps: in sampling order, what was done by unit; a unit that is not mentioned was computed in full.
    """

    steps: tuple[Mapping[str, Executed], ...]

    @property
    def units(self) -> tuple[str, ...]:
        """All units, in the order in which they are first mentioned."""
        return tuple(dict.fromkeys(unit for step in self.steps for unit in step))

    def at(self, step: int, unit: object) -> Executed:
        """What a step did in a unit, which is named by its string."""
        return self.steps[step].get(str(unit), ALL)

    @property
    def i_steps(self) -> tuple[int, ...]:
        """The steps at which everything was computed."""
        return tuple(number for number, step in enumerate(self.steps) if set(step.values()) <= {ALL})

    @property
    def by_whole_units(self) -> bool:
        """Whether the record says all that was computed and reused: no tokens, rows or weights were chosen."""
        return all(done.who in ("all", "none") and not done.mixed for step in self.steps for done in step.values())

    def kept_shares(self, tokens: int) -> "np.ndarray":
        """The share of `tokens` that every step computed in every unit, [S, units]."""
        import numpy as np  # so that commands that read a config alone start quickly

        return np.array([[self.at(step, unit).share(tokens) for unit in self.units] for step in range(len(self.steps))])

    def beside(self, other: "PlanRecord", name: str, unless: "PlanRecord") -> "PlanRecord":
        """This record with another one's units beside its own, by `name`, at the steps where that is not `unless`."""
        steps = []
        for mine, theirs, same in zip(self.steps, other.steps, unless.steps, strict=True):
            named = {f"{name}: {unit}": done for unit, done in theirs.items()}
            steps.append(mine if theirs == same else {**mine, **named})
        return PlanRecord(tuple(steps))

    def to_json(self) -> list[dict[str, str | int]]:
        """Steps as they are, for what reads them again."""
        return [{unit: done.to_json() for unit, done in step.items()} for step in self.steps]

    @classmethod
    def from_json(cls, steps: Sequence[Mapping[str, str | int]]) -> "PlanRecord":
        """The inverse of `to_json`."""
        return cls(tuple({unit: Executed.from_json(said) for unit, said in step.items()} for step in steps))

    def to_lines(self) -> dict[str, str]:
        """What every step did, a line of words, by the units in a row that it did it in: the form of score files."""
        lines = {unit: " ".join(str(self.at(step, unit)) for step in range(len(self.steps))) for unit in self.units}
        return {AND.join(alike): line for line, alike in groupby(lines, key=lines.__getitem__)}

    @classmethod
    def from_lines(cls, lines: Mapping[str, str]) -> "PlanRecord":
        """The inverse of `to_lines`, where every unit is mentioned at every step; of no unit it knows no step."""
        words = {
            unit: [Executed.from_json(word) for word in _WORDS.findall(line)]
            for units, line in lines.items()
            for unit in units.split(AND)
        }
        return cls(tuple(dict(zip(words, step, strict=True)) for step in zip(*words.values(), strict=True)))
