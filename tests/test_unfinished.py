"""A training that is killed between two iterations and started again ends with the bits of one that was not; and what
learns stays float32 where products are of 16 bits."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tcbench.data import Dataset
from tcbench.models.adapter import Adapter, Prompt
from tcbench.precision import Dtype
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Prompts
from tcbench.training import unfinished
from tcbench.training.caching import train
from tcbench.training.crew import ALONE, Crew
from tcbench.training.unfinished import Unfinished
from tests.conftest import make_adapter, make_prompt

METHODS: dict[str, dict[str, Any]] = {
    "tokencache": {
        "num_full_steps": 2, "refiner_blocks": 1, "beta": -2000, "predictor_iterations": 13, "refiner_iterations": 12,
        "training_batch_size": 2, "alpha_samples": 2, "refiner_rank": 2, "cost_weight": 1e-3, "schedule": "even",
        "predictor_learning_rate": 1e-3,
    },
    "learning_to_cache": {"iterations": 6, "batch_size": 2},
    "harmonica": {"iterations": 4, "batch_size": 2, "refresh": 2},
}  # fmt: skip


class Killed(BaseException):
    """In the place of a signal."""


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(torch.randn(12, 4, 16, 16, generator=generator), torch.arange(12) % 10)


@pytest.fixture(scope="module")
def model() -> Adapter:
    return make_adapter("tiny-dit")


def made(
    model: Adapter,
    data: Dataset,
    name: str,
    kept: Unfinished | None = None,
    dtype: Dtype = "fp32",
    checkpointed: bool = False,
    crew: Crew = ALONE,
    prompts: Prompts | None = None,
) -> Any:
    method, settings = make_method(name, METHODS[name]), SamplerSettings(1.5)
    artefacts, refiners, log = train(model, method, 4, settings, data, 0, prompts, dtype, checkpointed, kept, crew)
    for stage in log["stages"]:
        del stage["wall_s"]
    scorers = {name: scorer.state_dict() for name, scorer in artefacts.scorers.items()}
    return {"scorers": scorers, "tables": dict(artefacts.tables), "refiners": refiners, "log": log}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Die in the optimiser's step of this number, before it changes anything."""
    whole, left = torch.optim.AdamW.step, [steps]

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return whole(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize(
    ("name", "deaths"), [("tokencache", [0, 11, 7]), ("learning_to_cache", [4]), ("harmonica", [10])]
)
def test_a_killed_training_ends_with_the_same_bits(
    model: Adapter, data: Dataset, name: str, deaths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictor's training dies before its first step and behind an evaluation, the refiners' in the middle, and
    that along chains where the weights of steps are not measured anew."""
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    for steps in deaths:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, steps)
            made(model, data, name, Unfinished(tmp_path / "state", "key"))
    kept = Unfinished(tmp_path / "state", "key")
    assert [*tmp_path.rglob("*.pt")], "nothing was kept"
    with monkeypatch.context() as patch:
        killed_after(patch, 8)  # of the stages' 13 and 12 steps, or 6, or 12, most are done
        resumed = made(model, data, name, kept)
    assert same(resumed, made(model, data, name))
    (tmp_path / "state" / ".stage-0.pt.1.tmp").touch()  # as a kill leaves it
    kept.remove()
    assert not [*tmp_path.iterdir()]


def test_seconds_of_a_stage_count_all_processes(
    model: Adapter, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 4)
        made(model, data, "learning_to_cache", Unfinished(tmp_path, "key"))
    (path,) = tmp_path.iterdir()
    state = torch.load(path, weights_only=True)
    assert 0 < state["wall_s"] < 1000
    unfinished.write_state(path, state | {"wall_s": 1000.0})
    method, kept = make_method("learning_to_cache", METHODS["learning_to_cache"]), Unfinished(tmp_path, "key")
    _, _, log = train(model, method, 4, SamplerSettings(1.5), data, 0, unfinished=kept)
    assert kept.earlier == 1000 < log["stages"][0]["wall_s"] < 2000


def test_a_state_of_another_stage_is_not_gone_on_from(tmp_path: Path) -> None:
    kept, drawn = Unfinished(tmp_path, "key"), torch.Generator()
    for number in range(2):
        kept.begin(number)
        parts = {"weights": unfinished.Weights({"w": torch.full((2,), float(number))})}
        list(kept.stage(drawn, {}, parts).iterations(3))
    (tmp_path / "stage-1.pt").replace(tmp_path / "stage-0.pt")
    weights = torch.zeros(2)
    kept.begin(0)
    assert list(kept.stage(drawn, {}, {"weights": unfinished.Weights({"w": weights})}).iterations(3)) == [0, 1, 2]
    assert not weights.any()


@pytest.mark.parametrize("how", ["cut off", "changed"])
def test_a_damaged_state_is_not_gone_on_from(
    model: Adapter, data: Dataset, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    whole = made(model, data, "learning_to_cache", Unfinished(tmp_path, "key"))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:1000] if how == "cut off" else content.replace(b"key", b"kex"))
    assert same(made(model, data, "learning_to_cache", Unfinished(tmp_path, "key")), whole)


@pytest.mark.parametrize("name", METHODS)
def test_blocks_computed_again_give_the_same_bits(model: Adapter, data: Dataset, name: str) -> None:
    assert same(made(model, data, name, checkpointed=True), made(model, data, name))


def test_a_state_of_another_run_is_not_gone_on_from(
    model: Adapter, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    made(model, data, "learning_to_cache", Unfinished(tmp_path, "one"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 0)
        made(model, data, "learning_to_cache", Unfinished(tmp_path, "other"))


@pytest.mark.parametrize("family", ["tiny-dit", "tiny-flux"])
def test_matrices_held_as_products_take_them_give_the_same_bits(family: str) -> None:
    """LoRA and predictor learn in float32 on them, too."""
    learnt = []
    for held in (False, True):
        adapter = make_adapter(family)
        if held:
            adapter.hold_matrices(torch.bfloat16)
        images = torch.randn(20, *adapter.spec.latent_shape, generator=torch.Generator().manual_seed(0))
        data = Dataset(images, make_prompt(adapter, 20))
        learnt.append(made(adapter, data, "tokencache", dtype="bf16", prompts=partial(_shown, adapter)))
    assert same(*learnt)
    assert {tensor.dtype for tensor in learnt[1]["refiners"].values()} == {torch.float32}
    first, *others = (
        {part.weight.dtype for part in block.modules() if isinstance(part, nn.Linear)} for block in adapter.blocks
    )
    assert first == {torch.float32} and all(torch.bfloat16 in dtypes for dtypes in others)


def _shown(adapter: Adapter, index: torch.Tensor) -> Prompt:
    return make_prompt(adapter, len(index))


@pytest.mark.parametrize("name", METHODS)
def test_what_learns_is_float32_where_products_are_of_16_bits(model: Adapter, data: Dataset, name: str) -> None:
    exact, rounded = made(model, data, name), made(model, data, name, dtype="bf16")
    learnt = [*rounded["refiners"].values(), *rounded["scorers"].get("predictor", {}).values()]
    assert all(tensor.dtype == torch.float32 for tensor in learnt)
    for one, other in zip(exact["log"]["stages"], rounded["log"]["stages"], strict=True):
        for key in {"cache_loss", "training_loss"} & one.keys():
            # bfloat16's rounding adds its own variance: a tenth of the errors of an untrained model, a third of those
            # along chains, all of those at full steps
            assert one[key] != other[key] and other[key] == pytest.approx(one[key], rel=0.2, abs=1.3e-5)
