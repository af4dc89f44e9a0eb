"""The MAC ruler against torch's counter and against hand-made sums; `test_paper_cells.py` holds it to the paper."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tcbench.budget.costing import macs_of
from tcbench.cli import main
from tcbench.errors import UserError
from tcbench.ledger import Ledger, block_macs, part_macs, plan_macs
from tcbench.models.specs import MODELS
from tcbench.plan import ALL, NONE, Block, Decision, Plan, Span, Tokens, every_unit
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.shapes import Macs
from tcbench.stages.memory import cache_bytes

from .conftest import make_adapter, make_shape, model_inputs
from .test_contract import artefacts_for

STORING: dict[str, dict[str, object]] = {
    "uncached": {},
    "tokencache": {"refiner_blocks": 1, "num_full_steps": 2, "schedule": "even", "beta": -50},
    "toca": {"interval": 3},
    "taylorseer": {"num_full_steps": 4, "order": 2},
    "goc": {"num_full_steps": 3},
    "clusca": {"num_full_steps": 3, "clusters": 4, "order": 1},
    "teacache": {"threshold": 0.0001},
    "dbcache": {"threshold": 0.0001, "first_blocks": 1, "warmup_steps": 2, "order": 1},
}
"""Methods that hold different things between steps; those that decide on the host compute every step here."""

SMALL = make_shape(3, 2, modulation=Macs(100), outer=Macs(1000, 10))


def dit(resolution: int) -> str:
    return f"dit-xl-2-{resolution}"


# --- full-size models


@pytest.mark.parametrize(("resolution", "nfe", "full"), [(256, 50, 12), (256, 10, 6), (512, 20, 10)])
def test_the_predictor_is_charged_on_every_p_step(resolution: int, nfe: int, full: int) -> None:
    totals = macs_of(dit(resolution), make_method("tokencache", {}), nfe)
    shape = MODELS[dit(resolution)].shape
    once = block_macs(shape, 0, None).matmul + shape.width * shape.num_blocks * shape.num_tokens
    assert totals["full_steps"] == full
    assert totals["by_tag"]["predictor"] == 2 * (nfe - full) * once
    assert totals["per_sample"] == totals["per_sample_without_overheads"] + totals["by_tag"]["predictor"]


@pytest.mark.parametrize(
    ("resolution", "matmul", "paper_rule"), [(256, 118.6214e9, 118.6887e9), (512, 524.5383e9, 524.8073e9)]
)
def test_one_forward_of_dit_xl(resolution: int, matmul: float, paper_rule: float) -> None:
    macs = plan_macs(Plan(), MODELS[dit(resolution)].shape)
    assert macs.matmul == pytest.approx(matmul, abs=5e4)
    assert macs.paper_rule == pytest.approx(paper_rule, abs=5e4)


# --- torch's counter


@pytest.mark.parametrize("model", ["dit-xl-2-256", "dit-xl-2-512", "digits-dit", "tiny-dit"])
def test_whole_model_by_torchs_counter(model: str) -> None:
    """diffusers' forward runs the timestep MLP in every block and again before its final layer; here it runs once."""
    adapter, rows = make_adapter(model, "meta"), 2
    latent, label = model_inputs(adapter, rows)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        adapter.model(latent, torch.zeros(rows, dtype=torch.int64, device="meta"), class_labels=label)
    shape = adapter.shape
    timestep_mlp = 256 * shape.width + shape.width**2
    ours = plan_macs(Plan(), shape).matmul + shape.num_blocks * timestep_mlp
    assert counter.get_total_flops() == 2 * rows * ours


# --- by hand: width 8, 4 tokens, of which 2 are recomputed


@pytest.mark.parametrize(
    ("keys", "attention", "norms"),
    [
        ("cached", 2 * 8 * 8 * 4 + 2 * 2 * 4 * 8, 2 * 8),  # q, k, v, o of 2 tokens; both products over 4 keys
        ("fresh", 2 * 8 * 8 * 4 + 2 * 2 * 2 * 8, 2 * 8),  # over 2 keys
        ("recomputed", 2 * 8 * 8 * 2 + 4 * 8 * 8 * 2 + 2 * 2 * 4 * 8, (2 + 4) * 8),  # q, o of 2; k, v of 4
    ],
)
def test_recomputing_half_the_tokens(keys, attention: int, norms: int) -> None:
    mlp = Macs(2 * 8 * 32 * 2, 2 * 8)
    assert part_macs(SMALL, SMALL.blocks[0].parts[0], 2, keys) == Macs(attention, norms)
    assert block_macs(SMALL, 0, 2, keys) == Macs(attention, norms) + mlp + Macs(100)
    plan = Plan({Block(1): Decision(Tokens(torch.zeros(1, 2, dtype=torch.int64)), keys=keys)})
    others = block_macs(SMALL, 0, None) * 2
    assert plan_macs(plan, SMALL) == Macs(1000, 10) + others + Macs(attention + 100, norms) + mlp


