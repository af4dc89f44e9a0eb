"""Training of LoRA refiners (Hu et al. 2021) on the last blocks, on a method's own hard plans (Sec. IV-B)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import add_refiners
from tcbench.engine.engine import Engine
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Method, Run
from tcbench.plan import Plan
from tcbench.trainable import TrainRefiners
from tcbench.training.held_out import BATCHES, SEED, HeldOut
from tcbench.training.pairs import Pairs, uncached_updates
from tcbench.training.running import check_finite
from tcbench.training.sizes import ReuseErrors, row_errors
from tcbench.training.unfinished import Stateful, Unfinished, Weights
from tcbench.watch.checking import values_unchecked


def train_refiners(
    method: Method,
    stage: TrainRefiners,
    pairs: Pairs,
    artefacts: Artefacts,
    sizes: ReuseErrors,
    unfinished: Unfinished,
    start: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit LoRA on the last blocks to the plain model's uncached x^L at the method's P-steps, or at every step.

    The inference engine runs as it will when sampling, with hard token choices; the blocks before the refiners are
    frozen, so the gradient passes through the refiners alone.

    Args:
        start: the tensors of LoRA that learned with the scorer; without them it begins as no change.

    Returns:
        The tensors of LoRA, and what the log says of its training, the held-out loss without refiners among it.

    Raises:
        UserError: the loss became NaN or infinite, or rose.
    """
    lora = add_refiners(pairs.adapter, stage.blocks, stage.rank, pairs.generator)
    try:
        weights = lora_weights(lora)
        told = _fit(lora, weights, method, stage, pairs, artefacts, sizes, unfinished, start)
        return {name: parameter.detach().cpu() for name, parameter in weights.items()}, told
    finally:
        lora.unload()


def _fit(
    lora: LoraModel,
    weights: dict[str, torch.nn.Parameter],
    method: Method,
    stage: TrainRefiners,
    pairs: Pairs,
    artefacts: Artefacts,
    sizes: ReuseErrors,
    unfinished: Unfinished,
    start: Mapping[str, Tensor],
) -> dict[str, Any]:
    optimiser = torch.optim.AdamW(weights.values(), stage.learning_rate, betas=(0.9, 0.999), weight_decay=0)
    weight_S, told = sizes.weights(stage.loss), sizes.record(stage.loss)
    run = Run(
        pairs.adapter.shape, pairs.sampler.timesteps, Unguided(), torch.arange(stage.batch_size), artefacts=artefacts
    )
    full = method.i_steps(run)
    p_steps = [step for step in range(1, run.nfe) if step not in full]
    if not p_steps:
        return told | {"ended": "nothing to train: every step is full"}

    steps = list(range(run.nfe)) if stage.reach == "every" else p_steps
    walked: set[int] = set()

    def chain_loss(drawing: Pairs, later: int) -> Tensor:
        """The error of a batch at a step, with a gradient; on a GPU, what the method decides is checked once a step."""
        again = later in walked
        walked.add(later)
        with values_unchecked(again and pairs.adapter.device.type == "cuda"):
            if later in full:  # the refiners see what the plain model sees
                engine, plan, tokens, condition = walk(method, run, drawing, later, later)
            elif stage.reach == "one":
                with plain_model(lora):
                    engine, plan, tokens, condition = walk(method, run, drawing, later - 1, later)
            else:
                engine, plan, tokens, condition = walk(method, run, drawing, max(i for i in full if i < later), later)
            with plain_model(lora):
                target, _ = uncached_updates(pairs.adapter, tokens, condition)
            hidden = engine.hidden(plan, later, tokens, condition)
        return weight_S[later].item() * row_errors(hidden, target, run.shape.joint_text).mean()

    @torch.no_grad()
    def held_out_loss() -> float:
        held_out, total = pairs.again(SEED, held_out=True), 0.0
        for kind in (p_steps, [step for step in steps if step in full]):
            for batch in range(BATCHES if kind else 0):
                later = kind[(2 * batch + 1) * len(kind) // (2 * BATCHES)]
                total += pairs.crew.mean(chain_loss(held_out, later)).item() * len(kind) / (len(steps) * BATCHES)
        return total

    without = held_out_loss() if start else None
    for name, tensor in start.items():
        weights[name].data.copy_(tensor)
    watch = HeldOut(stage, weights, held_out_loss)
    history: list[float] = []
    parts: dict[str, Stateful] = {"refiners": Weights(weights), "optimiser": optimiser, "watch": watch}
    left = unfinished.stage(pairs.generator, {"loss": history}, parts).iterations(stage.iterations)
    progress = tqdm(left, desc="train refiners", total=stage.iterations, mininterval=1)
    for iteration in progress:
        if watch.enough(iteration):
            break
        loss = chain_loss(pairs, pairs.one_of(steps))
        check_finite(loss, stage, iteration)
        optimiser.zero_grad()
        loss.backward()
        pairs.crew.average_gradients(weights.values())
        optimiser.step()
        if iteration % max(1, stage.iterations // 20) == 0 or iteration == stage.iterations - 1:
            history.append(pairs.crew.mean(loss).item())
            progress.set_postfix(loss=f"{history[-1]:.3g}")
    told |= {"training_loss": history, **watch.finish()}
    return told | {"held_out_loss_without": watch.losses[0] if without is None else without}


@torch.no_grad()
def walk(method: Method, run: Run, drawing: Pairs, start: int, later: int) -> tuple[Engine, Plan, Tensor, Any]:
    """Walk a batch from a full step to a P-step on the method's own plans, as sampling does, or not at all.

    A method may choose tokens by the whole batch, so a crew plans for all of it and each executes its share.

    Returns:
        The engine with the caches that the later step sees, and the plan, tokens and condition of that step.
    """
    engine, crew = Engine(drawing.adapter, run, method.start(run)), drawing.crew
    all_steps = torch.full((len(run.sample_index),), start)
    x_of_all, label_of_all = drawing.start_of_all(all_steps)
    x_of_all, label_of_all = x_of_all.to(drawing.adapter.device), label_of_all.to(drawing.adapter.device)
    x, label, step = crew.share(x_of_all), crew.share(label_of_all), crew.share(all_steps)

    def planned(number: int) -> Plan:
        if crew.size == 1:
            return engine.plan(number, tokens, condition)
        whole = drawing.embed(crew.joined(x), all_steps, label_of_all)
        return engine.plan(number, *whole).of_rows(crew.share(torch.arange(len(all_steps))))

    tokens, condition = drawing.embed(x, step, label)
    plan = planned(0)  # the first step is always an I-step
    for number in range(start, later):
        hidden = engine.hidden(plan, number, tokens, condition)
        x = drawing.next(x, hidden, condition, step)
        step, all_steps = step + 1, all_steps + 1
        tokens, condition = drawing.embed(x, step, label)
        plan = planned(number + 1)
    return engine, plan, tokens, condition


def lora_weights(lora: LoraModel) -> dict[str, torch.nn.Parameter]:
    """What is trained of it, by name."""
    return {name: parameter for name, parameter in lora.named_parameters() if "lora_" in name}


@contextmanager
def plain_model(lora: LoraModel) -> Iterator[None]:
    """The model without its refiners."""
    lora.disable_adapter_layers()
    try:
        yield
    finally:
        lora.enable_adapter_layers()
