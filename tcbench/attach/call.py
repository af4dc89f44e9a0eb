"""One call of a pipeline: a run that begins with the transformer's first step and ends with its last.

What the transformer is asked at a step goes through an engine instead, in the rows' order that methods expect, and what
comes back is what the transformer would have returned.
"""

import inspect
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from tcbench.attach.pipelines import Arguments, Habits
from tcbench.attach.served import fuses
from tcbench.attach.summary import Summary, uncached_macs
from tcbench.engine.fused import FusedBlocks
from tcbench.engine.plain import PlainBlocks
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.models.networks import make_adapter
from tcbench.sampling import Passes


class Call:
    """In the place of the transformer's forward, for one call of the pipeline.

    Args:
        pipe: the pipeline; its scheduler knows the steps when the transformer is first asked.
        habits: of the pipeline.
        method, artefacts, adapter: what samples.
        called: the pipeline's arguments.
        nfe: the number of steps that `artefacts` were made for; None: any.

    Attributes:
        summary: of the run, once its last step is done.
    """

    def __init__(
        self,
        pipe: Any,
        habits: Habits,
        method: Method,
        artefacts: Artefacts,
        adapter: Adapter,
        called: Arguments,
        nfe: int | None,
    ) -> None:
        self.pipe, self.habits, self.method, self.artefacts, self.nfe = pipe, habits, method, artefacts, nfe
        self.adapter, self._guidance = adapter, habits.guidance(adapter.spec, called)
        self.summary: Summary | None = None
        self._signature = inspect.signature(adapter.model.forward)  # before this call stands in its place
        self._passes: Passes | None = None
        self._contexts: list[Any] = []
        self._told: list[Tensor] = []  # the timesteps, on the device

    def __call__(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[Tensor]:
        """What the transformer returns for these arguments."""
        inputs = self._signature.bind(*args, **kwargs).arguments
        if self.summary:
            raise UserError(f"the transformer is asked more often than the {self.summary.steps} steps of the scheduler")
        if self._passes is None:
            self._passes = self._begin(inputs)
        run = self._passes.run
        step, number = divmod(len(self._told), run.guidance.passes)
        engine = self._passes.engines[number]
        if step == 0:
            self._contexts.append(engine.prepare(self._swapped(self.habits.prompt(inputs))))
        spec, habits = self.adapter.spec, self.habits
        latent = self._swapped(habits.latents(spec, inputs["hidden_states"]))
        output = habits.returned(spec, self._swapped(engine(step, latent, self._contexts[number])))
        self._told.append(inputs["timestep"].flatten()[0])
        if len(self._told) == run.nfe * run.guidance.passes:
            self.summary = self._summary(self._passes)
            self._passes, self._contexts = None, []  # what follows, decoding for one, needs the memory
        return Transformer2DModelOutput(sample=output) if inputs.get("return_dict", True) else (output,)

    def _begin(self, inputs: Arguments) -> Passes:
        spec, scheduler = self.habits.sized(self.adapter.spec, inputs), self.pipe.scheduler
        latent = self.habits.latents(spec, inputs["hidden_states"])
        if tuple(latent.shape[1:]) != spec.latent_shape:
            shapes = ["x".join(map(str, shape)) for shape in (latent.shape[1:], spec.latent_shape)]
            raise UserError(f"latents are {shapes[0]}; tcbench serves the transformer's own size, {shapes[1]}")
        self.habits.check(self.pipe, spec, inputs)
        self._expected = self.habits.told(scheduler.timesteps, latent.dtype)
        timesteps = tuple(scheduler.timesteps.tolist())
        if (steps := self.method.sampled_steps(len(timesteps))) != len(timesteps):
            raise UserError(f"{self.method.name}: the pipeline decides its steps; give num_inference_steps={steps}")
        if self.nfe not in (None, len(timesteps)):
            raise UserError(
                f"the artefacts were made for {self.nfe} steps and the pipeline takes {len(timesteps)}; "
                f"give num_inference_steps={self.nfe}, or train for {len(timesteps)}"
            )
        self.adapter = make_adapter(self.adapter.model, spec)  # anew, as weights may have changed since the last call
        guidance = self._guidance
        self._swaps = self.habits.unconditional_first and guidance.rows_per_sample == 2
        samples = torch.arange(len(latent) // guidance.rows_per_sample, device=latent.device)
        levels = noise_levels(scheduler)
        run = Run(self.adapter.shape, timesteps, guidance, samples, 0, self.artefacts, levels)
        return Passes(self.adapter, run, self.method.start, FusedBlocks if fuses(self.adapter) else PlainBlocks)

    def _summary(self, passes: Passes) -> Summary:
        run = passes.run
        told = torch.stack(self._told).view(-1, run.guidance.passes).T.tolist()
        if any(of_pass != self._expected.tolist() for of_pass in told):
            raise UserError("the transformer is not asked at the scheduler's timesteps, one after the other")
        return Summary(
            method=self.method,
            pipeline=type(self.pipe).__name__,
            samples=len(run.sample_index),
            rows_per_sample=run.rows_per_sample,
            tokens=run.shape.num_tokens,
            plans=passes.plans,
            macs=passes.macs,
            macs_uncached=uncached_macs(run),
            cache_bytes=passes.cache_bytes,
            fused=isinstance(passes.engines[0].blocks, FusedBlocks),
        )

    def _swapped(self, rows: Any) -> Any:
        """The halves of a guided pair in the other order, if the pipeline's is not ours; twice is as it was."""
        if not self._swaps:
            return rows
        half = len(rows) // 2
        return rows.roll(half, 0) if isinstance(rows, Tensor) else rows[half:].followed_by(rows[:half])


def noise_levels(scheduler: Any) -> tuple[tuple[float, float], ...]:
    """(signal, sigma) at every step of a diffusers scheduler that has set its timesteps, of what the network sees.

    A flow's are (1 - sigma, sigma), of whatever solver walks it. A chain that preserves variance has them in its sigmas
    (noise over signal), or else in its table of cumulative alphas. Of any other scheduler there are none
    (`Run.noise_levels`).
    """
    timesteps: Any = scheduler.timesteps
    sigmas: Any = getattr(scheduler, "sigmas", None)
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)
    if flow or (sigmas is not None and scheduler.config.get("use_flow_sigmas")):
        sigma_S = scheduler.sigmas[: len(timesteps)]
        return tuple(zip((1 - sigma_S).tolist(), sigma_S.tolist(), strict=True))
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        return ()
    kept_S = kept[timesteps.long().cpu()] if sigmas is None else 1 / (1 + sigmas[: len(timesteps)] ** 2)
    return tuple(zip(kept_S.sqrt().tolist(), (1 - kept_S).sqrt().tolist(), strict=True))
