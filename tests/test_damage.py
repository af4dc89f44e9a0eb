"""What a number rests on is checked when it is read: a finished run at tiny size, damaged in every way, file by file.

Nothing ends in a traceback, and no damaged file changes a number: the stage that reads it makes it again, or refuses it
in one line that names it.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.errors import UserError
from tcbench.record.files import PROVENANCE, is_whole, read_json, read_tensors, seal, vouch, write_record, write_tensors
from tcbench.stages import publish

from .conftest import not_laid_out

SMOKE = (Path(__file__).parent / "smoke.yaml").read_text(encoding="utf-8")
ROWS = ("nfe4-uncached", "nfe4-fora", "nfe4-tokencache")
RESULTS = Path("results") / "tiny"


def tiny() -> str:
    """The smoke suite with three rows and one ablation of them, of as few samples as Recall takes."""
    head, tail = SMOKE.replace("suite: smoke", "suite: tiny").split("\nrows:\n")
    head = head.replace("count: 8", "count: 6").replace("batch_size: 4", "batch_size: 2")
    rows, ablations = tail.split("ablations:\n")
    kept = [line for line in rows.splitlines() if line.split(":")[0].strip() in ROWS]
    head = "\n".join(line for line in head.splitlines() if not line.strip().startswith("table6"))
    one = ablations[: ablations.index("  guidance:")].replace("      r0.9: {paper: {fid: 8.99, speedup: 2.40}}\n", "")
    return f"{head}\nrows:\n" + "\n".join(kept) + f"\nablations:\n{one}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Path]:
    """A folder where every stage has run; while there is one, no figure is laid out."""
    folder = tmp_path_factory.mktemp("made")
    with not_laid_out():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            Path("tiny.yaml").write_text(tiny(), encoding="utf-8")
            for command in (
                "train tiny.yaml --row nfe4-tokencache",
                f"sample tiny.yaml --rows {' '.join(ROWS)}",
                f"score tiny.yaml --rows {' '.join(ROWS)}",
                "floor tiny.yaml",
                "seed-noise tiny.yaml",
                "latency tiny.yaml",
                "diagnose tiny.yaml --row nfe4-tokencache",
                "ablate tiny.yaml --name cache_ratio",
                "tables tiny.yaml",
                "verdicts tiny.yaml",
                "report tiny.yaml",
            ):
                assert main(command.split()) == 0, command
        yield folder


@pytest.fixture
def results(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the commands run."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return RESULTS


READERS = {
    "samples/nfe4-fora/row.json": ["score tiny.yaml --rows nfe4-fora", "tables tiny.yaml"],
    "scores/nfe4-fora.json": ["tables tiny.yaml", "verdicts tiny.yaml", "ablations tiny.yaml", "report tiny.yaml"],
    "scores/floor.json": ["tables tiny.yaml", "report tiny.yaml"],
    "scores/seed-noise.json": ["tables tiny.yaml", "report tiny.yaml"],
    "latency.json": ["tables tiny.yaml", "report tiny.yaml"],
    "diagnostics/nfe4-tokencache.json": ["diagnostics tiny.yaml", "figures tiny.yaml fig3_updates"],
    "trained/nfe4-tokencache/artefacts.json": ["sample tiny.yaml --rows nfe4-tokencache", "report tiny.yaml"],
    "ablations/cache_ratio/scores/cache_ratio-r0.7.json": ["ablations tiny.yaml", "report tiny.yaml"],
}
"""Commands that read a record."""


def damages(content: bytes) -> dict[str, bytes]:
    """What disks, copies and editors make of JSON."""
    value, flipped = json.loads(content), bytearray(content)
    flipped[len(content) * 7 // 10] ^= 4
    fewer = dict(value)
    del fewer[next(iter(fewer))]
    texts = [json.dumps(odd).encode() for odd in ([], None, 3, {}, [value], fewer, fewer | {"digest": 1})]
    edited = content.replace(b"1", b"2", 1)
    whole_json = {"edited": edited} | {f"text {number}": text for number, text in enumerate(texts)}
    half = {"cut": content[: len(content) // 2], "empty": b"", "no text": b"\xff\xfe", "deep": b"[" * 10**5}
    return whole_json | {"flipped": bytes(flipped)} | half


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The complaint."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tcbench: ")]
    return line


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_record_is_refused_in_one_line(
    results: Path, capsys: pytest.CaptureFixture[str], every_combination: bool, name: str
) -> None:
    """One reader meets every damage, every reader one that is JSON and one that is none: all read by one function."""
    path = results / name
    for how, content in damages(path.read_bytes()).items():
        path.write_bytes(content)
        for command in READERS[name] if every_combination or how in ("edited", "cut") else READERS[name][:1]:
            assert main(command.split()) == 2, (how, command)
            assert str(path) in one_line(capsys), (how, command)


def places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) of nested JSON, of long lists the first."""
    keys = value.keys() if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        if depth < 3:
            yield from places(value[key], depth + 1)


