"""Training of predictors and refiners on a tiny model and made-up images, and their way to disk and back."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tcbench.artefacts import add_refiners, load_artefacts, save_artefacts
from tcbench.data import Dataset
from tcbench.engine.engine import Engine
from tcbench.errors import UserError
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Method, Run
from tcbench.models.dit import DiTAdapter
from tcbench.plan import NONE, Block, every_unit
from tcbench.record.files import read_tensors, write_tensors
from tcbench.registry import make_method
from tcbench.samplers import ReferenceDDIM, SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.trainable import CollectScores
from tcbench.training import sizes as sizes_module
from tcbench.training.caching import train
from tcbench.training.pairs import Pairs, uncached_updates
from tcbench.training.refiners import plain_model, walk
from tcbench.training.scorers import judge_scores
from tcbench.training.sizes import PAIRS_PER_STEP, ReuseErrors, measure_reuse, row_errors
from tests.floors import LOSS, READING, SCORE, TRAJECTORY, assert_close, deviation

from .conftest import make_adapter, model_inputs

NFE = 6
SETTINGS = SamplerSettings(guidance_scale=1.5)
FEW: dict[str, Any] = {
    "num_full_steps": 2,
    "beta": -20.0,
    "refiner_blocks": 2,
    "predictor_iterations": 12,
    "predictor_learning_rate": 3e-3,
    "refiner_iterations": 12,
    "refiner_rank": 4,
    "refiner_learning_rate": 3e-3,
    "training_batch_size": 4,
    "alpha_samples": 4,
}


@dataclass
class Trained:
    method: Method
    artefacts: Artefacts
    refiners: dict[str, Tensor]
    log: dict[str, Any]

    def history(self, kind: str) -> dict[str, list[float]]:
        return next(stage for stage in self.log["stages"] if stage["kind"] == kind)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Images with structure: a random pattern per class, and some noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    patterns = torch.randn(10, 4, 16, 16, generator=generator)
    return Dataset(patterns[labels] + 0.2 * torch.randn(40, 4, 16, 16, generator=generator), labels)


@pytest.fixture(scope="module")
def adapter() -> DiTAdapter:
    """A model of this module's own, because training freezes it."""
    return make_adapter("tiny-dit")


def trained_with(adapter: DiTAdapter, data: Dataset, seed: int = 0, **options: Any) -> Trained:
    method = make_method("tokencache", FEW | options)
    return Trained(method, *train(adapter, method, NFE, SETTINGS, data, seed))


@pytest.fixture(scope="module")
def trained(adapter: DiTAdapter, data: Dataset) -> Trained:
    return trained_with(adapter, data)


@pytest.fixture
def saved(trained: Trained, tmp_path: Path) -> Path:
    save_artefacts(tmp_path, trained.artefacts, trained.refiners, copy.deepcopy(trained.log))
    return tmp_path


def images(adapter: DiTAdapter, method: Method, artefacts: Artefacts) -> Tensor:
    return sample_batch(adapter, method, NFE, SETTINGS, torch.arange(3), artefacts).image


# --- the predictor


@pytest.mark.parametrize(("cost_weight", "rises"), [(1.0, False), (1e-9, True)], ids=["dear", "cheap"])
def test_scores_follow_the_price_of_computing(adapter, data, cost_weight: float, rises: bool) -> None:
    history = trained_with(adapter, data, cost_weight=cost_weight, refiner_rank=0).history("TrainScorer")
    alpha = history["mean_alpha"]
    assert alpha[0] == pytest.approx(0.5)  # the head starts at zero
    assert (alpha[-1] > 0.55) if rises else (alpha[-1] < 0.45)
    start, end = sum(history["cache_loss"][:3]), sum(history["cache_loss"][-3:])
    assert (end < start) if rises else (sum(history["cost_loss"][-3:]) < sum(history["cost_loss"][:3]))


def test_the_literal_recursion_learns_the_price_alone(adapter, data) -> None:
    """Alg. 1's line 13 as printed: however cheap computing is, no gradient speaks for it, and scores fall."""
    options = {"cost_weight": 1e-9, "recursion": "literal", "refiner_rank": 0}
    assert trained_with(adapter, data, **options).history("TrainScorer")["mean_alpha"][-1] < 0.45


