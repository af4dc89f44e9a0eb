"""Pretraining of the embedded suite's denoiser, which stands where the paper has the official DiT checkpoint."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from tcbench.data import Dataset, split
from tcbench.data.augment import Affine
from tcbench.errors import UserError
from tcbench.files import write_json
from tcbench.models.dit import DiTSpec
from tcbench.models.specs import build_transformer, save_transformer
from tcbench.training.common import deterministic, provenance, require_finite


class PretrainRecipe(BaseModel):
    """How to train a denoiser; the defaults with `bfloat16` and `compile`, on a GPU, made the shipped weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: int = Field(default=15500, gt=0)
    batch_size: int = Field(default=256, gt=0)
    learning_rate: float = Field(default=2e-3, gt=0, description="the peak, after a linear warm-up; then cosine to 0")
    warmup: int = Field(default=1000, ge=0, description="iterations")
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(default=0.999, ge=0, lt=1, description="decay per iteration of the averaged weights")
    label_dropout: float = Field(default=0.1, ge=0, le=1, description="share of labels made null, for CFG")
    # a thousand or two images invite memorising; this mild they keep the statistics of the originals
    affine: Affine = Affine(rotation=5, scale=0.05, shift=0.5)
    bfloat16: bool = Field(default=False, description="autocast the network to bfloat16")
    compile: bool = Field(default=False, description="compile the network into CUDA graphs")
    log_every: int = Field(default=500, gt=0, description="iterations")
    seed: int = 0


def pretrain_denoiser(
    spec: DiTSpec, data: Dataset, recipe: PretrainRecipe, device: torch.device | str, out: Path, log: Path
) -> None:
    """Train a class-conditional denoiser by eps-prediction (Ho et al. 2020, L_simple) and write its averaged weights.

    Linear betas 1e-4..0.02 over 1000 timesteps, AdamW, labels dropped to the null label. A tenth of `data` is held
    out. The same recipe, seed and kind of device give the same bits.

    Args:
        spec: the denoiser's shape.
        data: images [n, in_channels, sample_size, sample_size] and labels.
        recipe: hyperparameters and seed.
        device: where to train.
        out: safetensors file to write, with the recipe and versions in its metadata.
        log: JSON file to write: every `log_every` iterations the mean training loss, and the loss of the averaged
            weights on held-out images and on as many training images, at the same timesteps and noise.

    Raises:
        UserError: the data do not fit the spec, the loss is not finite, or a file cannot be written.
    """
    shape = spec.latent_shape
    if data.images.shape[1:] != shape or data.labels.max() >= spec.num_classes:
        raise UserError(
            f"{spec.name}: images {list(data.images.shape[1:])} with labels up to {data.labels.max()}, not "
            f"{list(shape)} with {spec.num_classes} classes; give the model and the data of one suite"
        )
    device = torch.device(device)
    train, held_out = (part.to(device) for part in split(data))
    history = []
    with deterministic():
        model = build_transformer(spec, device=device, seed=recipe.seed)
        averaged = copy.deepcopy(model)  # what is evaluated and written
        average = EMAModel(model.parameters(), decay=recipe.ema, foreach=True)
        network = torch.compile(model, mode="reduce-overhead") if recipe.compile else model
        optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.iterations)
        generator = torch.Generator(device).manual_seed(recipe.seed)
        total, count = torch.zeros((), device=device), 0
        progress = tqdm(range(1, recipe.iterations + 1), desc=f"pretrain {spec.name}", unit="it")
        for iteration in progress:
            batch = train[torch.randint(len(train), (recipe.batch_size,), generator=generator, device=device)]
            images = recipe.affine(batch.images, generator)
            dropped = torch.rand(recipe.batch_size, generator=generator, device=device) < recipe.label_dropout
            labels = batch.labels.masked_fill(dropped, spec.num_classes)
            timesteps = torch.randint(1000, (recipe.batch_size,), generator=generator, device=device)
            noise = torch.randn(images.shape, generator=generator, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                loss = eps_loss(network, images, labels, timesteps, noise)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.step(model.parameters())
            total, count = total + loss.detach(), count + 1
            if iteration % recipe.log_every == 0 or iteration == recipe.iterations:
                mean = total.item() / count  # the only place that waits for the device
                require_finite(mean, iteration)
                average.copy_to(averaged.parameters())
                record = {
                    "iteration": iteration,
                    "loss": mean,
                    "train_loss": _fixed_loss(averaged, train[: len(held_out)]),
                    "held_out_loss": _fixed_loss(averaged, held_out),
                }
                history.append(record)
                progress.set_postfix(loss=f"{mean:.4f}", held_out=f"{record['held_out_loss']:.4f}")
                total, count = torch.zeros((), device=device), 0
    metadata = provenance(recipe, device) | {"model": spec.name}
    save_transformer(averaged, out, metadata)
    write_json(log, metadata | {"recipe": recipe.model_dump(), "history": history})


_SCHEDULER = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


def eps_loss(network: Callable[..., Any], images: Tensor, labels: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, a scalar; a learned variance, if the network has one, is ignored."""
    noisy = _SCHEDULER.add_noise(images, noise, timesteps)
    eps = network(noisy, timesteps, class_labels=labels).sample[:, : images.shape[1]]
    return F.mse_loss(eps.float(), noise)


@torch.no_grad()
def _fixed_loss(network: Callable[..., Any], data: Dataset, draws: int = 8) -> float:
    """The loss of `data` over `draws` passes with the same noise each call and timesteps spread evenly over 0..999."""
    device = data.images.device
    generator = torch.Generator(device).manual_seed(0)
    losses = []
    for draw in range(draws):
        timesteps = (torch.arange(len(data), device=device) * draws + draw) * 1000 // (len(data) * draws)
        noise = torch.randn(data.images.shape, generator=generator, device=device)
        losses.append(eps_loss(network, data.images, data.labels, timesteps, noise))
    return torch.stack(losses).mean().item()