@pytest.mark.parametrize("name", READERS)
def test_an_odd_value_that_was_vouched_for_is_no_traceback(
    results: Path, capsys: pytest.CaptureFixture[str], every_combination: bool, name: str
) -> None:
    """Edited on purpose, or of another version: fields lack or have other types."""
    path, drawn = results / name, random.Random(name)
    whole = read_json(path)
    number = len(list(places(whole)))
    command = READERS[name][0]
    for place in drawn.sample(range(number), min(number, 25 if every_combination else 12)):
        value = json.loads(json.dumps(whole))
        del value["digest"]
        found = list(places(value))
        if place >= len(found):
            continue
        holder, key = found[place]
        if isinstance(holder, dict) and drawn.random() < 0.3:
            del holder[key]
        else:
            holder[key] = drawn.choice([None, [], {}, "x", -1, 0, True, "../elsewhere/shard"])
        write_record(path, value)
        status = main(command.split())
        assert status in (0, 2), (key, command)
        if status == 2:
            assert one_line(capsys)


def test_artefacts_whose_stages_lack_are_refused(results: Path, capsys) -> None:
    path = results / "trained" / "nfe4-tokencache" / "artefacts.json"
    record = read_json(path)
    shutil.rmtree(results / "samples" / "nfe4-tokencache")
    for stages in ([], [{"kind": "TrainRefiners", "wall_s": 0.0}]):
        write_record(path, {name: value for name, value in record.items() if name != "digest"} | {"stages": stages})
        assert main(["sample", "tiny.yaml", "--rows", "nfe4-tokencache"]) == 2
        assert f"{path}: was trained with other settings than the config has (options)" in one_line(capsys)


