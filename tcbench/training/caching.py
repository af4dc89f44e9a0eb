"""Training what a method declares: scorers with soft gates (Eq. 9), then LoRA refiners on the method's own hard plans.

Routers (tcbench/training/routers.py) are trained here too. All learn from pairs of neighbouring steps of the inference
grid (tcbench/training/pairs.py). The cache the later step sees is filled by the uncached forward at the earlier one
(Alg. 1). docs/reproduction-notes.md, "Training", lists the choices that the paper leaves open.
"""

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import add_refiners, read_router
from tcbench.engine.engine import Engine
from tcbench.engine.soft import soft_hidden
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Look, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.models.predictor import CachePredictor
from tcbench.plan import Block, Plan, Unit
from tcbench.record.files import shortened
from tcbench.samplers import SamplerSettings, make_sampler
from tcbench.sampling import Passes, Prompts, default_prompts, denoise, initial_noise, start_run
from tcbench.trainable import CollectScores, ImportRouter, Stage, TrainRefiners, TrainRouter, TrainScorer
from tcbench.training.pairs import CALIBRATION_INDEX, Pairs, uncached_updates
from tcbench.training.routers import train_router
from tcbench.training.running import check_finite, deterministic

if TYPE_CHECKING:  # sampling loads artefacts here, and must not pay for importing scikit-learn
    from tcbench.data import Dataset


