
import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file

from tcbench.errors import UserError
from tcbench.metrics import (
    METRICS,
    Features,
    Real,
    Reference,
    Samples,
    make_extractor,
)
from tcbench.models.classifier import DigitsCNN


def random_features(count, seed, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(99)) / 8
    pooled = torch.randn(count, 64, generator=draw) @ mix + shift
    spatial = torch.randn(count, 112, generator=draw) + shift
    return Features(pooled, spatial, 3 * torch.randn(count, 10, generator=draw))


def random_samples(count, seed, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 16, 16, generator=draw) * 2 - 1
    return Samples(random_features(count, seed, shift), torch.arange(count) % 10, images)


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
    ours = {name: METRICS[name].compute(samples, reference) for name in ("is", "fid", "precision", "recall")}
    assert 0 < ours["recall"] < 1 or 0 < ours["precision"] < 1
    assert ours == pytest.approx(
        {
            "is": theirs["inception_score_mean"],
            "fid": theirs["frechet_inception_distance"],
            "precision": theirs["precision"],
            "recall": theirs["recall"],
        },
        rel=1e-5,
    )


def test_features_do_not_depend_on_the_batch_size(digits):
    images = random_images(50, 3)
    for one, other in zip(
        vars(digits.extract(images, 50)).values(), vars(digits.extract(images, 7)).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_digits_layers_are_the_networks_outputs_on_images_in_minus_one_to_one(digits):
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    features = digits.extract(images)
    with torch.no_grad():
        direct = digits.network.network(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 16, 16))
    torch.testing.assert_close(features.pooled, direct["features"])
    torch.testing.assert_close(features.spatial, direct["spatial"].reshape(2, 112))
    torch.testing.assert_close(features.logits, direct["logits"])


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), random_images(0, 0)],
    ids=["float", "three channels", "none"],
)
def test_unfit_images_are_refused(digits, images):
    with pytest.raises(UserError, match=r"give torch.uint8 \(n, 1, 16, 16\)"):
        digits.extract(images)


def test_unfit_weights_are_named(tmp_path, weights):
    with pytest.raises(UserError, match="unknown; use one of digits-cnn, inception-v3-adm"):
        make_extractor("inception")
    with pytest.raises(UserError, match="missing.safetensors"):
        make_extractor("digits-cnn", tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="expected 0123"):
        make_extractor("digits-cnn", weights, digest="0123")
    other = tmp_path / "other.safetensors"
    save_file({"other": torch.zeros(1)}, other)
    with pytest.raises(UserError, match=r"other.safetensors: not this extractor's weights"):
        make_extractor("digits-cnn", other)
    with pytest.raises(UserError, match="needs weights"):
        make_extractor("inception-v3-adm")
    with pytest.raises(UserError, match="expected 6726825d"):
        make_extractor("inception-v3-adm", weights)
    not_torch = tmp_path / "inception.pth"
    not_torch.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"inception.pth: not this extractor's weights"):
        make_extractor("inception-v3-adm", not_torch, digest="")  # an empty digest means the published one

