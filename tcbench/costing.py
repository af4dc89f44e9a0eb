"""MACs of any (model, method, NFE) from shapes alone: every step's plan is made and costed, no model is built."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tcbench.ledger import Ledger, block_macs, predictor_macs
from tcbench.method import Artefacts, ImportRouter, Method, Run, Table
from tcbench.models.specs import MODELS
from tcbench.shapes import Macs
from tcbench.timesteps import respaced_timesteps
from tcbench.unseen import unseen

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _ShapeLook:
    """`tcbench.method.Look` where tensors have shapes and no values."""

    run: Run
    step: int
    ledger: Ledger = field(repr=False)

    def latent(self) -> "Tensor":
        return self._unseen(self.run.shape.num_tokens, self.run.shape.width)

    def scores(self, name: str) -> "Tensor":
        self.ledger.charge(name, predictor_macs(self.run.shape))
        return self._unseen(self.run.shape.num_blocks, self.run.shape.num_tokens)

    def uniform(self) -> "Tensor":
        return self._unseen(self.run.shape.num_blocks, self.run.shape.num_tokens)

    def attention_received(self, block: int) -> "Tensor":
        return self._unseen(self.run.shape.num_tokens)

    def attention_entropy(self, block: int) -> "Tensor":
        return self._unseen(self.run.shape.num_tokens)

    def updates(self) -> "Tensor":
        shape = self.run.shape
        self.ledger.charge("oracle", sum((block_macs(shape, block, None) for block in range(shape.num_blocks)), Macs()))
        return self._unseen(shape.num_blocks, shape.num_tokens, shape.width)

    def _unseen(self, *shape: int) -> "Tensor":
        return unseen(self.run.rows_per_sample, *shape)


def run_of_shapes(model: str, steps: int) -> Run:
    """A guided run of one sample, as far as it is known without a model: `steps` sampled steps, nothing trained."""
    spec = MODELS[model]
    return Run(spec.shape, respaced_timesteps(steps), spec.guidance(), unseen(1, dtype="int64", values=[0]))


def macs_of(model: str, method: Method, nfe: int, artefacts: Artefacts | None = None) -> dict[str, Any]:
    """The ledger's totals for one sample with guidance, and the I-steps.

    Without `artefacts`, a schedule that is learned from scores is stood in for by that of a flat alpha-bar: it has as
    many I-steps, and MACs depend on their number alone; a router that would be trained is stood in for by its method's
    floor, and one that is imported is read. Counts per block are stood in for by the uniform allocation
    (`plan.allocate_tokens`).
    """
    run = run_of_shapes(model, method.sampled_steps(nfe))
    if artefacts is None:
        given = [stage for stage in method.training(run) if isinstance(stage, ImportRouter)]
        artefacts = Artefacts(alpha_bar=(0.5,) * run.nfe, tables={stage.name: _router(stage.path) for stage in given})
    run = replace(run, artefacts=artefacts)
    ledger, policy = Ledger(run.rows_per_sample * run.guidance.passes), method.start(run)
    ledger.charge("model", run.shape.once)
    for step in range(run.nfe):
        plan = policy.plan(_ShapeLook(run, step, ledger))
        ledger.charge_plan(plan, run.shape)
        ledger.charge_choices(plan)
    return {
        "model": model,
        "method": method.name,
        "options": method.model_dump(mode="json"),
        "nfe": nfe,
        "sampled_steps": run.nfe,
        "full_steps": len(method.i_steps(run)),
        **ledger.totals(),
    }


def _router(path: str) -> Table:
    from tcbench.training.routers import read_router  # torch's own format: the one part of costing that imports torch

    return read_router(path)
