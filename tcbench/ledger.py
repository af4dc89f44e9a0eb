"""One MAC ruler for every method: costs from shapes alone, by tag.

Rule: a matrix product of [m, k] by [k, n] is m*k*n MACs; linear layers, the patch convolution and attention's two
products are counted, for both halves of a guided pair. Biases, LayerNorm, softmax, activations, gates and residual
additions are not. `Macs.paper_rule` adds 4 per LayerNorm element, the accounting that fits the paper's tables.
`tests/test_macs.py` holds the ruler against torch's FLOP counter on what the engine really executes.
"""

from collections import defaultdict

from tcbench.method import Macs, ModelShape
from tcbench.plan import ALL, All, Block, Decision, Deferred, Keys, Nothing, Plan, Site, Tokens


def attention_macs(shape: ModelShape, block: int, queries: int | None, keys: Keys = "fresh") -> Macs:
    """Self-attention of `queries` tokens: projections, both products, output projection.

    None: all of them, in one piece, which a sparse block does group by group; some are masked and pay for all keys.
    """
    width, tokens = shape.width, shape.num_tokens
    if queries is None:
        return Macs(4 * width**2 * tokens + 2 * tokens * (tokens // shape.groups(block)) * width, width * tokens)
    projected = tokens if keys == "recomputed" else queries  # tokens whose key and value are computed
    context = queries if keys == "fresh" else tokens
    return Macs(
        matmul=2 * width**2 * queries + 2 * width**2 * projected + 2 * queries * context * width,
        norm_elements=width * (queries + (projected if keys == "recomputed" else 0)),
    )


def mlp_macs(shape: ModelShape, tokens: int) -> Macs:
    """The two linear layers of the MLP on `tokens` tokens."""
    return Macs(2 * shape.mlp_ratio * shape.width**2 * tokens, shape.width * tokens)


def cross_macs(shape: ModelShape, tokens: int) -> Macs:
    """Cross-attention of `tokens` tokens over the text, whose keys and values a run makes once (`ModelShape.once`)."""
    width, text = shape.width, shape.text_tokens
    # the paper's costs are in proportion to tokens (Eq. 7)
    repeated = 2 * text * width**2 * tokens // shape.num_tokens
    return Macs(2 * width**2 * tokens + 2 * tokens * text * width, repeated=repeated)


def branch_macs(shape: ModelShape, block: int, branch: str, tokens: int | None, keys: Keys = "fresh") -> Macs:
    """One branch computed for `tokens` tokens (None: all of them, in one piece); nothing if there are none."""
    if tokens == 0:
        return Macs()
    if branch == "attn":
        return attention_macs(shape, block, tokens, keys)
    return (cross_macs if branch == "cross" else mlp_macs)(shape, shape.num_tokens if tokens is None else tokens)


def block_macs(shape: ModelShape, block: int, tokens: int | None, keys: Keys = "fresh") -> Macs:
    """A whole block computed for `tokens` tokens (None: all), modulation included; nothing if there are none."""
    if tokens == 0:
        return Macs()
    return sum((branch_macs(shape, block, branch, tokens, keys) for branch in shape.branches), shape.modulation)


def predictor_macs(shape: ModelShape) -> Macs:
    """One call of the Cache Predictor: a whole block, keys and values of the text with its own weights, the head."""
    head = Macs(shape.width * shape.num_blocks * shape.num_tokens, shape.width * shape.num_tokens)
    text = Macs(2 * shape.text_tokens * shape.width**2)
    return block_macs(shape, 0, None) + text + head


def plan_macs(plan: Plan, shape: ModelShape) -> Macs:
    """What executing a plan costs for one row of the batch, scorers and other overheads apart."""
    total = shape.outer
    spans, block = plan.spans(), 0
    while block < shape.num_blocks:
        if span := spans.get(block):
            count, _ = _tokens(plan.at(span))
            total += sum((block_macs(shape, inner, count) for inner in span.blocks), Macs())
            block = span.stop
            continue
        if whole := plan.at(Block(block)):
            total += block_macs(shape, block, *_tokens(whole))
        else:
            total += shape.modulation  # gates are applied at the current step whatever is reused
            for branch in shape.branches:
                total += branch_macs(shape, block, branch, *_tokens(plan.at(Site(block, branch))))
        block += 1
    return total


def observation_macs(plan: Plan, shape: ModelShape) -> Macs:
    """What the attention maps that a plan observes cost for one row: QK^T once more."""
    products = 0
    for unit, decision in plan.decisions.items():
        count, _ = _tokens(decision)
        tokens = shape.num_tokens if count is None else count
        if decision.observe == "cross":
            products += tokens * shape.text_tokens
        elif decision.observe == "attn" and count is None:
            products += tokens * (tokens // shape.groups(unit.blocks.start))
    return Macs(products * shape.width)


def _tokens(decision: Decision | None) -> tuple[int | None, Keys]:
    """(number of recomputed tokens, None for all; what they attend to)."""
    decision = decision or Decision(ALL)
    match who := _who(decision):
        case All():
            return None, "fresh"
        case Nothing():
            return 0, "fresh"
        case Tokens():
            return who.count, decision.keys


def _who(decision: Decision) -> All | Nothing | Tokens:
    """Who is recomputed, as far as it is known without a model."""
    return decision.who.like if isinstance(decision.who, Deferred) else decision.who


class Ledger:
    """MACs of one run for one sample, by tag: `model`, and each overhead (a scorer, a matching, ...) under its name."""

    def __init__(self, rows_per_sample: int) -> None:
        self.rows_per_sample = rows_per_sample
        self.by_tag: dict[str, Macs] = defaultdict(Macs)

    def charge(self, tag: str, macs_per_row: Macs) -> None:
        """Add the work of one step, given per row of the transformer's batch."""
        self.by_tag[tag] += macs_per_row * self.rows_per_sample

    def charge_plan(self, plan: Plan, shape: ModelShape) -> None:
        """Add an executed plan: `model` for what it computes, `score` for what it observes, if anything."""
        self.charge("model", plan_macs(plan, shape))
        if (observed := observation_macs(plan, shape)).matmul:
            self.charge("score", observed)

    def charge_choices(self, plan: Plan) -> None:
        """Add what taking a plan's deferred decisions costs, under their tags; executing them is `plan_macs`."""
        for decision in plan.decisions.values():
            if isinstance(decision.who, Deferred) and decision.who.macs:
                self.charge(decision.who.tag, Macs(decision.who.macs))

    def totals(self) -> dict[str, int | dict[str, int]]:
        """JSON-able totals per sample.

        `per_sample` charges everything; `per_sample_without_overheads` only the model; `paper_rule` is the model alone
        by the paper's accounting, which leaves the predictor out (docs/reproduction-notes.md, reading 2).
        """
        return {
            "per_sample": sum(macs.matmul for macs in self.by_tag.values()),
            "per_sample_without_overheads": self.by_tag["model"].matmul,
            "paper_rule": self.by_tag["model"].paper_rule,
            "by_tag": {tag: macs.matmul for tag, macs in self.by_tag.items()},
        }
