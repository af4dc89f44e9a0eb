"""Try a recipe: train a denoiser and its classifier on Fashion-MNIST, then score its samples by guidance scale.

    python -m tcbench.stages.trial --minutes 6 --out results/trial

writes the weights (float16, in shards), the classifier, scores.json and a grid of samples.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tcbench.data import Dataset, to_uint8
from tcbench.data.sets.fashion import Fashion
from tcbench.metrics.frechet import Gaussian, frechet_distance
from tcbench.models.adapter import Adapter
from tcbench.models.classifier import FashionCNN, load_classifier
from tcbench.models.networks import load_transformer, make_adapter
from tcbench.models.specs import MODELS, DiTSpec
from tcbench.record.files import copy_file, read_json, read_tensors, write_json, write_shards
from tcbench.report.grids import grid, save_grid
from tcbench.samplers import ReferenceDDIM
from tcbench.sampling import initial_noise, sample_labels
from tcbench.training.base import Conditioned, PretrainRecipe, denoising_loss, pretrain_denoiser
from tcbench.training.classifier import ClassifierRecipe, train_classifier
from tcbench.training.running import deterministic

SEED = 1
"""Keys the noise that guidance is chosen on; a suite's evaluated samples have another."""
SHARD_BYTES = 15 * 2**20


class UncachedSampler:
    """Images of a denoiser by DDIM with guidance, in 16 bit and compiled on a GPU.

    Args:
        adapter: of a class-conditional model.
        batch_size: samples at once.
    """

    def __init__(self, adapter: Adapter, batch_size: int) -> None:
        self.adapter, self.batch_size, self.on_gpu = adapter, batch_size, adapter.device.type == "cuda"
        self.plain = torch.compile(adapter.plain) if self.on_gpu else adapter.plain

    @torch.no_grad()
    def __call__(self, count: int, scale: float, steps: int) -> Tensor:
        """uint8 [count, C, H, W] on the adapter's device; classes in turn."""
        parts = torch.arange(count).split(self.batch_size)
        return torch.cat([self._batch(index, scale, steps) for index in parts])

    def _batch(self, index: Tensor, scale: float, steps: int) -> Tensor:
        adapter, spec = self.adapter, self.adapter.spec
        x = initial_noise(adapter, SEED, index).to(adapter.device)
        guidance = spec.guidance(scale)
        (prompt,) = guidance.prompts(adapter, sample_labels(index, 10).to(adapter.device))
        sampler = ReferenceDDIM(steps)
        for step, timestep in enumerate(sampler.timesteps):
            rows = torch.full((guidance.rows_per_sample * len(x),), timestep, device=adapter.device)
            with torch.autocast(adapter.device.type, torch.bfloat16, enabled=self.on_gpu):
                output = self.plain(guidance.latents(x), rows, prompt)
            x, _ = sampler.step(guidance.combine([output.float()[:, : spec.in_channels]]), step, x)
        return to_uint8(x)


@dataclass
class Judge:
    """FID to the held-out real images, and the share of samples of the class they were drawn for.

    Attributes:
        network: the classifier.
        real: its features of the real images.
    """

    network: nn.Module
    real: Gaussian

    @classmethod
    def of(cls, network: nn.Module, images: Tensor) -> "Judge":
        """With these real images, [n, C, H, W] in [-1, 1]."""
        return cls(network, Gaussian.fit(features(network, images)[0]))

    def fid(self, images: Tensor) -> float:
        """Of images [n, C, H, W] in [-1, 1]."""
        return frechet_distance(features(self.network, images)[0], self.real)

    def score(self, samples: Tensor) -> dict[str, float]:
        """Of samples as `UncachedSampler` makes them."""
        pooled, logits = features(self.network, samples.float() / 127.5 - 1)
        right = logits.argmax(1) == sample_labels(torch.arange(len(samples)), 10)
        return {"fid": frechet_distance(pooled, self.real), "accuracy": right.float().mean().item()}


