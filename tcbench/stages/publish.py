"""Promote what a clean run measured to results/reference/<suite>/, which is committed.

Kept is what cannot be made again without running: scores, diagnostics, training logs, timings, and the first samples of
every row; and of what `tcbench tables`, `figures` and `report` make from these in seconds the little that is read in
the repository's browser.
"""

import shutil
from pathlib import Path
from typing import Any

from tcbench.config.speed import SpeedSuite
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.record.files import read_json, write_json

SPEED_RECORDS = ("runs/*.json", "peers/*.json", "profile/*.json")
MEASURED = (
    "scores/*.json",
    "ablations/*/scores/*.json",
    "diagnostics/*.json",
    "trained/*/artefacts.json",
    "grids/strips/*.png",
    "latency.json",
    *SPEED_RECORDS,
)
SHOWN = ("tables/*.md", "tables/verdicts.csv")  # the CSV is what `tcbench claims` reads
PICTURES = {"digits": "grids/nfe20.png", "speed": "figures/speed.png"}
"""By suite, what README.md and docs/speed.md show."""
LIMIT_BYTES = 1_000_000


Records = dict[str, tuple[dict[str, Any], str]]
"""Provenance, and the digest of the config it should be of, by what it is the provenance of."""


def _records(suite: Suite) -> Records:
    """Of everything that is published."""
    records = {}
    for part in (suite, *suite.ablation_suites.values()):
        for entry in part.entries:
            record = read_json(entry.scores)["provenance"]
            records[entry.name] = record, part.digest()
            records[f"{entry.name}, samples"] = record["samples"], part.digest()
    for path in (suite.folder / "latency.json", *(suite.folder / "diagnostics").glob("*.json")):
        records[str(path)] = read_json(path)["provenance"], suite.digest()
    return records


def _speed_records(suite: SpeedSuite) -> Records:
    """The same for a speed suite."""
    paths = [path for kind in SPEED_RECORDS for path in sorted(suite.folder.glob(kind))]
    if not paths:
        raise UserError(f"{suite.folder}: nothing was timed; run `tcbench bench` first")
    return {str(path): (read_json(path)["provenance"], suite.digest()) for path in paths}


def kept(suite: Suite | SpeedSuite, folder: Path) -> list[Path]:
    """The files below a folder of results that are published."""
    pictures = [PICTURES[suite.suite]] if suite.suite in PICTURES else []
    return [path for pattern in (*MEASURED, *SHOWN, *pictures) for path in sorted(folder.glob(pattern))]


def publish(suite: Suite | SpeedSuite, allow_dirty: bool = False) -> list[Path]:
    """Copy what is kept; refuse results that cannot be traced to one config and commit.

    Raises:
        UserError: results of another config, of an uncommitted work tree, or of several commits, unless they are
            timings, whose parts are compared within themselves and name their commits; or a large file.
    """
    records = _speed_records(suite) if isinstance(suite, SpeedSuite) else _records(suite)
    for what, (record, digest) in records.items():
        if record["config_digest"] != digest:
            raise UserError(f"{what}: was run with another config; run it again before publishing")
        if record["git"]["dirty"] is not False and not allow_dirty:
            raise UserError(f"{what}: was run from uncommitted code; commit, run again, then publish")
    commits = {record["git"]["commit"] for record, _ in records.values()}
    if len(commits) > 1 and not allow_dirty and isinstance(suite, Suite):
        raise UserError(
            f"results come from several commits ({', '.join(sorted(commits))}); run from a clean results folder"
        )
    target = Path("results") / "reference" / suite.suite
    files = kept(suite, suite.folder)
    for path in files:
        if path.stat().st_size > LIMIT_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes; only files up to {LIMIT_BYTES} bytes are published")
    shutil.rmtree(target, ignore_errors=True)
    for path in files:
        destination = target / path.relative_to(suite.folder)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)
    first, _ = next(iter(records.values()))
    provenance = {"suite": suite.model_dump(mode="json", by_alias=True), **first}
    if isinstance(suite, SpeedSuite):
        provenance["git"] = {what: record["git"] for what, (record, _) in records.items()}
    write_json(target / "provenance.json", provenance)
    return files
