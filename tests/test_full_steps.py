"""Which steps compute everything, said by a list: every method that has such steps takes one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tcbench.artefacts import save_artefacts
from tcbench.budget.searching import search_steps
from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method
from tcbench.record.records import SEARCHED
from tcbench.registry import make_method, method_class, method_names
from tcbench.schedule import spread_by_scores
from tcbench.stages import ready, search
from tcbench.stages.match import Calibration
from tcbench.stages.ready import sampled_method
from tcbench.stages.search import search_row
from tests.test_toca_tokens import run_of

LISTING = [name for name in method_names() if "full_steps" in method_class(name).model_fields]


def at(name: str, **options: object) -> Method:
    return make_method(name, options)


def test_who_takes_a_list() -> None:
    assert set(LISTING) == {
        *("fora", "no_tokens", "oracle_tokens", "random_tokens", "toca", "toca_tokens", "tokencache", "tome"),
        *("clusca", "delta_dit", "hicache", "taylorseer"),
    }


@pytest.mark.parametrize("name", LISTING)
def test_a_list_is_what_is_computed(name: str) -> None:
    """Whatever else would place the full steps."""
    run = run_of(10, Artefacts(alpha_bar=(0.5,) * 10))
    assert at(name, full_steps=[0, 4, 9]).i_steps(run) == (0, 4, 9)
    with pytest.raises(UserError, match=r"full_steps: 9 is no step of 9, which are 0 to 8; remove it"):
        at(name, full_steps=[0, 4, 9]).i_steps(run_of(9))


@pytest.mark.parametrize("name", LISTING)
@pytest.mark.parametrize("steps", [[], [1, 2], [0, 4, 4], [0, 4, 2], [0, 1.5], [-1, 0]])
def test_a_list_begins_with_0_and_rises(name: str, steps: list[float]) -> None:
    with pytest.raises(UserError, match=f"methods/{name}.py: full_steps"):
        at(name, full_steps=steps)


@pytest.mark.parametrize("name", LISTING)
def test_a_list_and_a_number_exclude_each_other(name: str) -> None:
    other = "interval" if name == "toca" else "num_full_steps"
    with pytest.raises(UserError, match=f"give either {other} or full_steps"):
        at(name, full_steps=[0, 2], **{other: 2})


def test_fora_by_number_is_anchored_as_its_published_rule() -> None:
    run = run_of(50)
    published, by_number = at("fora", interval=3).i_steps(run), at("fora", num_full_steps=18).i_steps(run)
    assert len(published) == len(by_number) == 18
    assert published[0] == by_number[0] == 0 and published[-1] == by_number[-1] == 49
    assert at("fora", num_full_steps=18, placement="start").i_steps(run)[-1] == 47


def test_placements_of_an_even_spread() -> None:
    last = {"start": 45, "end": 49, "interior": 47}
    for placement, step in last.items():
        assert at("no_tokens", num_full_steps=12, placement=placement).i_steps(run_of(50))[-1] == step


FORECASTING = {"taylorseer": "first_enhance", "hicache": "first_steps", "clusca": "first_steps"}


@pytest.mark.parametrize(("name", "first"), FORECASTING.items())
def test_a_number_of_full_steps_means_the_same_for_every_method(name: str, first: str) -> None:
    """The first ones that a forecast needs, then an even spread; without any it is that of the others."""
    assert at(name, num_full_steps=5, **{first: 3}).i_steps(run_of(20)) == (0, 1, 2, 8, 14)
    assert at(name, num_full_steps=5, placement="end", **{first: 3}).i_steps(run_of(20))[-1] == 19
    assert at(name, num_full_steps=2, **{first: 3}).i_steps(run_of(20)) == (0, 1)
    for other in ("no_tokens", "delta_dit", "toca_tokens"):
        assert at(name, num_full_steps=5, **{first: 1}).i_steps(run_of(20)) == at(other, num_full_steps=5).i_steps(
            run_of(20)
        )
    with pytest.raises(UserError, match="num_full_steps=5 must lie between 1 and the number of sampled steps, 4"):
        at(name, num_full_steps=5).i_steps(run_of(4))


def test_toca_at_a_list_has_no_mixed_steps() -> None:
    run, steps = run_of(10), [0, 4, 5, 9]
    rows = at("toca", full_steps=steps).timetable(run)
    assert [step for step, row in enumerate(rows) if any(row.full)] == steps
    assert all(all(row.full) for row in rows if any(row.full)), "no step is full in some blocks alone"


# --- in a suite


def suite_of(folder: Path, **rows: dict[str, Any]) -> Suite:
    """Four steps of a small model, with these rows beside the uncached one."""
    config = {
        "suite": "steps",
        "about": {"description": "a test", "differs": "", "guidance_rule": "none"},
        "model": {"name": "digits-dit"},
        "data": {"name": "digits"},
        "sampler": {"guidance_scale": 1.5},
        "samples": {"count": 4, "batch_size": 2},
        "search": {"samples": 2, "trials": 5},
        "scoring": {"metrics": ["mae"]},
        "show": {"figure": {"nfe": 6}, "tables": {}},
        "rows": {"plain": {"method": "uncached", "nfe": 6}, **{name: {"nfe": 6, **row} for name, row in rows.items()}},
    }
    path = folder / "steps.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_suite(path)


def test_a_row_has_another_rows_full_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that alpha-bar gave a trained row, whatever the row's own options say."""
    monkeypatch.chdir(tmp_path)
    alpha_bar = (0.5, 0.4, 0.4, 0.6, 0.7, 0.5)
    options = {"num_full_steps": 3, "beta": -50, "refiner_blocks": 2}
    suite = suite_of(
        tmp_path,
        trained={"method": "tokencache", "options": options},
        fora={"method": "fora", "full_steps_of": "trained"},
        toca={"method": "toca", "full_steps_of": "trained", "options": {"interval": 2}},
    )
    spreads = dict.fromkeys(("tokens", "samples", "blocks", "steps"), 0.1)
    scores = {f"std_over_{what}": spread for what, spread in spreads.items()}
    scores |= {"alpha_bar": list(alpha_bar), "per_block": [], "histogram": {}}
    log = {"stages": [], "scores": scores}
    save_artefacts(suite["trained"].trained, Artefacts(alpha_bar=alpha_bar), {}, log)
    steps = spread_by_scores(alpha_bar, 3, -50.0)
    for name in ("fora", "toca"):
        assert sampled_method(suite[name]).i_steps(run_of(6)) == steps
        assert suite[name].before_sampling == (suite["trained"].trained / "artefacts.json",)


