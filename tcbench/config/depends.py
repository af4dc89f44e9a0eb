"""Which part of a config each stage's results depend on: whole groups of the suite, and a part of the row.

Nothing below a group is listed, so a new field counts from the day it is added. What a stage reads besides (weights,
other stages' files, code) reaches it by content: `tcbench.record`, the inputs of the workflow's rules.
"""

from dataclasses import dataclass

from tcbench.config.fields import Row, SampledRow, Strict, TrainedRow


@dataclass(frozen=True)
class Depends:
    """What a stage depends on.

    Attributes:
        groups: fields of `tcbench.config.suite.Suite`.
        row: the part of a row; None, if it looks at no row.
    """

    groups: frozenset[str]
    row: type[Strict] | None = None

    def __or__(self, groups: set[str]) -> "Depends":
        return Depends(self.groups | groups, self.row)


_TRAINED = Depends(frozenset({"model", "data", "sampler", "training"}), TrainedRow)
_SAMPLED = Depends(frozenset({"model", "data", "sampler", "samples"}), SampledRow)
_SEARCHED = Depends(frozenset({"model", "data", "sampler", "training", "search"}), SampledRow)
_SCORED = Depends(_SAMPLED.groups | {"scoring"}, Row)

STAGES: dict[str, Depends] = {
    "encode": Depends(frozenset({"model", "training"})),
    "train": _TRAINED,
    "search": _SEARCHED,
    "diagnose": _TRAINED | {"diagnostics"},
    "sample": _SAMPLED,
    "latency": _SAMPLED | {"latency"},
    "vbench": Depends(frozenset({"model", "samples", "vbench"})),
    "score": _SCORED,
    "ablate": _SCORED,
    "rivals": _SCORED | {"rivals"},
}
"""By name, as in `tcbench.record.sources`; what is rendered depends on the whole config."""
