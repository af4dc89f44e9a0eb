"""The speed suite: what is repeated is what is sampled, what is timed is kept, and the table's ratios are right."""

import importlib.util
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch
import yaml

from tcbench.budget.costing import macs_of
from tcbench.budget.untrained import random_predictor, random_reads, random_router, untrained_artefacts
from tcbench.config.speed import PeerName, load_speed_suite, parts
from tcbench.errors import NotRun, UserError
from tcbench.method import Artefacts
from tcbench.models.specs import MODELS
from tcbench.record.files import read_json
from tcbench.record.records import RUN
from tcbench.registry import make_method
from tcbench.replay import Replay
from tcbench.report.speed import figure_speed, profile_table, read_lines, render_speed, speed_table
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.stages.bench import bench, is_full
from tcbench.stages.peers import PEERS, DiffusersRun, Peer, macs_per_sample
from tcbench.stages.profile import covered, kernel_class, profile_parts
from tcbench.stages.timing import run_seconds, step_seconds
from tests.floors import TRAJECTORY, assert_close

from .conftest import make_adapter

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "tests" / "speed_smoke.yaml"
SETTINGS = SamplerSettings(1.5)
BY_MODEL = {
    "tiny-dit": SETTINGS,
    "tiny-pixart": SamplerSettings(4.5, solver="dpm"),
    "tiny-flux": SamplerSettings(3.5, solver="flow"),
    "tiny-wan": SamplerSettings(5.0, solver="flow_unipc"),
}
OPTIONS = {
    "uncached": {},
    "fewer_steps": {"steps": 3},
    "fora": {"interval": 2},
    "learning_to_cache": {},
    "toca": {"interval": 2, "fresh_ratio": 0.5, "schedule": "constant"},
    "tokencache": {"num_full_steps": 2, "refiner_blocks": 1, "beta": -2000},
}


def smoke(tmp_path, **changes):
    """The smoke suite with some top-level fields changed, and the path of its file."""
    fields = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    for key, value in changes.items():
        fields[key] = value(fields[key]) if callable(value) else value
    path = tmp_path / "speed.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path


def replay_of(tiny, name, **arguments):
    method = make_method(name, OPTIONS[name])
    artefacts = untrained_artefacts(tiny, method, 6, 0, open_branches=0.5)
    return Replay(tiny, method, 6, SETTINGS, torch.arange(2), artefacts, **arguments), method, artefacts


@pytest.mark.parametrize("name", OPTIONS)
def test_a_replay_is_what_is_sampled_and_repeats_itself(tiny, name):
    replay, method, artefacts = replay_of(tiny, name, path="plain")
    samples = sample_batch(tiny, method, 6, SETTINGS, torch.arange(2), artefacts)
    first = replay.run().clone()
    assert torch.equal(first, samples.image)
    assert torch.equal(replay.run(), first)
    assert replay.macs == samples.macs
    assert len(replay.step_macs) == replay.nfe == method.sampled_steps(6)
    assert sum(replay.step_macs) == samples.macs["per_sample"]
    full = {step for step, computed in enumerate(is_full(replay, tiny.shape)) if computed}
    assert full == set(samples.plans.i_steps)


def test_steps_follow_each_other(tiny):
    replay, *_ = replay_of(tiny, "fora", path="plain")
    replay.step(0)
    with pytest.raises(RuntimeError, match="step 2 was asked for after step 0"):
        replay.step(2)
    replay.step(0)  # starts again


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_random_router_opens_its_share_of_every_branch_where_it_decides(tiny, share):
    table = torch.tensor(random_router(tiny.shape, 8, share, seed=1)).unflatten(1, (tiny.shape.num_blocks, 2))
    opened = table > 0
    assert not opened[1::2].any()
    for branch in range(2):
        assert opened[::2, :, branch].sum() == round(share * 4 * tiny.shape.num_blocks)


def test_a_random_predictor_tells_tokens_apart(tiny):
    x = torch.randn(2, tiny.shape.num_tokens, tiny.shape.width)
    scores = random_predictor(tiny, 0)(tiny, x, torch.randn(2, tiny.shape.width))
    assert scores.shape == (2, tiny.shape.num_blocks, tiny.shape.num_tokens)
    assert (scores.std(dim=2) > 0.05).all()


def test_a_router_without_a_share_is_refused(tiny):
    with pytest.raises(UserError, match=r"learning_to_cache: .* set open_branches"):
        untrained_artefacts(tiny, make_method("learning_to_cache", {}), 4, 0)


