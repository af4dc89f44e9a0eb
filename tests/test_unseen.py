"""Costing sees tensors by their shape alone: the same MACs as with torch's meta tensors, for every method."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tcbench.budget import costing
from tcbench.choose import AttentionScore, best_tokens, choose_by_attention, counted, top_tokens, top_tokens_by_block
from tcbench.method import Look, Method
from tcbench.plan import ALL, Block, Decision, Plan, every_unit
from tcbench.registry import make_method, method_names
from tcbench.tensors.unseen import is_unseen, on_values, unseen

FEW_FREE = {"num_full_steps": 5, "refiner_blocks": 1}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dbcache": [{"first_blocks": 1, "last_blocks": 1}],
    "fewer_steps": [{"steps": 5}],
    "fora": [{}, {"num_full_steps": 7}],
    "no_tokens": [FEW_FREE, FEW_FREE | {"schedule": "adaptive"}],
    "oracle_tokens": [FEW_FREE | {"allocation": kind, "keys": "fresh"} for kind in ("batch", "uniform")],
    "random_tokens": [FEW_FREE | {"cache_ratio": ratio} for ratio in (0.0, 0.93, 1.0)],
    "toca": [{"schedule": kind, "fresh_ratio": 0.31} for kind in ("ddim50", "ddpm250", "pixart", "constant")],
    "toca_tokens": [FEW_FREE | {"schedule": kind} for kind in ("even", "adaptive", "reversed")],
    "tokencache": [
        FEW_FREE | {"beta": -8e3, "allocation": kind, "keys": keys, "guided_halves": halves}
        for kind, keys, halves in (
            ("batch", "cached", "independent"),
            ("batch", "fresh", "shared"),
            ("uniform", "recomputed", "shared"),
        )
    ],
    "tome": [FEW_FREE | {"cache_ratio": 0.6, "cell": 2}],
}


def on_meta(*shape: int, dtype: str = "float32", values: Any = None) -> torch.Tensor:
    """What `unseen` stands for."""
    if values is not None:
        return torch.tensor(values, dtype=getattr(torch, dtype))
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


@pytest.mark.parametrize("model", ["tiny-dit", "tiny-pixart", "tiny-osp"])
@pytest.mark.parametrize("name", method_names())
def test_macs_are_those_of_meta_tensors(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in OPTIONS.get(name, [{}]):
        method = make_method(name, options)
        light = costing.macs_of(model, method, 20)
        with monkeypatch.context() as patch:
            patch.setattr(costing, "unseen", on_meta)
            assert costing.macs_of(model, method, 20) == light, options


class Own(Method):
    """A method with arithmetic of its own, which knows nothing of unseen tensors."""

    name = "own"
    label = "own"

    def plan(self, look: Look) -> Plan:
        """Everything at first; then a quarter of the tokens by a score that torch computes."""
        blocks = [Block(block) for block in range(look.run.shape.num_blocks)]
        if look.step == 0:
            return every_unit(blocks, ALL)
        assert int(look.run.sample_index[0]) == 0
        halves = torch.stack([2 * row - 1 for row in look.uniform()]).chunk(2)
        score = torch.cat([torch.maximum(*halves) + torch.zeros(()), -halves[0].abs()])
        score = score + look.latent().square().mean(2, keepdim=True).transpose(1, 2)
        chosen = top_tokens_by_block(score, [look.run.shape.num_tokens // 4] * len(blocks))
        return Plan({block: Decision(tokens, keys="cached") for block, tokens in zip(blocks, chosen, strict=True)})


def test_a_method_may_compute_on_what_it_looks_at() -> None:
    macs = costing.macs_of("tiny-dit", Own(), 10)["per_sample"]
    same = make_method("random_tokens", {"num_full_steps": 1, "cache_ratio": 0.75, "refiner_blocks": 0})
    assert macs == costing.macs_of("tiny-dit", same, 10)["per_sample"]


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[1],
        lambda x: x[-1, 2:],
        lambda x: x[:, 1, ::2],
        lambda x: x[:0],
        lambda x: x[5:2, 0:],
        lambda x: x[:, :, 3:100],
    ],
)
def test_parts_of_an_unseen_tensor_stay_unseen(part: Callable[[Any], Any]) -> None:
    seen = part(unseen(2, 3, 8, dtype="int64"))
    assert is_unseen(seen) and seen.shape == part(on_meta(2, 3, 8, dtype="int64")).shape
    assert seen.tensor.dtype == torch.int64


def test_the_rest_is_done_with_the_tensor_itself() -> None:
    x = unseen(2, 3)
    for value in (x + 1, 1 - x, -x, x / x, x > 0, x @ x.T @ x, torch.where(x > 0, x, 0 * x), x[:, [0, 1]]):
        assert isinstance(value, torch.Tensor) and value.is_meta
    assert [row.shape for row in x] == [(3,), (3,)] and len(x) == 2
    with pytest.raises(IndexError):
        x[2]
    with pytest.raises(IndexError):
        x[0, 0, 0]
    with pytest.raises(RuntimeError, match="meta"):
        bool(x.sum() > 0)
    assert unseen(2, dtype="int64", values=[3, 4])[1] == 4


def test_choices_of_unseen_scores_are_known_by_count() -> None:
    score_RLN = unseen(2, 3, 16)
    assert counted(5).count == 5
    assert top_tokens(score_RLN[:, 0], 4).count == 4
    assert [tokens.count for tokens in top_tokens_by_block(score_RLN, [3, 0, 16])] == [3, 0, 16]
    assert [tokens.count for tokens in best_tokens(score_RLN, 10)] == [4, 3, 3]
    score = AttentionScore((4, 4), 0.25, 3, 0.6)
    chosen = choose_by_attention(score, [score_RLN[:, b] for b in range(3)], [0, 0, 0], 1, [2, 5, 0])
    assert [(index.shape, value.shape, last.shape) for index, value, last in chosen] == [
        ((2, count), (2, 16), (2, 16)) for count in (2, 5, 0)
    ]
    for choose in (lambda: top_tokens(score_RLN[:, 0], 17), lambda: top_tokens_by_block(score_RLN, [17, 0, 0])):
        with pytest.raises(ValueError, match="17 of 16 tokens"):
            choose()


def test_on_values_computes_where_there_are_some() -> None:
    assert torch.equal(on_values(torch.square, torch.tensor([3]), shape=(1,)), torch.tensor([9]))
    assert on_values(torch.square, unseen(2, 5), shape=(2, 5)).shape == (2, 5)
