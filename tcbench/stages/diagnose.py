"""Does the predictor pick the right tokens? One-step local error of several selectors at equal budgets.

Pairs of neighbouring steps as in training, drawn with another seed. The cache is filled by the uncached forward at the
earlier step; at the later one a selector names the tokens to recompute, and the error is |x-hat^L - x^L|^2 summed over
tokens and channels (the cache loss of Eq. 9 with hard gates). Refiner blocks run, without LoRA. The oracle knows how
much every token's update really changed.

Beside it, what Figs. 3 and 8 show of a few uncached, guided trajectories: how block updates change from step to step,
and what the predictor makes of them.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import load_artefacts
from tcbench.budget.borrowing import training_record
from tcbench.choose import allocate_evenly, allocate_tokens, top_tokens, top_tokens_by_block
from tcbench.config.suite import Entry
from tcbench.engine.engine import Engine
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Look, Run
from tcbench.models.adapter import Adapter
from tcbench.plan import ALL, NONE, Block, Decision, Hold, Keys, Plan, Unit, every_unit
from tcbench.record.files import shortened
from tcbench.record.provenance import collect
from tcbench.record.records import DIAGNOSTICS
from tcbench.samplers import make_sampler
from tcbench.sampling import Passes, default_prompts, denoise, initial_noise, start_run
from tcbench.stages.conditioning import Captions, PromptedCaptions, load_captions, load_examples
from tcbench.stages.ready import load_adapter, sampler_settings
from tcbench.tensors import draws
from tcbench.trainable import TrainScorer
from tcbench.training.pairs import CALIBRATION_INDEX, Pairs, uncached_updates

BATCH = 8  # samples in each of the two batches whose trajectories are observed
SEED_OFFSET = 7919  # the pairs are not the ones that training saw
RATIOS = (0.9, 0.7, 0.5)


@torch.inference_mode()
def diagnose_row(entry: Entry) -> None:
    """Write results/<suite>/diagnostics/<row>.json for a trained row."""
    suite, started = entry.suite, time.time()
    assert entry.trains, f"{entry.name} trains nothing"
    adapter, captions = load_adapter(suite, training=True), load_captions(suite, held_out=False)  # errors of float32
    training_record(entry)  # refuses another row's
    artefacts, _ = load_artefacts(entry.trained, adapter)  # the plain model: LoRA would hide what selection does
    shape, method = adapter.shape, entry.method
    sampler = make_sampler(adapter, entry.nfe, sampler_settings(entry, training=True), torch.arange(0))
    run = Run(shape, sampler.timesteps, Unguided(), torch.arange(suite.diagnostics.pairs))
    free = next(stage.free_blocks for stage in method.training(run) if isinstance(stage, TrainScorer))
    pairs = Pairs(adapter, load_examples(suite, captions), sampler, suite.training.seed + SEED_OFFSET)

    step = pairs.steps(suite.diagnostics.pairs)
    x, label = pairs.start(step)
    earlier = pairs.embed(x, step, label)
    hidden, before = uncached_updates(adapter, *earlier)
    later = pairs.embed(pairs.next(x, hidden, earlier[1], step), step + 1, label)
    target, after = uncached_updates(adapter, *later)

    units = [Block(block) for block in range(free)]
    alpha_RLN = artefacts.scorers["predictor"](adapter, *later)[:, :free]
    change_RLN = torch.stack([(after[unit] - before[unit]).square().sum(-1) for unit in units], dim=1)
    index = torch.arange(len(x), device=x.device)
    random_RLN = draws.uniform(suite.training.seed, index, free * shape.num_tokens).view_as(alpha_RLN)

    def local_error(plan: Plan, keys: Keys) -> dict[str, float]:
        engine = Engine(adapter, run)
        engine.hidden(every_unit(units, ALL, keys=keys), 0, *earlier)
        error_R = (engine.hidden(plan, 1, *later) - target).square().sum((1, 2))
        return {"error": error_R.mean().item(), "standard_error": error_R.std().item() / len(x) ** 0.5}

    cases: list[dict[str, Any]] = [{"selector": "none", **local_error(every_unit(units, NONE), "fresh")}]
    selectors = {"predictor": alpha_RLN, "random": random_RLN, "oracle": change_RLN}
    grid = [(r, keys, name) for r in RATIOS for keys in ("cached", "fresh") for name in selectors]
    for ratio, keys, name in tqdm(grid, desc=f"diagnose {entry.name}", mininterval=1):
        budget = round((1 - ratio) * free * shape.num_tokens)
        for allocation, counts in (
            ("batch", torch.as_tensor(allocate_tokens(selectors[name], budget)).tolist()),
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
    DIAGNOSTICS.write(
        entry.diagnostics,
        {
            "row": entry.name,
            "suite": suite.suite,
            "pairs": len(x),
            "cases": cases,
            "rank_correlation_per_block": _rank_correlation(alpha_RLN, change_RLN),
            "share_of_change_in_top_tenth": (top[:, : top.shape[1] // 10].sum() / top.sum()).item(),
            "median_rms_change": (change_RLN / shape.width).sqrt().median().item(),
            "mean_alpha": alpha_RLN.mean().item(),
            **_observe_trajectories(entry, adapter, captions, artefacts, free),
            "provenance": collect(
                suite.model_dump(mode="json"), [suite.training.seed + SEED_OFFSET], started, suite.dtypes
            ),
        },
    )


class _Observer:
    """A policy that computes and stores everything, and keeps what the predictor says at every step."""

    def __init__(self, units: Sequence[Unit], free: int) -> None:
        self.everything, self.free = every_unit(units, ALL), free
        self.alphas: list[Tensor] = []  # per step [R, L, N]

    def plan(self, look: Look) -> Plan:
        self.alphas.append(look.scores("predictor")[:, : self.free])
        return self.everything


def _observe_trajectories(
    entry: Entry,
    adapter: Adapter,
    captions: Captions | PromptedCaptions | None,
    artefacts: Artefacts,
    free: int,
) -> dict[str, Any]:
    """`updates` (Fig. 3) and `alpha` (Fig. 8) of two small batches that no evaluated sample shares noise with."""
    settings = sampler_settings(entry, training=True)
    index = CALIBRATION_INDEX + torch.arange(2 * BATCH)
    sampler, run = start_run(adapter, entry.method, entry.nfe, settings, index, artefacts)
    units = [Block(block) for block in range(run.shape.num_blocks)]
    observer = _Observer(units, free)
    passes = Passes(adapter, run, lambda _: observer)
    engine = passes.engines[0]
    x = initial_noise(adapter, settings.seed, index).to(adapter.device)
    prompt = (captions or partial(default_prompts, adapter))(index).to(x.device)
    similarity, size, before = [], [], None
    for step, _ in enumerate(denoise(passes, sampler, x, prompt)):
        update_LRND = torch.stack([engine.cache.read(unit, Hold(), step) for unit in units])
        size.append(update_LRND[:, 0].norm(dim=-1))  # of the first sample, [L, N]
        if before is not None:
            similarity.append(F.cosine_similarity(update_LRND, before, dim=-1))
        before = update_LRND
    similarity_SLRN = torch.stack(similarity)
    alpha_SRLN = torch.stack(observer.alphas).cpu()
    middle = alpha_SRLN[len(alpha_SRLN) // 2]
    counts = allocate_tokens(middle, round(0.3 * free * run.shape.num_tokens))
    kept = [sorted(tokens.index_RK[0, : tokens.count].tolist()) for tokens in top_tokens_by_block(middle, counts)]
    halves = alpha_SRLN.unflatten(1, (2, 2, -1))  # guided halves, then batches
    shown = [0, free // 2, run.shape.num_blocks - 1]
    return {
        "updates": {
            "similarity": shortened(similarity_SLRN.mean((2, 3)).tolist(), 3),
            "similarity_over_tokens_std": shortened(similarity_SLRN.std(3).mean(2).tolist(), 3),
            "size": {str(block): _on_one_scale(torch.stack(size)[:, block]) for block in shown},
        },
        "alpha": {
            "per_batch": shortened(halves.mean((1, 3, 4, 5)).T.tolist(), 3),
            "histogram_per_block": [
                np.histogram(alpha_SRLN[:, :, block].numpy(), bins=20, range=(0, 1))[0].tolist()
                for block in range(free)
            ],
            "kept_at_0.7": {"step": len(alpha_SRLN) // 2, "tokens": kept},
        },
    }


def _on_one_scale(values: Tensor) -> list[list[float]]:
    """Three significant digits of the largest, and as many places of the others: shades of one picture."""
    largest = values.max().item()  # 0 if a network's gates have not moved from their initial 0
    places = 2 - math.floor(math.log10(largest)) if largest else 0
    lines: list[list[float]] = values.double().cpu().numpy().round(places).tolist()
    return [[int(value) for value in line] for line in lines] if places <= 0 else lines


def _rank_correlation(a_RLN: Tensor, b_RLN: Tensor) -> list[float]:
    """Spearman's rho over the tokens of a sample and block, mean over samples: [L]."""
    ranks = [x.argsort(-1).argsort(-1).double() for x in (a_RLN, b_RLN)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    rho_RL = (centred[0] * centred[1]).sum(-1) / (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()
    return rho_RL.mean(0).tolist()
