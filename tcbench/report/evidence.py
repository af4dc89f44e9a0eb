"""What a method's rows rest on: settings and who chose them, what was trained, what was recomputed and at what cost,
how they stand against fewer steps, and which outputs of the original code the implementation is held to."""

import sys
from typing import Any

import numpy as np

from tcbench.config.suite import Entry
from tcbench.metrics.catalogue import METRICS
from tcbench.record.executed import PlanRecord
from tcbench.registry import documentation, method_class
from tcbench.report.cells import difference_text
from tcbench.report.compare import compare, decide_together
from tcbench.report.results import Results
from tcbench.report.rows import (
    MATCHED,
    Row,
    fewer_steps_matched,
    kept_shares,
    label_of,
    mac_ratio,
    name_of,
    timings_of,
    was_run,
)
from tcbench.report.schedule_table import PAPER_TABLE_1
from tcbench.report.searches_table import search_told

UNCACHED = ("full_ddim20", "pixart_full_dpm20")
GOLDEN_CASES = {
    "uncached": UNCACHED,
    "fewer_steps": UNCACHED,
    "fora": ("fora_ddim20_n3",),
    "learning_to_cache": ("l2c_ddim20", "l2c_router_train_soft"),
    "toca": ("toca_ddim20_r0.07_n4", "pixart_toca_dpm20_r0.30_n3"),
}
"""Cases of `tests/golden` by the method that they prove (docs/goldens.md)."""

RIVAL_CASES = {
    "clusca": ("clusca_ddim20_n4_o2_k16_g0.05",),
    "dbcache": ("dbcache_ddim20_f1b0_t0.6_w3_mcc3_taylor1", "dbcache_ddim20_f1b1_t0.7_w3_mcc4"),
    "duca": ("duca_ddim20_n3_r0.10_random", "duca_ddim20_n4_r0.07"),
    "first_block": ("fbcache_ddim20_t0.6",),
    "goc": ("goc_fora_ddim20", "goc_l2c_ddim20"),
    "harmonica": ("harmonica_ddim20_thr0.1",),
    "hicache": ("hicache_ddim20_n4_o2_s0.5",),
    "lazydit": ("lazydit_ddim20_thr0.5",),
    "magcache": ("magcache_ddim20_t0.12_k3",),
    "procache": ("procache_ddim50_r0.07_kvnorm",),
    "seacache": ("seacache_ddim20_t0.25_o1_m2_p2",),
    "smoothcache": ("smoothcache_calibration_ddim20_k3", "smoothcache_ddim20_a0.25"),
    "speca": ("speca_ddim20_b1.0_d0.2_min1_max6_o2",),
    "taylorseer": ("taylorseer_ddim20_n4_o1", "taylorseer_diffusers_ddim20_i4_b3_o2"),
}
"""Those of `tests/golden-rivals`; methods in neither have no public original, or none that runs on a DiT."""


def evidence(results: Results) -> list[dict[str, Any]]:
    """By method, in the suite's order: what it is and is proved by, and its rows.

    A row's `kept` is the share of tokens that every step recomputed in every unit of its plan, [S, units]; None where
    everything is computed.
    """
    run = [row for row in results.rows if was_run(row)]
    return [
        {
            "method": method,
            "label": method_class(method).label,
            "about": sys.modules[method_class(method).__module__].__doc__,
            "options": documentation(method_class(method)),
            "goldens": GOLDEN_CASES.get(method) or RIVAL_CASES.get(method, ()),
            "golden_folder": "tests/golden" if method in GOLDEN_CASES else "tests/golden-rivals",
            "rows": [_of_row(row, results) for row in run if row["method"] == method],
        }
        for method in dict.fromkeys(row["method"] for row in run)
    ]


def _of_row(row: Row, results: Results) -> dict[str, Any]:
    macs, kept = row["macs"], kept_shares(row) if row["plan"] else None
    timing, _ = timings_of(row["row"], row["reference"], results.latency)
    return {
        "row": row["row"],
        "label": label_of(row),
        "nfe": row["nfe"],
        "kept": kept,
        "units": PlanRecord.from_lines(row["plan"]).units,
        "summary": _summary(row, kept),
        "ratio": f"{mac_ratio(row, results.rows):.2f}",
        "macs": {tag: (f"{count / 1e9:.4g}", count) for tag, count in macs["by_tag"].items()},
        "total": macs["per_sample"],
        "spread": row["macs_spread"],
        "i_steps": " ".join(map(str, row["i_steps"])),
        "full": len(row["i_steps"]),
        "latency": f"{timing['median_s']:.3g} s per batch" if timing else "not timed",
        "cache": f"{row['cache_bytes'] / 1e6:.3g} MB",
        "settings": [
            (option, value, chosen_by(results.suite[row["row"]], option, value))
            for option, value in row["settings"].items()
        ],
        "trained": _trained(row, results),
        "searched": search_told(results.searched[row["row"]]) if row["row"] in results.searched else "",
        "fewer_steps": _against_fewer_steps(row, results),
        "same": ", ".join(name_of(other) for other in _same_plan(row, results)),
    }


