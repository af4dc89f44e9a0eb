"""Matched MACs: the setting of a method's one knob at which the ledger, all overheads charged, meets a budget.

A setting is searched over a finite list in which MACs must rise or fall: the integers from 1 to the NFE, or steps of
`FLOAT_STEP` strictly between the bounds that the option declares (`Field(ge=..., le=...)`). A trial is a call of
`costing.macs_of`, which builds no model, or, where MACs depend on the sample, a run of a calibration set.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from tcbench.budget.costing import macs_of
from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method
from tcbench.registry import make_method

TOLERANCE = 0.01
FLOAT_STEP = 1e-4  # what a config can spell: finer settings than this recompute the same tokens
ESTIMATE_ERROR = 0.05  # of MACs from shapes, where they depend on training; the largest seen is half of it
PROBES = 9  # trials spread over the whole range, so that a fall inside a rise is seen

Setting = int | float


@dataclass(frozen=True)
class Basis:
    """What MACs are counted from besides shapes.

    Attributes:
        artefacts: what was trained; None: `macs_of`'s stand-ins.
        measure: runs a calibration set and gives its MACs, of one sample, batch by batch; None: nothing is run.
    """

    artefacts: Artefacts | None = None
    measure: Callable[[Method], Sequence[int]] | None = None

    def macs(self, model: str, method: Method, nfe: int) -> tuple[int, ...]:
        """MACs of one sample, both halves of the guided pair: in every calibration batch, else one number."""
        if self.measure:
            return tuple(self.measure(method))
        if method.decides == "host":
            raise UserError(
                f"{method.name}: its MACs depend on the sample; match a suite's row, which is measured (--suite, --row)"
            )
        return (macs_of(model, method, nfe, self.artefacts)["per_sample"],)

    def estimate(self, method: Method) -> str | None:
        """Why a real run's MACs may differ; None if they are exact, or measured."""
        return None if self.measure else method.macs_depend_on(self.artefacts or Artefacts())


SHAPES = Basis()


def mean(macs: Sequence[int]) -> int:
    """Mean over batches, in whole MACs."""
    return round(sum(macs) / len(macs))


@dataclass(frozen=True)
class Match:
    """The answer for one budget.

    Attributes:
        method: the method at the setting whose MACs are nearest to the target.
        batches: MACs of one sample at that setting, both halves of the guided pair, as `Basis.macs` gives them.
        target_macs: the budget.
        reachable: whether `macs` is within the tolerance of it.
        nearest: (setting, MACs) of the last setting below and the first at or above the target, as far as they exist.
        estimate: why a real run's MACs may differ (`Method.macs_depend_on`), or None if they are exact or measured.
    """

    method: Method
    batches: tuple[int, ...]
    target_macs: int
    reachable: bool
    nearest: list[tuple[Setting, int]]
    estimate: str | None

    @property
    def setting(self) -> Setting:
        """The knob's value."""
        return getattr(self.method, str(self.method.knob))

    @property
    def macs(self) -> int:
        """Of one sample, the mean over batches."""
        return mean(self.batches)

    @property
    def off_target(self) -> float:
        """MACs over the target, less 1."""
        return self.macs / self.target_macs - 1


def solve(
    model: str,
    method: Method,
    nfe: int,
    target_macs: float,
    tolerance: float = TOLERANCE,
    basis: Basis = SHAPES,
) -> Match:
    """Find the setting of `method.knob` whose MACs are nearest to a budget; all other options stay as they are.

    Args:
        model: a known model.
        method: its knob's own value does not matter.
        nfe: steps of the uncached sampler.
        target_macs: of one sample, both halves of the guided pair.
        tolerance: how far from the target, as a share of it, still counts as met.
        basis: what MACs are counted from besides shapes, for methods whose MACs depend on more.

    Raises:
        UserError: the method has no knob, the knob has no bounds, or MACs do not rise or fall with it throughout.
    """
    if not target_macs > 0:
        raise UserError(f"a budget of {target_macs:g} MACs cannot be met; give more than 0")
    settings = knob_settings(method, nfe)
    trials: dict[int, tuple[int, ...]] = {}

    def macs(index: int) -> int:
        if index not in trials:
            trials[index] = basis.macs(model, with_knob(method, settings[index]), nfe)
        return mean(trials[index])

    last = len(settings) - 1
    sign = 1 if macs(last) >= macs(0) else -1
    for probe in range(PROBES):
        macs(round(probe * last / (PROBES - 1)))
    reached = bisect_left(range(len(settings)), sign * target_macs, key=lambda index: sign * macs(index))
    _check_monotone(method, [(settings[index], macs(index)) for index in sorted(trials)], sign)
    around = sorted({max(reached - 1, 0), min(reached, last)}, key=macs)
    best = min(around, key=lambda index: abs(macs(index) - target_macs))
    return Match(
        method=with_knob(method, settings[best]),
        batches=trials[best],
        target_macs=round(target_macs),
        reachable=abs(macs(best) - target_macs) <= tolerance * target_macs,
        nearest=[(settings[index], macs(index)) for index in around],
        estimate=basis.estimate(method),
    )


