"""The metrics of a set of samples, as `catalogue` names them: of (samples, reference), a function of sample indices.

Each computes what subsets share (distances, per-sample values) at once, so that the jackknife passes nothing through a
network again. All raise UserError if an input they need is missing.
"""

import numpy as np

from tcbench.metrics import deviation, precision_recall, vbench
from tcbench.metrics.accuracy import correct
from tcbench.metrics.frechet import Subsets
from tcbench.metrics.inception_score import inception_score
from tcbench.metrics.samples import Reference, Samples, given, image_pair, mean_of, seen_by_imagenet, uncached_of
from tcbench.stats import Statistic


def fid(samples: Samples, reference: Reference) -> Statistic:
    """Frechet distance of the pooled features to the real images'."""
    subsets = Subsets(samples.features.pooled)
    return lambda indices: subsets.gaussian(indices).distance(reference.real.pooled)


def sfid(samples: Samples, reference: Reference) -> Statistic:
    """Frechet distance of the spatial features."""
    subsets = Subsets(samples.features.spatial)
    return lambda indices: subsets.gaussian(indices).distance(reference.real.spatial)


def inception(samples: Samples, reference: Reference) -> Statistic:
    """Inception score."""
    return lambda indices: inception_score(samples.features.logits[indices].flatten(0, -2))


def precision(samples: Samples, reference: Reference) -> Statistic:
    """Share of samples inside some real ball."""
    real = reference.real
    return mean_of(precision_recall.inside_real(samples.features.pooled, real.manifold, real.radii))


def recall(samples: Samples, reference: Reference) -> Statistic:
    """Share of real images inside some sample's ball."""
    return precision_recall.recall(samples.features.pooled, reference.real.manifold)


def fid_imagenet(samples: Samples, reference: Reference) -> Statistic:
    """FID of an ImageNet network's features."""
    return fid(*seen_by_imagenet(samples, reference))


def precision_imagenet(samples: Samples, reference: Reference) -> Statistic:
    """Precision by an ImageNet network's features."""
    return precision(*seen_by_imagenet(samples, reference))


def recall_imagenet(samples: Samples, reference: Reference) -> Statistic:
    """Recall by an ImageNet network's features."""
    return recall(*seen_by_imagenet(samples, reference))


def accuracy(samples: Samples, reference: Reference) -> Statistic:
    """Share of samples that the classifier takes for what they were conditioned on."""
    return mean_of(correct(samples.features.logits, given(samples.labels, "labels").to(samples.device)))


def mae(samples: Samples, reference: Reference) -> Statistic:
    """Mean absolute difference from the uncached images."""
    return mean_of(deviation.final_mae(*image_pair(samples, reference), samples.device))


def psnr(samples: Samples, reference: Reference) -> Statistic:
    """Peak signal-to-noise ratio against the uncached images."""
    return mean_of(deviation.psnr(*image_pair(samples, reference), samples.device))


def ssim(samples: Samples, reference: Reference) -> Statistic:
    """Structural similarity with the uncached images."""
    return mean_of(deviation.ssim(*image_pair(samples, reference), samples.device))


def fid_uncached(samples: Samples, reference: Reference) -> Statistic:
    """Frechet distance of the pooled features to the uncached images', of the same noise and as many."""
    ours, theirs = Subsets(samples.features.pooled), Subsets(uncached_of(reference).features.pooled)
    return lambda indices: ours.gaussian(indices).distance(theirs.gaussian(indices))


def feature_mse(samples: Samples, reference: Reference) -> Statistic:
    """Mean squared difference from the uncached images' features."""
    return mean_of(deviation.feature_mse(samples.features.pooled, uncached_of(reference).features.pooled))


def vbench_total(samples: Samples, reference: Reference) -> Statistic:
    """VBench's total, in per cent, of its readings."""
    scores_ND = given(samples.readings.get("vbench"), "VBench's results").double().numpy()
    return lambda indices: 100 * vbench.total(np.nanmean(scores_ND[indices], axis=0))["total"]
