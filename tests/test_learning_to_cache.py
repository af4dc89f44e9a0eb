"""Learning-to-Cache: against its reference, its router's way through training and files, and its pairing of steps."""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tcbench.artefacts import as_table, load_artefacts, read_router, save_artefacts
from tcbench.budget.costing import macs_of
from tcbench.config.load import load_suite
from tcbench.data import Dataset
from tcbench.engine.engine import Engine
from tcbench.errors import UserError
from tcbench.golden.case import Case
from tcbench.golden.check import check_case
from tcbench.golden.sampling import sample_case
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Run, Table
from tcbench.models.dit import DiTAdapter
from tcbench.plan import Site
from tcbench.record.executed import PlanRecord
from tcbench.record.files import read_json, read_tensors, write_json, write_tensors
from tcbench.registry import make_method
from tcbench.samplers import ReferenceDDIM, SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.stages.ready import load_adapter, ready_row
from tcbench.stages.sample import row_fingerprint
from tcbench.stages.score import plans_digest
from tcbench.stages.train import train_row
from tcbench.trainable import TrainRouter
from tcbench.training.caching import train
from tcbench.training.pairs import Pairs
from tcbench.training.routers import LOGIT_BOUND, RouterTrainer
from tests.floors import LOSS, assert_close

from .conftest import GOLDEN, make_adapter, make_run
from .test_config import changed, written

NFE = 6
SETTINGS = SamplerSettings(guidance_scale=1.5)
GATES = 8  # branches of tiny-dit
FEW: dict[str, Any] = {"iterations": 12, "batch_size": 4, "learning_rate": 0.3}
OPEN, SHUT = 4.0, -4.0


@pytest.fixture(scope="module")
def adapter() -> DiTAdapter:
    """A model of this module's own, because training freezes it."""
    adapter = make_adapter("tiny-dit")
    adapter.model.requires_grad_(False)
    return adapter


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    return Dataset(torch.randn(40, 4, 16, 16, generator=generator), labels)


def run_of(adapter: DiTAdapter, nfe: int, router: Table | None = None) -> Run:
    return make_run(adapter, nfe, torch.arange(2), Artefacts(tables={"router": router} if router else {}))


def router_with(nfe: int, row: list[float]) -> Table:
    """The same row for every step."""
    return (tuple(row),) * nfe


# --- the reference's numbers (tests/test_golden.py holds the files of tests/golden themselves)


SAMPLED, TRAINED = "l2c_ddim20", "l2c_router_train_soft"


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A writable copy of the cases."""
    for path in GOLDEN.glob("*"):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def change(folder: Path, name: str, **changes: Any) -> None:
    """Replace a case's file by one with other settings (name.json) or tensors (name.safetensors)."""
    path = folder / name
    content = read_json(path) if path.suffix == ".json" else read_tensors(path)[0]
    path.unlink()
    (write_json if path.suffix == ".json" else write_tensors)(path, content | changes)


def missed(folder: Path, name: str) -> set[str]:
    """Quantities of a case that are not reproduced."""
    return {key for key, entry in check_case(folder, name)["quantities"].items() if not entry["passed"]}


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_the_runner_sees_another_threshold(case: Path, threshold: float) -> None:
    change(case, f"{SAMPLED}.json", thres=threshold)
    router = read_tensors(case / f"{SAMPLED}.safetensors")[0]["router_prob"][::2].sigmoid()
    quantities = check_case(case, SAMPLED)["quantities"]
    assert quantities["recomputed"]["error"] == ((router > 0.1) & (router <= threshold)).sum() > 0
    assert quantities["final"]["error"] > 1e-3


