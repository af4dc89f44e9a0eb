"""Does the predictor pick the right tokens? One-step local error of several selectors at equal budgets.

Pairs of neighbouring steps as in training, drawn with another seed. The cache is filled by the uncached forward at the
earlier step; at the later one a selector names the tokens to recompute, and the error is |x-hat^L - x^L|^2 summed over
tokens and channels (the cache loss of Eq. 9 with hard gates). Refiner blocks run, without LoRA. The oracle knows how
much every token's update really changed.
"""

import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench import noise
from tcbench.config import Suite
from tcbench.data import load_images
from tcbench.engine import Engine
from tcbench.files import write_json
from tcbench.method import Run, TrainScorer
from tcbench.plan import (
    ALL,
    NONE,
    Block,
    Decision,
    Keys,
    Plan,
    allocate_evenly,
    allocate_tokens,
    every_unit,
    top_tokens,
)
from tcbench.provenance import collect
from tcbench.sampling import make_sampler
from tcbench.stages.common import artefacts_folder, load_adapter, sampler_settings
from tcbench.training.caching import Pairs, load_artefacts, uncached_updates

SEED_OFFSET = 7919  # the pairs are not the ones that training saw
RATIOS = (0.9, 0.7, 0.5)


@torch.inference_mode()
def diagnose_row(suite: Suite, row: str) -> None:
    """Write results/<suite>/diagnostics/<row>.json for a trained row."""
    started = time.time()
    folder = artefacts_folder(suite, row)
    assert folder is not None, f"{row} trains nothing"
    adapter = load_adapter(suite)
    artefacts, _ = load_artefacts(folder, adapter)  # the plain model: LoRA would hide what selection does
    shape, method = adapter.shape, suite.method(row)
    sampler = make_sampler(adapter, suite.rows[row].nfe, sampler_settings(suite), torch.arange(0))
    run = Run(shape, sampler.timesteps, False, torch.arange(suite.diagnostics_pairs))
    free = next(stage.free_blocks for stage in method.training(run) if isinstance(stage, TrainScorer))
    pairs = Pairs(adapter, load_images(suite.data), sampler, suite.training_seed + SEED_OFFSET)

    step = pairs.steps(suite.diagnostics_pairs)
    x, label = pairs.start(step)
    earlier = pairs.embed(x, step, label)
    hidden, before = uncached_updates(adapter, *earlier)
    later = pairs.embed(pairs.next(x, hidden, earlier[1], step), step + 1, label)
    target, after = uncached_updates(adapter, *later)

    units = [Block(block) for block in range(free)]
    alpha_RLN = artefacts.scorers["predictor"](adapter, *later)[:, :free]
    change_RLN = torch.stack([(after[unit] - before[unit]).square().sum(-1) for unit in units], dim=1)
    index = torch.arange(len(x), device=x.device)
    random_RLN = noise.uniform(suite.training_seed, index, free * shape.num_tokens).view_as(alpha_RLN)

    def local_error(plan: Plan, keys: Keys) -> dict[str, float]:
        engine = Engine(adapter, run)
        engine.hidden(every_unit(units, ALL, keys=keys), 0, *earlier)
        error_R = (engine.hidden(plan, 1, *later) - target).square().sum((1, 2))
        return {"error": error_R.mean().item(), "standard_error": error_R.std().item() / len(x) ** 0.5}

    cases: list[dict[str, Any]] = [{"selector": "none", **local_error(every_unit(units, NONE), "fresh")}]
    selectors = {"predictor": alpha_RLN, "random": random_RLN, "oracle": change_RLN}
    grid = [(r, keys, name) for r in RATIOS for keys in ("cached", "fresh") for name in selectors]
    for ratio, keys, name in tqdm(grid, desc=f"diagnose {row}", mininterval=1):
        budget = round((1 - ratio) * free * shape.num_tokens)
        for allocation, counts in (
            ("batch", allocate_tokens(selectors[name], budget).tolist()),
            ("uniform", allocate_evenly(free, budget)),
        ):
            plan = Plan(
                {
                    unit: Decision(top_tokens(selectors[name][:, unit.block], counts[unit.block]), keys=keys)
                    for unit in units
                }
            )
            case = {"selector": name, "cache_ratio": ratio, "keys": keys, "allocation": allocation, "kept": counts}
            cases.append(case | local_error(plan, keys))
    top = change_RLN.flatten(1).sort(descending=True).values
    write_json(
        suite.folder / "diagnostics" / f"{row}.json",
        {
            "row": row,
            "pairs": len(x),
            "cases": cases,
            "rank_correlation_per_block": _rank_correlation(alpha_RLN, change_RLN),
            "share_of_change_in_top_tenth": (top[:, : top.shape[1] // 10].sum() / top.sum()).item(),
            "median_rms_change": (change_RLN / shape.width).sqrt().median().item(),
            "mean_alpha": alpha_RLN.mean().item(),
            "provenance": collect(suite.model_dump(mode="json"), [suite.training_seed + SEED_OFFSET], started),
        },
    )


def _rank_correlation(a_RLN: Tensor, b_RLN: Tensor) -> list[float]:
    """Spearman's rho over the tokens of a sample and block, mean over samples: [L]."""
    ranks = [x.argsort(-1).argsort(-1).double() for x in (a_RLN, b_RLN)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    rho_RL = (centred[0] * centred[1]).sum(-1) / (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()
    return rho_RL.mean(0).tolist()
