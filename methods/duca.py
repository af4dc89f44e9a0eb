"""DuCa: Accelerating Diffusion Transformers with Dual Feature Caching (arXiv 2412.18911; Shenyi-Z/DuCa, for DiT).

Full steps as in ToCa, and between them two kinds in turn. A partial step holds attention and recomputes some tokens'
MLP, as ToCa does. An aggressive step runs no block: what enters the final layer is what entered it at the step before,
whatever that was, so that the step's own latents do not count at all. Within an interval the aggressive step comes
first, because the released code counts steps down. Token scores are ToCa's with a bonus of 0.8 or, as in the script
that made the published FIDs, random numbers in the place of the attention received. `tests/test_golden_rivals.py` holds
it to the released code.
"""

from functools import lru_cache
from typing import Literal

from pydantic import PositiveInt

from tcbench.method import Run
from tcbench.partial import Kind, PartialSteps, Row
from tcbench.schedule import PACES, token_counts


class DuCa(PartialSteps):
    """Full, aggressive and partial steps in turn.

    Options (defaults: the released setting for DiT and 50 DDIM steps):
        interval: N, the base distance of full steps, which a full step renews as in ToCa; it stays where fresh_ratio is
            0. Also the age that is one weight.
        schedule: how R changes over steps and blocks, as in ToCa; the code calls `ddim50` "ToCa" and `ddpm250`
            "linear-layerwise".
        score: `random` is the default of the script that makes samples for FIDs, `attention` that of the one that makes
            a picture.
        faithful: in the released code block 0 of a full step renews the distance and the blocks after it ask again
            what kind the step is; where they find it aggressive, block 0 is computed for its cache alone. False decides
            once a step.
    """

    name = "duca"
    label = "DuCa"

    interval: PositiveInt = 3
    schedule: Literal["ddim50", "ddpm250"] = "ddim50"
    faithful: bool = True

    def ratio(self, counter: int, nfe: int, block: int, num_blocks: int) -> float:
        """The share of tokens that an MLP recomputes; below 0 it means none."""
        return self.fresh_ratio * PACES[self.schedule].share(counter, nfe, block, num_blocks)

    def timetable(self, run: Run) -> tuple[Row, ...]:
        """What every step does, in sampling order."""
        return _timetable(self, run.nfe, run.shape.num_blocks, run.shape.num_tokens)


@lru_cache
def _timetable(method: DuCa, nfe: int, num_blocks: int, num_tokens: int) -> tuple[Row, ...]:
    def kind(step: int, counter: int, interval: int) -> Kind:
        if step == 0 or counter % interval == 0:
            return "full"
        return "partial" if counter % interval % 2 else "aggressive"

    rows, interval, pace = [], method.interval, PACES[method.schedule]
    for step in range(nfe):
        first, counter = interval, pace.counter(step, nfe)
        first_kind = kind(step, counter, interval)
        if first_kind == "full":
            varies = method.fresh_ratio > 0
            interval = pace.renewed_interval(method.interval, counter, nfe, varies)
        others = kind(step, counter, interval) if method.faithful else first_kind
        ratios = [method.ratio(counter, nfe, block, num_blocks) for block in range(num_blocks)]
        kinds = (first_kind, *[others] * (num_blocks - 1))
        # at the first step all blocks see the base distance
        intervals = (first, *[interval if step else first] * (num_blocks - 1))
        rows.append(Row(kinds, tuple(token_counts(ratios, num_tokens)), intervals))
    return tuple(rows)
