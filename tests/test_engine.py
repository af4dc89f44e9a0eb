"""The engine against dense re-implementations in plain torch: who is recomputed, from what, and what fills the rest."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.choose import top_tokens
from tcbench.engine.cache import Cache
from tcbench.engine.engine import Engine
from tcbench.engine.soft import soft_hidden
from tcbench.ledger import plan_macs
from tcbench.method import Run
from tcbench.models import adapter as adapters
from tcbench.models.dit import DiTAdapter
from tcbench.plan import (
    ALL,
    NONE,
    All,
    Block,
    Decision,
    Deferred,
    Forecast,
    Hold,
    Keys,
    Nothing,
    Plan,
    PlanError,
    Site,
    Span,
    Tokens,
    Unit,
    every_unit,
)
from tests.floors import NETWORK, assert_close, deviation

from .conftest import make_run, model_inputs

ROWS, NFE = 4, 6
KEYS: list[Keys] = ["cached", "fresh", "recomputed"]
Embedded = tuple[Tensor, Tensor]  # (tokens [R, N, D], condition [R, D])


@pytest.fixture(scope="module")
def run(tiny: DiTAdapter) -> Run:
    return make_run(tiny, NFE, torch.arange(ROWS // 2))


@pytest.fixture(scope="module")
def steps(tiny: DiTAdapter, run: Run) -> list[Embedded]:
    """A stand-in for a trajectory: latents that drift from step to step, at the run's timesteps."""
    latent, label = model_inputs(tiny, ROWS)
    drift, _ = model_inputs(tiny, ROWS, seed=1)
    engine = Engine(tiny, run)
    with torch.inference_mode():
        embedded = [engine.embed(step, latent + 0.3 * step * drift, label) for step in range(NFE)]
    return [(x.clone(), condition.clone()) for x, condition in embedded]  # ordinary tensors, fit for autograd


def blocks_of(adapter: DiTAdapter) -> list[Unit]:
    return [Block(block) for block in range(adapter.shape.num_blocks)]


def sites_of(adapter: DiTAdapter) -> list[Unit]:
    return list(adapter.shape.sites)


UNITS = pytest.mark.parametrize("units_of", [blocks_of, sites_of], ids=["blocks", "sites"])


def random_tokens(count: int, seed: int, tokens: int = 64) -> Tokens:
    return top_tokens(torch.rand(ROWS, tokens, generator=torch.Generator().manual_seed(seed)), count)


def mask_of(who: Tokens, tokens: int = 64) -> Tensor:
    """[R, N, 1], true where recomputed."""
    return torch.zeros(ROWS, tokens, dtype=torch.bool).scatter_(1, who.index_RK, True).unsqueeze(-1)


close = partial(assert_close, floor=NETWORK)


# --- an independent block


def parts(module: nn.Module, condition: Tensor) -> list[Tensor]:
    return (module.norm1.linear(F.silu(condition))[:, None]).chunk(6, dim=-1)


