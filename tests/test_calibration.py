"""What uncached runs are calibrated for, the lists that methods read from files, and the schedules made of both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tcbench.artefacts import load_numbers, read_schedule, save_artefacts, schedule_table
from tcbench.budget.costing import macs_of, run_of_shapes
from tcbench.data import Dataset
from tcbench.errors import UserError
from tcbench.method import Artefacts, Run
from tcbench.models.specs import MODELS
from tcbench.plan import Site
from tcbench.record.files import write_json
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.training.caching import train

from .conftest import make_adapter

SHAPE = MODELS["tiny-dit"].shape
SITES = SHAPE.sites


def run_with(tables: dict[str, Any], steps: int) -> Run:
    run = run_of_shapes("tiny-dit", steps)
    return Run(run.shape, run.timesteps, run.guidance, run.sample_index, artefacts=Artefacts(tables=tables))


@pytest.mark.parametrize("name", ["smoothcache", "magcache"])
def test_a_row_calibrates_itself_and_repeats_to_the_bit(name: str, tmp_path: Path) -> None:
    adapter, method = make_adapter("tiny-dit"), make_method(name, {"calibration_samples": 3})
    data = Dataset(torch.zeros(4, 4, 16, 16), torch.arange(4))
    settings = SamplerSettings(guidance_scale=1.5, seed=3)
    artefacts, refiners, log = train(adapter, method, 6, settings, data, 0)
    again, _, _ = train(adapter, method, 6, settings, data, 1)
    ((table, values),) = artefacts.tables.items()
    assert str(values) == str(again.tables[table]), "calibration noise does not depend on the training seed"
    save_artefacts(tmp_path, artefacts, refiners, log)
    run = run_with(dict(load_numbers(tmp_path).tables), 6)
    assert method.i_steps(run) == method.i_steps(run_with({table: values}, 6)) and 0 in method.i_steps(run)
    assert method.macs_depend_on(run.artefacts) is None and method.macs_depend_on(Artefacts())


def test_reuse_is_judged_afresh_at_every_computed_step() -> None:
    low, high, none = 0.1, 0.9, float("nan")
    #        computed: 0, 3 (2 within), 4 (none within), 6 (1 within), and the last
    curves = ((low, low, low, high, low, low, low, none), (low, low, low, high, high, low, none, none))
    run = run_with({"errors": curves + curves}, 8)
    assert make_method("smoothcache", {"threshold": 0.1, "lookahead": 2}).i_steps(run) == (0, 3, 4, 6, 7)
    with pytest.raises(UserError, match="curves are of 8 steps and 4 columns, the run needs 8 and 6"):
        make_method("smoothcache", {}).i_steps(run)


def test_a_blocks_own_list_goes_before_its_components() -> None:
    lists = {"attn": [0, 1, 0], "attn-1": [1, 0], "mlp": [1, 0, 0]}
    table = schedule_table(lists, SHAPE, 4)
    column = {site: [row[place] for row in table] for place, site in enumerate(SITES)}
    assert column[Site(0, "attn")] == [0, 1, 0, 1] and column[Site(1, "attn")] == [1, 0, 1, 1]
    assert column[Site(2, "mlp")] == [1, 0, 0, 1]
    computed = make_method("smoothcache", {}).recomputed(run_with({"schedule": table}, 4), 0)
    assert all(computed.values()), "nothing is stored yet"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 0], "holds no lists"),
        ({}, "holds no lists"),
        ({"ff": [1, 0, 1]}, "'ff' is no part of this model"),
        ({"attn-9": [1, 0, 1]}, "'attn-9' is no part of this model"),
        ({"attn": [1, 2, 1]}, "attn: holds something else than ones and zeros"),
        ({"attn": [1, 0]}, "attn: a list of 2 steps, the run has 3"),
    ],
)
def test_bad_lists_are_refused(content: Any, says: str, tmp_path: Path) -> None:
    write_json(path := tmp_path / "lists.json", content)
    with pytest.raises(UserError) as caught:
        read_schedule(path, SHAPE, 3)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_lists_are_costed_without_training(tmp_path: Path) -> None:
    write_json(path := tmp_path / "lists.json", {"attn": [1, 1, 0, 1], "mlp": [1, 0, 0, 1]})
    method = make_method("smoothcache", {"schedule": str(path)})
    macs = macs_of("tiny-dit", method, 4)
    full = macs_of("tiny-dit", make_method("uncached", {}), 4)["per_sample"]
    assert macs["full_steps"] == 2 and full / 2 < macs["per_sample"] < full and method.files() == (str(path),)


@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({"threshold": 0.06}, (0, 1, 3, 5, 7)),  # 1.02 - 1 and 1.02^2 - 1 are 0.0604 together
        ({"threshold": 0.0}, tuple(range(8))),
        ({"threshold": 1.0, "max_continuous": 2}, (0, 1, 4, 7)),
        ({"threshold": 1.0, "retention": 0.2, "rule": "authors", "max_continuous": 3}, (0, 4)),
    ],
)
def test_magnitudes_add_up(options: dict, full: tuple[int, ...]) -> None:
    method = make_method("magcache", {"ratios": (1.0, *(1.02,) * 7), **options})
    assert method.i_steps(run_of_shapes("tiny-dit", 8)) == full
    assert method.training(run_of_shapes("tiny-dit", 8)) == ()
