"""A sampling case run with this package's engine and samplers, from the case's own noise."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.golden.case import Case, Unsupported
from tcbench.method import Artefacts, Look, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.plan import Plan, Site
from tcbench.record.executed import PlanRecord
from tcbench.samplers import AncestralDDPM, Chain, ReferenceDDIM, ReferenceDPMSolver, Sampler
from tcbench.sampling import Passes, denoise
from tcbench.watch.guard import Guarded, guarded

Given = Callable[..., Tensor]
"""(step, *arguments of an observation) -> what a method is shown instead of it: a reference's random choices."""


@dataclass
class _Recorder(Guarded):
    """A policy that remembers what it chose, and by which numbers."""

    given: Mapping[str, Given] = field(default_factory=dict)
    scores: list[dict[Site, Tensor]] = field(default_factory=list)
    chosen: list[dict[Site, Tensor]] = field(default_factory=list)
    numbers: list[list[float]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)

    def plan(self, look: Look) -> Plan:
        self.numbers.append([])
        plan = super().plan(_GivenLook(look, self.given) if self.given else look)
        # not copies: what a policy defers is there when the step is over
        self.scores.append(getattr(self.policy, "scores", {}))
        self.chosen.append(getattr(self.policy, "chosen", {}))
        self.states.append(dict(vars(self.policy)))
        return plan

    def read(self, value: Tensor) -> float:
        """A number for the method, remembered."""
        self.numbers[-1].append(number := value.item())
        return number


class _GivenLook(Look):
    """A look at what a case gives, and at the run where it gives nothing."""

    def __init__(self, look: Look, given: Mapping[str, Given]) -> None:
        self.run, self.step, self._look, self._given = look.run, look.step, look, given

    def observe(self, name: str, *arguments: Any) -> Tensor:
        if name in self._given:
            return self._given[name](self.step, *arguments)
        return self._look.observe(name, *arguments)

    def read(self, value: Tensor) -> float:
        return self._look.read(value)


@dataclass(frozen=True)
class Outcome:
    """What this package computed for a case.

    Attributes:
        method, run: what was run.
        executed: what was computed.
        scores, chosen: by step and branch, the scores [R, N] by which tokens were chosen, and their places [R, K].
        numbers: by step, what the method read on the host, in order.
        states: by step, the attributes of the policy after it had planned.
        tensors: timesteps [S], eps [S, n, C, H, W], final [n, C, H, W] and, if the case stores the latents that its
            network saw, eps_from_x_in like eps.
    """

    method: Method
    run: Run
    executed: PlanRecord
    scores: list[dict[Site, Tensor]]
    chosen: list[dict[Site, Tensor]]
    numbers: list[list[float]]
    states: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def case_run(case: Case, artefacts: Artefacts | None = None) -> tuple[Adapter, Sampler, Run]:
    """The case's model and sampler, and the run of its samples."""
    adapter, samples = case.adapter(), len(case.input("z"))
    sampler = sampler_of(case, samples)
    run = Run(
        adapter.shape,
        sampler.timesteps,
        adapter.spec.guidance(case.number("cfg_scale")),
        torch.arange(samples),
        artefacts=artefacts or Artefacts(),
        noise_levels=sampler.noise_levels if isinstance(sampler, Chain) else (),
    )
    return adapter, sampler, run


@torch.inference_mode()
def sample_case(
    case: Case, method: Method, artefacts: Artefacts | None = None, given: Mapping[str, Given] | None = None
) -> Outcome:
    """Sample with the case's noise, labels, guidance and sampler; again from its stored latents, if it has them.

    Args:
        given: what the method is shown instead of what it would observe, by observation.
    """
    adapter, sampler, run = case_run(case, artefacts)
    x, prompt = case.input("z"), case.prompt()

    def recorded() -> tuple[_Recorder, Passes]:
        recorder = _Recorder(method, guarded(method.start(run)).policy, given or {})
        passes = Passes(adapter, run, lambda _: recorder)
        for engine in passes.engines:
            engine.read = recorder.read
        return recorder, passes

    recorder, passes = recorded()
    steps = list(_progress(denoise(passes, sampler, x, prompt), case, run.nfe))
    tensors = {
        "timesteps": torch.tensor(sampler.timesteps),
        "eps": torch.stack([eps for eps, _, _ in steps]),
        "final": steps[-1][2],
    }
    if "x_in" in case.expected:
        _, again = recorded()
        again.prepare(prompt)
        eps = [again(step, seen)[0] for step, seen in enumerate(case.expected["x_in"][: run.nfe])]
        tensors["eps_from_x_in"] = torch.stack(eps)
    chose = {name: getattr(recorder, name) for name in ("scores", "chosen", "numbers", "states")}
    return Outcome(method, run, passes.plans, tensors=tensors, **chose)


def _progress(steps: Any, case: Case, total: int) -> Any:
    return tqdm(steps, total=total, desc=case.name, mininterval=1, leave=False)


def sampler_of(case: Case, samples: int) -> Sampler:
    """DDIM or, where `sampler` says so first, ancestral sampling with the case's noise; on the grid of its respacing.

    Cases of PixArt-alpha: DPM-Solver++.

    Raises:
        Unsupported: another sampler or grid, or ancestral sampling without the noise that was used.
    """
    if case.pixart:
        steps = re.fullmatch(r"DPM-Solver\+\+.*order 2 multistep, time_uniform, (\d+) steps.*", case.setting("sampler"))
        if not steps:
            raise Unsupported(f"sampler {case.setting('sampler')!r} is not second-order DPM-Solver++, uniform in time")
        return ReferenceDPMSolver(int(steps[1]))
    respacing = re.fullmatch(r"(ddim)?(\d+)", str(case.setting("timestep_respacing")))
    if not respacing:
        raise Unsupported(f"timestep_respacing {case.setting('timestep_respacing')!r} is not 'N' or 'ddimN'")
    nfe, spacing = int(respacing[2]), "leading" if respacing[1] else "linspace"
    named = re.search(r"ddim|p_sample|ddpm|ancestral", str(case.setting("sampler")).lower())
    if not named:
        raise Unsupported(f"sampler {case.setting('sampler')!r} is neither DDIM nor ancestral DDPM")
    if named[0] == "ddim":
        return ReferenceDDIM(nfe, spacing)
    return AncestralDDPM(nfe, given_noise(case, nfe, samples), spacing)


def given_noise(case: Case, nfe: int, samples: int) -> Tensor:
    """The noise of every ancestral step, [S or S - 1, n, C, H, W], from the case or else the shared inputs.

    The tensor called `noise`, or the only one with "noise" in its name. Of rows for both halves of the guided pairs the
    first half counts, because the network sees the first half of the latents twice.
    """
    for tensors in (case.expected, case.inputs):
        names = ["noise"] if "noise" in tensors else [name for name in tensors if "noise" in name]
        if len(names) > 1:
            raise UserError(f"{case.name}: which of {', '.join(names)} is the sampler's noise? call it 'noise'")
        if names:
            noise = tensors[names[0]]
            if noise.ndim != 5 or noise.shape[0] < nfe - 1 or noise.shape[1] not in (samples, 2 * samples):
                raise UserError(
                    f"{case.name}: {names[0]} has shape {list(noise.shape)}; "
                    f"give [{nfe}, {samples}, C, H, W], in sampling order"
                )
            return noise[:, :samples]
    raise Unsupported("ancestral sampling needs a tensor 'noise', in the case or in inputs.safetensors")
