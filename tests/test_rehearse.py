"""Rehearsals: reduced configs, stand-ins in official layouts, and every stage at toy size."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import pytest
import torch
import yaml

from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.errors import UserError
from tcbench.forecast.estimate import forecast
from tcbench.forecast.training import forward_macs
from tcbench.metrics.extractors import make_extractor
from tcbench.models.networks import load_transformer
from tcbench.models.specs import MODELS
from tcbench.outside.devices import SEATS
from tcbench.record.files import read_json, write_json
from tcbench.rehearse import layouts, run
from tcbench.rehearse.child import run_stage
from tcbench.rehearse.reduced import BATCHES, ITERATIONS, reduced
from tcbench.rehearse.sizes import FULL, TINY, SizeName, networks, write_stand_ins
from tests import official
from tests.conftest import not_laid_out
from tests.references import image_reward as reference


@pytest.mark.parametrize("path", official.CONFIGS, ids=lambda path: path.stem)
def test_a_reduced_suite_is_the_suite_with_little_to_do(path: Path, tmp_path: Path) -> None:
    suite, small = load_suite(path), tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(reduced(suite, yaml.safe_load(path.read_text(encoding="utf-8")), "full")))
    rehearsed = load_suite(small)
    assert rehearsed.samples.batch_size == suite.samples.batch_size, "memory is the batch's"
    assert rehearsed.samples.count == BATCHES * suite.samples.batch_size
    assert {row.method for row in rehearsed.rows.values()} == {row.method for row in suite.rows.values()}
    assert (rehearsed.model, rehearsed.training) == (suite.model, suite.training)
    assert [*rehearsed.show.tables] == [*suite.show.tables] and not rehearsed.added_rows
    for name in rehearsed.trained_rows:
        options = rehearsed[name].method.model_dump()
        assert all(value == ITERATIONS for option, value in options.items() if option.endswith("iterations"))
        assert options.get("training_batch_size") == suite[name].method.model_dump().get("training_batch_size")


def test_rows_of_a_rehearsal_take_fewer_steps_where_asked(tmp_path: Path) -> None:
    path, small = Path("config/paper-wan.yaml").resolve(), tmp_path / "small.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    asked = reduced(load_suite(path), settings, "full", 2, ["nfe50-tokencache"], most_steps=20)
    small.write_text(yaml.safe_dump(asked))
    rehearsed = load_suite(small)
    assert {row.nfe for row in rehearsed.rows.values()} == {20} == {rehearsed.show.figure.nfe}
    assert len(rehearsed.rows) == 2


def test_macs_of_a_small_network_are_not_kept_for_the_one_that_it_is_called_after() -> None:
    """A rehearsal's forecasts, and those of other tests, are made in one process."""
    with networks("tiny"):
        small = forward_macs("dit-xl-2-512")
    assert 1000 * small < forward_macs("dit-xl-2-512")


def test_image_rewards_tensors_are_named_as_recorded() -> None:
    recorded = read_json(reference.HERE / "image_reward.json")["parameters"]
    assert layouts.image_reward_shapes(TINY.vision, TINY.text) == recorded
    parameters = sum(
        torch.Size(shape).numel() for shape in layouts.image_reward_shapes(FULL.vision, FULL.text).values()
    )
    assert 4.4e8 < parameters < 4.9e8  # 1.8 GB


def test_a_folder_is_filled_though_a_file_in_it_is_listed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = load_suite(official.CONFIGS[0].with_name("paper-wan.yaml"))
    listed = {name: suite.files[name] for name in ("training_captions", "training")}
    assert listed["training_captions"].path.parent == listed["training"].path
    write_stand_ins(suite.model_copy(update={"files": listed}), "full")
    assert len([*Path(listed["training"].path).rglob("*.mp4")]) == len(FULL.videos)
    assert listed["training_captions"].path.is_file()
    encoded = next(job for job in forecast(suite, "h100", 1).jobs if job.stage == "encode")
    assert encoded.disk == 2 * len(FULL.videos) * prod(MODELS[suite.model.name].latent_shape), "these, not the real set"


@pytest.mark.parametrize("name", ["fashion", "cifar10"])
def test_networks_that_a_suite_trains_are_made_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite(Path("config", f"{name}.yaml"))
    monkeypatch.chdir(tmp_path)
    with networks("tiny"):
        assert {path.name for path in write_stand_ins(suite, "tiny")} == {
            "denoiser.safetensors",
            "classifier.safetensors",
        }
        load_transformer(MODELS[suite.model.name], suite.model.weights)
    make_extractor(str(suite.scoring.extractor), suite.scoring.extractor_weights)
    odd = suite.model_copy(
        update={"files": {"horoscope": suite.files["denoiser"].model_copy(update={"path": Path("h")})}}
    )
    with pytest.raises(UserError, match=r"^files\.horoscope: nothing is made up in its place; put a file at h$"):
        write_stand_ins(odd, "tiny")


def test_drawn_weights_keep_sizes() -> None:
    state = layouts.drawn({"a.weight": [64, 1024], "norm.weight": [8], "norm.bias": [8]}, torch.bfloat16)
    assert state["a.weight"].dtype == torch.bfloat16 and state["norm.weight"].eq(1).all()
    assert state["a.weight"].float().std().item() == pytest.approx(1 / 32, rel=0.05)


