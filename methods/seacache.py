"""SeaCache: Spectral-Evolution-Aware Cache for Accelerating Diffusion Models, as diffusers' hook has it.

TeaCache's accumulation, of how much the *filtered* noisy latent changes between steps: a Wiener filter for a signal
whose spectrum falls like |f|^-p, at the step's noise level, passes what the model can have settled by then. What a
skipped step adds to the stream is extrapolated from the last two full steps.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Forecast, Plan, Span, every_unit
from tcbench.tensors.unseen import on_values

if TYPE_CHECKING:
    from torch import Tensor


class SeaCache(Method):
    """Extrapolate the residual of all blocks while the filtered latent moves little.

    Options:
        threshold: the accumulated change at which a step is computed; 0.25 is diffusers' default, 0.3 and 0.6 are
            published for FLUX, 0.12 to 0.35 for video.
        order: of the extrapolation; 0 holds the residual.
        max_continuous: after so many skipped steps in a row one is computed; None: any number (0 in diffusers).
        power: p of the spectrum, 2 for images and 3 for videos; 3 is diffusers' default.
        first_steps, last_steps: how many are always computed at either end; the first step always is.
        signal: what is filtered. `latent` is diffusers' hook; `modulated` is the first block's modulated input, as the
            authors' code is said to have it.
    """

    name = "seacache"
    label = "SeaCache"
    knob = "threshold"
    decides = "host"

    threshold: float = Field(0.25, ge=0, le=2)
    order: int = Field(1, ge=0, le=4)
    max_continuous: PositiveInt | None = 2
    power: PositiveFloat = 2.0
    first_steps: NonNegativeInt = 1
    last_steps: NonNegativeInt = 1
    signal: Literal["latent", "modulated"] = "latent"

    def start(self, run: Run) -> "_Accumulation":
        """The accumulated change lives for one run."""
        return _Accumulation(self)

    def outcomes(self, run: Run, step: int) -> tuple[Plan, ...]:
        """Everything, or nothing."""
        return self.whole(run, computed=True), self.whole(run, computed=False)

    def whole(self, run: Run, computed: bool) -> Plan:
        """All blocks as one unit."""
        return every_unit([Span(0, run.shape.num_blocks)], ALL if computed else NONE, Forecast(self.order))


@dataclass
class _Accumulation:
    """One run's memory.

    Attributes:
        before: the filtered latent of the last step.
        change: since the last computed step.
        skipped: steps in a row.
    """

    method: SeaCache
    before: "Tensor | None" = None
    change: float = 0.0
    skipped: int = 0

    def plan(self, look: Look) -> Plan:
        """Everything at the ends of the run, where the change has grown, and after some skipped steps."""
        method, nfe = self.method, look.run.nfe
        shape = look.run.shape
        seen = look.input() if method.signal == "latent" else look.modulated_input()
        # tokens back where they are in the image, [R, D, F, H, W]
        grid = (-1, shape.frames, *shape.grid, shape.width)
        signal = on_values(
            lambda x, level: filtered(x if x.ndim > 3 else x.view(grid).movedim(-1, 1), level, method.power),
            seen,
            look.noise_level(),
            shape=tuple(seen.shape),
        )
        before, self.before = self.before, signal
        if before is not None:
            self.change += look.read(on_values(_mean_change, signal, before, shape=()))
        at_an_end = before is None or look.step < method.first_steps or look.step >= nfe - method.last_steps
        too_many = method.max_continuous is not None and self.skipped >= method.max_continuous
        computed = at_an_end or self.change >= method.threshold or too_many
        self.skipped = 0 if computed else self.skipped + 1
        if computed:
            self.change = 0.0
        return method.whole(look.run, computed)


def filtered(latent: "Tensor", noise_level: "Tensor", power: float) -> "Tensor":
    """A latent [R, C, ...] without what its noise hides.

    Along every axis the gain is a P / (a^2 P + s^2), P = |f|^-power, with the share of noise s = sigma / (signal +
    sigma) and a = 1 - s: the levels of a flow are their own shares. Gains multiply, and are 1 on average.

    Args:
        noise_level: (signal, sigma), [R, 2].
    """
    import torch

    axes = tuple(range(2, latent.ndim))
    signal, sigma = noise_level.double().unbind(1)
    s_R = sigma / (signal + sigma)
    a_R = (1 - s_R).clamp(min=LEAST_SIGNAL)
    gain: Any = 1.0
    for axis in axes:
        frequency = torch.fft.fftfreq(latent.shape[axis], device=latent.device, dtype=torch.float64).abs()
        spectrum = torch.where(frequency == 0, AT_ZERO, frequency.clamp(min=1e-12) ** -power)
        along = a_R[:, None] * spectrum / (a_R[:, None] ** 2 * spectrum + s_R[:, None] ** 2)
        gain = gain * along.view(len(latent), *(-1 if other == axis else 1 for other in range(1, latent.ndim)))
    gain = gain / gain.mean(dim=axes, keepdim=True)
    return torch.fft.ifftn(torch.fft.fftn(latent.double(), dim=axes) * gain, dim=axes).real


AT_ZERO = 1e16  # the spectrum of a constant
LEAST_SIGNAL = 1e-6  # at the start of a flow there is none, and a gain of nothing has no mean


def _mean_change(new: "Tensor", old: "Tensor") -> "Tensor":
    """The mean over rows of every row's relative change."""
    return ((new - old).abs().flatten(1).mean(1) / old.abs().flatten(1).mean(1)).mean()
