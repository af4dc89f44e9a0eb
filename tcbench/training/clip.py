"""Training of the digits CLIP on captioned scenes."""

from pathlib import Path

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from open_clip import ClipLoss
from open_clip.model import CLIP
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from tcbench.data.augment import Affine
from tcbench.data.sets.scenes import Scenes
from tcbench.models.digits_clip import build_digits_clip
from tcbench.record.files import write_tensors
from tcbench.training.running import deterministic, provenance, require_finite, write_log


class ClipRecipe(BaseModel):
    """How to train the CLIP; the defaults made the shipped weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenes: int = Field(default=60_000, gt=0)
    held_out: int = Field(default=1000, gt=0, description="scenes that the log's numbers are of")
    iterations: int = Field(default=2000, gt=0)
    batch_size: int = Field(default=1024, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0, description="the peak, after a linear warm-up; then cosine to 0")
    warmup: int = Field(default=300, ge=0, description="iterations")
    weight_decay: float = Field(default=0.1, ge=0)
    affine: Affine = Affine(rotation=6, scale=0.06)
    noise: float = Field(default=0.1, ge=0, description="largest standard deviation of noise added to an image")
    clip: float = Field(default=1.0, gt=0, description="gradient norm")
    bfloat16: bool = False
    log_every: int = Field(default=250, gt=0, description="iterations")
    seed: int = 0


def train_clip(recipe: ClipRecipe, device: torch.device | str, out: Path, log: Path) -> None:
    """Train with the contrastive loss of CLIP (Radford et al., ICML 2021) and write the weights in float16, anew
    whenever the log grows.

    Args:
        recipe: hyperparameters and seed.
        device: where to train.
        out: safetensors file to write, with the recipe and versions in its metadata.
        log: JSON file to write: every `log_every` iterations the mean training loss, and of held-out scenes the share
            whose own caption is nearest among all of theirs, and the mean scores of own and of other captions.

    Raises:
        UserError: the loss is not finite, or a file cannot be written.
    """
    device = torch.device(device)
    train = Scenes().compose(range(recipe.scenes), held_out=False).to(device)
    held_out = Scenes().compose(range(recipe.held_out), held_out=True).to(device)
    metadata, history = provenance(recipe, device), []
    with deterministic(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_digits_clip().to(device)
        decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        kept = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            recipe.learning_rate,
            betas=(0.9, 0.98),
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.iterations)
        generator, contrast = torch.Generator(device).manual_seed(recipe.seed), ClipLoss()
        total, count = torch.zeros((), device=device), 0
        progress = tqdm(range(1, recipe.iterations + 1), desc="train the digits CLIP", unit="it")
        for iteration in progress:
            batch = train[torch.randint(len(train), (recipe.batch_size,), generator=generator, device=device)]
            deviation = recipe.noise * torch.rand(recipe.batch_size, 1, 1, 1, generator=generator, device=device)
            images = recipe.affine(batch.images, generator)
            images = images + deviation * torch.randn(images.shape, generator=generator, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                image, text, scale = model(images.expand(-1, 3, -1, -1), batch.labels)
            loss = contrast(image.float(), text.float(), scale)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():  # as in CLIP: the temperature never goes below 1/100
                model.logit_scale.clamp_(0, 4.6052)
            total, count = total + loss.detach(), count + 1
            if iteration % recipe.log_every == 0 or iteration == recipe.iterations:
                mean = total.item() / count
                require_finite(mean, iteration)
                record = {"iteration": iteration, "loss": mean, **_evaluate(model, held_out.images, held_out.labels)}
                history.append(record)
                progress.set_postfix(loss=f"{mean:.4f}", retrieved=f"{record['held_out_retrieved']:.3f}")
                total, count = torch.zeros((), device=device), 0
                state = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
                write_tensors(out, state, metadata)
                write_log(log, [out], metadata, recipe, history)


@torch.no_grad()
def _evaluate(model: CLIP, images: Tensor, words: Tensor) -> dict[str, float]:
    image, text, _ = model(images.expand(-1, 3, -1, -1), words)
    scores = 100 * image @ text.T
    own = scores.diagonal()
    same = (words[:, None] == words[None]).all(2)
    return {
        "held_out_retrieved": (own >= scores.max(1).values).float().mean().item(),
        "own_caption_score": own.mean().item(),
        "other_caption_score": scores[~same].mean().item(),
    }
