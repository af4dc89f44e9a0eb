"""Every kind of JSON file among results: what it holds, and which command makes it. Imports no torch.

A record is read by its kind, `LATENCY.read(path)`, which compares the file with its digest and its fields with their
types, so that whoever uses a number may rely on its being there. Fields that a type does not name are allowed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    NotRequired,  # pydantic needs these before Python 3.12
    TypeVar,
    cast,
)

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic import StringConstraints as Text
from typing_extensions import TypedDict

from tcbench.errors import UserError
from tcbench.record.executed import Execution
from tcbench.record.files import read_record, write_record
from tcbench.record.score import Identity, MacCounts, Provenance, Score, Word

Content = TypeVar("Content", bound=Mapping[str, Any])

Digest = Annotated[str, Text(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Text(pattern=r"^shard-\d{5}\.safetensors$")]
"""A file beside the record that names it."""
PlanWord = Annotated[str, Text(pattern=rf"^({Word})$")]
"""What a step did in a unit (`Executed.to_json`), unless that is a number of tokens."""


class OfSuite(TypedDict):
    """A record of a suite, of which version 0.1 did not say of which."""

    suite: NotRequired[str]


class NotRun(OfSuite):
    """In the place of what could not be run."""

    not_run: str


class UnrunRow(Identity):
    """The score of a row that could not be run."""

    not_run: str


class Manifest(OfSuite):
    """row.json: what later stages need to know of a row's samples without opening its shards.

    Keys:
        shards: the digest that each carries, in the samples' order.
        shards_in: their folder, relative to the record's, where that is another one (a preview's).
        captions: the prompt of every sample, where there are prompts.
        resolution, height: as `tcbench.record.score.Identity`.
    """

    row: str
    settings: dict[str, Any]
    options: dict[str, Any]
    sampled_steps: PositiveInt
    timesteps: list[float]
    resolution: PositiveInt
    height: NotRequired[PositiveInt]
    samples: PositiveInt
    batch_size: PositiveInt
    i_steps: list[NonNegativeInt]
    macs: MacCounts
    macs_per_batch: Annotated[list[PositiveInt], Field(min_length=1)]
    plan_of_first_batch: list[dict[str, PlanWord | NonNegativeInt]]
    tokens: PositiveInt
    cache_bytes: NonNegativeInt
    shards: Annotated[dict[ShardName, Digest], Field(min_length=1)]
    shards_in: NotRequired[str]
    captions: NotRequired[list[str]]
    provenance: Provenance


class Spread(TypedDict):
    """A metric over random subsets of `n` real images."""

    n: PositiveInt
    mean: float
    std: NonNegativeFloat


class Floor(OfSuite):
    """floor.json: metrics of real images against real images."""

    fid: Spread
    sfid: Spread


class Protocol(TypedDict):
    """How latency was measured, as far as tables name it apart from the rest."""

    batch_size: PositiveInt


class Timing(TypedDict):
    """Seconds per batch."""

    median_s: PositiveFloat
    min_s: PositiveFloat
    max_s: PositiveFloat
    key: NotRequired[str]


class Session(TypedDict):
    """Timings by row that compare with each other: rows were timed in turn, in one process."""

    protocol: Protocol
    rows: dict[str, Timing]
    provenance: Provenance


class Latency(OfSuite, Session):
    """latency.json: the session in which most rows were timed, and those of rows that were added to it.

    A row is looked for in the order of sessions; each holds the uncached rows of its own rows.
    """

    later: NotRequired[list[Session]]


class Case(TypedDict):
    """The local error of a token selector."""

    selector: str
    error: PositiveFloat
    standard_error: NonNegativeFloat


class Updates(TypedDict):
    """What Fig. 3 shows; `size` by block, [S, N]."""

    similarity: list[list[float]]
    size: Annotated[dict[str, list[list[float]]], Field(min_length=1)]


class Alpha(TypedDict):
    """What Fig. 8 shows."""

    per_batch: list[list[float]]
    histogram_per_block: list[list[int]]


class Diagnostics(OfSuite):
    """diagnostics/<row>.json; the first case recomputes no token."""

    row: str
    pairs: PositiveInt
    cases: Annotated[list[Case], Field(min_length=1)]
    rank_correlation_per_block: list[float]
    share_of_change_in_top_tenth: float
    median_rms_change: float
    mean_alpha: float
    updates: NotRequired[Updates]
    alpha: NotRequired[Alpha]
    provenance: Provenance


class TrainingRecord(TypedDict):
    """A stage of training."""

    kind: str
    wall_s: NonNegativeFloat
    iterations: NotRequired[NonNegativeInt]
    batch_size: NotRequired[PositiveInt]
    samples: NotRequired[PositiveInt]
    blocks: NotRequired[NonNegativeInt]
    rank: NotRequired[NonNegativeInt]
    cost_weight_used: NotRequired[float]
    marks: NotRequired[list[str]]


class ScorerStatistics(TypedDict):
    """What a trained scorer says of calibration samples."""

    alpha_bar: list[float]
    per_block: list[list[float]]
    histogram: dict[str, list[float]]
    std_over_tokens: float
    std_over_samples: float
    std_over_blocks: float
    std_over_steps: float


class Trained(OfSuite):
    """artefacts.json: what training made, and how.

    Keys:
        nfe: steps of the uncached reference.
        files: the digest that every file beside it carries, by stem.
        tables: which of them are tables.
        settings: everything in the config that it depends on.
        read: SHA-256 of the user's files that training read.
    """

    stages: list[TrainingRecord]
    files: dict[Annotated[str, Text(pattern=r"^\w+$")], Digest]
    tables: list[str]
    scores: NotRequired[ScorerStatistics]
    nfe: NotRequired[PositiveInt]
    row: NotRequired[str]
    settings: NotRequired[dict[str, Any]]
    read: NotRequired[dict[str, Digest]]


class SearchTrial(TypedDict):
    """Settings that a search tried.

    Keys:
        options: what they change in the row's options.
        deviation: mean absolute difference of the calibration samples from the uncached ones.
    """

    options: dict[str, Any]
    deviation: float


class Searched(OfSuite):
    """searched/<row>.json: what a search found for a row, and on the way.

    Keys:
        options: what it found; the row samples with them.
        trials: everything that was tried, in order.
        ended: why it stopped.
        settings: everything in the config that it depends on.
        artefacts: identifies what the row was trained with.
    """

    row: str
    options: dict[str, Any]
    trials: Annotated[list[SearchTrial], Field(min_length=1)]
    ended: str
    settings: dict[str, Any]
    artefacts: str | None


class LatentsSettings(TypedDict):
    """What encoded latents depend on, as far as their readers compare it."""

    images: str


class LatentsIndex(TypedDict):
    """latents.json: the shards of encoded images or videos, and why some were left out, by number."""

    folder: str
    shards: Annotated[dict[ShardName, Digest], Field(min_length=1)]
    left_out: dict[str, str]
    settings: LatentsSettings


class LeftOut(TypedDict):
    """What a shard of encoded videos left out, and why, by number; `key` identifies the shard."""

    left_out: dict[str, str]
    key: NotRequired[str]


class VBenchRow(TypedDict):
    """vbench/<row>.json: scores by dimension and sample, or why a dimension was not run."""

    dimensions: dict[str, dict[str, Any]]
    shards: dict[ShardName, Digest]


class Run(TypedDict):
    """A part of a speed suite, or its peers at a setting: timings by row."""

    model: str
    dtype: str
    batch_size: PositiveInt
    nfe: PositiveInt
    machine: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    executed: NotRequired[Execution]
    fingerprint: NotRequired[str]
    provenance: Provenance


class Profile(TypedDict):
    """Where the time of a row's steps goes."""

    model: str
    dtype: str
    batch_size: PositiveInt
    nfe: PositiveInt
    row: str
    steps: dict[str, dict[str, Any]]
    provenance: Provenance


