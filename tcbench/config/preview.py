"""A part of a suite, to look at early: its first samples, some of its rows, or the rows that are scored so far.

Samples are by index and training by row, so those of a part are the suite's own: they lie where the suite looks for
them, and more samples or rows later repeat none. What is said of fewer samples lies in a folder of its own, and so do
tables and reports of fewer rows, which name the part, so that nobody takes it for the whole. Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tcbench.config.suite import Preview, Suite
from tcbench.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Asked:
    """What part of a suite is asked for; by itself the whole.

    Attributes:
        samples: the first so many of each row.
        rows: these, and those that they are compared with or sample with the training of.
        scored: of these, the rows that are scored so far.
    """

    samples: int | None = None
    rows: tuple[str, ...] = ()
    scored: bool = False


WHOLE = Asked()


def narrowed(suite: Suite, asked: Asked) -> Suite:
    """The part of a suite that is asked for; itself if that is the whole.

    Raises:
        UserError: it has no such row, or so many samples are no whole shards of it; or nothing is scored so far.
    """
    part = _of_samples(suite, asked.samples or suite.samples.count)
    if asked.scored:
        return _of_rows(
            suite, part, scored_rows(part, asked.rows or tuple(suite.rows)), "PARTIAL, what is scored so far"
        )
    rows = with_needed(suite, asked.rows or tuple(suite.rows))
    return part if len(rows) == len(suite.rows) else _of_rows(suite, part, rows, "PARTIAL")


def _of_samples(suite: Suite, count: int) -> Suite:
    """The suite with fewer samples a row."""
    whole, batch, size = suite.samples.count, suite.samples.batch_size, suite.samples.group_size
    if count == whole:
        return suite
    least = size * math.ceil(2 * batch / size)  # an interval needs two batches
    if count % size or not least <= count < whole:  # all of a shard that was cut short would be sampled again
        raise UserError(
            f"samples={count}: suite {suite.suite} has {whole} a row, in shards of {size}; "
            f"give a multiple of {size}, {least} or more, or leave it out"
        )
    ablations = {
        name: ablation.model_copy(update={"samples": min(ablation.samples or whole, count)})
        for name, ablation in suite.ablations.items()
    }
    samples = suite.samples.model_copy(update={"count": count, "traced": min(suite.samples.traced, count)})
    part = suite.model_copy(update={"samples": samples, "ablations": ablations})
    rows, groups = len(suite.rows), math.ceil(whole / size)
    part._preview = Preview(
        says=f"PREVIEW: {count} of {whole} samples, {rows} of {rows} rows",
        folder=suite.root / "previews" / f"{count}-samples",
        group_size=batch * math.ceil(count / batch / groups),
        partial=False,
    )
    return part


def _of_rows(suite: Suite, part: Suite, rows: Sequence[str], kind: str) -> Suite:
    """A suite, or a preview of fewer samples of it, with some rows alone."""
    fewer = of_rows(part, rows)
    trainings = f", the first of {suite.trainings} trainings" if suite.trainings > 1 else ""
    counts = f"{part.samples.count} of {suite.samples.count} samples, {len(rows)} of {len(suite.rows)} rows{trainings}"
    fewer._preview = Preview(f"{kind}: {counts}", part.folder, part.jackknife_size, partial=True)
    return fewer


def of_rows(suite: Suite, rows: Sequence[str]) -> Suite:
    """A suite with some of its rows alone, trained once, without ablations."""
    tables = {
        name: table.model_copy(update={"rows": listed})
        for name, table in suite.show.tables.items()
        if (listed := tuple(row for row in table.rows if row in rows)) or not table.rows
    }
    nfes, nfe = [suite.rows[name].nfe for name in rows], suite.show.figure.nfe
    figure = suite.show.figure.model_copy(update={"nfe": nfe if nfe in nfes else nfes[0]})
    kept = {name: suite.rows[name] for name in rows}
    fewer = suite.model_copy(
        update={
            "show": suite.show.model_copy(update={"tables": tables, "figure": figure}),
            # a target is only shown
            "rows": {
                name: row if row.target in kept else row.model_copy(update={"target": None})
                for name, row in kept.items()
            },
            "ablations": {},
            "trainings": 1,
            "trainings_of": (),
        }
    )
    if suite.rivals and not any(row.method == "uncached" and row.nfe == suite.rivals.nfe for row in kept.values()):
        fewer = fewer.model_copy(update={"rivals": None})  # there is nothing to hold them against
    return fewer


def scored_rows(part: Suite, asked: Sequence[str]) -> tuple[str, ...]:
    """The rows that are scored, with all that they need.

    Raises:
        UserError: none is.
    """
    rows = tuple(row for row in asked if all(part[name].scores.exists() for name in with_needed(part, [row])))
    if not rows:
        raise UserError(f"{part.folder}: no row is scored yet beside its reference row; look again later")
    return with_needed(part, rows)


def with_needed(suite: Suite, asked: Sequence[str]) -> tuple[str, ...]:
    """Rows and those that they need, in the suite's order.

    Raises:
        UserError: the suite has no such row.
    """
    needed: set[str] = set()
    left = list(asked)
    while left:
        name = left.pop()
        if name not in suite.rows:
            raise UserError(f"rows: suite {suite.suite} has no row {name!r}; {did_you_mean(name, suite.rows)}")
        if name not in needed:
            needed.add(name)
            entry = suite[name]
            searched_for = entry.target if isinstance(entry.row.searched, dict) else None
            others = (entry.reference, entry.trained_as, entry.steps_of, searched_for)
            left += [other.name for other in others if other]
    return tuple(name for name in suite.rows if name in needed)
