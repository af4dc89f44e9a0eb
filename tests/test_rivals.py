"""Rivals: methods side by side at MAC budgets, their knobs solved, each in a job of its own."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tcbench.budget.borrowing import check_borrowing
from tcbench.budget.costing import macs_of
from tcbench.budget.reaching import reach
from tcbench.cli import main
from tcbench.config.fields import Rivals, Row
from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.record.files import read_json
from tcbench.record.records import SCORE
from tcbench.record.rivals import RIVAL
from tcbench.record.yardstick import SEED_NOISE
from tcbench.registry import make_method
from tcbench.report.figures import figure_rivals
from tcbench.report.page import report_page
from tcbench.report.published_table import published, published_table
from tcbench.report.rivals_table import read_rivals, rivals_table
from tcbench.stages.render import render_figures, render_rivals
from tcbench.stages.rivals import run_rival
from tests.suites import altered

SMOKE = Path(__file__).parent / "smoke.yaml"
DECLARED = {
    "nfe": 4,
    "ratios": [2.0, 3.0],
    "near": 0.1,
    "metrics": ["fid", "mae"],
    "methods": {"fewer_steps": {}, "fora": {}, "toca": {"interval": [2, 3]}, "random_tokens": {}, "smoothcache": {}},
}


def declaring(**changes: Any) -> Suite:
    """The smoke suite with rivals."""
    return altered(load_suite(SMOKE), {"rivals": Rivals.model_validate(DECLARED | changes)})


def with_rows(suite: Suite, rows: dict[str, Any]) -> Suite:
    """The same with further rows."""
    return altered(suite, {"rows": suite.rows | {name: Row.model_validate(row) for name, row in rows.items()}})


# --- solving


def counted(macs: dict[float, int]) -> Any:
    """MACs by the setting of FORA's knob."""
    asked = []

    def count(method: Method) -> int:
        asked.append(method.num_full_steps)  # type: ignore[attr-defined]
        return macs[asked[-1]]

    return count, asked


def test_the_nearest_setting_is_found_in_few_trials() -> None:
    fora = make_method("fora", {})
    count, asked = counted({steps: 100 * steps for steps in range(1, 51)})
    found = reach(fora, {}, 50, 2110, count, near=0.05)
    assert (found.method.num_full_steps, found.macs) == (21, 2100)  # type: ignore[attr-defined]
    assert found.off == pytest.approx(-10 / 2110) and len(asked) <= 8


def test_a_budget_out_of_reach_has_the_nearest_setting() -> None:
    count, asked = counted({steps: 1000 + steps for steps in range(1, 51)})
    found = reach(make_method("fora", {}), {}, 50, 500, count, near=0.05)
    assert (found.macs, asked) == (1001, [1, 50]) and found.off == pytest.approx(1.002)


def test_where_macs_fall_the_best_that_was_tried_counts() -> None:
    """Measured ones may: here 37 full steps cost less than 25, which misleads the search."""
    macs = {steps: 100 * steps - (1500 if steps == 37 else 0) for steps in range(1, 51)}
    assert reach(make_method("fora", {}), {}, 50, 2800, counted(macs)[0], near=0.05).macs == 2500


def test_options_are_tried_in_order_until_one_reaches() -> None:
    def count(method: Any) -> int:
        return 1000 // method.interval + int(100 * method.fresh_ratio)

    toca = make_method("toca", {})
    reached = reach(toca, {"interval": [3, 2, 4]}, 50, 560, count, near=0.05).method
    assert reached.interval == 2  # type: ignore[attr-defined]
    reached = reach(toca, {"interval": [3, 2, 4]}, 50, 340, count, near=0.05).method
    assert reached.interval == 3  # type: ignore[attr-defined]
    nearest = reach(toca, {"interval": [3, 2, 4]}, 50, 100, count, near=0.05)
    assert nearest.method.interval == 4 and nearest.off > 0.05  # type: ignore[attr-defined]


