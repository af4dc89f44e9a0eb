"""The tables of ablations: variants of a row side by side, each compared with the one that changes nothing."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pandas as pd

from tcbench.config.fields import Ablation
from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.record.yardstick import Yardstick
from tcbench.report.cells import (
    NO_CELL,
    difference_record,
    difference_text,
    mac_unit,
    mark_of,
    marks,
    marks_explained,
    table_title,
)
from tcbench.report.compare import Margins, compare
from tcbench.report.rows import Row, interval_of, mac_ratio, macs_of, paper_of, quality_of, remarks
from tcbench.report.table import Table
from tcbench.report.yardstick import yardsticks_told
from tcbench.stats import Interval


def table_ablation(
    ablation: Ablation,
    rows: Sequence[Row],
    variants: Sequence[str],
    *,
    suite: str,
    differs: str,
    margins: Margins | None = None,
    seed_noise: Mapping[str, Yardstick] = MappingProxyType({}),
) -> Table:
    """Quality and cost of every variant.

    Args:
        ablation: as in the config.
        rows: score rows of the variants and their references.
        variants: ids of the rows to print; the first is the one that others are compared with at its CFG scale.
        suite, differs: as in `main_table.main_table`.
        margins: what is equivalent, of the suite's own rows; without them nothing is.
        seed_noise: yardsticks by uncached row of the suite.

    Raises:
        UserError: there is no variant.
    """
    printed = [row for row in rows if row["row"] in variants]
    if not printed:
        raise UserError(f"suite {suite}: the ablation {ablation.title!r} has no rows")
    metrics = [m for m in METRICS if METRICS[m].printed and any(quality_of(row, m) for row in printed)]
    bases = {row["row"]: _base(row, printed) for row in printed}
    compared = [
        compare(row, bases[row["row"]], m, margins) for row in printed if bases[row["row"]] is not row for m in metrics
    ]
    found = marks([each for each in compared if each], variants)
    unit = mac_unit(max(map(macs_of, printed)))
    with_paper = [m for m in metrics if any(m in paper_of(row) for row in printed)]
    swept = len({row["guidance_scale"] for row in printed}) > 1
    records, cells = [], []
    for row in printed:
        paper, ratio = paper_of(row), mac_ratio(row, rows)
        record = {"suite": suite, "row": row["row"], "variant": row["label"], "nfe": row["nfe"]}
        record["guidance_scale"] = row["guidance_scale"]
        cell = {"Variant": row["label"]} | ({"CFG scale": f"{row['guidance_scale']:g}"} if swept else {})
        for metric in metrics:
            interval = interval_of(row, metric)
            record |= {f"{metric}{end}": interval and getattr(interval, key) for end, key in _ENDS}
            record |= difference_record(metric, found.get((row["row"], metric)))
            name = METRICS[metric].label
            cell[name] = NO_CELL if interval is None else _text(interval, mark_of(row, metric, found))
            if metric in with_paper:
                record[f"paper_{metric}"] = paper.get(metric)
                cell[f"paper {name}"] = f"{paper[metric]:.2f}" if metric in paper else NO_CELL
        macs = row["macs"]
        record |= {
            "macs_per_sample": macs["per_sample"],
            "macs_without_overheads": macs["per_sample_without_overheads"],
        }
        record |= {"mac_ratio": ratio, "paper_mac_ratio": paper.get("speedup")}
        cell |= {
            unit.name: f"{macs['per_sample'] / unit.macs:.4g}",
            f"{unit.name} without overheads": f"{macs['per_sample_without_overheads'] / unit.macs:.4g}",
            "MAC ratio": f"{ratio:.2f}",
        }
        if any("speedup" in paper_of(other) for other in printed):
            cell["paper MAC ratio"] = f"{paper['speedup']:.2f}" if "speedup" in paper else NO_CELL
        records.append(record)
        cells.append(cell)
    first = printed[0]
    caption = (
        f"{ablation.question} {first['samples']} samples per row in {first['groups']} batches; value [95 % interval], "
        f"delete-one-batch jackknife. Marks compare with `{first['label']}`"
        + (" at the same CFG scale" if swept else "")
        + ", paired on noise and labels where both were run on the same batches. "
        f"{marks_explained(printed, metrics, found)} {unit.name}: per sample, "
        "all that a variant computes. Ratios are to the uncached run at the same NFE."
    )
    caption = " ".join(filter(None, [caption, yardsticks_told(seed_noise, printed, metrics), *remarks(printed)]))
    return Table(
        title=table_title(ablation.title, suite, differs),
        caption=caption,
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=[f"NFE {row['nfe']}" for row in printed],
        text_columns=("Variant",),
    )


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))


def _base(row: Row, rows: Sequence[Row]) -> Row:
    """The variant to compare with: the first one, at the row's CFG scale."""
    return next(other for other in rows if other["guidance_scale"] == row["guidance_scale"])


def _text(interval: Interval, mark: str) -> str:
    return f"{difference_text(interval)} {mark}".rstrip()
