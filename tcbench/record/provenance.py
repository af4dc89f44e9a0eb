"""Where a number came from: code, config, packages, machine, time.

The record is committed beside the numbers, so it holds nothing that names a person or a computer: no host
name, no user name, no path.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tcbench import __version__
from tcbench.outside.places import PACKAGE
from tcbench.record.files import digest

PACKAGES = ("torch", "diffusers", "peft", "torch_fidelity", "numpy", "snakemake")


def _git(*arguments: str) -> str:
    """Output of git at the package's folder; raises OSError or SubprocessError if there is none."""
    command = ["git", "--no-optional-locks", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _checkout() -> dict[str, Any]:
    """Commit, and whether the work tree differs from it but for results; "unknown" unless run from a checkout."""
    try:
        commit, _, prefix = _git("rev-parse", "HEAD", "--show-prefix").partition("\n")
        if prefix == "tcbench/":  # otherwise installed below somebody else's checkout, whose commit says nothing
            return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--", ":/", ":(top,exclude)results"))}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"commit": "unknown", "dirty": "unknown"}


def is_ancestor(commit: str, other: str) -> bool:
    """Whether a commit is another, or before it; False for those that git does not know."""
    try:
        _git("merge-base", "--is-ancestor", commit, other)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def changed_between(commit: str, other: str) -> set[Path]:
    """The files, absolute, that differ between two commits of this checkout."""
    top = Path(_git("rev-parse", "--show-toplevel"))
    return {(top / name).resolve() for name in _git("diff", "--name-only", commit, other).splitlines()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _gpu_model() -> str | None:
    """Name of the GPU if this process already uses torch: provenance must not cost an import of torch."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None


def collect(
    config: dict[str, Any],
    seeds: Sequence[int],
    started: float,
    dtypes: Mapping[str, str] | None = None,
    earlier: float = 0.0,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The provenance record of a run that ends now, as JSON-able values.

    Args:
        config: the resolved config; only its digest is kept, since it may hold paths.
        seeds: every seed the run consumed.
        started: `time.time()` at the run's start, in seconds.
        dtypes: what networks computed in, by what they are (`Suite.dtypes`, `Suite.sampling_dtypes`).
        earlier: seconds that processes before this one took for the same work (`tcbench.record.spent`).
        weights: digests of networks' weights, by what they are: two trainings by one recipe are not one network.
    """
    finished = time.time()
    return {
        "tcbench": __version__,
        "git": _checkout(),
        "config_digest": digest(config),
        "seeds": list(seeds),
        "packages": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        },
        "gpu": _gpu_model(),
        **({"dtypes": dict(dtypes)} if dtypes else {}),
        **({"weights": dict(weights)} if weights else {}),
        "started_utc": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "finished_utc": datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds"),
        "wall_s": round(finished - started + earlier, 3),
    }
