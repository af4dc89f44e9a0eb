"""Makes flickering.json: temporal flickering by the package vbench 0.1.5's own functions, on clips made by formula.

pip install -r tcbench/assets/vbench/requirements.txt
python tests/references/flickering.py
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def clips() -> list[np.ndarray]:
    """uint8 [T, H, W, 3]: noise, a drifting ramp, and a still."""
    draw = np.random.RandomState(0)
    ramp = np.add.outer(np.arange(12), np.arange(16))[None, :, :, None] + 7 * np.arange(6)[:, None, None, None]
    still = np.repeat(draw.randint(0, 256, (1, 8, 8, 3)), 3, axis=0)
    moving = np.repeat(ramp, 3, axis=3)
    return [clip.astype(np.uint8) for clip in (draw.randint(0, 256, (5, 10, 14, 3)), moving, still)]


def main() -> None:
    """Score the clips with the package's `cal_score`, its reader of files replaced by the clips themselves."""
    from vbench import temporal_flickering

    made = iter(clips())
    temporal_flickering.get_frames = lambda path: list(next(made))
    scores = [temporal_flickering.cal_score("") for _ in clips()]
    record = {"made_by": {"vbench": "0.1.5"}, "temporal_flickering": scores}
    (HERE / "flickering.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
