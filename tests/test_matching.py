"""Matched MACs: the solver against brute force, what it refuses, targets in configs and tables."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from pydantic import Field, PositiveInt

from tcbench.budget import matching
from tcbench.budget.costing import macs_of
from tcbench.budget.matching import SHAPES, Basis, knob_settings, mean, solve, targeted_rows, with_knob
from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method
from tcbench.registry import make_method, method_class, method_names
from tcbench.sampling import sample_batch
from tcbench.stages.match import Calibration
from tcbench.stages.ready import load_adapter, ready_row, sampler_settings
from tcbench.stages.train import train_row
from tcbench.training.pairs import CALIBRATION_INDEX
from tests.suites import altered

from .test_config import VALID, changed, written
from .test_report import DIFFERS, main_table, make_latency, make_rows

MODEL = "dit-xl-2-256"
OPTIONS = {"tokencache": {"num_full_steps": 4, "beta": -2000}}
WITH_KNOB = [name for name in method_names() if (method := method_class(name)).knob and method.decides != "host"]
ON_THE_HOST = [name for name in method_names() if method_class(name).decides == "host"]


@cache
def totals(method: Method, nfe: int) -> dict:
    return macs_of(MODEL, method, nfe)


def macs(method: Method, nfe: int) -> int:
    return totals(method, nfe)["per_sample"]


@pytest.fixture
def costed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver looks up what was costed, by hand or for another budget: costing again gives the same, in seconds."""
    monkeypatch.setattr(matching, "macs_of", lambda model, method, nfe, artefacts: totals(method, nfe))


# --- the solver


