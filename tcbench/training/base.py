"""Pretraining of the embedded suites' denoisers, which stand where the paper has official checkpoints.

A captioned suite's text encoder is trained with its denoiser and written beside it.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from tcbench.data import Dataset
from tcbench.data.augment import Affine
from tcbench.errors import UserError
from tcbench.models.adapter import Adapter, Text
from tcbench.models.networks import build_transformer, make_adapter, save_transformer
from tcbench.models.specs import DiTSpec, ModelSpec, TextSpec
from tcbench.models.text import build_text_encoder, encode_text, text_encoder_beside
from tcbench.record.files import Damaged, check_seal, write_tensors
from tcbench.training.crew import ALONE, Crew
from tcbench.training.running import deterministic, provenance, require_finite, write_log
from tcbench.training.unfinished import write_state


class PretrainRecipe(BaseModel):
    """How to train a denoiser; a data set's, with `bfloat16` and `compile` on a GPU, made the shipped weights."""

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
    examples: int = Field(default=65536, gt=0, description="captioned examples to compose and draw from")
    bfloat16: bool = Field(default=False, description="autocast the network to bfloat16")
    compile: bool = Field(default=False, description="compile the network into CUDA graphs")
    log_every: int = Field(default=500, gt=0, description="iterations")
    seed: int = 0


Target = Literal["eps", "v"]

SCHEDULERS: dict[Target, DDPMScheduler] = {
    "eps": DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "v": DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    ),
}
"""Linear betas; the noise is predicted, or the velocity with the last timestep pure noise (Open-Sora-Plan)."""


class Conditioned(nn.Module):
    """A denoiser together with what reads its labels, for training.

    Args:
        spec: the denoiser's shape; a captioned one gets a text encoder.
        device: where to train.
        seed: of the weights.
    """

    def __init__(self, spec: ModelSpec, device: torch.device | str, seed: int) -> None:
        super().__init__()
        self.denoiser = build_transformer(spec, device=device, seed=seed)
        self.adapter = make_adapter(self.denoiser, spec)
        self.encoder = build_text_encoder(seed, device) if isinstance(spec, TextSpec) else None

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor, dropped: Tensor) -> Tensor:
        """The prediction [B, in_channels, ...], unconditional where `dropped` (bool [B])."""
        prompt = labels if self.encoder is None else Text(*encode_text(self.encoder, labels))
        # a learned variance, if the network has one, is ignored
        return self.adapter.plain(noisy, timesteps, self.adapter.drop(prompt, dropped))[:, : noisy.shape[1]]

    def save(self, out: Path, metadata: dict[str, str]) -> None:
        """Write the denoiser, and its text encoder beside it, in float16: a repository carries them."""
        save_transformer(self.denoiser, out, metadata, torch.float16)
        if self.encoder is not None:
            state = {name: parameter.detach().cpu().half() for name, parameter in self.encoder.named_parameters()}
            write_tensors(text_encoder_beside(out), state, metadata)


