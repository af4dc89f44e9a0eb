"""Learning-to-Cache's training against outputs of its reference code: optimiser steps repeated from their inputs."""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tcbench.data import Dataset
from tcbench.errors import UserError
from tcbench.samplers import ReferenceDDIM
from tcbench.trainable import TrainRouter
from tcbench.training.pairs import Pairs
from tcbench.training.routers import RouterTrainer

if TYPE_CHECKING:
    from tcbench.golden.case import Case


ROUNDING = 1e-8  # a loss below this is rounding: that of hard gates which are all open is 0 or nearly


def run_training(case: "Case") -> dict[str, float]:
    """Repeat the case's optimiser steps, from its logits, images, noise and label drops.

    Returns:
        Largest relative error of `loss`, of its parts `data_loss` and `gates`, and of `mse_per_sample`; largest
        absolute error of `gradients` (after every step) and of the final `logits`; under `timesteps`, of the pairs'.

    Raises:
        UserError: a file or a setting is missing or unknown.
    """
    settings, expected, adapter = case.settings, case.expected, case.adapter()
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    nfe, steps = int(case.number("num_sampling_steps")), case.setting("steps")
    rate = re.search(r"\blr (\S+)", case.setting("optimizer"))
    if rate is None:
        raise UserError(f"{case.directory / case.name}.json: optimizer: names no learning rate ('lr 1e-3')")
    stage = TrainRouter(
        name="router",
        cost_weight=case.number("l1"),
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


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return _worst((ours - theirs).abs())


def _relative(ours: Tensor, theirs: float | list[float]) -> float:
    expected = torch.tensor(theirs)
    return _worst((ours - expected).abs() / expected.abs().clamp(min=ROUNDING))


def _worst(error: Tensor) -> float:
    """The largest error; NaN, which compares with nothing, is an infinite one."""
    return error.double().nan_to_num(nan=float("inf")).max().item()