def test_nothing_recomputed() -> None:
    """A held block or span costs nothing; held parts still cost the modulation that gates them."""
    everything = 3 * (4 * 4 * 64 + 2 * 16 * 8 + 4 * 2 * 256 + 100)
    assert plan_macs(Plan(), SMALL).matmul == 1000 + everything
    assert plan_macs(every_unit([Block(0), Span(1, 3)], ALL), SMALL).matmul == 1000 + everything
    assert plan_macs(every_unit([Block(0), Span(1, 3)], NONE), SMALL) == Macs(1000, 10)
    assert plan_macs(every_unit(SMALL.sites, NONE), SMALL) == Macs(1000 + 3 * 100, 10)


@pytest.mark.parametrize("rows_per_sample", [1, 2])
def test_ledger_totals(rows_per_sample: int) -> None:
    ledger = Ledger(rows_per_sample)
    ledger.charge("model", Macs(100, 5))
    ledger.charge("model", Macs(10, 1))
    ledger.charge("predictor", Macs(7, 3))
    assert ledger.totals() == {
        "per_sample": rows_per_sample * 117,
        "per_sample_without_overheads": rows_per_sample * 110,
        "paper_rule": rows_per_sample * (110 + 4 * 6),
        "by_tag": {"model": rows_per_sample * 110, "predictor": rows_per_sample * 7},
    }


# --- the command


def test_command_prints_json(capsys) -> None:
    assert main(["macs", "--model", "dit-xl-2-256", "--method", "tokencache", "--nfe", "50", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "share out the tokens over blocks" in printed.pop("estimate")
    assert 0.4 < printed.pop("of_uncached") < 0.5
    assert printed == json.loads(json.dumps(macs_of("dit-xl-2-256", make_method("tokencache", {}), 50)))
    assert set(printed) == {
        "model",
        "method",
        "options",
        "nfe",
        "sampled_steps",
        "full_steps",
        "per_sample",
        "per_sample_without_overheads",
        "paper_rule",
        "by_tag",
    }
    assert (printed["nfe"], printed["sampled_steps"], printed["full_steps"]) == (50, 50, 12)


def test_command_prints_text(capsys) -> None:
    assert (
        main(["macs", "--model", "dit-xl-2-256", "--method", "tokencache", "--nfe", "50", "--set", "cache_ratio=0.5"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"  of uncached +\d\d\.\d\d%", lines[-1])
    totals = macs_of("dit-xl-2-256", make_method("tokencache", {"cache_ratio": 0.5}), 50)
    assert "tokencache on dit-xl-2-256, NFE 50" in lines[0]
    assert lines[1].startswith("  an estimate: the batch's scores share out the tokens over blocks")
    assert [line.split()[-2:] for line in lines[2:5]] == [
        [f"{totals[key] / 1e12:.4f}", "T"] for key in ("per_sample", "per_sample_without_overheads", "paper_rule")
    ]


def test_numbers_the_paper_does_not_name_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"tokencache: the paper names no num_full_steps and beta for 256 tokens"):
        macs_of("dit-xl-2-256", make_method("tokencache", {}), 30)


# --- memory


@pytest.mark.parametrize("name", STORING)
def test_memory_from_shapes_is_what_a_run_holds(name: str) -> None:
    """In a batch of two, of which every one holds as much."""
    method = make_method(name, STORING.get(name, {}))
    adapter, settings = make_adapter("tiny-dit"), SamplerSettings(1.5)
    artefacts = artefacts_for(adapter, method.sampled_steps(6))
    held = sample_batch(adapter, method, 6, settings, torch.arange(2), artefacts).cache_bytes
    assert cache_bytes("tiny-dit", method, 6) == held / 2
