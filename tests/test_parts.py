"""A row that is sampled in parts, by jobs that know nothing of each other, is the row that one job samples."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.errors import UserError
from tcbench.stages.part import Part
from tcbench.workflow import CONFIG_KEYS, asked_of, sampling_parts

ROOT = Path(__file__).parent.parent
SMOKE = (Path(__file__).parent / "smoke.yaml").read_text(encoding="utf-8")
COUNTED = SMOKE.replace("count: 8", "count: 14").replace("traced: 4", "traced: 5")  # four shards, the last one short
SUITE = load_suite(Path(__file__).parent / "smoke.yaml")
ROWS = ("nfe4-uncached", "nfe4-fora")


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.yaml").write_text(COUNTED)

    def run(folder: str, *options: str) -> dict[str, bytes]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        assert main(["sample", str(tmp_path / "mine.yaml"), "--rows", *ROWS, *options]) == 0
        return {str(path): path.read_bytes() for path in Path().rglob("shard-*")}

    return run


def test_parts_make_the_bytes_of_one_job_and_the_last_one_finishes_the_row(sample, tmp_path: Path) -> None:
    second = sample("parts", "--part", "2/3")
    manifests = [tmp_path / "parts" / f"results/smoke/samples/{row}/row.json" for row in ROWS]
    assert len(second) == 2 and not any(path.exists() for path in manifests)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("shard-*")}
    assert len(sample("parts", "--part", "1/3")) == 4 and not any(path.exists() for path in manifests)
    in_parts = sample("parts", "--part", "3/3")
    assert in_parts == sample("whole") and len(in_parts) == 8
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    for path in manifests:
        own, others = (
            json.loads(file.read_text()) for file in (path, tmp_path / "whole" / path.relative_to(tmp_path / "parts"))
        )
        times = ("provenance", "resumed", "digest")
        assert {key: own[key] for key in own if key not in times} == {
            key: others[key] for key in others if key not in times
        }


def test_a_part_that_lost_a_shard_takes_the_row_back(sample, tmp_path: Path) -> None:
    """And another part that finds all there does not finish it before."""
    whole = sample("row")
    shard = tmp_path / "row" / f"results/smoke/samples/{ROWS[0]}/shard-00003.safetensors"
    manifest = shard.with_name("row.json")
    shard.unlink()
    manifest.unlink()
    sample("row", "--part", "1/2")
    assert not manifest.exists()
    assert sample("row", "--part", "2/2") == whole and manifest.exists()


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_parts_are_ranges_that_hold_every_shard_once(shards: int, of: int) -> None:
    ranges = [Part(number, of).shards(shards) for number in range(1, of + 1)]
    assert [shard for part in ranges for shard in part] == list(range(shards))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@settings(deadline=None)
@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 100), st.integers(1, 16))
def test_the_longest_is_sampled_on_all_gpus_and_nothing_shorter_in_longer_parts(
    work: int, longest: int, shards: int, gpus: int
) -> None:
    work = min(work, longest)
    parts = sampling_parts(work, longest, shards, gpus)
    assert sampling_parts(longest, longest, shards, gpus) == min(gpus, shards)
    assert 1 <= parts <= min(gpus, shards)
    assert parts == shards or work / parts <= longest / gpus * (1 + 1e-9)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"suite": "digits", "seed": 3}, "--config seed=3: unknown"),
        ({"sample": 3}, "--config sample=3: unknown; did you mean 'samples'?"),
        ({"samples": "many"}, "--config samples=many: give a number, 1 or more"),
        ({"samples": 0}, "--config samples=0: give a number, 1 or more"),
        ({"samples": True}, "--config samples=True: give a number"),
        ({"gpus": -1}, "--config gpus=-1: give a number"),
    ],
)
def test_what_snakemakes_config_cannot_mean_is_refused(config: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        asked_of(config)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_what_snakemakes_config_may_say() -> None:
    asked = asked_of({key: "x" for key in CONFIG_KEYS} | {"samples": 2000, "gpus": 8, "rows": "a,b"})
    assert (asked.samples, asked.rows, asked.scored) == (2000, ("a", "b"), False)
    assert asked_of({"rows": "a"}).rows == ("a",) and asked_of({}).rows == ()


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/x", "-1/2", ""])
def test_a_part_that_cannot_be_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "digits", "--rows", "x", f"--part={text}"])
    assert f"{text!r}: write I/N, e.g. 2/8" in capsys.readouterr().err


@pytest.mark.parametrize("rules", sorted((ROOT / "tcbench" / "rules").glob("*.smk")), ids=lambda path: path.stem)
def test_commands_know_only_a_modules_constants(rules: Path) -> None:
    """A command is put together when its job starts: of a loop's variables it would have the last values."""
    commands = re.findall(r"shell:\n((?:[ ]+\S.*\n)+)", rules.read_text(encoding="utf-8") + "\n")
    filled = re.findall(r"(?<!{){([^{}]+)}(?!})", "".join(line for line in commands if 'f"' in line))
    assert [name for name in filled if not name.isupper()] == []
