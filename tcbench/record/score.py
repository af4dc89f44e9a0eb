"""A row's score, results/<suite>/scores/<row>.json: what `tcbench score` writes and reports read. Imports no torch."""

from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic needs these before Python 3.12
)

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic import StringConstraints as Text
from typing_extensions import TypedDict

Word = r"all|none|(?:forecast|mix) \d+|rows \d+/\d+"
PlanLine = Annotated[str, Text(pattern=rf"^(({Word}|\d+)( |$))+$")]
"""What every step did in a unit (`PlanRecord.to_lines`)."""


def score_files(folder: Path) -> list[Path]:
    """The rows' scores in results/<suite> or of an ablation, by name; what else lies beside them is no row's."""
    return [path for path in sorted((folder / "scores").glob("*.json")) if path.stem not in ("floor", "seed-noise")]


class Quality(TypedDict):
    """A metric of a row, of which reports make intervals and paired differences (`tcbench.metrics.inference`).

    Keys:
        value, se: the number and its standard error, in the metric's unit.
        deleted: the number without each group of samples, of which the jackknife is made.
        trainings: the number of each training, if `value` is their mean.
    """

    value: float
    se: float
    deleted: NotRequired[list[float]]
    trainings: NotRequired[list[float]]


class Commit(TypedDict):
    """The state of the checkout that ran."""

    commit: str
    dirty: bool | str


class Provenance(TypedDict):
    """What publishing and the report read of the record that `tcbench.record.provenance.collect` makes."""

    config_digest: str
    git: Commit
    packages: NotRequired[dict[str, str]]
    finished_utc: NotRequired[str]
    weights: NotRequired[dict[str, str]]
    wall_s: NotRequired[NonNegativeFloat]


class ScoreProvenance(Provenance):
    """Where a score came from, and the samples that it is of."""

    samples: Provenance


class MacCounts(TypedDict):
    """MACs of one sample: all of them, without overheads, by the paper's rule, and by what they were charged to."""

    per_sample: PositiveInt
    per_sample_without_overheads: NonNegativeInt
    paper_rule: NonNegativeInt
    by_tag: dict[str, NonNegativeInt]


class Identity(TypedDict):
    """Which row a score is of.

    Keys:
        row, suite, method, label, nfe, model, control: as the config has them.
        sampled_steps: steps that were sampled, `nfe` unless the method changes it.
        resolution: pixels along a side, of what is no square along its width.
        height: pixels, of what is no square.
        reference: the uncached row that it is compared with, itself for such a row.
    """

    row: str
    suite: str
    method: str
    label: str
    nfe: PositiveInt
    sampled_steps: PositiveInt
    resolution: PositiveInt
    height: NotRequired[PositiveInt]
    model: str
    reference: str
    control: bool


class Score(Identity):
    """A row: what was run, its quality, its MACs and the paper's numbers for the same cell.

    Keys:
        quality: what metrics say of it, by metric.
        settings: all options of the method.
        refiners, target, paper: as the config has them.
        i_steps: steps at which everything was computed.
        plans: digest of the executed plan, if that chose no tokens.
        plan: the executed plan of the first batch (`PlanRecord.to_lines`).
        tokens: tokens of a sample, of which the plan counts some.
        samples, groups, group_sizes: how many there are, and the groups that the jackknife leaves out.
        samples_digest: identifies the samples (`tcbench.record.shards.samples_digest`).
        extractor: what the features are of.
        metrics_not_run: metric -> what it needs.
        macs, macs_spread: mean over the batches, smallest and largest per sample.
        cache_bytes: the most that a batch's cache held.
        trajectory: deviations from the reference per step (Fig. 10), if the steps have counterparts.
        trainings: how many trainings its numbers are means over, if several.
        marks: what is suspicious about its samples and about what it samples with, in words.
        key: identifies samples, settings and code that it was made of, where all of them are the suite's own.
        not_run: why the row was not run; it then has no numbers.
    """

    settings: dict[str, Any]
    quality: dict[str, Quality]
    i_steps: list[NonNegativeInt]
    plans: str | None
    samples: PositiveInt
    groups: PositiveInt
    group_sizes: list[PositiveInt]
    refiners: bool | Literal["p-steps"]
    target: str | None
    extractor: str | None
    metrics_not_run: dict[str, str]
    macs: MacCounts
    macs_spread: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    cache_bytes: NonNegativeInt
    guidance_scale: float
    tokens: PositiveInt
    plan: dict[str, PlanLine]
    trajectory: dict[str, list[float]] | None
    paper: dict[str, float] | None
    provenance: ScoreProvenance
    samples_digest: NotRequired[str]
    trainings: NotRequired[int]
    marks: NotRequired[list[str]]
    key: NotRequired[str]
    not_run: NotRequired[str]
