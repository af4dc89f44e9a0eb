"""HarmoniCa's router (arXiv 2410.01723), trained along whole sampling chains that start from noise: no images.

At every step but the first, the model's output with soft gates, on the latent that the gated chain itself has reached,
is held to the output of the same network that computes everything there; the row of the step is updated, and the gated
output leads to the next latent. A branch's stored value is replaced by what was used where its gate is above the
threshold, as in sampling. The error of a step is weighed by how much the final latents move when its row begins to act
(the proxy of the image error), measured anew every so many chains.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tcbench.artefacts import as_table
from tcbench.engine.engine import Engine
from tcbench.engine.soft import soft_hidden
from tcbench.method import Artefacts, Method, Table
from tcbench.models.adapter import Adapter
from tcbench.plan import Unit
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Prompts, initial_noise, start_run
from tcbench.trainable import TrainChainRouter
from tcbench.training.pairs import CALIBRATION_INDEX
from tcbench.training.routers import LOGIT_BOUND
from tcbench.training.running import check_finite
from tcbench.training.unfinished import Stateful, Unfinished, Weights

Values = dict[Unit, Tensor]


class GatedChain:
    """One batch on its way from noise, with the branches' values that it stores; guidance may make several passes.

    Args:
        index: of the samples, int64 [n].
        checkpointed: blocks are computed again for the gradient (`soft_hidden`).
    """

    def __init__(
        self,
        adapter: Adapter,
        method: Method,
        nfe: int,
        settings: SamplerSettings,
        prompts: Prompts,
        index: Tensor,
        checkpointed: bool = False,
    ) -> None:
        self.adapter, self.checkpointed = adapter, checkpointed
        self.sampler, self.run = start_run(adapter, method, nfe, settings, index, Artefacts())
        self.x = initial_noise(adapter, settings.seed, index).to(adapter.device)
        self.engines = [Engine(adapter, self.run) for _ in range(self.run.guidance.passes)]
        rows = self.run.guidance.prompts(adapter, prompts(index).to(adapter.device))
        self.contexts = [engine.prepare(prompt) for engine, prompt in zip(self.engines, rows, strict=True)]
        self.stored: list[Values] = [{} for _ in self.engines]

    def outputs(self, step: int, gates: Mapping[Unit, Tensor]) -> tuple[list[Tensor], list[Values]]:
        """The model's output [R, C, ...], in the latents' dtype, and what it used of every branch [R, N, D], by pass.

        Args:
            gates: how much of a branch is computed; empty: everything is.
        """
        outputs, used = [], []
        latents = self.run.guidance.latents(self.x)
        for engine, context, stored in zip(self.engines, self.contexts, self.stored, strict=True):
            tokens, condition = engine.embed(step, latents, context)
            values: Values = {}
            hidden = soft_hidden(self.adapter, tokens, condition, gates, stored, None, self.checkpointed, values)
            outputs.append(self.adapter.unembed(hidden, condition).to(self.x.dtype))
            used.append(values)
        return outputs, used

    def guided(self, outputs: list[Tensor]) -> Tensor:
        """The outputs of all rows, guidance applied to its channels: what errors are measured on, [R, C, ...]."""
        guidance, channels = self.run.guidance, self.adapter.spec.in_channels
        acted = channels if guidance.channels is None else guidance.channels
        prediction = guidance.combine([output[:, :channels] for output in outputs])[:, :acted]
        copies = [prediction.repeat(len(output) // len(prediction), *[1] * (output.ndim - 1)) for output in outputs]
        parts = [torch.cat([copy, output[:, acted:]], dim=1) for copy, output in zip(copies, outputs, strict=True)]
        return torch.cat(parts)

    @torch.no_grad()
    def advance(self, step: int, outputs: list[Tensor], used: list[Values], keep: Mapping[Unit, Tensor]) -> None:
        """Go to the next latent; store what was used where `keep` says so."""
        channels = self.adapter.spec.in_channels
        prediction = self.run.guidance.combine([output[:, :channels] for output in outputs])
        rest = outputs[0][: len(self.x), channels:]
        self.x = self.sampler.step(prediction.detach(), step, self.x, rest.detach())[0]
        for stored, values in zip(self.stored, used, strict=True):
            for site, value in values.items():
                value = value.detach()
                stored[site] = torch.where(keep[site], value, stored[site]) if site in stored else value


class ChainTrainer:
    """AdamW on a router's rows, one chain at a time; the model must be frozen.

    Args:
        logits: where to start, [S, G], rows counted from the last step; that of the first step is never used.
        checkpointed: as `GatedChain` takes it.

    Attributes:
        rows: the router's, as `logits`.
        proxy_S: what the error of every step is weighed with; float64 [S] on the CPU.
    """

    def __init__(
        self,
        adapter: Adapter,
        method: Method,
        stage: TrainChainRouter,
        nfe: int,
        settings: SamplerSettings,
        prompts: Prompts,
        logits: Tensor,
        checkpointed: bool = False,
    ) -> None:
        self.adapter, self.method, self.stage = adapter, method, stage
        self.nfe, self.settings, self.prompts, self.checkpointed = nfe, settings, prompts, checkpointed
        self.rows = [nn.Parameter(row.to(adapter.device, copy=True)) for row in logits]
        self.rows[-1].requires_grad_(False).fill_(LOGIT_BOUND)
        self.optimiser = torch.optim.AdamW(self.rows[:-1], stage.learning_rate, weight_decay=0)
        self.proxy_S = torch.zeros(len(self.rows), dtype=torch.float64)

    def chain(self, number: int) -> GatedChain:
        """A batch of its own for every number."""
        index = CALIBRATION_INDEX + number * self.stage.batch_size + torch.arange(self.stage.batch_size)
        of = self.adapter, self.method, self.nfe, self.settings, self.prompts
        return GatedChain(*of, index, self.checkpointed)

    def row(self, step: int) -> Tensor:
        """The row of a step, in sampling order."""
        return self.rows[len(self.rows) - 1 - step]

    def gates(self, step: int) -> dict[Unit, Tensor]:
        """The soft gates of a step."""
        return dict(zip(self.adapter.shape.sites, self.row(step).sigmoid(), strict=True))

    @torch.no_grad()
    def weigh_steps(self, number: int) -> None:
        """How far the final latents move when a step's gates begin to act, those before it acting already."""
        acting: set[int] = set()
        before = self._final(number, acting)
        for step in range(1, len(self.rows)):
            acting.add(step)
            after = self._final(number, acting)
            self.proxy_S[step] = (after - before).square().mean().item()
            before = after

    def _final(self, number: int, acting: set[int]) -> Tensor:
        chain = self.chain(number)
        for step in range(len(self.rows)):
            gates = self.gates(step) if step in acting else {}
            outputs, used = chain.outputs(step, gates)
            chain.advance(step, outputs, used, self._kept(gates))
        return chain.x

    def _kept(self, gates: Mapping[Unit, Tensor]) -> dict[Unit, Tensor]:
        """Which branches are stored: all if nothing is gated."""
        everything = torch.tensor(True, device=self.adapter.device)
        return {
            site: gates[site].detach() > self.stage.threshold if gates else everything
            for site in self.adapter.shape.sites
        }

    def train(self, number: int) -> tuple[float, float]:
        """Update all rows along one chain: (mean data loss, mean sum of gates)."""
        if number % self.stage.refresh == 0:
            self.weigh_steps(number)
        chain, losses, sums = self.chain(number), [], []
        with torch.no_grad():
            outputs, used = chain.outputs(0, {})
        chain.advance(0, outputs, used, self._kept({}))
        for step in range(1, len(self.rows)):
            with torch.no_grad():
                target = chain.guided(chain.outputs(step, {})[0])
            gates = self.gates(step)
            outputs, used = chain.outputs(step, gates)
            data = (chain.guided(outputs) - target).square().mean()
            opened = self.row(step).sigmoid().sum()
            loss = self.proxy_S[step].item() * data + self.stage.cost_weight * opened
            check_finite(loss.detach(), self.stage, number)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            with torch.no_grad():
                self.row(step).clamp_(-LOGIT_BOUND, LOGIT_BOUND)
            chain.advance(step, outputs, used, self._kept(gates))
            losses.append(data.item())
            sums.append(opened.item())
        return sum(losses) / len(losses), sum(sums) / len(sums)

    def logits(self) -> Tensor:
        """The router as it is now: [S, G], on the CPU."""
        return torch.stack([row.detach().cpu() for row in self.rows])