def attention(module: nn.Module, h: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Explicit softmax attention of all tokens over those that are visible, [R, N, 1]."""
    query, heads = module.attn1.to_q(h), module.attn1.heads

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    logits = split(query) @ split(keys).mT / (query.shape[-1] // heads) ** 0.5
    weights = logits.masked_fill(~visible[:, None, None, :, 0], float("-inf")).softmax(dim=-1)
    return module.attn1.to_out[0]((weights @ split(values)).transpose(1, 2).flatten(2))


def dense_block(module: nn.Module, x: Tensor, condition: Tensor, chosen: Tensor, keys: Keys, store: dict) -> Tensor:
    """A block where the chosen tokens' update is computed and the rest's is the stored one; everything is dense."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts(module, condition)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    new_keys, new_values = module.attn1.to_k(h), module.attn1.to_v(h)
    visible = torch.ones_like(chosen)
    if keys == "cached":
        new_keys = torch.where(chosen, new_keys, store.get("keys", new_keys))
        new_values = torch.where(chosen, new_values, store.get("values", new_values))
        store["keys"], store["values"] = new_keys, new_values
    elif keys == "fresh":
        visible = chosen
    middle = x + gate * attention(module, h, new_keys, new_values, visible)
    h = F.layer_norm(middle, x.shape[-1:], eps=1e-6) * (1 + scale_mlp) + shift_mlp
    update = middle - x + gate_mlp * module.ff.net[2](F.gelu(module.ff.net[0].proj(h), approximate="tanh"))
    store["update"] = torch.where(chosen, update, store.get("update", update))
    return x + store["update"]


@torch.inference_mode()
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("counts", [[10, 25, 1, 40], [64, 3, 30, 7]], ids=str)
def test_tokens_against_a_dense_block(tiny, run, steps, keys: Keys, counts: list[int]) -> None:
    """Over one full step and several partial ones, so that caches age."""
    engine, stores = Engine(tiny, run), [{} for _ in counts]
    everyone = torch.ones(ROWS, 64, 1, dtype=torch.bool)
    for step, (x, condition) in enumerate(steps):
        if step == 0:
            plan, masks = every_unit(blocks_of(tiny), ALL, keys=keys), [everyone] * len(counts)
        else:
            chosen = [random_tokens(count, seed=10 * step + block) for block, count in enumerate(counts)]
            plan = Plan({Block(block): Decision(who, keys=keys) for block, who in enumerate(chosen)})
            masks = [mask_of(who) for who in chosen]
        expected = x
        for module, mask, store in zip(tiny.blocks, masks, stores, strict=True):
            expected = dense_block(module, expected, condition, mask, keys, store)
        close(engine.hidden(plan, step, x, condition), expected)


@torch.inference_mode()
def test_norms_have_the_references_epsilon(tiny, run, steps) -> None:
    """1e-6, where diffusers has 1e-5: it shows where the values of tokens are small, far above rounding."""
    x, condition, everyone = steps[0][0] / 100, steps[0][1], torch.ones(ROWS, 64, 1, dtype=torch.bool)
    expected = x
    for module in tiny.blocks:
        expected = dense_block(module, expected, condition, everyone, "recomputed", {})
    close(Engine(tiny, run).hidden(Plan(), 0, x, condition), expected)
    other = DiTAdapter(copy.deepcopy(tiny.model), tiny.spec)
    for module in other.blocks:
        module.norm3.eps = 1e-5
    assert deviation(Engine(other, run).hidden(Plan(), 0, x, condition), expected) > 10 * NETWORK.allowed


@torch.inference_mode()
@UNITS
def test_refresh_touches_only_the_chosen_tokens(tiny, run, steps, units_of: Callable) -> None:
    engine, units = Engine(tiny, run), units_of(tiny)
    engine.hidden(every_unit(units, ALL, keys="cached"), 0, *steps[0])
    for step in range(1, 4):
        before = {unit: engine.cache.read(unit, Hold(), step).clone() for unit in units}
        who = random_tokens(12, seed=step)
        engine.hidden(every_unit(units, who, keys="cached"), step, *steps[step])
        for unit in units:
            after, chosen = engine.cache.read(unit, Hold(), step), mask_of(who)
            changed = (after != before[unit]).any(dim=-1, keepdim=True)
            assert torch.equal(changed, chosen), unit


# --- limits of the vocabulary that must coincide


@torch.inference_mode()
@UNITS
@pytest.mark.parametrize("keys", KEYS)
def test_choosing_every_token_is_the_full_model(tiny, run, steps, units_of: Callable, keys: Keys) -> None:
    engine, units = Engine(tiny, run), units_of(tiny)
    engine.hidden(every_unit(units, ALL, keys=keys), 0, *steps[0])
    everyone = every_unit(units, random_tokens(64, seed=0), keys=keys)
    close(engine.hidden(everyone, 1, *steps[1]), Engine(tiny, run).hidden(Plan(), 1, *steps[1]))


@torch.inference_mode()
@UNITS
def test_choosing_no_token_is_none(tiny, run, steps, units_of: Callable) -> None:
    units, outputs = units_of(tiny), []
    for who in (NONE, random_tokens(0, seed=0)):
        engine = Engine(tiny, run)
        engine.hidden(every_unit(units, ALL), 0, *steps[0])
        outputs.append(engine.hidden(every_unit(units, who), 1, *steps[1]))
        assert set(engine.plans.to_json()[1].values()) == {"none"}
    assert torch.equal(*outputs)


@torch.inference_mode()
@UNITS
@pytest.mark.parametrize("seed", range(4))
def test_soft_gates_of_zero_and_one_are_hard_choices(tiny, run, steps, units_of: Callable, seed: int) -> None:
    """The training path at its corners is the inference path."""
    engine, units = Engine(tiny, run), units_of(tiny)
    engine.hidden(every_unit(units, ALL), 0, *steps[0])
    cached = {unit: engine.cache.read(unit, Hold(), 0).clone() for unit in units}
    counts = torch.randint(0, 65, (len(units),), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {unit: random_tokens(count, seed=100 * seed + count) for unit, count in zip(units, counts, strict=True)}
    plan = Plan({unit: Decision(who, keys="recomputed") for unit, who in chosen.items()})
    gates = {unit: mask_of(who).float() for unit, who in chosen.items()}
    close(engine.hidden(plan, 1, *steps[1]), soft_hidden(tiny, *steps[1], gates, cached))


# --- reuse


@torch.inference_mode()
def test_held_blocks_keep_their_old_gate_and_held_branches_take_the_current_one(tiny, run, steps) -> None:
    first, (x, condition) = tiny.blocks[0], steps[1]
    rest = {unit: Decision(NONE) for unit in blocks_of(tiny)[1:]}
    for units, gated in (([Block(0)], False), ([Site(0, "attn"), Site(0, "mlp")], True)):
        engine = Engine(tiny, run)
        engine.hidden(Plan({unit: Decision(ALL) for unit in [*units, *rest]}), 0, *steps[0])
        stored = [engine.cache.read(unit, Hold(), 1) for unit in [*units, *rest]]
        expected, gates = x, parts(first, condition)[2::3]
        for number, value in enumerate(stored):
            expected = expected + (gates[number] * value if gated and number < 2 else value)
        held = engine.hidden(Plan({unit: Decision(NONE) for unit in units} | rest), 1, x, condition)
        close(held, expected)


@torch.inference_mode()
def test_a_held_span_adds_its_stored_residual(tiny, run, steps) -> None:
    engine, span = Engine(tiny, run), Span(1, 3)
    engine.hidden(Plan({span: Decision(ALL)}), 0, *steps[0])
    modules, (x, condition) = tiny.blocks, steps[0]
    everyone = torch.ones(ROWS, 64, 1, dtype=torch.bool)

    def dense(x: Tensor, condition: Tensor, *blocks: int) -> Tensor:
        for block in blocks:
            x = dense_block(modules[block], x, condition, everyone, "recomputed", {})
        return x

    start = dense(x, condition, 0)
    residual = dense(start, condition, 1, 2) - start
    x, condition = steps[1]
    expected = dense(dense(x, condition, 0) + residual, condition, 3)
    close(engine.hidden(Plan({span: Decision(NONE)}), 1, x, condition), expected)
    assert engine.plans.to_json() == [{"blocks 1-2": "all"}, {"blocks 1-2": "none"}]


def test_forecast_is_taylorseers() -> None:
    """Its published recursion on feature = step^2, S = 50, N = 4, order 4, counted down from 49 as in its code."""
    cache, unit = Cache(), Block(0)
    full = [49, 48, 44, 40, 36]
    predicted = {47: 2207, 45: 2013, 43: 1844.625, 39: 1517.03125, 35: 1220.998046875}
    for down in range(49, 34, -1):
        step = 49 - down
        if down in full:
            cache.store(unit, torch.full((1, 1, 1), down**2, dtype=torch.float64), step, Forecast(4))
            assert cache.read(unit, Forecast(4), step).item() == down**2
        elif down in predicted:
            assert cache.read(unit, Forecast(4), step).item() == predicted[down]
            assert cache.read(unit, Hold(), step).item() == min(value for value in full if value > down) ** 2


@torch.inference_mode()
def test_forecast_in_a_run(tiny, run, steps) -> None:
    """Two full steps and a line through them."""
    engine, unit = Engine(tiny, run), Block(0)
    values = []
    for step in (0, 2):
        engine.hidden(Plan({unit: Decision(ALL, Forecast(1))}), step, *steps[step])
        values.append(engine.cache.read(unit, Hold(), step).clone())
    close(engine.cache.read(unit, Forecast(1), 5), values[1] + 3 / 2 * (values[1] - values[0]))


# --- decisions taken at the block


@torch.inference_mode()
def test_deferred_tokens(tiny, run, steps) -> None:
    """As ToMe would: the tokens are chosen from the block's own input."""
    deferred, explicit = Engine(tiny, run), Engine(tiny, run)
    seen: list[Tensor] = []

    def choose(stream: Callable[[], Tensor]) -> Tokens:
        seen.append(top_tokens(stream().norm(dim=-1), 10).index_RK)
        return Tokens(seen[-1])

    like = Tokens(torch.empty(ROWS, 10, dtype=torch.int64))
    plan = every_unit(blocks_of(tiny), Deferred(choose, like), keys="cached")
    for engine in (deferred, explicit):
        engine.hidden(every_unit(blocks_of(tiny), ALL, keys="cached"), 0, *steps[0])
    output = deferred.hidden(plan, 1, *steps[1])
    assert torch.equal(seen[0], top_tokens(steps[1][0].norm(dim=-1), 10).index_RK)
    again = Plan({Block(block): Decision(Tokens(index), keys="cached") for block, index in enumerate(seen)})
    assert torch.equal(output, explicit.hidden(again, 1, *steps[1]))
    assert deferred.plans == explicit.plans
    assert deferred.ledger.totals() == explicit.ledger.totals()
    assert plan_macs(plan, run.shape) == plan_macs(again, run.shape)


@torch.inference_mode()
def test_deferred_spans_are_charged_by_what_was_executed(tiny, run, steps) -> None:
    """As first-block cache would: the rest of the model is skipped when the first block's output hardly moved."""
    engine, span = Engine(tiny, run), Span(1, tiny.shape.num_blocks)
    previous: list[Tensor] = []

    def choose(stream: Callable[[], Tensor]) -> All | Nothing:
        x = stream()
        moved = not previous or (x - previous[0]).norm() > 0.1 * x.norm()
        previous[:] = [x]
        return ALL if moved else NONE

    plan = Plan({span: Decision(Deferred(choose, like=ALL))})
    spent = []
    for step, at in enumerate((0, 0, 5)):
        before = engine.ledger.totals()["per_sample"]
        engine.hidden(plan, step, *steps[at])
        spent.append(engine.ledger.totals()["per_sample"] - before)
    assert [list(executed.values()) for executed in engine.plans.to_json()] == [["all"], ["none"], ["all"]]
    every, skipped = (2 * plan_macs(Plan({span: Decision(who)}), run.shape).matmul for who in (ALL, NONE))
    assert spent == [every, skipped, every] and skipped < every / 3


# --- what must be refused


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (
            Plan({Block(2): Decision(NONE)}),
            r"block 2: the cache is read before it was written; .*first step must be full",
        ),
        (Plan({Site(1, "mlp"): Decision(NONE)}), r"block 1 mlp: the cache is read before it was written"),
        (Plan({Span(0, 4): Decision(NONE)}), r"blocks 0-3: the cache is read before it was written"),
        (
            Plan({Block(0): Decision(random_tokens(3, seed=0), keys="cached")}),
            r"block 0: cached keys are read before any were stored; the first step must be full",
        ),
    ],
    ids=str,
)
def test_reading_an_empty_cache_is_refused(tiny, run, steps, plan: Plan, says: str) -> None:
    with torch.inference_mode(), pytest.raises(PlanError, match=says):
        Engine(tiny, run).hidden(plan, 0, *steps[0])


