"""VBench's sixteen dimensions (Huang et al., CVPR 2024), what each needs, and the arithmetic of its leaderboard.

The dimensions themselves are computed by the package in its own environment (`tcbench.stages.vbench`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Dimension:
    """One of VBench's dimensions.

    Attributes:
        name: as in the package.
        group: of which of the two part scores.
        low, high: raw scores that count as 0 and 1; the official script clamps nothing.
        weight: in the part score.
        needs: files under the package's cache folder; none: the formula alone.
        detectron2: whether it also needs that package, which PyPI does not have.
        unit: what the package's score of one video is divided by to be its share of the dimension's score.
    """

    name: str
    group: Literal["quality", "semantic"]
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    needs: tuple[str, ...] = ()
    detectron2: bool = False
    unit: float = 1.0


_DINO = ("dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main")
_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_AESTHETIC = "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"
_UMT = "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")

MEGABYTES = {
    _DINO[0]: 343,
    _DINO[1]: 25,
    _CLIP_B: 354,
    _CLIP_L: 933,
    _AESTHETIC: 0.004,
    _UMT: 607,
    _GRIT[0]: 417,
    _VICLIP[0]: 1710,
    _VICLIP[1]: 1.4,
    "amt_model/amt-s.pth": 12,
    "raft_model/models/raft-things.pth": 21,
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": 109,
    "caption_model/tag2text_swin_14m.pth": 4480,
}
"""About how large each of these files is: as published, or from the number of parameters."""

DIMENSIONS = (
    Dimension("subject_consistency", "quality", 0.1462, needs=_DINO),
    Dimension("background_consistency", "quality", 0.2615, needs=(_CLIP_B,)),
    Dimension("temporal_flickering", "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975, needs=("amt_model/amt-s.pth",)),
    Dimension("dynamic_degree", "quality", weight=0.5, needs=("raft_model/models/raft-things.pth",)),
    Dimension("aesthetic_quality", "quality", needs=(_CLIP_L, _AESTHETIC)),
    Dimension("imaging_quality", "quality", needs=("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",), unit=100.0),
    Dimension("object_class", "semantic", needs=_GRIT, detectron2=True),
    Dimension("multiple_objects", "semantic", needs=_GRIT, detectron2=True),
    Dimension("human_action", "semantic", needs=(_UMT,)),
    Dimension("color", "semantic", needs=_GRIT, detectron2=True),
    Dimension("spatial_relationship", "semantic", needs=_GRIT, detectron2=True),
    Dimension("scene", "semantic", high=0.8222, needs=("caption_model/tag2text_swin_14m.pth",)),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855, needs=(_CLIP_B,)),
    Dimension("temporal_style", "semantic", high=0.364, needs=_VICLIP),
    Dimension("overall_consistency", "semantic", high=0.364, needs=_VICLIP),
)
"""In the order of the package's TASK_INFO; bounds and weights of its scripts/constant.py."""

QUALITY_WEIGHT = 4
"""Of the quality score in the total; the semantic score has 1."""


def total(scores: Sequence[float]) -> dict[str, float]:
    """Quality, semantic and total score from raw scores in the order of `DIMENSIONS`, all in 0..1.

    Part scores are weighted means of (raw - low) / (high - low), total = (4 quality + semantic) / 5
    (scripts/cal_final_score.py). A score that is missing (NaN) makes its part and the total missing; the official
    script takes it for a raw 0.
    """
    parts = {}
    for group in ("quality", "semantic"):
        members = [(d, raw) for d, raw in zip(DIMENSIONS, scores, strict=True) if d.group == group]
        weighted = sum(d.weight * (raw - d.low) / (d.high - d.low) for d, raw in members)
        parts[group] = weighted / sum(d.weight for d, _ in members)
    return parts | {"total": (QUALITY_WEIGHT * parts["quality"] + parts["semantic"]) / (QUALITY_WEIGHT + 1)}


def table(results: Mapping[str, Mapping[str, float]], count: int) -> np.ndarray:
    """Scores of `count` samples by dimension, float64 [count, 16]; NaN where a sample is not of a dimension.

    `results`: dimension -> sample number, as text -> the package's score of that video.
    """
    scores = np.full((count, len(DIMENSIONS)), np.nan)
    for column, dimension in enumerate(DIMENSIONS):
        for sample, value in results.get(dimension.name, {}).items():
            scores[int(sample), column] = value / dimension.unit
    return scores
