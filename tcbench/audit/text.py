"""Sentences of the paper against its tables, and Eq. (13) as printed."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from tcbench.audit.checks import Check
from tcbench.audit.paper import (
    COMPARISONS,
    HEADERS,
    PaperRow,
    column,
    find,
    number,
    printed_ratio,
    settings,
    statement,
    table,
)

Better = Callable[[float, float], bool]
LOWER, HIGHER = operator.lt, operator.gt
BETTER: dict[str, Better] = {"fid": LOWER, "sfid": LOWER, "is": HIGHER, "precision": HIGHER, "recall": HIGHER}


def statements() -> Iterator[Check]:
    """In the order of the paper."""
    yield from _metrics()
    yield from _class_conditional()
    yield from _text_conditional()
    yield from _ablations()
    yield from _conclusion()


def _groups(*numbers: int) -> dict[str, list[PaperRow]]:
    """Settings by name."""
    return {
        " ".join(filter(None, (group[0]["method"], group[0].get("resolution"), f"{group[0]['nfe']} steps"))): group
        for table_number in numbers
        for group in settings(table_number)
    }


def _ours(group: Sequence[PaperRow]) -> PaperRow:
    return next(row for row in group if row["method"] == "TokenCache")


def _caching(group: Sequence[PaperRow]) -> list[PaperRow]:
    return [row for row in group if row["method"] != group[0]["method"]]


def _ahead(rows: Sequence[PaperRow], ours: PaperRow, key: str, better: Better) -> list[str]:
    """Rows that beat TokenCache in a column: "FORA 253.96"."""
    return [f"{row['method']} {row[key]}" for row in rows if better(float(row[key]), float(ours[key]))]


def _no_exception(where: str, claim: str, ahead: dict[str, list[str]], why: str) -> Check:
    """A claim that holds if nothing is ahead anywhere; lists what is."""
    exceptions = "; ".join(f"{setting}: {', '.join(rows)}" for setting, rows in ahead.items() if rows)
    return statement(where, claim, exceptions or "no exception", not exceptions, why)


def _metrics() -> Iterator[Check]:
    yield statement(
        'Sec. IV-A: "Scaled FID (sFID) … normalizes feature covariances"',
        "scaled",
        "spatial",
        False,
        "the evaluation code that the compared works share knows sFID as *spatial* FID, and no scaled one",
    )
    yield number('Sec. IV-B: "a total of 4,750 videos"', "4750", 950 * 5, "950 prompts (Sec. IV-A), 5 videos each")


def _class_conditional() -> Iterator[Check]:
    groups = _groups(2)
    fid, inception = (
        {setting: _ahead(_caching(group), _ours(group), key, BETTER[key]) for setting, group in groups.items()}
        for key in ("fid", "is")
    )
    yield _no_exception(
        'Sec. IV-C: "the best FID … among the compared methods"', "best", fid, "caching rows of Table II"
    )
    why = "caching rows of Table II"
    yield _no_exception('Sec. IV-C: "and a higher IS among the compared methods"', "highest", inception, why)
    at_250 = groups["DiT-XL/2 256 250 steps"]
    ours, uncached = _ours(at_250), at_250[0]
    worse = {HEADERS[key]: _ahead([uncached], ours, key, better) for key, better in BETTER.items()}
    where = 'Sec. IV-C, 250 steps: "3× acceleration without a reduction in performance"'
    ratio = float(uncached["latency_s"]) / float(ours["latency_s"])
    why = f"TokenCache has {ours['precision']}, a last digit that may be noise; 3× is MACs, latency is {ratio:.2f}×"
    yield _no_exception(where, "no metric worse", worse, why)
    rivals = [row for row in at_250 if row["method"] in ("FORA", "ToCa")]
    ahead = {HEADERS[key]: _ahead(rivals, ours, key, better) for key, better in BETTER.items()}
    yield _no_exception(
        'Sec. IV-C, 250 steps: "surpassing both FORA and ToCa"',
        "in every metric",
        ahead,
        f"TokenCache has IS {ours['is']}, Precision {ours['precision']}",
    )
    as_fast = {
        setting: _ahead([row for row in group if _as_fast(row, _ours(group))], _ours(group), "fid", LOWER)
        for setting, group in groups.items()
        if group is not at_250
    }
    yield _no_exception(
        'Sec. IV-C: "at lower sampling steps … outperform both the baseline model and other acceleration techniques"',
        "best FID",
        as_fast,
        "rows with at least 95 % of TokenCache's speedup, fewer steps included",
    )
    for nfe in (50, 20):
        small, large = (_ours(groups[f"DiT-XL/2 {side} {nfe} steps"])["speedup"] for side in (256, 512))
        yield statement(
            f'Sec. IV-C: "effective for achieving higher speedups at this increased resolution", {nfe} steps',
            f"above {small}",
            large,
            float(large) > float(small),
            "read as higher than at 256; Table I gives 512 more full steps",
        )


def _as_fast(row: PaperRow, ours: PaperRow) -> bool:
    return float(row["speedup"]) >= 0.95 * float(ours["speedup"])


def _text_conditional() -> Iterator[Check]:
    images, large_images, video = (settings(table_number)[0] for table_number in (3, 4, 5))
    yield statement(
        'Sec. IV-C: "consistently beat DDIM inference with fewer sampling steps" (PixArt-alpha)',
        "DDIM",
        "DPM-Solver++",
        False,
        "the sampler of PixArt-alpha by Sec. IV-A",
    )
    latency, video_latency = (
        float(group[0]["latency_s"]) / float(_ours(group)["latency_s"]) for group in (images, video)
    )
    speedup = _ours(images)["speedup"]
    why = f"Table III, a ratio of MACs; latencies give {latency:.2f}"
    yield statement('Sec. IV-C: "an impressive near 2× speedup"', "near 2", speedup, float(speedup) >= 1.9, why)
    for key in ("image_reward", "parti_clip"):
        yield _no_exception(
            f'Sec. IV-C: "the highest Image Reward and CLIP scores": {HEADERS[key]}',
            "highest",
            {"Table IV": _ahead(large_images[1:], _ours(large_images), key, HIGHER)},
            f"under comparable speedup; uncached has {large_images[0][key]}, TokenCache {_ours(large_images)[key]}",
        )
    where, why = 'Sec. IV-C: "the highest overall speedup (2.18×)"', f"Table V; its latencies give {video_latency:.2f}"
    yield number(where, "2.18", float(_ours(video)["speedup"]), why)
    ahead = {"Table V": _ahead(_caching(video), _ours(video), "vbench", HIGHER)}
    yield _no_exception('Sec. IV-C: "higher VBench scores compared to ToCa and FORA"', "highest", ahead, "Table V")


def _ablations() -> Iterator[Check]:
    predictor = find(6, strategy="Cache Predictor")
    keys = (("coco_fid", LOWER), ("coco_clip", HIGHER), ("parti_clip", HIGHER))
    ahead = {
        HEADERS[key]: [row["strategy"] for row in table(6) if better(float(row[key]), float(predictor[key]))]
        for key, better in keys
    }
    span = max(column(table(6), "coco_fid")) - min(column(table(6), "coco_fid"))
    why = f"Table VI; its FIDs lie within {span:.2f}, without intervals"
    yield _no_exception('Sec. IV-D: "the best generation quality … in all datasets"', "best", ahead, why)
    yield statement(
        'Sec. IV-D: "All compared methods had similar computational costs"', "similar", "", None, "Table VI prints none"
    )

    rows = {row["cache_ratio"]: row for row in table(7)}
    below = [rows[ratio] for ratio in ("0.7", "0.6", "0.5")]
    yield statement(
        'Sec. IV-D: "Ratios below 0.8 reduced FLOPs"',
        f"below {rows['0.8']['tmacs']}",
        ", ".join(row["tmacs"] for row in below),
        max(column(below, "tmacs")) < float(rows["0.8"]["tmacs"]),
        "Table VII: the less is reused, the more is computed",
    )
    degraded = all(float(row[key]) < float(rows["0.8"][key]) for row in below for key in ("is", "precision"))
    found = "IS " + ", ".join(row["is"] for row in below)
    why = f"Table VII; 0.8 has {rows['0.8']['is']}"
    yield statement('Sec. IV-D: "but degraded IS and Precision noticeably"', "lower", found, degraded, why)
    for claim, best, keys_of, pick in (
        ("0.8 achieved the best fidelity", "0.8", ("fid", "sfid"), min),
        ("0.9 achieved the highest Precision and the best speedup", "0.9", ("precision", "speedup"), max),
    ):
        for key in keys_of:
            found = pick(table(7), key=lambda row: float(row[key]))["cache_ratio"]
            yield statement(f'Sec. IV-D: "{claim}": {HEADERS[key]}', best, found, found == best, "Table VII")

    first = table(8)[0]["strategy"]
    why = 'Table VIII; its second row, "reverse" in the text, is the uniform one'
    where = 'Sec. IV-D: "The first row in Table VIII showed … a uniform timestep selection strategy"'
    yield statement(where, "uniform", first, first.startswith("Uniform"), why)
    why = "Table VIII prints no cost; with one #Full all schedules have equal MACs"
    yield statement('Sec. IV-D: "enhancing both the quality and speed"', "faster", "", None, why)

    improves = all(
        float(fewer["is"]) < float(more["is"]) and float(fewer["fid"]) > float(more["fid"])
        for fewer, more in pairwise(table(9))
    )
    where = 'Sec. IV-D: "increasing K improved generation quality"'
    yield statement(where, "IS up, FID down", "yes" if improves else "no", improves, "Table IX")
    where = 'Sec. IV-D: TFLOPs up to 4.748 are "a gradual reduction in speedup from 3.09× to 2.40×"'
    uncached = find(2, method="DiT-XL/2", resolution=256, sampled_steps=50)["tmacs"]
    yield printed_ratio(where, "2.40", uncached, find(9, k=4)["tmacs"], "; 2.40 belongs to Table II's 4.94")


def _conclusion() -> Iterator[Check]:
    slower = {
        setting: [
            *(f"{row} TMACs" for row in _ahead(_caching(group), _ours(group), "tmacs", LOWER)),
            *(f"{row} s" for row in _ahead(_caching(group), _ours(group), "latency_s", LOWER)),
        ]
        for setting, group in _groups(*COMPARISONS).items()
    }
    where = 'Sec. V: "outperforms existing cache-based methods in both efficiency and quality"'
    yield _no_exception(where, "most efficient", slower, "rows with fewer TMACs, or a lower latency, than TokenCache")


def equations() -> Iterator[Check]:
    """Eq. (13) with Table I's beta."""
    beta = min(column(table(1), "beta"))
    limit = math.log(2.0**-1074) / beta  # the smallest number above 0 in double precision
    yield statement(
        f"exp(β ᾱ) with β = {beta:.0f}, in double precision",
        "above 0",
        f"0 for ᾱ above {limit:.3f}",
        False,
        "ᾱ lies in [0, 1]",
    )
    steps = 50
    literal = [left / math.comb(left + 1, 2) for left in range(1, steps + 1)]  # flat ᾱ: exp(γ_t) counts the steps left
    why = f"flat ᾱ, {steps} steps; the denominator runs over i ≥ t, so that v_T is always 1"
    yield statement('"the importance distribution {v_t}"', "sums to 1", f"sums to {sum(literal):.2f}", False, why)