# --- what is no JSON


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    """Change a bit at 70 % of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) * 7 // 10] ^= 64
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def quality(path: Path) -> dict[str, Any]:
    """The numbers of a score, without its times."""
    score = read_json(path)
    return {key: value for key, value in score.items() if key not in ("provenance", "digest")}


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_shard_is_refused_and_sampled_again(results: Path, capsys, damage) -> None:
    samples = results / "samples" / "nfe4-fora"
    shards = {name: content for name, content in bytes_of(samples).items() if name.suffix == ".safetensors"}
    damage(samples / "shard-00001.safetensors")
    assert main(["score", "tiny.yaml", "--rows", "nfe4-fora"]) == 2
    says = "shard-00001.safetensors: is not the shard that row.json lists; run `tcbench sample` for nfe4-fora again"
    assert says in one_line(capsys)
    damage(samples / "shard-00000.safetensors")
    assert main(["tables", "tiny.yaml"]) == 2 and "shard-00000.safetensors: is not" in one_line(capsys)
    assert main(["sample", "tiny.yaml", "--rows", "nfe4-fora"]) == 0
    assert {name: (samples / name).read_bytes() for name in shards} == shards
    scored = quality(results / "scores" / "nfe4-fora.json")
    assert main(["score", "tiny.yaml", "--rows", "nfe4-fora"]) == 0
    assert quality(results / "scores" / "nfe4-fora.json") == scored


ODD_TENSORS = {
    "fewer": lambda tensors: {name: tensor[:1] for name, tensor in tensors.items()},
    "without images": lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "image"},
    "without index": lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "index"},
    "none": lambda _: {},
    "of another type": lambda tensors: {name: tensor.double() for name, tensor in tensors.items()},
    "flat": lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()},
    "numbers": lambda tensors: {name: tensor.flatten()[0] for name, tensor in tensors.items()},
}


def test_odd_tensors_that_were_vouched_for_are_no_traceback(results: Path, capsys) -> None:
    """A shard and features with digests that fit, of another version or another program."""
    shard, features = (results / name for name in ("samples/nfe4-fora/shard-00000.safetensors", "features/nfe4-fora"))
    features = features.with_suffix(".safetensors")
    whole, scored = shard.read_bytes(), quality(results / "scores" / "nfe4-fora.json")
    content, key = read_tensors(shard)
    extracted, its_key = read_tensors(features)
    record = read_json(results / "samples" / "nfe4-fora" / "row.json")
    for how, made in ODD_TENSORS.items():
        write_tensors(shard, made(content), key)
        shards = record["shards"] | {shard.name: seal(shard)}
        write_record(
            shard.with_name("row.json"),
            {name: value for name, value in record.items() if name != "digest"} | {"shards": shards},
        )
        for command in ("score tiny.yaml --rows nfe4-fora", "tables tiny.yaml"):
            assert main(command.split()) == 2 and str(shard.parent) in one_line(capsys), (how, command)
        assert main(["sample", "tiny.yaml", "--rows", "nfe4-fora"]) == 0 and shard.read_bytes() == whole, how
        write_tensors(features, made(extracted), its_key)
        assert main(["score", "tiny.yaml", "--rows", "nfe4-fora"]) == 0, how
        assert quality(results / "scores" / "nfe4-fora.json") == scored, how


def test_an_ablation_copies_no_damaged_shard(results: Path) -> None:
    twin, folder = results / "samples" / "nfe4-uncached", results / "ablations" / "cache_ratio"
    (reference,) = (folder / "samples").glob("*-reference4")
    whole = (reference / "shard-00000.safetensors").read_bytes()
    for path in (twin, reference):
        flip(path / "shard-00000.safetensors")
    assert main(["ablate", "tiny.yaml", "--name", "cache_ratio"]) == 0
    assert (reference / "shard-00000.safetensors").read_bytes() == whole


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_features_are_computed_again(results: Path, damage) -> None:
    features, score = results / "features" / "nfe4-fora.safetensors", results / "scores" / "nfe4-fora.json"
    content, scored = features.read_bytes(), quality(score)
    damage(features)
    assert main(["score", "tiny.yaml", "--rows", "nfe4-fora"]) == 0
    assert features.read_bytes() == content and quality(score) == scored


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_what_training_made_is_refused_when_damaged(results: Path, capsys, damage) -> None:
    damage(results / "trained" / "nfe4-tokencache" / "predictor.safetensors")
    shutil.rmtree(results / "samples" / "nfe4-tokencache")
    assert main(["sample", "tiny.yaml", "--rows", "nfe4-tokencache"]) == 2
    assert "predictor.safetensors: " in (line := one_line(capsys)) and ("train the row" in line or "not found" in line)


@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_pictures_are_drawn_again_or_refused(results: Path, capsys, damage) -> None:
    figure, strip = results / "figures" / "fig10_deviation.svg", results / "grids" / "strips" / "nfe4-fora.png"
    content, page = figure.read_bytes(), (results / "report.html").read_bytes()
    damage(figure)
    assert main(["report", "tiny.yaml"]) == 0
    assert figure.read_bytes() == content and (results / "report.html").read_bytes() == page
    damage(strip)
    assert main(["report", "tiny.yaml"]) == 2 and "nfe4-fora.png: no strip" in one_line(capsys)
    assert main(["tables", "tiny.yaml"]) == 0 and is_whole(strip)


# --- whole, and in another's place


def swap(one: Path, other: Path) -> None:
    """Two files or folders, each in the other's place."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


