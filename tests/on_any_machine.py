"""Runs the tests as other machines would: with fewer instructions, and with two threads.

    python -m tests.on_any_machine [-n WORKERS] [--only SETTING] [arguments of pytest]

One setting after another. Prints a line for each as it ends, the tests that failed, and the largest error beside every
floor of tests/floors.py. Ends with status 1 if a test failed, or if a floor's margin is below `floors.ENOUGH`: then
measure it again, here.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from tests.floors import ENOUGH, RECORD, errors_in

ROOT = Path(__file__).parent.parent

SETTINGS = {
    "as it is": {},
    "2 threads": {"TCBENCH_TEST_THREADS": "2"},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4,AVX512_ICL,AVX512_SPR",
    },
    "SSE": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "NPY_DISABLE_CPU_FEATURES": "X86_V3,X86_V4,AVX512_ICL,AVX512_SPR",
    },
}
"""What limits torch, oneDNN, MKL, OpenBLAS and NumPy, by name; the first is this machine without a limit."""


Error = tuple[float, float]


def run(setting: str, arguments: Sequence[str], folder: Path) -> tuple[dict[str, float], list[str], dict[str, Error]]:
    """(passed, failed and seconds; names of the tests that failed; largest error and what is allowed, by floor)."""
    results, record = folder / "results.xml", folder / "errors"
    record.mkdir()
    command = [sys.executable, "-m", "pytest", "--disable-warnings", f"--junitxml={results}", *arguments]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **SETTINGS[setting], RECORD: str(record)}).returncode
    if status not in (0, 1):  # 1: tests failed
        raise SystemExit(f"on_any_machine: pytest ended with status {status} under {setting!r}")
    suite = ElementTree.parse(results).getroot()[0]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = int(suite.get("tests")) - int(suite.get("skipped")) - len(failed)
    return {"passed": passed, "failed": len(failed), "seconds": float(suite.get("time"))}, failed, errors_in(record)


def main(words: Sequence[str] | None = None) -> int:
    """Status 0 if every test passed under every setting, with enough margin."""
    parser = argparse.ArgumentParser(prog="python -m tests.on_any_machine", description=__doc__, allow_abbrev=False)
    parser.add_argument("-n", dest="workers", help="processes of the tests; as many as cores, at most 8, without it")
    parser.add_argument("--only", choices=SETTINGS, action="append", help="of the settings, this one; may be repeated")
    parsed, arguments = parser.parse_known_args(words)
    if parsed.workers:
        arguments += ["-n", parsed.workers, "--maxprocesses", parsed.workers]
    settings = parsed.only or [*SETTINGS]
    lines, failures, errors = [], [], {}
    for setting in settings:
        print(f"== {setting}:", *(f"{name}={value}" for name, value in SETTINGS[setting].items()), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            counts, failed, errors[setting] = run(setting, arguments, Path(folder))
        lines.append(f"{setting:<10}{counts['passed']:>8}{counts['failed']:>8}{counts['seconds']:>9.0f}")
        print(
            f"== {setting}: {counts['passed']} passed, {counts['failed']} failed, {counts['seconds']:.0f} s", flush=True
        )
        failures += [f"failed, {setting}: {name}" for name in failed]
    print(f"\n{'setting':<10}{'passed':>8}{'failed':>8}{'seconds':>9}", *lines, sep="\n")
    print(f"\n{'largest error':<32}", *(f"{setting:>10}" for setting in settings), f"{'allowed':>10}{'margin':>8}")
    for name in sorted({name for seen in errors.values() for name in seen}):
        seen = [errors[setting].get(name, (0.0, 0.0)) for setting in settings]
        largest, allowed = max(error for error, _ in seen), max(allowed for _, allowed in seen)
        margin = allowed / largest if largest else math.inf
        print(f"{name:<32}", *(f"{error:>10.1e}" for error, _ in seen), f"{allowed:>10.1e}{margin:>8.1f}")
        if margin < ENOUGH:
            failures.append(f"narrow, {name}: margin {margin:.1f}, less than {ENOUGH}")
    print("", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
