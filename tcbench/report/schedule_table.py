"""The paper's Table I: full steps and beta, and the I-steps that they choose."""

from collections.abc import Sequence

import pandas as pd

from tcbench.errors import UserError
from tcbench.report.cells import NO_CELL, table_title
from tcbench.report.rows import Row, resolution_of, suite_of, was_run
from tcbench.report.table import Table

PAPER_TABLE_1 = {
    ("DiT-XL/2", 256, 250): (50, -6000),
    ("DiT-XL/2", 256, 50): (12, -8000),
    ("DiT-XL/2", 256, 20): (9, -4000),
    ("DiT-XL/2", 256, 10): (6, -2000),
    ("DiT-XL/2", 512, 50): (21, -4000),
    ("DiT-XL/2", 512, 20): (10, -2000),
    ("Open-Sora-Plan", 256, 50): (18, -8000),
}
"""(model, resolution, NFE) -> (#Full, beta), as printed."""


def table1(rows: Sequence[Row], *, differs: str, stands_for: tuple[str, int] | None = None) -> Table:
    """The paper's Table I: full steps and beta per model, resolution and NFE, and the chosen I-steps.

    Args:
        rows: score rows; those scheduled by a `beta` setting enter, and rows that share a schedule once.
        differs: as in `main_table.main_table`.
        stands_for: (model, resolution) of the paper whose line is printed beside ours; None: the row's own.

    Raises:
        UserError: no row is scheduled by `beta`, or rows belong to several suites.
    """
    suite = suite_of(rows)
    lines = {}
    for row in rows:
        settings = row["settings"]
        by_beta = settings.get("schedule") == "adaptive" and not settings.get("full_steps")
        if not by_beta or settings.get("beta") is None or not was_run(row):
            continue
        model, resolution = stands_for or (row["model"], row["resolution"])
        paper_full, paper_beta = PAPER_TABLE_1.get((model, resolution, row["nfe"]), (None, None))
        record = {
            "suite": suite,
            "model": row["model"],
            "resolution": row["resolution"],
            "nfe": row["nfe"],
            "num_full_steps": settings["num_full_steps"],
            "paper_num_full_steps": paper_full,
            "beta": settings["beta"],
            "paper_beta": paper_beta,
            "i_steps": " ".join(str(step) for step in row["i_steps"]),
            "paper_model": model,
            "paper_resolution": resolution,
        }
        lines[tuple(record.values())] = (
            record,
            {
                "Model": record["model"],
                "Resolution": resolution_of(row),
                "NFE": str(record["nfe"]),
                "#Full": str(record["num_full_steps"]),
                "paper #Full": NO_CELL if paper_full is None else str(paper_full),
                "β": f"{record['beta']:g}",
                "paper β": NO_CELL if paper_beta is None else str(paper_beta),
                "I-steps": record["i_steps"],
                "paper setting": f"{model}, {resolution}×{resolution}" if stands_for or paper_full else NO_CELL,
            },
        )
    if not lines:
        raise UserError(f"suite {suite}: Table I needs a row with settings.beta; add a TokenCache row to the config")
    records, cells = zip(*lines.values(), strict=True)
    return Table(
        title=table_title("Table I", suite, differs),
        caption="#Full: number of full sampling steps, the first included. β: the exponent of Eq. (13). "
        f"I-steps: the steps it chose, counted from 0 in sampling order. {NO_CELL}: the paper has no such line.",
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        text_columns=("Model", "I-steps", "paper setting"),
    )
