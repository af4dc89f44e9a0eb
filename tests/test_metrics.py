import json
from dataclasses import replace
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torch_fidelity
from safetensors.torch import save_file
from scipy.signal import convolve2d
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import calc_cdist_full, calculate_precision_recall_full
from torchvision.models import alexnet

from tcbench.config.fields import PaperCell, Scoring
from tcbench.config.suite import Suite
from tcbench.errors import NotRun, UserError
from tcbench.metrics.accuracy import correct
from tcbench.metrics.catalogue import EXTRACTORS, IMAGENET, METRICS, find_metric, paper_headings, usual_metrics
from tcbench.metrics.deviation import final_mae, psnr, ssim, trajectory_mae
from tcbench.metrics.extractors import Features, make_extractor
from tcbench.metrics.frechet import Gaussian, Subsets, frechet_distance, real_floor
from tcbench.metrics.inception_score import inception_score
from tcbench.metrics.inference import Sampled, samples_needed
from tcbench.metrics.kid import SCALE
from tcbench.metrics.perceptual import load_lpips
from tcbench.metrics.precision_recall import _kth, inside_real, radii, recall, thin
from tcbench.metrics.samples import Real, Reference, Samples, odd_images
from tcbench.metrics.scoring import compute, prepare, score_row
from tcbench.metrics.seed_noise import Partners, seed_noise
from tcbench.models.classifier import DigitsCNN
from tcbench.precision import products
from tcbench.record.files import sha256
from tcbench.stats import batches, jackknife
from tests import score_times
from tests.floors import DISTANCE, NETWORK, READING, assert_close

READINGS = [name for name, metric in METRICS.items() if metric.per_sample]
ALONE = [name for name, metric in METRICS.items() if "uncached" not in metric.needs]
"""What the reference row is scored by, too."""
SCORERS = {"lpips": lambda images, uncached: (images - uncached).square().flatten(1).mean(1)}
"""In the place of networks that compare images."""


def random_features(count, seed, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(99)) / 8
    pooled = torch.randn(count, 64, generator=draw) @ mix + shift
    spatial = torch.randn(count, 112, generator=draw) + shift
    return Features(pooled, spatial, 3 * torch.randn(count, 10, generator=draw))


def standard_normal(size):
    return Gaussian(torch.zeros(size).double(), torch.eye(size).double())


def random_samples(count, seed, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 16, 16, generator=draw) * 2 - 1
    readings = {name: torch.rand(count, generator=draw) for name in READINGS} | {
        "vbench": torch.rand(count, 16, generator=draw)
    }
    return Samples(random_features(count, seed, shift), torch.arange(count) % 10, images, readings)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    save_file(DigitsCNN().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def digits(weights):
    return make_extractor("digits-cnn", weights)


def random_images(count, seed, low=0, high=256):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, 1, 16, 16), generator=draw, dtype=torch.uint8)


# extraction


def test_numbers_equal_torch_fidelity_end_to_end(digits, weights):
    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    generated, real = random_images(300, 1, high=200), random_images(400, 2)
    options = {"isc": True, "fid": True, "prc": True, "isc_splits": 1, "samples_shuffle": False}
    options |= {"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False}
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        feature_extractor="digits-cnn",
        feature_extractor_weights_path=weights,
        **options,
    )
    samples, reference = Samples(digits.extract(generated)), Reference(Real(digits.extract(real)))
    ours = {name: compute(name, samples, reference) for name in ("is", "fid", "precision", "recall")}
    assert 0 < ours["recall"] < 1 or 0 < ours["precision"] < 1
    for name, key in (
        ("is", "inception_score_mean"),
        ("fid", "frechet_inception_distance"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert_close(ours[name], theirs[key], DISTANCE)


def test_features_do_not_depend_on_the_batch_size(digits):
    images = random_images(50, 3)
    for one, other in zip(
        vars(digits.extract(images, 50)).values(), vars(digits.extract(images, 7)).values(), strict=True
    ):
        assert_close(one, other, NETWORK)


def test_digits_layers_are_the_networks_outputs_on_images_in_minus_one_to_one(digits):
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    features = digits.extract(images)
    with torch.no_grad():
        direct = digits.network.network(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 16, 16))
    assert_close(features.pooled, direct["features"], NETWORK)
    assert_close(features.spatial, direct["spatial"].reshape(2, 112), NETWORK)
    assert_close(features.logits, direct["logits"], NETWORK)


def test_the_packages_own_classifier_is_the_default(weights, digits, tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/classifier.safetensors").write_bytes(weights.read_bytes())
    monkeypatch.setattr("tcbench.outside.places.ASSETS", tmp_path)
    images = random_images(4, 5)
    assert torch.equal(make_extractor("digits-cnn").extract(images).logits, digits.extract(images).logits)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), random_images(0, 0)],
    ids=["float", "three channels", "none"],
)
def test_unfit_images_are_refused(digits, images):
    with pytest.raises(UserError, match=r"give torch.uint8 \(n, 1, 16, 16\)"):
        digits.extract(images)


