"""The vocabulary of caching: a plan says where, who and how for one sampling step, and is plain data.

| part      | values                                                             | meaning                        |
|-----------|--------------------------------------------------------------------|--------------------------------|
| **where** | `Site(block, part)`, `Block(block)`, `Span(start, stop)`, `Output()` | the quantity that is cached  |
| **who**   | `ALL`, `NONE`, `Tokens(index)`, `Rows(mask)`, `Deferred(choose, like)` | what is recomputed of it   |
|           | `Merged(index, group)`                                             | what is computed of groups     |
| **how**   | `Hold()`, `Forecast(order)`, `Mix(weights)`, and a `Spread(group)` | what stands in for what is not |

A `Plan` maps units to decisions. A block that no unit covers is computed in full and nothing of it is stored, so the
empty plan is the plain model. A unit decided `ALL` is computed in full *and* stored, which is an I-step. A plan may
also have blocks computed beside what it decides, as a check of it (`Plan.checks`). Plans can be printed (`str`), stored
(`Plan.executed`) and costed (`tcbench.ledger.plan_macs`) without a model.

Shape letters: R rows of the transformer's batch (2n under classifier-free guidance, [cond; uncond]), L blocks,
N tokens, K recomputed tokens, D width.
"""

from tcbench.plan.decisions import Decision, Keys, Observe, Plan, every_unit
from tcbench.plan.fill import HOLD, Fill, Forecast, Hold, Mix, Of, Spread
from tcbench.plan.refusal import PlanError, described
from tcbench.plan.where import Block, Output, Site, Span, Unit
from tcbench.plan.who import ALL, NONE, All, Deferred, Merged, Nothing, Rows, Settled, Tokens, Who

__all__ = [
    "ALL",
    "HOLD",
    "NONE",
    "All",
    "Block",
    "Decision",
    "Deferred",
    "Fill",
    "Forecast",
    "Hold",
    "Keys",
    "Merged",
    "Mix",
    "Nothing",
    "Observe",
    "Of",
    "Output",
    "Plan",
    "PlanError",
    "Rows",
    "Settled",
    "Site",
    "Span",
    "Spread",
    "Tokens",
    "Unit",
    "Who",
    "described",
    "every_unit",
]
