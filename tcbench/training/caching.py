"""Training what a method declares: scorers with soft gates (Eq. 9), then LoRA refiners on the method's own hard plans.

Routers (tcbench/training/routers.py) are trained here too. All learn from pairs of neighbouring steps of the inference
grid. x at the earlier step is the data noised to its timestep; one uncached, unguided DDIM step leads to the later one.
The cache the later step sees is filled by the uncached forward at the earlier one (Alg. 1). docs/reproduction-notes.md,
"Training", lists the choices that the paper leaves open.
"""

import copy
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from tqdm import tqdm

from tcbench.engine import Engine, soft_hidden
from tcbench.errors import UserError
from tcbench.files import read_json, read_tensors, sha256, shortened, write_json, write_tensors
from tcbench.guidance import Unguided
from tcbench.method import (
    Artefacts,
    CollectScores,
    ImportRouter,
    Look,
    Method,
    Run,
    Stage,
    TrainRefiners,
    TrainRouter,
    TrainScorer,
)
from tcbench.models.adapter import Adapter, Prompt
from tcbench.models.networks import make_adapter
from tcbench.models.predictor import CachePredictor
from tcbench.plan import Block, Plan, Unit
from tcbench.sampling import (
    Chain,
    Passes,
    Prompts,
    SamplerSettings,
    default_prompts,
    denoise,
    initial_noise,
    make_sampler,
    start_run,
)
from tcbench.training.common import check_finite, deterministic, uncached_values
from tcbench.training.routers import as_table, read_router, train_router

if TYPE_CHECKING:  # sampling loads artefacts here, and must not pay for importing scikit-learn
    from tcbench.data import Dataset

LABEL_DROPOUT = 0.1  # as in the training of DiT and of Learning-to-Cache's routers
CALIBRATION_INDEX = 1 << 40  # sample indices from here on never meet those of an evaluated sample


class Pairs:
    """Draws pairs of neighbouring steps, all from one seeded CPU generator."""

    def __init__(self, adapter: Adapter, data: "Dataset", sampler: Chain, seed: int) -> None:
        self.adapter, self.data, self.sampler = adapter, data, sampler
        self.generator = torch.Generator().manual_seed(seed)
        self.timesteps = torch.tensor([*sampler.timesteps, 0])

    def steps(self, batch_size: int) -> Tensor:
        """Earlier steps of the pairs, uniform over the grid: [R]."""
        return torch.randint(len(self.sampler.timesteps) - 1, (batch_size,), generator=self.generator)

    def one_of(self, steps: list[int]) -> int:
        """One step out of `steps`, uniformly."""
        return steps[int(torch.randint(len(steps), (), generator=self.generator))]

    def start(self, step_R: Tensor) -> tuple[Tensor, Prompt]:
        """(x at the earlier steps [R, C, ...], labels or captions with some dropped)."""
        device = self.adapter.device
        chosen = torch.randint(len(self.data), (len(step_R),), generator=self.generator)
        x0, label = self.data.images[chosen], self.data.labels[chosen]
        dropped = torch.rand(len(step_R), generator=self.generator) < LABEL_DROPOUT
        label = self.adapter.drop(label, dropped)
        noise = torch.randn(x0.shape, generator=self.generator)
        return self.sampler.noised(x0, step_R, noise).to(device), label.to(device)

    def embed(self, x: Tensor, step_R: Tensor, label: Prompt) -> tuple[Tensor, Any]:
        """(tokens [R, N, D], condition)."""
        timestep = self.timesteps[step_R].to(x.device)
        context = self.adapter.prepare(label)
        return self.adapter.embed(x, context), self.adapter.condition(timestep, context)

    @torch.no_grad()
    def draw(self, batch_size: int) -> tuple[dict[Unit, Tensor], Tensor, Any, Tensor, dict[Unit, Tensor]]:
        """A batch of pairs, uncached on both sides.

        Returns:
            Updates at the earlier steps; tokens and condition at the later ones, their x^L, and their updates.
        """
        step = self.steps(batch_size)
        x, label = self.start(step)
        tokens, condition = self.embed(x, step, label)
        hidden, cached = uncached_updates(self.adapter, tokens, condition)
        later = self.next(x, hidden, condition, step)
        tokens, condition = self.embed(later, step + 1, label)
        return cached, tokens, condition, *uncached_updates(self.adapter, tokens, condition)

    def next(self, x: Tensor, hidden: Tensor, condition: Any, step_R: Tensor) -> Tensor:
        """x at the later steps, from the last block's output at the earlier ones."""
        output = self.adapter.unembed(hidden, condition)[:, : self.adapter.spec.in_channels]
        return self.sampler.step_rows(output, step_R.to(x.device), x)


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


