"""Recompute no token: the control that shows what the recomputed tokens of a P-step are worth.

The same cache, I-steps and refiners as TokenCache, but on a P-step every block update is reused for all tokens and only
the refiners run. It is cheaper than any token selection with the same I-steps, which therefore has to beat it.
"""

from tcbench.method import Look
from tcbench.plan import ALL, NONE, Plan, every_unit
from tcbench.selector import BlockUpdates


class NoTokens(BlockUpdates):
    """Hold whole block updates between I-steps."""

    name = "no_tokens"
    label = "no tokens"
    decides = "ahead"

    def plan(self, look: Look) -> Plan:
        """Block updates of all but the refiners: computed and stored, or held."""
        return every_unit(self.units(look.run), ALL if look.step in self.i_steps(look.run) else NONE)
