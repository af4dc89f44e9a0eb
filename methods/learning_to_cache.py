"""Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching (arXiv 2406.01733).

Steps are paired from the end of sampling. The first of a pair computes everything; the second recomputes the branches
that a learned router opens and reuses the others' outputs of the step before, through the current step's gates. The
router is a table of logits, one row for each second step: it does not look at the input, and it belongs to one NFE.
"""

from pydantic import Field, PositiveFloat, PositiveInt

from tcbench.method import Artefacts, Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Plan, Site
from tcbench.schedule import opened
from tcbench.trainable import ImportRouter, Trainable, TrainRouter


class LearningToCache(Method):
    """Reuse, at every second step, the branch outputs that a trained router closes.

    Without a router (nothing trained or imported: `tcbench macs`) every branch is reused at second steps. That is the
    method's floor, near half of the uncached MACs, and FORA with interval 2.

    Options:
        threshold: a branch is recomputed if sigmoid(logit) is above it. The published value is 0.1, and 0.9 for
            512x512 at 50 steps. It can be changed without training again (`artefacts_from` in the config).
        router: a checkpoint in the format of the released ones, instead of training.
        cost_weight: lambda, the price of an open gate in the loss; 5e-6 is published for 20 steps, 1e-6 for 50 and 10.
        learning_rate, iterations, batch_size: training; the released routers took 20 000 iterations (40 000 at 50
            steps) at 1e-3 with 64 images.
        straight_through: train with gates that are hard at this threshold; None, the published way, keeps them soft.
    """

    name = "learning_to_cache"
    label = "Learning-to-Cache"
    decides = "ahead"
    knob = "threshold"
    trains = True

    threshold: float = Field(0.1, ge=0, le=1)
    router: str | None = Field(None, min_length=1)
    cost_weight: PositiveFloat = 5e-6
    learning_rate: float = Field(1e-3, gt=0, le=10)
    iterations: PositiveInt = 20_000
    batch_size: int = Field(64, ge=1, le=4096)
    straight_through: float | None = Field(None, ge=0, le=1)

    def recomputed(self, run: Run, step: int) -> dict[Site, bool]:
        """Whether each branch is computed at a step.

        Raises:
            UserError: the router was made for another model or number of steps.
        """
        sites = run.shape.sites
        from_the_end = run.nfe - 1 - step
        if step == 0 or from_the_end % 2:
            return dict.fromkeys(sites, True)
        return opened(run, from_the_end, self.threshold) or dict.fromkeys(sites, False)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """The first steps of the pairs, and second steps whose router opens everything."""
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
            TrainRouter(
                name="router",
                cost_weight=self.cost_weight,
                iterations=self.iterations,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                straight_through=self.straight_through,
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
