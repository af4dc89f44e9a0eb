"""Tables, figures and grids from synthetic score files; the numbers below are made up."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import hadamard

from tcbench.config.fields import PaperTable
from tcbench.config.load import load_suite
from tcbench.errors import UserError
from tcbench.record.records import SCORE
from tcbench.registry import method_names
from tcbench.report import figures, figures_predictor
from tcbench.report.cells import interval_text, marks, marks_explained, options_text, spread_text
from tcbench.report.compare import against_references
from tcbench.report.grids import grid, save_grid
from tcbench.report.main_table import main_table
from tcbench.report.results import read_rows
from tcbench.report.rows import mac_ratio, remarks
from tcbench.report.schedule_table import table1

STEPS = {50: [0, 9, 14, 18, 21, 25, 28, 32, 35, 39, 42, 46], 20: [0, 5, 9, 12, 16]}
FLOOR = {"fid": {"n": 512, "mean": 1.1, "std": 0.25, "draws": 20}, "sfid": {"n": 512, "mean": 2.31, "std": 0.4}}
DIFFERS = "not the paper's model or data"
COMMIT = {"config_digest": "0", "git": {"commit": "0", "dirty": False}}
NAMES = ("uncached", "steps", "fora", "toca", "tokencache", "literal", "random")
DIFFERENCE_SE = 0.5 / 2.3646
"""Of a difference in FID to the uncached row: the interval is 0.5 to either side, over 8 groups."""


def quality_of(fid, mae=None):
    centres = {"fid": fid, "sfid": 3 * fid, "is": 9 - fid / 10, "precision": 0.81, "recall": 0.62, "accuracy": 0.97}
    if mae is not None:
        centres["mae"] = mae
    return {name: {"value": value, "se": value * 0.0127} for name, value in centres.items()}


PATTERNS = hadamard(8)[1:]
"""Of ones and minus ones, each with the sum 0 and all orthogonal."""


def spread(row, metric, se, pattern=0):
    """Stores replicates of which the standard error is `se`, and with which the jackknife finds no bias.

    Differences of rows with other patterns have both rows' errors, as of independent ones.
    """
    quality = row["quality"][metric]
    quality["deleted"] = (quality["value"] + se / 7**0.5 * PATTERNS[pattern]).tolist()


def make_row(nfe, name, method, label, fid, macs, mae=None, paper=None, **changes):
    row = {
        "row": f"nfe{nfe}-{name}",
        "suite": "digits",
        "method": method,
        "label": label,
        "nfe": nfe,
        "sampled_steps": nfe,
        "resolution": 16,
        "model": "digits-dit",
        "settings": {},
        "i_steps": [],
        "plans": None,
        "plan": {},
        "tokens": 64,
        "reference": f"nfe{nfe}-uncached",
        "samples": 512,
        "groups": 8,
        "group_sizes": [64] * 8,
        "control": False,
        "refiners": True,
        "target": None,
        "guidance_scale": 1.5,
        "extractor": "digits-cnn",
        "metrics_not_run": {},
        "quality": quality_of(fid, mae),
        "macs": {
            "per_sample": macs,
            "per_sample_without_overheads": round(macs * 0.9),
            "paper_rule": round(macs * 0.9),
            "by_tag": {"model": round(macs * 0.9), "predictor": macs - round(macs * 0.9)},
        },
        "macs_spread": [macs, macs],
        "cache_bytes": 10**6,
        "trajectory": None,
        "paper": paper,
        "provenance": COMMIT | {"samples": COMMIT},
    }
    spread(row, "fid", 0 if method == "uncached" else DIFFERENCE_SE, NAMES.index(name))
    if mae is not None:
        wave = [mae * step / nfe for step in range(nfe)]
        row["trajectory"] = {
            "timesteps": [round(999 - 999 * step / (nfe - 1)) for step in range(nfe)],
            "x0_mae_mean": wave,
            "x0_mae_std": [value / 4 for value in wave],
            "xt_mae_mean": [value / 2 for value in wave],
            "xt_mae_std": [value / 8 for value in wave],
        }
    return row | changes


def paper_cell(fid, latency_s, tmacs, speedup):
    return {
        "fid": fid,
        "sfid": 4.72,
        "is": 265.3,
        "precision": 0.79,
        "recall": 0.59,
        "latency_s": latency_s,
        "tmacs": tmacs,
        "speedup": speedup,
    }


def make_rows():
    rows = []
    for nfe, full in ((50, 5_000_000_000), (20, 2_000_000_000)):
        settings = {"num_full_steps": len(STEPS[nfe]), "schedule": "adaptive", "beta": -20}
        schedule = {"settings": settings, "i_steps": STEPS[nfe]}
        rows += [
            make_row(nfe, "uncached", "uncached", "DiT", 3.234, full, paper=paper_cell(2.25, 4.32, 11.86, 1.0)),
            make_row(nfe, "steps", "fewer_steps", "fewer steps", 4.1, full // 2, 0.017, sampled_steps=nfe // 2),
            make_row(nfe, "fora", "fora", "FORA", 3.4, full * 2 // 5, 0.0123),
            make_row(nfe, "toca", "toca", "ToCa", 3.9, full * 2 // 5, 0.0158),
            make_row(
                nfe, "tokencache", "tokencache", "TokenCache", 2.5, full // 4 * 2, 0.0343,
                paper_cell(2.33, 2.27, 4.94, 2.4), **schedule,
            ),
            make_row(nfe, "literal", "tokencache", "TokenCache, K/V of kept tokens", 9, full // 4 * 2, 0.11),
            make_row(nfe, "random", "random_tokens", "Random tokens", 3.8, full // 4 * 2, 0.0836, control=True),
        ]  # fmt: skip
    return rows


def test_equal_plans_are_said():
    rows = make_rows()
    table = main_table(rows, None, None, differs=DIFFERS, guidance_scale=1.5)
    assert "equal plans" not in table.caption
    for row in rows:  # equal at another NFE is no news, and rows that choose tokens have none
        row["plans"] = {"uncached": "u", "steps": "s", "fora": "f", "toca": "f"}.get(row["row"].split("-")[1])
    rows[0]["plans"] = None
    table = main_table(rows, None, None, differs=DIFFERS, guidance_scale=1.5)
    assert "FORA and ToCa (NFE 50) have equal plans" in table.caption
    assert "FORA and ToCa (NFE 20) have equal plans" in table.caption and table.caption.count("equal plans") == 2


def test_what_rows_share_is_said_once():
    """Of a training by the row that trained; rows of a table without that row are counted."""
    rows = make_rows()
    of_training = "saturated (training of nfe50-tokencache)"
    for row in rows:
        row["marks"] = [of_training] if row["row"] in ("nfe50-tokencache", "nfe50-literal", "nfe50-random") else []
        row["target"] = f"nfe{row['nfe']}-tokencache" if row["method"] in ("fora", "toca") else None
        if row["method"] == "tokencache":
            row["trainings"] = 3
    rows[1]["marks"] = rows[8]["marks"] = ["pixels without spread"]
    rows[2]["marks"] = ["saturated (training of nfe50-fora)"]
    caption = main_table(rows, None, None, differs=DIFFERS, guidance_scale=1.5).caption
    assert f"TokenCache (NFE 50) and the 2 rows that share its training: {of_training}. " in caption
    assert "fewer steps (NFE 50); fewer steps (NFE 20): pixels without spread. " in caption
    assert "FORA (NFE 50): saturated (training of nfe50-fora). " in caption
    assert "Matched to nfe50-tokencache: FORA; ToCa. Matched to nfe20-tokencache: FORA; ToCa. " in caption
    trained = "TokenCache; TokenCache, K/V of kept tokens"
    assert f"Trained 3 times at 50 steps: {trained}; at 20 steps: {trained}. " in caption
    without = [row for row in rows if row["row"] != "nfe50-tokencache" and row["target"] is None]
    assert f"2 rows that share a training: {of_training}." in remarks(without)
    assert f"and the row that shares its training: {of_training}." in remarks(rows[4:6])[0]


def test_metrics_of_the_same_margin_are_said_together():
    rows = make_rows()
    found = marks(against_references(rows, ("precision", "recall", "fid"), {("fid", 20): 0.1, ("fid", 50): 0.2}), ())
    told = marks_explained(rows, ("precision", "recall", "fid"), found)
    assert "FID 0.2 at NFE 50 and 0.1 at NFE 20." in told and told.count("No margin") == 1
    assert "Precision, Recall at NFE 50 and 20." in told


def test_a_table_of_another_models_question_has_none_of_the_papers_columns():
    table = PaperTable(title="Table VI", metrics=("fid",), paper=False)
    shown = main_table(make_rows(), None, FLOOR, differs=DIFFERS, guidance_scale=1.5, table=table)
    assert not [column for column in [*shown.tidy, *shown.formatted] if column.startswith("paper")]
    assert shown.formatted["FID"].iloc[-1] == "1.10 ± 0.25"


def test_a_table_says_only_what_it_has():
    """One of distances alone has no marks, floor or Frechet distance to explain, and of one timing no range."""
    rows = make_rows()
    for row in rows:
        row["quality"] = {"mae": row["quality"]["mae"]} if "mae" in row["quality"] else {}
    latency = make_latency(rows)
    for timing in latency["rows"].values():
        timing |= {"min_s": timing["median_s"], "max_s": timing["median_s"]}
    table = PaperTable(title="First look", metrics=("mae",), paper=False)
    shown = main_table(rows, latency, None, differs=DIFFERS, guidance_scale=1.5, table=table)
    assert "floor" not in shown.tidy["row"].tolist() and "Real images" not in shown.groups
    assert line_of(shown, "nfe50-uncached")[1]["Latency (s, batch 8)"] == "5"
    for words in ("Marks", "better", "Floor", "FID"):
        assert words not in shown.caption, words


@pytest.mark.parametrize(("width", "told", "halves"), [(832, "480×832", True), (1024, "1024", False)])
def test_a_table_says_both_sides_of_what_is_no_square_and_halves_where_there_are_two(width, told, halves):
    rows = [row | {"resolution": width} | ({"height": 480} if halves else {}) for row in make_rows()]
    table = PaperTable(title="First look", metrics=("psnr",), paper=False)
    shown = main_table(rows, None, None, differs=DIFFERS, guidance_scale=5, computes_halves=halves, table=table)
    size = "480×832" if halves else "1024×1024"
    assert set(shown.formatted["Resolution"][: len(rows)]) == {told}
    assert all(group.startswith(f"{size}, NFE") for group in shown.groups[: len(rows)])
    assert ("both CFG halves" in shown.caption) is halves
    line = line_of(shown, "nfe50-uncached")[1]
    assert line["PSNR to uncached"] == line["MAE to uncached"] == "reference"
    rows = [row for row in rows if row["trajectory"]]
    assert figures.figure_trajectory(rows, width, 50).get_suptitle().startswith(size)


def make_latency(rows):
    timed = [row for row in rows if row["method"] != "fora"]
    seconds = {row["row"]: row["macs"]["per_sample"] / 1e9 for row in timed}
    return {
        "protocol": {"device": "cpu", "dtype": "float32", "batch_size": 8, "cfg": 1.5, "threads": 1, "repeats": 5},
        "rows": {
            name: {"median_s": s, "min_s": s * 0.98, "max_s": s * 1.04, "times_s": [s]} for name, s in seconds.items()
        },
    }


def test_a_row_that_was_timed_later_is_compared_within_its_session():
    rows, latency = make_rows(), make_latency(make_rows())
    times = {"nfe50-uncached": 10.0, "nfe50-fora": 2.5}
    later = {name: {"median_s": s, "min_s": s, "max_s": s, "times_s": [s]} for name, s in times.items()}
    latency["later"] = [{"protocol": latency["protocol"], "rows": later}]
    table = main_table(rows, latency, None, differs=DIFFERS, guidance_scale=1.5)
    tidy = table.tidy.set_index("row")
    assert tidy.latency_s["nfe50-fora"] == 2.5 and tidy.latency_ratio["nfe50-fora"] == 4
    assert tidy.latency_s["nfe50-uncached"] == 5.0 and tidy.latency_ratio["nfe50-toca"] == 2.5
    assert "Timed later, beside the uncached row again, to which their latency ratio is: nfe50-fora." in table.caption
    assert "Not timed (`tcbench latency digits`): nfe20-fora." in table.caption


def test_columns_that_decide_come_first_and_the_rest_on_demand():
    table = main_table(make_rows(), make_latency(make_rows()), FLOOR, differs=DIFFERS, guidance_scale=1.5)
    assert table.in_order[:5] == ("Method", "MAC ratio", "MAE to uncached", "FID", "Latency (s, batch 8)")
    assert sorted(table.in_order) == sorted(table.formatted.columns)
    assert table.css_class("FID") == "ours" and table.css_class("sFID") == "ours rest"
    assert table.css_class("paper FID") == "paper rest"
    text = table.lead_text()
    assert "TokenCache " in text and "sFID" not in text and max(map(len, text.splitlines())) < 140


@pytest.fixture
def rows():
    return make_rows()


@pytest.fixture
def table(rows):
    return main_table(rows, make_latency(rows), FLOOR, differs=DIFFERS, guidance_scale=1.5)


def line_of(table, row_id):
    """(tidy record, printed cells) of one row."""
    position = table.tidy["row"].tolist().index(row_id)
    return table.tidy.iloc[position], table.formatted.iloc[position]


def test_report_imports_no_torch():
    code = (
        "import sys, pkgutil, importlib, tcbench.report, tcbench.record.provenance\n"
        "names = [m.name for m in pkgutil.iter_modules(tcbench.report.__path__, 'tcbench.report.')]\n"
        "assert len(names) >= 5, names\n"
        "[importlib.import_module(name) for name in names]\n"
        "tcbench.record.provenance.collect({}, [0], 0.0)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (13.2345, 12.841, 13.619, "13.23 [12.84, 13.62]"),
        (0.0125, 0.0121, 0.0129, "0.01250 [0.01210, 0.01290]"),
        (240.24, 201.0, 279.0, "240 [201, 279]"),
        (0.97, 0.97, 0.97, "0.9700 [0.9700, 0.9700]"),
        (-18466015.0, -32568729.0, -4363300.0, "-1.8e7 [-3.3e7, -0.4e7]"),
    ],
)
def test_interval_text(value, low, high, text):
    assert interval_text(value, low, high) == text


def test_a_long_list_of_options_is_shown_by_its_ends():
    options = {"fresh_ratio": 0.99991, "schedule": [1, 2] * 25, "tried": [1, 2], "beta": None}
    assert options_text(options, whole=False) == (
        "fresh_ratio 0.9999, schedule [1, 2, 1, 2, 1, 2, … 2] of 50, tried [1, 2]"
    )
    assert options_text(options).count("1, 2") == 26


def test_spreads_of_next_to_nothing_are_not_a_row_of_zeros():
    assert spread_text(1.63e-17, 1.2e-18) == "1.6e-17 ± 1.2e-18"
    assert spread_text(0.0571, 0.00124) == "0.0571 ± 0.0012"


def test_csv_round_trip(table, rows, tmp_path):
    table.write(tmp_path, "table2")
    csv = pd.read_csv(tmp_path / "table2.csv").set_index("row")
    assert list(csv.index) == [row["row"] for row in rows] + ["floor"]
    for row in rows:
        for metric, quality in row["quality"].items():
            assert csv.loc[row["row"], metric] == quality["value"]
            assert csv.loc[row["row"], f"{metric}_low"] < quality["value"] < csv.loc[row["row"], f"{metric}_high"]
        assert csv.loc[row["row"], "macs_per_sample"] == row["macs"]["per_sample"]
        assert csv.loc[row["row"], "macs_predictor"] == row["macs"]["by_tag"]["predictor"]
    ours = csv.loc["nfe50-tokencache"]
    assert (ours["paper_fid"], ours["paper_tmacs"], ours["paper_mac_ratio"]) == (2.33, 4.94, 2.4)
    assert ours["mac_ratio"] == ours["latency_ratio"] == 2.0
    assert ours["paper_latency_ratio"] == pytest.approx(4.32 / 2.27)
    assert ours["fid_difference"] == pytest.approx(-0.734)
    assert (ours["fid_mark"], ours["fid_p_holm"]) == ("better", pytest.approx(4 * 0.0103, rel=0.02))
    assert csv.loc["nfe50-uncached", "mae":"mae_se"].isna().all()
    assert csv.loc["floor", ["fid", "fid_se", "samples"]].tolist() == [1.1, 0.25, 512]


def test_rows_are_grouped_by_setting_in_suite_order(rows):
    shuffled = rows[::2] + rows[1::2]
    table = main_table(shuffled, None, FLOOR, differs=DIFFERS, guidance_scale=1.5)
    assert [heading for heading, _ in table.row_groups()] == ["16×16, NFE 50", "16×16, NFE 20", "Real images"]
    at_50 = [row["row"] for row in shuffled if row["nfe"] == 50]
    assert table.tidy["row"].tolist()[: len(at_50)] == at_50


def test_cells(table):
    _, cells = line_of(table, "nfe50-uncached")
    assert cells["FID"] == "3.234 [3.137, 3.331]"
    assert cells["paper FID"] == "2.25"
    assert cells["MAE to uncached"] == "reference"
    assert cells["GMACs"] == "5"
    assert cells["Latency (s, batch 8)"] == "5 (4.9–5.2)"
    _, cells = line_of(table, "nfe50-fora")
    assert cells["FID"] == "3.40 [3.30, 3.50] ?"
    assert cells["paper FID"] == "—"
    assert cells["MAE to uncached"] == "0.01230 [0.01193, 0.01267]"
    assert cells["MAC ratio"] == "2.50"
    assert line_of(table, "nfe20-literal")[1]["FID"].endswith(" worse")
    # -0.73 +- 0.5 (p = .010) is better among the six rows of its NFE, and would not be among all twelve of the table
    assert line_of(table, "nfe20-tokencache")[1]["FID"].endswith(" better")
    assert line_of(table, "nfe20-steps")[1]["Sampled steps"] == "10"
    assert line_of(table, "nfe20-random")[1]["Method"] == "Random tokens (control)"
    assert line_of(table, "floor")[1]["FID"] == "1.10 ± 0.25"
    assert line_of(table, "floor")[1]["Method"] == "Real subset of 512, floor"


def test_higher_is_better_for_inception_score(rows):
    for row, value in zip(rows, (8, 8, 9, 7), strict=False):
        row["quality"]["is"]["value"] = value
        spread(row, "is", 0.04 * (row["method"] != "uncached"))
    table = main_table(rows, None, FLOOR, differs=DIFFERS, guidance_scale=1.5)
    assert line_of(table, "nfe50-fora")[1]["IS"].endswith(" better")
    assert line_of(table, "nfe50-toca")[1]["IS"].endswith(" worse")


def test_a_row_of_ones_own_changes_no_other_mark(rows, table):
    mine = copy.deepcopy(rows[9]) | {"row": "nfe20-mine", "method": "mine", "label": "mine"}
    with_mine = main_table(
        [*rows, mine], make_latency(rows), FLOOR, differs=DIFFERS, guidance_scale=1.5, added=["nfe20-mine"]
    )
    assert line_of(with_mine, "nfe20-mine")[1]["FID"] == line_of(with_mine, "nfe20-fora")[1]["FID"]
    others = with_mine.formatted[with_mine.tidy["row"] != "nfe20-mine"].reset_index(drop=True)
    pd.testing.assert_frame_equal(others, table.formatted)


def test_a_row_that_no_table_lists_was_added(rows):
    suite = load_suite("config/digits.yaml")
    assert suite.added_rows == () and suite.tables == suite.show.tables
    fora = suite.rows["nfe20-fora"]
    more = load_suite("config/digits.yaml").model_copy(update={"rows": suite.rows | {"nfe20-mine": fora}})
    assert more.added_rows == ("nfe20-mine",)
    assert more.tables["table2"].rows == (*suite.tables["table2"].rows, "nfe20-mine")
    assert more.tables["table6"] == suite.tables["table6"]


def test_intervals_stay_in_the_range_of_the_metric(rows):
    rows[0]["quality"] |= {
        "fid": {"value": 3.0, "se": 5.0},
        "is": {"value": 9.99, "se": 0.4},
        "precision": {"value": 1.0, "se": 0.0},
        "recall": {"value": 0.99, "se": 0.04},
    }
    record, cells = line_of(main_table(rows, None, None, differs="", guidance_scale=1.5), "nfe50-uncached")
    assert record["fid_low"] == 0 and record["is_high"] == 10
    assert 0.99 < record["precision_low"] < 1 == record["precision_high"]
    assert 0.4 < record["recall_low"] < 0.99 < record["recall_high"] <= 1
    assert cells["FID"] == "3.0 [0.0, 14.8]"


def test_what_has_too_few_samples_is_unusable_and_says_so(rows):
    for row in rows:
        row["samples"] = 96
    table = main_table(rows, None, FLOOR, differs="", guidance_scale=1.5)
    assert line_of(table, "nfe50-fora")[1]["FID"].endswith(" unusable")
    assert "unusable: not tested, for want of 128 samples for FID and 224 samples for sFID" in table.caption
    assert line_of(table, "nfe50-fora")[0]["fid_mark"] is pd.NA


def test_missing_values_say_why_and_are_never_zero(rows):
    rows[3] = {key: value for key, value in rows[3].items() if key not in ("quality", "macs")}
    rows[3]["not_run"] = "needs weights toca.pt"
    del rows[4]["quality"]["recall"]
    table = main_table(rows, make_latency([row for row in rows if "macs" in row]), None, differs="", guidance_scale=1.5)
    tidy, cells = line_of(table, "nfe50-toca")
    assert cells["Method"] == "ToCa (not run: needs weights toca.pt)"
    ours = [column for column in table.formatted.columns[4:] if not column.startswith("paper ")]
    assert set(cells[ours]) == {"not run"}
    assert tidy[["fid", "macs_per_sample", "mac_ratio", "latency_s", "latency_ratio"]].isna().all()
    assert line_of(table, "nfe50-tokencache")[1]["Recall"] == "not run: not scored"
    assert line_of(table, "nfe50-fora")[1]["Latency (s, batch 8)"] == "not run: not timed"
    assert line_of(table, "nfe50-fora")[1]["Latency ratio"] == "not run: not timed"
    assert line_of(table, "floor")[1]["FID"] == "not run"
    assert not (table.formatted == "0").any(axis=None)
    assert not table.formatted.isin(["nan", "None", "<NA>"]).any(axis=None)


def test_mac_unit_follows_the_size(rows):
    for row in rows:
        row["macs"] |= {key: value * 3000 for key, value in row["macs"].items() if key != "by_tag"}
    table = main_table(rows, None, FLOOR, differs=DIFFERS, guidance_scale=1.5)
    assert line_of(table, "nfe50-uncached")[1]["TMACs"] == "15"
    assert "GMACs" not in table.formatted


def test_title_and_caption_name_suite_units_and_protocol(table, rows):
    schedule = table1(rows, differs=DIFFERS, stands_for=("DiT-XL/2", 256))
    assert table.title == "Table II on suite `digits` (not the paper's model or data)"
    for face in (table, schedule):
        assert "digits" in face.title and DIFFERS in face.title
        assert "<code>digits</code>" in face.html()
        assert r"\texttt{digits}" in face.latex()
        assert "`digits`" in face.markdown()
    for words in (
        "95 % interval", "delete-one-batch jackknife over 8 batches", "512 samples per row", "CFG scale 1.5",
        "TFLOPs are TMACs", "ranking only", "batch size 8", "device cpu", "[-1, 1]",
    ):  # fmt: skip
        assert words in table.caption
    assert "ranking only" not in main_table(rows, None, FLOOR, differs="", guidance_scale=1.5).caption


def test_markdown_html_and_latex_hold_the_cells(table):
    cells = [cell for cell in table.formatted.to_numpy().ravel() if cell]
    markdown, html, latex = table.markdown(), table.html(), table.latex()
    assert all(cell in markdown for cell in cells)
    assert all(cell in html for cell in cells)
    assert latex.count(r"\\") == len(table.formatted) + 1
    assert latex.count(r"\midrule") == 3 and r"\toprule" in latex and r"\bottomrule" in latex
    assert r"3.40 [3.30, 3.50] ?" in latex
    body_lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(body_lines) == len(table.formatted) + 2
    assert len({line.count("|") for line in body_lines}) == 1
    assert 'name="viewport"' in html and "position: sticky" in html
    assert not re.search(r"https?://|<script|<link", html)


def test_special_characters_are_escaped(rows):
    rows[2]["label"] = "A&B_1 100% #x <b> | $y$ {z} ~^\\"
    table = main_table(rows, None, FLOOR, differs=DIFFERS, guidance_scale=1.5)
    assert r"A\&B\_1 100\% \#x <b> | \$y\$ \{z\} \textasciitilde{}\textasciicircum{}\textbackslash{}" in table.latex()
    assert "A&amp;B_1 100% #x &lt;b&gt; |" in table.html()
    assert r"<b> \| $y$" in table.markdown()
    assert table.latex().isascii()


def test_table1_puts_the_papers_schedule_beside_ours(rows, tmp_path):
    twin = copy.deepcopy(next(row for row in rows if row["row"] == "nfe50-tokencache"))
    twin["row"] = "nfe50-tokencache-r0.5"
    even = copy.deepcopy(twin)
    even["settings"]["schedule"] = "even"  # its beta is not what chose its I-steps
    even["i_steps"] = list(range(0, 48, 4))
    table = table1([*rows, twin, even], differs=DIFFERS, stands_for=("DiT-XL/2", 256))
    table.write(tmp_path, "table1")
    csv = pd.read_csv(tmp_path / "table1.csv")
    assert csv["nfe"].tolist() == [50, 20]  # the twin shares its schedule and enters once
    assert csv["num_full_steps"].tolist() == [12, 5] and csv["paper_num_full_steps"].tolist() == [12, 9]
    assert csv["paper_beta"].tolist() == [-8000, -4000] and csv["beta"].tolist() == [-20, -20]
    assert csv["i_steps"].tolist() == [" ".join(map(str, STEPS[nfe])) for nfe in (50, 20)]
    assert table.formatted["paper #Full"].tolist() == ["12", "9"]
    assert table1(rows, differs=DIFFERS).formatted["paper β"].tolist() == ["—", "—"]
    with pytest.raises(UserError, match="beta"):
        table1([row for row in rows if row["method"] != "tokencache"], differs=DIFFERS)


def test_tables_and_figures_render_to_the_same_bytes(rows, tmp_path):
    for folder in ("a", "b"):
        table = main_table(make_rows(), make_latency(rows), FLOOR, differs=DIFFERS, guidance_scale=1.5)
        table.write(tmp_path / folder, "table2")
        figures.save(
            figures.figure_quality(make_rows(), FLOOR),
            tmp_path / folder,
            "quality",
            {"suite": "a", "picture": "quality"},
        )
        save_grid(grid([np.zeros((2, 16, 16), np.uint8)], ["DiT"]), tmp_path / folder / "grid.png")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    faces = [f"table2.{kind}" for kind in ("csv", "html", "json", "md", "tex")]
    assert names == ["grid.png", "quality.png", "quality.svg", *faces]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_rows_of_two_suites_are_refused(rows):
    rows[0]["suite"] = "paper"
    with pytest.raises(UserError, match="one suite"):
        main_table(rows, None, FLOOR, differs=DIFFERS, guidance_scale=1.5)


def test_read_rows(rows, tmp_path):
    folder = tmp_path / "scores"
    for row in rows:
        SCORE.write(folder / f"{row['row']}.json", row)
    ids = [row["row"] for row in rows][::-1]
    assert read_rows(tmp_path, ids) == json.loads(json.dumps(rows[::-1]))
    with pytest.raises(UserError, match="nfe50-uncached"):
        read_rows(tmp_path, ["nfe50-fora"])
    with pytest.raises(UserError, match=r"absent\.json"):
        read_rows(tmp_path, ["absent"])
    del rows[0]["quality"]
    SCORE.write(folder / "nfe50-uncached.json", rows[0])
    with pytest.raises(UserError, match=r"nfe50-uncached\.json: field `quality` is missing"):
        read_rows(tmp_path, ids)
    SCORE.write(folder / "nfe50-uncached.json", rows[0] | {"not_run": "needs weights"})  # needs no numbers
    assert read_rows(tmp_path, ids)[-1]["not_run"] == "needs weights"


def test_mac_ratio(rows):
    assert mac_ratio(rows[0], rows) == 1
    assert mac_ratio(rows[2], rows) == 2.5
    assert mac_ratio(rows[2] | {"not_run": "no weights"}, rows) is None


def test_styles_follow_the_method_whatever_else_is_drawn(rows):
    rows[9]["label"] = "FORA, 9 full steps"
    styles = figures.styles(rows)
    assert styles["nfe50-tokencache"] == styles["nfe20-tokencache"] == figures.STYLES["tokencache"]
    assert styles["nfe50-fora"] == figures.STYLES["fora"]
    for variant, method in (("nfe20-fora", "fora"), ("nfe50-literal", "tokencache")):
        own, look = figures.STYLES[method], styles[variant]
        assert (look["color"], look["marker"]) == (own["color"], own["marker"]) and look["linestyle"] != own[
            "linestyle"
        ]
    assert styles["nfe50-literal"] == styles["nfe20-literal"]
    assert figures.styles(rows[::-1]) == styles and figures.styles(rows[9:10]) == {"nfe20-fora": styles["nfe20-fora"]}
    variants = [
        figures.style_of("toca", label) for label in ("ToCa", "ToCa, matched", "ToCa, published", "ToCa, R 0.1")
    ]
    assert len({style.get("fillstyle") for style in variants}) == 4
    assert figures.style_of("mine", "mine") in figures.FALLBACK
    looks = [(style["color"], style["marker"]) for style in [*figures.STYLES.values(), *figures.FALLBACK]]
    assert len(set(looks)) == len(looks)
    markers = [style["marker"] for style in figures.STYLES.values()]
    dashes = [str(style["linestyle"]) for style in figures.STYLES.values()]
    assert len(set(markers)) == len(markers) and len(set(dashes)) >= len(dashes) - 1
    assert set(figures.STYLES) <= set(method_names())


def test_figure_quality_draws_every_label_at_its_cost(rows):
    figure = figures.figure_quality(rows, FLOOR)
    assert len(figure.axes) == 4
    labels = list(dict.fromkeys(row["label"] + " (control)" * row["control"] for row in rows))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*labels, "floor: 512 real images"]
    top = figure.axes[0]
    drawn = {container.lines[0].get_color(): container.lines[0].get_xydata().tolist() for container in top.containers}
    for method, cost, fid in (("uncached", 1.0, 3.234), ("fewer_steps", 2.0, 4.1), ("fora", 2.5, 3.4)):
        ((x, y),) = drawn[figures.STYLES[method]["color"]]
        assert y == fid and x == pytest.approx(cost, rel=0.03)
    places = sorted(container.lines[0].get_xdata()[0] for container in top.containers)
    assert min(np.diff(places)) > 0.01, "what costs the same stands side by side"
    twin = rows[2] | {"row": "nfe50-fora-again"}
    assert len(figures.figure_quality([*rows, twin]).axes[0].containers[2].lines[0].get_xdata()) == 2
    without_reference = figures.figure_quality([rows[0] | {"not_run": "no weights"}, *rows[1:]])
    assert len(without_reference.axes) == 2, "without the uncached run NFE 50 has no ratios to draw at"
    with pytest.raises(UserError, match="no row"):
        figures.figure_quality([row | {"not_run": "x"} for row in rows])


def test_figure_quality_of_a_suite_without_fid_has_its_first_metric(rows):
    def measuring(**names):
        """The rows with these metrics alone, as numbers of those."""
        kept = [{new: row["quality"][old] for new, old in names.items() if old in row["quality"]} for row in rows]
        return [row | {"quality": quality} for row, quality in zip(rows, kept, strict=True)]

    panels = figures.figure_quality(measuring(psnr="fid", mae="mae"), FLOOR).axes
    assert panels[0].get_ylabel() == "PSNR to uncached (dB) (higher is better)" and panels[0].get_yscale() == "linear"
    assert panels[0].containers and len(panels) == 4
    below_zero = figures.figure_quality(measuring(kid="fid", mae="mae"), FLOOR).axes
    assert [panel.get_yscale() for panel in below_zero[::2]] == ["linear", "log"], "KID may be below 0"
    assert len(figures.figure_quality(measuring(mae="mae"), FLOOR).axes) == 2, "no panel is empty"


def test_figure_trajectory_draws_mean_and_spread(rows):
    figure = figures.figure_trajectory(rows, 16, 50)
    left, right = figure.axes
    assert len(left.lines) == len(left.collections) == len(right.lines) == 6
    assert left.lines[0].get_ydata().tolist() == rows[1]["trajectory"]["x0_mae_mean"]
    assert right.lines[0].get_ydata().tolist() == rows[1]["trajectory"]["xt_mae_mean"]
    assert left.get_xlim()[0] > left.get_xlim()[1]
    with pytest.raises(UserError, match="trajectory"):
        figures.figure_trajectory(rows, 16, 10)


def make_alpha():
    curves = {nfe: np.linspace(0.02, 0.98, nfe) for nfe in STEPS}
    blocks = np.linspace(0.7, 1.0, 14)
    return {
        "alpha_bar": {str(nfe): curve.tolist() for nfe, curve in curves.items()},
        "per_block": {str(nfe): np.outer(curve, blocks).tolist() for nfe, curve in curves.items()},
        "histogram": {str(nfe): {"edges": np.linspace(0, 1, 21).tolist(), "counts": list(range(20))} for nfe in STEPS},
    }


def test_figure_alpha_marks_the_i_steps():
    figure = figures.figure_alpha(make_alpha(), {str(nfe): steps for nfe, steps in STEPS.items()})
    line = figure.axes[0]
    assert line.lines[0].get_ydata().tolist() == make_alpha()["alpha_bar"]["50"]
    assert [mark.get_xdata()[0] for mark in line.lines[1:]] == STEPS[50]
    assert figure.axes[2].images[0].get_array().shape == (14, 50)


def test_grid_enlarges_whole_pixels_and_keeps_columns_aligned(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    picture = grid(list(images), ["DiT", "TokenCache"], ["0", "1", "2"])
    pixels = np.asarray(picture)
    right = pixels[-68:-4, -68:-4]  # the last tile, inside the outer gap
    assert (right == images[1, 2].repeat(4, 0).repeat(4, 1)).all()
    assert (pixels[:, : picture.width - 3 * 68] < 128).any(), "row labels are drawn"
    assert (pixels[:20] < 128).any(), "column labels are drawn"
    colour = grid([np.full((1, 80, 80, 3), (255, 0, 0), np.uint8)], ["red"])
    assert (np.asarray(colour)[4:84, -84:-4] == (255, 0, 0)).all()
    save_grid(picture, tmp_path / "grid.png")
    assert Path(tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ([np.zeros((2, 16, 16))], ["DiT"]),
        ([np.zeros((2, 16, 16), np.uint8), np.zeros((3, 16, 16), np.uint8)], ["DiT", "FORA"]),
        ([np.zeros((2, 16, 16), np.uint8)], ["DiT", "FORA"]),
        ([], []),
    ],
)
def test_grid_refuses_what_it_cannot_draw(images, labels):
    with pytest.raises(UserError, match="grid"):
        grid(images, labels)


def test_a_table_has_its_own_rows_columns_and_order():
    rows = make_rows()
    names = [row["row"] for row in rows]
    chosen = PaperTable(title="Table III", metrics=("fid", "alignment"), rows=(names[1], names[0]))
    rows[0]["paper"] = (rows[0]["paper"] or {}) | {"coco_clip": 31.11}
    table = main_table(rows, None, FLOOR, differs=DIFFERS, guidance_scale=4.5, table=chosen)
    assert list(table.tidy["row"]) == [names[1], names[0], "floor"]
    assert table.title.startswith("Table III on suite")
    assert "sFID" not in table.formatted and "paper FID" in table.formatted
    assert list(table.formatted["paper CLIP score, MSCOCO"]) == ["—", "31.11", "—"]
    assert table.formatted["Alignment (digit reader)"][0] == "not run: not scored"


def test_predictor_figures_of_more_tokens_than_sizes_are_kept_of():
    updates = {"size": {"0": np.ones((3, 1024)).tolist()}, "similarity": [[0.9, 0.8]] * 2}
    (panel, *_) = figures_predictor.figure_updates(updates, nfe=3, tokens=4096).subfigs[0].axes
    assert panel.get_ylim() == (4095.5, -0.5)
    alpha = {
        **{"kept_at_0.7": {"step": 1, "tokens": [[4095], [0, 7]]}, "histogram_per_block": [[1] * 20] * 2},
        "per_batch": [[0.5] * 3] * 2,
    }
    figure = figures_predictor.figure_predictor(alpha, {"per_block": [[0.5, 0.5]] * 3}, nfe=3, tokens=4096)
    kept_LN = figure.axes[0].get_images()[0].get_array()
    assert kept_LN.shape == (2, 4096) and kept_LN.sum() == 3
