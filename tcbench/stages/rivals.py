"""One contender of a table of rivals: its knob is solved for every budget, and the rows that come of it are sampled and
scored."""

import time
from functools import cache
from typing import Any, cast

from tcbench.budget.borrowing import training_record
from tcbench.budget.costing import macs_of
from tcbench.budget.matching import mean
from tcbench.budget.reaching import Reached, reach
from tcbench.config.fields import Rivals, Row
from tcbench.config.suite import AblationSuite, Entry, Suite, with_own
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.record.provenance import collect
from tcbench.record.rivals import RIVAL, AtBudget, Rival
from tcbench.record.score import Provenance
from tcbench.registry import make_method
from tcbench.stages.match import Calibration
from tcbench.stages.sample import sample_rows
from tcbench.stages.score import measure_seed_noise, score_rows

UNCACHED = "uncached"
CALIBRATION_BATCHES = 1
"""That MACs are measured on where they depend on the sample; a trial of the knob is a run."""


def run_rival(suite: Suite, contender: str) -> None:
    """Write results/<suite>/rivals/<contender>.json, samples and scores of what it names.

    `uncached` is what all are compared with, and is run before them, with the yardstick of seed noise.

    Raises:
        UserError: the suite has no such rival, or what it takes was not trained; as solving, sampling and scoring.
    """
    part, rivals, started = suite.rival_suite, suite.rivals, time.time()
    if part is None or rivals is None:
        raise UserError(f"suite {suite.suite}: compares no rivals; give its config `rivals`")
    if contender == UNCACHED:
        (reference,) = part.references
        only = with_own(part, {reference.name: reference.row})
        sample_rows(only.entries)
        score_rows(only.entries)
        measure_seed_noise(only)
        label, budgets = reference.label, list[AtBudget]()
    elif contender in rivals.contenders:
        entry = part[f"{part.ablation}-{contender}"]
        training_record(entry)  # without it the knob would be solved from stand-ins
        label, budgets = entry.label, _solve(part, rivals, entry)
        rows = with_own(part, {str(at["row"]): _solved(entry, at) for at in budgets if at["row"]}).entries
        sample_rows(rows)
        if rows:
            score_rows(rows)
    else:
        names = ", ".join([UNCACHED, *rivals.contenders])
        raise UserError(f"--method {contender}: no rival of suite {suite.suite}; {names}")
    provenance = cast(Provenance, collect(suite.model_dump(mode="json"), [suite.samples.seed], started))
    method = rivals.contenders.get(contender, UNCACHED)
    record = Rival(suite=suite.suite, method=method, label=label, budgets=budgets, provenance=provenance)
    RIVAL.write(suite.rival_record(contender), record)


def _solve(part: AblationSuite, rivals: Rivals, entry: Entry) -> list[AtBudget]:
    model, method = part.model.name, entry.method
    basis = Calibration(part, CALIBRATION_BATCHES).basis(entry)
    macs = cache(lambda setting: mean(basis.macs(model, setting, entry.nfe)))
    whole = macs_of(model, make_method(UNCACHED, {}), entry.nfe)["per_sample"]
    budgets = []
    for ratio in rivals.ratios:
        found = reach(method, rivals.methods[method.name], entry.nfe, whole / ratio, macs, rivals.near)
        budgets.append(
            AtBudget(
                ratio=ratio,
                target_macs=round(whole / ratio),
                row=f"{entry.name}-x{ratio:g}" if abs(found.off) <= rivals.near else None,
                options=_changed(method, found),
                macs=found.macs,
                counted=f"{CALIBRATION_BATCHES} calibration batch" if basis.measure else "shapes",
            )
        )
    return budgets


def _changed(method: Method, found: Reached) -> dict[str, Any]:
    """The options of a setting that are not the method's own, the knob first."""
    before, after = method.model_dump(mode="json"), found.method.model_dump(mode="json")
    knob = str(method.knob)
    return {knob: after[knob]} | {name: value for name, value in after.items() if value != before[name]}


def _solved(entry: Entry, at: AtBudget) -> Row:
    source = entry.trained_as
    return entry.row.model_copy(
        update={
            "options": entry.row.options | at["options"],
            "artefacts_from": source.name if source else None,
            "training_seed": None,
            "label": entry.label,
        }
    )
