"""A row's score, results/<suite>/scores/<row>.json: what `tcbench score` writes and reports read. Imports no torch."""

from typing import Any, Literal, NotRequired, TypedDict


class Quality(TypedDict):
    """A metric of a row with its 95 % interval, as the jackknife gives it.

    Reports make their own of value and replicates, inside the metric's range (`tcbench.metrics.inference`).

    Keys:
        value, low, high, se: the number, the ends of its interval and its standard error, in the metric's unit.
        deleted: the number without each group of samples, of which the jackknife is made.
    """

    value: float
    low: float
    high: float
    se: float
    deleted: NotRequired[list[float]]


class Paired(TypedDict):
    """A metric of a row less its uncached reference's, the same noise on both sides, with its 95 % interval.

    As measured, with the metric's bias; tests use `tcbench.metrics.inference.paired_difference`.

    Keys:
        distinguishable: whether the interval excludes 0.
    """

    difference: float
    low: float
    high: float
    se: float
    distinguishable: bool


class Measured(TypedDict):
    """What metrics say of a row, by metric."""

    quality: dict[str, Quality]
    paired: dict[str, Paired]


class MacCounts(TypedDict):
    """MACs of one sample: all of them, without overheads, by the paper's rule, and by what they were charged to."""

    per_sample: int
    per_sample_without_overheads: int
    paper_rule: int
    by_tag: dict[str, int]


class Score(Measured):
    """A row: what was run, its quality, its paired differences, its MACs and the paper's numbers for the same cell.

    Keys:
        row, suite, method, label, nfe, model, control, refiners, target, paper: as the config has them.
        settings: all options of the method.
        sampled_steps: steps that were sampled, `nfe` unless the method changes it.
        resolution: pixels along a side.
        reference: the uncached row that it is compared with, itself for such a row.
        i_steps: steps at which everything was computed.
        plans: digest of the executed plan, if that chose no tokens.
        plan: the executed plan of the first batch (`PlanRecord.to_lines`).
        tokens: tokens of a sample, of which the plan counts some.
        samples, groups, group_sizes: how many there are, and the groups that the jackknife leaves out.
        extractor: what the features are of.
        metrics_not_run: metric -> what it needs.
        macs, macs_spread: mean over the batches, smallest and largest per sample.
        cache_bytes: the most that a batch's cache held.
        trajectory: deviations from the reference per step (Fig. 10), if the steps have counterparts.
        not_run: why the row was not run; it then has no numbers.
    """

    row: str
    suite: str
    method: str
    label: str
    nfe: int
    sampled_steps: int
    resolution: int
    model: str
    settings: dict[str, Any]
    i_steps: list[int]
    plans: str | None
    reference: str
    samples: int
    groups: int
    group_sizes: list[int]
    control: bool
    refiners: bool | Literal["p-steps"]
    target: str | None
    extractor: str | None
    metrics_not_run: dict[str, str]
    macs: MacCounts
    macs_spread: list[int]
    cache_bytes: int
    guidance_scale: float
    tokens: int
    plan: dict[str, str]
    trajectory: dict[str, Any] | None
    paper: dict[str, float] | None
    provenance: dict[str, Any]
    not_run: NotRequired[str]
