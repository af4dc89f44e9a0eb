"""How far rounding alone drives apart results that agree, by kind of computation, and what the tests allow.

A floor is measured, not chosen: the largest error of the comparisons that name it, beside the largest expected value,
as it is and under the limits of tests/on_any_machine.py, which prints all of them again. Tests allow `MARGIN` times as
much, so that a machine of another kind has room, and tests/test_floors.py shows that mistakes stand out.

What is equal by construction (the same operations on the same shapes in one process) is compared by `torch.equal`;
float64 numbers of a few operations by `pytest.approx` as it is, whose 1e-6 is far above rounding and below a mistake.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tcbench.golden.compare import MARGIN

ENOUGH = 5
"""The margin that must be left on every machine; where it is not, a floor was measured too low."""

RECORD = "TCBENCH_TEST_ERRORS"
"""Names the folder where a run of the tests leaves the largest error of every floor."""


@dataclass(frozen=True)
class Floor:
    """A kind of computation and its rounding.

    Attributes:
        name: of the kind.
        measured: the largest error over all comparisons of the kind, as a share of the largest expected value.
        what: which computations it is the floor of, and against what it was measured.
    """

    name: str
    measured: float
    what: str

    @property
    def allowed(self) -> float:
        """The largest share that a test accepts."""
        return MARGIN * self.measured


SAMPLER = Floor("SAMPLER", 1e-6, "a step of a chain in float32: against float64 and against diffusers' schedulers")
ANCESTRAL = Floor("ANCESTRAL", 1.2e-5, "diffusers' ancestral steps, which take large latents from each other")
NETWORK = Floor("NETWORK", 1.2e-6, "a pass of a float32 network: another batch or route, explicit attention in float64")
TRAJECTORY = Floor("TRAJECTORY", 2.3e-6, "a whole sampling run in float32: another batch, fused blocks, diffusers' own")
KERNEL = Floor("KERNEL", 5e-7, "a fused kernel in float32: against the plain operations beside it")
HALF = Floor("HALF", 5e-4, "float16: a fused kernel against the plain operations beside it, and what is stored in it")
SCORE = Floor("SCORE", 1e-7, "the scores of tokens in float32: against Python's own floats")
RECORDED = Floor("RECORDED", 7.2e-7, "a metric of one sample in float32: as its package computed it on another machine")
READING = Floor("READING", 1e-6, "a metric of one sample in float32: by another route")
DISTANCE = Floor("DISTANCE", 1.5e-6, "a metric of a set, from float32 features: torch-fidelity's own, and by hand")
LOSS = Floor("LOSS", 4.1e-6, "a mean squared difference of two passes in float32: beside the reference code's")

_seen: dict[str, tuple[float, float]] = {}
"""The largest error and what is allowed, by floor."""

Numbers = Tensor | Sequence[float] | float


def deviation(actual: Numbers, expected: Numbers) -> float:
    """The largest absolute difference as a share of the largest expected value; NaN if a number is one."""
    one, other = (torch.as_tensor(numbers, dtype=torch.float64).detach().cpu() for numbers in (actual, expected))
    assert one.shape == other.shape, f"shape {list(one.shape)}, expected {list(other.shape)}"
    if not one.numel():
        return 0.0
    scale = other.abs().max().item()
    return (one - other).abs().max().item() / (scale or 1.0)


def assert_close(actual: Numbers, expected: Numbers, floor: Floor, what: str = "") -> None:
    """`actual` is `expected` but for the rounding of `floor`'s kind.

    Raises:
        AssertionError: shapes differ, or a number by more than `floor` allows; says `what` does not hold.
    """
    error = deviation(actual, expected)
    note(floor.name, error, floor.allowed)
    found = f"error {error:.1e} of the largest value; {floor.name} allows {floor.allowed:.1e}"
    assert error <= floor.allowed, f"{what}: {found}" if what else found


def note(name: str, error: float, allowed: float) -> None:
    """Remember an error for the table of tests/on_any_machine.py."""
    _seen[name] = max((error, allowed), _seen.get(name, (0.0, allowed)))


def save_errors() -> None:
    """Leave what this process noted where `RECORD` says, if it does."""
    if folder := os.environ.get(RECORD):
        (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(_seen), encoding="utf-8")


def errors_in(folder: Path) -> dict[str, tuple[float, float]]:
    """(largest error, allowed) of every name, over the processes of a run."""
    seen: dict[str, tuple[float, float]] = {}
    for path in sorted(folder.iterdir()):
        for name, (error, allowed) in json.loads(path.read_text(encoding="utf-8")).items():
            seen[name] = max((error, allowed), seen.get(name, (0.0, allowed)))
    return seen
