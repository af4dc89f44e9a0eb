"""Random token selection: the control that any token score must beat (Table VI, "Random").

The same cache, the same I-steps and the same share of recomputed tokens as TokenCache, but the tokens are drawn anew,
uniformly, for every sample, block and P-step. It needs no predictor, so at equal r it is cheaper than TokenCache.
"""

from pydantic import Field, NonNegativeInt, PositiveInt

from tcbench.choose import top_tokens_by_block
from tcbench.method import Look, Method, Run, free_blocks
from tcbench.plan import ALL, Block, Decision, Keys, Plan, every_unit
from tcbench.schedule import Schedule, full_steps


class RandomTokens(Method):
    """Recompute random tokens of every block update.

    Options:
        num_full_steps, cache_ratio, refiner_blocks, schedule, beta, keys: as in `methods/tokencache.py`. The adaptive
            schedule needs the artefacts of a trained TokenCache row (`artefacts_from` in the config).
    """

    name = "random_tokens"
    label = "random tokens"
    knob = "num_full_steps"

    num_full_steps: PositiveInt = 12
    cache_ratio: float = Field(0.9, ge=0, le=1)
    refiner_blocks: NonNegativeInt = 4
    schedule: Schedule = "even"
    beta: float = -8000.0
    keys: Keys = "cached"

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which everything is computed."""
        return full_steps(run, self.num_full_steps, self.schedule, self.beta)

    def plan(self, look: Look) -> Plan:
        """Everything on I-steps; on P-steps the same number of random tokens in every block that may be cached."""
        shape = look.run.shape
        free = range(free_blocks(shape, self.refiner_blocks))
        if look.step in self.i_steps(look.run):
            return every_unit([Block(block) for block in free], ALL, keys=self.keys)
        count = round((1 - self.cache_ratio) * shape.num_tokens)
        chosen = top_tokens_by_block(look.uniform()[:, : len(free)], [count] * len(free))
        return Plan({Block(block): Decision(chosen[block], keys=self.keys) for block in free})
