"""`tcbench golden`: the harness against outputs of the original public code, case by case.

A case is `NAME.json` (the settings it was made with) beside `NAME.safetensors` (what came out); all cases of a
directory share `weights.safetensors` and `inputs.safetensors`, cases of PixArt-alpha `pixart_weights.safetensors` and
`pixart_inputs.safetensors`; those of Open-Sora-Plan have a folder like its checkpoint's. docs/goldens.md describes the
format. What the settings call for is run with this package's methods, engine and samplers, and the largest error of
every quantity is reported.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcbench.errors import UserError
from tcbench.golden.case import Case, Unsupported
from tcbench.golden.kinds import KINDS


def case_names(directory: Path) -> list[str]:
    """Every NAME.json with a NAME.safetensors, but for the weights.

    Raises:
        UserError: there is no such directory, or no case in it.
    """
    stems = sorted(path.stem for path in directory.glob("*.json") if path.with_suffix(".safetensors").exists())
    names = [stem for stem in stems if stem != "weights"]
    if not names:
        raise UserError(f"{directory}: no case (NAME.json beside NAME.safetensors) there; see docs/goldens.md")
    return names


def check_case(directory: Path, name: str) -> dict[str, Any]:
    """Run one case: its kind, whether it passed, and largest error and tolerance by quantity.

    Raises:
        Unsupported: no kind matches, or the kind cannot run it.
        UserError: a file is damaged or lacks a field.
    """
    case = Case(directory, name)
    kind = next((kind for kind in KINDS if KINDS[kind].matches(case)), None)
    if kind is None:
        raise Unsupported(_unmatched(case))
    quantities, tolerances = {}, KINDS[kind].tolerances
    allowed = tolerances(case) if callable(tolerances) else tolerances
    for quantity, error in KINDS[kind].run(directory, name).items():
        tolerance = allowed.get(quantity, 0.0)
        largest_error = error if math.isfinite(error) else None  # JSON has no NaN
        quantities[quantity] = {"error": largest_error, "tolerance": tolerance, "passed": error <= tolerance}
    return {"kind": kind, "passed": all(entry["passed"] for entry in quantities.values()), "quantities": quantities}


def _unmatched(case: Case) -> str:
    if method := case.settings.get("method"):
        return f"needs the method {method!r}, which no entry of tcbench/golden/rivals.py or deciders.py answers"
    return f"no kind of case ({', '.join(KINDS)}) matches its source, {case.settings.get('source')!r}"


def check(directory: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """Run the cases of a directory, or some of them by name.

    Returns:
        JSON-able: `passed`, `cases` (see `check_case`) and `skipped` (the reason, by name).

    Raises:
        UserError: no such case, a damaged file, or nothing that could be compared.
    """
    known, cases, skipped = case_names(directory), {}, {}
    if unknown := set(names) - set(known):
        raise UserError(f"{directory}: no case {min(unknown)!r}; cases: {', '.join(known)}")
    for name in names or known:
        try:
            cases[name] = check_case(directory, name)
        except Unsupported as reason:
            skipped[name] = str(reason)
    if not cases:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"{directory}: nothing could be compared; {reasons}")
    return {"passed": all(case["passed"] for case in cases.values()), "cases": cases, "skipped": skipped}