class Rendered(OfSuite):
    """tables/<name>.json: the digests of a table's faces, which carry none themselves, by file name."""

    title: str
    files: dict[str, Digest]


class Published(TypedDict):
    """provenance.json: what published results are of.

    Keys:
        suite: its config; of a run that was cut short, with the rows that were run.
        files: digests by path.
        lacks: the rows that were not run.
    """

    suite: dict[str, Any]
    files: dict[str, Digest]
    lacks: NotRequired[list[str]]


@dataclass(frozen=True)
class Kind(Generic[Content]):
    """A kind of record.

    Attributes:
        content: its fields.
        command: what makes it.
        not_run: the fields of one that says why it was `not_run`, if that occurs.
    """

    content: type[Content]
    command: str
    not_run: type | None = None

    def write(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write a record, which may hold more than `content` names; raises UserError if that is impossible."""
        write_record(path, value)

    def read(self, path: Path, row: str | None = None, suite: str | None = None) -> Content:
        """Read a record.

        Args:
            row, suite: of which it should be, if it is of one and that is known.

        Raises:
            UserError: it is missing, damaged, edited or another row's or suite's, or a field is missing or misshapen;
                says what makes it again.
        """
        command = self.command.replace("ROW", row or "ROW").replace("SUITE", suite or "SUITE")
        value = read_record(path, f"run `{command}`")
        content = self.not_run if self.not_run and value.get("not_run") else self.content
        try:
            _checker(content).validate_python(value, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in problem["loc"] if part != "[key]")
            what = " is missing" if problem["type"] == "missing" else f": {problem['msg']}"
            raise UserError(f"{path}: field `{field}`{what}; run `{command}`") from error
        for what, expected in {"row": row, "suite": suite}.items():
            if expected is not None and (said := value.get(what, expected)) != expected:
                raise UserError(f"{path}: is of {what} {str(said)[:80]}, not {expected}; run `{command}`")
        return cast(Content, value)


@lru_cache
def _checker(content: type) -> TypeAdapter[Any]:
    return TypeAdapter(content)


SCORE = Kind(Score, "tcbench score SUITE --rows ROW", not_run=UnrunRow)
MANIFEST = Kind(Manifest, "tcbench sample SUITE --rows ROW")
FLOOR = Kind(Floor, "tcbench floor SUITE", not_run=NotRun)
LATENCY = Kind(Latency, "tcbench latency SUITE")
DIAGNOSTICS = Kind(Diagnostics, "tcbench diagnose SUITE --row ROW")
TRAINED = Kind(Trained, "tcbench train SUITE --row ROW")
SEARCHED = Kind(Searched, "tcbench search SUITE --row ROW")
LATENTS = Kind(LatentsIndex, "tcbench encode SUITE")
LEFT_OUT = Kind(LeftOut, "tcbench encode SUITE")
VBENCH = Kind(VBenchRow, "tcbench vbench SUITE --rows ROW")
RUN = Kind(Run, "tcbench bench")
PROFILE = Kind(Profile, "tcbench bench --profile ROW")
RENDERED = Kind(Rendered, "tcbench tables SUITE")
PUBLISHED = Kind(Published, "tcbench publish SUITE")
