"""Who: what is recomputed of a unit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tcbench.plan.refusal import is_count, wrong
from tcbench.tensors.unseen import dtype_of

if TYPE_CHECKING:  # configs name methods; checking them must not pay for importing torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class All:
    """Every token is recomputed and the unit's cache is refreshed."""

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True, slots=True)
class Nothing:
    """No token is recomputed; the fill serves all of them."""

    def __str__(self) -> str:
        return "none"


ALL, NONE = All(), Nothing()


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens in `index_RK` (int64, distinct within a row) are recomputed; the count is the same for every row.

    Where the count was decided on the device, `used` (int32 [1]) holds it: only so many of the leading columns count.
    """

    index_RK: "Tensor"
    used: "Tensor | None" = None

    def __post_init__(self) -> None:
        if dtype_of(self.index_RK) != "int64" or len(self.index_RK.shape) != 2:
            raise wrong("Tokens.index_RK", "an int64 tensor [R, K]", self.index_RK)
        if self.used is not None and (dtype_of(self.used) != "int32" or tuple(self.used.shape) != (1,)):
            raise wrong("Tokens.used", "an int32 tensor [1], or None", self.used)

    @property
    def count(self) -> int:
        """How many tokens of a row; a shape, but where `used` holds it reading it waits for the device."""
        return self.index_RK.shape[1] if self.used is None else int(self.used)

    def settled(self, count: int | None = None) -> "All | Nothing | Tokens":
        """The same with the count on the host, which is read if it is not given, and `NONE` if it is 0."""
        index_RK = self.index_RK[:, : self.count if count is None else count]
        return Tokens(index_RK) if index_RK.shape[1] else NONE

    def __str__(self) -> str:
        return str(self.count)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of the batch where `mask` is true are recomputed, all their tokens; the others are held (LazyDiT).

    It is on the host, because how much is computed depends on it: `Look.read_rows` brings it there.
    """

    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.mask, tuple) or not all(isinstance(row, bool) for row in self.mask):
            raise wrong("Rows.mask", "a tuple of True and False, one a row of the batch", self.mask)

    @property
    def index(self) -> list[int]:
        """The rows that are recomputed."""
        return [row for row, computed in enumerate(self.mask) if computed]

    def settled(self) -> "All | Nothing | Rows":
        """The same, and `ALL` or `NONE` if it is one for all rows."""
        return ALL if all(self.mask) else self if any(self.mask) else NONE

    def __str__(self) -> str:
        return f"rows {len(self.index)}/{len(self.mask)}"


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """All tokens, in groups: a group's mean input is computed once, in the place of one of its tokens, and what comes
    of it is the output of every token of the group (ToMe). Merged tokens attend among themselves; nothing is stored.

    Attributes:
        index_RK: the token in whose place each group is computed, int64 [R, K], distinct within a row.
        group_RN: the number of every token's group, 0 to K - 1, int64 [R, N]; `index_RK` names a token of the group.
    """

    index_RK: "Tensor"
    group_RN: "Tensor"

    def __post_init__(self) -> None:
        for name, value in (("index_RK", self.index_RK), ("group_RN", self.group_RN)):
            if dtype_of(value) != "int64" or len(value.shape) != 2:
                raise wrong(f"Merged.{name}", f"an int64 tensor [R, {name[-1]}]", value)

    @property
    def count(self) -> int:
        """How many groups of a row."""
        return self.index_RK.shape[1]

    def __str__(self) -> str:
        return f"{self.count} merged"


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """A decision taken when the unit is reached (ToMe, first-block cache).

    `choose` is given a function that returns the unit's input hidden state x_RND, or with `sees="modulated"` what the
    part makes of it, normalised and modulated: what waits to be added to it is added when that is called, and only
    then. `like` is what the decision costs when it is not known beforehand: a `Who` of
    the same token count where that count is fixed, otherwise the dearest case; `least` is then the cheapest. `macs` is
    what taking the decision costs per row (matrix products, as the ledger counts them), charged under `tag`.
    """

    choose: Callable[[Callable[[], "Tensor"]], "Settled"]
    like: "Settled"
    macs: int = 0
    tag: str = "score"
    least: "Settled | None" = None
    sees: Literal["hidden", "modulated"] = "hidden"

    def __post_init__(self) -> None:
        if not callable(self.choose):
            raise wrong("Deferred.choose", "a function", self.choose)
        if not isinstance(self.like, Settled):
            raise wrong("Deferred.like", "ALL, NONE, Tokens, Rows or Merged", self.like)
        if not is_count(self.macs):
            raise wrong("Deferred.macs", "a whole number of MACs, 0 or more", self.macs)
        if not isinstance(self.tag, str):
            raise wrong("Deferred.tag", "a name", self.tag)
        if not isinstance(self.least, Settled | None):
            raise wrong("Deferred.least", "ALL, NONE, Tokens, Rows, Merged or None", self.least)
        if self.sees not in ("hidden", "modulated"):
            raise wrong("Deferred.sees", "hidden or modulated", self.sees)

    def __str__(self) -> str:
        return f"decided at the block (like {self.like})"


Settled = All | Nothing | Tokens | Rows | Merged
Who = Settled | Deferred
