"""LazyDiT: Lazy Learning for the Acceleration of Diffusion Transformers (AAAI 2025; shawnricecake/lazydit).

Before self-attention and MLP of every block a gate, one linear layer a step, looks at the part's modulated input.
Summed over the tokens it is a logit for each row of the batch: a row whose sigmoid reaches a threshold is computed,
the others take their own stored output, through the current step's gates of adaLN. So samples, and the halves of a
guided pair, decide apart. The first step computes everything. The host reads the rows at every part, because what is
computed depends on them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Method, Run, Table
from tcbench.plan import ALL, NONE, Decision, Deferred, Plan, Rows, Site, Unit
from tcbench.trainable import Trainable, TrainGates

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LazyDiT(Method):
    """Recompute, at every part, the rows of the batch that a trained gate opens.

    The gates are the table `gates` of a run's artefacts: a line of weights for every step, counted from the last one,
    and in it for every part that mixes tokens or is an MLP, in the order they run. Training begins with weights of 0,
    and so does a run without a table: every sigmoid is 0.5, and at the published threshold everything is computed.
    Every second step's gates stay there, because in training reuse follows a step that computes everything.

    Options:
        threshold: a row is computed if its sigmoid is not below; 0.5 is published.
        mlp_threshold: that of the MLPs, if it is another.
        cost_weight: the price of an attention's open gate in the loss; 1e-7 is what the released script trains with.
        mlp_cost_weight: that of an MLP's, if it is another.
        learning_rate, iterations, batch_size: training; published are 500 batches, of 8 times 64 samples in the
            released script, at 1e-4.
    """

    name = "lazydit"
    label = "LazyDiT"
    knob = "threshold"
    decides = "host"
    trains = True

    threshold: float = Field(0.5, ge=0, le=1)
    mlp_threshold: float | None = Field(None, ge=0, le=1)
    cost_weight: float = Field(1e-7, ge=0, le=100)
    mlp_cost_weight: float | None = Field(None, ge=0, le=100)
    learning_rate: float = Field(1e-4, gt=0, le=10)
    iterations: PositiveInt = 500
    batch_size: int = Field(512, ge=1, le=4096)

    def start(self, run: Run) -> "Gates":
        """A run's gates."""
        return Gates(self, run)

    def lacks(self, artefacts: Artefacts) -> str | None:
        """The gates."""
        return None if "gates" in artefacts.tables else "gates: a row of lazydit trains them"

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """The gates."""
        return (
            TrainGates(
                name="gates",
                mix_cost_weight=self.cost_weight,
                pointwise_cost_weight=self.cost_weight if self.mlp_cost_weight is None else self.mlp_cost_weight,
                iterations=self.iterations,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
            ),
        )


@dataclass
class Gates:
    """One run's gates.

    Attributes:
        logits, masks: of the last step, by part: a logit [R], and whether each row was computed.
    """

    method: LazyDiT
    run: Run
    logits: "dict[Site, Tensor]" = field(default_factory=dict)
    masks: dict[Site, tuple[bool, ...]] = field(default_factory=dict)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The parts that have gates."""
        return self.run.shape.sites_of("mix", "pointwise")

    @cached_property
    def weight_SPD(self) -> "Tensor":
        """The gates' weights by step counted from the last one, and by part.

        Raises:
            UserError: they were trained for another model or number of steps.
        """
        import torch

        size, device = (self.run.nfe, len(self.sites), self.run.shape.width), self.run.sample_index.device
        if (table := self.run.artefacts.tables.get("gates")) is None:
            return torch.zeros(size, device=device)
        if (len(table), len(table[0])) != (size[0] * size[1], size[2]):
            raise UserError(
                f"the gates are {len(table)} lines of {len(table[0])} weights, the run has {size[0]} steps of "
                f"{size[1]} parts of {size[2]} channels; use gates that were trained for this model and NFE"
            )
        return _on_device(table, device).view(size)

    def plan(self, look: Look) -> Plan:
        """Everything at first; then a decision at every part, when it is reached."""
        self.logits, self.masks = {}, {}
        decisions: dict[Unit, Decision] = {
            site: Decision(self._deferred(look, number) if look.step else ALL) for number, site in enumerate(self.sites)
        }
        return Plan(decisions)

    def _deferred(self, look: Look, number: int) -> Deferred:
        site, shape, logits, masks = self.sites[number], self.run.shape, self.logits, self.masks
        threshold = self.method.threshold
        if site.part == "mlp" and self.method.mlp_threshold is not None:
            threshold = self.method.mlp_threshold

        def choose(modulated: "Callable[[], Tensor]") -> Rows:
            h_RND = modulated()
            weight_D1 = self.weight_SPD[self.run.nfe - 1 - look.step, number, :, None].to(h_RND)
            logits[site] = (h_RND.flatten(0, 1) @ weight_D1).view(h_RND.shape[:2]).sum(dim=1)
            masks[site] = look.read_rows(logits[site].float().sigmoid() >= threshold)
            return Rows(masks[site])

        gate = shape.num_tokens * shape.width
        return Deferred(choose, like=ALL, macs=gate, least=NONE, sees="modulated")


@lru_cache(maxsize=2)
def _on_device(table: Table, device: "torch.device") -> "Tensor":
    """A table where the model is; kept, because a captured graph cannot copy it."""
    import torch

    return torch.tensor(table, device=device)