def test_unfit_weights_are_named(tmp_path, weights):
    with pytest.raises(
        UserError, match="unknown; use one of digits-cnn, digit-reader, fashion-cnn, cifar10-cnn, efficientnet"
    ):
        make_extractor("inception")
    for digest in (None, "0123"):
        with pytest.raises(UserError, match=r"missing\.safetensors: "):
            make_extractor("digits-cnn", tmp_path / "missing.safetensors", digest=digest)
    with pytest.raises(UserError, match="expected 0123"):
        make_extractor("digits-cnn", weights, digest="0123")
    with pytest.raises(UserError, match="needs weights"):
        make_extractor("inception-v3-adm")
    with pytest.raises(UserError, match="expected 6726825d"):
        make_extractor("inception-v3-adm", weights)
    other = tmp_path / "other.pth"
    torch.save({"other": torch.zeros(1)}, other)
    with pytest.raises(UserError, match=r"other\.pth: not torch-fidelity's Inception-v3 .*Missing key"):
        make_extractor("inception-v3-adm", other, digest=sha256(other))


def test_features_that_are_not_finite_name_the_sample(digits, monkeypatch):
    layers = [torch.zeros(5, 64), torch.zeros(5, 112), torch.zeros(5, 10)]
    layers[1][3, 0] = torch.inf
    monkeypatch.setattr(digits.network, "forward", lambda images: tuple(layers))
    with pytest.raises(UserError, match="spatial features: sample 3 holds"):
        digits.extract(random_images(5, 4))


def test_inception_gives_the_layers_of_adms_evaluator(inception_file):
    path, random = inception_file
    extractor = make_extractor("inception-v3-adm", path, digest=sha256(path)[:8])
    seen = []
    extractor.network.network.Mixed_6d.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = extractor.extract(images)

    assert features.spatial.shape == (2, 7 * 17 * 17) and features.logits.shape == (2, 1008)
    assert_close(features.pooled, random(images)[0], NETWORK)
    branch = random.Mixed_6d.branch1x1
    norm = [
        parameter[:7] for parameter in (branch.bn.running_mean, branch.bn.running_var, branch.bn.weight, branch.bn.bias)
    ]
    expected = F.relu(F.batch_norm(F.conv2d(seen[0], branch.conv.weight[:7]), *norm, eps=branch.bn.eps))
    assert_close(features.spatial, expected.permute(0, 2, 3, 1).flatten(1), NETWORK)
    assert features.spatial.min() >= 0, "ADM's moments are of a map after ReLU"


# distances to real images


@pytest.mark.parametrize("layer, dim", [("pooled", 64), ("spatial", 112)])
def test_frechet_distance_equals_an_independent_one(layer, dim):
    generated = getattr(random_features(300, 1, shift=0.1), layer).double().numpy()
    real = getattr(random_features(500, 2), layer).double().numpy()
    mean = generated.mean(0) - real.mean(0)
    one, other = np.cov(generated.T), np.cov(real.T)
    expected = mean @ mean + np.trace(one + other - 2 * scipy.linalg.sqrtm(one @ other).real)
    gaussian = Gaussian.fit(torch.from_numpy(real))
    assert gaussian.mu.shape == (dim,)
    assert frechet_distance(torch.from_numpy(generated), gaussian) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_is_computed_in_float64():
    features = random_features(200, 3).pooled + 1000  # float32 moments would lose the covariance
    shifted = frechet_distance(features + 0.5, Gaussian.fit(features))
    assert shifted == pytest.approx(64 * 0.25)