STRIPS, SHARDS = "grids/strips", "samples/nfe4-fora"
PREDICTOR = "trained/nfe4-tokencache/predictor.safetensors"
SWAPS = {
    # two files, the command that reads one of them, and its complaint
    "strips": (f"{STRIPS}/nfe4-fora.png", f"{STRIPS}/nfe4-tokencache.png", "report", "is of row nfe4-"),
    "strips of a row": (f"{STRIPS}/nfe4-fora.png", f"{STRIPS}/nfe4-fora-steps.png", "report", "is of shows steps"),
    "scores": ("scores/nfe4-fora.json", "scores/nfe4-tokencache.json", "tables", "is of row nfe4-tokencache"),
    "scores of an ablation": (
        *(f"ablations/cache_ratio/scores/cache_ratio-{key}.json" for key in ("r0.7", "reference4")), "ablations",
        "is of row cache_ratio-",
    ),
    "samples": (SHARDS, "samples/nfe4-tokencache", "score --rows nfe4-fora", "is of row nfe4-tokencache"),
    "samples for strips": (SHARDS, "samples/nfe4-tokencache", "tables", "is of row nfe4-tokencache"),
    "shards": (
        f"{SHARDS}/shard-00000.safetensors", "samples/nfe4-tokencache/shard-00000.safetensors",
        "score --rows nfe4-fora", "is not the shard that row.json lists",
    ),
    "shards of a row": (
        f"{SHARDS}/shard-00000.safetensors", f"{SHARDS}/shard-00001.safetensors", "score --rows nfe4-fora",
        "is not the shard that row.json lists",
    ),
    "trained": (PREDICTOR, PREDICTOR.replace("predictor", "refiners"), "sample --rows nfe4-tokencache", "vouches for"),
    "tables": ("tables/table2.md", "tables/verdicts.md", "publish --allow-dirty", "is not the file that"),
    "their records": ("tables/table2.json", "tables/verdicts.json", "publish --allow-dirty", "is not the file that"),
}  # fmt: skip


def run_on_tiny(command: str) -> int:
    stage, _, arguments = command.partition(" ")
    return main([stage, "tiny.yaml", *arguments.split()])


@pytest.mark.parametrize("kind", SWAPS)
def test_what_lies_in_anothers_place_is_refused(results: Path, capsys, kind: str) -> None:
    one, other, command, says = SWAPS[kind]
    swap(results / one, results / other)
    if command.startswith("sample"):
        shutil.rmtree(results / "samples" / "nfe4-tokencache")
    assert run_on_tiny(command) == 2 and says in one_line(capsys)