@pytest.mark.parametrize("floor", [480, 1000])
def test_a_knob_at_its_end_counts_if_no_other_reaches(floor: int) -> None:
    def count(method: Any) -> int:
        """The first option's knob ends within 5 % of 500; the second's passes it, or stays above it."""
        return (
            max(510, 1100 - 600 * method.threshold)
            if method.first_blocks == 8
            else floor + 600 * (1 - method.threshold)
        )

    found = reach(make_method("dbcache", {}), {"first_blocks": [8, 1]}, 50, 500, count, near=0.05)
    assert (found.method.first_blocks, found.least) == ((8, True) if floor == 1000 else (1, False))  # type: ignore[attr-defined]


# --- rows


def test_a_rival_starts_from_the_suites_row_of_its_method() -> None:
    part = declaring().rival_suite
    assert part is not None
    assert part.own[0] == "rivals-reference4" and part.folder == Path("results/smoke/ablations/rivals")
    assert part["rivals-fora"].row.options == {"interval": 2} and part["rivals-fora"].label == "FORA"
    assert part["rivals-random_tokens"].row.artefacts_from == "nfe4-tokencache"
    assert part["rivals-random_tokens"].row.refiners is False, "LoRA is another method's"
    assert part["rivals-smoothcache"].trained == Path("results/smoke/trained/rivals-smoothcache")
    assert declaring().find("rivals-smoothcache").trains and load_suite(SMOKE).rival_suite is None


@pytest.mark.parametrize(("rank", "refiners"), [(2, False), (0, True)])
def test_what_needs_a_schedule_borrows_it_without_lora(rank: int, refiners: bool) -> None:
    suite = declaring(methods={"fewer_steps": {}, "tome": {}})
    trained = suite.rows["nfe4-tokencache"]
    lender = trained.model_copy(update={"options": trained.options | {"refiner_rank": rank}})
    changed = {"defaults": {"tome": {"schedule": "adaptive"}}, "rows": suite.rows | {"nfe4-tokencache": lender}}
    part = altered(suite, changed).rival_suite
    assert part is not None
    tome = part["rivals-tome"].row
    assert (tome.artefacts_from, tome.refiners) == ("nfe4-tokencache", refiners)


@pytest.mark.parametrize("anew", [{}, {"tokencache": {"num_full_steps": 2, "beta": -2000}}])
def test_a_method_is_compared_without_its_lora_too(anew: dict[str, Any]) -> None:
    methods = {"fewer_steps": {}, "tokencache": {}, "fora": {}}
    suite = declaring(methods=methods, anew=anew, without_refiners=("tokencache",))
    part, rivals = suite.rival_suite, suite.rivals
    assert part is not None and rivals is not None
    assert [*rivals.contenders] == ["fewer_steps", "tokencache", "tokencache-plain", "fora"]
    whole, plain = part["rivals-tokencache"], part["rivals-tokencache-plain"]
    assert (whole.row.refiners, plain.row.refiners) == (True, False)
    assert plain.label == "TokenCache, no LoRA" and plain.method == whole.method and not plain.trains
    assert whole.trained_as is not None and plain.artefacts == whole.artefacts
    check_borrowing(suite)


def test_a_method_can_be_trained_anew_for_the_table() -> None:
    anew = {"iterations": 7, "batch_size": 4}
    declared = {"methods": {"fewer_steps": {}, "learning_to_cache": {}}}
    rows = {"nfe4-l2c": {"method": "learning_to_cache", "nfe": 4, "options": {"cost_weight": 0.01}}}
    part = with_rows(declaring(**declared), rows).rival_suite
    assert part is not None and part["rivals-learning_to_cache"].row.artefacts_from == "nfe4-l2c"
    part = with_rows(declaring(**declared, anew={"learning_to_cache": anew}), rows).rival_suite
    assert part is not None and part["rivals-learning_to_cache"].trains
    assert part["rivals-learning_to_cache"].row.options == anew, "none of the suite's row"


