"""What a finished call computed and what it held, for people and programs."""

from dataclasses import dataclass
from typing import Any

from tcbench.ledger import plan_macs
from tcbench.method import Method, Run
from tcbench.plan import Plan
from tcbench.record.executed import PlanRecord

MIB = 1 << 20


@dataclass(frozen=True)
class Summary:
    """One call of a pipeline under a method; `str` says it in a few lines.

    Attributes:
        method: with its options.
        pipeline: whose call it was.
        samples: how many it made together.
        rows_per_sample: of the transformer's batch; 2 if a guided pair shares it.
        tokens: of a sample.
        plans: what was done at every step, by unit.
        macs: the ledger's totals per sample.
        macs_uncached: per sample, of the same steps computed in full.
        cache_bytes: features held at the end of the call.
        fused: whether kernels executed it.
    """

    method: Method
    pipeline: str
    samples: int
    rows_per_sample: int
    tokens: int
    plans: PlanRecord
    macs: dict[str, Any]
    macs_uncached: int
    cache_bytes: int
    fused: bool

    @property
    def steps(self) -> int:
        """How many steps the call took."""
        return len(self.plans.steps)

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps at which everything was computed, from 0."""
        return self.plans.i_steps

    @property
    def held_steps(self) -> tuple[int, ...]:
        """The steps at which something was held or forecast, from 0."""
        return tuple(step for step in range(self.steps) if step not in self.full_steps)

    @property
    def mac_ratio(self) -> float:
        """How many times fewer MACs than uncached; what the method computes for itself is charged."""
        return self.macs_uncached / self.macs["per_sample"]

    @property
    def recomputed(self) -> float:
        """The share of tokens that was computed, over all steps and the units that the method decides."""
        return float(self.plans.kept_shares(self.tokens).mean()) if self.plans.units else 1.0

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.method.model_dump(exclude_defaults=True).items())
        batch = f"{self.samples} sample{'s' * (self.samples > 1)}{', guided pairs' * (self.rows_per_sample == 2)}"
        done = f"{len(self.full_steps)} full, {len(self.held_steps)} held"
        if not self.held_steps:
            done += "; NOTHING WAS HELD: EVERY STEP WAS COMPUTED IN FULL"
        by = "fused kernels" if self.fused else "the model's own layers"
        spent, whole = (macs / 1e9 for macs in (self.macs["per_sample"], self.macs_uncached))
        return "\n".join(
            [
                f"{self.method.label}{f' ({options})' * bool(options)} on {self.pipeline}: {batch}",
                f"  steps   {self.steps}: {done}",
                f"  MACs    {spent:,.4g} G per sample, {self.mac_ratio:.2f} times fewer than {whole:,.4g} G uncached",
                f"  tokens  {self.recomputed:.1%} computed, of those in the units that the method decides",
                f"  cache   {self.cache_bytes / MIB:.2f} MiB",
                f"  run by  {by}",
            ]
        )


def uncached_macs(run: Run) -> int:
    """MACs per sample of a run that computes everything."""
    everything = plan_macs(Plan({}), run.shape) * run.nfe + run.shape.once
    return int(everything.matmul) * run.guidance.rows  # of all rows, so it is whole
