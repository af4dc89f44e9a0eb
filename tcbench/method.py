"""What a caching method is: a frozen set of options, a plan for every step, and what it wants trained.

A method lives in one file of `methods/`. It imports only the vocabulary (this module, `tcbench.plan`, `choose`,
`schedule`, `extrapolate`, `bipartite`, `selector`, `partial`, `routed`, `trainable`, `errors`, `tensors.unseen`), numpy
and, inside the functions that compute with it, torch. It never touches a model: it sees a `Run` (what is known before
sampling starts) and, at each step, a `Look` (what may be observed).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Number
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, field_validator

from tcbench.errors import UserError
from tcbench.guidance import Guidance
from tcbench.plan import Plan, described
from tcbench.shapes import ModelShape
from tcbench.tensors.unseen import on_values
from tcbench.trainable import Trainable
from tcbench.watch.guard import guard_hooks

if TYPE_CHECKING:
    from torch import Tensor

Table = tuple[tuple[float, ...], ...]

LARGEST = 10**6
"""No number among a method's options is larger, or below its negative: training takes tens of thousands of steps."""
LONGEST = 1000
"""No option has more entries, or characters."""


@dataclass(frozen=True)
class Artefacts:
    """What training made for a method.

    Attributes:
        scorers: trained modules by name; `Look.scores` runs them.
        alpha_bar: mean score per step in sampling order (the paper's alpha-bar_t), for Eq. (13); of a scorer with a
            relative loss, times the step's share of the largest error of reuse.
        tables: trained or imported numbers that are read as they are, by name, rows of equal length. They live on the
            host, so that a plan made from them waits for no device.
    """

    scorers: Mapping[str, Any] = field(default_factory=dict)
    alpha_bar: tuple[float, ...] | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scorers", "tables"):  # nobody who is handed them can put others there
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True)
class Run:
    """One batch of samples about to be generated.

    Attributes:
        shape: the model's shape.
        timesteps: the scheduler's timesteps in sampling order; their number is the NFE.
        guidance: how many rows a sample has, and what they are.
        sample_index: global indices of the samples, int64 [n]; with `seed` they key all randomness.
        seed: the run's seed.
        artefacts: what was trained for the method.
        noise_levels: (signal, sigma) at every step, the scales of the clean latent and of the noise in what the network
            sees; empty if the run is costed from shapes or its sampler walks no chain of levels.
    """

    shape: ModelShape
    timesteps: tuple[float, ...]
    guidance: Guidance
    sample_index: "Tensor"
    seed: int = 0
    artefacts: Artefacts = Artefacts()
    noise_levels: tuple[tuple[float, float], ...] = ()

    @property
    def nfe(self) -> int:
        """Model evaluations per sample, a guided pair counted once."""
        return len(self.timesteps)

    @property
    def rows_per_sample(self) -> int:
        """Rows of the transformer's batch: 2 if a guided pair shares it ([cond; uncond]), else 1."""
        return self.guidance.rows_per_sample


