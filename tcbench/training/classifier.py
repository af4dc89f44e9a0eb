"""Training of the classifiers whose features take Inception's place in a suite's metrics."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from tqdm import tqdm

from tcbench.data import Dataset, split
from tcbench.data.augment import Affine
from tcbench.models.classifier import DigitsCNN
from tcbench.record.files import write_tensors
from tcbench.training.running import deterministic, provenance, require_finite, write_log


class ClassifierRecipe(BaseModel):
    """How to train the classifier; the defaults made the shipped weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: int = Field(default=3000, gt=0)
    batch_size: int = Field(default=128, gt=0)
    learning_rate: float = Field(default=2e-3, gt=0, description="the peak, after a linear warm-up; then cosine to 0")
    warmup: int = Field(default=100, ge=0, description="iterations")
    weight_decay: float = Field(default=0.01, ge=0)
    affine: Affine = Affine(rotation=10, scale=0.1, shift=1)
    log_every: int = Field(default=250, gt=0, description="iterations")
    seed: int = 0


def train_classifier(
    data: Dataset,
    recipe: ClassifierRecipe,
    device: torch.device | str,
    out: Path,
    log: Path,
    build: Callable[[], nn.Module] = DigitsCNN,
) -> None:
    """Train a classifier by cross-entropy on nine tenths of `data` and write it.

    Args:
        data: images [n, C, H, W] and labels.
        recipe: hyperparameters and seed; the same on the same kind of device give the same bits.
        device: where to train.
        out: safetensors file to write, with the recipe and versions in its metadata.
        log: JSON file to write: every `log_every` iterations the mean training loss and the held-out accuracy.
        build: makes the network, from torch's global generator.

    Raises:
        UserError: the loss is not finite, or a file cannot be written.
    """
    device = torch.device(device)
    train, held_out = (part.to(device) for part in split(data))
    history = []
    with deterministic(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # of the initial weights, drawn on the CPU
        model = build().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.iterations)
        generator = torch.Generator(device).manual_seed(recipe.seed)
        total, count = torch.zeros((), device=device), 0
        progress = tqdm(range(1, recipe.iterations + 1), desc="train the classifier", unit="it")
        for iteration in progress:
            batch = train[torch.randint(len(train), (recipe.batch_size,), generator=generator, device=device)]
            logits = model(recipe.affine(batch.images, generator))["logits"]
            loss = F.cross_entropy(logits, batch.labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total, count = total + loss.detach(), count + 1
            if iteration % recipe.log_every == 0 or iteration == recipe.iterations:
                mean = total.item() / count  # the only place that waits for the device
                require_finite(mean, iteration)
                record = {"iteration": iteration, "loss": mean, "held_out_accuracy": accuracy(model, held_out)}
                history.append(record)
                progress.set_postfix(loss=f"{mean:.4f}", accuracy=f"{record['held_out_accuracy']:.3f}")
                total, count = torch.zeros((), device=device), 0
    metadata = provenance(recipe, device)
    write_tensors(out, model.cpu().state_dict(), metadata)
    write_log(log, [out], metadata, recipe, history)


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of `data` classified right."""
    parts = (data[first : first + 1000] for first in range(0, len(data), 1000))
    return torch.cat([model(part.images)["logits"].argmax(1) == part.labels for part in parts]).float().mean().item()