def test_a_search_keeps_the_number_of_full_steps_and_does_not_do_worse() -> None:
    """It finds the one list that a made-up deviation is least at, and stops where no move helps."""
    best, measured = (0, 5, 11, 18, 19), []

    def deviation(steps: tuple[int, ...]) -> float:
        measured.append(steps)
        return float(sum(abs(a - b) for a, b in zip(steps, best, strict=True)))

    tried, ended = search_steps(deviation, (0, 4, 8, 12, 16), nfe=20, trials=100)
    assert tried.best == best and ended == "no move of one full step helps"
    assert measured[0] == (0, 4, 8, 12, 16) and len(measured) == len(set(measured)) < 100
    assert {(len(steps), steps[0]) for steps in measured} == {(5, 0)}
    few, ended = search_steps(deviation, (0, 4, 8, 12, 16), nfe=20, trials=6)
    assert len(few.deviation) == 6 and ended == "all trials were used" and few.best == min(few.deviation, key=deviation)


def test_a_searched_row_samples_with_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {
        "fora": {"method": "fora", "searched": True, "options": {"num_full_steps": 4}},
        "toca": {"method": "toca", "searched": {"interval": [2, 3], "schedule": ["constant"]}, "target": "fora"},
    }
    suite = suite_of(tmp_path, **rows)
    for name in rows:
        search_row(suite[name])
        found = SEARCHED.read(suite[name].searched)
        assert 1 <= len(found["trials"]) <= 5
        least = min(found["trials"], key=lambda trial: trial["deviation"])
        assert found["options"] == least["options"]
        chosen = sampled_method(suite[name]).model_dump(mode="json")
        assert chosen == suite[name].method.model_dump(mode="json") | found["options"]
    record = SEARCHED.read(suite["fora"].searched)
    for field, value in (("row", "toca"), ("suite", "other")):
        SEARCHED.write(suite["fora"].searched, record | {field: value})
        with pytest.raises(UserError, match=f"fora.json: is of {field} {value}, not"):
            sampled_method(suite["fora"])
    SEARCHED.write(suite["fora"].searched, record)
    other = suite_of(tmp_path, fora={**rows["fora"], "options": {"num_full_steps": 3}})
    with pytest.raises(UserError, match="was searched with other settings or trained parts than row fora has"):
        sampled_method(other["fora"])


def test_a_search_loads_its_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures MACs is handed the one that samples."""
    monkeypatch.chdir(tmp_path)
    loaded = []

    def calibration(suite: Suite, **named: Any) -> Calibration:
        loaded.append(Calibration(suite, **named).adapter)
        return Calibration(suite, **named)

    monkeypatch.setattr(search, "Calibration", calibration)
    monkeypatch.setattr(ready, "load_adapter", None)  # what a measurement would load
    rows = {
        "fora": {"method": "fora", "options": {"num_full_steps": 4}},
        "toca": {"method": "toca", "searched": {"schedule": ["constant"]}, "target": "fora"},
    }
    search_row(suite_of(tmp_path, **rows)["toca"])
    assert len(loaded) == 1