def test_what_is_tried_may_not_change_what_was_trained() -> None:
    rows = {"nfe4-l2c": {"method": "learning_to_cache", "nfe": 4}}
    tried = {"fewer_steps": {}, "fora": {"placement": ["end"]}, "learning_to_cache": {"cost_weight": [5e-6, 0.1]}}
    with pytest.raises(UserError) as refused:
        check_borrowing(with_rows(declaring(methods=tried), rows))
    assert str(refused.value) == (
        "rivals.methods.learning_to_cache.cost_weight: changes what nfe4-l2c was trained with; "
        "name it under `rivals.anew`, which trains once more"
    )
    check_borrowing(with_rows(declaring(methods=tried | {"learning_to_cache": {"cost_weight": [5e-6]}}), rows))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"anew": {"tome": {}}}, "rivals.anew.tome: is not among `rivals.methods`; add it there"),
        ({"anew": {"smoothcache": {"calibration_samples": 0}}}, "rivals.anew.smoothcache"),
        ({"nfe": 5}, "rivals.nfe: nothing to compare with; add a row with method: uncached, nfe: 5"),
        ({"methods": {"fora": {}}}, "rivals.methods: lacks fewer_steps"),
        ({"methods": {"fewer_steps": {}, "uncached": {}}}, "rivals.methods.uncached: has no knob"),
        ({"methods": {"fewer_steps": {}, "fora": {"steps": [2]}}}, "rivals.methods.fora: 'steps' is no option of fora"),
        ({"methods": {"fewer_steps": {}, "fora": {"placement": []}}}, "rivals.methods.fora.placement: give values"),
        ({"metrics": ["kid"]}, "rivals.metrics: 'kid' is not among `scoring.metrics`"),
        ({"without_refiners": ["tokencache"]}, "rivals.without_refiners: tokencache is not among `rivals.methods`"),
        ({"without_refiners": ["fora"]}, "rivals.without_refiners: fora trains no LoRA here; remove it"),
        ({"samples": 4}, "rivals.samples: an interval needs two shards of 4"),
        ({"ratios": [1]}, "rivals.ratios.0"),
    ],
)
def test_a_bad_declaration_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "changed.yaml"
    path.write_text(f"{SMOKE.read_text(encoding='utf-8')}\nrivals: {DECLARED | changes}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert says in str(caught.value)


# --- a whole table


def test_a_table_of_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rivals.yaml").write_text(
        SMOKE.read_text(encoding="utf-8") + f"\nrivals: {DECLARED | {'methods': {'fewer_steps': {}, 'fora': {}}}}\n",
        encoding="utf-8",
    )
    suite = load_suite("rivals.yaml")
    for method in ("uncached", "fewer_steps", "fora"):
        assert main(["rival", "rivals.yaml", "--method", method]) == 0
    whole = macs_of("digits-dit", make_method("uncached", {}), 4)["per_sample"]
    record = RIVAL.read(Path("results/smoke/rivals/fewer_steps.json"))
    two, three = record["budgets"]
    assert two["row"] == "rivals-fewer_steps-x2" and two["options"] == {"steps": 2} and two["counted"] == "shapes"
    assert three["row"] is None and three["macs"] > 1.1 * whole / 3  # the sampler needs two steps
    score = SCORE.read(Path("results/smoke/ablations/rivals/scores/rivals-fewer_steps-x2.json"))
    assert score["macs"]["per_sample"] == two["macs"] and score["reference"] == "rivals-reference4"
    assert score["settings"]["steps"] == 2

    table, papers = render_rivals(suite, suite.folder).values()
    lines = table.formatted
    assert list(lines["Method"][:2]) == ["uncached", "Uncached, other noise"]
    assert lines["MAE to uncached"][0] == "reference" and float(lines["MAE to uncached"][1].split()[0]) > 0
    (place,) = table.tidy.index[(table.tidy["method"] == "fewer_steps") & (table.tidy["ratio"] == 3)]
    assert lines["Setting"][place] == "not reached; nearest: steps 2" and lines["FID"][place] == "—"
    assert Path("results/smoke/tables/rivals.md").exists() and Path("results/smoke/tables/rivals-papers.md").exists()
    assert papers.title == published_table().title
    other = altered(suite, {"rivals.ratios": (2.0,)})
    with pytest.raises(UserError, match=r"fewer_steps\.json: is of other ratios, \[2\.0, 3\.0\]"):
        read_rivals(other, suite.folder)
    with pytest.raises(UserError, match="--method toca: no rival of suite smoke; uncached, fewer_steps, fora"):
        run_rival(suite, "toca")
    rivals = read_rivals(suite, suite.folder)
    assert rivals is not None and rivals_table(suite, rivals).markdown() == table.markdown()
    with pytest.raises(UserError, match=r"rivals-smoothcache/artefacts\.json: not found; run `tcbench train"):
        run_rival(declaring(), "smoothcache")
    assert not Path("results/smoke/rivals/smoothcache.json").exists(), "nothing is solved from stand-ins"


