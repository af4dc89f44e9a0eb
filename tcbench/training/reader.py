"""Training of the digit reader on captioned scenes, whose layouts are known."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm import tqdm

from tcbench.data.augment import Affine
from tcbench.data.sets.scenes import SIDE, SIZES, Scenes
from tcbench.models.reader import CLASSES, NONE, DigitReader, Reading, read_digits, target_map
from tcbench.record.files import write_tensors
from tcbench.training.running import deterministic, provenance, require_finite, write_log


class ReaderRecipe(BaseModel):
    """How to train the reader; the defaults made the shipped weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenes: int = Field(default=50_000, gt=0)
    held_out: int = Field(default=1000, gt=0, description="scenes that the log's share is of")
    iterations: int = Field(default=2500, gt=0)
    batch_size: int = Field(default=256, gt=0)
    learning_rate: float = Field(default=2e-3, gt=0, description="the peak, after a linear warm-up; then cosine to 0")
    warmup: int = Field(default=200, ge=0, description="iterations")
    weight_decay: float = Field(default=0.05, ge=0)
    noise: float = Field(default=0.15, ge=0, description="largest standard deviation of noise; half of them get none")
    affine: Affine = Affine(rotation=6, scale=0.06)  # moves a centre by about a pixel at most
    log_every: int = Field(default=250, gt=0, description="iterations")
    seed: int = 0


def train_reader(recipe: ReaderRecipe, device: torch.device | str, out: Path, log: Path) -> None:
    """Train `DigitReader` by cross-entropy at every pixel and write it, whenever the log grows.

    Scenes lie anywhere in a canvas two pixels larger, so that no position of the half-resolution grid is special.

    Args:
        recipe: hyperparameters and seed.
        device: where to train.
        out: safetensors file to write, with the recipe and versions in its metadata.
        log: JSON file to write: every `log_every` iterations the mean training loss and the share of held-out scenes
            whose every digit is read right, in size and within two pixels.

    Raises:
        UserError: the loss is not finite, or a file cannot be written.
    """
    device = torch.device(device)
    images, targets = (part.to(device) for part in _scenes(recipe.scenes, held_out=False))
    held_out, truth = Scenes().compose(range(recipe.held_out), True).images, layouts(recipe.held_out, True)
    metadata, history = provenance(recipe, device), []
    with deterministic(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = DigitReader().to(device)
        background = torch.zeros(CLASSES, 4)
        background[NONE] = 8.0  # which nearly every pixel is
        model.head.bias = torch.nn.Parameter(background.flatten().to(device))
        *weights, bias = model.parameters()  # decay would take the bias, all that a blank canvas gives, towards 0
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": [bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.iterations)
        generator = torch.Generator(device).manual_seed(recipe.seed)
        place = torch.Generator().manual_seed(recipe.seed)
        total, count = torch.zeros((), device=device), 0
        progress = tqdm(range(1, recipe.iterations + 1), desc="train the digit reader", unit="it")
        for iteration in progress:
            batch = torch.randint(len(images), (recipe.batch_size,), generator=generator, device=device)
            top, left = torch.randint(3, (2,), generator=place).tolist()
            edges = (left, 2 - left, top, 2 - top)
            pixels = F.pad(images[batch].float() / 127.5 - 1, edges, value=-1.0)
            pixels = recipe.affine(pixels, generator)
            chance = torch.rand(len(batch), 1, 1, 1, generator=generator, device=device)
            deviation = recipe.noise * (2 * chance - 1).clamp(min=0)  # always noisy, blank canvas would be unseen
            pixels = pixels + deviation * torch.randn(pixels.shape, generator=generator, device=device)
            target = F.pad(targets[batch].long(), edges, value=NONE)
            scores = (
                model(pixels)["map"].movedim(1, 3).flatten(0, 2)
            )  # the loss over 2-d maps has no deterministic kernel
            loss = F.cross_entropy(scores, target.flatten(), reduction="sum") / (target != NONE).sum()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total, count = total + loss.detach(), count + 1
            if iteration % recipe.log_every == 0 or iteration == recipe.iterations:
                mean = total.item() / count
                require_finite(mean, iteration)
                right = sum(map(_same, read_digits(model, held_out.to(device)), truth)) / len(truth)
                history.append({"iteration": iteration, "loss": mean, "held_out_read_right": right})
                progress.set_postfix(loss=f"{mean:.4f}", read_right=f"{right:.3f}")
                total, count = torch.zeros((), device=device), 0
                write_tensors(out, {name: tensor.cpu() for name, tensor in model.state_dict().items()}, metadata)
                write_log(log, [out], metadata, recipe, history)


def _scenes(count: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """(uint8 images [n, 1, 24, 24], uint8 target maps [n, 24, 24])."""
    images = Scenes().compose(range(count), held_out).images
    return (127.5 * images + 128).clamp(0, 255).byte(), target_map(layouts(count, held_out), SIDE).byte()


def layouts(count: int, held_out: bool) -> list[list[Reading]]:
    """What a perfect reader reads."""
    names = {pixels: name for name, pixels in SIZES.items()}
    layouts = []
    for index in range(count):
        scene = Scenes().draw(index, held_out)
        items = (
            Reading(item.digit, names[item.size], item.top + item.size // 2, item.left + item.size // 2)
            for item in scene.items
        )
        layouts.append(sorted(items, key=lambda item: item.y))
    return layouts


def _same(read: list[Reading], truth: list[Reading]) -> bool:
    """Whether the same digits were read, each within two pixels."""
    left = list(truth)
    for item in read:
        match = next(
            (
                other
                for other in left
                if (item.digit, item.size) == (other.digit, other.size)
                and max(abs(item.y - other.y), abs(item.x - other.x)) <= 2
            ),
            None,
        )
        if match is None:
            return False
        left.remove(match)
    return not left