@pytest.mark.parametrize("frames", [(), (3,)])
@pytest.mark.parametrize("kept", [range(40), range(5, 40), range(0, 40, 5), [2, 30]])
def test_moments_of_a_subset_equal_those_of_its_samples_alone(kept, frames):
    features = torch.randn(40, *frames, 6, generator=torch.Generator().manual_seed(1)) + 100
    of_subset = Subsets(features).gaussian(np.array(kept))
    rows = features[list(kept)].double().flatten(0, -2).numpy()
    np.testing.assert_allclose(of_subset.mu, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(of_subset.sigma, np.cov(rows, rowvar=False), atol=1e-10)


def test_frechet_distance_of_few_samples_is_torch_fidelitys():
    """Fewer samples than dimensions: both covariances are singular."""
    generated, real = (torch.randn(20, 48, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2))
    statistics = (fid_features_to_statistics(part) for part in (generated, real))
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(generated, Gaussian.fit(real)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("generated, real", [(10, 20), (20, 10), (10, 80), (80, 10), (3, 3), (48, 47)])
def test_frechet_distance_of_few_samples_is_that_of_their_covariances(generated, real):
    """Of which only the moments are known."""
    samples = [
        Subsets(torch.randn(100, 48, generator=torch.Generator().manual_seed(seed)) * (1 + seed)).gaussian(kept)
        for seed, kept in enumerate((np.arange(generated), np.arange(100 - real, 100)))
    ]
    assert [each.few is not None for each in samples] == [generated < 48, real < 48]
    moments = [Gaussian(each.mu, each.sigma) for each in samples]
    assert samples[0].distance(samples[1]) == pytest.approx(moments[0].distance(moments[1]), rel=1e-6)


def test_published_moments_take_the_place_of_fitted_ones():
    samples, features = random_samples(60, 4), random_features(80, 5)
    moments = (standard_normal(64), standard_normal(112))
    reference = Reference(Real(features, moments))
    assert compute("fid", samples, reference) == frechet_distance(samples.features.pooled, moments[0])
    assert compute("sfid", samples, reference) == frechet_distance(samples.features.spatial, moments[1])


def test_the_floor_is_reproducible_and_falls_with_more_images():
    real = random_features(600, 6)
    few, many = real_floor(real, 100, draws=4, seed=0), real_floor(real, 300, draws=4, seed=0)
    assert few == real_floor(real, 100, draws=4, seed=0) != real_floor(real, 100, draws=4, seed=1)
    for name in ("fid", "sfid"):
        assert few[name]["mean"] > many[name]["mean"] > 0 and few[name]["std"] > 0
        assert (few[name]["n"], few[name]["draws"]) == (100, 4)
    for num_samples, draws in ((600, 4), (1, 4), (100, 1)):
        with pytest.raises(UserError, match="real_floor"):
            real_floor(real, num_samples, draws, seed=0)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_the_catalogue_counts_an_extractors_features(name):
    """From which it follows how many samples a Frechet distance needs."""
    entry = EXTRACTORS[name]
    pooled, spatial, _ = entry.network().LAYERS
    assert pooled == str(entry.pooled) and spatial in ("spatial", str(entry.spatial))
    if entry.ships:
        extracted = make_extractor(name).extract(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
        sizes = tuple(values.shape[1] for values in vars(extracted).values())
        assert sizes == (entry.pooled, entry.spatial, entry.classes)


def test_metrics_are_bounded_as_the_catalogue_says():
    """Samples of two kinds, near the real images and far from them."""
    features = random_features(200, 1)
    real = Real(features, imagenet=Real(features))
    for shift in (0.0, 5.0):
        samples, uncached = random_samples(60, 2, shift), random_samples(60, 3)
        samples = replace(samples, imagenet=samples.features)
        for name, metric in METRICS.items():
            low, high = metric.bounds
            assert low <= compute(name, samples, Reference(real, uncached, SCORERS)) <= high, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_scores_as_a_core_does(row):
    """Metrics run where features are; images and labels stay on the host."""
    samples, uncached, real = row

    def on_card(of):
        return replace(of, features=of.features.to("cuda"), imagenet=of.imagenet.to("cuda"))

    there = Real(real.features.to("cuda"), imagenet=Real(real.imagenet.features.to("cuda")))
    groups, names = batches(len(samples), 16), list(METRICS)
    expected = score_row(samples, uncached, real, groups, names, SCORERS)
    with products("fp32"):
        found = score_row(on_card(samples), on_card(uncached), there, groups, names, SCORERS)
    assert found.keys() == expected.keys() == set(METRICS)
    for name, quality in expected.items():
        assert found[name]["deleted"] == pytest.approx(quality["deleted"], rel=1e-5, abs=1e-6), name


def test_a_second_opinion_is_the_same_metric_of_other_features(row):
    samples, uncached, real = row
    seen = replace(samples, features=samples.imagenet), Reference(real.imagenet, uncached)
    for name in ("fid", "precision", "recall"):
        second = compute(f"{name}_imagenet", samples, Reference(real, uncached))
        assert second == compute(name, *seen) != compute(name, samples, Reference(real, uncached))
    few = Sampled(2000, 8, "digits-cnn")
    assert samples_needed(METRICS["fid_imagenet"], few) == 2560 and samples_needed(METRICS["fid"], few) == 0


def test_the_network_of_a_second_opinion_is_its_packages_own():
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    extractor = make_extractor(IMAGENET)
    features = extractor.extract(images)
    resized = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(features.logits, extractor.network.network((resized - 127) / 128))
    entry = EXTRACTORS[IMAGENET]
    assert [len(layer[0]) for layer in vars(features).values()] == [entry.pooled, entry.spatial, entry.classes]
    grey = images[:1, :1]
    assert torch.equal(extractor.extract(grey).pooled, extractor.extract(grey.expand(-1, 3, -1, -1)).pooled)


def test_a_floor_of_classes_in_turn_is_lower_than_one_of_classes_by_chance():
    """Classes far apart: which ones a subset has more of is most of its distance to all images."""
    real, labels = random_features(600, 6), np.arange(600) % 3
    real.pooled[:] += 4 * torch.eye(3, 64)[labels]
    by_chance, in_turn = (real_floor(real, 90, 6, seed=0, labels=classes) for classes in (None, labels))
    assert in_turn["fid"]["mean"] < by_chance["fid"]["mean"]
    assert real_floor(real, 90, 6, 0, labels=list(labels)) == in_turn
    with pytest.raises(UserError, match="a class has fewer than 167 of 600"):
        real_floor(real, 500, 2, 0, labels=(np.arange(600) > 590) + 2 * (np.arange(600) > 300))


@pytest.mark.parametrize("count, splits", [(400, 1), (10_000, 2)])
def test_inception_score_uses_consecutive_splits_of_5000(count, splits):
    logits = random_features(count, 7).logits
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    parts = [np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in np.split(p, splits)]
    assert inception_score(logits) == pytest.approx(np.mean(parts))
    assert inception_score(logits, splits=5) != pytest.approx(np.mean(parts), rel=1e-6)


def test_precision_and_recall_equal_the_definition():
    generated, real = random_features(70, 8, shift=0.2).pooled, random_features(90, 9).pooled

    def balls(points):
        distance = np.linalg.norm(points[:, None] - points[None], axis=2)
        return np.sort(distance, axis=1)[:, 3]  # column 0 is the point itself

    def covered(points, centres):
        inside = np.linalg.norm(points[:, None] - centres[None], axis=2) <= balls(centres)
        return inside.any(1).mean()

    g, r = generated.double().numpy(), real.double().numpy()
    precision = inside_real(generated, real, radii(real)).double().mean().item()
    assert precision == pytest.approx(covered(g, r)) and 0 < precision < 1
    assert recall(generated, real)(np.arange(70)) == pytest.approx(covered(r, g))


@pytest.mark.parametrize("left", [400, 380, 60, 4])
def test_neighbours_are_looked_up_where_enough_of_the_nearest_are_kept(left: int) -> None:
    """60 and 4 of 400 leave most samples too few among their nearest."""
    generator = torch.Generator().manual_seed(left)
    distance = calc_cdist_full(*2 * (torch.randn(400, 6, generator=generator),))
    kept = torch.randperm(400, generator=generator)[:left]
    nearest = distance.topk(32, largest=False)
    looked_up = _kth(distance, kept, kept, 3, nearest.values, nearest.indices)
    assert torch.equal(looked_up, distance[kept][:, kept].kthvalue(4).values)


@pytest.mark.parametrize("kept", [range(200), [*range(50), *range(100, 200)], range(0, 200, 7), [3, 5, 8, 199]])
def test_recall_of_a_subset_equals_recall_from_scratch(kept):
    generated, real = random_features(200, 10).pooled, random_features(150, 11).pooled
    generated[7] = generated[8]  # two of one place are each other's neighbours
    _, expected = calculate_precision_recall_full(generated[list(kept)], real)
    assert recall(generated, real)(np.array(kept)) == pytest.approx(expected) and 0 < expected < 1


def test_recall_needs_more_samples_than_neighbours():
    features = random_features(6, 12).pooled
    with pytest.raises(UserError, match="3 samples have no 3 neighbours"):
        recall(features, features)(np.arange(3))


def test_thinning_keeps_a_sorted_sets_classes():
    labels = torch.arange(10).repeat_interleave(100)[:, None].float()
    assert torch.equal(thin(labels, 1000), labels)
    thinned = thin(labels, 200)
    assert len(thinned) == 200 and set(torch.bincount(thinned[:, 0].long()).tolist()) <= {19, 20, 21}


def test_accuracy_is_the_share_of_samples_classified_as_their_label():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert correct(logits, torch.tensor([0, 1, 1])).tolist() == [True, True, False]


# deviation from the uncached run


def test_deviation_of_a_constant_offset():
    reference = torch.rand(300, 1, 4, 4) - 0.5  # more than one block of rows
    offset = torch.linspace(0, 0.2, 300)
    images = reference + offset.view(-1, 1, 1, 1)
    assert_close(final_mae(images, reference), offset, READING)
    decibels = psnr(images, reference)
    assert_close(decibels[-1], 20, READING)  # 10 log10(2^2 / 0.2^2)
    assert_close(decibels[0], 10 * np.log10(12 * 255**2), READING)
    assert torch.isfinite(decibels).all() and (decibels.diff() <= 0).all()


@pytest.mark.parametrize("measure", [final_mae, psnr, ssim])
def test_bytes_deviate_as_the_images_they_stand_for(measure):
    images, reference = torch.randint(0, 256, (2, 5, 3, 12, 12), dtype=torch.uint8)
    in_floats = measure(images / 127.5 - 1, reference / 127.5 - 1)
    assert_close(measure(images, reference), in_floats, READING)


def test_structural_similarity_is_the_definition():
    """Wang et al. (2004), Eq. 13 in windows that lie inside; of a video, the mean over its frames."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 14, 15, generator=draw) * 2 - 1
    reference = (images + 0.3 * torch.randn(2, 3, 14, 15, generator=draw)).clamp(-1, 1)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def one(x, y):
        def blurred(image):
            return convolve2d(image, window, mode="valid")

        x, y = ((side.double().numpy() + 1) / 2 for side in (x, y))
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        shared, a, b = blurred(x * y) - mean_x * mean_y, 0.01**2, 0.03**2
        map_ = (2 * mean_x * mean_y + a) * (2 * shared + b) / ((mean_x**2 + mean_y**2 + a) * (var_x + var_y + b))
        return map_.mean()

    channels = zip(images.flatten(0, 1), reference.flatten(0, 1), strict=True)
    expected = np.reshape([one(*channel) for channel in channels], (2, 3)).mean(1)
    assert ssim(images, reference).tolist() == pytest.approx(expected, rel=1e-4)
    videos = [side[:, :, None].transpose(0, 2) for side in (images, reference)]  # the two images are frames of one
    assert ssim(*videos).item() == pytest.approx(np.mean(expected), rel=1e-4)
    with pytest.raises(UserError, match="images of 8x14 are smaller than its window of 11"):
        ssim(images[..., :8, :14], reference[..., :8, :14])


def test_lpips_weighs_the_differences_of_alexnets_layers(tmp_path):
    path = tmp_path / "alexnet.pth"
    with pytest.raises(NotRun, match=r"needs .*alexnet\.pth"):
        load_lpips(path)
    features = alexnet(weights=None).features
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    lines = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
    images, reference = torch.rand(2, 3, 1, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    expected, sides = torch.zeros(3), [(side.expand(-1, 3, -1, -1) - mean) / std for side in (images, reference)]
    with torch.no_grad():
        for number, layers in enumerate((features[:2], features[2:5], features[5:8], features[8:10], features[10:12])):
            sides = [layers(side) for side in sides]
            one, other = (side / side.norm(dim=1, keepdim=True) for side in sides)
            weighed = (one - other) ** 2 * lines[f"lin{number}.model.1.weight"]
            expected += weighed.sum(1).mean((1, 2))
    score = load_lpips(path)
    assert_close(score(images, reference), expected, NETWORK)
    assert score(images, images).tolist() == [0, 0, 0]
    videos = [side.transpose(0, 1)[None] for side in (images, reference)]
    assert_close(score(*videos)[0], expected.mean(), NETWORK)
    with pytest.raises(UserError, match="smaller than 32x32"):
        score(images[..., :16, :16], reference[..., :16, :16])
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"alexnet\.pth: 0\.weight has shape"):
        load_lpips(path)


def test_images_deviate_as_they_are_seen():
    """White and whiter look alike; states of the sampler are compared as they are."""
    images, reference = torch.tensor([[[[1.0, 3.0], [-1.5, 0.5]]]]), torch.tensor([[[[2.0, 0.5], [-1.0, 0.5]]]])
    assert final_mae(images, reference).item() == 0.5 / 4
    assert_close(psnr(images, reference)[0], 10 * np.log10(4 / (0.25 / 4)), READING)
    assert trajectory_mae(images[None], reference[None]).item() == 4 / 4


def test_trajectory_deviation_is_the_mean_difference_at_every_step():
    x, reference = torch.rand(2, 4, 3, 2, 5, 5) * 2 - 1
    expected = torch.stack([final_mae(a, b) for a, b in zip(x, reference, strict=True)])
    assert torch.equal(trajectory_mae(x, reference), expected) and expected.shape == (4, 3)


def test_deviation_from_a_run_of_another_shape_is_refused():
    for measure in (final_mae, psnr):
        with pytest.raises(UserError, match="of the uncached run"):
            measure(torch.zeros(4, 1, 2, 2), torch.zeros(3, 1, 2, 2))
    with pytest.raises(UserError, match="of the uncached run"):
        trajectory_mae(torch.zeros(2, 3, 1, 2, 2), torch.zeros(3, 2, 1, 2, 2))


# scoring a row


@pytest.fixture(scope="module")
def row():
    """A row close to its reference, as a cached run is to the uncached one."""
    uncached = random_samples(128, 20, shift=0.05)
    pooled, spatial, logits = vars(random_features(128, 21)).values()
    near = Features(
        *(a + 0.1 * b for a, b in zip(vars(uncached.features).values(), (pooled, spatial, logits), strict=True))
    )
    other = random_samples(128, 21)
    second = random_features(128, 23), random_features(128, 24), Real(random_features(200, 25))
    images = uncached.images + 0.01 * other.images
    samples = Samples(near, uncached.labels, images, other.readings, imagenet=second[0])
    return samples, replace(uncached, imagenet=second[1]), Real(random_features(200, 22), imagenet=second[2])


def test_a_row_is_scored_with_the_replicates_of_its_intervals(row):
    samples, uncached, real = row
    score = score_row(samples, uncached, real, batches(128, 16), list(METRICS), SCORERS)
    assert json.loads(json.dumps(score, allow_nan=False)) == score
    assert list(score) == list(METRICS)
    for name, cell in score.items():
        statistic = prepare(find_metric(name), samples, Reference(real, uncached, SCORERS))
        assert cell["value"] == statistic(np.arange(128)) and cell["deleted"][1] == statistic(
            np.delete(np.arange(128), range(16, 32))
        )
        assert cell["se"] == jackknife(statistic, batches(128, 16)).se > 0
    theirs = score_row(uncached, None, real, batches(128, 16), ["fid"])["fid"]
    difference = np.subtract(score["fid"]["deleted"], theirs["deleted"])
    assert difference.std() < np.std(theirs["deleted"])  # the shared noise cancels


def test_a_row_against_itself_is_no_distance_away(row):
    samples, _, real = row
    score = score_row(samples, samples, real, batches(128, 16), list(METRICS), SCORERS)
    assert score["mae"] == {"value": 0.0, "se": 0.0, "deleted": [0.0] * 8}
    assert score["ssim"]["value"] == pytest.approx(1) and abs(score["fid_uncached"]["value"]) < 1e-6


def test_the_reference_row_has_no_distance_to_itself(row):
    _, uncached, real = row
    assert list(score_row(uncached, None, real, batches(128, 16), list(METRICS))) == ALONE


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_metric_needs_what_it_declares_and_nothing_else(metric, row):
    samples, uncached, real = row
    without = {
        "labels": (replace(samples, labels=None), Reference(real, replace(uncached, labels=None), SCORERS)),
        "images": (replace(samples, images=None), Reference(real, replace(uncached, images=None), SCORERS)),
        "uncached": (samples, Reference(real, None, SCORERS)),
        "reading": (replace(samples, readings={}), Reference(real, replace(uncached, readings={}), SCORERS)),
        "ImageNet": (replace(samples, imagenet=None), Reference(replace(real, imagenet=None), uncached, SCORERS)),
    }
    complete = compute(metric.name, samples, Reference(real, uncached, SCORERS))
    for name, (bare, reference) in without.items():
        if name.lower() in metric.needs:
            with pytest.raises(UserError, match="VBench's results" if metric.name == "vbench" else name):
                compute(metric.name, bare, reference)
        else:
            assert compute(metric.name, bare, reference) == complete


def test_kid_is_torch_fidelitys_over_all_pairs():
    """Which it averages over subsets of equal size: with one subset of everything, the same number."""
    generated, real = random_features(120, 30, shift=0.1), random_features(120, 31)
    keywords = {"kid_subsets": 1, "kid_subset_size": 120, "verbose": False}
    theirs = kid_features_to_metric(generated.pooled.double(), real.pooled.double(), **keywords)[KEY_METRIC_KID_MEAN]
    assert compute("kid", Samples(generated), Reference(Real(real))) == pytest.approx(SCALE * theirs, rel=1e-9)


def test_kid_of_some_samples_is_that_of_these_samples_alone():
    features, real = random_features(90, 32, shift=0.1), Real(random_features(200, 33))
    of_some = prepare(find_metric("kid"), Samples(features), Reference(real))
    kept = np.concatenate([np.arange(20), np.arange(31, 90)])
    alone = Samples(Features(*(values[torch.from_numpy(kept)] for values in vars(features).values())))
    assert of_some(kept) == pytest.approx(compute("kid", alone, Reference(real)), rel=1e-9)
    with pytest.raises(UserError, match="1 sample makes no pair"):
        of_some(np.array([3]))
    with pytest.raises(UserError, match="kid is of images"):
        compute("kid", Samples(Features(*(torch.zeros(4, 3, 2) for _ in range(3)))), Reference(real))


def test_kid_of_other_networks_does_not_depend_on_the_size_of_their_features():
    """Inception's are what the published kernel is for; of others 32 times as large it would be in millions."""
    generated, real = random_features(60, 36, shift=0.1), random_features(90, 37)
    large = [Features(*(32 * values for values in vars(features).values())) for features in (generated, real)]

    def scored(samples, others, kernel):
        return compute("kid", Samples(samples), Reference(Real(others, kid_kernel=kernel)))

    assert scored(*large, False) == pytest.approx(scored(generated, real, False), rel=1e-9)
    assert scored(*large, True) > 1000 * scored(generated, real, True) > 0
    size = real.pooled.double().square().mean().sqrt()
    unit = [Features(*(part.double() / size for part in vars(features).values())) for features in (generated, real)]
    assert scored(generated, real, False) == pytest.approx(scored(*unit, True), rel=1e-9)


def test_kid_is_unbiased_where_the_frechet_distance_is_not():
    """Of samples like the real ones its mean is 0 at any number; the distance is far above the floor of many."""
    draw = torch.Generator().manual_seed(0)
    real = Real(Features(*(torch.randn(2000, 16, generator=draw) for _ in range(3))))

    def scores(name, trials=60):
        sets = (Features(*(torch.randn(24, 16, generator=draw),) * 3) for _ in range(trials))
        return np.array([compute(name, Samples(features), Reference(real)) for features in sets])

    kid, fid = scores("kid"), scores("fid")
    assert abs(kid.mean()) < 3 * kid.std() / len(kid) ** 0.5 and kid.min() < 0 < kid.max()
    assert fid.mean() > 3 * fid.std() > 0


def test_what_the_real_images_take_is_computed_once(monkeypatch):
    real, calls = Real(random_features(50, 34)), []
    assert real.once(len) == real.once(len) == 50
    for _ in range(2):
        real.once(calls.append)
    assert calls == [real.features]


def test_the_catalogue_names_what_there_is():
    for metric in METRICS.values():
        assert callable(metric.function()), metric.name
        assert metric.settings is None or metric.settings in Scoring.model_fields | Suite.model_fields
    cells = {field.alias or name for name, field in PaperCell.model_fields.items()}
    assert set(paper_headings()) == cells - {"latency_s", "tmacs", "speedup"}
    assert usual_metrics() == ("fid", "sfid", "is", "precision", "recall", "accuracy", "mae", "psnr", "feature_mse")


def test_samples_that_are_not_finite_are_named():
    samples = random_samples(8, 23)
    images = samples.images.clone()
    images[5, 0, 2, 2] = torch.nan
    with pytest.raises(UserError, match=r"images: sample 5 holds NaN or infinity \(1 of 8"):
        replace(samples, images=images)
    pooled = samples.features.pooled.clone()
    pooled[2, 7] = -torch.inf
    with pytest.raises(UserError, match="pooled: sample 2 holds"):
        replace(samples, features=replace(samples.features, pooled=pooled))


def test_rows_that_do_not_belong_together_are_refused(row):
    samples, uncached, real = row
    groups = batches(128, 16)
    with pytest.raises(UserError, match="'recal': unknown; did you mean 'recall'"):
        score_row(samples, uncached, real, groups, ["recal"])
    with pytest.raises(UserError, match="groups do not hold each of 128 samples once"):
        score_row(samples, uncached, real, groups[:-1], ["fid"])
    with pytest.raises(UserError, match="labels differ"):
        score_row(samples, replace(uncached, labels=uncached.labels.flip(0)), real, groups, ["fid"])
    with pytest.raises(UserError, match="128 samples, 64 of the reference row"):
        score_row(samples, random_samples(64, 0), real, groups, ["fid"])
    with pytest.raises(UserError, match="10 labels for 128 samples"):
        replace(samples, labels=torch.arange(10))


# the seed-noise yardstick


def test_partners_show_the_same():
    labels = torch.tensor([3, 1, 3, 1, 3, 2, 1, 1, 3])
    partners = Partners.among(labels, 9)
    first, second = partners.next
    assert partners.matched and torch.equal(labels[first], labels[second]) and (first != second).all()
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4, 6, 7, 8]  # the only 2 has no partner
    one, other = partners.halves
    assert torch.equal(labels[one], labels[other]) and sorted([*one, *other]) == [0, 1, 2, 3, 4, 6, 7, 8]
    captions = Partners.among(torch.stack([labels // 2, labels % 2], dim=1), 9)
    assert np.array_equal(captions.next, partners.next)
    assert not Partners.among(torch.arange(9), 9).matched  # every one shows something of its own
    assert np.array_equal(Partners.among(None, 3).next, [[0, 1, 2], [1, 2, 0]])


def test_the_yardstick_is_the_distance_of_two_runs_of_different_noise():
    """Classes far apart, with noise of their own: partners of another class would be much farther apart."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(960) % 10

    def run():
        pooled = 20 * torch.eye(10, 16)[labels] + torch.randn(960, 16, generator=draw)
        images = (labels / 10).view(-1, 1, 1, 1) - 0.5 + 0.05 * torch.randn(960, 1, 12, 12, generator=draw)
        return Samples(Features(pooled, pooled, pooled), labels, images)

    one, other = run(), run()
    real, groups = Real(one.features), batches(960, 80)
    metrics = [name for name, metric in METRICS.items() if metric.distance]
    _, yardstick = seed_noise(one, real, groups, [*metrics, "fid"], SCORERS)
    assert list(yardstick) == metrics
    for name in metrics:
        if not find_metric(name).moments:
            two_runs = jackknife(prepare(find_metric(name), one, Reference(real, other, SCORERS)), groups)
            apart = abs(yardstick[name]["value"] - two_runs.value)
            assert apart < 4 * np.hypot(yardstick[name]["se"], two_runs.se), name
    halves = Partners.among(labels, 960).halves
    first, second = (one.taken(torch.from_numpy(half)) for half in halves)
    of_halves = compute("fid_uncached", first, Reference(real, second))
    assert yardstick["fid_uncached"]["value"] == of_halves
    assert of_halves > compute("fid_uncached", one, Reference(real, other)) > 0  # half as many, about twice the bias


def test_too_few_pairs_are_no_yardstick():
    """Six pairs of classes that lie in two batches each: without either batch none is left of the halves."""
    samples = replace(random_samples(24, 0), labels=torch.arange(24) % 12)
    _, yardstick = seed_noise(samples, Real(samples.features), batches(24, 12), ["mae", "fid_uncached"], {})
    assert not yardstick
    _, yardstick = seed_noise(samples, Real(samples.features), batches(24, 4), ["mae", "fid_uncached"], {})
    assert set(yardstick) == {"mae", "fid_uncached"}


def test_leaving_out_a_batch_leaves_out_its_pairs():
    samples = random_samples(40, 50)
    _, yardstick = seed_noise(samples, Real(samples.features), batches(40, 10), ["mae"], {})
    first, second = Partners.among(samples.labels, 40).next
    apart = (samples.images[first] - samples.images[second]).abs().flatten(1).mean(1)
    kept = torch.from_numpy((first >= 10) & (second >= 10))
    assert kept.sum() == 20  # 10 to 19 are beside 20 to 29, and these beside 30 to 39
    assert yardstick["mae"]["deleted"][0] == pytest.approx(apart[kept].double().mean().item())


def test_jackknife_of_a_frechet_distance_covers_its_mean_at_this_sample_size():
    rng, trials, groups = np.random.default_rng(0), 400, batches(128, 16)
    real = standard_normal(4)
    intervals = []
    for _ in range(trials):
        features = torch.from_numpy(rng.normal(0.3, 1.1, size=(128, 4)))
        intervals.append(jackknife(lambda kept, features=features: frechet_distance(features[kept], real), groups))
    mean = np.mean([interval.value for interval in intervals])
    covered = np.mean([interval.low <= mean <= interval.high for interval in intervals])
    assert 0.91 < covered < 0.98


def test_odd_images_are_named():
    varied = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert odd_images(varied, None) == odd_images(varied, varied.flip(0)) == []
    assert odd_images(torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 1, 4, 4), None) == ["every sample is of one colour"]
    assert odd_images(varied[:1].expand(5, -1, -1, -1), None) == ["all samples are the same image"]
    assert odd_images(varied, varied.clone()) == [
        "its samples are the uncached row's to the bit, though it computed less"
    ]


def test_the_script_that_times_scoring_still_runs():
    """`tests/score_times.py`, which needs a GPU to mean something."""
    rows = score_times.main(["--size", "toy"])["rows"]
    assert [row["metric"] for row in rows] == [*score_times.OF_FEATURES, *score_times.OF_IMAGES]
    assert all(row["replicates"] == 5 for row in rows)
