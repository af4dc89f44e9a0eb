"""SmoothCache's error curves with the lists made from them, and MagCache's ratios, against their own calibrations."""

from typing import Any

import torch
from torch import Tensor

from tcbench.artefacts import as_table
from tcbench.golden.case import Case, Unsupported
from tcbench.golden.compare import largest_errors
from tcbench.golden.sampling import case_run
from tcbench.method import Artefacts
from tcbench.registry import make_method
from tcbench.training.calibration import BranchErrors, Magnitudes, Observer, observe


def run_calibration(case: Case) -> dict[str, float]:
    """SmoothCache's curves by block (`error`) and part (`error_mean`), and how many entries of its lists differ."""
    adapter, _, run = case_run(case)
    lookahead, parts = int(case.number("calibration_lookahead")), tuple(adapter.shape.kinds)
    if case.setting("components") != list(parts):
        raise Unsupported(f"components {case.setting('components')!r} are not {', '.join(parts)}")
    curves = BranchErrors(adapter.shape, run.nfe, lookahead)
    _observe(case, curves)
    by_block = curves.by_block().unflatten(0, (-1, len(parts))).transpose(0, 1)
    errors = largest_errors(case, {"error": by_block, "error_mean": curves.by_part()}, case.expected)
    differ = 0
    for threshold, lists in case.setting("schedules_by_threshold").items():
        method: Any = make_method("smoothcache", {"threshold": float(threshold), "lookahead": lookahead})
        # in the curves' own precision: a mean error may lie close to a threshold
        artefacts = Artefacts(tables={"errors": as_table(curves.by_part().flatten(0, 1))})
        _, _, run = case_run(case, artefacts)
        for step in range(run.nfe):
            computed = method.recomputed(run, step)
            differ += sum(computed[site] != bool(lists[site.part][step]) for site in adapter.shape.sites)
    return errors | {"schedules_by_threshold": float(differ)}


def ratios_error(case: Case) -> dict[str, float]:
    """How far the case's ratios are from what an uncached run of its samples gives, if they are of its steps."""
    adapter, _, run = case_run(case)
    theirs = torch.tensor(case.setting("mag_ratios"), dtype=torch.float64)
    if len(theirs) != run.nfe:
        return {}
    ours = Magnitudes(adapter.shape, run.nfe)
    _observe(case, ours)
    return {"mag_ratios": _largest(torch.tensor(ours.table()[0], dtype=torch.float64) - theirs)}


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


@torch.inference_mode()
def _observe(case: Case, observer: Observer) -> None:
    adapter, sampler, run = case_run(case)
    observe(observer, adapter, run, sampler, case.input("z"), case.prompt())
