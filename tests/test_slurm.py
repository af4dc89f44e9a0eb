"""The workflow on a real Slurm. Where it is not installed, as in CI, this is skipped:

apt-get install slurm-wlm munge; pip install '.[slurm]'; TCBENCH_TEST_SLURM=1 pytest -n 0 tests/test_slurm.py
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.slurm import can_run, cluster

ROOT = Path(__file__).parent.parent
SMOKE = (ROOT / "tests" / "smoke.yaml").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.skipif(
        not (os.environ.get("TCBENCH_TEST_SLURM") and can_run() and find_spec("snakemake_executor_plugin_slurm")),
        reason="needs TCBENCH_TEST_SLURM=1, root, Debian's slurm-wlm and munge, and the extra `slurm`",
    ),
    pytest.mark.timeout(3600),
]


def test_a_row_is_sampled_by_four_jobs_of_a_gpu_each(tmp_path: Path) -> None:
    """Every job sees the GPU that Slurm gave it and leases that; the tables are those of a run without Slurm."""
    suite = SMOKE.replace("count: 8", "count: 16").replace("jobs: nfe", "jobs: row")
    (tmp_path / "mine.yaml").write_text(suite)
    leases = tmp_path / "leases"
    ours = {
        "TCBENCH_PRETEND_GPUS": "8",
        "TCBENCH_LEASES": str(leases),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    with cluster(tmp_path / "slurm", gpus=8) as environment:
        snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
        profile = ["--workflow-profile", str(ROOT / "profiles" / "slurm"), "--slurm-status-command", "squeue"]
        quick = ["--slurm-init-seconds-before-status-checks", "3", "--seconds-between-status-checks", "5"]
        of_suite = ["--config", "suite_file=mine.yaml", "rows=nfe4-fora", "gpus=4"]
        done = subprocess.run(
            [*snakemake, "tables", *profile, *quick, *of_suite],
            cwd=tmp_path, env=environment | ours, capture_output=True, text=True, timeout=3500,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    results = tmp_path / "results" / "smoke"
    for row in ("nfe4-uncached", "nfe4-fora"):
        assert len(json.loads((results / "samples" / row / "row.json").read_text())["shards"]) == 4
        assert len(list((results / "logs").glob(f"sample-{row}-*-of-*.log"))) == 4
    assert len(list(leases.glob("pretended-*.lock"))) >= 4, "jobs at the same time had GPUs of their own"
    assert "PARTIAL" in (results / "partial" / "tables" / "table2.md").read_text(encoding="utf-8")
