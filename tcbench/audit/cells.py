"""The TFLOPs columns against the rules that methods published."""

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from tcbench.audit.checks import Check
from tcbench.audit.paper import PaperRow, find, name, number, reference, statement, table, underived
from tcbench.budget.costing import macs_of
from tcbench.ledger import plan_macs, predictor_macs
from tcbench.models.specs import MODELS, DiTSpec
from tcbench.plan import NONE, Plan, Site, every_unit
from tcbench.registry import make_method

BATCH = 8  # Sec. IV-B: "We measured the generation speed by latency and FLOPs using a batch size of 8"
EVERYTHING = "every block at every step, both halves of the guided pair"

# ToCa's published settings, from its code's README, by (resolution, NFE); R is 0.07 in both.
TOCA: dict[tuple[str, str], dict[str, Any]] = {
    ("256", "250"): {"interval": 4, "schedule": "ddpm250"},
    ("256", "50"): {"interval": 3, "schedule": "ddim50"},
}
TOCA_PIXART = {"fresh_ratio": 0.3, "interval": 3, "schedule": "pixart", "bonus": 0.4, "cell": 4}


TEXT_MODELS = {3: "pixart-256", 4: "pixart-1024", 5: "osp-93x256"}
WHAT = {
    3: "PixArt-alpha, 120 text tokens",
    4: "PixArt-alpha, 120 text tokens",
    5: "Open-Sora-Plan v1.3, 93 frames, 512 text tokens, sparse attention in 28 of 32 blocks",
}
# PixArt-alpha's code drops padding and packs a batch's captions into one sequence. With so many tokens a caption, and
# the batch of 8 with both halves of its pairs (Table III) or without (Table IV), that count gives both tables' cells.
CAPTION_TOKENS = 15.25
PACKED_CAPTIONS = {3: 2 * BATCH, 4: BATCH}
# #Full of TokenCache beyond Table I, and where it is from
TEXT_FULL_STEPS = {
    3: (9, 'Table I\'s for DiT at 20 steps, as Sec. IV-B says "the same hyperparameters"'),
    4: (12, 'Table I\'s for DiT at 50 steps, as Sec. IV-B says "the same hyperparameters"'),
    5: (18, 'Sec. IV-B: "a full timestep of 18"'),
}


