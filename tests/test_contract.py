"""What every method x adapter must keep: each rule runs on every file of methods/, found by name, with no list here.

Methods run as everywhere, behind `tcbench.watch.guard`, and the values of their choices are checked
(`tcbench.watch.checking`).

A method is tried with its default options and with every other value of every option that is a choice. Options whose
default asks for more steps or blocks than a small model has are scaled down by `SMALL`.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tcbench.artefacts import as_table
from tcbench.budget.costing import macs_of, run_of_shapes
from tcbench.engine.engine import Engine
from tcbench.errors import UserError
from tcbench.method import Artefacts, Decides, Look, Method, Policy, Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.models.predictor import CachePredictor
from tcbench.models.specs import MODELS
from tcbench.plan import ALL, All, Block, Keys, Plan, Span, Tokens, every_unit
from tcbench.record.executed import PlanRecord
from tcbench.registry import documentation, make_method, method_class, method_names
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Samples, sample_batch
from tests.floors import NETWORK, TRAJECTORY, assert_close
from tests.flops import TorchFlops
from tests.pairs import COVERING, marks_of

from .conftest import make_adapter, make_prompt, make_run, model_inputs

ADAPTERS = ["tiny-dit", "tiny-pixart", "tiny-osp", "tiny-wan", "tiny-flux"]
FLOWS = {"tiny-wan", "tiny-flux"}
NFE = 5
SMALL = {
    **{"steps": 4, "num_full_steps": 2, "refiner_blocks": 1, "beta": -20.0, "cache_ratio": 0.7},
    **{"first_blocks": 1, "warmup_steps": 1, "first_steps": 1},
    **{"min_drafts": 1, "iterations": 5},
}


def is_method(name: str) -> bool:
    """Whether the file can be loaded; one that cannot fails its own test, not those of others."""
    try:
        return bool(method_class(name))
    except UserError:
        return False


METHODS = [name for name in method_names() if is_method(name)]


@pytest.mark.parametrize("name", method_names())
def test_the_file_defines_a_method(name: str) -> None:
    assert method_class(name).name == name


def small_method(name: str, options: dict[str, Any]) -> Method:
    fields = method_class(name).model_fields
    small = {key: value for key, value in SMALL.items() if key in fields}
    if options.get("base") == "learning_to_cache":  # whose steps are its own
        small.pop("num_full_steps")
    return make_method(name, small | options)


def variants(name: str) -> list[dict[str, Any]]:
    """No options, then every value but the default of every option that is a choice."""
    fields = method_class(name).model_fields
    choices = {option: info for option, info in fields.items() if get_origin(info.annotation) is Literal}
    others = [
        {option: value}
        for option, info in choices.items()
        for value in get_args(info.annotation)
        if value != info.default
    ]
    return [{}, *others]


# every choice on one model; on the others those that change which parts of a block are computed
CASES = [
    pytest.param(
        model,
        name,
        options,
        id="-".join([name, *(f"{key}={value}" for key, value in options.items()), model]),
        marks=marks_of(ADAPTERS, model, name),
    )
    for model in ADAPTERS
    for name in METHODS
    for options in variants(name)
    if model == ADAPTERS[0] or options.keys() <= {"keys"} or "pixart" in options.values()
]


def deciding(*when: Decides) -> list[Any]:
    """The cases of methods that decide then."""
    return [case for case in CASES if method_class(case.values[1]).decides in when]


over_adapters = pytest.mark.parametrize("model", ADAPTERS)
over_cases = pytest.mark.parametrize(("model", "name", "options"), CASES)


def settings_of(model: str) -> SamplerSettings:
    return SamplerSettings(guidance_scale=1.5, seed=3, solver="flow" if model in FLOWS else "ddim")


def rows_of(adapter: Adapter, samples: int) -> int:
    """Rows of the transformer's batch."""
    return samples * adapter.spec.guidance().rows_per_sample


@cache
def adapter_of(model: str, device: str = "cpu") -> Adapter:
    """With two heads each, because products take most of the time."""
    return make_adapter(model, device, num_heads=2)


