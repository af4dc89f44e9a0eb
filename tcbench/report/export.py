"""Every number of some suites in one tidy table: a line for each row and metric, for notebooks and other programs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tcbench.errors import UserError
from tcbench.record.files import write_text
from tcbench.record.records import LATENCY, SCORE
from tcbench.record.score import score_files
from tcbench.report.rows import Row, interval_of, mac_ratio, timings_of, was_run

COLUMNS = (
    *("suite", "ablation", "row", "method", "label", "control", "model", "nfe", "sampled_steps", "guidance_scale"),
    *("samples", "metric", "value", "low", "high", "macs", "macs_without_overheads", "mac_ratio", "not_run"),
)
"""`ablation` is empty for the rows of tables; `low` and `high` are the 95 % interval, of `latency_s` the extremes."""


def export(folders: Sequence[Path]) -> pd.DataFrame:
    """All numbers of the suites in these folders, a line each; a row that was not run has one line that says why.

    Args:
        folders: results of a suite, or folders of such.

    Raises:
        UserError: a folder holds no scores, or a score is damaged.
    """
    lines: list[dict[str, Any]] = []
    for folder in folders:
        suites = [folder] if (folder / "scores").is_dir() else sorted(path.parent for path in folder.glob("*/scores"))
        if not suites:
            raise UserError(f"{folder}: holds no scores; give results/SUITE, or a folder of such as results/reference")
        for suite in suites:
            lines += _lines(suite, "")
            for ablation in sorted(path.parent for path in suite.glob("ablations/*/scores")):
                lines += _lines(ablation, ablation.name)
    return pd.DataFrame(lines, columns=list(COLUMNS)).convert_dtypes()


def _lines(folder: Path, ablation: str) -> Iterator[dict[str, Any]]:
    rows = [SCORE.read(path) for path in score_files(folder)]
    timed = LATENCY.read(folder / "latency.json") if (folder / "latency.json").exists() else None
    for row in rows:
        known = {key: value for key, value in row.items() if key in COLUMNS} | {"ablation": ablation}
        if not was_run(row):
            yield known
            continue
        known |= {
            "macs": row["macs"]["per_sample"],
            "macs_without_overheads": row["macs"]["per_sample_without_overheads"],
            "mac_ratio": mac_ratio(row, rows),
        }
        for metric in row["quality"]:
            yield known | {"metric": metric, **_numbers(row, metric)}
        if timing := timings_of(row["row"], row["reference"], timed)[0]:
            times = {"value": timing["median_s"], "low": timing["min_s"], "high": timing["max_s"]}
            yield known | {"metric": "latency_s", **times}


def _numbers(row: Row, metric: str) -> dict[str, float]:
    interval = interval_of(row, metric)
    assert interval
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def write_tidy(table: pd.DataFrame, path: Path) -> None:
    """Write the table as its file's ending says.

    Raises:
        UserError: the ending is none of .csv, .json and .parquet, or pandas lacks what it writes parquet with.
    """
    if path.suffix == ".csv":
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
    elif path.suffix == ".json":
        write_text(path, json.dumps(json.loads(table.to_json(orient="records")), indent=1) + "\n")
    elif path.suffix == ".parquet":
        try:
            table.to_parquet(path, index=False)
        except ImportError as error:
            raise UserError(
                f"{path}: pandas writes parquet with pyarrow; `pip install pyarrow`, or write .csv"
            ) from error
    else:
        raise UserError(f"{path}: give a file that ends in .csv, .json or .parquet")