def test_timing_covers_what_is_timed(tiny):
    replay, *_ = replay_of(tiny, "uncached")
    device = torch.device("cpu")
    steps = step_seconds(device, replay)
    assert len(steps) == 6 and min(steps) > 0
    assert run_seconds(device, replay.run) > max(steps) / 6


@pytest.mark.parametrize(
    ("model", "again"), [("tiny-dit", 1.01), ("tiny-pixart", 1.3), ("tiny-flux", 1.01), ("tiny-wan", 1.1)]
)
def test_diffusers_eager_makes_the_same_samples(model, again):
    adapter, settings = make_adapter(model), BY_MODEL[model]
    ours = PEERS["tcbench-plain"].prepare(adapter, 6, settings, torch.arange(2))
    run = DiffusersRun(adapter, 6, settings, torch.arange(2))
    assert_close(run.run(), ours.run(), TRAJECTORY)
    assert_close(run.run(), ours.run(), TRAJECTORY)
    counted, ledger = run.macs(), ours.macs["per_sample"]
    assert ledger <= counted < again * ledger  # it makes embeddings, and the text's keys and values, anew every time


def test_merging_peers_cost_the_same(tiny):
    """What tomesd's functions execute is what the ledger charges; the diffusers model embeds in every block."""
    if importlib.util.find_spec("tomesd"):
        ours, theirs, plain, whole = (
            macs_per_sample(PEERS[name].prepare(tiny, 6, SETTINGS, torch.arange(2)))
            for name in ("tcbench-tome", "diffusers-tomesd", "tcbench-plain", "diffusers-eager")
        )
        assert plain - ours == whole - theirs


OPTIONAL = {"cache-dit": "cache-dit", "diffusers-tomesd": "tomesd"}
"""The packages that peers need, by peer."""


CACHING = {
    "diffusers-pab": {"tiny-dit", "tiny-pixart", "tiny-flux"},
    "diffusers-fastercache": {"tiny-flux"},
    "diffusers-taylorseer": BY_MODEL.keys(),
    "diffusers-firstblock": {"tiny-flux", "tiny-wan"},
    "diffusers-magcache": {"tiny-flux", "tiny-wan"},
    "cache-dit": BY_MODEL.keys(),
    "diffusers-tomesd": {"tiny-dit", "tiny-pixart"},
}
"""Peers that cache or merge, and the models that they serve."""


@pytest.mark.parametrize("model", BY_MODEL)
@pytest.mark.parametrize("name", CACHING)
def test_a_peer_saves_work_and_starts_every_run_afresh(model, name):
    adapter, settings = make_adapter(model), BY_MODEL[model]
    if model not in CACHING[name]:
        with pytest.raises(NotRun, match=r"^needs "):
            PEERS[name].prepare(adapter, 6, settings, torch.arange(2))
        return
    package = OPTIONAL.get(name)
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        with pytest.raises(NotRun, match=f"needs {package}: pip install {package}"):
            PEERS[name].prepare(adapter, 6, settings, torch.arange(2))
        return
    run = PEERS[name].prepare(adapter, 6, settings, torch.arange(2))
    plain = DiffusersRun(adapter, 6, settings, torch.arange(2))
    first = run.run().clone()
    assert not torch.equal(first, plain.run())
    assert torch.equal(run.run(), first)
    assert macs_per_sample(run) < 0.95 * plain.macs()


def test_every_peer_that_a_config_may_name_exists():
    assert list(PEERS) == list(get_args(PeerName))


