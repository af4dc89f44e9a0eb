"""Training of LoRA refiners (Hu et al. 2021) on the last blocks, on a method's own hard P-step plans (Sec. IV-B)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import add_refiners
from tcbench.engine.engine import Engine
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Method, Run
from tcbench.trainable import TrainRefiners
from tcbench.training.pairs import Pairs, uncached_updates
from tcbench.training.running import check_finite
from tcbench.training.sizes import ReuseErrors


def train_refiners(
    method: Method, stage: TrainRefiners, pairs: Pairs, artefacts: Artefacts, sizes: ReuseErrors
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit LoRA on the last blocks to the uncached x^L, on the method's own P-steps one step after a full one.

    The inference engine runs as it will when sampling, with hard token choices; the blocks before the refiners are
    frozen, so the gradient passes through the refiners alone.
    """
    adapter, weight_S = pairs.adapter, sizes.weights(stage.loss)
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
        loss = weight_S[later].item() * F.mse_loss(engine.hidden(plan, later, tokens, condition), target)
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
            history["loss_without_refiners"].append(weight_S[later].item() * F.mse_loss(plain, target).item())
            progress.set_postfix(loss=f"{loss.item():.3g}")
    state = {name: parameter.detach().cpu() for name, parameter in lora.named_parameters() if "lora_" in name}
    lora.unload()
    return state, {**sizes.record(stage.loss), **history}
