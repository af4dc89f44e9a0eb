"""Training of a scorer with soft gates (Eq. 9), and alpha-bar, what it says of every step (Sec. III-D)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import add_refiners
from tcbench.engine.soft import soft_hidden
from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.models.predictor import CachePredictor
from tcbench.plan import Block, Plan, Unit
from tcbench.record.files import shortened
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Passes, Prompts, denoise, initial_noise, start_run
from tcbench.trainable import CollectScores, TrainScorer
from tcbench.training.held_out import BATCHES, SEED, HeldOut
from tcbench.training.pairs import CALIBRATION_INDEX, Pair, Pairs
from tcbench.training.refiners import lora_weights, plain_model
from tcbench.training.running import check_finite
from tcbench.training.sizes import ReuseErrors, row_errors
from tcbench.training.unfinished import Stateful, Unfinished, Weights

LEAST_SPREAD = 1e-5
"""Standard deviation of all scores below which a scorer is constant."""

LEAST_STEEP = 0.1
"""Eq. (13) weighs a step by exp(beta alpha-bar): at a smaller range of the exponent all steps weigh alike."""

SATURATED = 0.03
"""Mean score below which nearly all gates are closed; or above one less it, open."""


def train_scorer(
    stage: TrainScorer, pairs: Pairs, sizes: ReuseErrors, unfinished: Unfinished
) -> tuple[CachePredictor, dict[str, Tensor], dict[str, Any]]:
    """Minimise cache loss + lambda * cost loss (Eq. 9) over the scorer and LoRA that learns with it, if any.

    Everything else is frozen; caches and targets are the plain model's.

    Returns:
        The scorer, the tensors of LoRA, and what the log says of the training.

    Raises:
        UserError: the loss became NaN or infinite, or rose.
    """
    adapter = pairs.adapter
    scorer = CachePredictor(adapter)
    for parameter in scorer.parameters():
        parameter.requires_grad_(True)
    weight_S = sizes.weights(stage.loss)
    cost_weight = half_closing_cost(stage, pairs, weight_S) if stage.cost_weight == "auto" else stage.cost_weight
    with _joint_refiners(stage, pairs) as (lora, plain):
        told = _fit(stage, pairs, scorer, lora, plain, weight_S, cost_weight, unfinished)
        joint = {name: parameter.detach().cpu().clone() for name, parameter in lora.items()}
    scorer.eval().requires_grad_(False)
    return scorer, joint, {"cost_weight_used": cost_weight, **sizes.record(stage.loss), **told}


@contextmanager
def _joint_refiners(
    stage: TrainScorer, pairs: Pairs
) -> Iterator[tuple[dict[str, torch.nn.Parameter], Callable[[], AbstractContextManager[None]]]]:
    """(the weights of LoRA that learns with the scorer, a context in which the model is without it)."""
    if not stage.joint_rank:
        yield {}, nullcontext
        return
    adapter = pairs.adapter
    lora = add_refiners(adapter, adapter.shape.num_blocks - stage.free_blocks, stage.joint_rank, pairs.generator)
    try:
        yield lora_weights(lora), lambda: plain_model(lora)
    finally:
        lora.unload()


def _fit(
    stage: TrainScorer,
    pairs: Pairs,
    scorer: CachePredictor,
    lora: dict[str, torch.nn.Parameter],
    plain: Callable[[], AbstractContextManager[None]],
    weight_S: Tensor,
    cost_weight: float,
    unfinished: Unfinished,
) -> dict[str, Any]:
    adapter, units = pairs.adapter, [Block(block) for block in range(stage.free_blocks)]
    trained: list[dict[str, Any]] = [{"params": scorer.parameters()}]
    if lora:
        trained.append({"params": lora.values(), "lr": stage.joint_learning_rate})
    optimiser = torch.optim.AdamW(trained, stage.learning_rate, betas=(0.9, 0.999), weight_decay=0)

    def draw(drawing: Pairs) -> Pair:
        with plain():
            return drawing.draw(stage.batch_size, stage.longest_gap)

    def losses(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """(cache loss, cost loss, scores [R, L, N])."""
        alpha_RLN = scorer(adapter, pair.tokens, pair.condition)[:, : stage.free_blocks]
        gates: dict[Unit, Tensor] = {unit: alpha_RLN[:, unit.block, :, None] for unit in units}
        inputs = _block_inputs(pair.tokens, pair.updates) if stage.recursion == "literal" else None
        hidden = soft_hidden(adapter, pair.tokens, pair.condition, gates, pair.cached, inputs, pairs.checkpointed)
        error_R = row_errors(hidden, pair.target, adapter.shape.joint_text)
        cache_loss = (error_R * weight_S[pair.step_R].to(hidden)).mean()
        cost_loss = alpha_RLN.sum((1, 2)).mean() if stage.cost_reduction == "sum" else alpha_RLN.mean()
        return cache_loss, cost_loss, alpha_RLN

    @torch.no_grad()
    def held_out_loss() -> float:
        held_out, total = pairs.again(SEED, held_out=True), 0.0
        for _ in range(BATCHES):
            cache_loss, cost_loss, _ = losses(draw(held_out))
            total += pairs.crew.mean(cache_loss + cost_weight * cost_loss).item()
        return total / BATCHES

    watch = HeldOut(stage, {**scorer.state_dict(), **lora}, held_out_loss)
    history: dict[str, list[float]] = {"cache_loss": [], "cost_loss": [], "mean_alpha": []}
    parts: dict[str, Stateful] = {"scorer": scorer, "lora": Weights(lora), "optimiser": optimiser, "watch": watch}
    left = unfinished.stage(pairs.generator, history, parts).iterations(stage.iterations)
    progress = tqdm(left, desc=f"train {stage.name}", total=stage.iterations, mininterval=1)
    for iteration in progress:
        if watch.enough(iteration):
            break
        cache_loss, cost_loss, alpha_RLN = losses(draw(pairs))
        loss = cache_loss + cost_weight * cost_loss
        check_finite(loss, stage, iteration)
        optimiser.zero_grad()
        loss.backward()
        pairs.crew.average_gradients(parameter for group in optimiser.param_groups for parameter in group["params"])
        optimiser.step()
        if iteration % max(1, stage.iterations // 50) == 0 or iteration == stage.iterations - 1:
            history["cache_loss"].append(pairs.crew.mean(cache_loss).item())
            history["cost_loss"].append(pairs.crew.mean(cost_loss).item())
            history["mean_alpha"].append(pairs.crew.mean(alpha_RLN.mean()).item())
            progress.set_postfix(cache=f"{history['cache_loss'][-1]:.3g}", alpha=f"{history['mean_alpha'][-1]:.3f}")
    return {**history, **watch.finish()}


def half_closing_cost(stage: TrainScorer, pairs: Pairs, weight_S: Tensor, batches: int = 8) -> float:
    """The lambda at which half of all gates are best closed, were they alone (Eq. 11 without the sensitivity factor).

    A gate trades (1 - alpha)^2 |df|^2 / (N D) of the cache loss against lambda * alpha of the cost loss, df being the
    change of its token's update, times the weight of its step; its optimum is 0 if |df|^2 / D < lambda N / 2. The step
    gap sets df, so one lambda does not fit several NFEs: too large a one closes every gate, and a saturated predictor
    ranks nothing.
    """
    changes, shape = [], pairs.adapter.shape
    for _ in range(batches):
        pair = pairs.draw(stage.batch_size)
        weight_R1 = weight_S[pair.step_R].to(pair.tokens)[:, None]
        for unit in list(pair.updates)[: stage.free_blocks]:
            change = (pair.updates[unit] - pair.cached[unit])[:, shape.joint_text :]
            changes.append(weight_R1 * change.square().mean(-1))
    weight = 2 * pairs.crew.joined(torch.cat(changes)).median().item() / shape.num_tokens
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
def collect_scores(
    adapter: Adapter,
    method: Method,
    stage: CollectScores,
    nfe: int,
    settings: SamplerSettings,
    artefacts: Artefacts,
    prompts: Prompts,
    sizes: ReuseErrors | None,
) -> dict[str, Any]:
    """alpha-bar_t on uncached, guided trajectories (Sec. III-D), and what Fig. 8 shows of the scores.

    Args:
        sizes: of a scorer that was trained with a relative loss. It scores tokens by what their error is worth at their
            step, and no longer says which steps are worth most, which Eq. (13) reads; that is put back by multiplying
            with the step's reuse error as a share of the largest, which keeps alpha-bar in (0, 1).
    """
    index = CALIBRATION_INDEX + torch.arange(stage.samples)
    sampler, run = start_run(adapter, method, nfe, settings, index, artefacts)
    collectors: list[_ScoreCollector] = []

    def collector(_: Run) -> _ScoreCollector:
        """One for each pass of guidance."""
        collectors.append(_ScoreCollector(stage))
        return collectors[-1]

    x = initial_noise(adapter, settings.seed, index).to(adapter.device)
    steps = denoise(Passes(adapter, run, collector), sampler, x, prompts(index).to(x.device))
    for _ in tqdm(steps, total=run.nfe, desc="collect scores", mininterval=1):
        pass
    alpha_SRLN = torch.cat([torch.stack(each.alphas) for each in collectors], dim=1).double().cpu()
    mean_S = alpha_SRLN.mean((1, 2, 3))
    scale_S = torch.ones(run.nfe) if sizes is None else sizes.error_S / sizes.error_S.max()
    alpha_bar = (mean_S * scale_S).tolist()
    marks = judge_scores(stage, alpha_SRLN, alpha_bar)
    counts, edges = np.histogram(alpha_SRLN.numpy(), bins=50, range=(0, 1))
    return {
        "alpha_bar": alpha_bar,
        "mean_alpha": mean_S.tolist(),
        "per_block": shortened(alpha_SRLN.mean((1, 3)).tolist(), 6),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "std_over_tokens": alpha_SRLN.std(3).mean().item(),
        "std_over_samples": alpha_SRLN.std(1).mean().item(),
        "std_over_blocks": alpha_SRLN.mean(3).std(2).mean().item(),
        "std_over_steps": mean_S.std().item(),
        "marks": marks,
    }


def judge_scores(stage: CollectScores, alpha_SRLN: Tensor, alpha_bar: Sequence[float]) -> list[str]:
    """What the record says against a scorer that can be used: that it is saturated, over all steps or at most of them.

    Args:
        alpha_SRLN: the scores of every step.

    Raises:
        UserError: it scores everything alike, or every step alike where a schedule is made from that.
    """
    if alpha_SRLN.std() < LEAST_SPREAD:
        raise UserError(
            f"{stage.name}: scores every token {alpha_SRLN.mean():.3g}, so nothing was learned; "
            f"set {stage.name}_learning_rate or {stage.name}_iterations higher, or cost_weight: auto"
        )
    if stage.beta is not None and abs(stage.beta) * (max(alpha_bar) - min(alpha_bar)) < LEAST_STEEP:
        raise UserError(
            f"{stage.name}: alpha-bar is flat, {min(alpha_bar):.4g} to {max(alpha_bar):.4g}, and Eq. (13) makes no "
            f"schedule of it with beta {stage.beta:g}; set schedule: even, or {stage.name}_iterations higher"
        )
    mean, mean_S = alpha_SRLN.mean().item(), alpha_SRLN.mean((1, 2, 3))
    stuck = int(((mean_S < SATURATED) | (mean_S > 1 - SATURATED)).sum())
    if not SATURATED < mean < 1 - SATURATED:
        return [f"saturated: the mean score is {mean:.3g}, and closed gates rank nothing; cost_weight: auto opens half"]
    if stuck > len(mean_S) / 2:
        return [f"saturated at {stuck} of {len(mean_S)} steps, where the mean score is below .03 or above .97"]
    return []
