"""Columns of the tables against each other: speedups, latencies, equal compute, numbers that are printed twice."""

from collections.abc import Iterator

from tcbench.audit.cells import BATCH, ledger
from tcbench.audit.checks import Check
from tcbench.audit.paper import (
    COMPARISONS,
    HEADERS,
    LATENCY_TOLERANCE,
    ROMAN,
    column,
    find,
    name,
    number,
    printed_ratio,
    reference,
    same,
    settings,
    statement,
    table,
)

A100_TFLOPS = 312  # NVIDIA's data sheet: dense bfloat16 or float16, two operations a multiply-accumulate


def mac_ratios() -> Iterator[Check]:
    """Every Speedup column as the ratio of the TFLOPs column."""
    for table_number in COMPARISONS:
        for row in table(table_number):
            if row is not (uncached := reference(table_number, row)):
                yield printed_ratio(name(table_number, row), row["speedup"], uncached["tmacs"], row["tmacs"])
    uncached = find(2, method="DiT-XL/2", resolution=256, sampled_steps=50)
    for table_number, key, symbol in ((7, "cache_ratio", "r"), (9, "k", "K")):
        for row in table(table_number):
            where = f"Table {ROMAN[table_number]}, {symbol} = {row[key]}"
            yield printed_ratio(where, row["speedup"], uncached["tmacs"], row["tmacs"])


def latency_ratios() -> Iterator[Check]:
    """Every Speedup column as the ratio of the latency column."""
    for table_number in COMPARISONS:
        for row in table(table_number):
            if row is not (uncached := reference(table_number, row)):
                ratio = float(uncached["latency_s"]) / float(row["latency_s"])
                why = f"{uncached['latency_s']} s / {row['latency_s']} s" + (
                    "; slower than uncached" if ratio < 1 else ""
                )
                yield number(name(table_number, row), row["speedup"], ratio, why, LATENCY_TOLERANCE)


def latencies() -> Iterator[Check]:
    """Latencies of plain sampling against the number of steps, and against what the hardware can do."""
    for table_number in COMPARISONS:
        for row in table(table_number):
            uncached = reference(table_number, row)
            if row["method"] == uncached["method"] and row is not uncached:
                derived = float(uncached["latency_s"]) * int(row["sampled_steps"]) / int(row["nfe"])
                why = f"{row['sampled_steps']}/{row['nfe']} of {uncached['latency_s']} s"
                yield number(name(table_number, row), row["latency_s"], derived, why, LATENCY_TOLERANCE)
    for table_number in COMPARISONS:
        for uncached, *_ in settings(table_number):
            work, seconds = 2 * BATCH * float(uncached["tmacs"]), float(uncached["latency_s"])
            possible = seconds >= work / A100_TFLOPS
            yield statement(
                f"{name(table_number, uncached)}: a batch of {BATCH} on an A100",
                f"{uncached['latency_s']} s",
                f"at least {work / A100_TFLOPS:.2f} s",
                possible,
                f"{work / seconds:.0f} TFLOP/s of {A100_TFLOPS}"
                + ("" if possible else f"; one sample instead of {BATCH}, or {BATCH} GPUs, would fit"),
            )


def equal_compute() -> Iterator[Check]:
    """Whether caching methods that are compared have equal TMACs."""
    for table_number in COMPARISONS:
        for group in settings(table_number):
            tmacs = column([row for row in group if row["method"] != group[0]["method"]], "tmacs")
            spread = max(tmacs) / min(tmacs) - 1
            where, found = name(table_number, group[0]), f"{min(tmacs):.2f} to {max(tmacs):.2f}"
            yield statement(where, "equal", found, spread <= 0.05, f"+{spread:.1%}")


def twice_printed() -> Iterator[Check]:
    """The same setting in two tables, and equal digits in different settings."""
    ours, quality = find(2, method="TokenCache", resolution=256, nfe=50), ("is", "fid", "sfid", "precision", "recall")
    pairs = (
        (7, "r = 0.9", find(7, cache_ratio="0.9"), 2, ours, (*quality, "tmacs", "speedup")),
        (8, "Ours", find(8, strategy="TokenCache"), 2, ours, quality[:3]),
        (9, "K = 4", find(9, k=4), 2, ours, ("is", "fid", "tmacs", "speedup")),
        (6, "Cache Predictor", find(6, strategy="Cache Predictor"), 3, find(3, method="TokenCache"),
         ("coco_fid", "coco_clip", "parti_clip")),
    )  # fmt: skip
    notes = {
        (7, "fid"): "; so not of 50,000 samples, which Sec. IV-B names",
        (9, "tmacs"): "; fits 11 full steps, not 12",
    }
    for first, label, row, second, other, keys in pairs:
        for key in keys:
            where, why = (
                f"Table {ROMAN[first]}, {label}: {HEADERS[key]}",
                f"Table {ROMAN[second]}{notes.get((first, key), '')}",
            )
            yield same(where, row[key], other[key], why)
    reverse, fewer = find(8, strategy="Reverse Selection"), find(2, method="DiT-XL/2", resolution=256, sampled_steps=26)
    yield statement(
        "Table VIII, Reverse Selection: IS",
        reverse["is"],
        fewer["is"],
        None,
        f"the digits of {name(2, fewer)}, though FID is {reverse['fid']} here and {fewer['fid']} there: chance, or a "
        "copied cell",
    )
    fora, other = (find(2, method=method, resolution=256, nfe=50) for method in ("FORA", "Learning-to-Cache"))
    period_2 = ledger("256", 50, "learning_to_cache")["full_steps"]
    evenly = round(50 * float(fora["tmacs"]) / float(reference(2, fora)["tmacs"]))
    yield statement(
        f"{name(2, fora)}: FID",
        fora["fid"],
        other["fid"],
        None,
        f"{name(2, other)}, which by its MACs is FORA with period 2, {period_2} full steps instead of "
        f"{evenly}; FORA's code can only sample with ancestral DDPM, and the table says DDIM",
    )
