"""What a method may ask to be trained before it samples; `tcbench.training` does it, `Method.training` declares it."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Loss = Literal["auto", "raw", "relative"]
"""How errors of different steps are added up: as they are (Eq. 9 as printed); each in units of what reusing everything
costs at its step; or the second where these costs span more than `tcbench.training.sizes.LARGEST_SPAN`, else the first.
"""


PairStep = Literal["solver", "posterior"]
"""How the later x of a pair follows from the earlier one: by the sampler's own step, or drawn from the posterior at the
predicted x0 (Alg. 1, line 7, with its noise), which ancestral samplers do anyway."""

Reach = Literal["one", "gaps"]
RefinerReach = Literal["one", "gaps", "every"]
"""How far from an I-step a P-step lies in training: always one step, or as far as in sampling."""


@dataclass(frozen=True)
class TrainScorer:
    """Declare a scorer trained with soft gates (Eq. 9) on pairs of neighbouring steps of the sampler's grid.

    Attributes:
        name: the scorer's name in `Artefacts.scorers`.
        free_blocks: gates act on blocks 0..free_blocks-1; the rest is always computed and costs nothing.
        cost_weight: lambda of Eq. (9); `auto` takes the one at which Eq. (11) closes half of the gates.
        cost_reduction: the cost loss sums the gates of a sample, or averages them.
        recursion: x-hat^l starts from x-hat^{l-1} (`propagated`, Eq. 6) or the uncached x^{l-1} (`literal`, Alg. 1).
        loss: how the errors of different steps are added up.
        longest_gap: the cache is 1 to this many steps old, drawn anew for every batch.
        patience: training ends when the held-out loss has stopped falling for so many evaluations (of which there are
            up to 20), and keeps the best weights; None takes all iterations and keeps the last weights.
        pair_step: how the later x of a pair follows from the earlier one.
        joint_rank, joint_learning_rate: of LoRA on the blocks behind the free ones that learns with the scorer; none if
            the rank is 0. A `TrainRefiners` that follows goes on from there.
    """

    name: str
    free_blocks: int
    cost_weight: float | Literal["auto"]
    iterations: int
    batch_size: int
    learning_rate: float
    cost_reduction: Literal["sum", "mean"] = "sum"
    recursion: Literal["propagated", "literal"] = "propagated"
    loss: Loss = "raw"
    longest_gap: int = 1
    patience: int | None = None
    pair_step: PairStep = "solver"
    joint_rank: int = 0
    joint_learning_rate: float = 0.0


@dataclass(frozen=True)
class TrainRefiners:
    """Declare LoRA on the last blocks, trained on the method's own hard P-step plans, everything else frozen.

    Attributes:
        blocks: how many of the last blocks (K).
        rank: of every LoRA update.
        loss, patience, pair_step: as in `TrainScorer`.
        reach: P-steps are trained one step after a full one (`one`), or where the method's schedule has them (`gaps`),
            after the P-steps that lead there from the last I-step; or these and the I-steps (`every`), at which LoRA
            that is merged there, too, is to change nothing.
    """

    blocks: int
    rank: int
    iterations: int
    batch_size: int
    learning_rate: float
    loss: Loss = "raw"
    patience: int | None = None
    reach: RefinerReach = "one"
    pair_step: PairStep = "solver"


@dataclass(frozen=True)
class CollectScores:
    """Declare that alpha-bar, the scorer's mean score per step, is collected on uncached trajectories (Sec. III-D).

    Attributes:
        name: the scorer.
        free_blocks: blocks that take part in the mean.
        samples: the paper collects a batch of 256.
        beta: Eq. (13)'s smoothing, if the method's schedule reads alpha-bar; a flat one is then refused. What is made
            does not depend on it, so that rows of other schedules may share it.
    """

    name: str
    free_blocks: int
    samples: int
    beta: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TrainRouter:
    """Declare a table of logits [S, branches * L], one row for every second step, trained with soft gates on branches.

    Rows are numbered as the reference numbers steps: from the last sampled step (0) to the first (S - 1). Column
    order is block by block, in the order of the model's branches (Learning-to-Cache, arXiv 2406.01733).

    Attributes:
        name: the table's name in `Artefacts.tables`.
        cost_weight: lambda, the price of an open gate.
        straight_through: gates act hard at this threshold and learn as if they were soft; None keeps them soft.
    """

    name: str
    cost_weight: float
    iterations: int
    batch_size: int
    learning_rate: float
    straight_through: float | None = None


@dataclass(frozen=True)
class TrainChainRouter:
    """Declare a table of logits like `TrainRouter`'s with a row for every step, trained along whole sampling chains
    from noise (HarmoniCa, arXiv 2410.01723).

    Attributes:
        name: the table's name in `Artefacts.tables`.
        cost_weight: beta, the price of an open gate.
        threshold: a branch's stored value is replaced where its gate is above it.
        iterations: chains.
        batch_size: samples of a chain.
        refresh: after so many chains the steps' weights are measured anew.
    """

    name: str
    cost_weight: float
    threshold: float
    iterations: int
    batch_size: int
    learning_rate: float
    refresh: int


@dataclass(frozen=True)
class TrainGates:
    """Declare linear gates on what parts are given, trained with soft decisions on pairs of steps (LazyDiT, arXiv
    2412.12444).

    The table has a line of weights for every step, counted from the last one, and in it for every part that mixes
    tokens or is pointwise, in the order they run. Only every second step's are trained, as `TrainRouter`'s rows are;
    the others stay 0.

    Attributes:
        name: the table's name in `Artefacts.tables`.
        mix_cost_weight, pointwise_cost_weight: the price of an open gate of an attention, and of an MLP.
    """

    name: str
    mix_cost_weight: float
    pointwise_cost_weight: float
    iterations: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class ImportRouter:
    """Declare a table of `TrainRouter`'s form that is read from a file in the reference's format instead.

    Attributes:
        name: the table's name in `Artefacts.tables`.
        path: the file.
    """

    name: str
    path: str


@dataclass(frozen=True)
class CalibrateReuse:
    """Declare curves of what reusing a component's outputs costs, from uncached runs (SmoothCache, arXiv 2411.10510).

    The table has a row for each part of a block and lag, parts in a block's order: the relative error of the part's
    output at step i beside the one at i + lag, mean over blocks, NaN where there is no such step.

    Attributes:
        name: the table's name in `Artefacts.tables`.
        lookahead: the largest lag.
        samples: how many are run.
    """

    name: str
    lookahead: int
    samples: int


@dataclass(frozen=True)
class CalibrateMagnitudes:
    """Declare ratios of the stack's residual from step to step, from uncached runs (MagCache, arXiv 2506.09045).

    The table has one row: at step i the mean over tokens of |R_i| / |R_(i-1)|, 1 at the first.

    Attributes:
        name: the table's name in `Artefacts.tables`.
        samples: how many are run.
    """

    name: str
    samples: int


@dataclass(frozen=True)
class CalibrateChanges:
    """Declare how far input and output of the blocks move from step to step, from uncached runs (TeaCache, arXiv
    2411.19108).

    The table has a row for every sample, and then as many more: the relative L1 change of the first block's modulated
    input since the step before, and that of the last block's output; NaN at the first step. Under guidance in two
    passes each pass has rows of its own.

    Attributes:
        name: the table's name in `Artefacts.tables`.
        samples: how many are run.
    """

    name: str
    samples: int


@dataclass(frozen=True)
class ImportSchedule:
    """Declare a table of zeros and ones, a row for each step and a column for each branch, read from a file.

    Attributes:
        name: the table's name in `Artefacts.tables`.
        path: the file, in SmoothCache's shipped format.
    """

    name: str
    path: str


Imported = ImportRouter | ImportSchedule
"""What is read from a file as it is, without a model."""

Trainable = (
    TrainScorer
    | CollectScores
    | TrainRefiners
    | TrainRouter
    | TrainChainRouter
    | TrainGates
    | CalibrateReuse
    | CalibrateMagnitudes
    | CalibrateChanges
    | ImportRouter
    | ImportSchedule
)


def described(stage: Trainable) -> dict[str, Any]:
    """What was declared of a stage, for the record of its training; without what changes nothing that is made."""
    return {
        "kind": type(stage).__name__,
        **{field.name: getattr(stage, field.name) for field in fields(stage) if field.compare},
    }
