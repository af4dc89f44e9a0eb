"""ToMe merging: beside a slow one by hand, token by token, in both executions; its price; what is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.bipartite import draw_destinations
from tcbench.budget.costing import macs_of
from tcbench.engine.engine import Engine
from tcbench.engine.fused import FusedBlocks
from tcbench.engine.plain import PlainBlocks
from tcbench.errors import UserError
from tcbench.method import Method, Run
from tcbench.models.dit import DiTAdapter
from tcbench.plan import HOLD, NONE, Block, Decision, Merged, Plan, PlanError, Site
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tests.floors import NETWORK, assert_close

from .conftest import make_run, model_inputs

NFE, STEP, TOKENS, ROWS = 4, 2, 64, 4
both = pytest.mark.parametrize("blocks", [PlainBlocks, partial(FusedBlocks, backend="torch")], ids=["plain", "fused"])


def merging(**options: object) -> Method:
    return make_method("tome_merge", options)


@pytest.fixture(scope="module")
def run(tiny: DiTAdapter) -> Run:
    return make_run(tiny, NFE, torch.arange(ROWS // 2))


def groups_by_hand(x_ND: Tensor, destinations: list[int], merged: int) -> list[list[int]]:
    """The tokens of every group: a destination with the sources that are most like it, or a source alone."""
    sources = [token for token in range(len(x_ND)) if token not in destinations]
    best = {}
    for source in sources:
        likeness = [F.cosine_similarity(x_ND[source], x_ND[token], dim=0).item() for token in destinations]
        best[source] = max(likeness), destinations[likeness.index(max(likeness))]
    gone = sorted(sources, key=lambda source: -best[source][0])[:merged]
    groups = {token: [token] for token in [*destinations, *(source for source in sources if source not in gone)]}
    for source in gone:
        groups[best[source][1]].append(source)
    return list(groups.values())


def merged_by_hand(module: torch.nn.Module, h_RND: Tensor, groups: list[list[list[int]]]) -> Tensor:
    """A module of the model on the means of every group, row by row, and its output at all tokens of the group."""
    out = torch.full_like(h_RND, float("nan"))
    for row, of_row in enumerate(groups):
        means = torch.stack([h_RND[row, tokens].mean(0) for tokens in of_row])
        for tokens, value in zip(of_row, module(means[None])[0], strict=True):
            out[row, tokens] = value
    return out


def forward_by_hand(adapter: DiTAdapter, run: Run, x: Tensor, condition, cell: int, merged: int, mlp: bool) -> Tensor:
    """x^L, every block by diffusers' own attention and MLP."""
    cells = (8 // cell) ** 2
    for number, block in enumerate(adapter.blocks):
        destinations = draw_destinations(run, cell)[STEP, number, :cells].tolist()
        groups = [groups_by_hand(row, destinations, merged) for row in x]
        apart = [[[token] for token in range(TOKENS)]] * len(x)
        attn, ff = adapter.modulation(block, condition).values()
        x = x + attn.gate * merged_by_hand(block.attn1, block.norm1.norm(x) * (1 + attn.scale) + attn.shift, groups)
        of_mlp = groups if mlp else apart
        x = x + ff.gate * merged_by_hand(block.ff, block.norm3(x) * (1 + ff.scale) + ff.shift, of_mlp)
    return x


@both
@pytest.mark.parametrize(
    ("cell", "ratio", "parts"), [(2, 0.5, "attention"), (2, 0.75, "attention-mlp"), (4, 0.7, "all"), (3, 0.3, "all")]
)
def test_a_forward_is_what_loops_make_of_it(tiny, run, blocks, cell: int, ratio: float, parts: str) -> None:
    method = merging(cell=cell, ratio=ratio, parts=parts)
    engine = Engine(tiny, run, method.start(run), blocks)
    latent, prompt = model_inputs(tiny, ROWS)
    with torch.inference_mode():
        x, condition = engine.embed(STEP, latent, engine.prepare(prompt))
        merged = engine.hidden(engine.plan(STEP, x, condition), STEP, x, condition)
        by_hand = forward_by_hand(tiny, run, x, condition, cell, int(64 * ratio), mlp=parts != "attention")
        assert_close(merged, by_hand, NETWORK)
        uncached = engine.hidden(Plan(), STEP, x, condition)
    assert (merged - uncached).abs().max() > 0.01
    assert engine.cache.num_bytes() == 0, "merging holds nothing"


def test_nothing_merged_is_the_plain_model(tiny) -> None:
    settings, index = SamplerSettings(guidance_scale=1.5), torch.arange(2)
    plain = sample_batch(tiny, make_method("uncached", {}), NFE, settings, index)
    assert torch.equal(sample_batch(tiny, merging(ratio=0.0), NFE, settings, index).image, plain.image)


def test_what_merging_costs(tiny) -> None:
    """Products for the tokens that are left, the matching once a block, and norms of all tokens."""
    samples = sample_batch(tiny, merging(parts="all"), NFE, SamplerSettings(guidance_scale=1.5), torch.arange(2))
    totals, whole = (macs_of("tiny-dit", method, NFE) for method in (merging(parts="all"), make_method("uncached", {})))
    assert {key: totals[key] for key in samples.macs} == samples.macs
    assert totals["by_tag"]["score"] == 2 * 4 * NFE * (64 - 16) * 16 * 96
    of_token, of_pair = 12 * 96**2, 2 * 96  # layers, and the two products of attention
    saved = 2 * 4 * NFE * (of_token * (64 - 32) + of_pair * (64**2 - 32**2))
    assert whole["by_tag"]["model"] - totals["by_tag"]["model"] == saved
    norms, of_whole = (each["paper_rule"] - each["by_tag"]["model"] for each in (totals, whole))
    assert norms == of_whole
    assert samples.plans.i_steps == () and totals["full_steps"] == 0


@pytest.mark.parametrize("options", [{"cell": 1}, {"ratio": 0.1, "cell": 1}, {"cell": 9}])
def test_cells_limit_what_can_be_merged(run, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"tome_merge: cells of \d x \d keep \d+ of 64 tokens, ratio .* at most \d"):
        merging(**options).start(run)


def pairs(**changed: Tensor) -> Merged:
    """Every even token with its right neighbour."""
    every_RN = torch.arange(TOKENS).expand(ROWS, -1)
    return Merged(**({"index_RK": every_RN[:, ::2], "group_RN": every_RN // 2} | changed))


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        ({Block(1): Decision(pairs())}, "a plan merges tokens at block 1; merge those of parts"),
        ({Site(1, "mlp"): Decision(pairs(), keys="cached")}, "which hold, keep and show nothing"),
        ({Site(1, "mlp"): Decision(pairs(), observe="values")}, "which hold, keep and show nothing"),
        (
            {Site(1, "mlp"): Decision(pairs(group_RN=torch.zeros(ROWS, 3).long()))},
            r"are \[4, 3\]; the tokens are \[4, 64\]",
        ),
        ({Site(1, "mlp"): Decision(pairs(group_RN=torch.zeros(ROWS, TOKENS).long()))}, "a group is not of the token"),
        ({Site(1, "mlp"): Decision(pairs(index_RK=torch.zeros(ROWS, 32).long()))}, "a token is chosen twice"),
        ({Site(1, "mlp"): Decision(pairs(index_RK=pairs().index_RK[:2]))}, "the index of tokens has 2 rows"),
    ],
)
def test_what_cannot_be_merged_is_refused(tiny, run, decision: dict, says: str) -> None:
    engine = Engine(tiny, run)
    latent, prompt = model_inputs(tiny, ROWS)
    with torch.inference_mode(), pytest.raises(PlanError, match=says):
        engine.hidden(Plan(decision), 0, *engine.embed(0, latent, engine.prepare(prompt)))


def test_a_merged_value_is_not_there_to_be_held(tiny, run) -> None:
    engine, site = Engine(tiny, run), Site(1, "mlp")
    latent, prompt = model_inputs(tiny, ROWS)
    with torch.inference_mode():
        x, condition = engine.embed(0, latent, engine.prepare(prompt))
        engine.hidden(Plan({site: Decision(pairs())}), 0, x, condition)
        with pytest.raises(PlanError, match="read before it was written"):
            engine.hidden(Plan({site: Decision(NONE, HOLD)}), 1, x, condition)
