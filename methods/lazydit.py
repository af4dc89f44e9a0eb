"""LazyDiT: Lazy Learning for the Acceleration of Diffusion Transformers (AAAI 2025; shawnricecake/lazydit).

Before self-attention and MLP of every block a gate, one linear layer a step, looks at the part's modulated input.
Summed over the tokens it is a logit for each row of the batch: a row whose sigmoid is above a threshold is computed,
the others take their own stored output, through the current step's gates of adaLN. So samples, and the halves of a
guided pair, decide apart. The first step computes everything. The host reads the rows at every part, because what is
computed depends on them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from pydantic import Field

from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Method, Run, Table
from tcbench.plan import ALL, NONE, Decision, Deferred, Plan, Rows, Site, Unit

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LazyDiT(Method):
    """Recompute, at every part, the rows of the batch that a trained gate opens.

    The gates are the table `gates` of a run's artefacts: a line of weights for every step, counted from the last one,
    and in it for every part that mixes tokens or is an MLP, in the order they run. Training them is not here. Where
    there are none (`tcbench macs`) all weights are 0 and every sigmoid 0.5: no row is computed after the first step,
    which is the method's floor.

    Options:
        threshold: a row is computed if its sigmoid is above; 0.5 is published.
        mlp_threshold: that of the MLPs, if it is another.
    """

    name = "lazydit"
    label = "LazyDiT"
    knob = "threshold"
    decides = "host"

    threshold: float = Field(0.5, ge=0, le=1)
    mlp_threshold: float | None = Field(None, ge=0, le=1)

    def start(self, run: Run) -> "Gates":
        """A run's gates."""
        return Gates(self, run)

    def lacks(self, artefacts: Artefacts) -> str | None:
        """The gates."""
        if "gates" in artefacts.tables:
            return None
        return "gates, which nothing here trains: leave it out, or hand them over as Artefacts(tables={'gates': ...})"


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
    def sites(self) -> list[Site]:
        """The parts that have gates."""
        return [site for site in self.run.shape.sites if self.run.shape.kind(site) != "cross"]

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
            masks[site] = look.read_rows(logits[site].float().sigmoid() > threshold)
            return Rows(masks[site])

        gate = shape.num_tokens * shape.width
        return Deferred(choose, like=ALL, macs=gate, least=NONE, sees="modulated")


@lru_cache(maxsize=2)
def _on_device(table: Table, device: "torch.device") -> "Tensor":
    """A table where the model is; kept, because a captured graph cannot copy it."""
    import torch

    return torch.tensor(table, device=device)