def train_on_chains(
    adapter: Adapter,
    method: Method,
    stage: TrainChainRouter,
    nfe: int,
    settings: SamplerSettings,
    prompts: Prompts,
    seed: int,
    unfinished: Unfinished,
    checkpointed: bool = False,
) -> tuple[Table, dict[str, list[float]]]:
    """Train a router from random logits, on noise and prompts alone.

    Args:
        nfe: steps of the uncached reference.
        prompts: sample indices [n] -> what they show.
        checkpointed: as `GatedChain` takes it.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(method.sampled_steps(nfe), len(adapter.shape.sites), generator=generator)
    trainer = ChainTrainer(adapter, method, stage, nfe, replace(settings, seed=seed), prompts, logits, checkpointed)
    history: dict[str, list[float]] = {"cache_loss": [], "cost_loss": []}
    learnt = Weights({"proxies": trainer.proxy_S, **{str(number): row for number, row in enumerate(trainer.rows)}})
    parts: dict[str, Stateful] = {"rows": learnt, "optimiser": trainer.optimiser}
    left = unfinished.stage(generator, history, parts).iterations(stage.iterations)
    progress = tqdm(left, desc=f"train {stage.name}", total=stage.iterations, mininterval=1)
    for number in progress:
        data, opened = trainer.train(number)
        if number % max(1, stage.iterations // 50) == 0 or number == stage.iterations - 1:
            history["cache_loss"].append(data)
            history["cost_loss"].append(opened)
            progress.set_postfix(cache=f"{data:.3g}", open=f"{opened:.3g}")
    return as_table(trainer.logits()), history
