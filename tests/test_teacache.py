"""TeaCache's polynomial: what it is fitted to, that it is found again, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from tcbench.artefacts import load_numbers, save_artefacts
from tcbench.budget.costing import run_of_shapes
from tcbench.data import Dataset
from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Run, Table
from tcbench.models.adapter import Adapter, Prompt
from tcbench.plan import Plan
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Passes, denoise, initial_noise, start_run
from tcbench.training.caching import train
from tcbench.training.pairs import CALIBRATION_INDEX
from tests.floors import TRAJECTORY, assert_close

from .conftest import make_adapter, make_prompt

NFE, SAMPLES = 5, 3
IMAGES = Dataset(torch.zeros(4, 4, 16, 16), torch.arange(4))


def run_with(changes: Table | None, steps: int = NFE) -> Run:
    run = run_of_shapes("tiny-dit", steps)
    tables = {} if changes is None else {"changes": changes}
    return Run(run.shape, run.timesteps, run.guidance, run.sample_index, artefacts=Artefacts(tables=tables))


def teacache(**options: Any) -> Any:
    return make_method("teacache", options)


def seen(polynomial: tuple[float, ...], steps: int = 20, noise: float = 0.0) -> Table:
    """Changes of three samples, of which the outputs' follow a polynomial of the inputs'."""
    draw = np.random.default_rng(0)
    moved = draw.uniform(0.02, 0.5, (SAMPLES, steps))
    output = np.polyval(polynomial, moved) + noise * draw.standard_normal(moved.shape)
    both = np.concatenate([moved, output])
    both[:, 0] = np.nan
    return tuple(map(tuple, both.tolist()))


@pytest.mark.parametrize("polynomial", [(498.65, -283.78, 55.86, -3.82, 0.264), (0.0, 0.0, 0.0, 2.0, 0.1)])
def test_a_known_polynomial_is_found_again(polynomial: tuple[float, ...]) -> None:
    found = teacache().polynomial(run_with(seen(polynomial), 20))
    assert found == pytest.approx(polynomial, rel=1e-6, abs=1e-6)


def test_a_fit_is_numpys_least_squares() -> None:
    changes = seen((3.0, -1.0, 0.5, 0.2), noise=0.01)
    moved, output = np.array(changes)[:, 1:].reshape(2, -1)
    assert teacache(degree=3).polynomial(run_with(changes, 20)) == pytest.approx(np.polyfit(moved, output, 3))


def test_what_goes_before_a_fit_and_what_stands_in() -> None:
    changes = seen((1.0, 2.0), NFE)
    given = teacache(coefficients=(2.0, 1.0))
    assert given.polynomial(run_with(changes)) == (2.0, 1.0) and given.training(run_with(None)) == ()
    assert teacache().polynomial(run_with(None)) == (1.0, 0.0) and len(teacache().training(run_with(None))) == 1


def test_changes_of_another_run_are_refused() -> None:
    with pytest.raises(UserError, match="teacache: the changes are of 20 steps, the run has 5; calibrate for this NFE"):
        teacache().start(run_with(seen((1.0, 0.0))))
    with pytest.raises(UserError, match="degree 4 needs more than 4 different changes, and there are 3; raise"):
        teacache().start(run_with(seen((1.0, 0.0), steps=2), 2))


class Changes:
    """A policy that computes everything and takes down, by sample, what the calibration does."""

    def __init__(self) -> None:
        self.moved: list[torch.Tensor] = []
        self.before: torch.Tensor | None = None

    def plan(self, look: Look) -> Plan:
        signal = look.modulated_input()
        if self.before is not None:
            rows, samples = len(signal), len(look.run.sample_index)
            moved = []
            for sample in range(samples):
                own = slice(sample, rows, samples)
                moved.append((signal[own] - self.before[own]).abs().mean() / self.before[own].abs().mean())
            self.moved.append(torch.stack(moved))
        self.before = signal
        return Plan()


@pytest.mark.parametrize(("model", "passes"), [("tiny-dit", 1), ("tiny-wan", 2)])
def test_a_row_calibrates_itself(model: str, passes: int, tmp_path) -> None:
    """Under guidance in two passes each decides for itself, so each is seen for itself."""
    adapter: Adapter = make_adapter(model)
    settings = SamplerSettings(guidance_scale=1.5, seed=3, solver="flow" if passes == 2 else "ddim")
    every = make_prompt(adapter, rows=8)

    def prompts(index: torch.Tensor) -> Prompt:
        return every[index % 8]

    method = teacache(calibration_samples=SAMPLES, degree=2)
    artefacts, refiners, log = train(adapter, method, NFE, settings, IMAGES, 0, prompts)
    save_artefacts(tmp_path, artefacts, refiners, log)
    changes = load_numbers(tmp_path).tables["changes"]
    assert str(changes) == str(artefacts.tables["changes"])
    assert (len(changes), len(changes[0])) == (2 * SAMPLES * passes, NFE)

    index = CALIBRATION_INDEX + torch.arange(SAMPLES)
    policies = [Changes() for _ in range(passes)]
    waiting = iter(policies)
    sampler, run = start_run(adapter, method, NFE, settings, index, Artefacts())
    with torch.inference_mode():
        walk = Passes(adapter, run, lambda _: next(waiting))
        for _ in denoise(walk, sampler, initial_noise(adapter, 3, index), prompts(index)):
            pass
    by_hand = torch.cat([torch.stack(policy.moved, dim=1) for policy in policies])
    table = torch.tensor(changes)
    assert table[:, 0].isnan().all() and (table[:, 1:] > 0).all()
    assert_close(table[: SAMPLES * passes, 1:], by_hand, TRAJECTORY)
    run = Run(run.shape, run.timesteps, run.guidance, run.sample_index, artefacts=load_numbers(tmp_path))
    assert len(method.polynomial(run)) == 3
