"""Promote a clean run's small artefacts to results/reference/<suite>/, which is committed."""

import shutil
from pathlib import Path

from tcbench.config import Suite
from tcbench.errors import UserError
from tcbench.files import read_json, write_json

SMALL = (
    "tables/*",
    "figures/*",
    "grids/*.png",
    "grids/strips/*.png",
    "scores/*.json",
    "ablations/*/scores/*.json",
    "diagnostics/*.json",
    "trained/*/artefacts.json",
    "latency.json",
    "report.html",
)
LIMIT_BYTES = 2_000_000


def publish(suite: Suite, allow_dirty: bool = False) -> list[Path]:
    """Copy tables, figures, scores and the report; refuse results that cannot be traced to one config and commit.

    Raises:
        UserError: scores of another config, of an uncommitted work tree, or of several commits; or a large file.
    """
    records = {}
    for row in suite.rows:
        records[row] = read_json(suite.folder / "scores" / f"{row}.json")["provenance"]
        records[f"{row}, samples"] = records[row]["samples"]
    for path in (suite.folder / "latency.json", *(suite.folder / "diagnostics").glob("*.json")):
        records[str(path)] = read_json(path)["provenance"]
    expected = dict.fromkeys(records, suite.digest())
    for ablation in suite.ablation_suites.values():
        for row in ablation.own:
            records[row] = read_json(ablation.folder / "scores" / f"{row}.json")["provenance"]
            records[f"{row}, samples"] = records[row]["samples"]
            expected |= dict.fromkeys((row, f"{row}, samples"), ablation.digest())
    for what, record in records.items():
        if record["config_digest"] != expected[what]:
            raise UserError(f"{what}: was run with another config; run `snakemake all` again before publishing")
        if record["git"]["dirty"] is not False and not allow_dirty:
            raise UserError(f"{what}: was run from uncommitted code; commit, run again, then publish")
    commits = {record["git"]["commit"] for record in records.values()}
    if len(commits) > 1 and not allow_dirty:
        raise UserError(
            f"results come from several commits ({', '.join(sorted(commits))}); run from a clean results folder"
        )
    target = Path("results") / "reference" / suite.suite
    files = [path for pattern in SMALL for path in sorted(suite.folder.glob(pattern))]
    for path in files:
        if path.stat().st_size > LIMIT_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes; only files up to {LIMIT_BYTES} bytes are published")
    shutil.rmtree(target, ignore_errors=True)
    for path in files:
        destination = target / path.relative_to(suite.folder)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)
    first = next(iter(records.values()))
    write_json(target / "provenance.json", {"suite": suite.model_dump(mode="json", by_alias=True), **first})
    return files
