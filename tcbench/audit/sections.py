"""The audit's sections, in the order of its page."""

from tcbench.audit import cells, columns, text
from tcbench.audit.checks import Section
from tcbench.audit.paper import LATENCY_TOLERANCE, TOLERANCE

_LEDGER = (
    f"Tolerance {TOLERANCE:.0%}. Derived: the ledger on the full-size model, by the paper's rule (matrix products plus "
    "4 per LayerNorm element, docs/reproduction-notes.md), without the predictor, because that is what fits."
)


def audit() -> list[Section]:
    """All checks."""
    parts = (
        ("TMACs of Table II", _LEDGER, cells.class_conditional()),
        (
            "TMACs of Tables III to V",
            f"Tolerance {TOLERANCE:.0%}. Uncached cells: the model's formula. Others: the table's own uncached cell "
            "times what the method's rule computes; a P-step costs (K + (1 - r)(L - K)) / L of a full one.",
            cells.text_conditional(),
        ),
        ("TMACs of Tables VII and IX", _LEDGER, cells.ablations()),
        (
            "What the predictor costs",
            f"Tolerance {TOLERANCE:.0%}. With it, TokenCache's rivals have larger budgets than the paper gave them.",
            cells.predictor(),
        ),
        ("What a TFLOP is", f"Tolerance {TOLERANCE:.0%}. First cell of Table II.", cells.units()),
        ("Speedup as a ratio of MACs", "Derived from printed cells, each rounded or truncated.", columns.mac_ratios()),
        (
            "Speedup as a ratio of latencies",
            f"Tolerance {LATENCY_TOLERANCE:.0%}. A conflict means that the column cannot be read as time.",
            columns.latency_ratios(),
        ),
        (
            "Latency of plain sampling",
            f"Tolerance {LATENCY_TOLERANCE:.0%} for proportionality to steps. The bound is the work of a batch at the "
            "dense half-precision peak of the GPU that Sec. IV-B names.",
            columns.latencies(),
        ),
        (
            "Equal compute",
            'Sec. IV-A: "equalized multiply-accumulate operations (MACs) per step to match overall FLOPs". Largest '
            "over smallest of the caching methods; up to 5 % is let pass.",
            columns.equal_compute(),
        ),
        ("The same setting in two tables", "Equal up to the last digit of the coarser print.", columns.twice_printed()),
        (
            "The text against the tables",
            "Tested on the printed numbers; the paper has no intervals.",
            text.statements(),
        ),
        ("Eq. (13) as printed", "docs/reproduction-notes.md, reading 4, says what is done instead.", text.equations()),
    )
    return [Section(title, rule, [*checks]) for title, rule, checks in parts]