@cache
def _totals(resolution: str, nfe: int, method: str, options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return macs_of(f"dit-xl-2-{resolution}", make_method(method, dict(options)), nfe)


def ledger(resolution: str, nfe: str | int, method: str, **options: Any) -> dict[str, Any]:
    """The ledger's totals for one sample of DiT-XL/2."""
    return _totals(resolution, int(nfe), method, tuple(options.items()))


def tmacs(resolution: str, nfe: str | int, method: str, **options: Any) -> float:
    """TMACs of one sample of DiT-XL/2 by the paper's rule."""
    return ledger(resolution, nfe, method, **options)["paper_rule"] / 1e12


def text_tmacs(table_number: int, nfe: int, text_tokens: int | None = None) -> float:
    """TMACs of one uncached sample of a table's model by the paper's rule, `text_tokens` instead of its own."""
    spec = MODELS[TEXT_MODELS[table_number]]
    spec = spec if text_tokens is None else spec.model_copy(update={"caption_tokens": text_tokens})
    return 2 * nfe * plan_macs(Plan(), spec.shape).paper_rule / 1e12


def fitting_text_tokens(table_number: int, nfe: int, tmacs: float) -> float:
    """How many text tokens would make a cell right: MACs are linear in them."""
    none, one = (text_tmacs(table_number, nfe, count) for count in (0, 1))
    return (tmacs - none) / (one - none)


def packed_tmacs(table_number: int, nfe: int) -> float:
    """TMACs of one sample if captions are packed without padding: every token attends to all captions of the batch.

    The caption projection still runs on padded captions.
    """
    shape = MODELS[TEXT_MODELS[table_number]].shape
    held = plan_macs(every_unit([Site(block, "cross") for block in range(shape.num_blocks)], NONE), shape).paper_rule
    keys = PACKED_CAPTIONS[table_number] * CAPTION_TOKENS
    products = shape.num_tokens * (2 * shape.width**2 + 2 * keys * shape.width)
    cross = shape.num_blocks * (products + 2 * CAPTION_TOKENS * shape.width**2)
    return 2 * nfe * (held + cross) / 1e12


def p_step_share(blocks: int, refiners: int, cache_ratio: float = 0.9) -> float:
    """MACs of a P-step over those of a full step (Eq. 7): (K + (1 - r)(L - K)) / L."""
    return (refiners + (1 - cache_ratio) * (blocks - refiners)) / blocks


def class_conditional() -> Iterator[Check]:
    """Table II."""
    for row in table(2):
        where, reported, resolution, nfe = name(2, row), row["tmacs"], row["resolution"], row["nfe"]
        match row["method"]:
            case "DiT-XL/2":
                steps = int(row["sampled_steps"])
                why = EVERYTHING if steps == int(nfe) else f"{steps} full steps"
                yield number(where, reported, tmacs(resolution, nfe, "fewer_steps", steps=steps), why)
            case "FORA":
                yield _fora(where, row)
            case "Learning-to-Cache":
                yield _learning_to_cache(where, row)
            case "ToCa":
                yield _toca(where, row)
            case _:
                totals, refiners = ledger(resolution, nfe, "tokencache"), 2 if nfe == "250" else 4
                why = f"#Full {totals['full_steps']} (Table I), K = {refiners}, r = 0.9"
                yield number(where, reported, totals["paper_rule"] / 1e12, why)


def _fora(where: str, row: PaperRow) -> Check:
    by_interval = {interval: ledger(row["resolution"], row["nfe"], "fora", interval=interval) for interval in (2, 3)}
    if row["nfe"] == "250":
        why = f"published interval 3: {by_interval[3]['full_steps']} full steps"
        return number(where, row["tmacs"], by_interval[3]["paper_rule"] / 1e12, why)
    others = ", ".join(f"{interval} costs {by_interval[interval]['paper_rule'] / 1e12:.2f}" for interval in (2, 3))
    closest = tmacs(row["resolution"], row["nfe"], "fora", num_full_steps=21)
    return underived(where, row["tmacs"], f"21 full steps spread evenly; no interval gives them: {others}", closest)


def _toca(where: str, row: PaperRow) -> Check:
    resolution, nfe = row["resolution"], row["nfe"]
    if options := TOCA.get((resolution, nfe)):
        totals = ledger(resolution, nfe, "toca", **options)
        setting = f"N = {options['interval']}, R = 0.07, schedule {options['schedule']}"
        why = f"published {setting}: {totals['full_steps']} full steps; scoring not counted"
        return number(where, row["tmacs"], totals["paper_rule"] / 1e12, why)
    costs = " and ".join(
        f"{tmacs(resolution, nfe, 'toca', interval=interval):.2f} with N = {interval}" for interval in (2, 3)
    )
    return underived(where, row["tmacs"], f"no setting is published here; that for 50 steps at 256 costs {costs}")


def _learning_to_cache(where: str, row: PaperRow) -> Check:
    resolution, nfe, reported = row["resolution"], row["nfe"], row["tmacs"]
    floor = tmacs(resolution, nfe, "learning_to_cache")  # without a router nothing is recomputed at second steps
    kept = (float(reported) - floor) / (tmacs(resolution, nfe, "uncached") - floor)
    if abs(kept) < 0.005:
        why = "the method's floor: nothing recomputed at every second step, which is FORA with period 2"
        return number(where, reported, floor, why)
    why = f"needs its router: {kept:.1%} of every second step recomputed, over a floor of {floor:.2f}"
    return underived(where, reported, why)


def text_conditional() -> Iterator[Check]:
    """Tables III to V."""
    for table_number, model in TEXT_MODELS.items():
        blocks = MODELS[model].num_blocks
        for row in table(table_number):
            where, reported, nfe = name(table_number, row), row["tmacs"], int(row["nfe"])
            uncached = float(reference(table_number, row)["tmacs"])
            share = float(reported) / uncached
            match row["method"]:
                case "FORA":
                    yield _text_fora(where, reported, uncached, nfe)
                case "ToCa":
                    if table_number == 3:
                        totals = macs_of(model, make_method("toca", TOCA_PIXART), nfe)
                        why = "the paper names no setting; the released one, N = 3 and R = 0.30, without its scoring"
                        yield underived(where, reported, why, totals["paper_rule"] / 1e12)
                    else:
                        yield underived(where, reported, f"{share:.3f} of uncached; the paper names no setting")
                case "TokenCache":
                    yield _text_tokencache(where, reported, uncached, nfe, blocks, *TEXT_FULL_STEPS[table_number])
                case _ if row["sampled_steps"] == row["nfe"]:
                    derived, why = text_tmacs(table_number, nfe), WHAT[table_number]
                    if table_number in PACKED_CAPTIONS:
                        fits, packed = fitting_text_tokens(table_number, nfe, uncached), packed_tmacs(table_number, nfe)
                        why += (
                            f"; {fits:.0f} would fit. Its code drops padding and packs captions: {CAPTION_TOKENS:g} "
                            f"tokens a caption in sequences of {PACKED_CAPTIONS[table_number]} would give {packed:.2f}"
                        )
                    yield number(where, reported, derived, why)
                case _:
                    part = f"{row['sampled_steps']}/{nfe}"
                    derived = uncached * int(row["sampled_steps"]) / nfe
                    yield number(where, reported, derived, f"{part} of the uncached cell")


def _text_fora(where: str, reported: str, uncached: float, nfe: int) -> Check:
    # which steps are full does not depend on the model, and a cached step costs next to nothing
    full = {interval: ledger("256", nfe, "fora", interval=interval)["full_steps"] for interval in (2, 3)}
    fits = float(reported) / uncached * nfe
    if abs(fits - full[2]) < 0.1:
        return number(where, reported, uncached * full[2] / nfe, f"interval 2: {full[2]} of {nfe} full steps")
    why = f"amounts to {fits:.1f} of {nfe} full steps; interval 2 gives {full[2]}, 3 gives {full[3]}"
    return underived(where, reported, why)


def _text_tokencache(
    where: str, reported: str, uncached: float, nfe: int, blocks: int, full: int, source: str
) -> Check:
    share = p_step_share(blocks, refiners=4)
    steps = float(reported) / uncached * nfe  # full steps' worth
    fitting_full, fitting_share = (steps - nfe * share) / (1 - share), (steps - full) / (nfe - full)
    why = (
        f"#Full {full} ({source}), K = 4, r = 0.9: P-steps at {share:.3f} of a full step; {fitting_full:.1f} full "
        f"steps would fit, or P-steps at {fitting_share:.3f} (K = 0: {p_step_share(blocks, 0):.3f})"
    )
    return number(where, reported, uncached * (full + (nfe - full) * share) / nfe, why)


def ablations() -> Iterator[Check]:
    """Tables VII and IX: DiT-XL/2 at 256x256, 50 steps."""
    for row in table(7):
        derived = tmacs("256", 50, "tokencache", cache_ratio=float(row["cache_ratio"]))
        yield number(f"Table VII, r = {row['cache_ratio']}", row["tmacs"], derived, "#Full 12 (Table I), K = 4")
    for row in table(9):
        twelve, eleven = (
            tmacs("256", 50, "tokencache", refiner_blocks=int(row["k"]), num_full_steps=full) for full in (12, 11)
        )
        why = f"#Full 12 (Table I), r = 0.9; 11 full steps would cost {eleven:.3f}"
        yield number(f"Table IX, K = {row['k']}", row["tmacs"], twelve, why)


def dit_parameters(model: str) -> tuple[int, int]:
    """(parameters of a block without the embedder, which all blocks share; of the whole network) of a DiT."""
    spec = cast(DiTSpec, MODELS[model])
    width, patch = spec.width, spec.patch_size**2

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    block = 4 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + linear(width, 6 * width)
    embedder = linear(256, width) + linear(width, width) + (spec.num_classes + 1) * width
    ends = linear(spec.in_channels * patch, width) + linear(width, 2 * width) + linear(width, spec.out_channels * patch)
    return block, spec.num_blocks * block + embedder + ends


def predictor() -> Iterator[Check]:
    """Sec. III-C's share of the predictor, and Table II with it."""
    shape = MODELS["dit-xl-2-256"].shape
    macs, full = predictor_macs(shape).matmul, plan_macs(Plan(), shape).matmul
    block, total = dit_parameters("dit-xl-2-256")
    weights = block + (shape.width + 1) * shape.num_blocks
    claim = 'Sec. III-C: "adds ∼3.57% to the model\'s parameter count and FLOPs"'
    yield number(f"{claim}: parameters", "3.57", 100 * weights / total, "a block and a linear head of DiT-XL/2")
    yield number(f"{claim}: FLOPs of a full step", "3.57", float(100 * macs / full), "the same; 1/28 is 3.57 %")
    for row in table(2):
        if row["method"] == "TokenCache":
            totals = ledger(row["resolution"], row["nfe"], "tokencache")
            derived = (totals["paper_rule"] + totals["by_tag"]["predictor"]) / 1e12
            p_steps = int(row["nfe"]) - totals["full_steps"]
            why = f"one block on each of {p_steps} P-steps; the cell is reproduced without them"
            yield number(f"{name(2, row)}: TMACs with the predictor", row["tmacs"], derived, why)


def units() -> Iterator[Check]:
    """What a "TFLOP" and a function evaluation of the tables are."""
    row = find(2, method="DiT-XL/2", resolution=256, sampled_steps=250)
    macs, cell = tmacs("256", 250, "uncached"), row["tmacs"]
    once = plan_macs(Plan(), MODELS["dit-xl-2-256"].shape).paper_rule / 1e12
    yield number("as TMACs", cell, macs, EVERYTHING)
    yield number('as "TFLOPs" (the header)', cell, 2 * macs, "a multiply-accumulate is two operations")
    yield number('"using a batch size of 8" (Sec. IV-B)', cell, BATCH * macs, "the cell is for one sample")
    evaluations = float(cell) / once
    yield statement(
        '"NFE denotes the number of function evaluations"',
        row["nfe"],
        f"{evaluations:.0f}",
        round(evaluations) == int(row["nfe"]),
        "cell over one forward pass; a guided pair is counted once",
    )


def all_cells() -> list[Check]:
    """Every TMACs cell of the paper."""
    return [*class_conditional(), *text_conditional(), *ablations()]
