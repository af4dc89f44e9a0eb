"""scores/seed-noise.json: how far two uncached runs of different noise are apart. Imports no torch."""

from pydantic import PositiveInt
from typing_extensions import TypedDict

from tcbench.record.records import Kind, OfSuite
from tcbench.record.score import Provenance, Quality


class Yardstick(TypedDict):
    """Of an uncached row (`tcbench.metrics.seed_noise`).

    Keys:
        samples, groups: of the row.
        matched: whether samples were paired with such as show the same.
        quality: by metric.
    """

    nfe: PositiveInt
    guidance_scale: float
    samples: PositiveInt
    groups: PositiveInt
    extractor: str | None
    matched: bool
    quality: dict[str, Quality]


class SeedNoise(OfSuite):
    """By row."""

    rows: dict[str, Yardstick]
    provenance: Provenance


SEED_NOISE = Kind(SeedNoise, "tcbench seed-noise SUITE")
