"""Quality metrics: distances to real images and deviations from the uncached run, each with an interval.

`make_extractor` turns images into `Features` once; `METRICS` are functions of features; `score_row` puts an
interval on each and pairs each with the reference row.
"""

from tcbench.metrics.deviation import final_mae, psnr, trajectory_mae
from tcbench.metrics.extractors import Extractor, Features, make_extractor
from tcbench.metrics.frechet import Gaussian, real_floor
from tcbench.metrics.scoring import METRICS, Metric, Real, Reference, Samples, score_row

__all__ = [
    "METRICS",
    "Extractor",
    "Features",
    "Gaussian",
    "Metric",
    "Real",
    "Reference",
    "Samples",
    "final_mae",
    "make_extractor",
    "psnr",
    "real_floor",
    "score_row",
    "trajectory_mae",
]
