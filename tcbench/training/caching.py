"""Training what a method declares, stage by stage: scorers and what they say of steps (tcbench/training/scorers.py),
refiners (refiners.py), routers (routers.py, chains.py); and what uncached runs tell (calibration.py).

All learn from pairs of neighbouring steps of the inference
grid (tcbench/training/pairs.py). The cache the later step sees is filled by the uncached forward at the earlier one
(Alg. 1). docs/reproduction-notes.md, "Training", lists the choices that the paper leaves open.
"""

import time
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcbench.artefacts import read_imported
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.samplers import SamplerSettings, make_sampler
from tcbench.sampling import Prompts, default_prompts
from tcbench.trainable import (
    CalibrateMagnitudes,
    CalibrateReuse,
    CollectScores,
    ImportRouter,
    ImportSchedule,
    Trainable,
    TrainChainRouter,
    TrainRefiners,
    TrainRouter,
    TrainScorer,
)
from tcbench.training.calibration import calibrate
from tcbench.training.chains import train_on_chains
from tcbench.training.pairs import CALIBRATION_SEED, Pairs
from tcbench.training.refiners import train_refiners
from tcbench.training.routers import train_router
from tcbench.training.running import deterministic
from tcbench.training.scorers import collect_scores, train_scorer
from tcbench.training.sizes import ReuseErrors, measure_reuse
from tcbench.undisturbed import kept_weights

if TYPE_CHECKING:  # sampling loads artefacts here, and must not pay for importing scikit-learn
    from tcbench.data import Dataset


@deterministic()
def train(
    adapter: Adapter,
    method: Method,
    nfe: int,
    settings: SamplerSettings,
    data: "Dataset",
    seed: int,
    prompts: Prompts | None = None,
) -> tuple[Artefacts, dict[str, Tensor], dict]:
    """Run a method's training stages in order on a frozen model.

    Args:
        prompts: of the samples that scores are collected on, as `sample_batch` takes them.

    Returns:
        The artefacts (scorers and tables in memory), tensors of the LoRA refiners (empty if none), and a JSON-able log.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    sampler = make_sampler(adapter, method.sampled_steps(nfe), settings, torch.arange(0))
    artefacts = Artefacts()
    refiners: dict[str, Tensor] = {}
    log: dict[str, Any] = {"seed": seed, "nfe": nfe, "stages": []}
    run = Run(adapter.shape, sampler.timesteps, Unguided(), torch.arange(0))

    @cache
    def reuse_errors(free_blocks: int) -> ReuseErrors:
        return measure_reuse(Pairs(adapter, data, sampler, CALIBRATION_SEED), free_blocks)

    relative: dict[str, ReuseErrors | None] = {}  # by scorer, if its loss was relative
    for number, stage in enumerate(method.training(run)):
        began = time.perf_counter()
        pairs = Pairs(adapter, data, sampler, seed + number)
        with kept_weights(adapter, method, artefacts):
            match stage:
                case TrainScorer():
                    sizes = reuse_errors(stage.free_blocks)
                    scorer, losses = train_scorer(stage, pairs, sizes)
                    relative[stage.name] = sizes if sizes.kind(stage.loss) == "relative" else None
                    artefacts = replace(artefacts, scorers={**artefacts.scorers, stage.name: scorer})
                case CollectScores():
                    shown = prompts or partial(default_prompts, adapter)
                    statistics = collect_scores(
                        adapter, method, stage, nfe, settings, artefacts, shown, relative[stage.name]
                    )
                    artefacts = replace(artefacts, alpha_bar=tuple(statistics["alpha_bar"]))
                    losses, log["scores"] = {"marks": statistics.pop("marks")}, statistics
                case TrainRefiners():
                    sizes = reuse_errors(adapter.shape.num_blocks - stage.blocks)
                    refiners, losses = train_refiners(method, stage, pairs, artefacts, sizes)
                case TrainRouter():
                    table, losses = train_router(pairs, stage)
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
                case TrainChainRouter():
                    shown = prompts or partial(default_prompts, adapter)
                    table, losses = train_on_chains(adapter, method, stage, nfe, settings, shown, seed + number)
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
                case CalibrateReuse() | CalibrateMagnitudes():
                    shown = prompts or partial(default_prompts, adapter)
                    table, losses = calibrate(adapter, method, stage, nfe, settings, shown), {}
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
                case ImportRouter() | ImportSchedule():
                    table, losses = read_imported(stage, adapter.shape, run.nfe), {}
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
        log["stages"].append({**_describe(stage), "wall_s": time.perf_counter() - began, **losses})
    return artefacts, refiners, log


def _describe(stage: Trainable) -> dict:
    return {"kind": type(stage).__name__, **vars(stage)}
