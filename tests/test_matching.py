"""Matched MACs: the solver against brute force, what it refuses, targets in configs and tables."""

import copy
import json
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from pydantic import Field, PositiveInt

from tcbench import matching
from tcbench.cli import main
from tcbench.config import load_suite
from tcbench.costing import macs_of
from tcbench.errors import UserError
from tcbench.matching import knob_settings, solve, targeted_rows, with_knob
from tcbench.method import Artefacts, Method
from tcbench.registry import make_method, method_names

from .test_config import VALID, changed, written
from .test_report import DIFFERS, make_latency, make_rows, table2

MODEL = "dit-xl-2-256"
OPTIONS = {"tokencache": {"num_full_steps": 4, "beta": -2000}}
WITH_KNOB = [name for name in method_names() if make_method(name, OPTIONS.get(name, {})).knob]


def macs(method: Method, nfe: int) -> int:
    return macs_of(MODEL, method, nfe)["per_sample"]


# --- the solver


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
    found = solve(MODEL, method, 10, 1.7e12, artefacts=Artefacts(tables={"router": logits}))
    assert found.reachable and 0.1 < found.setting < 0.9 and found.macs > floor.macs


# --- targets in a config


def targeting(**target: str) -> dict:
    config = copy.deepcopy(VALID)
    for row, value in target.items():
        config["rows"][row]["target"] = value
    return config


def test_shipped_targets_are_solved() -> None:
    suite = load_suite(Path(__file__).parent.parent / "config" / "digits.yaml")
    rows = targeted_rows(suite)
    assert {row.target for row in rows} == {"nfe50-tokencache", "nfe20-tokencache", "nfe10-tokencache"}
    assert all({r.target for r in rows if suite.rows[r.row].method == name} == {r.target for r in rows}
               for name in ("fewer_steps", "fora"))  # fmt: skip


def test_a_setting_that_is_not_the_nearest_is_refused(tmp_path: Path) -> None:
    config = targeting(fora="ours")
    assert [row.row for row in targeted_rows(load_suite(written(tmp_path, config)))] == ["fora"]
    config["rows"]["fora"]["options"]["num_full_steps"] = 14
    with pytest.raises(UserError, match=r"rows\.fora\.options\.num_full_steps: 14 is \+.*% off ours; 12 is nearest"):
        targeted_rows(load_suite(written(tmp_path, config)))


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
    assert all(before.row_settings(row) == after.row_settings(row) for row in VALID["rows"])


# --- targets in Table II


def test_table_2_states_target_and_miss() -> None:
    rows = make_rows()
    plain = table2(rows, make_latency(rows), None, differs=DIFFERS, guidance_scale=1.5)
    assert not [column for column in plain.formatted.columns if "target" in column]
    fora, ours = (next(row for row in rows if row["row"] == f"nfe50-{name}") for name in ("fora", "tokencache"))
    fora["target"] = ours["row"]
    table = table2(rows, make_latency(rows), None, differs=DIFFERS, guidance_scale=1.5)
    cells = table.formatted.iloc[table.tidy["row"].tolist().index("nfe50-fora")]
    assert (cells["GMACs"], cells["target GMACs"], cells["off target"]) == ("2", "2.5", "-20.00%")
    others = table.formatted[table.tidy["row"] != "nfe50-fora"]
    assert set(others["off target"]) == {"—"}
    assert "Matched: FORA to nfe50-tokencache." in table.caption
    ours |= {"not_run": "no weights"}
    table = table2(rows, make_latency(rows), None, differs=DIFFERS, guidance_scale=1.5)
    assert table.formatted.iloc[table.tidy["row"].tolist().index("nfe50-fora")]["off target"] == "not run: not counted"
    fora["target"] = "nfe50-gone"
    with pytest.raises(UserError, match="row nfe50-fora: its target `nfe50-gone` is not in the suite"):
        table2(rows, None, None, differs=DIFFERS, guidance_scale=1.5)


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
    assert match("--method", "fora", "--macs", "1e11") == 0
    assert "no setting within 1.00%; nearest: num_full_steps 1 (+160.90%)" in capsys.readouterr().out
    assert match("--method", "tokencache", "--macs", "5e12") == 0
    assert "an estimate: the batch's scores share out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--method fora --macs 0", "a budget of 0 MACs"),
        ("--method fora --macs 1e12 --like-set keys=fresh", "--like-set: these are options of --like"),
        ("--method fora --like forra", "method 'forra': no file forra.py"),
    ],
)
def test_match_refuses(capsys, arguments: str, says: str) -> None:
    assert match(*arguments.split()) == 2
    assert says in capsys.readouterr().err


def test_validate_macs(capsys, tmp_path: Path) -> None:
    path = written(tmp_path, targeting(fora="ours"))
    assert main(["validate", "--macs", str(path)]) == 0
    out = capsys.readouterr().out
    assert "  fora: -2.56% off ours, nearest setting; nothing is within 1%: num_full_steps 12 (-2.56%), " in out
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["rows"]["fora"]["options"]["num_full_steps"] = 9
    assert main(["validate", "--macs", str(written(tmp_path, config))]) == 2
    assert "12 is nearest (-2.6%)" in capsys.readouterr().err
