"""Search what a row's samples deviate least with: its list of full steps, or options at the MACs of its target.

All rows have as many trials and the same calibration noise, which no evaluated sample shares.
"""

import time
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import artefacts_digest
from tcbench.budget.matching import mean, solve
from tcbench.budget.searching import Steps, search_steps
from tcbench.config.suite import Entry
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.models.adapter import Adapter
from tcbench.record.provenance import collect
from tcbench.record.records import SEARCHED, SearchTrial
from tcbench.registry import make_method
from tcbench.sampling import sample_batch, start_run
from tcbench.schedule import as_options
from tcbench.stages.conditioning import load_captions
from tcbench.stages.match import Calibration
from tcbench.stages.ready import load_adapter, prepared_row, sampler_settings
from tcbench.training.pairs import CALIBRATION_INDEX


def search_row(entry: Entry) -> None:
    """Write results/<suite>/searched/<row>.json.

    Raises:
        UserError: what the row samples with is missing or damaged, or no setting meets its target.
    """
    suite, started = entry.suite, time.time()
    adapter, captions = load_adapter(suite), load_captions(suite, held_out=False)
    ready, settings = prepared_row(entry, adapter), sampler_settings(entry, training=True)
    index = CALIBRATION_INDEX + torch.arange(suite.search.samples)

    def samples(on: Adapter, method: Method, artefacts: Any = None) -> Tensor:
        return sample_batch(on, method, ready.nfe, settings, index, artefacts, prompts=captions).image

    uncached = cache(lambda: samples(adapter, make_method("uncached", {})))
    with tqdm(total=suite.search.trials, desc=f"search {entry.name}", unit="trial", mininterval=1) as progress:

        def deviation(method: Method) -> float:
            found = (samples(ready.adapter, method, ready.artefacts) - uncached()).abs().mean().item()
            progress.update()
            return found

        if isinstance(entry.row.searched, dict):
            trials, ended = _options(entry, Calibration(suite, loaded=(adapter, captions)), deviation)
        else:
            _, run = start_run(adapter, ready.method, ready.nfe, settings, index, ready.artefacts)
            trials, ended = _lists(ready.method, ready.method.i_steps(run), run.nfe, suite.search.trials, deviation)
    SEARCHED.write(
        entry.searched,
        {
            "row": entry.name,
            "suite": suite.suite,
            "options": min(trials, key=lambda trial: trial["deviation"])["options"],
            "trials": trials,
            "ended": ended,
            "settings": entry.settings("search"),
            "artefacts": artefacts_digest(entry.artefacts) if entry.artefacts else None,
            "provenance": collect(suite.model_dump(mode="json"), [settings.seed], started, suite.dtypes),
        },
    )


def with_options(method: Method, options: dict[str, Any]) -> Method:
    """The method with some of its options changed."""
    return make_method(method.name, method.model_dump() | options)


def _lists(
    method: Method, own: Steps, nfe: int, most: int, deviation: Callable[[Method], float]
) -> tuple[list[SearchTrial], str]:
    def measure(steps: Steps) -> float:
        return deviation(with_options(method, as_options(steps, method)))

    tried, ended = search_steps(measure, own, nfe, most)
    return [
        {"options": as_options(steps, method), "deviation": found} for steps, found in tried.deviation.items()
    ], ended


def _options(
    entry: Entry, calibration: Calibration, deviation: Callable[[Method], float]
) -> tuple[list[SearchTrial], str]:
    """Every combination of the options' values, its knob solved for the MACs of the row's target."""
    suite, target, over = entry.suite, entry.target, entry.row.searched
    assert target is not None and isinstance(over, dict)
    combinations = [dict(zip(over, values, strict=True)) for values in product(*over.values())]
    if len(combinations) > suite.search.trials:
        raise UserError(
            f"row {entry.name}: searched: {len(combinations)} combinations, and search.trials is "
            f"{suite.search.trials}; give fewer values"
        )
    budget = mean(calibration.basis(target).macs(suite.model.name, target.method, entry.nfe))
    basis, trials = calibration.basis(entry), list[SearchTrial]()
    for options in combinations:
        match = solve(suite.model.name, with_options(entry.method, options), entry.nfe, budget, basis=basis)
        if match.reachable:
            found = options | {str(match.method.knob): match.setting}
            trials.append({"options": found, "deviation": deviation(match.method)})
    if not trials:
        raise UserError(
            f"row {entry.name}: searched: no combination meets the MACs of {target.name}; give other values"
        )
    unmet = len(combinations) - len(trials)
    return trials, "all combinations were tried" + (f"; {unmet} do not meet the target's MACs" if unmet else "")
