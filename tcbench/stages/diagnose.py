"""Does the predictor pick the right tokens? One-step local error of several selectors at equal budgets.

Pairs of neighbouring steps as in training, drawn with another seed. The cache is filled by the uncached forward at the
earlier step; at the later one a selector names the tokens to recompute, and the error is |x-hat^L - x^L|^2 summed over
tokens and channels (the cache loss of Eq. 9 with hard gates). Refiner blocks run, without LoRA. The oracle knows how
much every token's update really changed. Products are those of training; blocks add to a stream in float32, so that its
rounding is no part of an error.

Beside it, what Figs. 3 and 8 show of a few uncached, guided trajectories: how block updates change from step to step,
and what the predictor makes of them.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
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
from tcbench.models.adapter import Adapter, Prompt
from tcbench.plan import ALL, NONE, Block, Decision, Hold, Keys, Plan, Unit, every_unit
from tcbench.precision import mixed
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
from tcbench.training.sizes import rows_at_once

SEED_OFFSET = 7919  # the pairs are not the ones that training saw
RATIOS = (0.9, 0.7, 0.5)
KEYS: tuple[Keys, ...] = ("cached", "fresh")
SHOWN = 1024
"""Tokens at most of which Fig. 3 shows how large updates are, evenly spaced."""


@torch.inference_mode()
def diagnose_row(entry: Entry) -> None:
    """Write results/<suite>/diagnostics/<row>.json for a trained row."""
    suite, started = entry.suite, time.time()
    assert entry.trains, f"{entry.name} trains nothing"
    adapter, captions = load_adapter(suite, training=True, learns=False), load_captions(suite, held_out=False)
    training_record(entry)  # refuses another row's
    # the plain model: LoRA would hide what selection does
    artefacts, _ = load_artefacts(entry.trained, adapter, refined=False)
    shape, count = adapter.shape, suite.diagnostics.pairs
    sampler = make_sampler(adapter, entry.nfe, sampler_settings(entry, training=True), torch.arange(0))
    run = Run(shape, sampler.timesteps, Unguided(), torch.arange(count))
    free = next(stage.free_blocks for stage in entry.method.training(run) if isinstance(stage, TrainScorer))
    pairs = Pairs(adapter, load_examples(suite, captions), sampler, suite.training.seed + SEED_OFFSET)
    with mixed(adapter.device, suite.dtypes["training"]):
        seen = _observe_pairs(entry, pairs, run, artefacts, free) | _observe_trajectories(
            entry, adapter, captions, artefacts, free
        )
    provenance = collect(suite.model_dump(mode="json"), [suite.training.seed + SEED_OFFSET], started, suite.dtypes)
    DIAGNOSTICS.write(entry.diagnostics, {"row": entry.name, "suite": suite.suite, **seen, "provenance": provenance})


def _observe_pairs(entry: Entry, pairs: Pairs, run: Run, artefacts: Artefacts, free: int) -> dict[str, Any]:
    """`cases`, the local errors of every selector, and how well the predictor knows what changes."""
    suite, shape, count = entry.suite, pairs.adapter.shape, entry.suite.diagnostics.pairs
    units = [Block(block) for block in range(free)]
    at_once = rows_at_once(shape, 6)  # updates, keys and values, all twice
    parts = [_look(pairs, step_R, units, artefacts) for step_R in pairs.steps(count).split(at_once)]
    rows = [slice(first, first + at_once) for first in range(0, count, at_once)]

    alpha_RLN, change_RLN = (torch.cat([getattr(part, name) for part in parts]) for name in ("alpha_RLN", "change_RLN"))
    index = torch.arange(count, device=alpha_RLN.device)
    random_RLN = draws.uniform(suite.training.seed, index, free * shape.num_tokens).view_as(alpha_RLN)

    cases: list[dict[str, Any]] = [{"selector": "none"}]
    plans: list[Callable[[slice], Plan]] = [lambda _: every_unit(units, NONE)]
    selectors = {"predictor": alpha_RLN, "random": random_RLN, "oracle": change_RLN}
    for ratio, keys, name in itertools.product(RATIOS, KEYS, selectors):
        budget = round((1 - ratio) * free * shape.num_tokens)
        for allocation, counts in (
            ("batch", torch.as_tensor(allocate_tokens(selectors[name], budget)).tolist()),
            ("uniform", allocate_evenly(free, budget)),
        ):
            case = {"selector": name, "cache_ratio": ratio, "keys": keys, "allocation": allocation, "kept": counts}
            cases.append(case)
            plans.append(partial(_best, selectors[name], counts, keys))
    with tqdm(total=len(parts) * len(plans), desc=f"diagnose {entry.name}", mininterval=1) as bar:
        errors = [
            part.errors(pairs.adapter, run, units, (plan(some) for plan in plans), bar.update)
            for part, some in zip(parts, rows, strict=True)
        ]
    for case, error_R in zip(cases, torch.cat(errors, dim=1), strict=True):
        case |= {"error": error_R.mean().item(), "standard_error": error_R.std().item() / count**0.5}
    top = change_RLN.flatten(1).sort(descending=True).values
    return {
        "pairs": count,
        "cases": cases,
        "rank_correlation_per_block": _rank_correlation(alpha_RLN, change_RLN),
        "share_of_change_in_top_tenth": (top[:, : top.shape[1] // 10].sum() / top.sum()).item(),
        "median_rms_change": (change_RLN / shape.width).sqrt().median().item(),
        "mean_alpha": alpha_RLN.mean().item(),
    }


def _best(score_RLN: Tensor, counts: Sequence[int], keys: Keys, rows: slice) -> Plan:
    """So many tokens of every block recomputed, those of the highest scores."""
    blocks = enumerate(counts)
    return Plan({Block(b): Decision(top_tokens(score_RLN[rows, b], count), keys=keys) for b, count in blocks})


@dataclass(frozen=True)
class _Part:
    """As many pairs as fit at once: what enters the first block at both steps, and what follows from it.

    Attributes:
        earlier, later: (tokens, condition).
        target: x^L at the later step.
        alpha_RLN: what the predictor says there.
        change_RLN: how much the update of every token changed, in squares summed over channels.
    """

    earlier: tuple[Tensor, Any]
    later: tuple[Tensor, Any]
    target: Tensor
    alpha_RLN: Tensor
    change_RLN: Tensor

    def errors(
        self, adapter: Adapter, run: Run, units: Sequence[Unit], plans: Iterable[Plan], done: Callable[[], object]
    ) -> Tensor:
        """|x-hat^L - x^L|^2 under every plan, [plans, R], over the tokens that the output is made of.

        The earlier step fills the cache once; every plan goes on from a copy, because a refresh writes into it.
        """
        run = replace(run, sample_index=torch.arange(len(self.target)))
        earlier = Engine(adapter, run)
        earlier.hidden(every_unit(units, ALL, keys="cached"), 0, *self.earlier)
        errors = []
        for plan in plans:
            later = Engine(adapter, run, cache=deepcopy(earlier.cache))
            off_RND = (later.hidden(plan, 1, *self.later) - self.target)[:, adapter.shape.joint_text :]
            errors.append(off_RND.square().sum((1, 2)))
            done()
        return torch.stack(errors)


def _look(pairs: Pairs, step_R: Tensor, units: Sequence[Unit], artefacts: Artefacts) -> _Part:
    adapter = pairs.adapter
    x, label = pairs.start(step_R)
    earlier = _embed(pairs, x, step_R, label)
    hidden, before = uncached_updates(adapter, *earlier)
    later = _embed(pairs, pairs.next(x, hidden, earlier[1], step_R), step_R + 1, label)
    target, after = uncached_updates(adapter, *later)
    text = adapter.shape.joint_text
    change = [(after[unit] - before[unit])[:, text:].square().sum(-1) for unit in units]
    alpha_RLN = artefacts.scorers["predictor"](adapter, *later)[:, : len(units)]
    return _Part(earlier, later, target, alpha_RLN, torch.stack(change, dim=1))


def _embed(pairs: Pairs, x: Tensor, step_R: Tensor, label: Prompt) -> tuple[Tensor, Any]:
    """As `Pairs.embed`; blocks add to float32 what they compute."""
    tokens, condition = pairs.embed(x, step_R, label)
    return tokens.float(), condition


class _Observer:
    """A policy that computes and stores everything, and keeps what the predictor says at every step."""

    def __init__(self, units: Sequence[Unit], free: int) -> None:
        self.everything, self.free = every_unit(units, ALL), free
        self.alphas: list[Tensor] = []  # per step [R, L, N]

    def plan(self, look: Look) -> Plan:
        self.alphas.append(look.scores("predictor")[:, : self.free])
        return self.everything


@dataclass(frozen=True)
class _Observed:
    """A few trajectories. Rows are those of all passes, the guided half before the other.

    Attributes:
        similarity_SLR, spread_SLR: of a block's update with that of the step before, mean and standard deviation over
            tokens.
        size_SLN: norms of the updates of the first sample's tokens.
        alpha_SHRLN: the scores, guided halves apart.
    """

    similarity_SLR: Tensor
    spread_SLR: Tensor
    size_SLN: Tensor
    alpha_SHRLN: Tensor


def _observe(
    entry: Entry,
    adapter: Adapter,
    captions: Captions | PromptedCaptions | None,
    artefacts: Artefacts,
    free: int,
    index: Tensor,
) -> _Observed:
    settings = sampler_settings(entry, training=True)
    sampler, run = start_run(adapter, entry.method, entry.nfe, settings, index, artefacts)
    units, text = [Block(block) for block in range(run.shape.num_blocks)], run.shape.joint_text
    observers: list[_Observer] = []

    def observer(_: Run) -> _Observer:
        """One for each pass of guidance."""
        observers.append(_Observer(units, free))
        return observers[-1]

    passes = Passes(adapter, run, observer)
    x = initial_noise(adapter, settings.seed, index).to(adapter.device)
    prompt = (captions or partial(default_prompts, adapter))(index).to(x.device)
    similarity, spread, size = [], [], []
    before: dict[Unit, Tensor] = {}
    for step, _ in enumerate(denoise(passes, sampler, x, prompt)):
        likeness, sizes = [], []
        for unit in units:  # one by one: all at once they and what follows from them fill a card
            update_RND = torch.cat([each.cache.read(unit, Hold(), step)[:, text:] for each in passes.engines]).float()
            sizes.append(update_RND[0].norm(dim=-1))
            if step:
                likeness.append(F.cosine_similarity(update_RND, before[unit], dim=-1))
            before[unit] = update_RND
        size.append(torch.stack(sizes).cpu())
        if step:
            likeness_LRN = torch.stack(likeness)
            similarity.append(likeness_LRN.mean(2).cpu())
            spread.append(likeness_LRN.std(2).cpu())
    alpha_SRLN = torch.cat([torch.stack(each.alphas) for each in observers], dim=1).cpu()
    halves_SHRLN = alpha_SRLN.unflatten(1, (-1, len(index)))
    return _Observed(torch.stack(similarity), torch.stack(spread), torch.stack(size), halves_SHRLN)


def _observe_trajectories(
    entry: Entry,
    adapter: Adapter,
    captions: Captions | PromptedCaptions | None,
    artefacts: Artefacts,
    free: int,
) -> dict[str, Any]:
    """`updates` (Fig. 3) and `alpha` (Fig. 8) of two small batches that no evaluated sample shares noise with."""
    shape, guidance = adapter.shape, adapter.spec.guidance(sampler_settings(entry, training=True).guidance_scale)
    index = CALIBRATION_INDEX + torch.arange(entry.suite.diagnostics.trajectories)
    at_once = max(1, rows_at_once(shape, 4) // guidance.rows)
    parts = [_observe(entry, adapter, captions, artefacts, free, some) for some in index.split(at_once)]
    similarity_SLR, spread_SLR = (
        torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("similarity_SLR", "spread_SLR")
    )
    alpha_SHRLN = torch.cat([part.alpha_SHRLN for part in parts], dim=2)
    middle = alpha_SHRLN[len(alpha_SHRLN) // 2].flatten(0, 1)
    counts = allocate_tokens(middle, round(0.3 * free * shape.num_tokens))
    kept = [sorted(tokens.index_RK[0, : tokens.count].tolist()) for tokens in top_tokens_by_block(middle, counts)]
    size_SLN = parts[0].size_SLN[:, :, :: -(-shape.num_tokens // SHOWN)]
    return {
        "updates": {
            "similarity": shortened(similarity_SLR.mean(2).tolist(), 3),
            "similarity_over_tokens_std": shortened(spread_SLR.mean(2).tolist(), 3),
            "size": {str(block): _on_one_scale(size_SLN[:, block]) for block in (0, free // 2, shape.num_blocks - 1)},
        },
        "alpha": {
            "per_batch": shortened(alpha_SHRLN.unflatten(2, (2, -1)).mean((1, 3, 4, 5)).T.tolist(), 3),
            "histogram_per_block": [
                np.histogram(alpha_SHRLN[..., block, :].numpy(), bins=20, range=(0, 1))[0].tolist()
                for block in range(free)
            ],
            "kept_at_0.7": {"step": len(alpha_SHRLN) // 2, "tokens": kept},
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
