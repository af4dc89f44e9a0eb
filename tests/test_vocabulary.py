"""What plans can say beyond holding: mixes, groups that are told, checks, a held output, rows; in both executions."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tcbench.budget.costing import macs_of
from tcbench.engine.cache import Cache
from tcbench.engine.engine import Engine
from tcbench.engine.fused import FusedBlocks
from tcbench.engine.plain import PlainBlocks
from tcbench.extrapolate import combine, hermite, quotient_weights, taylor
from tcbench.ledger import block_macs
from tcbench.method import Run
from tcbench.models.dit import DiTAdapter
from tcbench.plan import (
    ALL,
    NONE,
    Block,
    Decision,
    Deferred,
    Fill,
    Forecast,
    Hold,
    Mix,
    Output,
    Plan,
    PlanError,
    Rows,
    Site,
    Spread,
    Tokens,
    every_unit,
)
from tcbench.registry import make_method
from tests.floors import NETWORK, assert_close

from .conftest import make_run, model_inputs

ROWS, NFE, TOKENS = 4, 6, 64
MLP, ATTENTION = Site(1, "mlp"), Site(1, "attn")
close = partial(assert_close, floor=NETWORK)
both = pytest.mark.parametrize("blocks", [PlainBlocks, partial(FusedBlocks, backend="torch")], ids=["plain", "fused"])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def run(tiny: DiTAdapter) -> Run:
    return make_run(tiny, NFE, torch.arange(ROWS // 2))


class Walk:
    """Plans one after another on latents that drift."""

    def __init__(self, adapter: DiTAdapter, run: Run, blocks) -> None:
        self.engine, self.step = Engine(adapter, run, blocks=blocks), -1
        self.latent, prompt = model_inputs(adapter, ROWS)
        self.drift, _ = model_inputs(adapter, ROWS, seed=1)
        self.context = self.engine.prepare(prompt)

    def __call__(self, plan: Plan) -> Tensor:
        """x^L of the next step."""
        self.step += 1
        x, condition = self.engine.embed(self.step, self.latent + 0.3 * self.step * self.drift, self.context)
        return self.engine.hidden(plan, self.step, x, condition).clone()

    def value(self, unit: Site | Block, fill: Fill | None = None) -> Tensor:
        return self.engine.cache.read(unit, fill or Hold(), self.step).clone()


def decided(**by_part: Decision) -> Plan:
    return Plan({Site(1, part): decision for part, decision in by_part.items()})


# --- mixes


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_hold_and_forecast_are_mixes(order: int) -> None:
    steps, unit = (0, 1, 4, 7), Block(0)
    mixed, forecast = Cache(), Cache()
    for number, step in enumerate(steps):
        value = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        forecast.store(unit, value, step, Forecast(order))
        mixed.store(unit, value, step, Mix.keeping(order + 1))
        behind = steps[number::-1][: order + 1]
        for now in (step, step + 2):
            weights = combine(quotient_weights(behind, order), taylor(now - step, order))
            expected = forecast.read(unit, Forecast(order), now)
            torch.testing.assert_close(mixed.read(unit, Mix(weights), now), expected, rtol=1e-12, atol=1e-12)
        assert mixed.read(unit, Mix.keeping(2), step + 2) is forecast.read(unit, Hold(), step + 2) is value


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0])
def test_hermite_polynomials_by_hand(scale: float) -> None:
    x = scale * 3
    by_hand = [1, scale * 2 * x, scale**2 * (4 * x**2 - 2) / 2, scale**3 * (8 * x**3 - 12 * x) / 6]
    assert hermite(3, 3, scale) == pytest.approx(by_hand)


def test_a_mix_of_used_values_goes_on_from_what_it_made() -> None:
    cache, unit, hold, line = Cache(), Block(0), Mix.keeping(2, "used"), Mix((2.2, -1.2), "used")
    used = [torch.tensor([[[number]]]) for number in (1.0, 3.0)]
    for step, value in enumerate(used):
        cache.store(unit, value, step, hold)
    for step, fill in enumerate([line, hold, line, line], start=2):
        before = [value.item() for value in used[-2:]]
        used.append(cache.read(unit, fill, step))
        assert used[-1].item() == pytest.approx(before[1] if fill is hold else 2.2 * before[1] - 1.2 * before[0])


def test_a_mix_of_more_values_than_were_kept_is_refused() -> None:
    cache, unit = Cache(), Block(0)
    for step in range(3):
        cache.store(unit, torch.ones(1, 1, 1), step, Mix.keeping(2))
    with pytest.raises(PlanError, match="block 0: a fill mixes 3 values, and 2 were stored"):
        cache.read(unit, Mix((1.0, 0.0, 1.0)), 3)
    assert cache.num_bytes() == 8


# --- some tokens and a forecast; groups


def some(count: int = 5, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.stack([torch.randperm(TOKENS, generator=generator)[:count] for _ in range(ROWS)]))


@both
@pytest.mark.parametrize("fill", [Forecast(1), Mix((1.5, -0.5))], ids=["forecast", "mix"])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.25])
def test_fresh_tokens_are_extrapolated_and_tell_their_groups(
    tiny: DiTAdapter, run: Run, blocks, fill: Fill, ratio: float | None
) -> None:
    """Beside a walk that holds, so that all of its tokens meet the same stream."""
    keep = fill if isinstance(fill, Forecast) else Mix.keeping(2)
    walk, holds = Walk(tiny, run, blocks), Walk(tiny, run, PlainBlocks)
    for _ in range(2):
        for each in (walk, holds):
            each(decided(mlp=Decision(ALL, keep)))
    old, tokens = walk.value(MLP), some()
    if ratio is not None:  # a token twice, in rows where it belongs to the first group
        tokens = Tokens(torch.cat([tokens.index_RK, tokens.index_RK[:, :1]], dim=1))
    group_RN = torch.arange(TOKENS).expand(ROWS, -1) % 7
    spread = None if ratio is None else Spread(group_RN, ratio)
    walk(decided(mlp=Decision(tokens, fill, spread=spread)))
    holds(decided(mlp=Decision(ALL)))
    index = tokens.index_RK[:, :, None].expand(-1, -1, old.shape[2])
    fresh = holds.value(MLP).gather(1, index)
    expected = old.scatter(1, index, fresh)
    if ratio:
        told = torch.zeros_like(expected)
        for row in range(ROWS):
            for place, token in enumerate(tokens.index_RK[row].tolist()):
                told[row, group_RN[row] == group_RN[row, token]] += fresh[row, place]
        expected = ratio * told + (1 - ratio) * expected
    close(walk.value(MLP), expected)
    if isinstance(fill, Forecast):
        assert walk.engine.plans.to_json()[2] == {"block 1 mlp": len(tokens.index_RK[0])}
        close(walk.value(MLP, fill) - walk.value(MLP), old - first_value(tiny, run))


def first_value(adapter: DiTAdapter, run: Run) -> Tensor:
    walk = Walk(adapter, run, PlainBlocks)
    walk(decided(mlp=Decision(ALL)))
    return walk.value(MLP)


# --- observations and checks


@both
def test_what_is_observed_is_the_stream_and_the_values(tiny: DiTAdapter, run: Run, blocks) -> None:
    walk = Walk(tiny, run, blocks)
    last = Site(tiny.shape.num_blocks - 1, "mlp")
    stream = walk(Plan({ATTENTION: Decision(ALL, observe="values"), last: Decision(ALL, observe="output")}))
    cache = walk.engine.cache
    close(cache.output(last.block), stream)
    module = tiny.blocks[1]
    alone = Walk(tiny, run, PlainBlocks)
    alone(Plan({Site(0, "mlp"): Decision(ALL, observe="output")}))
    x = alone.engine.cache.output(0)
    h = tiny.part_input(
        module, "attn", x, tiny.modulation(module, alone.engine.embed(0, alone.latent, alone.context)[1])["attn"]
    )
    values = module.attn1.to_v(h).unflatten(2, (tiny.spec.num_heads, -1))
    close(cache.value_norms(1), values.norm(dim=3).mean(dim=2))
    assert "score" not in walk.engine.ledger.by_tag


@both
def test_a_check_changes_nothing_and_says_what_computing_gives(tiny: DiTAdapter, run: Run, blocks) -> None:
    checked, unchecked = Walk(tiny, run, blocks), Walk(tiny, run, blocks)
    last = tiny.shape.num_blocks - 1
    for walk in (checked, unchecked):
        walk(every_unit(tiny.shape.sites, ALL))
    draft = every_unit(tiny.shape.sites, NONE)
    used = checked(Plan(draft.decisions, checks=(0, last)))
    assert torch.equal(used, unchecked(draft))
    pair = checked.engine.cache.checked(last)
    close(pair[:, 0], used)
    drafted = {site: decision for site, decision in draft.decisions.items() if site.block != last}
    other = Walk(tiny, run, PlainBlocks)
    other(every_unit(tiny.shape.sites, ALL))
    close(pair[:, 1], other(Plan(drafted)))
    assert checked.engine.plans == unchecked.engine.plans
    charged = checked.engine.ledger.by_tag
    assert charged["check"] == (block_macs(tiny.shape, 0, None) + block_macs(tiny.shape, last, None)) * 2
    assert charged["model"] == unchecked.engine.ledger.by_tag["model"]


# --- the output


@both
@pytest.mark.parametrize("unit", [Block(0), Site(0, "mlp")], ids=str)
def test_a_held_output_is_that_of_the_step_before(tiny: DiTAdapter, run: Run, blocks, unit: Site | Block) -> None:
    """Whatever was computed then, and whatever is computed now; what is computed now is stored."""
    walk, rest = Walk(tiny, run, blocks), [Block(block) for block in range(1, tiny.shape.num_blocks)]
    output = {Output(): Decision(ALL)}
    first = {unit: Decision(ALL)} | ({} if isinstance(unit, Block) else {Site(0, "attn"): Decision(ALL)})
    others = every_unit(rest, NONE).decisions
    walk(Plan({**first, **every_unit(rest, ALL).decisions, **output}))
    before = walk(Plan({**first, **others, **output}))
    held = Plan({**first, **others, Output(): Decision(NONE)})
    stored = walk.value(unit)
    assert torch.equal(walk(held), before)
    assert torch.equal(walk(held), before)
    assert not torch.equal(walk.value(unit), stored)
    assert walk.engine.plans.to_json()[-1]["output"] == "none"


# --- rows


@both
def test_rows_are_computed_or_held_each_for_itself(tiny: DiTAdapter, run: Run, blocks) -> None:
    mask = (True, False, False, True)
    computed, held, mixed = (Walk(tiny, run, blocks) for _ in range(3))
    for walk in (computed, held, mixed):
        walk(every_unit(tiny.shape.sites, ALL))
    with FlopCounterMode(display=False) as counter:
        stream = mixed(every_unit(tiny.shape.sites, Rows(mask)))
    with FlopCounterMode(display=False) as half:
        every = computed(every_unit(tiny.shape.sites, ALL))
    nothing = held(every_unit(tiny.shape.sites, NONE))
    for row, fresh in enumerate(mask):
        close(stream[row], (every if fresh else nothing)[row])
    ledgers = [walk.engine.ledger.by_tag["model"].matmul for walk in (mixed, computed, held)]
    assert 2 * ledgers[0] == ledgers[1] + ledgers[2]
    assert counter.get_total_flops() < half.get_total_flops()
    assert set(mixed.engine.plans.to_json()[1].values()) == {"rows 2/4"}


@both
def test_a_deferred_decision_sees_the_modulated_input(tiny: DiTAdapter, run: Run, blocks) -> None:
    seen: list[Tensor] = []

    def choose(modulated) -> Rows:
        seen.append(modulated().clone())
        return Rows((False,) * ROWS)

    walk = Walk(tiny, run, blocks)
    walk(every_unit(tiny.shape.sites, ALL))
    walk(Plan({Site(0, "attn"): Decision(Deferred(choose, like=ALL, sees="modulated"))}))
    x, condition = walk.engine.embed(1, walk.latent + 0.3 * walk.drift, walk.context)
    module = tiny.blocks[0]
    close(seen[0], tiny.part_input(module, "attn", x, tiny.modulation(module, condition)["attn"]))
    assert walk.engine.plans.to_json()[1] == {"block 0 attn": "none"}


# --- costs


@pytest.mark.parametrize(
    ("name", "options", "nfe", "teramacs"),
    [
        ("hicache", {"interval": 3}, 50, 4.286),
        ("goc", {}, 20, 3.561),
        ("duca", {}, 50, 4.791),
        ("procache", {}, 50, 4.107),
        ("clusca", {}, 50, 2.9995),
    ],
)
def test_released_settings_cost_what_their_code_counts(name: str, options: dict, nfe: int, teramacs: float) -> None:
    """Half of the published FLOPs, which leave K-means and choices out, as the ledger does."""
    digits = len(str(teramacs).partition(".")[2])
    assert round(macs_of("dit-xl-2-256", make_method(name, options), nfe)["per_sample"] / 1e12, digits) == teramacs
