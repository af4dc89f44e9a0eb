"""The table of one-step local errors: what the claim rests on that a selector picks the right tokens."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tcbench.report.cells import NO_CELL, spread_text, table_title
from tcbench.report.table import Table


def table_local_error(diagnostics: Sequence[dict[str, Any]], nfe: dict[str, int], *, suite: str, differs: str) -> Table:
    """One-step local error of token selectors at equal budgets; no table of the paper, but what its claim rests on.

    Args:
        diagnostics: contents of `diagnostics/<row>.json`.
        nfe: NFE by row.
        suite, differs: as in `main_table.main_table`.
    """
    records, cells, groups = [], [], []
    for diagnostic in diagnostics:
        none = diagnostic["cases"][0]["error"]
        for case in diagnostic["cases"]:
            records.append(
                {
                    "suite": suite,
                    "row": diagnostic["row"],
                    "nfe": nfe[diagnostic["row"]],
                    **{key: case.get(key) for key in ("selector", "allocation", "keys", "cache_ratio")},
                    "error": case["error"],
                    "standard_error": case["standard_error"],
                    "error_over_none": case["error"] / none,
                }
            )
        groups += [f"NFE {nfe[diagnostic['row']]}, {diagnostic['pairs']} pairs"] * len(diagnostic["cases"])
    for record in records:
        cells.append(
            {
                "Selector": record["selector"],
                "Tokens per block": record["allocation"] or NO_CELL,
                "Keys": record["keys"] or NO_CELL,
                "Cache ratio": NO_CELL if record["cache_ratio"] is None else f"{record['cache_ratio']:g}",
                "Error ± s.e.": spread_text(record["error"], record["standard_error"]),
                "over recomputing none": f"{record['error_over_none']:.2f}",
            }
        )
    return Table(
        title=table_title("One-step local error of token selection", suite, differs),
        caption="Squared error of the last block's output against the uncached one, summed over tokens and channels, "
        "mean over pairs of neighbouring sampling steps; the cache is one step old and refiners run without LoRA. "
        "Keys: what recomputed tokens attend to. Tokens per block: shared out by the scores of the batch (Eq. 12) or "
        "uniformly. The oracle ranks tokens by the squared change of their update.",
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=groups,
        text_columns=("Selector", "Tokens per block", "Keys"),
    )
