"""What a token selector inherits: a method of a user's own says which tokens, and nothing else."""

from pathlib import Path

import pytest
import torch

from tcbench.budget.costing import macs_of
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.outside.places import ADDED_METHODS
from tcbench.plan import ALL, Block
from tcbench.registry import documentation, make_method, method_class
from tcbench.selector import TokenSelector, spend
from tests.test_toca_tokens import ROWS, FakeLook, run_of

FIRST = '''
"""The first tokens of every block."""

import torch

from tcbench.method import Look
from tcbench.plan import Tokens
from tcbench.selector import TokenSelector


class First(TokenSelector):
    """Recompute the first tokens.

    Options:
        surplus: blocks too many that it chooses tokens of.
    """

    name = "first_of_all"
    label = "first tokens"

    surplus: int = 0

    def choose(self, look: Look) -> list[Tokens]:
        """As many in every block."""
        rows = look.run.rows_per_sample * len(look.run.sample_index)
        index_RK = torch.arange(self.kept(look.run)).expand(rows, -1)
        return [Tokens(index_RK)] * (self.free_blocks(look.run) + self.surplus)
'''
OPTIONS = {"num_full_steps": 2, "refiner_blocks": 1, "cache_ratio": 0.75, "keys": "recomputed"}


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    """A selector in a user's folder."""
    (tmp_path / "first_of_all.py").write_text(FIRST, encoding="utf-8")
    monkeypatch.setenv(ADDED_METHODS, str(tmp_path))
    return make_method("first_of_all", OPTIONS)


def test_a_selector_is_its_choice_alone(first: Method) -> None:
    look = FakeLook(run_of(6))
    for look.step in range(6):
        plan = first.start(look.run).plan(look)
        assert list(plan.decisions) == [Block(0), Block(1)], "refiners are left alone"
        for decision in plan.decisions.values():
            assert decision.keys == "recomputed"
            assert (decision.who is ALL) == (look.step in (0, 3))
            assert decision.who is ALL or decision.who.index_RK.tolist() == [[0, 1, 2, 3]] * ROWS


def test_it_costs_what_random_tokens_do(first: Method) -> None:
    random = macs_of("tiny-dit", make_method("random_tokens", OPTIONS), 6)
    assert macs_of("tiny-dit", first, 6)["per_sample"] == random["per_sample"]


def test_inherited_options_are_explained(first: Method) -> None:
    text = documentation(type(first))
    assert all(f"        {option}: " in text for option in type(first).model_fields)
    assert documentation(method_class("fora")) == method_class("fora").__doc__.rstrip()


def test_a_block_without_a_choice_is_no_plan(first: Method) -> None:
    for surplus in (-1, 1):
        with pytest.raises(UserError, match=r"methods/first_of_all\.py: step 1: ValueError: .*(shorter|longer)"):
            first.model_copy(update={"surplus": surplus}).plan(FakeLook(run_of(6), step=1))


def test_a_selector_that_chooses_nothing_is_told() -> None:
    class Nameless(TokenSelector):
        name = "nameless"

    with pytest.raises(UserError, match=r"methods/nameless\.py: step 1: .*neither choose\(look\) nor start\(run\)"):
        Nameless(**OPTIONS).plan(FakeLook(run_of(6), step=1))


def test_blocks_share_a_budget_by_score_or_evenly() -> None:
    """Scores of the second block above those of the others: it gets all of its tokens first."""
    score_RLN = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(0))
    score_RLN[:, 1] += 1
    best, even = spend(score_RLN, 14, "batch"), spend(score_RLN, 14, "uniform")
    assert best[1].count == 10 and sum(tokens.count for tokens in best) == 14
    assert [tokens.count for tokens in even] == [4, 4, 3, 3]
    for block, tokens in enumerate(even):
        ranked = score_RLN[:, block].argsort(dim=1, descending=True)[:, : tokens.count]
        assert torch.equal(tokens.index_RK.sort(dim=1).values, ranked.sort(dim=1).values)
