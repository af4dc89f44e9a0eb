"""Which steps compute everything: a list, an even spread, Eq. (13) of what a predictor scored, or that reversed; what
else follows from a step's number alone: full steps after a start, what a router opens, how ToCa's share of tokens
grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import tanh
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, NonNegativeInt

from tcbench.errors import UserError
from tcbench.method import Method, Run
from tcbench.plan import Site

Schedule = Literal["adaptive", "even", "reversed"]

Placement = Literal["start", "end", "interior"]
"""Where an even spread of full steps, of which the first is the run's first, leaves its remainder (`spread_evenly`)."""


def _in_order(steps: tuple[int, ...]) -> tuple[int, ...]:
    if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)):
        raise ValueError("full_steps must begin with 0 and rise, e.g. [0, 4, 6]")
    return steps


StepList = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_in_order)]
"""Full steps one by one: rising, the first is 0."""


_SAY_WHICH = ("interval", "num_full_steps", "full_steps")
"""Options that say, each for itself, which steps are full, or how many."""


def check_one(method: Method) -> None:
    """They exclude each other.

    Raises:
        ValueError: several are given.
    """
    if len(given := [name for name in _SAY_WHICH if getattr(method, name, None) is not None]) > 1:
        raise ValueError(f"give either {' or '.join(given)}")


def stated_steps(method: Method, nfe: int, first: int = 1) -> tuple[int, ...] | None:
    """The full steps that options `full_steps` or `num_full_steps` say, or None.

    A number means the same for every method: the `first` steps that it needs before it can skip any, and the others
    spread evenly over what follows, as its option `placement` says, or with a whole gap after the last.

    Raises:
        UserError: a run of `nfe` steps cannot have them.
    """
    if listed := getattr(method, "full_steps", None):
        return listed_steps(listed, nfe)
    if not (count := getattr(method, "num_full_steps", None)):
        return None
    spread_evenly(count, nfe)  # refuses an impossible count
    before = min(first, count) - 1  # the last of the first steps is the first of the spread
    spread = spread_evenly(count - before, nfe - before, getattr(method, "placement", "start"))
    return (*range(before), *(before + step for step in spread))


def as_options(steps: Sequence[int], method: Method) -> dict[str, Any]:
    """The options by which a method computes everything at these steps, whatever its own say."""
    others = {name: None for name in _SAY_WHICH if name in type(method).model_fields}
    return others | {"full_steps": tuple(steps)}


def full_steps(
    run: Run, count: int, schedule: Schedule, beta: float, placement: Placement = "start"
) -> tuple[int, ...]:
    """`count` I-steps: by Eq. (13) from the run's alpha-bar, spread evenly, or Eq. (13)'s gaps reversed (Table VIII).

    Raises:
        UserError: the schedule needs an alpha-bar and nothing was trained, or the count is impossible.
    """
    if schedule == "even":
        return spread_evenly(count, run.nfe, placement)
    if run.artefacts.alpha_bar is None:
        raise UserError(
            f"schedule {schedule!r} needs alpha_bar: train the row, name a trained one in artefacts_from, "
            "or set schedule: even"
        )
    if len(run.artefacts.alpha_bar) != run.nfe:
        raise UserError(f"alpha_bar has {len(run.artefacts.alpha_bar)} steps, the run {run.nfe}; train for this NFE")
    chosen = spread_by_scores(run.artefacts.alpha_bar, count, beta)
    return chosen if schedule == "adaptive" else reverse_gaps(chosen, run.nfe)


def listed_steps(steps: tuple[int, ...], nfe: int) -> tuple[int, ...]:
    """The steps of a list, which is for runs that are long enough.

    Raises:
        UserError: a run of `nfe` steps has not all of them.
    """
    if steps[-1] >= nfe:
        raise UserError(f"full_steps: {steps[-1]} is no step of {nfe}, which are 0 to {nfe - 1}; remove it")
    return steps