@pytest.mark.parametrize("unit", [Site(2, "attn"), Block(2)], ids=str)
@pytest.mark.parametrize("elements", [1, 3 * ROWS * 4 * 64, adapters.MAP_ELEMENTS])
def test_attention_received(tiny, run, steps, monkeypatch, unit: Unit, elements: int) -> None:
    """Column sums of the head-mean map, in chunks of any size; observing changes nothing else."""
    monkeypatch.setattr(adapters, "MAP_ELEMENTS", elements)
    seen: dict[str, Tensor] = {}
    attention = tiny.blocks[2].attn1
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, layer in (("q", attention.to_q), ("k", attention.to_k))
    ]
    engine, silent = Engine(tiny, run), Engine(tiny, run)
    with torch.inference_mode():
        output = engine.hidden(Plan({unit: Decision(ALL, observe="attn")}), 0, *steps[0])
        assert torch.equal(output, silent.hidden(Plan({unit: Decision(ALL)}), 0, *steps[0]))
    for hook in hooks:
        hook.remove()
    queries, keys = (seen[name].unflatten(2, (4, 24)).transpose(1, 2).double() for name in "qk")
    weights = (queries @ keys.transpose(2, 3) / 24**0.5).softmax(dim=3)
    received = engine.cache.attention_received(2)
    assert received.shape == (ROWS, 64) and received.dtype == torch.float32
    close(received, weights.mean(1).sum(1))
    close(received.sum(1), torch.full((ROWS,), 64.0))  # every query hands out 1
    assert engine.ledger.by_tag["score"].matmul == 2 * 64 * 64 * 96 and "score" not in silent.ledger.by_tag
    assert engine.cache.num_bytes() == silent.cache.num_bytes() + ROWS * 64 * 4
    with pytest.raises(PlanError, match="block 2: no attention was observed yet"):
        silent.cache.attention_received(2)