def here(size: SizeName, note: Path, command: Sequence[str]) -> int:
    return run_stage(size, note, Path(run.CONFIG), command)


def test_every_stage_is_rehearsed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PixArt-alpha at toy size: encode, train, sample, score, tables, report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "there"))
    config, said = official.CONFIGS[0].with_name("paper-pixart-256-parti.yaml"), list[str]()
    with not_laid_out():
        path = run.rehearse(config, Path("there"), "tiny", run=here, say=said.append)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "results" / "rehearsals" / "paper-pixart-256-parti-tiny.json"
    done = record["done"]
    stages = {name.split()[0] for name in done}
    assert stages == {"files", "encode", "train", "sample", "score", "latency", "diagnose", "render"}
    assert all(found["seconds"] > 0 and found["host_bytes"] > 0 for found in done.values())
    assert all("forecast_s" in found for name, found in done.items() if name != "files")
    assert (tmp_path / "there" / "results" / "paper-pixart-256-parti" / "report.html").stat().st_size > 1000
    assert "% in all" in said[-1] or "in all, forecast" in said[-1]

    before, said[:] = dict(done), []
    run.rehearse(config, Path("there"), "tiny", run=here, say=said.append)  # nothing is left but to look for files
    assert [line.split(":")[0] for line in said[:-1]] == ["files"]
    run.rehearse(config, Path("there"), "tiny", only=["latency"], run=here, say=said.append)
    after = json.loads(path.read_text(encoding="utf-8"))["done"]
    changed = {name for name in after if name != "files" and after[name] != before[name]}
    assert changed == {"latency rows"}


def test_a_stage_that_fails_is_named_and_pieces_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, ran = official.CONFIGS[0].with_name("paper-dit-256.yaml"), list[str]()

    def pretend(size: SizeName, note: Path, command: Sequence[str]) -> int:
        ran.append(command[0])
        if command[0] == "files":
            official.write_imagenet(Path("data/imagenet/train"))
        if command[0] == "sample":
            return 2
        write_json(note, {"gpu_bytes": 0, "host_bytes": 1, "device": "cpu"})
        return 0

    with pytest.raises(UserError, match=r"^sample nfe.*: failed, status 2; see .*/logs/sample"):
        run.rehearse(config, Path("there"), "tiny", run=pretend, say=lambda line: None)
    assert ran[:2] == ["files", "encode"] and ran[-1] == "sample"
    ran.clear()
    said: list[str] = []
    run.rehearse(config, Path("there"), "tiny", minutes=-1, run=pretend, say=said.append)
    assert not ran and "not begun after" in said[0]
    with pytest.raises(UserError, match="--only trane: give some of files, encode"):
        run.rehearse(config, Path("there"), "tiny", only=["trane"], run=pretend)
    with pytest.raises(UserError, match=r"rows: suite paper-dit-256 has no row 'nfe50-foro'; did you mean 'nfe50-fora"):
        run.rehearse(config, Path("there"), "tiny", run=pretend, rows=["nfe50-foro"])
    run.rehearse(config, Path("there"), "tiny", minutes=-1, run=pretend, say=said.append, rows=["nfe20-none11"])
    rows = yaml.safe_load(Path("there", run.CONFIG).read_text(encoding="utf-8"))["rows"]
    assert [*rows] == ["nfe20-uncached", "nfe20-tokencache", "nfe20-none11"], "what a row compares with and trains"
    with pytest.raises(UserError, match="--batches 1: an interval takes two shards"):
        run.rehearse(config, Path("there"), "full", run=pretend, batches=1)
    assert main(["rehearse", str(config), "--into", "there", "--size", "tiny", "--only", "trane"]) == 2
    monkeypatch.setenv(SEATS, "3")
    record = run.rehearse(config, Path("there"), "tiny", run=pretend, only=["files"], say=said.append)
    assert record.name == "paper-dit-256-tiny-shared.json", "its seconds are not those of a job that has a card alone"
    assert read_json(record)["reduced_to"]["jobs_per_gpu"] == 3


def test_a_smaller_card_is_rehearsed_on_a_larger_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, limits = official.CONFIGS[0].with_name("paper-dit-256.yaml"), list[str]()

    def began(module: Sequence[str], env: Mapping[str, str], **streams: object) -> subprocess.CompletedProcess[str]:
        limits.append(env["PYTORCH_ALLOC_CONF"])
        return subprocess.CompletedProcess(module, 2)

    monkeypatch.setattr(run, "said_of_gpu", lambda field: "143771")  # MiB, as an H200 says
    monkeypatch.setattr(run.subprocess, "run", began)
    with pytest.raises(UserError, match="files: failed"):
        run.rehearse(config, Path("there"), "full", card_memory=80)
    assert limits == ["per_process_memory_fraction:0.5307"]
    with pytest.raises(UserError, match=r"--card-memory 200: give GB, of the 151 GB that the card has"):
        run.rehearse(config, Path("there"), "full", card_memory=200)
    monkeypatch.setattr(run, "said_of_gpu", lambda field: "")
    with pytest.raises(UserError, match="--card-memory: nvidia-smi finds no GPU here"):
        run.rehearse(config, Path("there"), "full", card_memory=80)