@torch.no_grad()
def features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled [n, d], logits [n, classes]) on the CPU."""
    outputs = [network(part) for part in images.split(1000)]
    return tuple(torch.cat([output[name].cpu() for output in outputs]) for name in ("features", "logits"))  # type: ignore[return-value]


def iterations_in(minutes: float, spec: DiTSpec, recipe: PretrainRecipe, device: torch.device, data: Dataset) -> int:
    """How many iterations of training take that long, from the speed of forty after twenty to warm up."""
    model = Conditioned(spec, device, recipe.seed)
    network = torch.compile(model, mode="reduce-overhead") if recipe.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, fused=True)
    batch = data[: recipe.batch_size].to(device)
    dropped, timesteps = torch.zeros_like(batch.labels, dtype=torch.bool), torch.full_like(batch.labels, 500)
    noise, start = torch.randn_like(batch.images), 0.0
    for iteration in range(60):
        if iteration == 20:
            _wait(device)
            start = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            denoising_loss(network, batch, dropped, timesteps, noise, "eps").backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    rate = 40 / (time.monotonic() - start)
    iterations = int(minutes * 60 * rate * 0.92)  # the averaged weights, the log and the state take the rest
    say(f"{rate:.1f} iterations a second of {recipe.batch_size}: {iterations} iterations")
    torch._dynamo.reset()  # training compiles a network of its own, with kernels that are cached by now
    return iterations


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


_STARTED = time.monotonic()


def say(line: str) -> None:
    """A line of the log, with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; --help says what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of the idx files")
    add("--out", type=Path, required=True)
    add("--work", type=Path, help="where the state of an interrupted run is kept; default: OUT")
    add("--minutes", type=float, help="of training, instead of the recipe's iterations")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the recipe")
    add("--model", nargs="*", default=[], metavar="FIELD=VALUE", help="of fashion-dit's shape")
    add("--classifier", nargs="*", default=[], metavar="FIELD=VALUE", help="of the classifier's recipe")
    add("--scales", type=float, nargs="+", default=[1.0, 1.1, 1.25, 1.5, 2.0])
    add("--samples", type=int, default=2000, help="per scale, with --steps")
    add("--final", type=int, default=10000, help="samples at the best scale, with --steps; 0: none")
    add("--steps", type=int, default=50)
    add("--fine-steps", type=int, default=250, help="as many samples as for a scale, at the best scale; 0: none")
    add("--checkpoints", type=int, nargs="*", default=[], help="iterations after which 1000 samples are scored")
    add("--limit", type=int, help="use that many images of each part only, to rehearse")
    add("--batch", type=int, default=500, help="samples at once")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    spec = DiTSpec(**MODELS["fashion-dit"].model_dump() | _values(options.model))
    recipe = PretrainRecipe(**dict(Fashion.recipes["denoiser"]) | _values(options.set))
    work = options.work or options.out
    work.mkdir(parents=True, exist_ok=True)
    train, test = (Fashion(options.data).images(held_out)[: options.limit] for held_out in (False, True))
    say(f"{len(train)} images to train on, {len(test)} held out; {device}")

    classifier = work / "classifier.safetensors"
    if not classifier.exists():
        classifier_recipe = ClassifierRecipe(**dict(Fashion.recipes["classifier"]) | _values(options.classifier))
        train_classifier(train, classifier_recipe, device, classifier, work / "classifier-log.json", FashionCNN)
    network = load_classifier(FashionCNN, classifier, device)
    images, real = train.images.to(device), test.images.to(device)
    judge = Judge.of(network, real)
    accuracy = (features(network, real)[1].argmax(1) == test.labels).float().mean().item()
    checkpoints = work / "checkpoints.json"  # what was scored before an interruption, too
    watched: dict[str, Any] = read_json(checkpoints) if checkpoints.exists() else {}
    scores: dict[str, Any] = {"classifier_accuracy": accuracy, "floor": {}, "checkpoints": watched, "guidance": {}}
    for count in sorted({options.samples, options.final} - {0}):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).split(count)[:3]
        scores["floor"][count] = [judge.fid(images[part.to(device)]) for part in order]
    say(f"classifier right on {accuracy:.4f} of the held-out images; floor by samples: {scores['floor']}")

    denoiser, log = work / "denoiser.safetensors", work / "denoiser-log.json"
    if not log.exists():  # written last
        if options.minutes:
            with deterministic():  # as training is, and slower for it
                iterations = iterations_in(options.minutes, spec, recipe, device, train)
            recipe = recipe.model_copy(update={"iterations": iterations})
        watch = _watch(judge, options.checkpoints, options.steps, options.batch, watched, checkpoints)
        pretrain_denoiser(spec, train, test[:512], "eps", recipe, device, denoiser, log, watch)
        say(f"trained {recipe.iterations} iterations: {read_json(log)['history'][-1]}")
    scores["training"] = read_json(log)
    state = {name: tensor.half() for name, tensor in read_tensors(denoiser)[0].items()}
    write_shards(options.out, state, SHARD_BYTES)
    if work != options.out:
        copy_file(classifier, options.out / classifier.name)
    classes = [[int(row) for row in (test.labels == number).nonzero()[:2]] for number in range(10)]
    rows = {"real": to_uint8(test.images[[pair[place] for place in range(2) for pair in classes]])}

    # the float16 weights that are kept are those that are judged
    adapter = make_adapter(load_transformer(spec, options.out, device), spec)
    sampler = UncachedSampler(adapter, options.batch)
    for scale in options.scales:
        samples = sampler(options.samples, scale, options.steps)
        scores["guidance"][scale] = judge.score(samples)
        rows[f"scale {scale}"] = samples[:20].cpu()
        say(f"scale {scale}, {options.steps} steps, {options.samples} samples: {scores['guidance'][scale]}")
        _write(options.out, scores, rows)
    best = min(scores["guidance"], key=lambda scale: scores["guidance"][scale]["fid"])
    for name, count, steps in (
        ("final", options.final, options.steps),
        ("fine", options.samples, options.fine_steps),
    ):
        if count and steps:
            samples = sampler(count, best, steps)
            scores[name] = {"scale": best, "steps": steps, "samples": count} | judge.score(samples)
            rows[f"{steps} steps"] = samples[:20].cpu()
            say(f"{name}: {scores[name]}")
            _write(options.out, scores, rows)


def _watch(
    judge: Judge, iterations: Sequence[int], steps: int, batch: int, watched: dict[str, Any], out: Path
) -> Callable[[int, Adapter], None]:
    samplers: list[UncachedSampler] = []  # one, made when it is first needed

    def watch(iteration: int, adapter: Adapter) -> None:
        if iteration not in iterations:
            return
        samplers[:] = samplers or [UncachedSampler(adapter, batch)]
        found = {scale: judge.score(samplers[0](2 * batch, scale, steps)) for scale in (1.0, 1.5)}
        watched[str(iteration)] = found
        write_json(out, watched)
        say(f"after {iteration} iterations, {2 * batch} samples: {found}")

    return watch


def _write(out: Path, scores: dict[str, Any], rows: dict[str, Tensor]) -> None:
    write_json(out / "scores.json", scores)
    save_grid(grid([images[:, 0].numpy() for images in rows.values()], list(rows)), out / "samples.png")


def _values(settings: Sequence[str]) -> dict[str, Any]:
    return {name: yaml.safe_load(value) for name, value in (setting.split("=", 1) for setting in settings)}


if __name__ == "__main__":
    main()
