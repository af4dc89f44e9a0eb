"""Learning-to-Cache against outputs of its reference code: every number of a case is reproduced from its settings.

A case is `<case>.json` (settings) and `<case>.safetensors` (expected tensors) in a folder that also holds the model's
`weights.safetensors` and, for sampling, `inputs.safetensors` (noise z, labels).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcbench.data import Dataset
from tcbench.engine import Engine
from tcbench.errors import UserError
from tcbench.files import read_json, read_tensors
from tcbench.method import Artefacts, TrainRouter
from tcbench.models.adapter import Adapter
from tcbench.models.specs import MODELS, load_transformer, make_adapter
from tcbench.registry import make_method
from tcbench.sampling import ReferenceDDIM, SamplerSettings, denoise, start_run
from tcbench.training.caching import Pairs
from tcbench.training.routers import RouterTrainer, as_table, router_sites


def run_inference(directory: Path, case: str) -> dict[str, float]:
    """Sample with the case's router and settings.

    Returns:
        Largest absolute error of `timesteps`, of `eps` (guided, every step) and of `final` (latents), and, under
        `recomputed`, the number of branches that were computed where the reference reused or the reverse.

    Raises:
        UserError: a file or a setting is missing or unknown.
    """
    settings, expected, adapter = _case(directory, case)
    inputs, _ = read_tensors(directory / "inputs.safetensors")
    nfe, spacing = _respacing(directory, case, str(_setting(settings, "timestep_respacing", directory, case)))
    shared = SamplerSettings(_setting(settings, "cfg_scale", directory, case), spacing=spacing)
    method = make_method("learning_to_cache", {"threshold": _setting(settings, "thres", directory, case)})
    artefacts = Artefacts(tables={"router": as_table(expected["router_prob"])})
    sampler, run = start_run(adapter, method, nfe, shared, torch.arange(len(inputs["z"])), artefacts)
    engine = Engine(adapter, run, method.start(run))
    with torch.inference_mode():
        steps = list(denoise(adapter, engine, sampler, shared, inputs["z"], inputs["labels"]))
    computed = torch.tensor([[plan[str(site)] == "all" for site in router_sites(run.shape)] for plan in engine.plans])
    return {
        "timesteps": _largest(torch.tensor(sampler.timesteps), expected["timesteps"]),
        "recomputed": float((computed != expected["recomputed"].flatten(1).bool()).sum()),
        "eps": _largest(torch.stack([eps for eps, _, _ in steps]), expected["eps"]),
        "final": _largest(steps[-1][2], expected["final"]),
    }


def run_training(directory: Path, case: str) -> dict[str, float]:
    """Repeat the case's optimiser steps, from its logits, images, noise and label drops.

    Returns:
        Largest relative error of `loss`, of its parts `data_loss` and `gates`, and of `mse_per_sample`; largest
        absolute error of `gradients` (after every step) and of the final `logits`; under `timesteps`, of the pairs'.

    Raises:
        UserError: a file or a setting is missing or unknown.
    """
    settings, expected, adapter = _case(directory, case)
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    nfe = _setting(settings, "num_sampling_steps", directory, case)
    rate = re.search(r"\blr (\S+)", _setting(settings, "optimizer", directory, case))
    if rate is None:
        raise UserError(f"{directory / case}.json: optimizer: names no learning rate ('lr 1e-3')")
    steps = _setting(settings, "steps", directory, case)
    stage = TrainRouter(
        name="router",
        cost_weight=_setting(settings, "l1", directory, case),
        iterations=len(steps),
        batch_size=expected["x_start"].shape[1],
        learning_rate=float(rate[1].rstrip(",;")),
        straight_through=settings.get("ste_threshold"),
    )
    sampler = ReferenceDDIM(nfe)
    pairs = Pairs(adapter, Dataset(expected["x_start"][0], expected["labels"][0]), sampler, seed=0)
    trainer = RouterTrainer(pairs, stage, expected["router_prob_init"])
    errors = dict.fromkeys(("timesteps", "loss", "data_loss", "gates", "mse_per_sample", "gradients", "logits"), 0.0)

    def note(quantity: str, error: float) -> None:
        errors[quantity] = max(errors[quantity], error)

    for number, wanted in enumerate(steps):
        odd, dropped = 2 * wanted["pair"] + 1, expected["drop_uniform"][number] < settings.get("dropout_prob", 0.1)
        step = torch.full((stage.batch_size,), nfe - 1 - odd)
        label = adapter.drop(expected["labels"][number], dropped)
        x = sampler.noised(expected["x_start"][number], step, expected["noise"][number])
        loss = trainer.step(odd, x, label)
        gradients = torch.stack([torch.zeros_like(row) if row.grad is None else row.grad for row in trainer.rows])
        used_timesteps = [sampler.timesteps[nfe - 1 - index] for index in (odd, odd - 1)]
        note("timesteps", _largest(torch.tensor(used_timesteps), torch.tensor([wanted["t_odd"], wanted["t_even"]])))
        note("loss", _relative(loss.total, wanted["loss"]))
        note("data_loss", _relative(loss.mse_R.mean(), wanted["data_loss"]))
        note("gates", _relative(loss.gates, wanted["l1_loss_sum_of_sigmoids"]))
        note("mse_per_sample", _relative(loss.mse_R, wanted["mse_per_sample"]))
        note("gradients", _largest(gradients, expected["router_prob_grad"][number]))
    note("logits", _largest(trainer.logits(), expected["router_prob_final"]))
    return errors


def _case(directory: Path, case: str) -> tuple[dict[str, Any], dict[str, Tensor], Adapter]:
    """(settings, expected tensors, the reference's model)."""
    spec = MODELS["tiny-dit"]
    adapter = make_adapter(load_transformer(spec, directory / "weights.safetensors"), spec)
    return read_json(directory / f"{case}.json"), read_tensors(directory / f"{case}.safetensors")[0], adapter


def _setting(settings: dict[str, Any], key: str, directory: Path, case: str) -> Any:
    if key not in settings:
        raise UserError(f"{directory / case}.json: {key} is missing; is this a case of Learning-to-Cache?")
    return settings[key]


def _respacing(directory: Path, case: str, text: str) -> tuple[int, str]:
    """(number of steps, spacing) from the reference's respacing string, "20" or "ddim20"."""
    count = text.removeprefix("ddim")
    if not count.isdecimal():
        raise UserError(f"{directory / case}.json: timestep_respacing: {text!r} is neither 'N' nor 'ddimN'")
    return int(count), "linspace" if count == text else "leading"


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return _worst((ours - theirs).abs())


def _relative(ours: Tensor, theirs: float | list[float]) -> float:
    expected = torch.tensor(theirs)
    return _worst((ours - expected).abs() / expected.abs())


def _worst(error: Tensor) -> float:
    """The largest error; NaN, which compares with nothing, is an infinite one."""
    return error.double().nan_to_num(nan=float("inf")).max().item()
