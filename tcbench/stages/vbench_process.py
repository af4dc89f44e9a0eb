"""Runs in VBench's own environment, so it imports nothing of tcbench: writes a row's videos and scores them.

    python vbench_process.py TASK.json

The task names shards (safetensors with "image", [n, C, T, H, W], float in [-1, 1] or uint8), a file name for every
sample, the dimensions that can run, and where to write the answer: {dimension: {"score": ..., "videos": {file name:
score}}}, or {"not_run": why} where the package fails.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(task: dict[str, Any]) -> None:
    """Write the videos that are not there yet, then score them one dimension at a time."""
    _write_videos(task)
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


def _write_videos(task: dict[str, Any]) -> None:
    import imageio.v2 as imageio
    from safetensors.numpy import load_file
    from tqdm import tqdm

    folder = Path(task["videos"])
    folder.mkdir(parents=True, exist_ok=True)
    names = iter(task["names"])
    for shard in tqdm(task["shards"], desc="write videos", unit="shard"):
        for video in load_file(shard)["image"]:
            frames = video.transpose(1, 2, 3, 0)
            if frames.dtype != "uint8":
                frames = (frames * 127.5 + 128).clip(0, 255).astype("uint8")  # as data.to_uint8
            path = folder / next(names)
            partial = path.with_name(f".{path.name}")
            imageio.mimwrite(
                partial, list(frames.repeat(3 // frames.shape[3], axis=3)), format="FFMPEG", fps=task["fps"],
                codec="libx264", macro_block_size=2, output_params=["-crf", "10"],
            )  # fmt: skip
            partial.replace(path)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