@deterministic()
def train(
    adapter: Adapter,
    method: Method,
    nfe: int,
    settings: SamplerSettings,
    data: "Dataset",
    seed: int,
    prompts: Prompts | None = None,
) -> tuple[Artefacts, dict[str, Tensor], dict]:
    """Run a method's training stages in order on a frozen model.

    Args:
        prompts: of the samples that scores are collected on, as `sample_batch` takes them.

    Returns:
        The artefacts (scorers and tables in memory), tensors of the LoRA refiners (empty if none), and a JSON-able log.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    sampler = make_sampler(adapter, method.sampled_steps(nfe), settings, torch.arange(0))
    artefacts = Artefacts()
    refiners: dict[str, Tensor] = {}
    log: dict[str, Any] = {"seed": seed, "nfe": nfe, "stages": []}
    run = Run(adapter.shape, sampler.timesteps, Unguided(), torch.arange(0))
    for number, stage in enumerate(method.training(run)):
        began = time.perf_counter()
        pairs = Pairs(adapter, data, sampler, seed + number)
        match stage:
            case TrainScorer():
                scorer, losses = _train_scorer(adapter, stage, pairs)
                artefacts = replace(artefacts, scorers={**artefacts.scorers, stage.name: scorer})
            case CollectScores():
                shown = prompts or partial(default_prompts, adapter)
                statistics = _collect_scores(adapter, method, stage, nfe, settings, artefacts, shown)
                artefacts = replace(artefacts, alpha_bar=tuple(statistics["alpha_bar"]))
                losses, log["scores"] = {}, statistics
            case TrainRefiners():
                refiners, losses = _train_refiners(adapter, method, stage, pairs, artefacts)
            case TrainRouter():
                table, losses = train_router(pairs, stage)
                artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
            case ImportRouter():
                artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: read_router(stage.path)})
                losses = {}
        log["stages"].append({**_describe(stage), "wall_s": time.perf_counter() - began, **losses})
    return artefacts, refiners, log


def _describe(stage: Stage) -> dict:
    return {"kind": type(stage).__name__, **vars(stage)}


def _train_scorer(adapter: Adapter, stage: TrainScorer, pairs: Pairs) -> tuple[CachePredictor, dict]:
    """Minimise cache loss + lambda * cost loss (Eq. 9) over the scorer, everything else frozen."""
    scorer = CachePredictor(adapter)
    for parameter in scorer.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(scorer.parameters(), stage.learning_rate, betas=(0.9, 0.999), weight_decay=0)
    history: dict[str, list[float]] = {"cache_loss": [], "cost_loss": [], "mean_alpha": []}
    cost_weight = half_closing_cost(adapter, stage, pairs) if stage.cost_weight == "auto" else stage.cost_weight
    units = [Block(block) for block in range(stage.free_blocks)]
    progress = tqdm(range(stage.iterations), desc=f"train {stage.name}", mininterval=1)
    for iteration in progress:
        cached, tokens, condition, target, fresh = pairs.draw(stage.batch_size)
        alpha_RLN = scorer(adapter, tokens, condition)[:, : stage.free_blocks]
        gates: dict[Unit, Tensor] = {unit: alpha_RLN[:, unit.block, :, None] for unit in units}
        inputs = _block_inputs(tokens, fresh) if stage.recursion == "literal" else None
        cache_loss = F.mse_loss(soft_hidden(adapter, tokens, condition, gates, cached, inputs), target)
        cost_loss = alpha_RLN.sum((1, 2)).mean() if stage.cost_reduction == "sum" else alpha_RLN.mean()
        loss = cache_loss + cost_weight * cost_loss
        check_finite(loss, stage, iteration)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if iteration % max(1, stage.iterations // 50) == 0 or iteration == stage.iterations - 1:
            history["cache_loss"].append(cache_loss.item())
            history["cost_loss"].append(cost_loss.item())
            history["mean_alpha"].append(alpha_RLN.mean().item())
            progress.set_postfix(cache=f"{cache_loss.item():.3g}", alpha=f"{alpha_RLN.mean().item():.3f}")
    return scorer.eval().requires_grad_(False), {"cost_weight_used": cost_weight, **history}


def half_closing_cost(adapter: Adapter, stage: TrainScorer, pairs: Pairs, batches: int = 8) -> float:
    """The lambda at which half of all gates are best closed, were they alone (Eq. 11 without the sensitivity factor).

    A gate trades (1 - alpha)^2 |df|^2 / (N D) of the cache loss against lambda * alpha of the cost loss, df being the
    change of its token's update; its optimum is 0 if |df|^2 / D < lambda N / 2. The step gap sets df, so one lambda
    does not fit several NFEs: too large a one closes every gate, and a saturated predictor ranks nothing.
    """
    changes = []
    for _ in range(batches):
        cached, _, _, _, fresh = pairs.draw(stage.batch_size)
        changes += [(fresh[unit] - cached[unit]).square().mean(-1) for unit in list(fresh)[: stage.free_blocks]]
    shape = adapter.shape
    weight = 2 * torch.cat(changes).median().item() / shape.num_tokens
    return weight if stage.cost_reduction == "sum" else weight * stage.free_blocks * shape.num_tokens


def _block_inputs(tokens: Tensor, updates: dict[Unit, Tensor]) -> list[Tensor]:
    """x^0..x^{L-1} of the uncached path."""
    inputs = [tokens]
    for update in list(updates.values())[:-1]:
        inputs.append(inputs[-1] + update)
    return inputs


class _ScoreCollector:
    """A policy that computes everything and keeps what the scorer says at every step."""

    def __init__(self, stage: CollectScores) -> None:
        self.stage = stage
        self.alphas: list[Tensor] = []  # per step [R, L, N]

    def plan(self, look: Look) -> Plan:
        self.alphas.append(look.scores(self.stage.name)[:, : self.stage.free_blocks])
        return Plan()


@torch.inference_mode()
def _collect_scores(
    adapter: Adapter,
    method: Method,
    stage: CollectScores,
    nfe: int,
    settings: SamplerSettings,
    artefacts: Artefacts,
    prompts: Prompts,
) -> dict:
    """alpha-bar_t on uncached, guided trajectories (Sec. III-D), and what Fig. 8 shows of the scores."""
    index = CALIBRATION_INDEX + torch.arange(stage.samples)
    sampler, run = start_run(adapter, method, nfe, settings, index, artefacts)
    collector = _ScoreCollector(stage)
    x = initial_noise(adapter, settings.seed, index).to(adapter.device)
    steps = denoise(Passes(adapter, run, lambda _: collector), sampler, x, prompts(index).to(x.device))
    for _ in tqdm(steps, total=run.nfe, desc="collect scores", mininterval=1):
        pass
    alpha_SRLN = torch.stack(collector.alphas).double().cpu()
    counts, edges = np.histogram(alpha_SRLN.numpy(), bins=50, range=(0, 1))
    return {
        "alpha_bar": alpha_SRLN.mean((1, 2, 3)).tolist(),
        "per_block": shortened(alpha_SRLN.mean((1, 3)).tolist(), 6),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "std_over_tokens": alpha_SRLN.std(3).mean().item(),
        "std_over_samples": alpha_SRLN.std(1).mean().item(),
        "std_over_blocks": alpha_SRLN.mean(3).std(2).mean().item(),
        "std_over_steps": alpha_SRLN.mean((1, 2, 3)).std().item(),
    }


def _train_refiners(
    adapter: Adapter, method: Method, stage: TrainRefiners, pairs: Pairs, artefacts: Artefacts
) -> tuple[dict[str, Tensor], dict]:
    """Fit LoRA on the last blocks to the uncached x^L, on the method's own P-steps one step after a full one.

    The inference engine runs as it will when sampling, with hard token choices; the blocks before the refiners are
    frozen, so the gradient passes through the refiners alone.
    """
    lora = add_refiners(adapter, stage.blocks, stage.rank, pairs.generator)
    weights = [parameter for name, parameter in lora.named_parameters() if "lora_" in name]
    optimiser = torch.optim.AdamW(weights, stage.learning_rate, betas=(0.9, 0.999), weight_decay=0)
    run = Run(adapter.shape, pairs.sampler.timesteps, Unguided(), torch.arange(stage.batch_size), artefacts=artefacts)
    full = set(method.i_steps(run))
    p_steps = [step for step in range(1, run.nfe) if step not in full]
    history: dict[str, list[float]] = {"loss": [], "loss_without_refiners": []}
    progress = tqdm(range(stage.iterations if p_steps else 0), desc="train refiners", mininterval=1)
    for iteration in progress:
        later = pairs.one_of(p_steps)
        step = torch.full((stage.batch_size,), later - 1)
        engine = Engine(adapter, run, method.start(run))
        lora.disable_adapter_layers()
        with torch.no_grad():
            x, label = pairs.start(step)
            tokens, condition = pairs.embed(x, step, label)
            everything = engine.plan(0, tokens, condition)  # the first step is always an I-step
            hidden = engine.hidden(everything, later - 1, tokens, condition)
            x = pairs.next(x, hidden, condition, step)
            tokens, condition = pairs.embed(x, step + 1, label)
            target, _ = uncached_updates(adapter, tokens, condition)
            plan = engine.plan(later, tokens, condition)
        lora.enable_adapter_layers()
        loss = F.mse_loss(engine.hidden(plan, later, tokens, condition), target)
        check_finite(loss, stage, iteration)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if iteration % max(1, stage.iterations // 20) == 0 or iteration == stage.iterations - 1:
            history["loss"].append(loss.item())
            lora.disable_adapter_layers()
            with torch.no_grad():
                plain = engine.hidden(plan, later, tokens, condition)
            lora.enable_adapter_layers()
            history["loss_without_refiners"].append(F.mse_loss(plain, target).item())
            progress.set_postfix(loss=f"{loss.item():.3g}")
    state = {name: parameter.detach().cpu() for name, parameter in lora.named_parameters() if "lora_" in name}
    lora.unload()
    return state, history