@pytest.mark.parametrize(
    ("settings", "nfe"),
    [
        ({"timestep_respacing": "50"}, 50),
        ({"timestep_respacing": "ddim10"}, 10),
        ({"timestep_respacing": "7", "sampler": "p_sample_loop (ancestral)"}, 7),
    ],
)
def test_other_samplers_and_steps(case: Path, settings: dict[str, Any], nfe: int) -> None:
    """A case of our own: for the path, not the values."""
    generator = torch.Generator().manual_seed(2)
    given = {
        "router_prob": 4 * torch.randn(nfe, GATES, generator=generator),
        "noise": torch.randn(nfe, 2, 4, 16, 16, generator=generator),
    }
    write_json(case / "own.json", read_json(GOLDEN / f"{SAMPLED}.json") | settings)
    write_tensors(case / "own.safetensors", given)
    method, router = make_method("learning_to_cache", {}), Artefacts(tables={"router": as_table(given["router_prob"])})
    outcome = sample_case(Case(case, "own"), method, router)
    write_tensors(case / "own.safetensors", given | outcome.tensors)
    assert missed(case, "own") == set()
    assert len(outcome.executed.steps) == nfe
    assert 0 < sum(value == "none" for value in outcome.executed.to_json()[-1].values()) < GATES
    change(case, "own.safetensors", router_prob=given["router_prob"].roll(2, dims=0))  # another step's row
    assert {"eps", "final"} <= missed(case, "own")
    if "sampler" in settings:
        change(case, "own.safetensors", router_prob=given["router_prob"], noise=given["noise"].flip(0))
        assert {"eps", "final"} <= missed(case, "own")


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"l1": 1e-4}, {"loss", "gradients"}),
        ({"optimizer": "AdamW lr 1e-2"}, {"logits"}),
        ({"dropout_prob": 0.0}, {"mse_per_sample"}),
        ({"ste_threshold": 0.5}, {"data_loss"}),
    ],
)
def test_the_runner_sees_other_training_settings(case: Path, settings: dict[str, Any], wrong: set[str]) -> None:
    change(case, f"{TRAINED}.json", **settings)
    found = missed(case, TRAINED)
    assert wrong <= found and "timesteps" not in found


class ByHand:
    """Router training without this package's engine, trainer or sampler: hooks on the plain diffusers model.

    Every branch's output before its gate is kept, and on the later step of a pair mixed with the kept one.
    """

    def __init__(self, model: Any, nfe: int, threshold: float | None) -> None:
        self.model, self.nfe, self.threshold = model, nfe, threshold
        self.kept: dict[int, Tensor] = {}
        self.weights: Tensor | None = None
        for number, block in enumerate(model.transformer_blocks):
            for branch, module in enumerate((block.attn1, block.ff)):
                module.register_forward_hook(lambda _, __, out, key=2 * number + branch: self.mix(key, out))

    def mix(self, key: int, out: Tensor) -> Tensor:
        if self.weights is None:
            self.kept[key] = out
            return out
        return self.weights[key] * out + (1 - self.weights[key]) * self.kept[key]

    def output(self, x: Tensor, timestep: int, label: Tensor) -> Tensor:
        return self.model(x, torch.full((len(x),), timestep), label).sample

    def step(self, row: Tensor, pair: int, x0: Tensor, noise: Tensor, label: Tensor, price: float) -> dict[str, Any]:
        """One loss of a pair, with its gradient in `row`."""
        odd, even = (round(index * 999 / (self.nfe - 1)) for index in (2 * pair + 1, 2 * pair))
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        x = kept[odd] ** 0.5 * x0 + (1 - kept[odd]) ** 0.5 * noise
        with torch.no_grad():
            self.weights = None
            eps = self.output(x, odd, label)[:, :4]
            clean = (x - (1 - kept[odd]) ** 0.5 * eps) / kept[odd] ** 0.5
            x = kept[even] ** 0.5 * clean + (1 - kept[even]) ** 0.5 * eps
            cache = dict(self.kept)
            target = self.output(x, even, label)
            self.kept = cache
        soft = row.sigmoid()
        self.weights = soft if self.threshold is None else _StraightThrough.apply(soft, self.threshold)
        mse = (self.output(x, even, label) - target).square().flatten(1).mean(1)
        loss = mse.mean() + price * soft.sum()
        loss.backward()
        found = {"loss": loss, "data_loss": mse.mean(), "l1_loss_sum_of_sigmoids": soft.sum(), "mse_per_sample": mse}
        record = {key: value.tolist() for key, value in found.items()}
        return record | {"pair": pair, "t_odd": odd, "t_even": even}


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, soft, threshold):
        return (soft > threshold).float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize(("nfe", "threshold"), [(50, 0.5), (20, 0.1), (50, None)])
