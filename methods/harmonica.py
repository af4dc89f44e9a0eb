"""HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in DiT Acceleration (arXiv 2410.01723).

A learned table says, for every step and branch, whether the branch is computed or its last computed output is reused,
through the current step's gate. It has Learning-to-Cache's form with a row for every step instead of every second one.
"""

from pydantic import Field, PositiveFloat, PositiveInt

from tcbench.method import Artefacts, Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Plan, Site
from tcbench.schedule import opened
from tcbench.trainable import ImportRouter, Trainable, TrainChainRouter


class HarmoniCa(Method):
    """Reuse, at every step but the first, the branch outputs that a trained router closes.

    Without a router every branch is reused from the second step on: the method's floor.

    Options:
        threshold: a branch is computed if sigmoid(logit) is above it; 0.1 is published.
        router: a checkpoint in the format of Learning-to-Cache's, whose rows count from the last step, instead of
            training.
        cost_weight: the price of an open gate in the loss; 7e-8 is published for 10 steps.
        learning_rate, iterations, batch_size: training; published are 2000 chains of 32 samples at 0.01.
        refresh: after so many chains the steps' weights are measured anew, which takes as many chains as there are
            steps; 50 is published.
        stored_above: the threshold in training, above which a branch's stored value is replaced; 0.1 is published. The
            other one can be changed without training again.
    """

    name = "harmonica"
    label = "HarmoniCa"
    decides = "ahead"
    knob = "threshold"
    trains = True

    threshold: float = Field(0.1, ge=0, le=1)
    router: str | None = None
    cost_weight: PositiveFloat = 7e-8
    learning_rate: float = Field(1e-2, gt=0, le=10)
    iterations: PositiveInt = 2000
    batch_size: PositiveInt = 32
    refresh: PositiveInt = 50
    stored_above: float = Field(0.1, ge=0, le=1)

    def recomputed(self, run: Run, step: int) -> dict[Site, bool]:
        """Whether each branch is computed at a step."""
        router = opened(run, run.nfe - 1 - step, self.threshold)
        return router if step and router else dict.fromkeys(run.shape.sites, step == 0)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """The first step, and those whose row opens everything."""
        return tuple(step for step in range(run.nfe) if all(self.recomputed(run, step).values()))

    def plan(self, look: Look) -> Plan:
        """Every branch: computed and stored, or held."""
        recomputed = self.recomputed(look.run, look.step)
        return Plan({site: Decision(ALL if computed else NONE) for site, computed in recomputed.items()})

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """The router."""
        if self.router:
            return (ImportRouter("router", self.router),)
        return (
            TrainChainRouter(
                name="router",
                cost_weight=self.cost_weight,
                threshold=self.stored_above,
                iterations=self.iterations,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                refresh=self.refresh,
            ),
        )

    def files(self) -> tuple[str, ...]:
        """The router, if it is imported."""
        return (self.router,) if self.router else ()

    def macs_depend_on(self, artefacts: Artefacts) -> str | None:
        """The router, unless it is there or to be imported."""
        if self.router or "router" in artefacts.tables:
            return None
        return "a trained router opens branches; without one this is the method's floor"
