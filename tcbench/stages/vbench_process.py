"""Runs in VBench's own environment, so it imports nothing of tcbench: scores a row's videos.

    python vbench_process.py TASK.json

The task names the folder of the videos, the dimensions that can run, a device, a folder for what the package writes,
and where to write the answer: {dimension: {"score": ..., "videos": {file name: score}}}, or {"not_run": why} where the
package fails.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(task: dict[str, Any]) -> None:
    """Score the videos one dimension at a time."""
    import torch
    import vbench

    torch.set_grad_enabled(False)
    full_info = Path(vbench.__file__).with_name("VBench_full_info.json")
    device = torch.device(task["device"])
    answer: dict[str, Any] = {}
    for dimension in task["dimensions"]:
        try:
            scorer = vbench.VBench(device, str(full_info), task["scratch"])
            scorer.evaluate(task["videos"], dimension, dimension_list=[dimension], local=True)
            path = Path(task["scratch"]) / f"{dimension}_eval_results.json"
            score, videos = json.loads(path.read_text(encoding="utf-8"))[dimension]
        except Exception as error:  # the package raises whatever its sixteen dependencies raise
            answer[dimension] = {"not_run": f"VBench failed: {type(error).__name__}: {' '.join(str(error).split())}"}
            continue
        by_name = {os.path.basename(video["video_path"]): float(video["video_results"]) for video in videos}
        answer[dimension] = {"score": float(score), "videos": by_name}
    Path(task["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
