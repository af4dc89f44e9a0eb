"""Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching (arXiv 2406.01733).

Steps are paired from the end of sampling. The first of a pair computes everything; the second recomputes the branches
that a learned router opens and reuses the others' outputs of the step before, through the current step's gates. The
router is a table of logits, one row for each second step: it does not look at the input, and it belongs to one NFE.
"""

from pydantic import Field, PositiveFloat, PositiveInt

from tcbench.method import Run
from tcbench.routed import Routed
from tcbench.trainable import Trainable, TrainRouter


class LearningToCache(Routed):
    """Ask the router at every second step; the floor is near half of the uncached MACs, and FORA with interval 2.

    The published threshold is 0.1, and 0.9 for 512x512 at 50 steps.

    Options:
        cost_weight: lambda, the price of an open gate in the loss; 5e-6 is published for 20 steps, 1e-6 for 50 and 10.
        learning_rate, iterations, batch_size: training; the released routers took 20 000 iterations (40 000 at 50
            steps) at 1e-3 with 64 images.
        straight_through: train with gates that are hard at this threshold; None, the published way, keeps them soft.
    """

    name = "learning_to_cache"
    label = "Learning-to-Cache"

    cost_weight: PositiveFloat = 5e-6
    learning_rate: float = Field(1e-3, gt=0, le=10)
    iterations: PositiveInt = 20_000
    batch_size: int = Field(64, ge=1, le=4096)
    straight_through: float | None = Field(None, ge=0, le=1)

    def is_routed(self, run: Run, step: int) -> bool:
        """The second steps of the pairs."""
        return (run.nfe - 1 - step) % 2 == 0

    def own_training(self) -> Trainable:
        """On pairs of neighbouring steps."""
        return TrainRouter(
            name="router",
            cost_weight=self.cost_weight,
            iterations=self.iterations,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            straight_through=self.straight_through,
        )
