"""The speed suite's config: models of full size with random weights, timed at stated dtypes and batch sizes.

Imports no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tcbench.config.document import Problem
from tcbench.config.fields import (
    MOST,
    Count,
    MethodName,
    Nfe,
    PaperCell,
    PaperModel,
    RowName,
    Scale,
    Seed,
    Strict,
    SuiteName,
)
from tcbench.config.load import is_timed, read_config, validated
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.models.specs import MODELS
from tcbench.precision import Dtype
from tcbench.record.files import digest
from tcbench.registry import make_method

PeerName = Literal[
    "tcbench",
    "tcbench-plain",
    "tcbench-tome",
    "matrix-products",
    "diffusers-eager",
    "diffusers-compiled",
    "diffusers-graphs",
    "diffusers-pab",
    "diffusers-fastercache",
    "diffusers-taylorseer",
    "diffusers-firstblock",
    "diffusers-magcache",
    "diffusers-tomesd",
    "cache-dit",
]


class SpeedRow(Strict):
    """One line of a table.

    Attributes:
        method, nfe, options: as in `tcbench.config.fields.Row`.
        open_branches: for a method with a trained router or gates, the share of branches that its stand-in recomputes
            where they decide.
        label: what tables call it, if not what the method is called.
        paper: the paper's numbers; its latency is of a batch of 8 on its own GPU.
    """

    method: MethodName
    nfe: Nfe
    options: dict[str, Any] = Field(default={})
    open_branches: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    label: str | None = None
    paper: PaperCell | None = None


class Setting(Strict):
    """One dtype and batch size that all rows of a model are timed at.

    Attributes:
        dtype: bf16 or fp16 weights; or float32 weights with matrix products in TF32, or in full float32.
        batch_size: samples; the transformer sees twice as many rows under guidance.
        nfes: only the rows with these NFEs; None: all.
        peers: whether the suite's peers are timed at this setting too.
    """

    dtype: Dtype
    batch_size: Count
    nfes: tuple[Nfe, ...] | None = None
    peers: bool = False


class SpeedModel(Strict):
    """A model's rows and the settings they are timed at.

    Attributes:
        stands_for: the paper's model and resolution.
        network: which of the known models it is, if that is not what it is called here: rows of one network may be too
            many for the memory of one GPU, or be compared apart.
        solver, guidance_scale: as in `tcbench.samplers.SamplerSettings`; every run has both guided halves.
        needs: what is missing to run it, if it cannot be run yet; its rows are then printed as not run.
    """

    stands_for: PaperModel
    network: str | None = None
    needs: str | None = None
    solver: Literal["ddim", "dpm", "euler_ancestral", "flow", "flow_unipc"] = "ddim"
    guidance_scale: Scale = 1.5
    settings: tuple[Setting, ...]
    rows: dict[RowName, SpeedRow]

    def method(self, row: str) -> Method:
        """The method of a row, with its options."""
        return make_method(self.rows[row].method, self.rows[row].options)

    def reference(self, nfe: int) -> str:
        """The uncached row at an NFE."""
        return next(name for name, row in self.rows.items() if row.method == "uncached" and row.nfe == nfe)

    def nfes(self, setting: Setting) -> tuple[int, ...]:
        """The NFEs timed at a setting, in the order of the rows."""
        every = dict.fromkeys(row.nfe for row in self.rows.values())
        return tuple(nfe for nfe in every if setting.nfes is None or nfe in setting.nfes)


class Protocol(Strict):
    """How a row is timed: whole runs, rows interleaved, the first `warmup` rounds dropped.

    Attributes:
        step_rounds: further rounds in which every step is timed by itself.
    """

    warmup: Annotated[int, Field(strict=True, ge=0, le=MOST)] = 1
    repeats: Count = 5
    step_rounds: Count = 1


class Peers(Strict):
    """Other implementations of the uncached model, or with caching of their own, timed beside the rows.

    Attributes:
        nfe: steps of their runs.
        names: of `tcbench.stages.peers.PEERS`.
    """

    nfe: Nfe = 50
    names: tuple[PeerName, ...] = ()


class SpeedSuite(Strict):
    """Everything that a timing depends on besides code and machine.

    Attributes:
        suite: its name, and that of its folder in results/.
        seed: of weights, noise and stand-ins for what would be trained.
    """

    suite: SuiteName
    description: str
    device: Literal["cpu", "cuda"] = "cuda"
    seed: Seed = 0
    protocol: Protocol = Field(default_factory=lambda: Protocol(warmup=1))
    peers: Peers = Field(default_factory=lambda: Peers(nfe=50))
    models: dict[RowName, SpeedModel]

    @property
    def folder(self) -> Path:
        """Where results go, relative to the working directory."""
        return Path("results") / self.suite

    def network(self, name: str) -> str:
        """What a model is called in `MODELS`."""
        return self.models[name].network or name

    def digest(self) -> str:
        """Identifies the whole config."""
        return digest(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Part:
    """The rows that are timed interleaved and compared with one uncached run: one file of results."""

    model: str
    dtype: Dtype
    batch_size: int
    nfe: int
    peers: bool

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.setting}.nfe{self.nfe}"

    @property
    def setting(self) -> str:
        """Model, dtype and batch size."""
        return f"{self.model}.{self.dtype}.b{self.batch_size}"


def parts(
    suite: SpeedSuite,
    models: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    nfes: Sequence[int] = (),
) -> list[Part]:
    """The suite's parts, or those that agree with every selection that is not empty.

    Raises:
        UserError: nothing is left.
    """
    every = [
        Part(name, setting.dtype, setting.batch_size, nfe, setting.peers)
        for name, model in suite.models.items()
        for setting in model.settings
        for nfe in model.nfes(setting)
    ]
    chosen = [
        part
        for part in every
        if (not models or part.model in models)
        and (not dtypes or part.dtype in dtypes)
        and (not batch_sizes or part.batch_size in batch_sizes)
        and (not nfes or part.nfe in nfes)
    ]
    if not chosen:
        raise UserError(f"nothing to time is selected; {suite.suite} has: {', '.join(part.name for part in every)}")
    return chosen


def is_speed_config(path: Path) -> bool:
    """Whether a config file is of this kind."""
    return is_timed(read_config(path))


def load_speed_suite(path: Path | str) -> SpeedSuite:
    """Read and check a speed suite's config.

    Raises:
        UserError: one line that names the file, the field and the fix.
    """
    path = Path(path)
    document = read_config(path)
    if not is_timed(document):
        raise UserError(f"{path}: not a speed suite, which has `models`; `tcbench run {path}` samples and scores it")
    suite = validated(document, SpeedSuite)
    if problems := [problem for name in suite.models for problem in _problems(suite, name)]:
        raise document.error(problems)
    return suite


def _problems(suite: SpeedSuite, name: str) -> Iterator[Problem]:
    """What the schema cannot say of a model's rows."""
    model, place = suite.models[name], ("models", name)
    if not model.needs and suite.network(name) not in MODELS:
        where = (*place, "network") if model.network else place
        yield Problem(where, f"no such model; known: {', '.join(MODELS)}; or say in `needs` what is missing")
    nfes = {row.nfe for row in model.rows.values()}
    for nfe in sorted(nfes):
        if not any(row.method == "uncached" and row.nfe == nfe for row in model.rows.values()):
            yield Problem((*place, "rows"), f"add a row with method: uncached and nfe: {nfe} to compare with")
    for number, setting in enumerate(model.settings):
        if unknown := set(setting.nfes or ()) - nfes:
            says = f"no row has nfe {min(unknown)}; give some of {sorted(nfes)}"
            yield Problem((*place, "settings", str(number), "nfes"), says)
    for row in model.rows:
        try:
            model.method(row)
        except UserError as error:
            yield Problem((*place, "rows", row), str(error))