MADE_AGAIN = {
    "features": ("features/nfe4-fora.safetensors", "features/nfe4-tokencache.safetensors", "score --rows nfe4-fora"),
    "figures": ("figures/fig10_deviation.svg", "figures/fig1b_quality.svg", "report"),
    "shards without a list": (
        f"{SHARDS}/shard-00000.safetensors", f"{SHARDS}/shard-00001.safetensors", "sample --rows nfe4-fora"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE_AGAIN)
def test_what_lies_in_anothers_place_is_made_again(results: Path, kind: str) -> None:
    one, other, command = MADE_AGAIN[kind]
    content, page = (results / one).read_bytes(), (results / "report.html").read_bytes()
    scored = quality(results / "scores" / "nfe4-fora.json")
    swap(results / one, results / other)
    if kind == "shards without a list":
        (results / SHARDS / "row.json").unlink()
    assert run_on_tiny(command) == 0
    assert (results / one).read_bytes() == content and (results / "report.html").read_bytes() == page
    assert quality(results / "scores" / "nfe4-fora.json") == scored


ELSEWHERE = {
    "scores/nfe4-fora.json": "tables",
    "scores/floor.json": "tables",
    "latency.json": "tables",
    "diagnostics/nfe4-tokencache.json": "diagnostics",
    "trained/nfe4-tokencache/artefacts.json": "report",
    "ablations/cache_ratio/scores/cache_ratio-r0.7.json": "ablations",
    "tables/table2.json": "publish --allow-dirty",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_record_of_another_suite_is_refused(results: Path, capsys, name: str) -> None:
    """Of a row that is called the same there."""
    path = results / name
    record = read_json(path)
    assert record.pop("digest") and record["suite"] == "tiny"
    write_record(path, record | {"suite": "other"})
    assert run_on_tiny(ELSEWHERE[name]) == 2 and f"{path}: is of suite other, not tiny" in one_line(capsys)


def test_samples_and_training_of_another_config_are_refused(results: Path, capsys) -> None:
    """As when a config is edited and only the next stage is run by hand."""
    config, edits = Path("tiny.yaml"), {"nfe: 4": "nfe: 5", "predictor_iterations: ": "predictor_iterations: 1"}
    whole = config.read_text(encoding="utf-8")
    shutil.rmtree(results / "samples" / "nfe4-tokencache")
    for old, new in edits.items():
        assert old in whole
        config.write_text(whole.replace(old, new), encoding="utf-8")
        assert main(["sample", "tiny.yaml", "--rows", "nfe4-tokencache"]) == 2
        said = one_line(capsys)
        assert "artefacts.json: was trained with other settings than the config has (" in said
        assert "run `tcbench train` for nfe4-tokencache again" in said
    assert main(["score", "tiny.yaml", "--rows", "nfe4-fora"]) == 0, "what scoring does not depend on may change"
    config.write_text(whole.replace("nfe: 4", "nfe: 5"), encoding="utf-8")
    assert main(["score", "tiny.yaml", "--rows", "nfe4-fora"]) == 2
    assert "row.json: was sampled with other settings than the config has" in one_line(capsys)


def test_seconds_of_a_resumed_row_count_all_processes(results: Path) -> None:
    """Of parts that were kept; they are no part of the samples."""
    samples = results / "samples" / "nfe4-fora"
    shard, manifest = samples / "shard-00001.safetensors", samples / "row.json"
    fingerprint = read_tensors(shard)[1]["fingerprint"]
    whole = shard.read_bytes()

    def seconds_after(damage: Path) -> float:
        damage.unlink()
        assert main(["sample", "tiny.yaml", "--rows", "nfe4-fora"]) == 0
        assert shard.read_bytes() == whole and not (samples / "spent-1-of-1.json").exists()
        return float(read_json(manifest)["provenance"]["wall_s"])

    manifest.unlink()
    write_record(samples / "spent-1-of-1.json", {"key": fingerprint, "wall_s": 1000.0})  # as a killed process leaves it
    assert 1000 <= seconds_after(shard) < 2000
    assert 1000 <= seconds_after(shard) < 2000, "of a row that was whole once"
    manifest.unlink()
    write_record(samples / "spent-1-of-1.json", {"key": "of other settings", "wall_s": 1000.0})
    assert seconds_after(shard) < 1000
    manifest.unlink()
    for other in {*samples.glob("shard-*")} - {shard}:
        other.unlink()
    write_record(samples / "spent-1-of-1.json", {"key": fingerprint, "wall_s": 1000.0})
    assert seconds_after(shard) < 1000, "nothing of it was kept"


def test_marks_of_training_and_of_samples_are_both_in_the_score(results: Path) -> None:
    path = results / "trained" / "nfe4-tokencache" / "artefacts.json"
    record = read_json(path)
    del record["digest"]
    record["stages"][0]["marks"] = ["saturated"]
    write_record(path, record)
    assert main(["score", "tiny.yaml", "--rows", "nfe4-tokencache"]) == 0
    marks = read_json(results / "scores" / "nfe4-tokencache.json")["marks"]
    assert "saturated (training of nfe4-tokencache)" in marks


# --- other ends


def test_two_runs_give_the_same_bytes_for_trained_rows_too(made: Path, tmp_path: Path, monkeypatch) -> None:
    """Fingerprints hash no times."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "tiny.yaml", "tiny.yaml")
    for command in ("train tiny.yaml --row nfe4-tokencache", "sample tiny.yaml --rows nfe4-tokencache"):
        assert main(command.split()) == 0
    for folder in ("trained", "samples"):
        ours, theirs = (bytes_of(root / RESULTS / folder / "nfe4-tokencache") for root in (tmp_path, made))
        tensors = [name for name in ours if name.suffix == ".safetensors"]
        assert ours.keys() == theirs.keys() and tensors
        assert all(ours[name] == theirs[name] for name in tensors)


def test_a_table_says_what_was_not_timed(results: Path, capsys) -> None:
    record = read_json(results / "latency.json")
    del record["digest"], record["rows"]["nfe4-fora"]
    write_record(results / "latency.json", record)
    assert main(["tables", "tiny.yaml"]) == 0
    assert "Not timed (`tcbench latency tiny`): nfe4-fora." in capsys.readouterr().out
    (results / "latency.json").unlink()
    assert main(["tables", "tiny.yaml"]) == 0
    assert f"Not timed (`tcbench latency tiny`): {', '.join(ROWS)}." in capsys.readouterr().out


def test_another_rows_record_is_refused(results: Path, capsys) -> None:
    shutil.copy(results / "scores" / "nfe4-fora.json", results / "scores" / "nfe4-tokencache.json")
    assert main(["tables", "tiny.yaml"]) == 2
    assert "nfe4-tokencache.json: is of row nfe4-fora, not nfe4-tokencache" in one_line(capsys)


def test_published_results_are_those_that_were_measured(results: Path, capsys) -> None:
    assert main(["publish", "tiny.yaml", "--allow-dirty"]) == 0
    published = Path("results") / "reference" / "tiny"
    tables = ["tables", "tiny.yaml", "--results", str(published)]
    assert main(tables) == 0
    for name in ("scores/nfe4-fora.json", "latency.json", PROVENANCE):
        whole = (published / name).read_bytes()
        (published / name).write_bytes(whole.replace(b"1", b"2", 1))
        assert main(tables) == 2 and str(published / name) in one_line(capsys)
        (published / name).write_bytes(whole)
    edited = published / "scores" / "nfe4-fora.json"
    edited.write_text(edited.read_text(encoding="utf-8").replace('"FORA"', '"FORA, as published"'), encoding="utf-8")
    assert main(tables) == 2
    vouch(edited)
    capsys.readouterr()
    assert main(tables) == 2 and "--overwrite" in one_line(capsys)
    assert main([*tables, "--overwrite"]) == 0 and "FORA, as published" in capsys.readouterr().out


def test_a_run_that_was_cut_short_is_published_in_part(results: Path, capsys) -> None:
    """Its tables are rendered from what is published, and their titles say that rows lack."""
    publish = ["publish", "tiny.yaml", "--allow-dirty"]
    assert main([*publish, "--part"]) == 2 and "every row was run and timed; leave out --part" in one_line(capsys)
    (results / "scores" / "nfe4-fora.json").unlink()
    (results / "ablations" / "cache_ratio" / "scores" / "cache_ratio-r0.7.json").unlink()
    (results / "latency.json").unlink()
    shutil.rmtree(results / "grids")
    assert main(publish) == 2 and "nfe4-fora.json" in one_line(capsys)
    assert main([*publish, "--part"]) == 0
    assert "2 rows were not run: nfe4-fora, cache_ratio-r0.7" in capsys.readouterr().out
    published = Path("results") / "reference" / "tiny"
    assert read_json(published / PROVENANCE)["lacks"] == ["nfe4-fora", "cache_ratio-r0.7"]
    assert not (published / "tables").exists() and (published / "trained" / "nfe4-tokencache").exists()
    for command in ("tables", "ablations", "diagnostics", "verdicts", "figures", "report"):
        assert main([command, "tiny.yaml", "--results", str(published)]) == 0
    assert "grids/nfe4.png: not drawn: needs strips of samples" in capsys.readouterr().err
    shown = (published / "tables" / "table2.md").read_text(encoding="utf-8")
    assert "; run in part, 2 rows and variants lack)" in shown and "FORA" not in shown
    assert not (published / "tables" / "ablation-cache_ratio.md").exists()  # nothing but a variant that lacks was in it


def test_a_run_that_was_not_timed_is_published_in_part(results: Path, capsys) -> None:
    publish = ["publish", "tiny.yaml", "--allow-dirty"]
    (results / "latency.json").unlink()
    assert main(publish) == 2 and "latency.json: not found" in one_line(capsys)
    assert main([*publish, "--part"]) == 0
    said = capsys.readouterr().out
    assert "next: tcbench tables" in said and "not run" not in said
    published = Path("results") / "reference" / "tiny"
    assert "lacks" not in read_json(published / PROVENANCE)
    assert main(["tables", "tiny.yaml", "--results", str(published)]) == 0
    assert "run in part" not in (published / "tables" / "table2.md").read_text(encoding="utf-8")


def test_how_a_shared_network_was_trained_is_published_with_each_suite(results: Path) -> None:
    suite = load_suite(Path("tiny.yaml"))
    own, shared = (Path("results") / name / "pretrained" / "denoiser.safetensors" for name in ("tiny", "other"))
    for weights, logs in ((own, []), (shared, [shared.with_name("denoiser-log.json")])):
        weights.parent.mkdir(parents=True)
        weights.with_name("denoiser-log.json").write_text("{}", encoding="utf-8")
        model = suite.model.model_copy(update={"weights": str(weights)})
        assert publish._logs_elsewhere(suite.model_copy(update={"model": model})) == logs


def test_rows_of_another_base_model_are_not_published_beside_others(results: Path, capsys) -> None:
    """Two trainings by one recipe are not one network, and the config names the file alone."""
    for path in results.glob("**/scores/*.json"):
        if (record := read_json(path)).get("row"):
            assert record["provenance"]["samples"]["weights"]["denoiser"], path
    damaged = results / "scores" / "nfe4-fora.json"
    record = read_json(damaged)
    record["provenance"]["samples"]["weights"]["denoiser"] = "another"
    write_record(damaged, record)
    assert main(["publish", "tiny.yaml", "--allow-dirty"]) == 2
    assert "nfe4-fora, samples: has another denoiser's weights than nfe4-uncached, samples" in one_line(capsys)


def test_results_of_several_commits_are_published_where_their_code_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a change of a metric, when samples are kept and scored again."""
    smoke = load_suite(Path(__file__).parent / "smoke.yaml")
    first, last = {"git": {"commit": "a" * 40}}, {"git": {"commit": "b" * 40}}
    records: Any = {"r": (last, "", "score"), "r, samples": (first, "", "sample"), "latency": (last, "", "latency")}
    monkeypatch.setattr(publish, "is_ancestor", lambda commit, other: commit <= other)
    changed: set[Path] = set()
    monkeypatch.setattr(publish, "changed_between", lambda commit, other: changed if commit != other else set())
    code = Path(publish.__file__).parents[1]
    changed |= {code / "metrics" / "kid.py", code / "report" / "page.py"}
    assert publish._newest_of_one_code(smoke, records) is last
    for module in ("samplers.py", "training/scorers.py"):
        changed.add(code / module)
        with pytest.raises(UserError, match=rf"r, samples is of aaaaaaaa, since when {Path(module).name} changed"):
            publish._newest_of_one_code(smoke, records)
        changed.remove(code / module)
    monkeypatch.setattr(publish, "is_ancestor", lambda commit, other: commit == other)
    with pytest.raises(UserError, match="none of which has all others before it"):
        publish._newest_of_one_code(smoke, records)


@pytest.mark.parametrize("name", ["tables/verdicts.md", "tables/verdicts.csv", "tables/verdicts.json"])
def test_rendered_files_are_not_published_damaged(results: Path, capsys, name: str) -> None:
    path = results / name
    whole = path.read_bytes()
    for damage in (flip, cut):
        damage(path)
        assert main(["publish", "tiny.yaml", "--allow-dirty"]) == 2
        assert str(path) in one_line(capsys)
        path.write_bytes(whole)
    assert main(["publish", "tiny.yaml", "--allow-dirty"]) == 0


@pytest.mark.parametrize("content", [b"", b"suite,topic\ntiny,a\n", b"\xff\xfe", b'"'])
def test_damaged_verdicts_are_one_line(results: Path, capsys, content: bytes) -> None:
    path = results / "tables" / "verdicts.csv"
    assert main(["claims", "results"]) == 0
    flip(path)
    assert main(["claims", "results"]) == 2 and str(path) in one_line(capsys)
    path.write_bytes(content)
    assert main(["claims", "results"]) == 2 and str(path) in one_line(capsys)
    path.with_suffix(".json").unlink()  # as an older version left it
    assert main(["claims", "results"]) == 2 and str(path) in one_line(capsys)


def test_rows_of_a_suite_and_of_an_ablation_are_sampled_apart(results: Path, capsys) -> None:
    rows = ["nfe4-fora", "cache_ratio-r0.7"]
    for order in (rows, rows[::-1]):
        assert main(["sample", "tiny.yaml", "--rows", *order]) == 2
        assert "name these apart" in one_line(capsys)


WRITES = {  # by command, what it makes, and how many KiB are not enough for that
    "sample tiny.yaml --rows nfe4-fora": ("samples/nfe4-fora", 40),
    "score tiny.yaml --rows nfe4-fora": ("features/nfe4-fora.safetensors", 8),
    "latency tiny.yaml": ("latency.json", 0),
    "ablate tiny.yaml --name cache_ratio": ("ablations", 24),
    "tables tiny.yaml": ("grids/nfe4.png", 0),
    "verdicts tiny.yaml": ("tables/verdicts.md", 0),
    "figures tiny.yaml fig10_deviation": ("figures/fig10_deviation.png", 4),
    "report tiny.yaml": ("report.html", 64),
    "publish tiny.yaml --allow-dirty": ("../reference", 32),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    made: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", "results"], check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        shutil.copytree(made, tmp_path, dirs_exist_ok=True)
        for command, (target, short) in WRITES.items():
            path = RESULTS / target
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            for free in {0, short}:
                there = bytes_of(Path("results"))
                full = Path("ballast")
                disk = os.statvfs("results")
                (Path("results") / full).write_bytes(bytes(disk.f_bavail * disk.f_bsize - free * 1024))
                assert main(command.split()) == 2, (command, free)
                assert "results/" in (line := one_line(capsys)) and "free space" in line, (command, free)
                (Path("results") / full).unlink()
                left = bytes_of(Path("results"))
                assert not [name for name in left.keys() - there.keys() if ".tmp" in str(name)], (command, free)
            assert main(command.split()) == 0, command
    finally:
        subprocess.run(["umount", "results"], check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    run = [sys.executable, "-m", "tcbench.cli", "methods"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (
        done.returncode == 2 and done.stderr.startswith("tcbench: standard output: ") and done.stderr.count("\n") == 1
    )


COMMANDS = [command for commands in READERS.values() for command in commands]
COMMANDS += ["train tiny.yaml --row nfe4-tokencache", "floor tiny.yaml", "latency tiny.yaml", "publish tiny.yaml"]


@pytest.mark.parametrize("command", [*dict.fromkeys(COMMANDS), "ablate tiny.yaml --name cache_ratio"])
def test_results_that_are_a_file_are_one_line(made: Path, tmp_path: Path, monkeypatch, capsys, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "tiny.yaml", "tiny.yaml")
    Path("results").touch()
    assert main(command.split()) == 2
    assert "results/tiny" in one_line(capsys)