def test_lines_with_and_without_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    declared = {
        "ratios": [1.5],
        "methods": {"fewer_steps": {}, "tokencache": {}, "random_tokens": {}},
        "without_refiners": ["tokencache"],
        "near": 0.3,
    }
    config = f"{SMOKE.read_text(encoding='utf-8')}\nrivals: {DECLARED | declared}\n"
    Path("rivals.yaml").write_text(config, encoding="utf-8")
    assert main(["train", "rivals.yaml", "--row", "nfe4-tokencache"]) == 0
    suite = load_suite("rivals.yaml")
    assert suite.rivals is not None
    for name in ("uncached", *suite.rivals.contenders):
        run_rival(suite, name)
    (table, _) = render_rivals(suite, suite.folder).values()
    labels = ["fewer steps", "TokenCache", "TokenCache, no LoRA", "random tokens"]
    assert list(table.formatted["Method"][2:]) == labels
    assert "Without LoRA, which was trained for another method: random tokens." in table.caption
    scores = Path("results/smoke/ablations/rivals/scores")
    whole, plain = (SCORE.read(scores / f"rivals-tokencache{end}-x1.5.json") for end in ("", "-plain"))
    assert whole["settings"] == plain["settings"] and whole["macs"] == plain["macs"]
    assert whole["samples_digest"] != plain["samples_digest"]


# --- the page

REFERENCE = Path(__file__).parent.parent / "results" / "reference" / "digits"
RIVALS_OF_DIGITS = {
    "nfe": 50,
    "ratios": [2.0],
    "metrics": ["fid", "mae"],
    "methods": {"fewer_steps": {}, "fora": {}, "toca": {}},
}


def with_score(folder: Path, source: str, name: str) -> None:
    """A committed row as one of the table of rivals."""
    score = SCORE.read(REFERENCE / "scores" / f"{source}.json") | {"row": name, "reference": "rivals-reference50"}
    SCORE.write(folder / "ablations" / "rivals" / "scores" / f"{name}.json", score)


def with_rival(folder: Path, method: str, source: str, ratio: float = 2.0) -> None:
    """A committed row as a method's at its only budget."""
    with_score(folder, source, f"rivals-{method}-x2")
    at = {"ratio": ratio, "target_macs": 10**9, "row": f"rivals-{method}-x2", "options": {}, "macs": 10**9}
    record = {"suite": "digits", "method": method, "label": method, "budgets": [at | {"counted": "shapes"}]}
    record["provenance"] = SCORE.read(REFERENCE / "scores" / f"{source}.json")["provenance"]
    RIVAL.write(folder / "rivals" / f"{method}.json", record)


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Suite, Path]:
    """(digits with a table of three rivals, its committed results with the table's uncached run alone)."""
    suite = Suite.model_validate(read_json(REFERENCE / "provenance.json")["suite"])
    folder = tmp_path / "digits"
    for part in ("scores", "grids", "trained"):
        shutil.copytree(REFERENCE / part, folder / part)
    (folder / "rivals").mkdir()
    (folder / "ablations" / "trainings" / "scores").mkdir(parents=True)
    for path in (REFERENCE / "ablations" / "trainings" / "scores").iterdir():
        shutil.copy(path, folder / "ablations" / "trainings" / "scores")
    with_score(folder, "nfe50-uncached", "rivals-reference50")
    noise = SEED_NOISE.read(REFERENCE / "scores" / "seed-noise.json")
    rows = {"rivals-reference50": noise["rows"]["nfe50-uncached"]}
    SEED_NOISE.write(folder / "ablations" / "rivals" / "scores" / "seed-noise.json", noise | {"rows": rows})
    return altered(suite, {"rivals": Rivals.model_validate(RIVALS_OF_DIGITS)}), folder


