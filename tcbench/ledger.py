"""One MAC ruler for every method: costs from shapes alone, by tag.

Rule: a matrix product of [m, k] by [k, n] is m*k*n MACs; linear layers, the patch convolution and attention's two
products are counted, for both halves of a guided pair. Biases, LayerNorm, softmax, activations, gates and residual
additions are not. `Macs.paper_rule` adds 4 per LayerNorm element, the accounting that fits the paper's tables.
`tests/test_macs.py` holds the ruler against torch's FLOP counter on what the engine really executes.
"""

from collections import defaultdict
from fractions import Fraction
from typing import Any

from tcbench.plan import ALL, All, Decision, Deferred, Keys, Merged, Nothing, Plan, Rows, Settled, Site, Tokens
from tcbench.shapes import Macs, ModelShape, PartShape


def part_macs(shape: ModelShape, part: PartShape, tokens: int | None, keys: Keys = "fresh") -> Macs:
    """One part of a block computed for `tokens` of the image's tokens (None: all, in one piece); nothing for none.

    All in one piece attend inside their groups; some are masked and pay for all keys. Text tokens of a joint stream are
    computed beside any other.
    """
    if tokens == 0:
        return Macs()
    whole = shape.stream_tokens
    queries = whole if tokens is None else shape.joint_text + tokens
    total = part.per_token * queries
    if part.kind == "cross":
        # of the text, the paper's count repeats in proportion to tokens (Eq. 7) what a run makes once
        repeated = part.text_macs * queries // whole
        return total + Macs(2 * queries * part.text_tokens * part.attended, repeated=repeated)
    if part.kind == "pointwise":
        return total
    if tokens is None:
        return total + part.per_key * whole + Macs(2 * whole * (whole // part.groups) * part.attended)
    projected = whole if keys == "recomputed" else queries  # tokens whose key and value are computed
    normed_again = projected if keys == "recomputed" else 0
    context = queries if keys == "fresh" else whole
    products = Macs(2 * queries * context * part.attended, part.per_token.norm_elements * normed_again)
    return total + part.per_key * projected + products


def block_macs(shape: ModelShape, block: int, tokens: int | None, keys: Keys = "fresh") -> Macs:
    """A whole block computed for `tokens` tokens (None: all), modulation included; nothing if there are none."""
    if tokens == 0:
        return Macs()
    parts = shape.blocks[block].parts
    return sum((part_macs(shape, part, tokens, keys) for part in parts), shape.blocks[block].modulation)


def predictor_macs(shape: ModelShape) -> Macs:
    """One call of the Cache Predictor: a whole block, keys and values of the text with its own weights, the head."""
    head = Macs(shape.width * shape.num_blocks * shape.num_tokens, shape.width * shape.num_tokens)
    text = Macs(sum(part.text_macs for part in shape.blocks[0].parts))
    return block_macs(shape, 0, None) + text + head


def plan_macs(plan: Plan, shape: ModelShape) -> Macs:
    """What executing a plan costs for one row of the batch, scorers and other overheads apart."""
    # a model's blocks are one, many times, and most is decided of them alike: of what is, one is costed
    parts: dict[tuple[Any, ...], list[PartShape]] = {}
    blocks: dict[tuple[Any, ...], list[int]] = {}
    gated = set[int]()
    for unit, decision in shape.walk(plan):
        count, keys = _tokens(decision)
        if isinstance(unit, Site):
            merged = decision is not None and isinstance(_who(decision), Merged)
            part = shape.part(unit)
            parts.setdefault((count, keys, _rows(decision), merged, id(part)), []).append(part)
            gated.add(unit.block)
        else:
            for block in unit.blocks:
                blocks.setdefault((count, keys, id(shape.blocks[block])), []).append(block)
    total = shape.outer
    for (count, keys, rows, merged, _), alike in parts.items():
        each = part_macs(shape, alike[0], count, keys) * rows
        if merged:  # all tokens are normalised before some are merged
            each += Macs(0, alike[0].per_token.norm_elements * (shape.num_tokens - (count or 0)))
        total += each * len(alike)
    for (count, keys, _), numbers in blocks.items():
        total += block_macs(shape, numbers[0], count, keys) * len(numbers)
    # gates of parts are applied at the current step whatever is reused
    return sum((shape.blocks[block].modulation for block in gated), total)


def check_macs(plan: Plan, shape: ModelShape) -> Macs:
    """What the blocks that a plan checks cost for one row: each in full, once more."""
    return sum((block_macs(shape, block, None) for block in plan.checks), Macs())


def overheads(plan: Plan, shape: ModelShape) -> dict[str, Macs]:
    """What a plan costs for one row beside the model's work, by tag; of what it has nothing of, nothing."""
    by_tag = {"score": observation_macs, "check": check_macs}
    return {tag: macs for tag, cost in by_tag.items() if (macs := cost(plan, shape)) != Macs()}


def observation_macs(plan: Plan, shape: ModelShape) -> Macs:
    """What the attention maps that a plan observes cost for one row: QK^T once more."""
    products = 0
    for unit, decision in plan.decisions.items():
        count, _ = _tokens(decision)
        if not decision.observe or count == 0:
            continue
        tokens = shape.stream_tokens if count is None else shape.joint_text + count
        for part in [shape.part(unit)] if isinstance(unit, Site) else shape.blocks[unit.blocks.start].parts:
            if decision.observe == "cross" and part.kind == "cross":
                products += tokens * part.text_tokens * part.attended
            elif decision.observe == "attn" and part.kind == "mix" and count is None:
                products += tokens * (tokens // part.groups) * part.attended
    return Macs(products)


def _tokens(decision: Decision | None) -> tuple[int | None, Keys]:
    """(number of recomputed tokens, None for all; what they attend to)."""
    match who := _who(decision) if decision else ALL:
        case All():
            return None, "fresh"
        case Nothing():
            return 0, "fresh"
        case Tokens() | Merged():
            return who.count, decision.keys if decision else "fresh"
        case Rows():
            return None, "fresh"


def _rows(decision: Decision | None) -> int | Fraction:
    """The share of rows that is computed where not none is."""
    who = _who(decision) if decision else ALL
    return Fraction(len(who.index), len(who.mask)) if isinstance(who, Rows) else 1


def _who(decision: Decision) -> Settled:
    """Who is recomputed, as far as it is known without a model."""
    return decision.who.like if isinstance(decision.who, Deferred) else decision.who


class Ledger:
    """MACs of one run for one sample, by tag: `model`, and each overhead (a scorer, a matching, ...) under its name."""

    def __init__(self, rows_per_sample: int) -> None:
        self.rows_per_sample = rows_per_sample
        self.by_tag: dict[str, Macs] = defaultdict(Macs)

    def __add__(self, other: "Ledger") -> "Ledger":
        """Of two passes of the same samples together."""
        both = Ledger(self.rows_per_sample)
        for tag in [*self.by_tag, *other.by_tag]:
            both.by_tag[tag] = self.by_tag.get(tag, Macs()) + other.by_tag.get(tag, Macs())
        return both

    def charge(self, tag: str, macs_per_row: Macs) -> None:
        """Add the work of one step, given per row of the transformer's batch."""
        self.by_tag[tag] += macs_per_row * self.rows_per_sample

    def charge_plan(self, plan: Plan, shape: ModelShape) -> None:
        """Add an executed plan: `model` for what it computes, and its `overheads` under their tags."""
        self.charge("model", plan_macs(plan, shape))
        for tag, macs in overheads(plan, shape).items():
            self.charge(tag, macs)

    def charge_choices(self, plan: Plan) -> None:
        """Add what taking a plan's deferred decisions costs, under their tags; executing them is `plan_macs`."""
        for decision in plan.decisions.values():
            if isinstance(decision.who, Deferred) and decision.who.macs:
                self.charge(decision.who.tag, Macs(decision.who.macs))

    @property
    def per_sample(self) -> int | Fraction:
        """MACs of a sample, all overheads charged: the exact mean over the batch."""
        return sum(macs.matmul for macs in self.by_tag.values())

    def totals(self) -> dict[str, int | dict[str, int]]:
        """JSON-able totals per sample, in whole MACs: a batch of which some rows were computed has a rounded mean.

        `per_sample` charges everything; `per_sample_without_overheads` only the model; `paper_rule` is the model alone
        by the paper's accounting, which leaves the predictor out (docs/reproduction-notes.md, reading 2).
        """
        return {
            "per_sample": round(self.per_sample),
            "per_sample_without_overheads": round(self.by_tag["model"].matmul),
            "paper_rule": round(self.by_tag["model"].paper_rule),
            "by_tag": {tag: round(macs.matmul) for tag, macs in self.by_tag.items()},
        }
