"""The table of searches: what was tried for every row that something was searched for, and what was found."""

from collections.abc import Sequence
from itertools import accumulate

import pandas as pd

from tcbench.record.records import Searched
from tcbench.report.cells import options_text, table_title
from tcbench.report.results import Results
from tcbench.report.table import Table


def so_far(search: Searched) -> list[float]:
    """After every trial, the smallest distance to the uncached samples until then."""
    return list(accumulate((trial["deviation"] for trial in search["trials"]), min))


def search_told(search: Searched) -> str:
    """A search in a sentence."""
    found = so_far(search)
    return (
        f"{len(found)} trials on calibration noise, distance {found[0]:.4f} at the first, {found[-1]:.4f} at the best: "
        f"{options_text(search['options'])}; {search['ended']}"
    )


def searches_table(results: Results) -> Table | None:
    """A line for every search; None if the suite has none."""
    if not results.searched:
        return None
    suite, records, cells = results.suite, [], []
    nfes = list(dict.fromkeys(suite.find(name).nfe for name in results.searched))
    for name in sorted(results.searched, key=lambda name: nfes.index(suite.find(name).nfe)):
        entry, search = suite.find(name), results.searched[name]
        found = so_far(search)
        record = {
            "suite": suite.suite,
            "row": name,
            "method": entry.row.method,
            "label": entry.label,
            "nfe": entry.nfe,
            "trials": len(found),
            "first_deviation": found[0],
            "best_deviation": found[-1],
            "best_trial": found.index(found[-1]) + 1,
            "found": options_text(search["options"]),
            "ended": search["ended"],
        }
        records.append(record)
        cells.append(
            {
                "Method": entry.label,
                "Row": name,
                "Trials": str(record["trials"]),
                "First distance": f"{found[0]:.4f}",
                "Best distance": f"{found[-1]:.4f}",
                "Best at trial": str(record["best_trial"]),
                "Chosen": str(record["found"]),
                "Ended": search["ended"],
            }
        )
    return Table(
        title=table_title("Searches", suite.suite, suite.about.differs),
        caption=_caption([*results.searched.values()]),
        tidy=pd.DataFrame(records),
        formatted=pd.DataFrame(cells),
        groups=[f"NFE {record['nfe']}" for record in records],
        text_columns=("Method", "Row", "Chosen", "Ended"),
    )


def _caption(searches: Sequence[Searched]) -> str:
    allowed = {(spent["samples"], spent["trials"]) for each in searches if (spent := each["settings"].get("search"))}
    spent = " or ".join(f"{samples} samples a trial, {trials} trials at most" for samples, trials in sorted(allowed))
    return (
        "Distance: mean absolute difference to the uncached samples of the same calibration noise, which no evaluated "
        f"sample shares{f'; {spent}' if spent else ''}. First: the row's own list of full steps, or the first "
        "combination of options. Best is the smallest of all trials, so that it flatters; how a row does on other "
        "noise is in the other tables. Full steps are counted from 0 in sampling order."
    )
