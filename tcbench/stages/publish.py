"""Promote what a clean run measured to results/reference/<suite>/, which is committed.

Kept is what cannot be made again without running: scores, diagnostics, training logs, timings, and the first samples of
every row; and of what `tcbench tables`, `figures` and `report` make from these in seconds the little that is read in
the repository's browser.
"""

import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

from tcbench.config.ran import as_run
from tcbench.config.speed import SpeedSuite
from tcbench.config.suite import RIVALS, Suite
from tcbench.errors import UserError
from tcbench.record.files import PROVENANCE, check_seal, copy_file, read_json, sha256
from tcbench.record.provenance import changed_between, is_ancestor
from tcbench.record.records import DIAGNOSTICS, LATENCY, PROFILE, PUBLISHED, RUN, SCORE, SEARCHED, TRAINED, Kind
from tcbench.record.rivals import RIVAL
from tcbench.record.score import Provenance
from tcbench.record.sources import source_files
from tcbench.report.names import picture_of
from tcbench.report.strips import Shows, read_strip, strip_path
from tcbench.report.table import check_face

SPEED_RECORDS: dict[str, Kind[Any]] = {"runs/*.json": RUN, "peers/*.json": RUN, "profile/*.json": PROFILE}
PRETRAINING = "pretrained/*-log.json"
MEASURED = (
    "scores/*.json",
    "ablations/*/scores/*.json",
    "rivals/*.json",
    "diagnostics/*.json",
    PRETRAINING,
    "trained/*/artefacts.json",
    "searched/*.json",
    "grids/strips/*.png",
    "grids/strips/*.webp",
    "latency.json",
    *SPEED_RECORDS,
)
SHOWN = ("tables/*.md", "tables/verdicts.csv")  # the CSV is what `tcbench claims` reads
RENDERED_FROM = "tables/*.json"  # the digests of these
TIMED = ("speed", "speed-rivals", "speed-flows")
PICTURES = {
    "digits": "grids/nfe20.png",
    "fashion": "grids/nfe20.png",
    "fashion-rivals": "figures/rivals_frontier.png",
    **dict.fromkeys(TIMED, "figures/speed.png"),
}
"""By suite, what documents show."""
LIMIT_BYTES = 1_000_000


Records = dict[str, tuple[Provenance, str, str]]
"""Provenance, the digest of the config it should be of, and the stage, by what it is the provenance of."""


def _records(suite: Suite, ran: Suite) -> Records:
    """Of everything that is published, after a look at whether each is the row's that it lies under.

    Args:
        ran: what is published of the suite.
    """
    records: Records = {}
    parts = [(suite, ran), *((suite.ablation_suites[name], part) for name, part in ran.ablation_suites.items())]
    for part, published in parts:
        for entry in map(part.__getitem__, [entry.name for entry in published.entries]):
            score = SCORE.read(entry.scores, entry.name, suite.suite)
            for shows in get_args(Shows):
                if strip_path(part.folder, entry.name, shows).exists():
                    read_strip(part.folder, score, shows)
            if not score.get("not_run"):
                records[entry.name] = score["provenance"], part.digest(), "score"
                records[f"{entry.name}, samples"] = score["provenance"]["samples"], part.digest(), "sample"
    for path in _rival_records(ran, suite.folder):
        records[str(path)] = RIVAL.read(path, suite=suite.suite)["provenance"], suite.digest(), "rivals"
    latency = suite.folder / "latency.json"
    timed = LATENCY.read(latency, suite=suite.suite) if latency.exists() or ran is suite else None
    for number, session in enumerate([timed, *timed.get("later", [])] if timed else (), 1):
        name = str(latency) + (f", session {number}" if number > 1 else "")
        records[name] = session["provenance"], suite.digest(), "latency"
    for path in (suite.folder / "diagnostics").glob("*.json"):
        records[str(path)] = DIAGNOSTICS.read(path, path.stem, suite.suite)["provenance"], suite.digest(), "diagnose"
    for path in (suite.folder / "trained").glob("*/artefacts.json"):
        TRAINED.read(path, path.parent.name, suite.suite)
    for path in (suite.folder / "searched").glob("*.json"):
        SEARCHED.read(path, path.stem, suite.suite)
    return records