@cache
def artefacts_for(adapter: Adapter, steps: int) -> Artefacts:
    """What training would have made: a scorer that tells tokens and blocks apart, a mean score per step, and gates by
    which some rows of a batch are computed."""
    scorer, shape = CachePredictor(adapter), adapter.shape
    gated = [site for site in shape.sites if shape.kind(site) != "cross"]
    gates = torch.randn(steps * len(gated), shape.width, generator=torch.Generator().manual_seed(2))
    if not scorer.head.weight.is_meta:
        torch.nn.init.normal_(scorer.head.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    scorer.eval().requires_grad_(False)
    alpha_bar = tuple(0.5 + 0.01 * step for step in range(steps))
    return Artefacts({"predictor": scorer}, alpha_bar, {"gates": as_table(gates)})


def sample(model: str, method: Method, *index: int) -> Samples:
    adapter = adapter_of(model)
    artefacts = artefacts_for(adapter, method.sampled_steps(NFE))
    every = every_prompt(model)
    return sample_batch(
        adapter, method, NFE, settings_of(model), torch.tensor(index), artefacts, prompts=lambda samples: every[samples]
    )


sample_once = cache(sample)


@cache
def every_prompt(model: str) -> Prompt:
    return make_prompt(adapter_of(model), rows=16)


def broken(rule: str, name: str) -> str:
    return f"methods/{name}.py breaks the rule: {rule}"


def plain(adapter: Adapter, timestep: float, latent: Tensor, prompt: Prompt) -> Tensor:
    """diffusers' own forward."""
    return adapter.plain(latent, torch.full((len(latent),), timestep), prompt)


# --- off is off


def everything(adapter: Adapter) -> dict[str, Plan]:
    """Every way of saying that all is computed."""
    shape = adapter.shape
    blocks = range(shape.num_blocks)
    units = {
        "Site": shape.sites,
        "Block": [Block(block) for block in blocks],
        "Span": [Span(0, 1), Span(1, shape.num_blocks)],
    }
    plans = {
        f"{kind}-{keys}": every_unit(of_kind, ALL, keys=keys)
        for kind, of_kind in units.items()
        for keys in get_args(Keys)
    }
    return {"empty": Plan(), **plans}


@over_adapters
@pytest.mark.parametrize("case", everything(make_adapter("tiny-dit", "meta")))
def test_off_is_off(model: str, case: str) -> None:
    adapter = adapter_of(model)
    latent, prompt = model_inputs(adapter, rows_of(adapter, 2))
    run = make_run(adapter, NFE, torch.arange(2))
    engine = Engine(adapter, run)
    with torch.inference_mode():
        context = engine.prepare(prompt)
        for step in (0, NFE - 1):
            x, condition = engine.embed(step, latent, context)
            output = adapter.unembed(engine.hidden(everything(adapter)[case], step, x, condition), condition)
            expected = plain(adapter, run.timesteps[step], latent, prompt)
            assert_off(adapter, output, expected, f"off is off: {case}", by_parts=case.startswith("Site"))


class Executed(NamedTuple):
    """A run of all steps on the same latents.

    Attributes:
        macs: (charged by the ledger, counted by torch) of the prompt, then of every step.
        first: (timestep, latents, prompt, output) of the first step, if it left anything held.
    """

    macs: list[tuple[float, float]]
    first: tuple[float, Tensor, Prompt, Tensor] | None


@cache
def execute(model: str, method: Method) -> Executed:
    samples, adapter = 3, adapter_of(model)
    steps = method.sampled_steps(NFE)
    run = make_run(adapter, steps, torch.arange(samples), artefacts_for(adapter, steps))
    engine = Engine(adapter, run, method.start(run))
    latent, prompt = model_inputs(adapter, rows_of(adapter, samples))
    with TorchFlops() as counted, torch.inference_mode():
        context = engine.prepare(prompt)
    macs, first = [(engine.ledger.per_sample * samples, counted.total / 2)], None
    for step in range(run.nfe):
        before = engine.ledger.per_sample * samples
        with TorchFlops() as counted, torch.inference_mode():
            output = engine(step, latent, context)
        macs.append((engine.ledger.per_sample * samples - before, counted.total / 2))
        if step == 0 and engine.cache.num_bytes():
            first = run.timesteps[0], latent, prompt, output.clone()
    return Executed(macs, first)


@over_cases
def test_the_first_step_is_the_plain_model(model: str, name: str, options: dict[str, Any]) -> None:
    if first := execute(model, small_method(name, options)).first:
        timestep, latent, prompt, output = first
        with torch.inference_mode():
            expected = plain(adapter_of(model), timestep, latent, prompt)
        says = broken("what is held comes from a full first step", name)
        assert_off(adapter_of(model), output, expected, says)


def assert_off(adapter: Adapter, output: Tensor, expected: Tensor, says: str, by_parts: bool = True) -> None:
    """To the bit; but where the parts of a parallel block are stored apart, their one projection is taken apart too."""
    if by_parts and any(block.parallel for block in adapter.shape.blocks):
        assert_close(output, expected, NETWORK, says)
    else:
        assert torch.equal(output, expected), says


# --- the ledger


@over_cases
def test_ledger_counts_what_is_executed(model: str, name: str, options: dict[str, Any]) -> None:
    once, *by_step = execute(model, small_method(name, options)).macs
    charged, counted = once
    assert charged == counted, broken("MACs of the prompt as torch counts them", name)
    for step, (charged, counted) in enumerate(by_step):
        assert charged == counted, broken(f"MACs of step {step} as torch counts them", name)


@over_adapters
def test_torch_counts_the_same_by_module(model: str) -> None:
    """`FlopCounterMode` sees no fused attention of a CPU, so its is taken in plain products."""
    adapter = adapter_of(model)
    latent, prompt = model_inputs(adapter, rows_of(adapter, 2))
    with torch.inference_mode(), TorchFlops() as counted:
        plain(adapter, 500, latent, prompt)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        plain(adapter, 500, latent, prompt)
    assert counted.total == counter.get_total_flops() > 0


def broadcast(x: Tensor, y: Any, **_: Any) -> Tensor:
    shapes = [value.shape for value in (x, y) if isinstance(value, Tensor)]
    return torch.empty(torch.broadcast_shapes(*shapes), dtype=torch.result_type(x, y), device="meta")


class ShapesOfLayers(TorchDispatchMode):
    """What layers, sums and products make of meta tensors, at once: torch derives it op by op, in Python. None of them
    reads a value."""

    aten = torch.ops.aten
    made: ClassVar = {
        **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor), broadcast),
        aten.linear.default: lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)),
        aten.scaled_dot_product_attention.default: lambda q, k, v, *_, **__: q.new_empty(*q.shape[:-1], v.shape[-1]),
        **dict.fromkeys(
            (aten.layer_norm.default, aten.rms_norm.default, aten.gelu.default), lambda x, *_, **__: torch.empty_like(x)
        ),
    }

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self.made.get(op, op) if any(isinstance(value, Tensor) and value.is_meta for value in args) else op
        return made(*args, **(kwargs or {}))


