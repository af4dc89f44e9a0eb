"""Everything of a suite that reports are made from: reading it, and checking that nothing lacks.

A score file is plain JSON, one per row of a suite (`tcbench.record.score`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcbench.config.suite import TRAININGS, Suite
from tcbench.record.records import DIAGNOSTICS, FLOOR, LATENCY, SCORE, SEARCHED, TRAINED, Kind, Searched
from tcbench.record.yardstick import SEED_NOISE, Yardstick
from tcbench.report.rows import Row, reference_of, row_named, was_run
from tcbench.report.trainings import over_rows


def read_rows(folder: Path, row_ids: Sequence[str], suite: str | None = None) -> list[Row]:
    """Read `folder/scores/<row>.json` for every row id, in the given (the suite's) order.

    Raises:
        UserError: a file is missing, damaged, malformed or another row's or suite's, or its reference row is not in
            the suite.
    """
    rows = []
    for row_id in row_ids:
        path = Path(folder) / "scores" / f"{row_id}.json"
        rows.append(SCORE.read(path, row_id, suite))
    for row in rows:
        reference_of(row, rows)
    return rows


@dataclass(frozen=True)
class Results:
    """Everything of a suite that reports are made from.

    Attributes:
        rows: the suite's rows, in its order.
        ablations: rows by ablation, references first; an ablation that was not run is absent.
        training: `artefacts.json` of every row that is trained.
        diagnostics: by row; empty if not run.
        latency, floor: their files; None if not run.
        seed_noise: yardsticks by uncached row; empty if not measured.
        searched: what was searched by row, of ablations too.
    """

    suite: Suite
    rows: list[Row]
    ablations: dict[str, list[Row]]
    training: dict[str, Any]
    diagnostics: dict[str, Any]
    latency: dict[str, Any] | None
    floor: dict[str, Any] | None
    seed_noise: dict[str, Yardstick] = field(default_factory=dict)
    searched: dict[str, Searched] = field(default_factory=dict)

    @property
    def predictors(self) -> dict[str, Any]:
        """The part of `training` that made a predictor, whose `scores` the log describes."""
        return {row: log for row, log in self.training.items() if "scores" in log}

    @property
    def own_rows(self) -> list[Row]:
        """The rows that are not added to the suite (`Suite.added_rows`), of which margins and claims are."""
        return [row for row in self.rows if row["row"] not in self.suite.added_rows]

    def row(self, name: str) -> Row:
        """A row of the suite.

        Raises:
            KeyError: the suite has no such row.
        """
        if row := row_named(name, self.rows):
            return row
        raise KeyError(name)

    def variant(self, ablation: str, key: str) -> Row | None:
        """A row of an ablation by its key in the config; None if that was not run."""
        return row_named(f"{ablation}-{key}", self.ablations.get(ablation, []))


def all_searched_rows(suite: Suite) -> list[str]:
    """Rows that something is searched for, of the suite and of its ablations."""
    entries = [*suite.entries, *(part[name] for part in suite.ablation_suites.values() for name in part.own)]
    return [entry.name for entry in entries if entry.row.searched]


PARTS = ("ablations", "training", "diagnostics", "latency", "floor", "seed_noise", "searched")


def read_results(suite: Suite, folder: Path, parts: Collection[str] = PARTS) -> Results:
    """Read what there is below a suite's folder; the rows' scores are required, the rest is optional.

    Args:
        parts: what to read beside the rows; the others are left empty. While a workflow runs, what a job does not
            depend on may be half made: it must not read that.

    Raises:
        UserError: a score is missing, or a file that is there is damaged or malformed.
    """

    def optional(part: str, name: str, kind: Kind[Any], row: str | None = None) -> Any:
        return kind.read(folder / name, row, suite.suite) if part in parts and (folder / name).exists() else None

    def by_row(part: str, pattern: str, rows: Sequence[str], kind: Kind[Any]) -> dict[str, Any]:
        found = {row: optional(part, pattern.format(row), kind, row) for row in rows}
        return {row: content for row, content in found.items() if content is not None}

    ablations = {}
    for name, ablation in suite.ablation_suites.items():
        below = folder / "ablations" / name
        if "ablations" in parts and below.exists():
            ablations[name] = read_rows(below, ablation.own, suite.suite)
    return Results(
        suite=suite,
        rows=_with_repeats(suite, folder),
        ablations=ablations,
        training=by_row("training", "trained/{}/artefacts.json", suite.trained_rows, TRAINED),
        diagnostics=by_row("diagnostics", "diagnostics/{}.json", suite.predictor_rows, DIAGNOSTICS),
        latency=optional("latency", "latency.json", LATENCY),
        floor=optional("floor", "scores/floor.json", FLOOR),
        seed_noise=(optional("seed_noise", "scores/seed-noise.json", SEED_NOISE) or {"rows": {}})["rows"],
        searched=by_row("searched", "searched/{}.json", all_searched_rows(suite), SEARCHED),
    )


def _with_repeats(suite: Suite, folder: Path) -> list[Row]:
    """The suite's rows; those of several trainings hold the numbers of all of them."""
    rows = {row["row"]: row for row in read_rows(folder, list(suite.rows), suite.suite)}
    # of some rows, the one that another's MACs were matched to may lack
    rows = {name: row if row.get("target") in suite.rows else {**row, "target": None} for name, row in rows.items()}
    if not suite.repeats:
        return list(rows.values())
    own = suite.ablation_suites[TRAININGS].own
    again = {row["row"]: row for row in read_rows(folder / "ablations" / TRAININGS, own, suite.suite)}
    for name, repeats in suite.repeats.items():
        found = [again[repeat] for repeat in repeats]
        if all(was_run(row) for row in (rows[name], *found)):
            rows[name] = over_rows(rows[name], found)
    return list(rows.values())