def chosen_by(entry: Entry, option: str, value: Any) -> str:
    """Who set an option of a row.

    That is the paper's Table I, a search, a solved budget, another row, the row, the suite, or the method's default.
    """
    suite, searched = entry.suite, entry.row.searched
    if option == "full_steps" and entry.row.full_steps_of:
        return f"the full steps of {entry.row.full_steps_of}"
    if (searched is True and option == "full_steps") or (isinstance(searched, dict) and option in searched):
        return "searched on calibration noise"
    if entry.row.target and option == entry.method.knob:
        return f"solved for the MACs of {entry.row.target}"
    stands_for = (suite.about.stands_for.name, suite.about.stands_for.resolution) if suite.about.stands_for else ("", 0)
    published = dict(zip(("num_full_steps", "beta"), PAPER_TABLE_1.get((*stands_for, entry.nfe), ()), strict=False))
    if option in published and published[option] == value:
        return "the paper, Table I"
    if option in entry.row.options:
        return "the row"
    return "the suite" if option in suite.defaults.get(entry.row.method, {}) else "the method's default"


def _summary(row: Row, kept_SU: np.ndarray | None) -> str:
    """The plan in a sentence."""
    if kept_SU is None:
        return "everything is computed at every step"
    partial = (kept_SU < 1).any(1)
    text = f"{(~partial).sum()} of {len(kept_SU)} steps in full"
    if not partial.any():
        return text
    tokens = kept_SU[partial].mean() * row["tokens"]
    return (
        f"{text}; on the others {tokens:.1f} of {row['tokens']} tokens are recomputed in each of {kept_SU.shape[1]} "
        "units of the plan (mean), and all tokens in what the plan leaves out"
    )


def _trained(row: Row, results: Results) -> list[str]:
    """What the row samples with, a line per stage of training."""
    trained_as = results.suite[row["row"]].trained_as
    if trained_as is None:
        return ["nothing"]
    source = trained_as.name
    if source not in results.training:
        return [f"as {source}, whose log was not stored"]
    lines = [] if source == row["row"] else [f"nothing of its own; it samples with what was trained for {source}:"]
    for stage in results.training[source]["stages"]:  # as `tcbench.training.caching.train` logs them
        lists = {key: values for key, values in stage.items() if isinstance(values, list) and values}
        losses = {key: values[-1] for key, values in lists.items() if key.endswith(("loss", "alpha", "gate"))}
        told = [f"{stage['iterations']} iterations of {stage['batch_size']}"] if "iterations" in stage else []
        told += [f"{stage['samples']} samples"] if "samples" in stage else []
        told += [f"λ {stage['cost_weight_used']:.2g}"] if "cost_weight_used" in stage else []
        told += [f"last {key.replace('_', ' ')} {value:.3g}" for key, value in losses.items()]
        told += [f"{stage['held_out_loss_without']:.3g} without refiners"] if "held_out_loss_without" in stage else []
        told += [stage["ended"]] if "ended" in stage else []
        told += [f"{stage['wall_s']:.0f} s", *stage.get("marks", ())]
        lines.append(f"{stage['kind']}: {', '.join(told)}")
    lora = {True: "at every step", False: "left out", "p-steps": "on P-steps alone"}[row["refiners"]]
    return [*lines, f"LoRA refiners: {lora}"] if "refiners" in results.training[source]["files"] else lines


def _against_fewer_steps(row: Row, results: Results) -> str:
    """Quality less that of the uncached model with as many steps as cost the same; differences corrected together."""
    if row["method"] in ("fewer_steps", "uncached"):
        return ""
    other = fewer_steps_matched(row, results.rows)
    if other is None:
        return f"no row of fewer steps is within {MATCHED:.0%} of its MACs"
    decided = decide_together([compare(row, other, metric) for metric in row["quality"] if metric in METRICS])
    told = [f"{METRICS[found.metric].label} {difference_text(found.interval)} {found.outcome}" for found in decided]
    return f"this less {label_of(other)}: " + "; ".join(told)


def _same_plan(row: Row, results: Results) -> list[Row]:
    """Other rows whose executed plan is this one's, which makes the comparison one of names."""
    return [
        other
        for other in results.rows
        if row["plan"] and was_run(other) and other["plan"] == row["plan"]
        if other["nfe"] == row["nfe"] and other["row"] != row["row"]
    ]
