"""A whole suite in one process, from config to table and picture: what the workflow does in many, for a first look.

Importing torch takes longer than many a row, and is paid once here. Files are those of the workflow, so that either
goes on where the other stopped; ablations, diagnostics and VBench are the workflow's alone.
"""

import time

from tqdm import tqdm

from tcbench.config.suite import Suite
from tcbench.report.beside import OURS
from tcbench.stages.latency import measure_latency
from tcbench.stages.render import render_grids, render_strips, render_tables
from tcbench.stages.sample import sample_rows
from tcbench.stages.score import measure_floor, score_rows
from tcbench.stages.search import search_row
from tcbench.stages.train import train_row

WITHOUT_OURS = (
    "TokenCache is trained, so it is not here: `tcbench run digits`, or results/reference/digits/tables/table2.md"
)


def run_here(suite: Suite, started: float) -> None:
    """Train, search, sample, score, time and render; print the first table and where the pictures are.

    Args:
        started: when the command was, seconds since the epoch: what it took is counted from there.

    Raises:
        UserError: as the stages do.
    """
    for name in suite.trained_rows:
        if not (suite[name].trained / "artefacts.json").exists():
            train_row(suite[name])
    for name in suite.searched_rows:
        if not suite[name].searched.exists():
            search_row(suite[name])
    sample_rows(suite.entries)
    score_rows(suite.entries, missing=True)
    measure_floor(suite)
    measure_latency(suite, missing=True)
    tables = render_tables(suite, suite.folder)
    render_strips(suite, suite.folder, suite.folder)
    render_grids(suite, suite.folder)
    for table in tables.values():
        print(table.lead_text())
    if all(row.method != OURS for row in suite.rows.values()):
        tqdm.write(WITHOUT_OURS)
    pictures = sorted((suite.folder / "grids").glob("nfe*.png"))
    tqdm.write(f"pictures: {', '.join(map(str, pictures))}; tables: {suite.folder / 'tables'}")
    tqdm.write(f"{time.time() - started:.0f} s; the page of everything: tcbench report {suite.suite}")
