"""The rows of config/speed-*.yaml cost what their budgets say, by the ledger and what stands in for reads."""

from pathlib import Path

import pytest

from tcbench.budget.costing import macs_of
from tcbench.budget.untrained import random_reads, untrained_artefacts
from tcbench.config.speed import SpeedModel, load_speed_suite
from tcbench.models.networks import build_transformer, make_adapter
from tcbench.models.specs import MODELS

CONFIG = Path(__file__).resolve().parent.parent / "config"
SUITES = {name: load_speed_suite(CONFIG / f"{name}.yaml") for name in ("speed-rivals", "speed-flows")}
NEAR = 0.065  # ToCa and DuCa come no nearer to 1.5 on Wan 2.1
EVERY = 3  # of the rows of an entry one in so many, other ones in each entry


def macs(network: str, model: SpeedModel, row: str, seed: int) -> int:
    settings, method = model.rows[row], model.method(row)
    spec = MODELS[network]
    adapter = make_adapter(build_transformer(spec, device="meta", zero_init=False), spec)
    artefacts = untrained_artefacts(adapter, method, settings.nfe, seed, settings.open_branches)
    reads = random_reads(seed, 0.5 if settings.open_branches is None else settings.open_branches)
    return macs_of(network, method, settings.nfe, artefacts, reads)["per_sample"]


ENTRIES = [(suite, model, place) for suite, of in SUITES.items() for place, model in enumerate(of.models)]


@pytest.mark.parametrize(("suite", "model", "first"), ENTRIES)
def test_rows_meet_their_budgets(suite, model, first):
    speed = SUITES[suite]
    network, rows = speed.network(model), speed.models[model]
    whole = macs(network, rows, "uncached", speed.seed)
    for row in [row for row in rows.rows if row != "uncached"][first::EVERY]:
        budget = float(row.partition("-")[0].removeprefix("x"))
        assert whole / macs(network, rows, row, speed.seed) == pytest.approx(budget, rel=NEAR), row