def with_knob(method: Method, setting: Setting) -> Method:
    """The method at another setting of its knob."""
    return make_method(method.name, method.model_dump() | {str(method.knob): setting})


def knob_settings(method: Method, nfe: int) -> Sequence[Setting]:
    """All settings of a method's knob that can be run at `nfe` steps, ascending.

    Raises:
        UserError: the method has no knob, or one that is neither an integer nor a number between two bounds.
    """
    if method.knob is None:
        raise UserError(f"method {method.name!r} has no knob, so its MACs cannot be matched to anything")
    schema = type(method).model_json_schema()["properties"][method.knob]
    number = next(
        (kind for kind in schema.get("anyOf", [schema]) if kind.get("type") in ("integer", "number")), dict[str, Any]()
    )
    if number.get("type") == "integer":
        low = max(1, number.get("minimum", number.get("exclusiveMinimum", 0) + 1))
        high = min(nfe, number.get("maximum", number.get("exclusiveMaximum", nfe + 1) - 1))
        # the sampler needs two steps, whatever a method makes of them
        return [value for value in range(low, high + 1) if with_knob(method, value).sampled_steps(nfe) >= 2]
    low, high = (number.get(f"{end}imum", number.get(f"exclusive{end.title()}imum")) for end in ("min", "max"))
    if low is None or high is None:
        raise UserError(
            f"methods/{method.name}.py: knob {method.knob!r} must be an integer, or declare its bounds with "
            "Field(ge=..., le=...), to be matched"
        )
    # without the ends, where a method may be another one: ToCa at 0 is FORA, and costs more than at 0.0001
    return [round(low + step * FLOAT_STEP, 4) for step in range(1, round((high - low) / FLOAT_STEP))]


def _check_monotone(method: Method, trials: list[tuple[Setting, int]], sign: int) -> None:
    for (before, fewer), (after, more) in pairwise(trials):
        if sign * (more - fewer) < 0:
            raise UserError(
                f"{method.name}: MACs do not {'rise' if sign > 0 else 'fall'} with {method.knob} throughout "
                f"({before}: {fewer}, {after}: {more}); find a setting with `tcbench macs`"
            )


@dataclass(frozen=True)
class TargetedRow:
    """A config row that says whose MACs it matches, as it is written and as `solve` would write it.

    Attributes:
        target_batches: MACs of the target's samples, as `Basis.macs` gives them.
        estimates: why real MACs may differ, for this row and its target, as far as they may.
    """

    row: str
    target: str
    macs: int
    match: Match
    target_batches: tuple[int, ...]
    estimates: tuple[str, ...]

    @property
    def off_target(self) -> float:
        """The written row's MACs over the target's, less 1."""
        return self.macs / self.match.target_macs - 1


def targeted_rows(suite: Suite, basis_of: Callable[[Entry], Basis] = lambda entry: SHAPES) -> Iterator[TargetedRow]:
    """Every row with a `target`, costed.

    Args:
        basis_of: what the MACs of a row are counted from.

    Raises:
        UserError: a row could be nearer to its target; says at which setting. Where MACs depend on training, it must
            be so by more than the tolerance, because another machine's training moves the nearest setting; where they
            are an estimate, by more than its error.
    """
    basis_of, targets = cache(basis_of), dict[str, tuple[int, ...]]()
    entries = {entry.name: entry for entry in suite.entries}
    for entry in entries.values():
        if entry.row.target is None or isinstance(entry.row.searched, dict):  # which is solved when it is searched
            continue
        target = entries[entry.row.target]
        method, basis = entry.method, basis_of(entry)
        if target.name not in targets:
            targets[target.name] = basis_of(target).macs(suite.model.name, target.method, entry.nfe)
        match = solve(suite.model.name, method, entry.nfe, mean(targets[target.name]), basis=basis)
        reasons = basis.estimate(method), basis_of(target).estimate(target.method)
        written = TargetedRow(
            row=entry.name,
            target=target.name,
            macs=mean(basis.macs(suite.model.name, method, entry.nfe)),
            match=match,
            target_batches=targets[target.name],
            estimates=tuple(reason for reason in reasons if reason),
        )
        exact = not any(each.macs_depend_on(Artefacts()) for each in (method, target.method))
        doubt = ESTIMATE_ERROR if written.estimates else 0 if exact else TOLERANCE
        if abs(written.off_target) > abs(match.off_target) + doubt:
            raise UserError(
                f"rows.{entry.name}.options.{method.knob}: {getattr(method, str(method.knob))} is "
                f"{written.off_target:+.1%} off {target.name}; {match.setting} is nearest ({match.off_target:+.1%})"
            )
        yield written