def pretrain_denoiser(
    spec: ModelSpec,
    train: Dataset,
    held_out: Dataset,
    target: Target,
    recipe: PretrainRecipe,
    device: torch.device | str,
    out: Path,
    log: Path,
    watch: Callable[[int, Adapter], None] | None = None,
    crew: Crew = ALONE,
) -> None:
    """Train a denoiser by L_simple (Ho et al. 2020) and write its averaged weights.

    1000 timesteps, AdamW, labels dropped to the null label. The same recipe, seed and kind of device give the same
    bits, also if the run was interrupted: it goes on from the last line of its log.

    Args:
        spec: the denoiser's shape.
        train: images or videos [n, *spec.latent_shape], and labels.
        held_out: of the same kind, for the log.
        target: what the network predicts, see `SCHEDULERS`.
        recipe: hyperparameters and seed.
        device: where to train.
        out: safetensors file to write, with the recipe and versions in its metadata; a captioned model's text
            encoder goes beside it.
        log: JSON file to write: every `log_every` iterations the mean training loss, and the loss of the averaged
            weights on held-out images and on as many training images, at the same timesteps and noise.
        watch: called with the iteration and the averaged network whenever the log has grown.
        crew: who trains together; each learns from its share of every batch, and the first writes.

    Raises:
        UserError: the data do not fit the spec, a batch cannot be shared equally, the loss is not finite, or a file
            cannot be written.
    """
    _check_fit(spec, train)
    device = torch.device(device)
    train, held_out = train.to(device), held_out.to(device)
    with deterministic():
        model = Conditioned(spec, device, recipe.seed)
        averaged = copy.deepcopy(model)  # what is evaluated and written
        average = EMAModel(model.parameters(), decay=recipe.ema, foreach=True)
        network = torch.compile(model, mode="reduce-overhead") if recipe.compile else model
        optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.iterations)
        generator = torch.Generator(device).manual_seed(recipe.seed)
        metadata = provenance(recipe, device) | {"model": spec.name, "processes": str(crew.size)}
        state = _State(
            out, metadata, {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
        )
        done, history = state.load(generator)
        average.to(device)
        total, count = crew.mean(torch.zeros((), device=device)), 0  # all have read the state when it is there
        steps, name = range(done + 1, recipe.iterations + 1), f"pretrain {spec.name}"
        progress = tqdm(steps, name, recipe.iterations, initial=done, unit="it", disable=crew.rank > 0)
        for iteration in progress:
            batch = train[torch.randint(len(train), (recipe.batch_size,), generator=generator, device=device)]
            batch = Dataset(recipe.affine(batch.images, generator), batch.labels)
            dropped = torch.rand(recipe.batch_size, generator=generator, device=device) < recipe.label_dropout
            timesteps = torch.randint(1000, (recipe.batch_size,), generator=generator, device=device)
            noise = torch.randn(batch.images.shape, generator=generator, device=device)
            batch, dropped = crew.share(batch), crew.share(dropped)
            timesteps, noise = crew.share(timesteps), crew.share(noise)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                loss = denoising_loss(network, batch, dropped, timesteps, noise, target)
            loss.backward()
            crew.average_gradients(model.parameters())
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.step(model.parameters())
            total, count = total + loss.detach(), count + 1
            if iteration % recipe.log_every == 0 or iteration == recipe.iterations:
                mean = crew.mean(total).item() / count  # the only place that waits for the device
                require_finite(mean, iteration)
                total, count = torch.zeros((), device=device), 0
                if crew.rank:
                    continue
                average.copy_to(averaged.parameters())
                record = {"iteration": iteration, "loss": mean}
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                    record["train_loss"] = _fixed_loss(averaged, train[: len(held_out)], target)
                    record["held_out_loss"] = _fixed_loss(averaged, held_out, target)
                history.append(record)
                progress.set_postfix(loss=f"{mean:.4f}", held_out=f"{record['held_out_loss']:.4f}")
                state.save(generator, iteration, history)
                if watch is not None:
                    watch(iteration, averaged.adapter)
    if crew.rank:
        return
    averaged.save(out, metadata)
    write_log(log, [out, text_encoder_beside(out)], metadata, recipe, history)
    state.path.unlink()


class _State:
    """What an interrupted run needs to go on as if it had not been: a file beside the weights to be.

    Args:
        out: the weights to be.
        metadata: of the run; the state of another one is refused.
        parts: whatever has a state_dict.
    """

    def __init__(self, out: Path, metadata: dict[str, str], parts: dict[str, Any]) -> None:
        self.path, self.metadata, self.parts = out.with_name(f"{out.stem}-state.pt"), metadata, parts

    def save(self, generator: torch.Generator, iteration: int, history: list[dict[str, float]]) -> None:
        """Write the state after an iteration."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"generator": generator.get_state(), "iteration": iteration, "history": history}
        write_state(self.path, state | {"metadata": self.metadata})

    def load(self, generator: torch.Generator) -> tuple[int, list[dict[str, float]]]:
        """Restore the state, if there is one: (iterations done, history).

        Raises:
            UserError: the state is of another run, or damaged.
        """
        if not self.path.exists():
            return 0, []
        try:
            check_seal(self.path)
        except Damaged as error:
            raise Damaged(f"{error}; remove it to start again") from error
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["metadata"] != self.metadata:
            raise UserError(f"{self.path}: an interrupted run of another recipe, device or version; remove it to start")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        return state["iteration"], state["history"]


def _check_fit(spec: ModelSpec, data: Dataset) -> None:
    classes = spec.num_classes if isinstance(spec, DiTSpec) else None
    if data.images.shape[1:] != spec.latent_shape or (classes is None) != (data.labels.ndim == 2):
        kind = "captions" if data.labels.ndim == 2 else "classes"
        raise UserError(
            f"{spec.name}: images {list(data.images.shape[1:])} with {kind}, not what a {spec.family} model of "
            f"{list(spec.latent_shape)} learns from; give the model and the data of one suite"
        )
    if classes is not None and data.labels.max() >= classes:
        raise UserError(f"{spec.name}: labels up to {data.labels.max()}, but {classes} classes")


def denoising_loss(
    network: Callable[..., Tensor], data: Dataset, dropped: Tensor, timesteps: Tensor, noise: Tensor, target: Target
) -> Tensor:
    """Mean squared error of the predicted noise or velocity, a scalar; `network` is called as `Conditioned`."""
    scheduler = SCHEDULERS[target]
    noisy = scheduler.add_noise(data.images, noise, timesteps)  # type: ignore[arg-type]
    wanted = noise if target == "eps" else scheduler.get_velocity(data.images, noise, timesteps)  # type: ignore[arg-type]
    return F.mse_loss(network(noisy, timesteps, data.labels, dropped).float(), wanted)


@torch.no_grad()
def _fixed_loss(network: Callable[..., Tensor], data: Dataset, target: Target, draws: int = 8) -> float:
    """The loss of `data` over `draws` passes with the same noise each call and timesteps spread evenly over 0..999."""
    device = data.images.device
    generator = torch.Generator(device).manual_seed(0)
    losses = []
    for draw in range(draws):
        timesteps = (torch.arange(len(data), device=device) * draws + draw) * 1000 // (len(data) * draws)
        noise = torch.randn(data.images.shape, generator=generator, device=device)
        kept = torch.zeros(len(data), dtype=torch.bool, device=device)
        losses.append(denoising_loss(network, data, kept, timesteps, noise, target))
    return torch.stack(losses).mean().item()