@pytest.mark.parametrize(("model", "name", "options"), deciding("ahead", "device"))
def test_no_host_read_inside_a_step(model: str, name: str, options: dict[str, Any]) -> None:
    """Planned and executed on meta tensors, on which every read of a value raises."""
    adapter, method = adapter_of(model, "meta"), small_method(name, options)
    steps = method.sampled_steps(NFE)
    run = make_run(adapter, steps, torch.arange(2), artefacts_for(adapter, steps))
    engine = Engine(adapter, run, method.start(run))
    latent, prompt = model_inputs(adapter, rows_of(adapter, 2))
    with torch.inference_mode(), ShapesOfLayers():
        context = engine.prepare(prompt)
        for step in range(run.nfe):
            try:
                engine(step, latent, context)
            except (RuntimeError, UserError) as error:
                pytest.fail(f"{broken('the engine never waits for the device inside a step', name)}: {error}")


@pytest.mark.parametrize(("model", "name", "options"), deciding("ahead"))
def test_what_is_decided_ahead_depends_on_nothing_seen(model: str, name: str, options: dict[str, Any]) -> None:
    method, steps = small_method(name, options), small_method(name, options).sampled_steps(NFE)
    run = make_run(adapter_of(model), steps, torch.arange(2), artefacts_for(adapter_of(model), steps))
    policy = method.start(run)
    for step in range(run.nfe):
        policy.plan(Blind(run, step))


class Blind(Look):
    """There is nothing to see."""

    def __init__(self, run: Run, step: int) -> None:
        self.run, self.step = run, step

    def observe(self, name: str, *arguments: Any) -> Tensor:
        pytest.fail(f"decided ahead, and yet looks at {name}")

    def read(self, value: Tensor) -> float:
        pytest.fail("decided ahead, and yet reads a number")


