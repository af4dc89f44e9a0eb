"""How far this package's tensors and token choices are from the reference's."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.golden.case import Case
from tcbench.golden.sampling import Outcome
from tcbench.plan import Block, Site, Span
from tcbench.record.executed import ALL, Executed

MARGIN = 10
"""Tolerances are this many times the rounding that was seen on the cases of tests/golden, whatever instructions torch
and its libraries were limited to. Most of it comes from the sines of float32 timesteps."""

SCORE_ROUNDING = 1.7e-6
DECIDING_GAP = 2 * MARGIN * SCORE_ROUNDING  # where the last chosen token scores less above the next, rounding decides


def largest_errors(case: Case, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """By name, for tensors on both sides: the largest absolute difference of numbers, how many decisions differ.

    NaN stands for what there is not: on both sides it is no difference, on one it is an infinite one.

    Raises:
        UserError: shapes differ.
    """
    errors = {}
    for name in (name for name in ours if name in expected):
        one, other = ours[name], expected[name]
        if one.shape != other.shape:
            shapes = f"{name}: shape {list(other.shape)}, computed {list(one.shape)}"
            raise UserError(f"{case.directory / case.name}.safetensors: {shapes}; check the case's settings")
        one_is, other_is = one.double(), other.double()
        difference = (one_is - other_is).abs().masked_fill(one_is.isnan() & other_is.isnan(), 0)
        errors[name] = (difference.max() if one.is_floating_point() else difference.count_nonzero()).item()
    return errors


def compare(case: Case, outcome: Outcome) -> dict[str, float]:
    """The quantities of every sampling case."""
    expected = dict(case.expected)
    if not expected.keys() & {"eps", "eps_at", "final"}:
        raise UserError(f"{case.directory / case.name}.safetensors: neither eps nor final; nothing to compare with")
    ours = dict(outcome.tensors)
    if "eps_at" in expected:
        ours["eps_at"] = ours["eps"][expected["eps_at_steps"]]
    if "eps" in expected:
        expected["eps_from_x_in"] = expected["eps"]
        ours["eps"] = ours["eps"][-len(expected["eps"]) :]  # of all steps, or of the last ones
    full = [
        [[_done(outcome, step, Site(block, part)) == ALL for part in ("attn", "mlp")] for block in _blocks(outcome)]
        for step in range(outcome.run.nfe)
    ]
    return largest_errors(case, {**ours, "recomputed": torch.tensor(full)}, expected)


def _done(outcome: Outcome, step: int, site: Site) -> Executed:
    """What a step did in a part of a block, whatever unit it belonged to."""
    block, blocks = site.block, len(_blocks(outcome))
    spans = (Span(first, stop) for first in range(block + 1) for stop in range(block + 1, blocks + 1))
    planned = outcome.executed.steps[step]
    return next((planned[str(unit)] for unit in (site, Block(block), *spans) if str(unit) in planned), ALL)


def compare_tokens(case: Case, outcome: Outcome) -> dict[str, float]:
    """ToCa's decisions: which blocks are partial, under which interval; which tokens they recompute, by which score."""
    expected, run, blocks = case.expected, outcome.run, _blocks(outcome)
    method: Any = outcome.method
    branches = [part for part, kind in run.shape.kinds.items() if kind != "mix"]
    done = [
        [[outcome.executed.at(step, Site(block, branch)) for branch in ("attn", *branches)] for block in blocks]
        for step in range(run.nfe)
    ]
    partial = [[attn != ALL for attn, *_ in of] for of in done]
    counters = [method.counter(step, run.nfe) for step in range(run.nfe)]
    ratios = [[method.ratio(counter, run.nfe, block, len(blocks)) for block in blocks] for counter in counters]
    fresh = torch.tensor([[[each.count for each in row] for _, *row in of] for of in done])
    ours = {
        "type": torch.tensor(partial),
        "fresh_count": fresh if case.pixart else fresh[:, :, 0],
        "threshold_in_force": torch.tensor([row.intervals for row in method.timetable(run)]),
        "fresh_ratio": torch.tensor(ratios) * torch.tensor(partial),
    }
    errors = largest_errors(case, ours, expected)
    # [S, block, branch, ...]; DiT's cases have one branch and no axis for it
    of_branches = {
        name: tensor if case.pixart else tensor[:, :, None] for name, tensor in expected.items() if tensor.ndim > 1
    }
    sites = [(step, Site(block, branch)) for step in range(run.nfe) for block in blocks for branch in branches]
    if "fresh_idx" in expected:
        wrong = [_other_tokens(of_branches, outcome, step, site, branches.index(site.part)) for step, site in sites]
        errors["fresh_idx"] = float(sum(wrong))
    if "score" in expected:
        by_site = [
            largest_errors(
                case,
                {"score": outcome.scores[step][site]},
                {"score": of_branches["score"][step, site.block, branches.index(site.part)]},
            )["score"]
            for step, site in sites
            if site in outcome.scores[step]
        ]
        errors["score"] = torch.tensor([0.0, *by_site]).max().item()  # NaN, if there is one
    return errors


def _other_tokens(expected: Mapping[str, Tensor], outcome: Outcome, step: int, site: Site, branch: int) -> int:
    """How many rows choose another set of tokens, where the scores leave no doubt."""
    place = (step, site.block, branch)
    if "kth_gap" in expected and expected["kth_gap"][place] <= DECIDING_GAP:
        return 0
    theirs = [set(row) - {-1} for row in expected["fresh_idx"][place].tolist()]
    tokens = outcome.chosen[step].get(site)
    ours = [set(row) for row in ([[]] * len(theirs) if tokens is None else tokens.tolist())]
    return sum(map(operator.ne, ours, theirs))


def _blocks(outcome: Outcome) -> range:
    return range(outcome.run.shape.num_blocks)