def uncached_updates(adapter: Adapter, tokens: Tensor, condition: Any) -> tuple[Tensor, dict[Unit, Tensor]]:
    """(x^L, every block's update f^l), without a gradient."""
    return uncached_values(adapter, tokens, condition, [Block(block) for block in range(adapter.shape.num_blocks)])


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


def add_refiners(adapter: Adapter, blocks: int, rank: int, generator: torch.Generator | None = None) -> LoraModel:
    """Put LoRA (Hu et al. 2021) on attention and MLP of the last `blocks` blocks, in place; it starts as no change."""
    names = {module: name for name, module in adapter.model.named_modules()}
    last = "|".join(re.escape(names[block]) for block in adapter.blocks[adapter.shape.num_blocks - blocks :])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=rf"({last})\.({adapter.refiner_layers})")
    lora = LoraModel(adapter.model, {"default": config}, "default")
    if generator is not None:
        for name, parameter in lora.named_parameters():
            if "lora_A" in name:  # peft draws it from the global generator
                bound = parameter.shape[1] ** -0.5
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return lora


def save_artefacts(folder: Path, artefacts: Artefacts, refiners: dict[str, Tensor], log: dict) -> None:
    """Write what `train` made: one safetensors file a scorer or table, the refiners, and last `artefacts.json`, which
    vouches for them with their digests, so that an interrupted save is never taken for a finished one."""
    names = []
    for name, scorer in artefacts.scorers.items():
        write_tensors(folder / f"{name}.safetensors", {key: value.cpu() for key, value in scorer.state_dict().items()})
        names.append(name)
    for name, table in artefacts.tables.items():
        write_tensors(folder / f"{name}.safetensors", {"table": torch.tensor(table)})
        names.append(name)
    log["tables"] = list(artefacts.tables)
    if refiners:
        write_tensors(folder / "refiners.safetensors", refiners)
    files = [*names, "refiners"] if refiners else names
    log["files"] = {name: sha256(folder / f"{name}.safetensors") for name in files}
    write_json(folder / "artefacts.json", log)


def load_artefacts(folder: Path, adapter: Adapter) -> tuple[Artefacts, Adapter]:
    """Read what `save_artefacts` wrote: the artefacts, and the adapter to sample with.

    That adapter is a copy with the refiners merged into its weights (they cost no MACs), or `adapter` itself.

    Raises:
        UserError: a file is missing, damaged, or not the one that `artefacts.json` vouches for.
    """
    log, numbers = read_json(folder / "artefacts.json"), load_numbers(folder)
    scorers: dict[str, nn.Module] = {}
    for name in log["files"].keys() - numbers.tables:
        tensors, path = _vouched(folder, name, log), folder / f"{name}.safetensors"
        if name == "refiners":
            stage = next(stage for stage in log["stages"] if stage["kind"] == "TrainRefiners")
            adapter = _merged(adapter, stage["blocks"], stage["rank"], tensors, path)
        else:
            scorers[name] = CachePredictor(adapter)
            _load_exactly(scorers[name], tensors, path)
            scorers[name].eval().requires_grad_(False)
    return replace(numbers, scorers=scorers), adapter


def load_numbers(folder: Path) -> Artefacts:
    """The part of what `save_artefacts` wrote that needs no model: tables and alpha-bar.

    Raises:
        UserError: as `load_artefacts`.
    """
    log = read_json(folder / "artefacts.json")
    tables = {name: as_table(_vouched(folder, name, log)["table"]) for name in log.get("tables", ())}
    return Artefacts(alpha_bar=tuple(log["scores"]["alpha_bar"]) if "scores" in log else None, tables=tables)


def _vouched(folder: Path, name: str, log: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    tensors, _ = read_tensors(path)
    if sha256(path) != log["files"][name]:
        raise UserError(f"{path}: is not the file that artefacts.json vouches for; train the row again")
    return tensors


def _merged(adapter: Adapter, blocks: int, rank: int, tensors: dict[str, Tensor], path: Path) -> Adapter:
    merged = make_adapter(copy.deepcopy(adapter.model), adapter.spec)
    lora = add_refiners(merged, blocks, rank)
    _load_exactly(lora, tensors, path, only="lora_")
    lora.merge_and_unload()
    return make_adapter(merged.model, merged.spec)  # the merged layers are new modules


def _load_exactly(module: nn.Module, tensors: dict[str, Tensor], path: Path, only: str = "") -> None:
    expected = {key for key in module.state_dict() if only in key}
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[0]
        raise UserError(
            f"{path}: {odd} is missing or unknown; the file belongs to another model or version: train again"
        )
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).splitlines()[-1].strip()}; train the row again") from error
