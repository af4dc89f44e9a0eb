"""index.html over the suites below a folder: how the paper's claims come out in each, and where its pages are."""

from pathlib import Path
from typing import Any

import pandas as pd

from tcbench.errors import UserError
from tcbench.report.page import PAPER, SYMBOLS, counts_by_kind
from tcbench.report.table import template
from tcbench.report.verdicts import read_all_verdicts

PAGES = (("report.html", "report"), ("tables/verdicts.html", "verdicts"), ("grids", "samples"))


def index_page(folder: Path) -> str:
    """The page; links to what is there are relative, so that the folder can be moved.

    Raises:
        UserError: no suite has tables there, or its verdicts are damaged.
    """
    there = sorted({path.parent.parent for path in folder.glob("*/tables/*.md")})
    if not there:
        raise UserError(f"{folder}: no suite has tables there (*/tables/*.md); run `tcbench tables` for one")
    verdicts = read_all_verdicts(folder) if any(folder.glob("*/tables/verdicts.csv")) else {}
    suites = [_suite(path, verdicts.get(path.name)) for path in there]
    return template("index.html.j2").render(suites=suites, symbols=SYMBOLS, paper=PAPER)


def _suite(path: Path, verdicts: pd.DataFrame | None) -> dict[str, Any]:
    tables = [table for table in sorted((path / "tables").glob("*.md")) if table.stem != "verdicts"]
    shown = [table.with_suffix(".html") if table.with_suffix(".html").exists() else table for table in tables]
    pages = [(name, path / page) for page, name in PAGES]
    return {
        "name": path.name,
        "title": tables[0].read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") if tables else "",
        "pages": [(name, page.relative_to(path.parent).as_posix()) for name, page in pages if page.exists()],
        "tables": [(table.stem, table.relative_to(path.parent).as_posix()) for table in shown],
        "counts": counts_by_kind(verdicts) if verdicts is not None else {},
    }