def test_the_floor_has_no_macs_of_its_own(tiny):
    assert macs_per_sample(PEERS["matrix-products"].prepare(tiny, 2, SETTINGS, torch.arange(2))) is None


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("flash_fwd_kernel", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("nvjet_tst_128x256", "matrix products"),
        ("vectorized_layer_norm_kernel", "norm, modulate, gate"),
        ("_scatter_gather_elementwise_kernel", "gather, scatter"),
        ("at::native::sbtopk::gatherTopK", "selection"),
        ("vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "activation"),
        ("vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("Memcpy DtoD", "copies"),
        ("mystery", "other"),
    ],
)
def test_kernels_are_classified_by_name(name, label):
    assert kernel_class(name) == label


def test_overlapping_kernels_are_not_counted_twice():
    assert covered([(30, 40), (0, 10), (5, 20)]) == pytest.approx((40e-6, 30e-6))


def test_parts_are_selected_by_every_flag():
    suite = load_speed_suite(ROOT / "config" / "speed.yaml")
    chosen = parts(suite, ["dit-xl-2-256"], ["bf16"], [8], [50])
    assert [part.name for part in chosen] == ["dit-xl-2-256.bf16.b8.nfe50"]
    with pytest.raises(UserError, match=r"nothing to time is selected; speed has: dit-xl-2-256\.bf16\.b8\.nfe250"):
        parts(suite, ["dit-xl-2-256"], batch_sizes=[7])


def test_every_cell_of_the_papers_tables_has_a_row():
    suite = load_speed_suite(ROOT / "config" / "speed.yaml")
    ours = sorted(
        (row.paper.latency_s, row.paper.tmacs, row.paper.speedup)
        for model in suite.models.values()
        for row in model.rows.values()
        if row.paper
    )
    paper = [pd.read_csv(path) for path in sorted((ROOT / "tcbench" / "assets" / "paper").glob("table[2345]_*.csv"))]
    cells = pd.concat(paper)[["latency_s", "tmacs", "speedup"]]
    assert ours == sorted(cells.itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(protcol={}), "protcol: unknown key; did you mean 'protocol'"),
        (
            lambda f: f["models"]["tiny-dit"].update(weights="x"),
            "models.tiny-dit.weights: unknown key; known: stands_for",
        ),
        (
            lambda f: f["models"]["tiny-dit"]["settings"][0].update(dtyp="x"),
            "settings.0.dtyp: unknown key; did you mean",
        ),
        (lambda f: f["models"]["pixel-giant"].pop("needs"), "models.pixel-giant: no such model; known: digits-dit"),
        (lambda f: f["models"]["tiny-dit"]["rows"].pop("nfe6-uncached"), "add a row with method: uncached and nfe: 6"),
        (lambda f: f["models"]["tiny-dit"]["settings"][0].update(nfes=[5]), "settings.0.nfes: no row has nfe 5"),
        (lambda f: f["models"]["tiny-dit"]["rows"]["nfe4-fora"].update(method="forra"), "did you mean 'fora'"),
        (lambda f: f["models"]["tiny-dit"]["rows"]["nfe4-fora"].update(nfe=1), "rows.nfe4-fora.nfe: input should be"),
        (lambda f: f["peers"].update(names=["diffuser"]), "peers.names.0: input should be 'tcbench'"),
    ],
)
def test_a_bad_config_is_one_line_that_names_the_field(tmp_path, change, message):
    fields = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    change(fields)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_speed_suite(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """(suite, folder) with one part, its peers and one profile timed."""
    folder = tmp_path_factory.mktemp("speed")
    suite = load_speed_suite(smoke(folder, peers=lambda peers: peers | {"names": ["tcbench", "cache-dit"]}))
    chosen = parts(suite, ["tiny-dit"], ["fp32"])
    bench(suite, chosen, folder)
    profile_parts(suite, chosen, ["nfe4-fora"], folder)
    return suite, folder


def test_a_table_says_what_was_timed_and_what_was_not(timed):
    suite, folder = timed
    lines = {(line["model"], line["dtype"], line["row"]): line for line in read_lines(suite, folder)}
    fora, uncached = lines["tiny-dit", "fp32", "nfe4-fora"], lines["tiny-dit", "fp32", "nfe4-uncached"]
    assert fora["mac_ratio"] == pytest.approx(uncached["macs_per_sample"] / fora["macs_per_sample"])
    assert fora["latency_ratio"] == pytest.approx(uncached["latency_s"] / fora["latency_s"])
    assert fora["efficiency"] == pytest.approx(fora["latency_ratio"] / fora["mac_ratio"])
    assert (fora["full_steps"], fora["sampled_steps"]) == (3, 4)
    assert (fora["host_reads"], lines["tiny-dit", "fp32", "nfe4-teacache"]["host_reads"]) == (0, 2)  # not at the ends
    assert fora["partial_mac_share"] < 0.05
    assert fora["paper_latency_ratio"] == pytest.approx(4.32 / 2.04)
    assert uncached["efficiency"] == 1 and uncached["partial_step_s"] is None
    assert "tcbench bench --model tiny-dit --dtype bf16" in lines["tiny-dit", "bf16", "nfe4-fora"]["not_run"]
    giants = [line for line in lines.values() if line["model"] == "pixel-giant"]  # no cells of the paper, so one line
    assert [(line["label"], line["not_run"]) for line in giants] == [("all 2 rows", "needs an adapter for giants")]
    speed, peers, profile = render_speed(suite, folder).values()
    for table in ("speed", "peers", "profile"):
        for kind in ("csv", "md", "tex", "html"):
            assert (folder / "tables" / f"{table}.{kind}").stat().st_size > 100
    assert "needs an adapter for giants" in speed.markdown() and "Host reads" in speed.formatted
    assert peers.tidy["peer"].tolist() == ["tcbench", "cache-dit"]
    assert peers.tidy["latency_ratio"][0] == 1
    assert {"matrix products", "norm, modulate, gate"} <= set(profile.tidy["class"])
    assert (folder / "figures" / "speed.png").stat().st_size > 1000


def test_every_method_of_the_new_suites_runs_and_says_what_it_keeps(tmp_path):
    """On toys: rivals on DiT, and rows of FLUX.1 and Wan 2.1 by the models' own layers."""
    suite = load_speed_suite(smoke(tmp_path, protocol={"warmup": 0, "repeats": 1, "step_rounds": 1}))
    bench(suite, parts(suite, ["rivals", "tiny-flux", "tiny-wan"]), tmp_path, peers=False)
    lines = [line for line in read_lines(suite, tmp_path) if line["model"] in ("rivals", "tiny-flux", "tiny-wan")]
    assert not [line["not_run"] for line in lines if line["not_run"]]
    kept = {(line["model"], line["row"]): line["cache_bytes"] for line in lines}
    assert all((count > 0) == ("uncached" not in row) for (_, row), count in kept.items())
    stream = 2 * 2 * MODELS["tiny-dit"].num_tokens * MODELS["tiny-dit"].width * 4  # rows of two samples in float32
    assert kept["rivals", "smoothcache"] == 2 * MODELS["tiny-dit"].num_blocks * stream
    assert kept["rivals", "first_block"] == 3 * stream  # what is compared, and two residuals
    assert {line["executed"] for line in lines} == {"plain"}
    reads = {line["method"]: line["host_reads"] for line in lines}
    assert {name for name, count in reads.items() if not count} >= {"uncached", "magcache", "smoothcache"}
    assert reads["lazydit"] == 4 * 2 * 4 and reads["first_block"]
    table = speed_table(lines, suite, ["cpu"]).markdown()
    assert "Cache memory (GiB)" in table and "TaylorSeer, stack" in table
    smooth = [line | {"latency_by_steps": 1.0} for line in lines]
    assert "†" not in speed_table(smooth, suite, ["cpu"]).markdown()
    smooth[1]["latency_by_steps"] = 2.69
    held_up = speed_table(smooth, suite, ["cpu"]).markdown()
    assert held_up.count("†") == 2 and "took 2.7 times what its steps take one by one" in held_up


def test_a_row_that_fails_is_not_run_and_says_why(tmp_path, monkeypatch):
    suite = load_speed_suite(smoke(tmp_path, protocol={"warmup": 0, "repeats": 1, "step_rounds": 1}))

    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nat line 7")

    monkeypatch.setitem(PEERS, "diffusers-eager", Peer("broken", broken))
    suite = suite.model_copy(update={"peers": suite.peers.model_copy(update={"names": ("tcbench", "diffusers-eager")})})
    bench(suite, parts(suite, ["tiny-pixart"]), tmp_path)
    (path,) = tmp_path.glob("peers/*.json")
    rows = read_json(path)["rows"]
    assert rows["diffusers-eager"]["not_run"] == "failed with RuntimeError: no such kernel"
    assert rows["tcbench"]["median_s"] > 0


def test_what_is_read_to_decide_by_is_stood_in_for():
    """Decisions follow what is told: their MACs are those that costing says from shapes, whatever the weights are."""
    tiny = make_adapter("tiny-dit")
    for name, options in (("first_block", {"threshold": 0.1}), ("teacache", {"threshold": 0.15}), ("lazydit", {})):
        method = make_method(name, options)
        artefacts = untrained_artefacts(tiny, method, 6, 0)
        replay = Replay(
            tiny, method, 6, SETTINGS, torch.arange(1), artefacts, stand_in=lambda: random_reads(0, open_rows=0.5)
        )
        told = macs_of("tiny-dit", method, 6, artefacts, random_reads(0, open_rows=0.5))
        assert replay.macs["per_sample"] == told["per_sample"], name


def test_what_is_timed_is_kept_until_its_settings_change(timed, tmp_path):
    suite, folder = timed
    files = sorted(folder.glob("runs/*.json"))
    before = [path.stat().st_mtime_ns for path in files]
    bench(suite, parts(suite, ["tiny-dit"], ["fp32"]), folder)
    assert [path.stat().st_mtime_ns for path in files] == before
    other = suite.model_copy(update={"seed": 1})
    bench(other, parts(other, ["tiny-dit"], ["fp32"]), folder, peers=False)
    assert all(path.stat().st_mtime_ns > old for path, old in zip(files, before, strict=True))


def test_a_profile_adds_up(timed):
    suite, folder = timed
    (path,) = folder.glob("profile/*.json")
    record = read_json(path)
    for step in record["steps"].values():
        assert sum(spent["time_s"] for spent in step["classes"].values()) == pytest.approx(step["busy_s"])
    assert record["steps"]["full"]["index"] == 3 and record["steps"]["partial"]["index"] == 2
    step = {"index": 1, "span_s": 4.0, "busy_s": 3.0, "classes": {"attention": {"time_s": 3.0, "launches": 2}}}
    table = profile_table([record | {"steps": {"full": step}}], suite)
    assert table.tidy["share"].tolist() == [0.75, 0.25]


def test_a_missing_gpu_is_said_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    suite = load_speed_suite(smoke(tmp_path, device="cuda"))
    with pytest.raises(UserError, match="device cuda: no usable GPU; see nvidia-smi"):
        bench(suite, parts(suite), tmp_path)


def test_nothing_timed_is_no_table(tmp_path):
    suite = load_speed_suite(SMOKE)
    with pytest.raises(UserError, match="nothing was timed"):
        render_speed(suite, tmp_path)
    with pytest.raises(UserError, match="no ratio to draw"):
        figure_speed(read_lines(suite, tmp_path))


def test_results_of_another_config_are_not_published(timed, monkeypatch, tmp_path):
    from tcbench.stages.publish import publish

    suite, folder = timed
    monkeypatch.chdir(tmp_path)
    record = RUN.read(next(folder.glob("runs/*.json")))
    record["provenance"]["config_digest"] = "0"
    RUN.write(tmp_path / "results" / suite.suite / "runs" / "a.json", record)
    with pytest.raises(UserError, match="another config"):
        publish(suite, allow_dirty=True)


def test_parts_of_several_commits_are_published_and_named(timed, monkeypatch, tmp_path):
    from tcbench.stages.publish import publish

    suite, folder = timed
    monkeypatch.chdir(tmp_path)
    part = next(folder.glob("runs/*.json"))
    for name, commit in {part.name: "a" * 40, "x.json": "a" * 40, "y.json": "b" * 40}.items():
        record = RUN.read(part)
        record["provenance"] |= {"git": {"commit": commit, "dirty": False}, "config_digest": suite.digest()}
        RUN.write(tmp_path / "results" / suite.suite / "runs" / name, record)
    render_speed(suite, tmp_path / "results" / suite.suite)
    publish(suite)
    target = tmp_path / "results" / "reference" / suite.suite
    assert "Timed at commit aaaaaaaa; at bbbbbbbb: y." in (target / "tables" / "speed.md").read_text()
    assert [git["commit"][0] for git in read_json(target / "provenance.json")["git"].values()] == ["a", "a", "b"]


def test_rows_cost_what_the_papers_cells_do():
    """TokenCache without its predictor, which the paper leaves out; the others with all they compute."""
    suite = load_speed_suite(ROOT / "config" / "speed.yaml")
    for name in ("dit-xl-2-256", "dit-xl-2-512"):
        model, shape = suite.models[name], MODELS[name].shape
        for row, settings in model.rows.items():
            share = settings.open_branches
            tables = {} if share is None else {"router": random_router(shape, settings.nfe, share, 0)}
            artefacts = Artefacts(tables=tables) if tables else None
            totals = macs_of(name, model.method(row), settings.nfe, artefacts)
            counted = totals["per_sample_without_overheads" if settings.method == "tokencache" else "per_sample"]
            assert counted / 1e12 == pytest.approx(settings.paper.tmacs, rel=5e-3), row
