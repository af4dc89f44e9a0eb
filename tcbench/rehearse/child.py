"""One stage of a rehearsal in a process of its own: `python -m tcbench.rehearse.child SIZE NOTE CONFIG COMMAND ...`.

NOTE is a file: what the process needed of memory is written there.
"""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tcbench.cli import main as tcbench
from tcbench.config.load import load_suite
from tcbench.record.files import write_json
from tcbench.rehearse.run import FILES
from tcbench.rehearse.sizes import SizeName, networks, write_stand_ins


def run_stage(size: SizeName, note: Path, config: Path, command: Sequence[str]) -> int:
    """Run a command at that size here; returns its exit status and leaves the note."""
    with networks(size):
        suite = load_suite(config)
    with networks(size, suite.scoring.extractor_weights):
        if command[0] == FILES:
            write_stand_ins(suite, size)
            status = 0
        else:
            status = tcbench([command[0], str(config), *command[1:]])
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    write_json(note, {
        "gpu_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    })  # fmt: skip
    return status


if __name__ == "__main__":
    kind, path, where, *rest = sys.argv[1:]
    sys.exit(run_stage("tiny" if kind == "tiny" else "full", Path(path), Path(where), rest))