def test_training_by_hand_on_the_plain_model(case: Path, nfe: int, threshold: float | None) -> None:
    """Straight-through gates and 50 steps, which no file of tests/golden holds."""
    given = dict(read_tensors(GOLDEN / f"{TRAINED}.safetensors")[0])
    initial = torch.randn(nfe, GATES, generator=torch.Generator().manual_seed(4))
    rows = [row.clone().requires_grad_() for row in initial]
    optimiser = torch.optim.AdamW(rows, 1e-2, weight_decay=0)
    hand = ByHand(Case(case, TRAINED).adapter().model.requires_grad_(False), nfe, threshold)
    records, gradients = [], []
    for number, pair in enumerate((1, nfe // 2 - 1, 1)):
        label = given["labels"][number].masked_fill(given["drop_uniform"][number] < 0.1, 10)
        optimiser.zero_grad()
        records.append(hand.step(rows[2 * pair], pair, given["x_start"][number], given["noise"][number], label, 1e-4))
        gradients.append(torch.stack([torch.zeros(GATES) if row.grad is None else row.grad.clone() for row in rows]))
        optimiser.step()
    given |= {"router_prob_init": initial, "router_prob_final": torch.stack(rows).detach()}
    given["router_prob_grad"] = torch.stack(gradients)
    settings = {"num_sampling_steps": nfe, "ste_threshold": threshold, "l1": 1e-4, "optimizer": "AdamW lr 1e-2"}
    write_json(case / "own.json", read_json(GOLDEN / f"{TRAINED}.json") | settings | {"steps": records})
    write_tensors(case / "own.safetensors", given)
    assert missed(case, "own") == set()
    change(case, "own.json", ste_threshold=0.9 if threshold else 0.5)
    assert {"loss", "data_loss", "mse_per_sample"} <= missed(case, "own")


def test_nan_is_no_match(case: Path) -> None:
    eps = read_tensors(case / f"{SAMPLED}.safetensors")[0]["eps"]
    change(case, f"{SAMPLED}.safetensors", eps=eps * math.nan)
    assert missed(case, SAMPLED) == {"eps"}


def test_impossible_cases_are_refused(case: Path) -> None:
    change(case, f"{SAMPLED}.json", thres=2.0)
    with pytest.raises(UserError, match=r"threshold: .*less than or equal to 1"):
        check_case(case, SAMPLED)
    settings = read_json(case / f"{SAMPLED}.json")
    (case / f"{SAMPLED}.json").unlink()
    write_json(case / f"{SAMPLED}.json", {key: value for key, value in settings.items() if key != "thres"})
    with pytest.raises(UserError, match=rf"{SAMPLED}\.json: no 'thres'"):
        check_case(case, SAMPLED)
    change(case, f"{TRAINED}.json", optimizer="SGD")
    with pytest.raises(UserError, match=rf"{TRAINED}\.json: optimizer: names no learning rate"):
        check_case(case, TRAINED)


# --- plans


@pytest.mark.parametrize(("nfe", "full"), [(6, (0, 2, 4)), (5, (0, 1, 3))])
def test_steps_are_paired_from_the_end(adapter: DiTAdapter, nfe: int, full: tuple[int, ...]) -> None:
    """Without a router second steps reuse everything, which is FORA with a gap of 2 behind every full step."""
    method, run = make_method("learning_to_cache", {}), run_of(adapter, nfe)
    assert method.i_steps(run) == full
    if nfe % 2 == 0:
        sample = [
            sample_batch(adapter, make_method(name, options), nfe, SETTINGS, torch.arange(2))
            for name, options in (
                ("learning_to_cache", {}),
                ("fora", {"num_full_steps": nfe // 2, "placement": "start"}),
            )
        ]
        assert sample[0].plans == sample[1].plans and torch.equal(sample[0].image, sample[1].image)
        assert plans_digest(sample[0].plans) == plans_digest(sample[1].plans) is not None
        three = PlanRecord.from_json([{"block 0": "all", "block 1": 3}])
        assert plans_digest(three) is None  # which three tokens is not said


@pytest.mark.parametrize(("threshold", "opened"), [(0.0, 7), (0.1, 6), (0.5, 4), (0.6, 2), (1.0, 0)])
def test_the_threshold_opens_branches_strictly_above_it(adapter: DiTAdapter, threshold: float, opened: int) -> None:
    logits = [1.0, 1.0, 0.1, 0.1, 0.0, 0.0, -1000.0, -4.0]  # sigmoid: .73, .73, .52, .52, .5, .5, 0, .018
    method = make_method("learning_to_cache", {"threshold": threshold})
    run = run_of(adapter, NFE, router_with(NFE, logits))
    recomputed = method.recomputed(run, 1)
    assert sum(recomputed.values()) == opened
    assert recomputed[Site(3, "attn")] is False and recomputed[Site(0, "attn")] is (threshold < 0.7)
    assert all(method.recomputed(run, 0).values())


def test_columns_are_attention_then_mlp_of_every_block(adapter: DiTAdapter) -> None:
    for column, site in ((0, Site(0, "attn")), (1, Site(0, "mlp")), (5, Site(2, "mlp")), (6, Site(3, "attn"))):
        row = [SHUT] * GATES
        row[column] = OPEN
        run = run_of(adapter, NFE, router_with(NFE, row))
        recomputed = make_method("learning_to_cache", {}).recomputed(run, 3)
        assert [at for at, computed in recomputed.items() if computed] == [site]


def test_rows_are_numbered_from_the_last_step(adapter: DiTAdapter) -> None:
    """Rows 0, 2 and 4 serve steps 5, 3 and 1; odd rows are never read."""
    router = tuple((OPEN if index in (1, 2, 3, 5) else SHUT,) * GATES for index in range(NFE))
    run = run_of(adapter, NFE, router)
    assert make_method("learning_to_cache", {}).i_steps(run) == (0, 2, 3, 4)
    plans = sample_batch(
        adapter, make_method("learning_to_cache", {}), NFE, SETTINGS, torch.arange(2), run.artefacts
    ).plans
    assert [set(plan.values()) for plan in plans.to_json()] == [{"all"}, {"none"}, {"all"}, {"all"}, {"all"}, {"none"}]


@pytest.mark.parametrize("router", [router_with(8, [OPEN] * GATES), router_with(NFE, [OPEN] * 56)])
def test_a_router_of_another_run_is_refused(adapter: DiTAdapter, router: Table) -> None:
    says = rf"the router has {len(router)} steps of {len(router[0])} branches, the run has {NFE} of {GATES}"
    with pytest.raises(UserError, match=says):
        make_method("learning_to_cache", {}).i_steps(run_of(adapter, NFE, router))


# --- training


def trainer_of(adapter: DiTAdapter, data: Dataset, logits: Tensor, **options: Any) -> RouterTrainer:
    stage = TrainRouter("router", **({"cost_weight": 0.0, "learning_rate": 0.1} | options), iterations=1, batch_size=4)
    return RouterTrainer(Pairs(adapter, data, ReferenceDDIM(NFE), seed=0), stage, logits)


def test_hard_gates_train_on_what_is_sampled(adapter: DiTAdapter, data: Dataset) -> None:
    """With straight-through gates the error is that of the inference engine's own plan, and still has a gradient."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(NFE, GATES, generator=generator)
    trainer = trainer_of(adapter, data, logits, straight_through=0.5)
    x, label = data.images[:4], data.labels[:4]
    loss = trainer.step(3, x, label)

    method = make_method("learning_to_cache", {"threshold": 0.5})
    run = Run(
        adapter.shape, trainer.pairs.sampler.timesteps, Unguided(), torch.arange(4),
        artefacts=Artefacts(tables={"router": as_table(logits)}),
    )  # fmt: skip
    engine, uncached = Engine(adapter, run, method.start(run)), Engine(adapter, run, make_method("uncached", {}))
    with torch.inference_mode():
        eps = engine(2, x, label)[:, :4]
        later, _ = trainer.pairs.sampler.step(eps, 2, x)
        error_R = (engine(3, later, label) - uncached(3, later, label)).square().flatten(1).mean(1)
    assert 0 < sum(value == "none" for value in engine.plans.to_json()[1].values()) < GATES
    assert_close(loss.mse_R, error_R, LOSS)
    assert trainer.rows[2].grad.abs().min() > 0
    assert_close(loss.gates, logits[2].sigmoid().sum(), LOSS)  # the price stays soft


def test_only_the_pairs_row_learns_and_within_bounds(adapter: DiTAdapter, data: Dataset) -> None:
    logits = torch.full((NFE, GATES), -4.95)
    trainer = trainer_of(adapter, data, logits, cost_weight=1.0)
    for _ in range(3):
        trainer.step(5, data.images[:4], data.labels[:4])
    trained = trainer.logits()
    assert torch.equal(trained[4], torch.full((GATES,), -LOGIT_BOUND))
    others = torch.arange(NFE) != 4
    assert torch.equal(trained[others], logits[others])


def trained_with(adapter: DiTAdapter, data: Dataset, **options: Any) -> tuple[Any, ...]:
    method = make_method("learning_to_cache", FEW | options)
    return method, *train(adapter, method, NFE, SETTINGS, data, seed=0)


@pytest.mark.parametrize(("cost_weight", "rises"), [(10.0, False), (1e-9, True)], ids=["dear", "cheap"])
def test_gates_follow_the_price_of_computing(adapter, data, cost_weight: float, rises: bool) -> None:
    _, artefacts, refiners, log = trained_with(adapter, data, cost_weight=cost_weight)
    history = log["stages"][0]
    assert (history["mean_gate"][-1] > history["mean_gate"][0]) is rises
    table = torch.tensor(artefacts.tables["router"])
    assert table.shape == (NFE, GATES) and table[::2].abs().max() <= LOGIT_BOUND and not refiners
    assert_close(history["mean_gate"][-1], table[::2].sigmoid().mean(), LOSS)


def test_training_repeats_to_the_bit(adapter, data) -> None:
    tables = [trained_with(adapter, data, iterations=3)[1].tables["router"] for _ in range(2)]
    assert tables[0] == tables[1]


def test_a_loss_that_is_not_finite_stops(adapter, data) -> None:
    with pytest.raises(UserError, match=r"TrainRouter: the loss became nan at iteration 0"):
        trained_with(adapter, Dataset(data.images * float("inf"), data.labels))


# --- to disk and back


@pytest.fixture(scope="module")
def trained(adapter, data) -> tuple[Any, ...]:
    return trained_with(adapter, data)


@pytest.fixture
def saved(trained, tmp_path: Path) -> Path:
    _, artefacts, refiners, log = trained
    save_artefacts(tmp_path, artefacts, refiners, copy.deepcopy(log))
    return tmp_path


def test_a_loaded_router_is_the_trained_one(adapter, trained, saved: Path) -> None:
    loaded, same_adapter = load_artefacts(saved, adapter)
    assert loaded.tables == trained[1].tables and same_adapter is adapter and not loaded.scorers


def test_a_damaged_router_is_refused(adapter, saved: Path) -> None:
    tensors, _ = read_tensors(saved / "router.safetensors")
    write_tensors(saved / "router.safetensors", {"table": tensors["table"] + 1})
    with pytest.raises(UserError, match=r"router\.safetensors: is not the file that artefacts\.json vouches for"):
        load_artefacts(saved, adapter)


# --- the reference's files


def checkpoint(path: Path, logits: Tensor) -> Path:
    """What the reference's training script saves."""
    routers = {f"{index}.prob": row.clone() for index, row in enumerate(logits)}
    torch.save({"routers": routers, "opt": {"state": {}}, "args": argparse.Namespace(l1=5e-6, lr=1e-3)}, path)
    return path


def test_import_of_a_released_router(adapter, data, tmp_path: Path) -> None:
    logits = torch.randn(NFE, GATES, generator=torch.Generator().manual_seed(0))
    path = checkpoint(tmp_path / "router.pt", logits)
    _, artefacts, _, log = trained_with(adapter, data, router=str(path))
    assert artefacts.tables == {"router": as_table(logits)} and log["stages"][0]["path"] == str(path)
    save_artefacts(tmp_path / "saved", artefacts, {}, log)
    assert load_artefacts(tmp_path / "saved", adapter)[0].tables == artefacts.tables


def test_a_changed_router_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = changed("rows/router", {"method": "learning_to_cache", "nfe": 20, "options": {"router": "router.pt"}})
    suite = load_suite(written(tmp_path, config))
    assert suite["router"].method.files() == ("router.pt",) and suite["ours"].method.files() == ()
    adapter, fingerprints = load_adapter(suite), []
    for seed in (0, 1):
        checkpoint(tmp_path / "router.pt", torch.randn(20, 28, generator=torch.Generator().manual_seed(seed)))
        if seed:
            fingerprints.append(row_fingerprint(suite["router"]))  # of the new file with the old artefacts
            with pytest.raises(UserError, match=r"router\.pt: is not the file that router was trained from; train"):
                ready_row(suite["router"], adapter)
        train_row(suite["router"])
        assert ready_row(suite["router"], adapter).artefacts.tables["router"] == read_router("router.pt")
        fingerprints.append(row_fingerprint(suite["router"]))
    assert len(set(fingerprints)) == 3


def test_macs_of_a_released_router(tmp_path: Path) -> None:
    """The released router for 20 steps opens 157 attentions and 155 MLPs, that for 50 steps 371 and 365."""
    for nfe, opens, full_steps, tmacs in ((20, (157, 155), 15, 3.694), (50, (371, 365), 38, 9.048)):
        gates = torch.full((nfe // 2 * 28, 2), SHUT)
        for branch, opened in enumerate(opens):
            gates[:opened, branch] = OPEN
        logits = torch.zeros(nfe, 56)
        logits[::2] = gates.view(nfe // 2, 56)
        router = str(checkpoint(tmp_path / "router.pt", logits))
        totals = macs_of("dit-xl-2-256", make_method("learning_to_cache", {"router": router}), nfe)
        assert totals["per_sample"] / 1e12 == pytest.approx(tmacs, abs=5e-4)
        assert totals["full_steps"] == full_steps  # here the last rows are all open
        floor = macs_of("dit-xl-2-256", make_method("learning_to_cache", {}), nfe)
        assert floor["full_steps"] == nfe // 2 and floor["per_sample"] / 1e12 == pytest.approx(0.1189 * nfe, abs=2e-3)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def other_object(path: Path) -> None:
    torch.save({"routers": {"0.prob": Path("x")}}, path)


def no_routers(path: Path) -> None:
    torch.save({"model": {}}, path)


def a_hole(path: Path) -> None:
    torch.save({"routers": {"0.prob": torch.zeros(8), "2.prob": torch.zeros(8)}}, path)


def ragged(path: Path) -> None:
    torch.save({"routers": {"0.prob": torch.zeros(8), "1.prob": torch.zeros(6)}}, path)


def infinite(path: Path) -> None:
    torch.save({"routers": {"0.prob": torch.full((8,), math.inf)}}, path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing, "not found; download it or correct the path"),
        (empty, "not a checkpoint: it is empty"),
        (other_object, r"0\.prob is missing, not a vector"),
        (no_routers, "holds no routers"),
        (a_hole, r"1\.prob is missing"),
        (ragged, "different lengths"),
        (infinite, r"0\.prob is missing, not a vector or not finite"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, damage, says: str) -> None:
    path = checkpoint(tmp_path / "router.pt", torch.zeros(4, GATES))
    damage(path)
    with pytest.raises(UserError, match=rf"router\.pt: .*{says}") as caught:
        read_router(path)
    assert "\n" not in str(caught.value)
