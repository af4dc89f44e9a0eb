"""Training by two processes gives what one gives, to rounding; killed and started again, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tcbench.data import Dataset, split
from tcbench.errors import UserError
from tcbench.models.adapter import Adapter
from tcbench.plan import ALL, Block, Decision, Deferred, Merged, Plan, PlanError, Site, Tokens
from tcbench.record.files import read_json, read_tensors
from tcbench.registry import data_source
from tcbench.training.base import PretrainRecipe, pretrain_denoiser
from tcbench.training.crew import ALONE, Crew, Member, train_together
from tcbench.training.unfinished import Unfinished
from tests.conftest import make_adapter
from tests.test_base_training import SMALL
from tests.test_unfinished import Killed, killed_after, made, same

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(torch.randn(12, 4, 16, 16, generator=generator), torch.arange(12) % 10)


@pytest.fixture(scope="module")
def model() -> Adapter:
    return make_adapter("tiny-dit")


def by_two(folder: Path, model: Adapter, data: Dataset, name: str, kept: Path | None = None, dying: int = -1) -> Any:
    """What the first of two processes returns; both die in an optimiser's step of that number, if one is given."""
    folder.mkdir(exist_ok=True)

    def work(crew: Crew) -> None:
        if dying >= 0:
            killed_after(pytest.MonkeyPatch(), dying)
        unfinished = Unfinished(kept, "key", writes=crew.rank == 0) if kept else None
        try:
            result = made(model, data, name, unfinished, crew=crew)
        except Killed:
            return
        torch.save(result, folder / f"{crew.rank}.pt")

    train_together(2, True, work)
    if dying >= 0:
        return None
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert same(first, second), "both learn the same"
    return first


def close(one: Any, other: Any) -> None:
    """Equal numbers, to rounding: gradients add up in another order, and AdamW divides by their size."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, others in zip(one, other, strict=True):
            close(mine, others)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    else:
        assert one == other or one is other or type(one).__module__.startswith("tcbench")


@pytest.mark.parametrize("name", ["tokencache", "learning_to_cache"])
def test_two_processes_give_what_one_gives_and_go_on_after_a_kill(
    tmp_path: Path, model: Adapter, data: Dataset, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """TokenCache shares out tokens over blocks by the scores of the whole batch, of which each process has half."""
    monkeypatch.setattr("tcbench.training.unfinished.EVERY", 0.0)
    alone = made(model, data, name)
    together = by_two(tmp_path / "whole", model, data, name)
    close(together, alone)
    by_two(tmp_path / "killed", model, data, name, tmp_path / "kept", dying=4)
    assert list((tmp_path / "kept").glob("stage-0.pt"))
    assert same(by_two(tmp_path / "again", model, data, name, tmp_path / "kept"), together)


def test_a_base_model_learns_from_two_shares_what_it_learns_from_the_whole(tmp_path: Path) -> None:
    data = data_source("digits").images()
    recipe = PretrainRecipe(iterations=6, batch_size=8, warmup=2, ema=0.5, log_every=3)

    def work(crew: Crew) -> None:
        folder = tmp_path / str(crew.size)
        paths = folder / "w.safetensors", folder / "log.json"
        pretrain_denoiser(SMALL, *split(data), "eps", recipe, "cpu", *paths, crew=crew)

    work(ALONE)
    train_together(2, True, work)
    alone, together = (read_tensors(tmp_path / count / "w.safetensors") for count in "12")
    assert (alone[1]["processes"], together[1]["processes"]) == ("1", "2")
    for name, weight in alone[0].items():
        torch.testing.assert_close(together[0][name], weight, rtol=1e-2, atol=2e-3)
    histories = [read_json(tmp_path / count / "log.json")["history"] for count in "12"]
    close(*histories)
    assert not list((tmp_path / "2").glob("*-state.pt"))


def test_by_itself_a_crew_changes_nothing() -> None:
    rows = torch.arange(3.0)
    assert ALONE.share(rows) is rows and ALONE.joined(rows) is rows and ALONE.mean(rows) is rows


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    member = Member.__new__(Member)
    member.rank, member.size = 1, 3
    assert member.share(torch.arange(6)).tolist() == [2, 3]
    with pytest.raises(UserError, match="3 GPUs do not share a batch of 4 equally; give a divisor of it"):
        member.share(torch.arange(4))


def test_what_one_process_refuses_is_said_in_its_words() -> None:
    def work(crew: Crew) -> None:
        raise UserError("no: give another")

    with pytest.raises(UserError, match=r"^no: give another$"):
        train_together(2, True, work)


def test_a_plan_for_some_rows() -> None:
    plan = Plan({Block(0): Decision(Tokens(torch.tensor([[1, 2], [3, 4]]))), Block(1): Decision(ALL)})
    some = plan.of_rows(torch.tensor([1])).decisions
    assert some[Block(0)].who.index_RK.tolist() == [[3, 4]] and some[Block(1)] == plan.decisions[Block(1)]  # type: ignore[union-attr]
    groups = torch.tensor([[0, 1, 1], [1, 0, 0]])
    merged = Plan({Site(0, "attn"): Decision(Merged(torch.tensor([[0, 1], [1, 0]]), groups))})
    who = merged.of_rows(torch.tensor([1])).decisions[Site(0, "attn")].who
    assert who.index_RK.tolist() == [[1, 0]] and who.group_RN.tolist() == [[1, 0, 0]]  # type: ignore[union-attr]
    deferred = Plan({Block(0): Decision(Deferred(lambda stream: ALL, like=ALL))})
    with pytest.raises(PlanError, match="cannot be shared out"):
        deferred.of_rows(torch.tensor([0]))