def _rival_records(ran: Suite, folder: Path) -> list[Path]:
    """The records of the rivals of what is published; none if they were not run."""
    contenders = ["uncached", *ran.rivals.contenders] if ran.rivals else []
    return sorted(path for name in contenders if (path := folder / "rivals" / f"{name}.json").exists())


def _speed_records(suite: SpeedSuite) -> Records:
    """The same for a speed suite."""
    records: Records = {
        str(path): (kind.read(path)["provenance"], suite.digest(), "bench")
        for pattern, kind in SPEED_RECORDS.items()
        for path in sorted(suite.folder.glob(pattern))
    }
    if not records:
        raise UserError(f"{suite.folder}: nothing was timed; run `tcbench bench` first")
    return records


def kept(suite: Suite | SpeedSuite, folder: Path) -> list[Path]:
    """The files below a folder of results that are published."""
    pictures = [PICTURES[suite.suite]] if suite.suite in PICTURES else []
    patterns = (*SHOWN, RENDERED_FROM, *pictures)
    return [*measured(folder), *(path for pattern in patterns for path in sorted(folder.glob(pattern)))]


def measured(folder: Path, lacks: Collection[str] = ()) -> list[Path]:
    """Those of them that cannot be made again without running, but for files of rows that lack: what was trained for
    them, say."""
    found = [path for pattern in MEASURED for path in sorted(folder.glob(pattern))]
    return [path for path in found if not {*_may_be_of(path)} & {*lacks}]


def _may_be_of(path: Path) -> tuple[str, ...]:
    """Names of the row that a file of results is of: its own, its folder's, and a rival's without the budget."""
    row, folder = path.stem.removesuffix("-steps"), path.parent.name
    if folder == RIVALS:
        return (f"{RIVALS}-{row}",)
    return row, folder, re.sub(rf"^({RIVALS}-.+)-x[\d.]+$", r"\1", row)


