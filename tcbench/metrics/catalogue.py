"""The catalogue of metrics: what each is called, which way is better, what it needs and what computes it.

Configs, scoring, comparisons and tables read it, so a metric is one entry here and one function, which is imported when
the metric is computed (docs/add-a-metric.md). Imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import inf
from typing import Any, Literal

from tcbench.errors import UserError, did_you_mean

NEIGHBOURS = 3
"""Of a sample, in whose distance precision and recall look for others."""

IMAGENET = "efficientnet-lite0"
"""The network of a second opinion, whatever the suite's extractor."""

Need = Literal["features", "labels", "images", "uncached", "reading", "imagenet"]


@dataclass(frozen=True)
class Metric:
    """One number about a row.

    Attributes:
        name: key in configs and score files.
        label: heading in tables.
        better: which direction is an improvement.
        load: "module:function". The function takes (samples, reference), `tcbench.metrics.samples`, and returns the
            metric of any subset of the samples (`tcbench.stats.Statistic`); of a metric `per_sample`, it takes
            `settings` and a device and returns a scorer (`tcbench.metrics.readings.Scorer`), of one that is also a
            `distance` a scorer of pairs.
        needs: what it looks at: features of the suite's extractor or of `IMAGENET`, labels, images, the uncached run at
            equal noise, or a reading of every sample, which may be missing for a reason that the row records.
        least: how many samples it can be computed of.
        reads_captions: whether it looks at what samples were generated for.
        per_sample: whether `load` makes a scorer of single samples; the metric is the mean of its readings.
        settings: the field of the suite's `scoring` with the arguments of `load`, if it takes any.
        unit: of the value; axes of figures show it.
        paper: the paper's columns of this metric: the key in a row's `paper`, and what the column is of, "" if that is
            the metric as such.
        usual: whether suites that list no metrics have it.
        printed: whether tables of ablations have a column of it; not where another column shows the same.
        bounds: the range of its values.
        share: whether it is the share of samples that are right, so that pairs of samples can be counted.
        neighbours: whether it looks at all frames of a video one after the other.
        moments: of a Frechet distance, the features whose moments it compares, "pooled" or "spatial": it is biased at
            finite n (`tcbench.metrics.inference`).
        margin: differences below it do not matter, for a metric whose unit says so by itself; for others it comes from
            what fewer steps cost (`tcbench.report.compare.margins`).
        repeats: the metric that this one is with another network, as a second opinion.
    """

    name: str
    label: str
    better: Literal["lower", "higher"]
    load: str
    needs: frozenset[Need] = frozenset({"features"})
    per_sample: bool = False
    least: int = 1
    reads_captions: bool = False
    settings: str | None = None
    unit: str = ""
    paper: Mapping[str, str] = field(default_factory=dict)
    usual: bool = False
    printed: bool = True
    bounds: tuple[float, float] = (-inf, inf)
    share: bool = False
    neighbours: bool = False
    moments: Literal["pooled", "spatial"] | None = None
    margin: float | None = None
    repeats: str = ""

    @property
    def sign(self) -> int:
        """Of a difference that is an improvement."""
        return 1 if self.better == "higher" else -1

    @property
    def distance(self) -> bool:
        """Whether it compares with the uncached run."""
        return "uncached" in self.needs

    def extractor(self, of_suite: str | None) -> str | None:
        """The network whose features it looks at, where the suite has this one."""
        return IMAGENET if "imagenet" in self.needs else of_suite

    @property
    def axis(self) -> str:
        """Label of a figure's axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def function(self) -> Callable[..., Any]:
        """What `load` names, imported."""
        return _loaded(self.load)


def _loaded(where: str) -> Any:
    module, name = where.split(":")
    return getattr(import_module(module), name)


_SET, _READING = "tcbench.metrics.functions", frozenset[Need]({"reading"})
_PAIRED, _IMAGENET = frozenset[Need]({"images", "uncached"}), frozenset[Need]({"imagenet"})
_POSITIVE, SHARE = (0.0, inf), (0.0, 1.0)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "fid",
            "FID",
            "lower",
            f"{_SET}:fid",
            least=2,
            paper={"fid": ""},
            usual=True,
            bounds=_POSITIVE,
            moments="pooled",
        ),
        Metric(
            "sfid",
            "sFID",
            "lower",
            f"{_SET}:sfid",
            least=2,
            paper={"sfid": ""},
            usual=True,
            bounds=_POSITIVE,
            moments="spatial",
        ),
        Metric("kid", "KID (x1000)", "lower", "tcbench.metrics.kid:kid", least=2),
        Metric("is", "IS", "higher", f"{_SET}:inception", paper={"is": ""}, usual=True, bounds=(1, inf)),
        Metric(
            "precision",
            "Precision",
            "higher",
            f"{_SET}:precision",
            paper={"precision": ""},
            usual=True,
            bounds=SHARE,
            share=True,
        ),
        Metric(
            "recall",
            "Recall",
            "higher",
            f"{_SET}:recall",
            least=NEIGHBOURS + 1,
            paper={"recall": ""},
            usual=True,
            bounds=SHARE,
        ),
        Metric(
            "fid_imagenet",
            "FID (EfficientNet-Lite0)",
            "lower",
            f"{_SET}:fid_imagenet",
            _IMAGENET,
            least=2,
            repeats="fid",
            bounds=_POSITIVE,
            moments="pooled",
        ),
        Metric(
            "precision_imagenet",
            "Precision (EfficientNet-Lite0)",
            "higher",
            f"{_SET}:precision_imagenet",
            _IMAGENET,
            printed=False,
            repeats="precision",
            bounds=SHARE,
            share=True,
        ),
        Metric(
            "recall_imagenet",
            "Recall (EfficientNet-Lite0)",
            "higher",
            f"{_SET}:recall_imagenet",
            _IMAGENET,
            least=NEIGHBOURS + 1,
            printed=False,
            repeats="recall",
            bounds=SHARE,
        ),
        Metric(
            "accuracy",
            "Accuracy",
            "higher",
            f"{_SET}:accuracy",
            frozenset[Need]({"features", "labels"}),
            usual=True,
            bounds=SHARE,
            share=True,
            margin=0.05,
        ),
        Metric(
            "image_reward",
            "ImageReward",
            "higher",
            "tcbench.metrics.image_reward:load_image_reward",
            _READING,
            per_sample=True,
            reads_captions=True,
            settings="image_reward",
            paper={"image_reward": ""},
        ),
        # read from files: VBench runs in an environment of its own (tcbench/stages/vbench.py)
        Metric(
            "vbench",
            "VBench",
            "higher",
            f"{_SET}:vbench_total",
            _READING,
            reads_captions=True,
            unit="%",
            paper={"vbench": ""},
        ),
        Metric(
            "clip_score",
            "CLIP score",
            "higher",
            "tcbench.metrics.clip:load_clip",
            _READING,
            per_sample=True,
            reads_captions=True,
            settings="clip",
            paper={"coco_clip": "MSCOCO", "parti_clip": "PartiPrompts"},
        ),
        Metric(
            "digits_clip_score",
            "CLIP score (digits CLIP)",
            "higher",
            "tcbench.metrics.clip:load_digits_clip_scorer",
            _READING,
            per_sample=True,
            reads_captions=True,
        ),
        Metric(
            "alignment",
            "Alignment (digit reader)",
            "higher",
            "tcbench.metrics.alignment:load_alignment",
            _READING,
            per_sample=True,
            reads_captions=True,
            bounds=SHARE,
            share=True,
            neighbours=True,
            margin=0.05,
        ),
        Metric(
            "temporal_flickering",
            "Temporal flickering",
            "higher",
            "tcbench.metrics.readings:load_temporal_flickering",
            _READING,
            per_sample=True,
            neighbours=True,
        ),
        Metric("mae", "MAE to uncached", "lower", f"{_SET}:mae", _PAIRED, usual=True, bounds=_POSITIVE),
        Metric("psnr", "PSNR to uncached", "higher", f"{_SET}:psnr", _PAIRED, unit="dB", usual=True, printed=False),
        Metric("ssim", "SSIM to uncached", "higher", f"{_SET}:ssim", _PAIRED, printed=False, bounds=(-1, 1)),
        Metric(
            "lpips",
            "LPIPS to uncached",
            "lower",
            "tcbench.metrics.perceptual:load_lpips",
            _PAIRED,
            per_sample=True,
            settings="lpips",
            printed=False,
            bounds=_POSITIVE,
        ),
        Metric(
            "feature_mse",
            "Feature MSE to uncached",
            "lower",
            f"{_SET}:feature_mse",
            frozenset[Need]({"features", "uncached"}),
            usual=True,
            printed=False,
            bounds=_POSITIVE,
        ),
        Metric(
            "fid_uncached",
            "FID to uncached",
            "lower",
            f"{_SET}:fid_uncached",
            frozenset[Need]({"features", "uncached"}),
            least=2,
            printed=False,
            bounds=_POSITIVE,
            moments="pooled",
        ),
    )
}
"""By name, in the order of tables that list all they have."""


@dataclass(frozen=True)
class ExtractorEntry:
    """A network whose features metrics compare.

    Attributes:
        load: "module:class", a `tcbench.metrics.extractors` network.
        pooled, spatial, classes: how many features and logits it gives an image.
        ships: whether its weights do, or a package of them; a suite must name those of others.
        knows: the data sets that it was trained for; empty if its features describe any image.
        kid_kernel: whether KID's kernel was published for its features; that of others is fitted to their size.
    """

    load: str
    pooled: int
    spatial: int
    classes: int
    ships: bool = True
    knows: tuple[str, ...] = ()
    kid_kernel: bool = False

    def network(self) -> Any:
        """The class, imported."""
        return _loaded(self.load)


_NETWORKS = "tcbench.metrics.extractors"
EXTRACTORS = {
    "digits-cnn": ExtractorEntry(f"{_NETWORKS}:DigitsExtractor", 64, 112, 10, knows=("digits",)),
    "digit-reader": ExtractorEntry(f"{_NETWORKS}:ReaderExtractor", 64, 112, 10, knows=("scenes", "moving")),
    "fashion-cnn": ExtractorEntry(f"{_NETWORKS}:FashionExtractor", 128, 448, 10, ships=False, knows=("fashion",)),
    "cifar10-cnn": ExtractorEntry(f"{_NETWORKS}:Cifar10Extractor", 128, 448, 10, ships=False, knows=("cifar10",)),
    IMAGENET: ExtractorEntry(f"{_NETWORKS}:EfficientNetLite0", 1280, 343, 1000),
    "inception-v3-adm": ExtractorEntry(f"{_NETWORKS}:InceptionADM", 2048, 2023, 1008, ships=False, kid_kernel=True),
}


def find_metric(name: str) -> Metric:
    """The metric of a name; raises UserError, with near misses, if there is none."""
    if name not in METRICS:
        raise UserError(f"metric {name!r}: unknown; {did_you_mean(name, METRICS)}")
    return METRICS[name]


def find_extractor(name: str) -> ExtractorEntry:
    """The extractor of a name; raises UserError, with near misses, if there is none."""
    if name not in EXTRACTORS:
        raise UserError(f"extractor {name!r}: unknown; {did_you_mean(name, EXTRACTORS)}")
    return EXTRACTORS[name]


def usual_metrics() -> tuple[str, ...]:
    """What suites that list no metrics are scored by."""
    return tuple(name for name, metric in METRICS.items() if metric.usual)


def settings_of(metrics: Iterable[str]) -> set[str]:
    """The fields of a suite's `scoring` that these metrics depend on."""
    return {settings for name in metrics if (settings := METRICS[name].settings)}


def paper_headings() -> dict[str, str]:
    """Headings of the paper's columns of quality, by key in a row's `paper`."""
    return {
        key: f"{metric.label}, {of}" if of else metric.label
        for metric in METRICS.values()
        for key, of in metric.paper.items()
    }