@pytest.mark.parametrize("who", [NONE, random_tokens(64, 0)], ids=str)
def test_attention_that_is_not_computed_in_full_is_not_observed(tiny, run, steps, who: Nothing | Tokens) -> None:
    engine, unit = Engine(tiny, run), Site(1, "attn")
    with torch.inference_mode():
        engine.hidden(Plan({unit: Decision(ALL, observe="attn")}), 0, *steps[0])
        before, charged = engine.cache.attention_received(1), engine.ledger.by_tag["score"]
        engine.hidden(Plan({unit: Decision(who, observe="attn")}), 1, *steps[1])
    assert engine.cache.attention_received(1) is before and engine.ledger.by_tag["score"] == charged


def test_a_span_cannot_be_recomputed_in_part(tiny, run, steps) -> None:
    plan = Plan({Span(1, 3): Decision(random_tokens(3, seed=0))})
    with torch.inference_mode(), pytest.raises(ValueError, match=r"blocks 1-2.*all tokens or none"):
        Engine(tiny, run).hidden(plan, 0, *steps[0])


def test_a_cache_with_a_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"block 0 would be cached with a gradient attached"):
        Cache().store(Block(0), torch.zeros(1, 1, 1, requires_grad=True), 0)


def test_an_engine_without_a_policy_says_so(tiny, run, steps) -> None:
    with pytest.raises(RuntimeError, match="without a policy"):
        Engine(tiny, run).plan(0, *steps[0])


