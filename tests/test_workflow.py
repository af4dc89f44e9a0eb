"""The real workflow at tiny size, by the wheel in an empty folder: once whole, and after an edit, a move, kill -9.

The smoke suite is run as a whole here and nowhere else.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from tcbench.cli import main
from tcbench.outside.warm import SLOW, warm_programs
from tcbench.record.sources import STAGES, source_digest
from tcbench.registry import method_names
from tcbench.report.names import PICTURES

from .test_speed import smoke as speed_suite

ROOT = Path(__file__).resolve().parent.parent
SMOKE = (ROOT / "tests" / "smoke.yaml").read_text(encoding="utf-8")
OWN_ROW = "  nfe3-halved: {method: halved, nfe: 3}\n"
OWN_METHOD = """
from tcbench.method import Look, Method
from tcbench.plan import ALL, NONE, Plan, Span, every_unit


class Halved(Method):
    'Hold the rear half of the blocks on every other step.'

    name = "halved"
    label = "rear half held"

    def plan(self, look: Look) -> Plan:
        blocks = look.run.shape.num_blocks
        return every_unit([Span(blocks // 2, blocks)], NONE if look.step % 2 else ALL)
"""

USERS = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TCBENCH_METHODS")}

pytestmark = pytest.mark.timeout(1200)  # the first test pays for the whole workflow


COLD = "tcbench-cold"
"""The wheel's own program, in whose place its environment has one that starts warm (tcbench/outside/warm.py)."""


def run(scripts, folder, *command, check=True):
    """Run a program of an environment in `folder`, as a user would: nothing here tells it where the checkout is."""
    result = subprocess.run(
        [scripts / command[0], *map(str, command[1:])],
        cwd=folder,
        env=USERS,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def snakemake(tmp_path_factory):
    """Runs the checkout's Snakefile and package, as `snakemake` does in the checkout itself."""
    program = tmp_path_factory.mktemp("checkout") / "snakemake"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(folder, *arguments, check=True):
        command = [program, "-s", ROOT / "Snakefile", "--cores", "2", *arguments]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
        assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    with warm_programs(sys.executable, {program: "snakemake.cli:main"}, environment, ["snakemake.cli"]):
        yield run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A fresh environment where `pip install .` has put tcbench; it sees this one's packages, but not its tcbench.

    Gives the folders of its programs and of its packages.
    """
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text(
        "\n".join(seen)
    )  # pth files in there, an editable install's, are not read
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    offline = [*pip, "--no-deps", "--no-build-isolation", str(ROOT)]
    result = subprocess.run(offline, cwd=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stderr}\n(the extra `dev` has what builds the wheel)"
    program = environment / "bin" / "tcbench"
    program.rename(program.with_name(COLD))
    with warm_programs(python, {program: "tcbench.cli:main"}, USERS, [*SLOW, "snakemake.cli"]):
        yield environment / "bin", packages


@pytest.fixture(scope="module")
def scripts(wheel):
    """The folder of the wheel's programs."""
    return wheel[0]


@pytest.fixture(scope="module")
def finished(scripts, tmp_path_factory):
    """A folder with the smoke suite and a method of the user's, where `tcbench run` has made everything."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "methods").mkdir()
    (folder / "methods" / "halved.py").write_text(OWN_METHOD)
    (folder / "smoke.yaml").write_text(SMOKE.replace("ablations:\n", f"{OWN_ROW}ablations:\n"))
    run(scripts, folder, COLD, "run", "smoke.yaml", "all", "--cores", "2", "--snakemake=--quiet=rules")
    return folder


def plan(scripts, folder, *arguments):
    """The rules that would run, by their names."""
    text = run(scripts, folder, "tcbench", "run", *arguments, "-n").stdout
    return {line.split()[1].rstrip(":") for line in text.splitlines() if line.startswith(("rule ", "localrule "))}


TELLS = """\
import sys
from pathlib import Path

Path("imported").write_text(str("matplotlib.figure" in sys.modules))
"""


def test_warm_jobs_leave_the_same(scripts, finished, tmp_path):
    """They are forks of a process that has imported what no sampling needs, and their samples are the same."""
    (tmp_path / "smoke.yaml").write_text(SMOKE.replace("ablations:\n", f"{OWN_ROW}ablations:\n"))
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "halved.py").write_text(TELLS + OWN_METHOD)
    wanted = "results/smoke/samples/nfe3-halved/row.json"
    run(scripts, tmp_path, COLD, "run", "smoke.yaml", wanted, "--cores", "2", "--warm", "--snakemake=--quiet=rules")
    assert (tmp_path / "imported").read_text() == "True"
    shards = sorted((tmp_path / wanted).parent.glob("*.safetensors"))
    assert shards
    for shard in shards:  # the method's source, which is part of their metadata, differs
        warm, cold = (load_file(path) for path in (shard, (finished / wanted).with_name(shard.name)))
        assert warm.keys() == cold.keys() and all(np.array_equal(warm[name], cold[name]) for name in warm)


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
    assert rows.loc["nfe3-halved", "mac_ratio"] > 1, "the user's own row"
    assert not list(results.rglob("*.tmp"))
    for picture in ("grids/nfe4.png", *(f"figures/{name}.{kind}" for name in PICTURES for kind in ("png", "svg"))):
        assert (results / picture).stat().st_size > 1000
    page = (results / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == len(PICTURES) and "Not drawn" not in page and "No plan was" not in page


def test_the_wheel_carries_the_checkouts_files(wheel):
    """Byte for byte: code, rules and assets, methods, suites and the profile."""
    for folder, place in (
        ("tcbench", "tcbench"),
        *((name, f"tcbench/shipped/{name}") for name in ("methods", "config", "profiles")),
    ):
        there = {file.relative_to(ROOT / folder): file for file in sorted((ROOT / folder).rglob("*")) if file.is_file()}
        there = {name: file for name, file in there.items() if "__pycache__" not in name.parts}
        assert there
        for name, file in there.items():
            assert (wheel[1] / place / name).read_bytes() == file.read_bytes(), name


def test_the_wheels_sources_have_the_checkouts_digests(wheel, tmp_path):
    """So that samples, scores and timings have the same fingerprints."""
    names = [*method_names()]
    code = f"import tcbench, json; from tcbench.record.sources import *; print(tcbench.__file__); {names = }; "
    code += "print(json.dumps({stage: source_digest(stage, *names) for stage in STAGES}))"
    file, digests = run(wheel[0], tmp_path, "python", "-c", code).stdout.splitlines()
    assert Path(file).is_relative_to(wheel[1])
    assert json.loads(digests) == {stage: source_digest(stage, *names) for stage in STAGES}


def test_the_wheel_knows_methods_suites_and_costs_from_an_empty_folder(scripts, tmp_path):
    listed = run(scripts, tmp_path, "tcbench", "methods").stdout
    assert all(f"{name} (knob: " in listed for name in method_names())
    cost = ("macs", "--model", "tiny-dit", "--method", "uncached", "--nfe", "2", "--json")
    assert json.loads(run(scripts, tmp_path, "tcbench", *cost).stdout)["per_sample"] > 0
    assert "render_tables" in plan(scripts, tmp_path, "digits")
    assert {"digits_render_figures", "scenes_render_figures", "moving_render_figures"} <= plan(
        scripts, tmp_path, "figures"
    )
    assert "speed" in plan(scripts, tmp_path, "speed")
    near = run(scripts, tmp_path, "tcbench", "run", "digit", check=False)
    assert near.returncode == 2
    assert near.stderr == "tcbench: suite 'digit': no file digit.yaml in config/; did you mean 'digits'?\n"
    target = run(scripts, tmp_path, "tcbench", "run", "digits", "tabels", check=False)
    assert target.returncode == 1 and "No rule to produce tabels" in target.stderr
    assert not (tmp_path / "results").exists()


def test_a_second_call_does_nothing(scripts, finished):
    again = run(scripts, finished, "tcbench", "run", "smoke.yaml", "all")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_moved_copy_has_nothing_to_do_and_makes_the_same_bytes(finished, snakemake, tmp_path, monkeypatch):
    """Neither Snakemake nor a fingerprint remembers where the work or the package lies: the copy of the wheel's work is
    in the hands of the checkout's Snakefile and package."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert "Nothing to be done" in snakemake(copy, "all", "--config", "suite_file=smoke.yaml")
    samples = copy / "results" / "smoke" / "samples" / "nfe3-halved"
    shutil.rmtree(samples)
    monkeypatch.chdir(copy)
    assert main(["sample", "smoke.yaml", "--rows", samples.name]) == 0
    assert shards(samples) and shards(samples) == shards(finished / "results" / "smoke" / "samples" / "nfe3-halved")


@contextmanager
def edited(file):
    """The file with a line more, while it lasts."""
    text = file.read_text()
    try:
        file.write_text(text + "\n# a change\n")
        yield
    finally:
        file.write_text(text)


def test_editing_a_method_reruns_what_depends_on_it_and_nothing_else(wheel, finished):
    for file, job in (
        (wheel[1] / "tcbench" / "shipped" / "methods" / "fora.py", "sample_nfe4_untrained"),
        (finished / "methods" / "halved.py", "sample_nfe3_untrained"),
    ):
        with edited(file):
            jobs = plan(wheel[0], finished, "smoke.yaml", "tables")
        # the job samples an uncached row, too, of which seed noise is measured
        assert jobs == {job, "score_all", "seed_noise", "latency", "render_tables", "tables"}


def test_a_row_that_is_added_is_scored_and_timed_alone(scripts, finished, tmp_path):
    """Beside the uncached row, which is timed once more; all other files are as they were."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    suite, results = copy / "smoke.yaml", copy / "results" / "smoke"
    suite.write_text(
        suite.read_text().replace("ablations:\n", "  nfe3-again: {method: halved, nfe: 3, label: again}\nablations:\n")
    )
    before = {path: path.read_bytes() for path in (results / "scores").glob("nfe*.json")}
    times = json.loads((results / "latency.json").read_text())["rows"]
    run(scripts, copy, "tcbench", "run", "smoke.yaml", "tables", "--cores", "2")
    assert all(path.read_bytes() == content for path, content in before.items())
    timed = json.loads((results / "latency.json").read_text())
    assert timed["rows"] == times and len(timed["later"]) == 1
    assert set(timed["later"][0]["rows"]) == {"nfe3-uncached", "nfe3-again"}
    rows = pd.read_csv(results / "tables" / "table2.csv").set_index("row")
    seconds = {name: timing["median_s"] for name, timing in timed["later"][0]["rows"].items()}
    assert rows.latency_ratio["nfe3-again"] == pytest.approx(seconds["nfe3-uncached"] / seconds["nfe3-again"])
    assert rows.latency_s["nfe3-uncached"] == times["nfe3-uncached"]["median_s"]
    again = run(scripts, copy, "tcbench", "run", "smoke.yaml", "tables")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_look_at_some_rows_asks_nothing_of_the_others(scripts, tmp_path):
    """Seed noise is that of the rows shown: no other number of steps is sampled, and no row is trained or timed."""
    (tmp_path / "smoke.yaml").write_text(SMOKE)
    run(scripts, tmp_path, "tcbench", "run", "smoke.yaml", "tables", "--rows", "nfe4-fora", "--cores", "2")
    results = tmp_path / "results" / "smoke"
    assert {path.name for path in (results / "samples").iterdir()} == {"nfe4-uncached", "nfe4-fora"}
    shown = pd.read_csv(results / "partial" / "tables" / "table2.csv")
    assert [*shown.row] == ["nfe4-uncached", "nfe4-fora", "floor"]


def test_editing_a_stage_does_not_retrain(wheel, finished):
    with edited(wheel[1] / "tcbench" / "report" / "main_table.py"):
        assert plan(wheel[0], finished, "smoke.yaml", "tables") == {"render_tables", "tables"}


def test_editing_a_method_reruns_the_ablations_it_is_in(wheel, finished):
    with edited(wheel[1] / "tcbench" / "shipped" / "methods" / "tokencache.py"):
        jobs = plan(wheel[0], finished, "smoke.yaml", "ablations")
    assert {"train", "ablate_cache_ratio", "ablate_guidance", "ablate_refiners"} <= jobs


def test_a_router_file_is_an_input_of_training(scripts, tmp_path):
    row = "nfe4-l2c: {method: learning_to_cache, nfe: 4"
    (tmp_path / "router.yaml").write_text(SMOKE.replace(row, row + ", options: {router: router.pt}"))
    dry = ("tcbench", "run", "router.yaml", "results/smoke/trained/nfe4-l2c/artefacts.json", "-n")
    missing = run(scripts, tmp_path, *dry, check=False)
    assert missing.returncode != 0 and "router.pt" in missing.stdout + missing.stderr
    (tmp_path / "router.pt").touch()
    assert "rule train" in run(scripts, tmp_path, *dry).stdout


def test_snakemakes_own_report_has_tables_figures_and_the_page(scripts, finished):
    run(scripts, finished, "tcbench", "run", "smoke.yaml", "all", "--snakemake=--report=own.zip")
    with zipfile.ZipFile(finished / "own.zip") as archive:
        inside = "\n".join(archive.namelist())
    for name in ("fig10_deviation.png", "verdicts.html", "report.html"):
        assert name in inside


def test_a_bad_config_stops_before_any_job(scripts, snakemake, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(SMOKE.replace("batch_size: 4\n  traced", "batchsize: 4\n  traced"))
    says = f"{bad}: samples.batchsize: unknown key; did you mean 'batch_size'?"
    result = run(scripts, tmp_path, "tcbench", "run", bad, check=False)
    assert result.returncode == 2 and result.stderr == f"tcbench: {says} (line 15)\n"
    with pytest.raises(AssertionError) as caught:
        snakemake(tmp_path, "tables", "--config", f"suite_file={bad}")
    assert says in str(caught.value) and "Traceback" not in str(caught.value)
    assert not (tmp_path / "results").exists()


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("shard-*.safetensors")}


def test_kill_9_and_resume_ends_bit_identical(tmp_path, monkeypatch):
    suite, killed, whole = (tmp_path / name for name in ("kill.yaml", "killed", "whole"))
    suite.write_text(SMOKE.replace("count: 8", "count: 32"))
    command = ("sample", str(suite), "--rows", "nfe4-uncached")
    for folder in (killed, whole):
        folder.mkdir()
    monkeypatch.chdir(whole)
    assert main(command) == 0
    assert len(shards(whole)) == 8
    monkeypatch.chdir(killed)
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))  # which has torch already
    process.start()
    deadline = time.monotonic() + 120
    while len(shards(killed)) < 2:
        assert time.monotonic() < deadline and process.is_alive(), "no shard to kill after"
        time.sleep(0.01)
    process.kill()
    process.join()
    survived = {path: path.stat().st_mtime_ns for path in (killed / "results").rglob("shard-*")}
    assert 2 <= len(survived) < 8, "the run was to be killed in the middle"
    assert main(command) == 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in survived.items()), "finished shards were redone"
    assert shards(killed) == shards(whole)


def of_each_model(models):
    """What tests/test_speed.py does not time, and two rows of the models that it does."""
    fewer = {name: dict([*models[name]["rows"].items()][:2]) for name in ("rivals", "tiny-flux", "tiny-wan")}
    half = {"tiny-dit": models["tiny-dit"] | {"settings": models["tiny-dit"]["settings"][:1]}}
    return models | half | {name: models[name] | {"rows": rows} for name, rows in fewer.items()}


def test_a_speed_suite_is_timed_rendered_and_published(scripts, tmp_path):
    suite = speed_suite(
        tmp_path,
        protocol={"warmup": 0, "repeats": 1},
        peers=lambda peers: peers | {"names": ["tcbench"]},
        models=of_each_model,
    )
    command = ("tcbench", "run", suite, "--cores", "1")
    run(scripts, tmp_path, *command)
    assert (tmp_path / "results" / "speed-smoke" / "tables" / "speed.md").exists()
    again = run(scripts, tmp_path, *command)
    assert "Nothing to be done" in again.stdout + again.stderr
    run(scripts, tmp_path, "tcbench", "publish", suite, "--allow-dirty")
    published = tmp_path / "results" / "reference" / "speed-smoke"
    assert {path.name for path in published.iterdir()} == {"tables", "runs", "peers", "provenance.json"}


def test_unlocking_works_as_the_docs_write_it(scripts, snakemake, tmp_path):
    """After `kill -9` of a workflow and its jobs; of any suite, because a lock is the folder's."""
    (tmp_path / "smoke.yaml").write_text(SMOKE)
    page, locks, held = (
        (ROOT / "docs" / "run.md").read_text(encoding="utf-8"),
        tmp_path / ".snakemake/locks",
        tmp_path / "held",
    )
    unlock, run_unlock = "snakemake --unlock", "--snakemake=--unlock"
    assert f"`{unlock}`" in page and f"`{run_unlock}`" in page
    of_suite = ["--config", "suite_file=smoke.yaml"]
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--cores", "1", *of_suite]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("results/smoke/logs/*")):
        assert time.monotonic() < deadline and process.poll() is None, "no job to kill"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "cannot be locked" in snakemake(tmp_path, *of_suite, check=False)
    shutil.copytree(locks, held)
    for unlocked in (
        lambda: snakemake(tmp_path, *unlock.split()[1:]),
        lambda: snakemake(tmp_path, *unlock.split()[1:], *of_suite),
        lambda: run(scripts, tmp_path, "tcbench", "run", "smoke.yaml", run_unlock),
    ):
        shutil.copytree(held, locks, dirs_exist_ok=True)
        said = unlocked()
        assert not list(locks.glob("*")), said


def test_a_damaged_shard_is_named_not_scored(finished, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    victim = copy / "results" / "smoke" / "samples" / "nfe4-fora" / "shard-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    monkeypatch.chdir(copy)
    assert main(["score", "smoke.yaml", "--rows", "nfe4-fora"]) == 2
    says = "shard-00001.safetensors: is not the shard that row.json lists; run `tcbench sample`"
    assert says in capsys.readouterr().err


def test_all_embedded_suites_by_default_and_one_on_request(snakemake, tmp_path):
    every = snakemake(tmp_path, "tables", "digits_figures", "scenes_figures", "scenes_rivals", "-n")
    for suite, tables in (("digits", [2, 6]), ("scenes", [3, 4, 6]), ("moving", [5])):
        assert f"rule {suite}_render_tables:" in every
        assert all(f"results/{suite}/tables/table{number}.csv" in every for number in tables)
    assert "rule scenes_render_figures:" in every and "rule moving_render_figures:" not in every
    reads = {suite: every.split(f"rule {suite}_render_figures:")[1].split("\n\n")[0] for suite in ("digits", "scenes")}
    assert "results/scenes/tables/rivals.md" in reads["scenes"], "rivals that this call runs are waited for"
    assert "rivals" not in reads["digits"].split("output:")[0], "and no others are run"
    alone = snakemake(tmp_path, "-n", "--config", "suite=moving")  # tables are the default target
    assert "rule render_tables:" in alone and "results/moving/tables/table5.csv" in alone
    assert "results/digits" not in alone and "results/scenes" not in alone
    full_size = snakemake(tmp_path, "tables", "-n", "--config", "suite=paper-pixart-256")
    assert "rule encode:" in full_size and "results/paper-pixart-256/tables/table6.csv" in full_size
