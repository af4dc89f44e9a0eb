"""The real workflow at tiny size: from nothing to tables, twice, after an edit, after kill -9."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from tcbench.report.names import PICTURES

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "tests" / "smoke.yaml"
SCRIPTS = Path(sys.executable).parent

pytestmark = pytest.mark.timeout(1200)  # the first test pays for the whole workflow


def run(folder, *command, check=True, **environment):
    """Run a program of this virtual environment in `folder`; the methods are the folder's own copy."""
    result = subprocess.run(
        [SCRIPTS / command[0], *map(str, command[1:])],
        cwd=folder,
        env={**os.environ, "TCBENCH_METHODS": str(folder / "methods"), **environment},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def snakemake(folder, *arguments, **keywords):
    return run(folder, "snakemake", "-s", ROOT / "Snakefile", "--cores", "2", *arguments, **keywords)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder where `snakemake all` of the smoke suite has run, with its own methods/."""
    folder = tmp_path_factory.mktemp("smoke")
    shutil.copytree(ROOT / "methods", folder / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    snakemake(folder, "all", "--quiet", "rules", "--config", f"suite_file={SMOKE}")
    return folder


def test_everything_is_there_and_whole(finished):
    results = finished / "results" / "smoke"
    ablations = ("ablation-cache_ratio", "ablation-guidance", "ablation-refiners")
    for name in ("table1", "table2", "table6", "local_error", "verdicts", *ablations):
        for kind in ("csv", "md", "tex", "html"):
            assert (results / "tables" / f"{name}.{kind}").stat().st_size > 100
    table = pd.read_csv(results / "tables" / "table6.csv")
    assert list(table.row) == ["nfe4-uncached", "nfe4-random", "nfe4-tokencache", "floor"]
    table = pd.read_csv(results / "tables" / "table2.csv")
    rows = table[table.row.notna()].set_index("row")
    assert rows.loc["nfe4-uncached", "mac_ratio"] == 1
    assert rows.loc["nfe4-tokencache", "paper_fid"] == 13.99
    assert rows.loc["nfe4-tokencache", "mac_ratio"] > 1
    assert not list(results.rglob("*.tmp"))
    for picture in ("grids/nfe4.png", *(f"figures/{name}.{kind}" for name in PICTURES for kind in ("png", "svg"))):
        assert (results / picture).stat().st_size > 1000
    page = (results / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == len(PICTURES) and "Not drawn" not in page and "No plan was" not in page


def test_a_second_call_does_nothing(finished):
    again = snakemake(finished, "all", "--config", f"suite_file={SMOKE}")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_editing_a_method_reruns_what_depends_on_it_and_nothing_else(finished):
    method = finished / "methods" / "fora.py"
    text = method.read_text()
    try:
        method.write_text(text + "\n# a change\n")
        plan = snakemake(finished, "tables", "-n", "--config", f"suite_file={SMOKE}").stdout
    finally:
        method.write_text(text)
    jobs = {line.split()[1].rstrip(":") for line in plan.splitlines() if line.startswith(("rule ", "localrule "))}
    assert jobs == {"sample_fora", "score_all", "latency", "render_tables", "tables"}


def test_editing_a_stage_does_not_retrain(finished):
    plan = snakemake(finished, "tables", "-n", "--forcerun", "render_tables", "--config", f"suite_file={SMOKE}").stdout
    assert "rule train" not in plan
    assert "rule render_tables" in plan


def test_a_router_file_is_an_input_of_training(tmp_path):
    shutil.copytree(ROOT / "methods", tmp_path / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    suite = tmp_path / "router.yaml"
    row = "nfe4-l2c: {method: learning_to_cache, nfe: 4"
    suite.write_text(SMOKE.read_text().replace(row, row + ", options: {router: router.pt}"))
    dry = ("-n", "results/smoke/trained/nfe4-l2c/artefacts.json", "--config", f"suite_file={suite}")
    missing = snakemake(tmp_path, *dry, check=False)
    assert missing.returncode != 0 and "router.pt" in missing.stdout + missing.stderr
    (tmp_path / "router.pt").touch()
    assert "rule train" in snakemake(tmp_path, *dry).stdout


def test_editing_a_method_reruns_the_ablations_it_is_in(finished):
    method = finished / "methods" / "tokencache.py"
    text = method.read_text()
    try:
        method.write_text(text + "\n# a change\n")
        plan = snakemake(finished, "ablations", "-n", "--config", f"suite_file={SMOKE}").stdout
    finally:
        method.write_text(text)
    jobs = {line.split()[1].rstrip(":") for line in plan.splitlines() if line.startswith("rule ")}
    assert {"train", "ablate_cache_ratio", "ablate_guidance", "ablate_refiners"} <= jobs


def test_snakemakes_own_report_has_tables_figures_and_the_page(finished):
    snakemake(finished, "all", "--report", "own.zip", "--config", f"suite_file={SMOKE}")
    with zipfile.ZipFile(finished / "own.zip") as archive:
        inside = "\n".join(archive.namelist())
    for name in ("fig10_deviation.png", "verdicts.html", "report.html"):
        assert name in inside


def test_a_bad_config_stops_before_any_job(tmp_path):
    shutil.copytree(ROOT / "methods", tmp_path / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    bad = tmp_path / "bad.yaml"
    bad.write_text(SMOKE.read_text().replace("batch_size: 4\ntraced", "batchsize: 4\ntraced"))
    result = snakemake(tmp_path, "tables", "--config", f"suite_file={bad}", check=False)
    assert result.returncode != 0
    assert f"{bad}: batchsize: unknown key; did you mean 'batch_size'?" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "results").exists()


def shards(folder):
    return {path.name: path.read_bytes() for path in (folder / "results").rglob("shard-*.safetensors")}


def test_kill_9_and_resume_ends_bit_identical(tmp_path):
    suite = tmp_path / "kill.yaml"
    suite.write_text(SMOKE.read_text().replace("samples: 8", "samples: 64"))
    command = ("tcbench", "sample", suite, "--rows", "nfe4-uncached")
    folders = [tmp_path / "killed", tmp_path / "whole"]
    for folder in folders:
        shutil.copytree(ROOT / "methods", folder / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    process = subprocess.Popen(
        [SCRIPTS / command[0], *map(str, command[1:])],
        cwd=folders[0],
        env={**os.environ, "TCBENCH_METHODS": str(folders[0] / "methods")},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(shards(folders[0])) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "no shard to kill after"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = {path: path.stat().st_mtime_ns for path in (folders[0] / "results").rglob("shard-*")}
    assert 2 <= len(survived) < 16, "the run was to be killed in the middle"
    for folder in folders:
        run(folder, *command)
    assert all(path.stat().st_mtime_ns == changed for path, changed in survived.items()), "finished shards were redone"
    assert len(shards(folders[1])) == 16
    assert shards(folders[0]) == shards(folders[1])


def test_a_damaged_shard_is_named_not_scored(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    victim = copy / "results" / "smoke" / "samples" / "nfe4-fora" / "shard-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    result = run(copy, "tcbench", "score", SMOKE, "--rows", "nfe4-fora", check=False)
    assert result.returncode == 2
    assert "shard-00001.safetensors: is not the shard that row.json lists; run `tcbench sample`" in result.stderr
    assert "Traceback" not in result.stderr


def test_all_embedded_suites_by_default_and_one_on_request(tmp_path):
    shutil.copytree(ROOT / "methods", tmp_path / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    every = snakemake(tmp_path, "tables", "-n").stdout
    for suite, tables in (("digits", [2, 6]), ("scenes", [3, 4, 6]), ("moving", [5])):
        assert f"rule {suite}_render_tables:" in every
        assert all(f"results/{suite}/tables/table{number}.csv" in every for number in tables)
    alone = snakemake(tmp_path, "-n", "--config", "suite=moving").stdout  # tables are the default target
    assert "rule render_tables:" in alone and "results/moving/tables/table5.csv" in alone
    assert "results/digits" not in alone and "results/scenes" not in alone
    full_size = snakemake(tmp_path, "tables", "-n", "--config", "suite=paper-pixart-256").stdout
    assert "rule encode:" in full_size and "results/paper-pixart-256/tables/table6.csv" in full_size
    assert "rule scenes_render_figures:" in snakemake(tmp_path, "-n", "scenes_figures").stdout
