"""Golden cases of methods that name themselves (`method` in the JSON): how their settings become options of ours.

A rival is an entry of `RIVALS`, by the name that its cases give; docs/goldens.md says how to add one.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tcbench.artefacts import as_table, schedule_table
from tcbench.errors import UserError
from tcbench.golden.calibration import ratios_error
from tcbench.golden.case import Case, Unsupported
from tcbench.golden.compare import compare, largest_errors
from tcbench.golden.sampling import Given, Outcome, sample_case, sampler_of
from tcbench.method import Artefacts
from tcbench.registry import make_method

TOLERANCES = {
    "eps": 3e-5,
    "eps_at": 3e-5,
    "eps_from_x_in": 3e-5,
    "final": 1e-3,
    "score": 5e-6,
    "threshold": 1e-6,
    "threshold_in_force": 1e-6,
    "diff": 1e-5,
    "distance": 1e-5,
    "accumulated": 1e-5,
    "error": 3e-5,
    "error_mean": 2e-5,
    "logit": 4e-4,
}
"""Several times what the references differ by from themselves in float64; decisions, which are not named, are exact."""


@dataclass(frozen=True)
class Rival:
    """How the cases of a method are run with ours.

    Attributes:
        method: the name of a file of `methods/`.
        options: a case -> the options that it was made with.
        artefacts: a case -> what was trained for it.
        given: a case -> what the method is shown instead of what it would observe, by observation.
        quantities: what this package computed, by the name of the reference's tensor, beside what all cases have.
        tolerances: of quantities that `TOLERANCES` does not name.
        more: (case, outcome) -> the largest error of further quantities, of what the method is calibrated with for one.
    """

    method: str
    options: Callable[[Case], dict[str, Any]]
    artefacts: Callable[[Case], Artefacts] = lambda _: Artefacts()
    given: Callable[[Case], Mapping[str, Given]] = lambda _: {}
    quantities: Mapping[str, Callable[[Outcome], Tensor]] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)
    more: Callable[[Case, Outcome], dict[str, float]] = lambda case, outcome: {}

    def run(self, case: Case) -> dict[str, float]:
        """The largest error by quantity.

        Raises:
            Unsupported: settings that ours does not have.
        """
        options = self.options(case)
        try:
            method = make_method(self.method, options)
        except UserError as error:
            raise Unsupported(str(error)) from error
        outcome = sample_case(case, method, self.artefacts(case), self.given(case))
        wanted = {name: ours(outcome) for name, ours in self.quantities.items() if name in case.expected}
        return compare(case, outcome) | largest_errors(case, wanted, case.expected) | self.more(case, outcome)


def settings(**named: str) -> Callable[[Case], dict[str, Any]]:
    """Options of ours by the names of the reference's settings."""
    return lambda case: {ours: case.setting(theirs) for ours, theirs in named.items()}


def number_read(outcome: Outcome) -> Tensor:
    """The number by which every step was decided on the host, NaN where none was read: float64 [S]."""
    last = [numbers[-1] if numbers else float("nan") for numbers in outcome.numbers]
    return torch.tensor(last, dtype=torch.float64)


def router_of(case: Case) -> Artefacts:
    """The router that a case stores."""
    return Artefacts(tables={"router": as_table(case.expected["router_prob"])})


def _schedule(case: Case) -> Artefacts:
    lists, steps = case.setting("schedule"), sampler_of(case, 0).timesteps
    return Artefacts(tables={"schedule": schedule_table(lists, case.adapter().shape, len(steps))})


def _taylorseer_of_diffusers(case: Case) -> dict[str, Any]:
    options = settings(interval="cache_interval", order="max_order", first_enhance="disable_cache_before_step")(case)
    return {"schedule": "diffusers", **options}


def _dbcache(case: Case) -> dict[str, Any]:
    limits = {"max_cached": "max_cached_steps", "max_continuous": "max_continuous_cached_steps"}
    given = {ours: case.setting(theirs) for ours, theirs in limits.items() if case.setting(theirs) >= 0}
    order = re.search(r"order (\d+)", str(case.setting("calibrator")))
    return {
        "threshold": case.setting("residual_diff_threshold"),
        "first_blocks": case.setting("Fn_compute_blocks"),
        "last_blocks": case.setting("Bn_compute_blocks"),
        "warmup_steps": case.setting("max_warmup_steps"),
        "order": int(order[1]) if order else 0,
        **given,
    }


def _magcache(case: Case) -> dict[str, Any]:
    named = settings(
        threshold="threshold", max_continuous="max_skip_steps", retention="retention_ratio", ratios="mag_ratios"
    )
    return named(case)


def _seacache(case: Case) -> dict[str, Any]:
    named = settings(
        threshold="threshold",
        order="residual_order",
        power="power_exp",
        first_steps="retention_steps",
        last_steps="cache_end_steps",
    )
    return named(case) | {"max_continuous": case.setting("max_consecutive_cached") or None}


def _change(outcome: Outcome) -> Tensor:
    return torch.tensor([state["change"] for state in outcome.states], dtype=torch.float64)


RIVALS: dict[str, Rival] = {
    "taylorseer": Rival("taylorseer", settings(interval="interval", order="max_order", first_enhance="first_enhance")),
    "taylorseer_diffusers": Rival("taylorseer", _taylorseer_of_diffusers),
    "smoothcache": Rival("smoothcache", lambda _: {}, _schedule),
    "harmonica": Rival("harmonica", settings(threshold="thres"), router_of),
    "fbcache": Rival("first_block", settings(threshold="threshold"), quantities={"diff": number_read}),
    "dbcache": Rival("dbcache", _dbcache, quantities={"diff": number_read}),
    "magcache": Rival("magcache", _magcache, tolerances={"mag_ratios": 2e-5}, more=lambda case, _: ratios_error(case)),
    "seacache": Rival(
        "seacache",
        _seacache,
        quantities={"distance": number_read, "accumulated": _change},
    ),
}
"""By the `method` that a case names."""