class Look(ABC):
    """What a method may observe at the start of a step; whatever costs MACs is charged when it is asked for.

    Tensors are to be read: a method that writes to one is refused.

    Attributes:
        run, step: the run, and the step that is planned.
    """

    run: Run
    step: int

    @abstractmethod
    def observe(self, name: str, *arguments: Any) -> "Tensor":
        """An entry of `tcbench.observations`, by name: [R, ...]."""

    @abstractmethod
    def read(self, value: "Tensor") -> float:
        """A number on the host, for a decision of a method that says `decides = "host"`; waits for the device.

        Also where a deferred decision is taken. In a batch it is one number and one decision for all samples.

        Raises:
            UserError: the method says something else.
            Undecided: the method is costed from shapes.
        """

    def read_rows(self, mask_R: "Tensor") -> tuple[bool, ...]:
        """Which rows of the batch a mask (bool [R]) names, on the host: `read` for every 32 rows."""
        import torch

        numbers = [
            int(self.read((part * 2 ** torch.arange(len(part), device=part.device)).sum())) for part in mask_R.split(32)
        ]
        return tuple(bool(numbers[row // 32] >> row % 32 & 1) for row in range(len(mask_R)))

    def latent(self) -> "Tensor":
        """The embedded tokens x^0, [R, N, D]."""
        return self.observe("latent")

    def input(self) -> "Tensor":
        """The noisy latents that the transformer is given, [R, C, ...]."""
        return self.observe("input")

    def output(self) -> "Tensor":
        """What the transformer put out at the last step, [R, C, ...]; at the first there is nothing to see."""
        return self.observe("output")

    def noise_level(self) -> "Tensor":
        """(signal, sigma) of this step, the scales of the clean latent and of the noise in `input`, [R, 2]."""
        return self.observe("noise_level")

    def modulated_input(self) -> "Tensor":
        """The first block's first part's input, normalised and modulated, [R, N, D]; its modulation is charged."""
        return self.observe("modulated_input")

    def scores(self, name: str) -> "Tensor":
        """The named scorer's importance of every token in every block, in (0, 1), [R, L, N]; charged to its name."""
        return self.observe("scores", name)

    def uniform(self) -> "Tensor":
        """Uniform numbers [R, L, N] by (seed, sample index, step, block), equal in both halves of a guided pair."""
        return self.observe("uniform")

    def attention_received(self, block: int) -> "Tensor":
        """The attention each token received, sum_i mean_heads softmax(QK^T)_ij, [R, N], when `block` was last observed.

        A plan asks for it with `Decision(ALL, observe="attn")`, which is when it is charged.
        """
        return self.observe("attention_received", block)

    def attention_entropy(self, block: int) -> "Tensor":
        """The entropy of each token's head-mean attention over the text, [R, N], when its cross-attention was last
        computed and observed (`observe="cross"`, of all tokens or some, which is when it is charged)."""
        return self.observe("attention_entropy", block)

    def value_norms(self, block: int) -> "Tensor":
        """The lengths of each token's value vectors in self-attention, mean over heads, [R, N], when `block` was last
        observed (`observe="values"`)."""
        return self.observe("value_norms", block)

    def block_output(self, block: int) -> "Tensor":
        """The stream behind a block, [R, N, D], when it was last observed (`observe="output"`)."""
        return self.observe("block_output", block)

    def checked(self, block: int) -> "Tensor":
        """The stream behind a block when it was last checked (`Plan.checks`), [R, 2, N, D]: first as that step used it,
        then as computing the block would have made it. The plan that checked it paid."""
        return self.observe("checked", block)

    def updates(self) -> "Tensor":
        """What every block would add to every token if nothing were cached, [R, L, N, D]: a whole forward.

        For upper bounds, which know what a method has to guess; charged under "oracle".
        """
        return self.observe("updates")


def _moved(new: "Tensor", old: "Tensor") -> "Tensor":
    return (new - old).abs().mean() / old.abs().mean()


def relative_change(new: "Tensor", old: "Tensor") -> "Tensor":
    """mean |new - old| / mean |old| over everything, a tensor of one number: how much a signal has moved."""
    return on_values(_moved, new, old, shape=())


Decides = Literal["ahead", "device", "host"]
"""When a method decides.

`ahead`: its plans follow from the run and the step. `device`: they depend on what it looks at, and no number of that
reaches the host. `host`: it reads numbers (`Look.read`) at the start of a step or where a unit is reached.
"""


class Policy(Protocol):
    """What plans a run: a method, or the stateful object that a method starts for it."""

    def plan(self, look: Look) -> Plan:
        """The decisions for step `look.step`."""


def free_blocks(shape: ModelShape, refiners: int) -> int:
    """L - K: how many blocks may be cached if the last `refiners` are always computed.

    Raises:
        UserError: there are not that many blocks.
    """
    if refiners >= shape.num_blocks:
        raise UserError(f"refiner_blocks: {refiners} of {shape.num_blocks} blocks leave none to cache; give fewer")
    return shape.num_blocks - refiners


def _check_size(value: Any) -> None:
    """Raise ValueError for what no method can mean."""
    if isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"numbers are between -{LARGEST} and {LARGEST}")
    if isinstance(value, str) and not (len(value) <= LONGEST and value.isprintable()):
        raise ValueError(f"a text has at most {LONGEST} characters, all of them printable")
    if isinstance(value, Collection) and not isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"has {len(value)} entries; give at most {LONGEST}")
        for entry in value:
            _check_size(entry)


class Method(BaseModel):
    """Base of all methods; the fields of a subclass are its options, set from a config row or `--set key=value`.

    Class attributes:
        name: how configs call it (the file's name); label: how tables call it.
        knob: the one option that trades quality for MACs; None if there is nothing to trade.
        trains: whether `training` declares anything.
        predicts: whether it trains a scorer of tokens, which diagnostics and the figure of scores describe.
        decides: when it decides. The MACs of one that decides on the host depend on the sample: `outcomes` bounds them.

    Every option has a default, so that `tcbench macs` and the contract tests can make any method. No number may be
    larger than `LARGEST`, no list or text longer than `LONGEST`, and text or true and false are no numbers.

    Whatever a subclass defines runs behind `tcbench.watch.guard`: what it may return, what becomes of what it raises.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    label: ClassVar[str]
    knob: ClassVar[str | None] = None
    trains: ClassVar[bool] = False
    predicts: ClassVar[bool] = False
    decides: ClassVar[Decides] = "device"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        guard_hooks(cls)

    @field_validator("*", mode="wrap")
    @classmethod
    def _of_a_size(cls, given: Any, validated: ValidatorFunctionWrapHandler) -> Any:
        """What is absurd is refused where it is said, not where it is used; pydantic would take "3" and true for 3."""
        value = validated(given)
        if isinstance(given, bool | str | bytes) and isinstance(value, Number | str) and type(value) is not type(given):
            raise ValueError(f"is {described(given)}; give a {type(value).__name__} without quotes")
        _check_size(value)
        return value

    def sampled_steps(self, nfe: int) -> int:
        """How many steps the sampler takes where the uncached reference takes `nfe`."""
        return nfe

    def start(self, run: Run) -> Policy:
        """The object whose `plan` is called in this run; a stateful method returns a fresh one: state dies with it."""
        return self

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """The steps at which everything is computed, in sampling order."""
        return tuple(range(run.nfe))

    def implied(self, run: Run) -> dict[str, Any]:
        """What options that were left open (None) are in this run, by name; records and tables show these."""
        return {}

    def plan(self, look: Look) -> Plan:
        """The decisions for step `look.step`."""
        raise UserError("a method plans every step; define plan(look), here or in what start(run) returns")

    def outcomes(self, run: Run, step: int) -> tuple[Plan, ...]:
        """The plans between which a step is decided on the host, for methods that do so at its start."""
        raise UserError(
            "a number is read when the step starts; define outcomes(run, step), the plans it decides between"
        )

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """What must be trained before sampling, in order."""
        return ()

    def files(self) -> tuple[str, ...]:
        """Paths of the files that `training` reads: if one changes, the row is trained again."""
        return ()

    def lacks(self, artefacts: Artefacts) -> str | None:
        """What it needs and does not find among `artefacts`, with where that comes from, in words; None: nothing.

        Without it a method is costed at its floor, and is not sampled with: nobody asked for the floor.
        """
        return None

    def macs_depend_on(self, artefacts: Artefacts) -> str | None:
        """What MACs depend on besides shapes and `artefacts`; counted from these they are then an estimate.

        None: on nothing else.
        """
        if lacking := self.lacks(artefacts):
            return f"it lacks {lacking}; without it this is the method's floor"
        return "numbers of the sample, read on the host, decide" if self.decides == "host" else None


def refuse_lacking(method: Method, artefacts: Artefacts, who: str = "") -> None:
    """Raise UserError if a method is to sample without what it needs: it would sample its floor, and say nothing.

    Args:
        who: samples, in front of the line.
    """
    if lacking := method.lacks(artefacts):
        raise UserError(f"{who}{': ' if who else ''}{method.name} lacks {lacking}")