@pytest.mark.usefixtures("costed_once")
@pytest.mark.parametrize("share", [0.2, 0.45, 0.62, 1.3])
@pytest.mark.parametrize("name", WITH_KNOB)
def test_no_setting_is_nearer(name: str, share: float) -> None:
    nfe, method = 12, make_method(name, OPTIONS.get(name, {}))
    target = share * macs(make_method("uncached", {}), nfe)
    found = solve(MODEL, method, nfe, target)
    settings = knob_settings(method, nfe)
    by_hand = [macs(with_knob(method, setting), nfe) for setting in settings[:: max(1, len(settings) // 25)]]
    assert found.macs == macs(found.method, nfe)
    assert abs(found.macs - target) <= min(abs(other - target) for other in by_hand) * (1 + 1e-9)
    assert found.reachable == (abs(found.macs / target - 1) <= 0.01)
    if len(by_hand) == len(settings):
        below, above = [m for m in by_hand if m < target], [m for m in by_hand if m >= target]
        assert [m for _, m in found.nearest] == [*sorted(below)[-1:], *sorted(above)[:1]]
    assert {key for key, value in found.method.model_dump().items() if value != getattr(method, key)} <= {method.knob}


@pytest.mark.parametrize("name", ON_THE_HOST)
def test_what_depends_on_the_sample_is_not_matched_by_shapes(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: its MACs depend on the sample; match a suite's row"):
        solve(MODEL, make_method(name, {}), 12, 1e12)


@pytest.mark.usefixtures("costed_once")
@pytest.mark.parametrize(
    ("name", "setting"),
    [("fewer_steps", 21), ("fora", 7), ("no_tokens", 30), ("random_tokens", 12), ("tokencache", 12)],
)
def test_a_settings_own_macs_give_it_back(name: str, setting: int) -> None:
    method = make_method(name, {"beta": -8000} if name == "tokencache" else {})
    found = solve(MODEL, method, 50, macs(with_knob(method, setting), 50))
    assert (found.setting, found.off_target, found.reachable) == (setting, 0, True)


def test_overheads_are_charged() -> None:
    """TokenCache's predictor costs FORA and fewer steps one more full step than the paper's own count gives them."""
    totals = macs_of(MODEL, make_method("tokencache", {}), 50)
    steps = {
        rule: solve(MODEL, make_method("fewer_steps", {}), 50, totals[rule]).setting
        for rule in ("per_sample", "per_sample_without_overheads")
    }
    assert steps == {"per_sample": 22, "per_sample_without_overheads": 21}


class Falling(Method):
    name = "falling"
    label = "falling"
    knob = "share"
    share: float = Field(0.5, ge=0.25, le=1)


class Unbounded(Method):
    name = "unbounded"
    label = "unbounded"
    knob = "threshold"
    threshold: float = Field(0.5, ge=0)


class Bounded(Method):
    name = "bounded"
    label = "bounded"
    knob = "every"
    every: int | None = Field(None, gt=1, le=6)
    other: PositiveInt = 3


class Open(Method):
    name = "open"
    label = "open"
    knob = "ratio"
    ratio: float | None = Field(None, gt=0, lt=0.0004)


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch):
    """Costs by formula of methods that are in no file, so that any shape of the curve can be tried."""
    classes: ClassVar[dict] = {cls.name: cls for cls in (Falling, Unbounded, Bounded, Open)}
    monkeypatch.setattr(matching, "make_method", lambda name, options: classes[name](**options))

    def use(cost):
        monkeypatch.setattr(matching, "macs_of", lambda model, method, nfe, artefacts: {"per_sample": cost(method)})

    return use


def test_a_falling_float_knob(formula) -> None:
    formula(lambda method: round(1e9 * (2 - method.share)))
    found = solve(MODEL, Falling(), 50, 1.3333e9)
    assert (found.setting, found.macs, found.reachable) == (0.6667, 1_333_300_000, True)
    for target, setting in ((5e9, 0.2501), (1e8, 0.9999)):  # beyond both ends
        found = solve(MODEL, Falling(), 50, target)
        assert (found.setting, found.reachable, len(found.nearest)) == (setting, False, 1)


def test_a_step_between_two_settings_is_reported_from_both_sides(formula) -> None:
    formula(lambda method: 100 if method.share < 0.4 else 300)
    found = solve(MODEL, Falling(), 50, 190)
    assert not found.reachable and found.nearest == [(0.3999, 100), (0.4, 300)] and found.setting == 0.3999
    assert solve(MODEL, Falling(), 50, 210, tolerance=0.6).reachable


def test_costs_that_rise_and_fall_are_refused(formula) -> None:
    formula(lambda method: round(1e6 * (method.share - 0.6) ** 2) + 1)
    with pytest.raises(UserError, match=r"falling: MACs do not rise with share throughout \(0\.2501: \d+, "):
        solve(MODEL, Falling(), 50, 5e4)


def test_where_a_knob_may_go(formula) -> None:
    assert knob_settings(Bounded(), 50) == [2, 3, 4, 5, 6]
    assert knob_settings(Bounded(), 4) == [2, 3, 4]
    assert knob_settings(Open(), 50) == [0.0001, 0.0002, 0.0003]
    settings = knob_settings(Falling(), 50)
    assert (settings[0], settings[1], settings[-1], len(settings)) == (0.2501, 0.2502, 0.9999, 7499)
    with pytest.raises(UserError, match=r"methods/unbounded\.py: knob 'threshold' must be an integer, or declare"):
        knob_settings(Unbounded(), 50)


def test_steps_that_cannot_be_sampled_are_left_out() -> None:
    assert knob_settings(make_method("fewer_steps", {}), 5) == [2, 3, 4, 5]
    assert knob_settings(make_method("fora", {}), 5) == [1, 2, 3, 4, 5]


def test_refusals() -> None:
    with pytest.raises(UserError, match="'uncached' has no knob"):
        solve(MODEL, make_method("uncached", {}), 50, 1e12)
    with pytest.raises(UserError, match="a budget of -1 MACs cannot be met"):
        solve(MODEL, make_method("fora", {}), 50, -1)
    with pytest.raises(UserError, match="give either interval or num_full_steps"):
        solve(MODEL, make_method("fora", {"interval": 3}), 50, 1e12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allocation": "uniform", "keys": "fresh"}, None),
        ({"keys": "cached"}, "skips its modulation"),
        ({"keys": "fresh"}, "quadratic"),
        ({"keys": "recomputed"}, "and its keys and values"),
    ],
)
def test_estimates_say_so(options: dict, says: str | None) -> None:
    found = solve(MODEL, make_method("tokencache", OPTIONS["tokencache"] | options), 10, 1e12)
    assert (found.estimate is None) if says is None else (says in found.estimate)
    assert solve(MODEL, make_method("random_tokens", {"keys": "fresh"}), 10, 1e12).estimate is None


def test_a_trained_router_is_matched_by_its_threshold() -> None:
    """By default the method costs its floor at any threshold; with a router the threshold has a price."""
    method, rows = make_method("learning_to_cache", {}), 2 * 28
    floor = solve(MODEL, method, 10, 1.7e12)
    assert not floor.reachable and "the method's floor" in str(floor.estimate)
    logits = tuple(tuple(4 * (unit / rows) - 2 for unit in range(rows)) for _ in range(10))
    found = solve(MODEL, method, 10, 1.7e12, basis=Basis(Artefacts(tables={"router": logits})))
    assert found.reachable and 0.1 < found.setting < 0.9 and found.macs > floor.macs
    assert found.estimate is None


def test_costs_that_depend_on_the_sample_are_matched_by_their_mean_over_batches(formula) -> None:
    def measure(method: Method) -> list[int]:
        return [round(1e9 * (2 - method.share)) + off for off in (-300_000, 100_000, 500_000)]  # mean +100_000

    formula(lambda method: 1)  # shapes say nothing
    found = solve(MODEL, Falling(), 50, 1.3334e9, basis=Basis(measure=measure))
    assert (found.setting, found.macs, found.reachable) == (0.6667, 1_333_400_000, True)
    assert found.batches == (1_333_000_000, 1_333_400_000, 1_333_800_000) and found.estimate is None


# --- rows of a suite, with what was trained for them


NFE = 10
"""Of those rows: as many steps as it takes for a router to have a setting within the tolerance."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, and its `ours` and `router` trained for an iteration or two."""
    folder = tmp_path_factory.mktemp("trained")
    config = changed("samples/batch_size", 2)
    config["show"]["figure"]["nfe"] = NFE
    for row in config["rows"].values():
        row["nfe"] = NFE
        if "options" in row:
            row["options"]["num_full_steps"] //= 2
    config["defaults"]["tokencache"] |= dict.fromkeys(("predictor_iterations", "refiner_iterations"), 1)
    config["defaults"]["tokencache"] |= {"training_batch_size": 2, "alpha_samples": 2, "refiner_rank": 1}
    config["rows"]["router"] = {"method": "learning_to_cache", "nfe": NFE, "target": "ours"}
    config["rows"]["router"]["options"] = {"iterations": 1, "batch_size": 2, "threshold": 0.2}
    config["rows"]["untrained"] = {"method": "learning_to_cache", "nfe": NFE}
    suite = load_suite(written(folder, config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for row in ("ours", "router"):
            train_row(suite[row])
    return folder


@pytest.fixture
def suite(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.chdir(trained)
    return load_suite("mini.yaml")


def test_what_macs_are_counted_from(suite: Suite) -> None:
    basis_of = Calibration(suite).basis
    assert basis_of(suite["fora"]) == basis_of(suite["untrained"]) == SHAPES
    assert "floor" in str(basis_of(suite["untrained"]).estimate(suite["untrained"].method))
    router = basis_of(suite["router"])
    assert router.measure is None and router.estimate(suite["router"].method) is None
    assert set(router.artefacts.tables) == {"router"}
    none = basis_of(suite["none"])  # its schedule is that of the trained alpha-bar
    assert none.measure is None and len(none.artefacts.alpha_bar) == NFE


def test_macs_that_depend_on_the_sample_are_those_of_a_run(suite: Suite) -> None:
    method, basis = suite["ours"].method, Calibration(suite, batches=3).basis(suite["ours"])
    measured = basis.macs(suite.model.name, method, NFE)
    ready = ready_row(suite["ours"], load_adapter(suite))
    size = suite.samples.batch_size
    start = CALIBRATION_INDEX + 2 * size
    third = sample_batch(
        ready.adapter,
        method,
        NFE,
        sampler_settings(suite["ours"]),
        torch.arange(start, start + size),
        ready.artefacts,
    )
    assert len(measured) == 3 and measured[2] == third.macs["per_sample"]


def test_training_with_other_settings_does_not_count(suite: Suite) -> None:
    changed_suite = altered(suite, {"training.seed": 1})
    assert Calibration(changed_suite).basis(changed_suite["router"]) == SHAPES


def test_match_of_a_row(suite: Suite, capsys) -> None:
    command = ["match", "--suite", "mini.yaml", "--row", "router", "--batches", "1"]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    artefacts = Calibration(suite).basis(suite["router"]).artefacts
    assert (
        record["macs"]
        == macs_of(suite.model.name, with_knob(suite["router"].method, record["setting"]), NFE, artefacts)["per_sample"]
    )
    assert len(record["target_macs_per_batch"]) == 1 and record["target_estimate"] is record["estimate"] is None
    assert main([*command[:-1], "2"]) == 0
    out = capsys.readouterr().out
    assert f"router on digits-dit, NFE {NFE}: target" in out and "  target: mean of 2 calibration batches" in out
    assert main(["match", "--suite", "mini.yaml", "--row", "fora", "--like", "untrained"]) == 0
    assert "  target: an estimate: it lacks a router: a row of learning_to_cache trains one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--row forra", "--row: suite mini has no row 'forra'; did you mean 'fora'?"),
        ("--row fora", "--like: suite mini has no row None"),
        ("--row fora --like ours --method fora", "a row has its own model, method and NFE"),
        ("--row fora --like ours --batches 0", "--batches 0: give 1 or more"),
    ],
)
def test_match_of_a_row_refuses(suite: Suite, capsys, arguments: str, says: str) -> None:
    assert main(["match", "--suite", "mini.yaml", *arguments.split()]) == 2
    assert says in capsys.readouterr().err


def test_a_row_settled_by_training_may_miss_by_the_tolerance(suite: Suite) -> None:
    """Another machine's router would have another nearest setting; one that is far off is refused all the same."""
    basis_of = Calibration(suite, batches=1).basis
    nearest = solve(
        suite.model.name,
        suite["router"].method,
        NFE,
        mean(basis_of(suite["ours"]).macs(suite.model.name, suite["ours"].method, NFE)),
        basis=basis_of(suite["router"]),
    )

    def at(threshold: float) -> Suite:
        rows = suite.rows | {
            "router": suite.rows["router"].model_copy(
                update={"options": suite.rows["router"].options | {"threshold": threshold}}
            )
        }
        return suite.model_copy(update={"rows": rows})

    def trained(entry: Entry) -> Basis:
        return basis_of(suite[entry.name])

    assert nearest.reachable
    for row in targeted_rows(at(nearest.setting), trained):
        assert (row.row, row.target, row.estimates) == ("router", "ours", ()) and abs(row.off_target) <= 0.01
    with pytest.raises(UserError, match=r"rows\.router\.options\.threshold: 0\.99 is -"):
        list(targeted_rows(at(0.99), trained))


# --- targets in a config


def targeting(**target: str) -> dict:
    config = copy.deepcopy(VALID)
    for row, value in target.items():
        config["rows"][row]["target"] = value
    return config


def test_shipped_targets_are_solved() -> None:
    suite = load_suite(Path(__file__).parent.parent / "config" / "digits.yaml")
    rows = list(targeted_rows(suite))
    assert {row.target for row in rows} == {"nfe50-tokencache", "nfe20-tokencache", "nfe10-tokencache"}
    assert all({r.target for r in rows if suite.rows[r.row].method == name} == {r.target for r in rows}
               for name in ("fewer_steps", "fora"))  # fmt: skip


def test_a_setting_that_is_not_the_nearest_is_refused(tmp_path: Path) -> None:
    config = targeting(fora="ours")
    assert [row.row for row in targeted_rows(load_suite(written(tmp_path, config)))] == ["fora"]
    config["rows"]["fora"]["options"]["num_full_steps"] = 14
    with pytest.raises(UserError, match=r"rows\.fora\.options\.num_full_steps: 14 is \+.*% off ours; 12 is nearest"):
        list(targeted_rows(load_suite(written(tmp_path, config))))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (targeting(fora="theirs"), "rows.fora.target: 'theirs' is not another row with nfe 20; give one of"),
        (targeting(fora="fora"), "rows.fora.target: 'fora' is not another row"),
        (targeting(plain="ours"), "rows.plain.target: nothing to match 'uncached' with; it has no knob"),
        (targeting(fora="none", none="ours"), "rows.fora.target: 'none' is matched to 'ours' itself; name that row"),
        (
            changed("rows/fora", {"method": "fora", "nfe": 20, "target": "ours"}),
            "rows.fora.target: nothing to match 'fora' with; set num_full_steps in its options",
        ),
    ],
    ids=["no such row", "itself", "no knob", "a chain", "the knob is not set"],
)
def test_targets_that_make_no_sense(tmp_path: Path, config: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_suite(written(tmp_path, config))
    assert says in str(caught.value)


def test_a_target_changes_no_sample(tmp_path: Path) -> None:
    before, after = (load_suite(written(tmp_path, config)) for config in (VALID, targeting(fora="ours")))
    assert all(before[row].sample_settings == after[row].sample_settings for row in VALID["rows"])


# --- targets in Table II


def test_table_2_states_target_and_miss() -> None:
    rows = make_rows()
    plain = main_table(rows, make_latency(rows), None, differs=DIFFERS, guidance_scale=1.5)
    assert not [column for column in plain.formatted.columns if "target" in column]
    fora, ours = (next(row for row in rows if row["row"] == f"nfe50-{name}") for name in ("fora", "tokencache"))
    fora["target"] = ours["row"]
    table = main_table(rows, make_latency(rows), None, differs=DIFFERS, guidance_scale=1.5)
    cells = table.formatted.iloc[table.tidy["row"].tolist().index("nfe50-fora")]
    assert (cells["GMACs"], cells["target GMACs"], cells["off target"]) == ("2", "2.5", "-20.00%")
    others = table.formatted[table.tidy["row"] != "nfe50-fora"]
    assert set(others["off target"]) == {"—"}
    assert "Matched to nfe50-tokencache: FORA." in table.caption
    ours |= {"not_run": "no weights"}
    table = main_table(rows, make_latency(rows), None, differs=DIFFERS, guidance_scale=1.5)
    assert table.formatted.iloc[table.tidy["row"].tolist().index("nfe50-fora")]["off target"] == "not run: not counted"
    fora["target"] = "nfe50-gone"
    with pytest.raises(UserError, match="row nfe50-fora: its target `nfe50-gone` is not in the suite"):
        main_table(rows, None, None, differs=DIFFERS, guidance_scale=1.5)


# --- the commands


def match(*arguments: str) -> int:
    return main(["match", "--model", MODEL, "--nfe", "50", *arguments])


def test_match_prints_json(capsys) -> None:
    assert match("--method", "fora", "--like", "tokencache", "--like-set", "num_full_steps=13", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    target = macs(make_method("tokencache", {"num_full_steps": 13}), 50)
    found = solve(MODEL, make_method("fora", {}), 50, target)
    assert record["target_macs"] == target and record["macs"] == found.macs and record["setting"] == found.setting
    assert record["reachable"] and record["knob"] == "num_full_steps" and record["options"]["num_full_steps"] == 23
    assert record["nearest"] == [list(pair) for pair in found.nearest] and record["estimate"] is None


def test_match_prints_text(capsys) -> None:
    assert match("--method", "fewer_steps", "--macs", "4.98e12") == 0
    assert "  steps: 21  (4.9821e+12 MACs, +0.04%)" in capsys.readouterr().out
    assert match("--method", "fora", "--macs", "1e11") == 1  # nothing is near
    assert "no setting within 1.00%; nearest: num_full_steps 1 (+160.90%)" in capsys.readouterr().out
    assert match("--method", "tokencache", "--macs", "5e12") == 1  # by more than 1 %
    assert "an estimate: the batch's scores share out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--method fora --macs 0", "a budget of 0 MACs"),
        ("--method fora --macs 1e12 --like-set keys=fresh", "--like-set: these are options of --like"),
        ("--method fora --like forra", "method 'forra': no file forra.py"),
        ("--method fora", "no budget; give --macs or --like"),
        ("--macs 1e12", "--method is missing; give --model, --method and --nfe, or --suite and --row"),
    ],
)
def test_match_refuses(capsys, arguments: str, says: str) -> None:
    assert match(*arguments.split()) == 2
    assert says in capsys.readouterr().err


def test_validate_macs(capsys, tmp_path: Path) -> None:
    path = written(tmp_path, targeting(fora="ours"))
    assert main(["validate", "--macs", str(path)]) == 0
    out = capsys.readouterr().out
    assert "  fora: -2.56% off ours; nothing is within 1%: num_full_steps 12 (-2.56%), " in out
    assert "; an estimate, not trained yet: the batch's scores share out" in out
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["rows"]["fora"]["options"]["num_full_steps"] = 9
    assert main(["validate", "--macs", str(written(tmp_path, config))]) == 2
    assert "12 is nearest (-2.6%)" in capsys.readouterr().err