def digests(folder: Path, lacks: Collection[str] = ()) -> dict[str, str]:
    """What provenance.json of a published folder vouches for: all that was measured, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in measured(folder, lacks)}


def publish(
    suite: Suite | SpeedSuite, allow_dirty: bool = False, in_part: bool = False
) -> tuple[list[Path], Sequence[str]]:
    """Copy what is kept; refuse results that cannot be traced to one config and one state of the code.

    Args:
        in_part: what was run of a suite whose run was cut short, or was not timed. Its tables are rendered from what is
            published, with the rows that there are.

    Returns:
        the files, and the names of the rows that were not run.

    Raises:
        UserError: results of another config, of an uncommitted work tree, or of commits between which their stage's
            code changed, unless they are timings, whose parts are compared within themselves and name their commits;
            or a large or damaged file; or a part is asked for where nothing lacks.
    """
    ran: Suite | SpeedSuite = suite
    lacks: Sequence[str] = ()
    if in_part:
        if isinstance(suite, SpeedSuite):
            raise UserError(f"suite {suite.suite}: timings name what was not timed; leave out --part")
        ran, lacks = as_run(suite)
        if not lacks and (suite.folder / "latency.json").exists():
            raise UserError(f"suite {suite.suite}: every row was run and timed; leave out --part")
    if isinstance(suite, SpeedSuite):
        records = _speed_records(suite)
    else:
        assert isinstance(ran, Suite)
        records = _records(suite, ran)
    for what, (record, digest, _) in records.items():
        if record["config_digest"] != digest:
            raise UserError(f"{what}: was run with another config; run it again before publishing")
        if record["git"]["dirty"] is not False and not allow_dirty:
            raise UserError(f"{what}: was run from uncommitted code; commit, run again, then publish")
    _refuse_several_networks(records)
    newest = next(iter(records.values()))[0]
    if isinstance(suite, Suite) and not allow_dirty:
        newest = _newest_of_one_code(suite, records)
    target = Path("results") / "reference" / suite.suite
    staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    files = measured(suite.folder, lacks) if in_part else kept(suite, suite.folder)
    for path in files:
        if path.stat().st_size > LIMIT_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes; only files up to {LIMIT_BYTES} bytes are published")
    for path in files:
        if path.suffix in (".md", ".csv"):
            check_face(path, suite.suite)
        elif path.relative_to(suite.folder).as_posix() == PICTURES.get(suite.suite):
            check_seal(path, picture_of(suite.suite, path.stem))
        elif path.match(PRETRAINING):
            read_json(path)  # it carries no digest; from here on it is listed with one
        else:
            check_seal(path)
    described = ran.model_dump(mode="json", by_alias=True)
    borrowed = {f"pretrained/{log.name}": log for log in _logs_elsewhere(suite)}
    listed = digests(suite.folder, lacks) | {place: sha256(log) for place, log in borrowed.items()}
    provenance: dict[str, Any] = {"suite": described, **newest, "files": listed}
    if lacks:
        provenance["lacks"] = list(lacks)
    if isinstance(suite, SpeedSuite):
        provenance["git"] = {what: record["git"] for what, (record, *_) in records.items()}
    try:  # what was published before stays until all of this is there
        for path in files:
            copy_file(path, staged / path.relative_to(suite.folder))
        for place, log in borrowed.items():
            copy_file(log, staged / place)
        PUBLISHED.write(staged / PROVENANCE, provenance)
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return [*files, *borrowed.values()], lacks


def _logs_elsewhere(suite: Suite | SpeedSuite) -> list[Path]:
    """How networks were trained that the suite shares with another: the logs beside their weights."""
    if isinstance(suite, SpeedSuite):
        return []
    weights = [Path(path) for path in (suite.model.weights, suite.scoring.extractor_weights) if path]
    logs = [path.with_name(f"{path.stem}-log.json") for path in weights]
    return [log for log in logs if log.exists() and not log.match(str(suite.folder / PRETRAINING))]


def _refuse_several_networks(records: Records) -> None:
    """Whether rows were sampled, or scored, with weights that others were not.

    Raises:
        UserError: they were; a base model was trained again between them, say.
    """
    first: dict[str, tuple[str, str]] = {}
    for what, (record, *_) in records.items():
        for kind, weights in record.get("weights", {}).items():
            other, digest = first.setdefault(kind, (what, weights))
            if weights != digest:
                raise UserError(f"{what}: has another {kind}'s weights than {other}; run one of them again")


def _newest_of_one_code(suite: Suite, records: Records) -> Provenance:
    """The record of the last commit, after a look at whether up to it nothing changed that others were made by.

    Raises:
        UserError: something did, or no commit has all others before it.
    """
    commits = {record["git"]["commit"]: record for record, *_ in records.values()}
    if len(commits) == 1:
        return next(iter(commits.values()))
    said = f"results come from several commits ({', '.join(sorted(commits))})"
    try:
        last = next(commit for commit in commits if all(is_ancestor(other, commit) for other in commits))
    except StopIteration:
        raise UserError(f"{said}, none of which has all others before it; run from a clean results folder") from None
    changed = {commit: changed_between(commit, last) for commit in commits}
    methods = {entry.row.method for part in (suite, *suite.ablation_suites.values()) for entry in part.entries}
    methods |= {*suite.rivals.methods} if suite.rivals else set()
    stages = {stage for *_, stage in records.values()}
    code = {stage: _code(suite, stage, sorted(methods)) for stage in stages}
    for what, (record, _, stage) in records.items():
        if touched := sorted(changed[commit := record["git"]["commit"]] & code[stage]):
            raise UserError(
                f"{said}, and {what} is of {commit[:8]}, since when {touched[0].name} changed; run it again, or all of "
                "it from a clean results folder"
            )
    return commits[last]


def _code(suite: Suite, stage: str, methods: Sequence[str]) -> set[Path]:
    """The files that made what a stage left; samples are their training's, too."""
    stages = ("train", "sample") if stage == "sample" else (stage,)
    return {path.resolve() for each in stages for path in source_files(each, *methods, data=suite.data.name)}
