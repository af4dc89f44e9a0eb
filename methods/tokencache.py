"""TokenCache: Token Caching for Diffusion Transformer Acceleration.

Three questions, one Cache Predictor. *Which timesteps*: I-steps compute everything, P-steps use the cache (Eq. 13).
*Which blocks*: a P-step's budget of (1 - r)(L - K)N tokens goes to the blocks whose tokens score highest (Eq. 12).
*Which tokens*: within a block, each sample's highest-scoring tokens are recomputed; the others reuse the block update
last computed for them (Eq. 6). The last K blocks, the refiners, are always computed and carry LoRA weights.

Where the paper is silent or contradicts itself the reading taken is an option below, and docs/reproduction-notes.md
says why.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Run, free_blocks
from tcbench.plan import Tokens
from tcbench.schedule import Schedule
from tcbench.selector import Allocation, TokenSelector, spend
from tcbench.tensors.unseen import on_values
from tcbench.trainable import CollectScores, Loss, PairStep, Reach, RefinerReach, Trainable, TrainRefiners, TrainScorer

if TYPE_CHECKING:
    from torch import Tensor

# (tokens, NFE) -> #Full and beta of Table I; 256 tokens are DiT-XL/2 at 256x256, 1024 at 512x512.
PUBLISHED = {
    (256, 250): (50, -6e3),
    (256, 50): (12, -8e3),
    (256, 20): (9, -4e3),
    (256, 10): (6, -2e3),
    (1024, 50): (21, -4e3),
    (1024, 20): (10, -2e3),
}


class TokenCache(TokenSelector):
    """Predicted token-level caching of whole block updates.

    Options:
        num_full_steps, refiner_blocks, beta: None is the paper's value for this number of tokens and NFE, from
            Table I and Sec. IV-C; for refiner_blocks it is 2 at 250 steps, else 4.
        allocation: tokens per block from the scores of the whole batch (Eq. 12), or the same for every block.
        budget_pool: r counts over the blocks that may be cached, or over all blocks.
        guided_halves: the halves of a guided pair choose their tokens independently, or share the mean of their scores.
        cost_weight, cost_reduction, recursion: lambda, the cost term and the recursion of Eq. (9); `auto` is the lambda
            at which half of the gates close by Eq. (11), because the right one shrinks with the step gap.
        loss: whether errors of different steps are added up as they are (`raw`, Eq. 9 as printed), or each in units of
            what reusing everything costs at its step (`relative`). `auto` is `raw` where the largest of these costs is
            at most a thousand times the smallest. lambda is on the scale of the raw loss either way.
        predictor_reach: the predictor's caches are one step old in training (Alg. 1), or 1 to NFE / #Full steps.
        refiner_reach: refiners are trained one step after a full one, or at the P-steps of the method's own schedule,
            with the caches and the drift that sampling has there, or at its I-steps as well: merged, they are there.
        pair_step: x at the later step of a training pair is the sampler's own step from the earlier one, or drawn from
            the posterior (Alg. 1, line 7, with its noise).
        patience: training ends when the held-out loss fell by less than 1 % over so many of its evaluations, of which
            there are up to 20; None takes all iterations, as the paper.
        predictor_*, refiner_*: training; the paper's values are 40 000 steps at 1e-5, then LoRA at 1e-4.
        joint_refiners: LoRA learns with the predictor already (Sec. III-C) and goes on when that is frozen
            ("continued", Sec. IV-B), or begins then.
        refiner_rank: rank of LoRA; 0 leaves the refiners as they are.
        training_batch_size: pairs of neighbouring steps per iteration.
        alpha_samples: samples that alpha-bar is averaged over; the paper's batch is 256.
    """

    name = "tokencache"
    label = "TokenCache"
    trains = True
    predicts = True

    refiner_blocks: NonNegativeInt | None = None  # type: ignore[assignment]  # wider: only `free_blocks` reads it
    schedule: Schedule = "adaptive"
    beta: float | None = None  # type: ignore[assignment]  # wider: only `smoothing` reads it
    allocation: Allocation = "batch"
    budget_pool: Literal["free", "all"] = "free"
    guided_halves: Literal["independent", "shared"] = "independent"

    cost_weight: PositiveFloat | Literal["auto"] = 1e-4
    cost_reduction: Literal["sum", "mean"] = "sum"
    recursion: Literal["propagated", "literal"] = "propagated"
    loss: Loss = "auto"
    predictor_reach: Reach = "one"
    refiner_reach: RefinerReach = "every"
    pair_step: PairStep = "solver"
    patience: PositiveInt | None = 5
    predictor_iterations: PositiveInt = 40_000
    predictor_learning_rate: float = Field(1e-5, gt=0, le=1)
    refiner_rank: int = Field(16, ge=0, le=1024)
    joint_refiners: bool = False
    refiner_iterations: PositiveInt = 40_000
    refiner_learning_rate: float = Field(1e-4, gt=0, le=1)
    training_batch_size: int = Field(64, ge=1, le=4096)
    alpha_samples: PositiveInt = 256

    def full_count(self, run: Run) -> int:
        """#Full: the row's own, or the paper's."""
        return len(self.full_steps or ()) or self.num_full_steps or self._published(run)[0]

    def smoothing(self, run: Run) -> float:
        """beta: the row's own, or the paper's."""
        return self._published(run)[1] if self.beta is None else self.beta

    @staticmethod
    def _published(run: Run) -> tuple[int, float]:
        """#Full and beta of Table I."""
        if published := PUBLISHED.get((run.shape.num_tokens, run.nfe)):
            return published
        raise UserError(
            f"tokencache: the paper names no num_full_steps and beta for {run.shape.num_tokens} tokens and "
            f"{run.nfe} steps; set both"
        )

    def refiners(self, run: Run) -> int:
        """K: the row's own, or the paper's."""
        return self.refiner_blocks if self.refiner_blocks is not None else 2 if run.nfe == 250 else 4

    def free_blocks(self, run: Run) -> int:
        """L - K: the blocks that may be cached."""
        return free_blocks(run.shape, self.refiners(run))

    def implied(self, run: Run) -> dict[str, Any]:
        """The paper's values, where the row leaves them to it and they choose anything."""
        by_beta = self.schedule != "even" and not self.full_steps
        beta = {"beta": self.smoothing(run)} if by_beta else {}
        return super().implied(run) | {"refiner_blocks": self.refiners(run)} | beta

    def choose(self, look: Look) -> list[Tokens]:
        """The tokens that the predictor scores highest."""
        shape, free = look.run.shape, self.free_blocks(look.run)
        alpha_RLN = look.scores("predictor")[:, :free]
        if self.guided_halves == "shared" and look.run.rows_per_sample == 2:
            alpha_RLN = on_values(_mean_of_halves, alpha_RLN, shape=alpha_RLN.shape)
        pool = free if self.budget_pool == "free" else shape.num_blocks
        budget = min(round((1 - self.cache_ratio) * pool * shape.num_tokens), free * shape.num_tokens)
        return spend(alpha_RLN, budget, self.allocation)

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """The predictor first; then, with it frozen, the refiners on hard masks (Sec. IV-B)."""
        free, batch = self.free_blocks(run), self.training_batch_size
        predictor = TrainScorer(
            name="predictor",
            free_blocks=free,
            cost_weight=self.cost_weight,
            iterations=self.predictor_iterations,
            batch_size=batch,
            learning_rate=self.predictor_learning_rate,
            cost_reduction=self.cost_reduction,
            recursion=self.recursion,
            loss=self.loss,
            longest_gap=round(run.nfe / self.full_count(run)) if self.predictor_reach == "gaps" else 1,
            patience=self.patience,
            pair_step=self.pair_step,
            joint_rank=self.refiner_rank if self.joint_refiners and free < run.shape.num_blocks else 0,
            joint_learning_rate=self.refiner_learning_rate,
        )
        read = None if self.full_steps or self.schedule == "even" else self.smoothing(run)
        stages: tuple[Trainable, ...] = (predictor, CollectScores("predictor", free, self.alpha_samples, read))
        if self.refiner_rank and free < run.shape.num_blocks:
            stages += (
                TrainRefiners(
                    blocks=run.shape.num_blocks - free,
                    rank=self.refiner_rank,
                    iterations=self.refiner_iterations,
                    batch_size=batch,
                    learning_rate=self.refiner_learning_rate,
                    loss=self.loss,
                    reach=self.refiner_reach,
                    patience=self.patience,
                    pair_step=self.pair_step,
                ),
            )
        return stages

    def macs_depend_on(self, artefacts: Artefacts) -> str | None:
        """The batch's scores, where they share out the tokens."""
        if self.allocation == "uniform":
            return None
        saved = "a block given no token skips its modulation"
        if self.keys == "fresh":
            saved += ", and attention among a block's tokens is quadratic in their number"
        elif self.keys == "recomputed":
            saved += " and its keys and values"
        return f"the batch's scores share out the tokens over blocks: {saved}"


def _mean_of_halves(alpha_RLN: "Tensor") -> "Tensor":
    return alpha_RLN.unflatten(0, (2, -1)).mean(0).repeat(2, 1, 1)
