"""Recompute no token: the control that shows what the recomputed tokens of a P-step are worth.

The same cache, I-steps and refiners as TokenCache, but on a P-step every block update is reused for all tokens and only
the refiners run. It is cheaper than any token selection with the same I-steps, which therefore has to beat it.
"""

from pydantic import NonNegativeInt, PositiveInt

from tcbench.method import Look, Method, Run, free_blocks
from tcbench.plan import ALL, NONE, Block, Plan, every_unit
from tcbench.schedule import Schedule, full_steps


class NoTokens(Method):
    """Hold whole block updates between I-steps.

    Options:
        num_full_steps, refiner_blocks, schedule, beta: as in `methods/tokencache.py`. The adaptive schedule needs the
            artefacts of a trained TokenCache row (`artefacts_from` in the config).
    """

    name = "no_tokens"
    label = "no tokens"
    decides = "ahead"
    knob = "num_full_steps"

    num_full_steps: PositiveInt = 12
    refiner_blocks: NonNegativeInt = 4
    schedule: Schedule = "even"
    beta: float = -8000.0

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which everything is computed."""
        return full_steps(run, self.num_full_steps, self.schedule, self.beta)

    def plan(self, look: Look) -> Plan:
        """Block updates of all but the refiners: computed and stored, or held."""
        free = range(free_blocks(look.run.shape, self.refiner_blocks))
        return every_unit([Block(block) for block in free], ALL if look.step in self.i_steps(look.run) else NONE)
