"""Rates of the machine at hand, from a minute of the suite's model with random weights."""

import time
from statistics import median
from typing import Any, cast

import torch

from tcbench.budget.costing import run_of_shapes
from tcbench.budget.untrained import random_captions
from tcbench.config.suite import Suite
from tcbench.data import Dataset
from tcbench.forecast.progress import card_of
from tcbench.forecast.rates import Rate, precision_of
from tcbench.forecast.training import BATCHES, PASSES, forward_macs
from tcbench.method import Artefacts
from tcbench.models.adapter import Adapter
from tcbench.models.networks import build_transformer, make_adapter
from tcbench.models.specs import MODELS, DiTSpec
from tcbench.precision import mixed, set_products, weights_dtype
from tcbench.registry import make_method
from tcbench.replay import Replay
from tcbench.samplers import SamplerSettings, make_sampler
from tcbench.stages.images import device_of
from tcbench.stages.timing import run_seconds, step_seconds
from tcbench.trainable import TrainScorer
from tcbench.training.pairs import Pairs
from tcbench.training.scorers import train_scorer
from tcbench.training.sizes import ReuseErrors
from tcbench.training.unfinished import Unfinished

STEPS, ITERATIONS, EXAMPLES = 6, 4, 20


def calibrate(suite: Suite) -> tuple[str, list[Rate]]:
    """(the card at hand, what was measured on it): a full step as it is sampled, and iterations of a predictor, at the
    suite's batches and dtypes.

    Raises:
        UserError: the suite's device is not there.
    """
    device, spec, card = device_of(suite, alone=True), MODELS[suite.model.name], card_of(suite)
    here = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads of this CPU"
    of: dict[str, Any] = {
        "card": card,
        "model": suite.model.name,
        "kind": "measured",
        "source": f"here, {here}, {time.strftime('%F')}",
    }

    def network(dtype: torch.dtype) -> Adapter:
        return make_adapter(build_transformer(spec, device=device, dtype=dtype, seed=0, zero_init=False), spec)

    dtype, batch = suite.sampling_dtypes["denoiser"], suite.samples.batch_size
    set_products(dtype)
    settings = SamplerSettings(suite.sampler.guidance_scale, 0, suite.sampler.spacing, suite.sampler.solver)
    adapter, captions = network(weights_dtype(dtype)), random_captions(spec, 0)
    run = Replay(
        adapter, make_method("uncached", {}), STEPS, settings, torch.arange(batch), Artefacts(), prompts=captions,
        path="fused" if device.type == "cuda" else "plain",
    )  # fmt: skip
    run.run()
    macs = 2 * batch * forward_macs(spec.name)
    step: dict[str, Any] = {"what": "step", "dtype": precision_of(dtype), "batch": batch, "unit": "MACs/s"}
    rates = [Rate(**of, **step, value=macs / median(step_seconds(device, run)))]
    del run, adapter

    stage = _a_scorer(suite)
    if stage is None:
        return card, rates
    dtype = suite.dtypes["training"]
    set_products(dtype)
    adapter = network(torch.float32)
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    labels: Any = torch.arange(EXAMPLES)
    labels = captions(labels) if captions else labels % cast(DiTSpec, spec).num_classes
    data = Dataset(torch.randn(EXAMPLES, *spec.latent_shape), labels)
    pairs = Pairs(
        adapter,
        data,
        make_sampler(adapter, STEPS, settings, torch.arange(0)),
        0,
        checkpointed=suite.training.checkpointed,
    )
    errors = ReuseErrors(torch.ones(STEPS))
    with mixed(device, dtype):
        pairs.draw(stage.batch_size)  # what is made at first use
        seconds = run_seconds(device, lambda: train_scorer(stage, pairs, errors, Unfinished()))
    passes = PASSES["TrainScorer"]
    looked = 2 * BATCHES * (passes - 1) / passes  # held-out losses, before and after, without a gradient
    iterations: dict[str, Any] = {
        "what": "TrainScorer",
        "dtype": precision_of(dtype),
        "batch": stage.batch_size,
        "unit": "iterations/s",
    }
    return card, [*rates, Rate(**of, **iterations, value=(ITERATIONS + looked) / seconds)]


def _a_scorer(suite: Suite) -> TrainScorer | None:
    """The first scorer that the suite trains, with few iterations."""
    for name in suite.trained_rows:
        entry = suite[name]
        run = run_of_shapes(suite.model.name, entry.method.sampled_steps(entry.nfe))
        for stage in entry.method.training(run):
            if isinstance(stage, TrainScorer):
                changed = {
                    "iterations": ITERATIONS,
                    "cost_weight": 1e-4,
                    "patience": None,
                    "joint_rank": 0,
                    "loss": "raw",
                }
                return TrainScorer(**(vars(stage) | changed))
    return None