def test_collected_scores(trained: Trained) -> None:
    scores = trained.log["scores"]
    assert trained.artefacts.alpha_bar == tuple(scores["alpha_bar"]) and len(scores["alpha_bar"]) == NFE
    assert trained.history("TrainScorer")["loss_used"] == "raw" and scores["alpha_bar"] == scores["mean_alpha"]
    assert all(0 < alpha < 1 for alpha in scores["alpha_bar"])
    assert [len(blocks) for blocks in scores["per_block"]] == [2] * NFE
    means = [sum(blocks) / len(blocks) for blocks in scores["per_block"]]
    assert_close(means, scores["alpha_bar"], READING)
    assert sum(scores["histogram"]["counts"]) == NFE * 2 * 4 * 2 * 64  # steps, halves, samples, blocks, tokens


# --- the loss of a step


@pytest.mark.parametrize(("largest", "kind"), [(999.0, "raw"), (1001.0, "relative"), (float("inf"), "raw")])
def test_auto_is_relative_where_a_few_steps_would_decide(largest: float, kind: str) -> None:
    sizes = ReuseErrors(torch.tensor([1.0, 1.0, 4.0, largest]))
    assert sizes.kind("auto") == kind
    assert sizes.kind("raw") == "raw" and sizes.kind("relative") == "relative"
    assert ("marks" in sizes.record("raw")) == (largest > 1000) and "marks" not in sizes.record("relative")


def test_relative_errors_count_every_step_as_a_median_one() -> None:
    sizes = ReuseErrors(torch.tensor([1.0, 1.0, 4.0, 9.0, 1e6]))
    assert (sizes.weights("relative") * sizes.error_S).tolist() == [4.0] * 5
    assert sizes.weights("raw").tolist() == [1.0] * 5
    with pytest.raises(UserError, match=r"loss: relative needs an error of reuse at every step.*set loss: raw"):
        ReuseErrors(torch.tensor([0.0, 0.0, 1.0])).weights("relative")