def test_the_page_shows_as_many_rivals_as_there_are(measured: tuple[Suite, Path]) -> None:
    suite, folder = measured
    none = report_page(suite, folder)
    assert "rivals-side-by-side" not in none and "rivals_frontier" not in none

    with_rival(folder, "fora", "nfe50-fora23")  # without fewer steps, with which marks compare
    with_rival(folder, "toca", "nfe50-toca", ratio=3.0)  # of a config before this one
    assert [path.name for path in render_figures(suite, folder, ["rivals_frontier"])] == ["rivals_frontier.png"]
    some = report_page(suite, folder)
    assert 'href="#rivals-side-by-side"' in some and "Not run yet: fewer_steps, toca." in some
    assert (
        some.count('<figure id="rivals_frontier">') == 1 and "Not drawn" not in some.split('<section id="figures">')[0]
    )
    table = re.search(r'<details open id="rivals">.*?</table>', some, re.DOTALL)
    assert table and "<button" in table[0] and "worse" not in table[0]
    with pytest.raises(UserError, match=r"fewer_steps\.json"):
        read_rivals(suite, folder)

    with_rival(folder, "fewer_steps", "nfe50-steps24")
    with_rival(folder, "toca", "nfe50-toca")
    table = re.search(r'<details open id="rivals">.*?</table>', report_page(suite, folder), re.DOTALL)
    assert table and "worse" in table[0] and "Not run yet" not in report_page(suite, folder)
    rivals = read_rivals(suite, folder, partial=True)
    assert rivals is not None and list(rivals.by_method) == ["fewer_steps", "fora", "toca"]

    (folder / "ablations" / "rivals" / "scores" / "rivals-fora-x2.json").unlink()
    assert "Not run yet: fora." in report_page(suite, folder)


def test_the_frontier_draws_every_rival_at_its_ratio(measured: tuple[Suite, Path]) -> None:
    suite, folder = measured
    for method, source in (("fewer_steps", "nfe50-steps24"), ("fora", "nfe50-fora23")):
        with_rival(folder, method, source)
    rivals = read_rivals(suite, folder, partial=True)
    assert rivals is not None
    assert not rivals.tell_fid, "96 samples are too few"
    figure = figure_rivals(rivals.by_method, rivals.uncached, None)
    (panel,) = figure.axes
    drawn = {container.lines[0].get_xydata().tolist()[0][0] for container in panel.containers}
    macs = rivals.uncached["macs"]["per_sample"]
    assert drawn == {macs / row["macs"]["per_sample"] for rows in rivals.by_method.values() for row in rows}
    labels = {row["label"] for rows in rivals.by_method.values() for row in rows}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == labels

    own, rows = rivals.uncached["quality"]["fid"]["value"], [row for rows in rivals.by_method.values() for row in rows]
    for row, times in zip(rows, (2, 21), strict=True):
        row["quality"]["fid"]["value"] = times * own
    fid, distance = figure_rivals(rivals.by_method, rivals.uncached, None, ("fid", "mae")).axes
    assert fid.get_title() == f"beyond 20 times uncached: {rows[1]['label']}" and distance.get_title() == ""
    assert fid.get_ylim() == pytest.approx((2 * own / 1.5, 20 * own))
    assert {line.get_ydata()[0] for line in fid.get_lines()} >= {own}


# --- what papers print


def test_papers_differ_in_one_cell() -> None:
    fora = [row for row in published() if row["method"] == "FORA" and row["steps"] == "50"]
    assert {row["paper"]: row["fid"] for row in fora if row["setting"] == "interval 3"} == {
        "SmoothCache": "3.31", "TaylorSeer": "3.55", "ProCache": "3.88",
    }  # fmt: skip
    assert [row["fid"] for row in fora if row["paper"] == "TokenCache"] == ["40.82"]
    caption = published_table().caption
    assert "FORA, interval 3, 50 steps: 3.31, 3.55, 3.88" in caption and "40.82 for FORA" in caption
    for row in published():
        assert all(row[name] == "" or float(row[name]) > 0 for name in ("fid", "sfid", "is", "cost", "speedup"))
        assert row["read"] in ("full text", "notes", "abstract", "issue of its repository")