@pytest.mark.parametrize(("model", "name", "options"), deciding("host"))
def test_what_is_decided_on_the_host_stays_within_its_bounds(
    monkeypatch: pytest.MonkeyPatch, model: str, name: str, options: dict[str, Any]
) -> None:
    """Costing says between what the MACs lie; the engine's own say where."""
    method = small_method(name, options)
    monkeypatch.setitem(MODELS, model, adapter_of(model).spec)
    bounds = macs_of(model, method, NFE)
    measured = sample_once(model, method, 0, 1).macs["per_sample"]
    assert bounds["least_per_sample"] < bounds["per_sample"], broken("its MACs depend on the sample", name)
    assert bounds["least_per_sample"] <= measured <= bounds["per_sample"], broken("MACs are within bounds", name)


# --- schedules and plans


@pytest.mark.parametrize(("model", "name", "options"), deciding("ahead", "device"))
def test_i_steps_are_the_full_plans(model: str, name: str, options: dict[str, Any]) -> None:
    samples = sample_once(model, small_method(name, options), 0, 1)
    plans = samples.plans.to_json()
    full = tuple(step for step, plan in enumerate(plans) if all(value == "all" for value in plan.values()))
    assert full[:1] == (0,) or samples.cache_bytes == 0, broken("what is held was computed in a full first step", name)
    assert samples.plans.i_steps == full, broken("i_steps are the steps whose plans compute everything", name)


@over_cases
def test_plans_are_json(model: str, name: str, options: dict[str, Any]) -> None:
    plans = sample_once(model, small_method(name, options), 0, 1).plans
    assert PlanRecord.from_json(json.loads(json.dumps(plans.to_json()))) == plans, broken(
        "plans round-trip through JSON", name
    )


def kinds_of(plan: Plan) -> Iterator[tuple[Any, ...]]:
    """What is decided in a plan, but for where and how much."""
    for unit, decision in plan.decisions.items():
        who, fill = decision.who, decision.fill
        on_device = getattr(who, "used", None) is not None
        filled = None if isinstance(who, All) else (type(fill), bool(getattr(fill, "order", 0)))
        keys = decision.keys if isinstance(who, Tokens) else None
        yield type(unit), type(who), on_device, filled, keys, decision.observe, decision.spread is not None
    if plan.checks:
        yield ("checks",)


@pytest.mark.parametrize("model", ["tiny-dit", "tiny-pixart"])  # without a text and with one
def test_covering_methods_decide_all_that_any_does(model: str) -> None:
    """Otherwise some model would not be tried with all that is decided: add the method to `COVERING`."""
    adapter, kinds = adapter_of(model), {True: set(), False: set()}
    latent, prompt = model_inputs(adapter, rows_of(adapter, 2))
    for name in METHODS:
        for options in ({}, *({"keys": keys} for keys in get_args(Keys) if "keys" in method_class(name).model_fields)):
            method = small_method(name, options)
            steps = method.sampled_steps(NFE)
            run = make_run(adapter, steps, torch.arange(2), artefacts_for(adapter, steps))
            policy = Recorded(method.start(run))
            engine = Engine(adapter, run, policy)
            with torch.inference_mode():
                context = engine.prepare(prompt)
                for step in range(run.nfe):
                    engine(step, latent, context)
            kinds[name in COVERING] |= {kind for plan in policy.plans for kind in kinds_of(plan)}
    assert kinds[False] - kinds[True] == set()


# --- determinism and independence


@over_cases
def test_runs_repeat_and_leave_nothing_behind(model: str, name: str, options: dict[str, Any]) -> None:
    method = small_method(name, options)
    first, other = sample_once(model, method, 0, 1), sample_once(model, method, 9, 0)
    again = sample(model, method, 0, 1)
    assert torch.equal(first.image, again.image), broken("the same batch twice gives the same bits", name)
    assert first.plans == again.plans, broken("the same batch twice gives the same plans", name)
    assert not torch.equal(first.image, other.image), broken("other samples differ", name)


@pytest.mark.parametrize(("model", "name", "options"), deciding("ahead", "device"))
def test_samples_ignore_their_neighbours(model: str, name: str, options: dict[str, Any]) -> None:
    """TokenCache's shared block ratio couples a batch by design (Eq. 12), so it is tried without it.

    A decision on the host couples a batch too: it is one for all of it.
    """
    method = small_method(name, options)
    if getattr(method, "allocation", None) == "batch":
        method = method.model_copy(update={"allocation": "uniform"})
    together, reordered, alone = (sample_once(model, method, *index).image for index in ([0, 1], [9, 0], [0]))
    for image, where in ((reordered[1], "another batch"), (alone[0], "a batch of its own")):
        assert_close(image, together[0], TRAJECTORY, broken(f"a sample is the same in {where}", name))