@pytest.mark.parametrize("at_once", [16, 3])
def test_the_error_of_reuse_is_that_of_closed_gates(adapter, data, at_once, monkeypatch) -> None:
    """By the engine, on the same pairs, of which fewer run together where their updates take much memory."""
    sampler, shape = ReferenceDDIM(NFE), adapter.shape
    monkeypatch.setattr(
        sizes_module, "ROW_BYTES", 8 * at_once * shape.num_blocks * shape.stream_tokens * shape.width + 7
    )
    sizes = measure_reuse(Pairs(adapter, data, sampler, 3), free_blocks=2)
    drawn, errors = Pairs(adapter, data, sampler, 3), []
    for step_R in torch.arange(NFE - 1).repeat(PAIRS_PER_STEP).split(at_once):
        pair = drawn.at(step_R)
        engine = Engine(adapter, Run(shape, sampler.timesteps, Unguided(), torch.arange(len(pair.tokens))))
        for unit in (Block(0), Block(1)):
            engine.cache.store(unit, pair.cached[unit], 0)
        with torch.no_grad():
            hidden = engine.hidden(every_unit([Block(0), Block(1)], NONE), 1, pair.tokens, pair.condition)
        errors.append((hidden - pair.target).square().mean((1, 2)))
    error_RS = torch.cat(errors).view(PAIRS_PER_STEP, NFE - 1)
    assert len(errors) == -(-PAIRS_PER_STEP * (NFE - 1) // at_once)
    assert_close(sizes.error_S[1:], error_RS.mean(0), LOSS)
    assert sizes.error_S[0] == sizes.error_S[1]


def test_a_relative_loss_leaves_eq_13_its_scale(adapter, data) -> None:
    made = trained_with(adapter, data, loss="relative", refiner_rank=0)
    told, scores = made.history("TrainScorer"), made.log["scores"]
    error = torch.tensor(told["reuse_error"], dtype=torch.float64)
    assert told["loss_used"] == "relative"
    expected = torch.tensor(scores["mean_alpha"], dtype=torch.float64) * error / error.max()
    assert_close(made.artefacts.alpha_bar, expected, SCORE)
    again = trained_with(adapter, data, seed=9, loss="relative", refiner_rank=0, predictor_iterations=1)
    assert again.history("TrainScorer")["reuse_error"] == told["reuse_error"]  # whatever the training seed


# --- the refiners


def test_refiners_start_as_no_change(adapter) -> None:
    refined = DiTAdapter(copy.deepcopy(adapter.model), adapter.spec)
    latent, label = model_inputs(adapter, 2)
    lora = add_refiners(refined, blocks=2, rank=4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = adapter.model(latent, torch.tensor([500, 20]), class_labels=label).sample
        assert torch.equal(refined.model(latent, torch.tensor([500, 20]), class_labels=label).sample, before)
    changed = {name.split(".lora_")[0] for name, _ in lora.named_parameters() if "lora_" in name}
    assert len(changed) == 2 * 6 and all("transformer_blocks.2." in name or ".3." in name for name in changed)


def test_refiners_reduce_the_loss(trained: Trained) -> None:
    history = trained.history("TrainRefiners")
    assert history["held_out_loss_kept"] == min(history["held_out_loss"]) < history["held_out_loss_without"]
    assert history["ended"] == "stopped early"


def test_refiners_see_the_chains_of_sampling(adapter, data, trained: Trained) -> None:
    """From an I-step on, plans and latents are those of an unguided run that begins there."""
    sampler = ReferenceDDIM(NFE)
    index = torch.arange(4)
    run = Run(adapter.shape, sampler.timesteps, Unguided(), index, artefacts=trained.artefacts)
    drawing = Pairs(adapter, data, sampler, 0)
    engine, plan, tokens, condition = walk(trained.method, run, drawing, 0, 3)
    assert [bool(step) for step in engine.plans.steps] == [True] * 3 and engine.plans.i_steps == (0,)
    again, policy = drawing.again(0), Engine(adapter, run, trained.method.start(run))
    x, label = again.start(torch.zeros(4, dtype=torch.int64))
    context = policy.prepare(label)
    with torch.no_grad():
        for step in range(3):
            x, _ = sampler.step(policy(step, x, context)[:, : adapter.spec.in_channels], step, x)
        expected = policy(3, x, context)
        hidden = engine.hidden(plan, 3, tokens, condition)
    assert_close(adapter.unembed(hidden, condition), expected, TRAJECTORY)


def test_chains_as_long_as_the_schedules_gaps_cost_more_than_one_step(adapter, data) -> None:
    few = {"refiner_iterations": 1, "refiner_learning_rate": 1e-9}
    one, gaps = (trained_with(adapter, data, refiner_reach=reach, **few) for reach in ("one", "gaps"))
    without = [made.history("TrainRefiners")["held_out_loss_without"] for made in (one, gaps)]
    assert without[0] < without[1]


def test_refiners_that_are_merged_at_i_steps_are_trained_not_to_move_them(adapter, data) -> None:
    """At full steps their output moves less than that of refiners which never saw one."""
    options = {"refiner_iterations": 20, "refiner_learning_rate": 3e-3, "patience": None, "num_full_steps": 3}
    moved = {}
    for reach in ("gaps", "every"):
        made = trained_with(adapter, data, refiner_reach=reach, **options)
        drawing, method = Pairs(adapter, data, ReferenceDDIM(NFE), 7), made.method
        run = Run(adapter.shape, drawing.sampler.timesteps, Unguided(), torch.arange(8), artefacts=made.artefacts)
        lora = add_refiners(adapter, blocks=2, rank=made.method.refiner_rank)
        lora.load_state_dict(made.refiners, strict=False)
        try:
            moved[reach] = 0.0
            for step in method.i_steps(run):
                engine, plan, tokens, condition = walk(method, run, drawing.again(step), step, step)
                with torch.no_grad(), plain_model(lora):
                    target, _ = uncached_updates(adapter, tokens, condition)
                with torch.no_grad():
                    moved[reach] += row_errors(engine.hidden(plan, step, tokens, condition), target).mean().item()
        finally:
            lora.unload()
    assert 0 < moved["every"] < 0.7 * moved["gaps"]


def test_training_that_has_nothing_to_gain_ends_before_its_iterations(adapter, data) -> None:
    options = {"refiner_iterations": 500, "refiner_learning_rate": 1e-12, "patience": 1}
    told = trained_with(adapter, data, **options).history("TrainRefiners")
    assert told["ended"] == "trained to convergence" and len(told["held_out_loss"]) == 3  # at 0, 25 and the end


def test_a_predictor_of_older_caches(adapter, data) -> None:
    """Up to NFE / #Full = 3 steps: reuse costs more, and the first steps of a chain are as likely as with gap 1."""
    pairs = Pairs(adapter, data, ReferenceDDIM(NFE), 0)
    drawn = [pairs.draw(4, longest_gap=3).step_R for _ in range(20)]
    assert {step for steps in drawn for step in steps.tolist()} == set(range(1, NFE))
    near, far = (pairs.again(1).at(torch.tensor([1, 1, 2]), gap) for gap in (1, 3))
    change = [(pair.updates[Block(0)] - pair.cached[Block(0)]).square().mean() for pair in (near, far)]
    assert change[0] < change[1]
    made = trained_with(adapter, data, predictor_reach="gaps", refiner_rank=0)
    assert made.history("TrainScorer")["longest_gap"] == 3


def test_pairs_from_the_posterior_are_other_pairs(adapter, data) -> None:
    solver, posterior = (Pairs(adapter, data, ReferenceDDIM(NFE), 0, step=step) for step in ("solver", "posterior"))
    ours, theirs = (pairs.again(1).at(torch.tensor([1, 2])) for pairs in (solver, posterior))
    assert all(torch.equal(ours.cached[unit], theirs.cached[unit]) for unit in ours.cached), "the earlier step is one"
    assert not torch.equal(ours.tokens, theirs.tokens)
    made = trained_with(adapter, data, pair_step="posterior")
    assert {made.history(stage)["pair_step"] for stage in ("TrainScorer", "TrainRefiners")} == {"posterior"}


def test_refiners_that_learned_with_the_predictor_go_on(adapter, data) -> None:
    """The second stage begins where the first left LoRA: barely trained, it does not begin as no change."""
    options = {"refiner_learning_rate": 1e-3, "refiner_iterations": 1, "patience": None}
    joint = trained_with(adapter, data, joint_refiners=True, **options).history("TrainRefiners")
    apart = trained_with(adapter, data, **options).history("TrainRefiners")
    assert apart["held_out_loss_without"] == apart["held_out_loss"][0]
    assert joint["held_out_loss_without"] != joint["held_out_loss"][0]


def test_the_model_itself_is_not_trained(data) -> None:
    adapter = make_adapter("tiny-dit")
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    modules = [type(module) for module in adapter.model.modules()]
    trained_with(adapter, data, predictor_iterations=2, refiner_iterations=2, joint_refiners=True)
    after = adapter.model.state_dict()
    assert set(after) == set(before) and [type(module) for module in adapter.model.modules()] == modules
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- what was not trained


def test_a_constant_scorer_is_refused() -> None:
    stage = CollectScores("predictor", free_blocks=2, samples=4)
    with pytest.raises(UserError, match=r"^predictor: scores every token 0\.5, so nothing was learned; set predictor_"):
        judge_scores(stage, torch.full((3, 4, 2, 8), 0.5), [0.5] * 3)


@pytest.mark.parametrize("beta", [-2000.0, None])
def test_a_flat_alpha_bar_is_refused_where_a_schedule_is_made_of_it(beta: float | None) -> None:
    stage = CollectScores("predictor", free_blocks=2, samples=4, beta=beta)
    alpha_SRLN = torch.rand(3, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    assert judge_scores(stage, alpha_SRLN, [0.5, 0.6, 0.7]) == []
    if beta is None:
        assert judge_scores(stage, alpha_SRLN, [0.5, 0.5 + 4e-5, 0.5]) == []
    else:
        with pytest.raises(UserError, match=r"^predictor: alpha-bar is flat.*beta -2000; set schedule: even"):
            judge_scores(stage, alpha_SRLN, [0.5, 0.5 + 4e-5, 0.5])


@pytest.mark.parametrize(("mean", "says"), [(0.01, "saturated: the mean score is 0.01"), (0.99, "0.99"), (0.5, None)])
def test_a_saturated_scorer_is_marked(mean: float, says: str | None) -> None:
    alpha_SRLN = torch.full((3, 4, 2, 8), mean)
    alpha_SRLN[0] += 1e-3
    found = judge_scores(CollectScores("predictor", free_blocks=2, samples=4), alpha_SRLN, [mean] * 3)
    assert (len(found) == 1 and says in found[0]) if says else not found


def test_a_scorer_that_is_saturated_at_most_steps_is_marked() -> None:
    alpha_SRLN = torch.full((3, 4, 2, 8), 0.02)
    alpha_SRLN[2] = 0.9
    (mark,) = judge_scores(CollectScores("predictor", free_blocks=2, samples=4), alpha_SRLN, [0.02, 0.02, 0.9])
    assert mark.startswith("saturated at 2 of 3 steps")
    alpha_SRLN[1] = 0.1
    assert judge_scores(CollectScores("predictor", free_blocks=2, samples=4), alpha_SRLN, [0.02, 0.1, 0.9]) == []


def test_a_learning_rate_out_of_bounds_is_refused() -> None:
    for method, options in (
        ("tokencache", {"predictor_learning_rate": 1.5}),
        ("tokencache", {"refiner_learning_rate": 0}),
        ("learning_to_cache", {"learning_rate": 11}),
    ):
        with pytest.raises(UserError, match=next(iter(options))):
            make_method(method, options)


def test_a_predictor_that_diverges_is_refused(adapter, data) -> None:
    """Where it ends is a matter of rounding: its loss has risen, or its scores no longer tell steps or tokens apart."""
    says = (
        r"TrainScorer: the (held-out )?loss .*lower the learning rate|predictor: (alpha-bar is flat|scores every token)"
    )
    with pytest.raises(UserError, match=says):
        trained_with(adapter, data, predictor_learning_rate=1.0, cost_weight=1e-9, refiner_rank=0, patience=None)


# --- a run


def test_training_repeats_to_the_bit(adapter, data, trained: Trained) -> None:
    torch.manual_seed(99)  # the global generator has no say
    again, other = trained_with(adapter, data), trained_with(adapter, data, seed=5, refiner_iterations=1)

    def tensors(one: Trained) -> dict[str, Tensor]:
        return one.artefacts.scorers["predictor"].state_dict() | one.refiners

    assert set(tensors(again)) == set(tensors(trained))
    assert all(torch.equal(tensor, tensors(trained)[name]) for name, tensor in tensors(again).items())
    assert again.artefacts.alpha_bar == trained.artefacts.alpha_bar
    assert not torch.equal(tensors(other)["head.weight"], tensors(trained)["head.weight"])


def test_a_loss_that_is_not_finite_stops(adapter, data) -> None:
    bad = Dataset(data.images * float("inf"), data.labels)
    with pytest.raises(UserError, match=r"TrainScorer: the loss became nan at iteration 0; lower the learning rate"):
        trained_with(adapter, bad)


# --- to disk and back


def test_a_loaded_predictor_samples_the_same(adapter, data, tmp_path: Path) -> None:
    made = trained_with(adapter, data, refiner_rank=0, predictor_iterations=4)
    save_artefacts(tmp_path, made.artefacts, made.refiners, made.log)
    loaded, same_adapter = load_artefacts(tmp_path, adapter)
    assert same_adapter is adapter and loaded.alpha_bar == made.artefacts.alpha_bar
    expected = images(adapter, made.method, made.artefacts)
    assert torch.equal(images(adapter, made.method, loaded), expected)


def test_merged_refiners_are_the_trained_ones(adapter, trained: Trained, saved: Path) -> None:
    artefacts, merged = load_artefacts(saved, adapter)
    beside = DiTAdapter(copy.deepcopy(adapter.model), adapter.spec)
    lora = add_refiners(beside, blocks=2, rank=4)
    lora.load_state_dict(trained.refiners, strict=False)
    expected = images(beside, trained.method, trained.artefacts)
    plain = images(adapter, trained.method, trained.artefacts)
    assert_close(images(merged, trained.method, artefacts), expected, TRAJECTORY)
    assert deviation(plain, expected) > 10 * TRAJECTORY.allowed
    untouched = make_adapter("tiny-dit").model.state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in adapter.model.state_dict().items())
    assert not any("lora" in name for name in merged.model.state_dict())
    again, _ = load_artefacts(saved, adapter)
    assert torch.equal(images(merged, trained.method, again), images(merged, trained.method, artefacts))


def test_who_samples_without_refiners_gets_no_copy_of_the_model(
    adapter, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcbench.artefacts._merged", None)  # of FLUX.1 a copy would take half of the card
    artefacts, plain = load_artefacts(saved, adapter, refined=False)
    assert plain is adapter and "predictor" in artefacts.scorers


def truncate(folder: Path) -> None:
    path = folder / "predictor.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def test_refiners_of_p_steps_leave_i_steps_alone(adapter, trained: Trained, saved: Path) -> None:
    artefacts, refined = load_artefacts(saved, adapter)
    _, confined = load_artefacts(saved, adapter)
    confined.on_full_steps(adapter)
    uncached = make_method("uncached", {})
    assert torch.equal(images(confined, uncached, artefacts), images(adapter, uncached, artefacts))
    assert not torch.equal(images(refined, uncached, artefacts), images(adapter, uncached, artefacts))

    both, own, none = (
        sample_batch(model, trained.method, NFE, SETTINGS, torch.arange(3), artefacts, traced=3)
        for model in (refined, confined, adapter)
    )
    first_p_step = next(step for step in range(NFE) if step not in both.plans.i_steps)
    assert own.plans.i_steps == both.plans.i_steps
    assert torch.equal(own.xt[:first_p_step], none.xt[:first_p_step])
    assert not torch.equal(own.xt[0], both.xt[0])
    assert not torch.equal(own.xt[first_p_step], none.xt[first_p_step])


def swap(folder: Path) -> None:
    """A valid file with other numbers."""
    path = folder / "predictor.safetensors"
    tensors, _ = read_tensors(path)
    write_tensors(path, {name: tensor + 1 for name, tensor in tensors.items()})


def remove_refiners(folder: Path) -> None:
    (folder / "refiners.safetensors").unlink()


def garble_log(folder: Path) -> None:
    (folder / "artefacts.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, r"predictor\.safetensors: truncated"),
        (swap, r"predictor\.safetensors: is not the file that artefacts\.json vouches for; train the row again"),
        (remove_refiners, r"refiners\.safetensors: not found"),
        (garble_log, r"artefacts\.json: not valid JSON"),
    ],
)
def test_damaged_artefacts_are_refused(adapter, saved: Path, damage, says: str) -> None:
    damage(saved)
    with pytest.raises(UserError, match=says) as caught:
        load_artefacts(saved, adapter)
    assert "\n" not in str(caught.value)


def test_artefacts_of_another_model_are_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"\.safetensors: .*train") as caught:
        load_artefacts(saved, make_adapter("digits-dit"))
    assert "\n" not in str(caught.value)


def test_an_interrupted_save_is_not_taken_for_a_finished_one(trained: Trained, saved: Path) -> None:
    """artefacts.json is written last, and names every file with its digest."""
    log = json.loads((saved / "artefacts.json").read_text())
    assert set(log["files"]) == {"predictor", "refiners"}
    others = [path.stat().st_mtime_ns for path in saved.glob("*.safetensors")]
    assert (saved / "artefacts.json").stat().st_mtime_ns >= max(others)
