"""How much work the stages of a training are, in forward passes of the model."""

from dataclasses import dataclass
from functools import cache

from tcbench.ledger import plan_macs, predictor_macs
from tcbench.method import Method, Run
from tcbench.models.specs import MODELS, ModelSpec
from tcbench.plan import Plan
from tcbench.trainable import (
    CalibrateMagnitudes,
    CalibrateReuse,
    CollectScores,
    TrainChainRouter,
    TrainRefiners,
    TrainRouter,
    TrainScorer,
)

PASSES = {"TrainScorer": 4.0, "TrainRefiners": 3.0, "TrainRouter": 4.0}
"""Forward passes of a pair in an iteration, a backward pass through a frozen model counting as one: the earlier step,
the later one, what learns, its gradient; of refiners the steps since the last I-step, the target, and what learns."""

BATCHES, EVALUATIONS, LEAST_APART = 4, 20, 10
"""Of held-out losses (`tcbench.training.held_out`)."""

_PAIRS_PER_STEP = 2  # of reuse errors (tcbench.training.sizes)
_AUTO_BATCHES = 8  # of the measured lambda (tcbench.training.scorers)


@dataclass(frozen=True)
class TrainingWork:
    """What a stage of a training has to do.

    Attributes:
        stage: its class, by which rates are known, or "uncached runs".
        trains: what it makes, in words.
        macs: everything.
        batch: pairs of an iteration.
    """

    stage: str
    trains: str
    macs: float
    batch: int

    @property
    def passes(self) -> float:
        """Forward passes of a pair in an iteration; 0 of uncached runs, which have none."""
        return PASSES.get(self.stage, 0.0)


def forward_macs(model: str) -> int:
    """One row of the transformer's batch, everything computed."""
    return _forward_macs(MODELS[model])


@cache
def _forward_macs(spec: ModelSpec) -> int:
    """By what the model is, for a rehearsal gives its name to a small one."""
    return int(plan_macs(Plan(), spec.shape).matmul)


def parameters(model: str) -> int:
    """About how many weights the blocks of a transformer have: as many as MACs of one token and one row, attention's
    products left out. Of weights that text tokens have to themselves there is no account."""
    return sum(
        int(block.modulation.matmul)
        + sum(
            int(part.per_token.matmul + part.per_key.matmul) + part.text_macs // max(1, part.text_tokens)
            for part in block.parts
        )
        for block in MODELS[model].shape.blocks
    )


def training_work(method: Method, model: str, run: Run) -> list[TrainingWork]:
    """The stages that a method declares, every iteration of them: patience may end a training before."""
    forward, nfe = forward_macs(model), run.nfe
    guided = run.guidance.rows
    work: list[TrainingWork] = []
    reuse_measured = False

    def iterations(stage: TrainScorer | TrainRefiners) -> float:
        """Those that learn, and what held-out losses and measurements before them are worth in such ones."""
        nonlocal reuse_measured
        passes, evaluations = (
            PASSES[type(stage).__name__],
            stage.iterations // max(LEAST_APART, stage.iterations // EVALUATIONS),
        )
        count = stage.iterations + (evaluations + 2) * BATCHES * (passes - 1) / passes
        if not reuse_measured:
            count += _PAIRS_PER_STEP * (nfe - 1) * 3 / passes / stage.batch_size
        reuse_measured = True
        return count

    for stage in method.training(run):
        match stage:
            case TrainScorer():
                auto = _AUTO_BATCHES * 2 / PASSES["TrainScorer"] if stage.cost_weight == "auto" else 0
                count = iterations(stage) + auto
                pair = PASSES["TrainScorer"] * forward
                work.append(TrainingWork("TrainScorer", stage.name, count * pair * stage.batch_size, stage.batch_size))
            case TrainRefiners():
                pair = PASSES["TrainRefiners"] * forward
                amount = iterations(stage) * pair * stage.batch_size
                work.append(TrainingWork("TrainRefiners", "refiners", amount, stage.batch_size))
            case TrainRouter():
                amount = stage.iterations * PASSES["TrainRouter"] * forward * stage.batch_size
                work.append(TrainingWork("TrainRouter", stage.name, amount, stage.batch_size))
            case TrainChainRouter():  # a step is one uncached, one gated, its gradient; weighing walks whole chains
                rows = stage.batch_size * guided
                chains = stage.iterations * 3 * nfe + -(-stage.iterations // stage.refresh) * nfe * nfe
                work.append(TrainingWork("TrainRouter", stage.name, chains * forward * rows, rows))
            case CollectScores():
                scored = forward + int(predictor_macs(run.shape).matmul)
                amount = float(stage.samples * nfe * guided * scored)
                work.append(TrainingWork("uncached runs", "alpha-bar", amount, stage.samples))
            case CalibrateReuse() | CalibrateMagnitudes():
                amount = float(stage.samples * nfe * guided * forward)
                work.append(TrainingWork("uncached runs", stage.name, amount, stage.samples))
            case _:  # read from a file
                pass
    return work