# --- the training path's gradient


@pytest.mark.parametrize("gated", [3, 4], ids=["last block ungated", "all gated"])
@pytest.mark.parametrize("recursion", ["propagated", "literal"])
def test_gradient_of_the_cache_loss(tiny, run, steps, gated: int, recursion: str) -> None:
    """Read literally, Alg. 1's line 13 trains no gate but the last block's, and with K >= 1 none at all."""
    engine, units = Engine(tiny, run), blocks_of(tiny)
    with torch.no_grad():
        engine.hidden(every_unit(units, ALL), 0, *steps[0])
        cached = {unit: engine.cache.read(unit, Hold(), 0) for unit in units}
        inputs = [steps[1][0]]
        for module in tiny.blocks:
            everyone = torch.ones(ROWS, 64, 1, dtype=torch.bool)
            inputs.append(dense_block(module, inputs[-1], steps[1][1], everyone, "recomputed", {}))
    alpha = [torch.full((ROWS, 64, 1), 0.5, requires_grad=True) for _ in range(gated)]
    gates = dict(zip(units, alpha, strict=False))
    output = soft_hidden(tiny, *steps[1], gates, cached, inputs if recursion == "literal" else None)
    gradients = torch.autograd.grad(F.mse_loss(output, inputs[-1]), alpha, allow_unused=True)
    reached = [gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients]
    assert reached == ([True] * gated if recursion == "propagated" else [block == 3 for block in range(gated)])


@pytest.mark.parametrize("unit", [Block(99), Site(0, "cross"), Span(2, 9)])
def test_units_that_the_model_does_not_have_are_refused(tiny, unit) -> None:
    """Otherwise a plan could seem to be executed and be ignored."""
    run = make_run(tiny, 2, torch.arange(1))
    engine = Engine(tiny, run)
    tokens, condition = engine.embed(0, *model_inputs(tiny, 2))
    with pytest.raises(ValueError, match=r"a plan decides .* which a model of 4 blocks does not have"):
        engine.hidden(Plan({unit: Decision(ALL)}), 0, tokens, condition)
