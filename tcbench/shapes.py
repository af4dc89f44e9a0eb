"""What a transformer looks like to whoever plans and counts: a sequence of blocks, each a sequence of parts.

No tensor and no network is needed to make a shape or to read one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

from tcbench.plan import Block, Decision, Nothing, Output, Plan, PlanError, Site, Span, Unit


@dataclass(frozen=True)
class Macs:
    """An amount of work: multiply-accumulates of matrix products, and elements that went through a LayerNorm.

    The ledger's own rule counts `matmul` alone. `paper_rule` is the count that fits the paper's cells: 4 more per
    LayerNorm element (fvcore's convention; docs/reproduction-notes.md, "MACs"), and `repeated`: matrix products on the
    text alone, which are the same at every step. A run here makes them once; the paper's count has them in every step.
    The share of a batch whose rows are not all computed is exact, a `Fraction`.
    """

    matmul: int | Fraction = 0
    norm_elements: int | Fraction = 0
    repeated: int | Fraction = 0

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(
            self.matmul + other.matmul, self.norm_elements + other.norm_elements, self.repeated + other.repeated
        )

    def __mul__(self, times: int | Fraction) -> "Macs":
        return Macs(self.matmul * times, self.norm_elements * times, self.repeated * times)

    @property
    def paper_rule(self) -> int | Fraction:
        """Matrix products plus 4 per LayerNorm element plus what is repeated."""
        return self.matmul + 4 * self.norm_elements + self.repeated


Kind = Literal["mix", "cross", "pointwise"]
"""What a token's output depends on: every token (self-attention), the token and the text, or the token alone."""


@dataclass(frozen=True)
class PartShape:
    """One part of a block: its output joins the residual stream through a gate and can be cached before it.

    Attributes:
        name: what plans call it; a name means the same kind in all blocks of a model.
        per_token: MACs of a computed token, apart from those below.
        per_key: MACs of a token whose key and value are computed, for a `mix`.
        attended: width of attention's two products, heads times head_dim.
        groups: into how many equal groups the tokens of a `mix` fall apart when all are computed.
        text_tokens: what a `cross` attends to.
        text_macs: of the text's keys and values, which a run makes once (`ModelShape.once`).
    """

    name: str
    kind: Kind
    per_token: Macs
    per_key: Macs = Macs()
    attended: int = 0
    groups: int = 1
    text_tokens: int = 0
    text_macs: int = 0


def self_attention(width: int, groups: int = 1) -> PartShape:
    """Self-attention as wide as the stream, behind a LayerNorm."""
    projections = Macs(2 * width**2)
    return PartShape("attn", "mix", projections + Macs(0, width), projections, attended=width, groups=groups)


def cross_attention(width: int, text_tokens: int, normed: bool = False) -> PartShape:
    """Attention over the text, as wide as the stream; `normed` behind a LayerNorm."""
    return PartShape(
        "cross",
        "cross",
        Macs(2 * width**2, width if normed else 0),
        attended=width,
        text_tokens=text_tokens,
        text_macs=2 * text_tokens * width**2,
    )


def mlp(width: int, hidden: int) -> PartShape:
    """Two linear layers with `hidden` channels between them, behind a LayerNorm."""
    return PartShape("mlp", "pointwise", Macs(2 * width * hidden, width))


@dataclass(frozen=True)
class BlockShape:
    """A block: its parts in the order they run, and the work per row that does not depend on the tokens (adaLN).

    Attributes:
        parallel: all parts take the block's input, and one projection joins what they give (FLUX's single blocks).
            Where such a block is computed as a whole, it is by that projection; where its parts are decided one by one,
            each goes through its share of it, to the same sum but for rounding.
    """

    parts: tuple[PartShape, ...]
    modulation: Macs = Macs()
    parallel: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A transformer's shape, all that costing and planning need to know of it.

    Attributes:
        blocks: in the order they run.
        num_tokens: of one sample's image or video, ordered frame, row, column: the tokens that methods choose among.
        grid: rows and columns of a frame's tokens.
        frames: of a video; an image is one.
        joint_text: text tokens at the head of the stream, where a model attends to text and image jointly. They are
            recomputed whenever any token of a unit is.
        outer: per row and step: embedding, timestep MLP, final layer.
        once: per row and run: what depends on the text alone.
        latent_shape, output_shape: of one row's input and output, channels first.

    Raises:
        ValueError: a part's name is of two kinds.
    """

    blocks: tuple[BlockShape, ...]
    num_tokens: int
    width: int
    grid: tuple[int, int]
    frames: int = 1
    joint_text: int = 0
    outer: Macs = Macs()
    once: Macs = Macs()
    latent_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for _, part in self._walk():
            if part.kind != self.kinds[part.name]:
                raise ValueError(f"a shape has parts {part.name!r} of two kinds; a name means one kind in all blocks")

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream: the image's, and the text's if they share it."""
        return self.joint_text + self.num_tokens

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The parts' names, in the order in which the first block that has them runs them, and their kinds."""
        kinds: dict[str, Kind] = {}
        for _, part in self._walk():
            kinds.setdefault(part.name, part.kind)
        return kinds

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every part of every block, in the order they run."""
        return tuple(Site(block, part.name) for block, part in self._walk())

    def sites_of(self, *kinds: Kind) -> tuple[Site, ...]:
        """The parts of these kinds, in the order they run."""
        return tuple(site for site in self.sites if self.kind(site) in kinds)

    def part(self, site: Site) -> PartShape:
        """The part at a site.

        Raises:
            KeyError: there is none.
        """
        return self._parts[site]

    def kind(self, site: Site) -> Kind:
        """The kind of the part at a site."""
        return self.part(site).kind

    def walk(self, plan: Plan) -> Iterator[tuple[Unit, Decision | None]]:
        """The units of a plan in the order they run, with every part of a block that the plan leaves to be computed.

        A parallel block of which the plan decides nothing is one unit without a decision. Where the output is held, not
        those at the end that would be held too: nothing comes of them.
        """
        units = list(self._units(plan))
        if plan.holds_output:
            while units and units[-1][1] is not None and isinstance(units[-1][1].who, Nothing):
                units.pop()
        yield from units
        if output := plan.at(Output()):
            yield Output(), output

    def _units(self, plan: Plan) -> Iterator[tuple[Unit, Decision | None]]:
        spans = {unit.start: unit for unit in plan.decisions if isinstance(unit, Span)}
        block = 0
        while block < self.num_blocks:
            unit: Unit = spans.get(block) or Block(block)
            sites = self._sites[block]
            if decision := plan.at(unit):
                yield unit, decision
            elif self.blocks[block].parallel and not any(plan.at(site) for site in sites):
                yield unit, None
            else:
                yield from ((site, plan.at(site)) for site in sites)
            block = unit.blocks.stop

    def check(self, plan: Plan) -> None:
        """Whether the model has what a plan decides.

        Raises:
            PlanError: it lacks a unit, or a unit does not compute the attention that is observed there.
        """
        for block in plan.checks:
            if block >= self.num_blocks:
                raise PlanError(f"a plan checks block {block}, which a model of {self.num_blocks} blocks does not have")
        if plan.holds_output and (left := [unit for unit, decision in self._units(plan) if decision is None]):
            raise PlanError(f"a plan holds the output and leaves {left[0]} to be computed for nothing; decide it too")
        for unit, decision in plan.decisions.items():
            if isinstance(unit, Output):
                continue
            missing = isinstance(unit, Site) and unit not in self._parts
            if missing or not 0 <= unit.blocks.start < unit.blocks.stop <= self.num_blocks:
                raise PlanError(f"a plan decides {unit}, which a model of {self.num_blocks} blocks does not have")
            if decision.observe == "output":
                if isinstance(unit, Site) and unit.part != self.blocks[unit.block].parts[-1].name:
                    raise PlanError(
                        f"a plan observes the output of block {unit.block} at {unit}, which does not end it"
                    )
            elif decision.observe:
                parts = (self.part(unit),) if isinstance(unit, Site) else self.blocks[unit.blocks.start].parts
                if ("cross" if decision.observe == "cross" else "mix") not in [part.kind for part in parts]:
                    raise PlanError(f"a plan observes {decision.observe} at {unit}, which does not compute it")

    @cached_property
    def _sites(self) -> tuple[tuple[Site, ...], ...]:
        """The parts by block."""
        return tuple(tuple(Site(n, part.name) for part in block.parts) for n, block in enumerate(self.blocks))

    @cached_property
    def _parts(self) -> dict[Site, PartShape]:
        return {Site(block, part.name): part for block, part in self._walk()}

    def _walk(self) -> Iterator[tuple[int, PartShape]]:
        return ((number, part) for number, block in enumerate(self.blocks) for part in block.parts)
