"""Routed methods: a learned table of logits says, for every step and branch, whether the branch is computed or held.

Learning-to-Cache and HarmoniCa differ in the steps that have a row of it, and in how it is trained. A method is a
subclass of `Routed` with `is_routed` and `own_training`.
"""

from pydantic import Field

from tcbench.method import Artefacts, Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Plan, Site
from tcbench.schedule import opened
from tcbench.trainable import ImportRouter, Trainable


class Routed(Method):
    """Reuse the branch outputs that a trained router closes, through the current step's gates.

    Without a router (nothing trained or imported: `tcbench macs`) every branch is reused at routed steps: the method's
    floor.

    Options:
        threshold: a branch is computed if sigmoid(logit) is above it. It can be changed without training again
            (`artefacts_from` in the config).
        router: a checkpoint in the format of Learning-to-Cache's released ones, whose rows count from the last step,
            instead of training.
    """

    decides = "ahead"
    knob = "threshold"
    trains = True

    threshold: float = Field(0.1, ge=0, le=1)
    router: str | None = Field(None, min_length=1)

    def is_routed(self, run: Run, step: int) -> bool:
        """Whether the router has a say at a step; the others compute everything. The first step is never asked."""
        raise TypeError(f"methods/{self.name}.py does not define is_routed(run, step)")

    def own_training(self) -> Trainable:
        """How the router is trained."""
        raise TypeError(f"methods/{self.name}.py does not define own_training()")

    def recomputed(self, run: Run, step: int) -> dict[Site, bool]:
        """Whether each branch is computed at a step.

        Raises:
            UserError: the router was made for another model or number of steps.
        """
        if step == 0 or not self.is_routed(run, step):
            return dict.fromkeys(run.shape.sites, True)
        return opened(run, run.nfe - 1 - step, self.threshold) or dict.fromkeys(run.shape.sites, False)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """The steps without a router, and those at which it opens everything."""
        return tuple(step for step in range(run.nfe) if all(self.recomputed(run, step).values()))

    def plan(self, look: Look) -> Plan:
        """Every branch: computed and stored, or held."""
        recomputed = self.recomputed(look.run, look.step)
        return Plan({site: Decision(ALL if computed else NONE) for site, computed in recomputed.items()})

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """The router."""
        return (ImportRouter("router", self.router) if self.router else self.own_training(),)

    def files(self) -> tuple[str, ...]:
        """The router, if it is imported."""
        return (self.router,) if self.router else ()

    def lacks(self, artefacts: Artefacts) -> str | None:
        """The router, unless it is there or to be imported."""
        if self.router or "router" in artefacts.tables:
            return None
        return f"a router: a row of {self.name} trains one or imports it"
