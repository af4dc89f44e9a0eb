"""Where: the quantities that are cached."""

from dataclasses import dataclass

from tcbench.plan.refusal import is_count, wrong


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One part's output *before* its gate: the current step's gate is applied to whatever is reused."""

    block: int
    part: str

    def __post_init__(self) -> None:
        if not is_count(self.block):
            raise wrong("Site.block", "a block's number", self.block)
        if not isinstance(self.part, str):
            raise wrong("Site.part", "a part's name", self.part)

    @property
    def blocks(self) -> range:
        """The blocks this unit touches."""
        return range(self.block, self.block + 1)

    def __str__(self) -> str:
        return f"block {self.block} {self.part}"


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """A block's whole residual update x^l - x^{l-1}, *after* its gates (TokenCache's f^l, Eq. 5)."""

    block: int

    def __post_init__(self) -> None:
        if not is_count(self.block):
            raise wrong("Block.block", "a block's number", self.block)

    @property
    def blocks(self) -> range:
        """The blocks this unit touches."""
        return range(self.block, self.block + 1)

    def __str__(self) -> str:
        return f"block {self.block}"


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The residual over blocks start..stop-1 as one quantity (Delta-DiT, TeaCache, first-block cache)."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not (is_count(self.start) and is_count(self.stop) and self.start < self.stop):
            raise wrong("Span", "two blocks' numbers, the first below the second", (self.start, self.stop))

    @property
    def blocks(self) -> range:
        """The blocks this unit touches."""
        return range(self.start, self.stop)

    def __str__(self) -> str:
        return f"blocks {self.start}-{self.stop - 1}"


@dataclass(frozen=True, slots=True, order=True)
class Output:
    """The stream as it enters the final layer, not a difference: held, it takes the place of all that blocks would add.

    A plan that holds it decides every block, and units decided `NONE` behind the last computed one are not even reached
    (DuCa's aggressive steps). Whatever is computed nevertheless is stored.
    """

    @property
    def blocks(self) -> range:
        """It is of no block."""
        return range(0)

    def __str__(self) -> str:
        return "output"


Unit = Site | Block | Span | Output