def spread_evenly(count: int, nfe: int, placement: Placement = "start") -> tuple[int, ...]:
    """`count` full steps spread evenly over `nfe` steps, the first step always among them.

    Args:
        placement: `start` counts gaps from the first step alone, so that a whole gap follows the last full step; with
            `end` the last step is full, as by FORA's published rule; `interior` leaves half a gap behind the last.

    Raises:
        UserError: count is not in 1..nfe.
    """
    if not 1 <= count <= nfe:
        raise UserError(f"num_full_steps={count} must lie between 1 and the number of sampled steps, {nfe}")
    match placement:
        case "start":
            return tuple(i * nfe // count for i in range(count))
        case "interior":
            return tuple(2 * i * nfe // (2 * count - 1) for i in range(count))
        case "end":  # distances from the last step are rounded down, so that the shortest gaps are at the end
            return (0, *sorted(nfe - 1 - i * (nfe - 1) // max(count - 1, 1) for i in range(count - 1)))


@lru_cache
def spread_by_scores(alpha_bar: tuple[float, ...], count: int, beta: float) -> tuple[int, ...]:
    """I-steps from the mean score of every step (Eq. 13): denser where many decisions have accumulated.

    gamma_t = log sum_{i>=t} exp(beta * alpha_bar_i), taken in log-space because |beta| is in the thousands; v_t is
    exp(gamma_t) normalised over *all* steps; its cumulative distribution, walked in sampling order, is cut at the
    quantiles k / count. The paper normalises over i >= t, which makes v_T = 1 and crowds the start, its own worst case
    (docs/reproduction-notes.md, reading 4). A duplicate moves to the nearest unused later step, else earlier one.

    Args:
        alpha_bar: mean score per step in sampling order.
        count: number of I-steps, the first step included.
        beta: smoothing; the paper uses -2e3 to -8e3.
    """
    import numpy as np

    nfe = len(alpha_bar)
    spread_evenly(count, nfe)  # refuses an impossible count
    gamma = np.logaddexp.accumulate(beta * np.array(alpha_bar))
    weights = np.exp(gamma - gamma.max())
    cumulative = np.cumsum(weights / weights.sum())
    chosen = [0]
    for step in np.searchsorted(cumulative, np.arange(1, count) / count).tolist():
        free = [other for other in range(nfe) if other not in chosen]
        chosen.append(min(free, key=lambda other: (other < step, abs(other - step))))
    return tuple(sorted(chosen))


def reverse_gaps(i_steps: Sequence[int], nfe: int) -> tuple[int, ...]:
    """The same gaps between I-steps in the opposite order: Table VIII's control."""
    gaps = [stop - start for start, stop in zip(i_steps, [*i_steps[1:], nfe], strict=True)]
    return tuple(accumulate(reversed(gaps[1:]), initial=0))


def after_a_start(first: int, interval: int, nfe: int) -> tuple[int, ...]:
    """The first `first` steps, then every `interval`-th: the full steps of methods that forecast (TaylorSeer's code).

    A forecast needs values to go on from, hence the start; the last step is not forced.
    """
    return tuple(step for step in range(nfe) if step < first or (step - first + 1) % interval == 0)


def opened(run: Run, row: int, threshold: float) -> dict[Site, bool] | None:
    """Whether a router of Learning-to-Cache's form computes each part: its sigmoid is above the threshold.

    Args:
        row: of the table, counted from the last step.

    Returns:
        None if the run has no router.

    Raises:
        UserError: the router was made for another model or number of steps.
    """
    if (router := run.artefacts.tables.get("router")) is None:
        return None
    sites = run.shape.sites
    if len(router) != run.nfe or len(router[0]) != len(sites):
        raise UserError(
            f"the router has {len(router)} steps of {len(router[0])} branches, the run has {run.nfe} of {len(sites)}; "
            "use one that was trained for this model and NFE"
        )
    # the sigmoid in a form that overflows for no logit
    return {site: (1 + tanh(x / 2)) / 2 > threshold for site, x in zip(sites, router[row], strict=True)}


@dataclass(frozen=True)
class Pace:
    """How a released setting of ToCa varies the recomputed share of tokens, and the distance of full steps.

    Attributes:
        over_steps, over_blocks: slopes of the share.
        mlp, cross: the branches' factors of it.
        distance: slope w of the distance, N / (1 + w - 2 w i / S) at a full step that the counter calls i.
        shorten: whether the distance is 2 for 0.2 S <= i < 0.4 S.
        counts_up: the counter rises from 0, else it falls to 0.
    """

    over_steps: float
    over_blocks: float
    mlp: float = 1.0
    cross: float = 0.0
    distance: float = 0.4
    shorten: bool = True
    counts_up: bool = False

    def counter(self, step: int, nfe: int) -> int:
        """What the released code calls a step."""
        return step if self.counts_up else nfe - 1 - step

    def share(self, counter: int, nfe: int, block: int, num_blocks: int, branch: str = "mlp") -> float:
        """By how much the share of tokens that a branch recomputes is scaled; below 0 it means none."""
        by_step = 1 + self.over_steps - 2 * self.over_steps * counter / nfe
        by_block = 1 + self.over_blocks - 2 * self.over_blocks * block / max(1, num_blocks - 1)
        return by_block * by_step * (self.mlp if branch == "mlp" else self.cross)

    def renewed_interval(self, interval: float, counter: int, nfe: int, varies: bool = True) -> int:
        """The distance of full steps that a full step sets; the base distance if it does not vary."""
        import numpy as np

        if varies and self.shorten and int(0.2 * nfe) <= counter < int(0.4 * nfe):
            return 2
        slope = self.distance if varies else 0.0
        # in float32 and half to even, as released: in float64 interval 2 rounds 2.5 up at i / S = 0.75
        divisor = np.float32(1 + slope - 2 * slope * counter / nfe)
        return int(np.rint(np.float32(interval) * (1 / divisor)))


PACES = {
    "ddim50": Pace(2.0, -0.2, mlp=2.5),
    "ddpm250": Pace(0.4, 0.8, mlp=2.5),
    "pixart": Pace(0.9, 0.6, mlp=1.6, cross=0.6, distance=-0.2, shorten=False, counts_up=True),
    "constant": Pace(0.0, 0.0, cross=1.0),
}
"""By the name that methods call them.

In `ddim50` no tokens are recomputed in the first quarter of the steps, and more with depth. DiT's code calls it
"ToCa-ddim50", DuCa's "ToCa"; `ddpm250` is "ToCa-ddpm250" there, and the same as "linear-layerwise".
"""


def token_counts(ratios: Sequence[float], num_tokens: int) -> list[int]:
    """Shares of tokens as numbers of them, cut to 0 to 1 and truncated in float32, as ToCa's code does."""
    import numpy as np

    return [int(count) for count in np.array(ratios, dtype=np.float32).clip(0, 1) * num_tokens]