@pytest.mark.parametrize(("model", "name", "options"), [case for case in CASES if case.values[0] not in FLOWS])
def test_chance_is_shared_by_the_halves_of_a_pair(model: str, name: str, options: dict[str, Any]) -> None:
    """With the same input in both halves, so that only random numbers could tell their tokens apart."""
    adapter, method = adapter_of(model), small_method(name, options)
    steps = method.sampled_steps(NFE)
    run = make_run(adapter, steps, torch.arange(2), artefacts_for(adapter, steps))
    policy = Recorded(method.start(run))
    engine = Engine(adapter, run, policy)
    latent, prompt = model_inputs(adapter, rows=2)
    twice = torch.arange(2).repeat(2)
    with torch.inference_mode():
        context = engine.prepare(prompt[twice])
        for step in range(run.nfe):
            engine(step, latent[twice], context)
    for plan in policy.plans:
        for unit, decision in plan.decisions.items():
            if isinstance(decision.who, Tokens):
                index = decision.who.index_RK.sort(dim=1).values
                distinct = decision.spread or (index.diff(dim=1) > 0).all()
                assert distinct, broken(f"no token is chosen twice at {unit}", name)
                conditional, unconditional = index.chunk(2)
                assert torch.equal(conditional, unconditional), broken(f"halves choose alike at {unit}", name)


class Recorded:
    """A policy whose plans are kept."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.plans = policy, list[Plan]()

    def plan(self, look: Look) -> Plan:
        self.plans.append(self.policy.plan(look))
        return self.plans[-1]


def test_random_tokens_are_drawn_from_seed_sample_step_and_block_alone() -> None:
    adapter, method = adapter_of(ADAPTERS[0]), small_method("random_tokens", {})
    engine = Engine(adapter, make_run(adapter, NFE, torch.arange(3)), method)

    def drawn(step: int, seed: int) -> Tensor:
        """[blocks, R, K], the latents of all rows differing."""
        with torch.inference_mode():
            plan = engine.plan(step, *engine.embed(step, *model_inputs(adapter, rows=6, seed=seed)))
        return torch.stack([decision.who.index_RK.sort(dim=1).values for decision in plan.decisions.values()])

    index = drawn(1, seed=0)
    assert torch.equal(drawn(1, seed=1), index), "the latents have a say"
    assert torch.equal(*index.chunk(2, dim=1)), "the halves of a pair differ"
    distinct = torch.cat([index, drawn(NFE - 1, seed=0)])[:, :3].flatten(0, 1)
    assert len(torch.unique(distinct, dim=0)) == len(distinct), "samples, steps or blocks repeat"


# --- options


@pytest.mark.parametrize("name", METHODS)
def test_options(name: str) -> None:
    cls = method_class(name)
    required = [option for option, info in cls.model_fields.items() if info.is_required()]
    assert not required, broken("every option has a default", name)
    assert cls.knob is None or cls.knob in cls.model_fields, broken("the knob is an option", name)
    undocumented = [option for option in cls.model_fields if option not in documented(cls)]
    assert not undocumented, broken("every option is in the docstring", name)
    with pytest.raises(UserError) as caught:
        make_method(name, {"no_such_option": 1})
    text = str(caught.value)
    assert f"methods/{name}.py" in text and "no_such_option" in text and "\n" not in text
    assert all(option in text for option in cls.model_fields), broken(
        "a wrong option is answered with the right ones", name
    )


@pytest.mark.parametrize("name", METHODS)
def test_what_options_imply_can_be_said(name: str) -> None:
    """Records hold it, and whoever sets a row's options from a record gets the row."""
    method = small_method(name, {})
    said = make_method(
        name, method.model_dump() | method.implied(run_of_shapes(ADAPTERS[0], method.sampled_steps(NFE)))
    )
    costs = [macs_of(ADAPTERS[0], each, NFE)["per_sample"] for each in (method, said)]
    assert costs[0] == costs[1], broken("implied options are those of the run", name)


def documented(cls: type[Method]) -> str:
    """What `tcbench methods` says of it, `prefix_*` standing for every option that starts so."""
    text = documentation(cls)
    groups = [word.rstrip("*:,") for word in text.split() if word.rstrip(":,").endswith("_*")]
    return text + " ".join(option for option in cls.model_fields if any(option.startswith(group) for group in groups))
