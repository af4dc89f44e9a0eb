"""Random token selection: the control that any token score must beat (Table VI, "Random").

The same cache, the same I-steps and the same share of recomputed tokens as TokenCache, but the tokens are drawn anew,
uniformly, for every sample, block and P-step. It needs no predictor, so at equal r it is cheaper than TokenCache.
"""

from tcbench.choose import top_tokens_by_block
from tcbench.method import Look
from tcbench.plan import Tokens
from tcbench.selector import TokenSelector


class RandomTokens(TokenSelector):
    """Recompute random tokens of every block update."""

    name = "random_tokens"
    label = "random tokens"

    def choose(self, look: Look) -> list[Tokens]:
        """The tokens with the highest random numbers, equally many in every block."""
        free = self.free_blocks(look.run)
        return top_tokens_by_block(look.uniform()[:, :free], [self.kept(look.run)] * free)
