"""Training what a method declares, stage by stage: scorers and what they say of steps (tcbench/training/scorers.py),
refiners (refiners.py), routers (routers.py, chains.py), gates (gates.py); and what uncached runs tell (calibration.py).

What learns neither along chains nor from uncached runs learns from pairs of neighbouring steps of the inference grid
(tcbench/training/pairs.py). The cache the later step sees is filled by the uncached forward at the earlier one
(Alg. 1). docs/reproduction-notes.md, "Training", lists the choices that the paper leaves open.
"""

from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcbench.artefacts import read_imported
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.precision import Dtype, mixed
from tcbench.samplers import SamplerSettings, make_sampler
from tcbench.sampling import Prompts, default_prompts
from tcbench.trainable import (
    CalibrateChanges,
    CalibrateMagnitudes,
    CalibrateReuse,
    CollectScores,
    ImportRouter,
    ImportSchedule,
    PairStep,
    TrainChainRouter,
    TrainGates,
    TrainRefiners,
    TrainRouter,
    TrainScorer,
    described,
)
from tcbench.training.calibration import calibrate
from tcbench.training.chains import train_on_chains
from tcbench.training.crew import ALONE, Crew
from tcbench.training.gates import train_gates
from tcbench.training.pairs import CALIBRATION_SEED, Pairs
from tcbench.training.refiners import train_refiners
from tcbench.training.routers import train_router
from tcbench.training.running import deterministic
from tcbench.training.scorers import collect_scores, train_scorer
from tcbench.training.sizes import ReuseErrors, measure_reuse
from tcbench.training.unfinished import Unfinished
from tcbench.watch.undisturbed import kept_weights

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
    dtype: Dtype = "fp32",
    checkpointed: bool = False,
    unfinished: Unfinished | None = None,
    crew: Crew = ALONE,
) -> tuple[Artefacts, dict[str, Tensor], dict]:
    """Run a method's training stages in order on a frozen model.

    Args:
        prompts: of the samples that scores are collected on, as `sample_batch` takes them.
        dtype: of products (`precision.mixed`); weights are float32.
        checkpointed: compute blocks again for the gradient, in less memory and to the same bits.
        unfinished: where the state is kept that a killed training goes on from.
        crew: who trains together. Scorers, refiners, routers and gates of pairs share their batches; all else every
            process does for itself, with the same result.

    Returns:
        The artefacts (scorers and tables in memory), tensors of the LoRA refiners (empty if none), and a JSON-able log.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    unfinished = unfinished or Unfinished()
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    sampler = make_sampler(adapter, method.sampled_steps(nfe), settings, torch.arange(0))
    artefacts = Artefacts()
    refiners: dict[str, Tensor] = {}
    log: dict[str, Any] = {"seed": seed, "nfe": nfe, "stages": []}
    run = Run(adapter.shape, sampler.timesteps, Unguided(), torch.arange(0))

    @cache
    def reuse_errors(free_blocks: int, step: PairStep) -> ReuseErrors:
        return measure_reuse(Pairs(adapter, data, sampler, CALIBRATION_SEED, step=step), free_blocks)

    relative: dict[str, ReuseErrors | None] = {}  # by scorer, if its loss was relative
    for number, stage in enumerate(method.training(run)):
        step = stage.pair_step if isinstance(stage, TrainScorer | TrainRefiners) else "solver"
        pairs = Pairs(adapter, data, sampler, seed + number, step=step, checkpointed=checkpointed, crew=crew)
        unfinished.begin(number)
        with kept_weights(method, adapter.model, *artefacts.scorers.values()), mixed(adapter.device, dtype):
            match stage:
                case TrainScorer():
                    sizes = reuse_errors(stage.free_blocks, step)
                    scorer, refiners, losses = train_scorer(stage, pairs, sizes, unfinished)
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
                    sizes = reuse_errors(adapter.shape.num_blocks - stage.blocks, step)
                    refiners, losses = train_refiners(method, stage, pairs, artefacts, sizes, unfinished, refiners)
                case TrainRouter():
                    table, losses = train_router(pairs, stage, unfinished)
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
                case TrainChainRouter():
                    shown = prompts or partial(default_prompts, adapter)
                    of = adapter, method, stage, nfe, settings, shown, seed + number
                    table, losses = train_on_chains(*of, unfinished, checkpointed)
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
                case TrainGates():
                    table, losses = train_gates(pairs, stage, unfinished)
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
                case CalibrateReuse() | CalibrateMagnitudes() | CalibrateChanges():
                    shown = prompts or partial(default_prompts, adapter)
                    table, losses = calibrate(adapter, method, stage, nfe, settings, shown), {}
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
                case ImportRouter() | ImportSchedule():
                    table, losses = read_imported(stage, adapter.shape, run.nfe), {}
                    artefacts = replace(artefacts, tables={**artefacts.tables, stage.name: table})
        log["stages"].append({**described(stage), "wall_s": unfinished.seconds, **losses})
    return artefacts, refiners, log
