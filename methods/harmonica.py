"""HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in DiT Acceleration (arXiv 2410.01723).

A learned table says, for every step and branch, whether the branch is computed or its last computed output is reused,
through the current step's gate. It has Learning-to-Cache's form with a row for every step instead of every second one.
"""

from pydantic import Field, PositiveFloat, PositiveInt

from tcbench.method import Run
from tcbench.routed import Routed
from tcbench.trainable import Trainable, TrainChainRouter


class HarmoniCa(Routed):
    """Ask the router at every step but the first. The published threshold is 0.1.

    Options:
        cost_weight: the price of an open gate in the loss; 7e-8 is published for 10 steps.
        learning_rate, iterations, batch_size: training; published are 2000 chains of 32 samples at 0.01.
        refresh: after so many chains the steps' weights are measured anew, which takes as many chains as there are
            steps; 50 is published.
        stored_above: the threshold in training, above which a branch's stored value is replaced; 0.1 is published.
    """

    name = "harmonica"
    label = "HarmoniCa"

    cost_weight: PositiveFloat = 7e-8
    learning_rate: float = Field(1e-2, gt=0, le=10)
    iterations: PositiveInt = 2000
    batch_size: PositiveInt = 32
    refresh: PositiveInt = 50
    stored_above: float = Field(0.1, ge=0, le=1)

    def is_routed(self, run: Run, step: int) -> bool:
        """Every step has a row."""
        return True

    def own_training(self) -> Trainable:
        """Along whole chains."""
        return TrainChainRouter(
            name="router",
            cost_weight=self.cost_weight,
            threshold=self.stored_above,
            iterations=self.iterations,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            refresh=self.refresh,
        )
