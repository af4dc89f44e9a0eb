"""The digits data: shape, range, classes, splits, and its integrity check."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn import datasets

import tcbench.data as data_module
from tcbench.data import Dataset, split, to_uint8
from tcbench.data.augment import Affine
from tcbench.errors import UserError
from tcbench.registry import data_source


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data_source("digits").images()


def test_digits(digits: Dataset) -> None:
    assert digits.images.shape == (1797, 1, 16, 16)
    assert digits.images.dtype == torch.float32
    assert digits.labels.dtype == torch.int64
    assert (digits.images.min(), digits.images.max()) == (-1, 1)
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    small = torch.from_numpy(datasets.load_digits().images / 8 - 1).float()
    shrunk = torch.nn.functional.avg_pool2d(digits.images, 2)[:, 0]
    assert (shrunk - small).abs().mean() < 0.1  # the same pictures, in the same order, the right way up


def test_altered_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    altered = datasets.load_digits()
    altered.images[17, 3, 3] += 1
    monkeypatch.setattr(datasets, "load_digits", lambda: altered)
    data_module.handwriting.cache_clear()  # it is checked when first read
    with pytest.raises(UserError, match="reinstall scikit-learn"):
        data_source("digits").images()


def test_unknown_data_is_refused() -> None:
    with pytest.raises(UserError, match="no images of it are read here"):
        data_source("imagenet").images()


def test_split_is_stratified_disjoint_and_fixed(digits: Dataset) -> None:
    train, held_out = split(digits)
    assert (len(train), len(held_out)) == (1617, 180)
    assert held_out.labels.bincount().tolist() == [18] * 10

    def prints(part: Dataset) -> set[str]:
        return {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in part.images}

    assert not prints(train) & prints(held_out)
    # the shipped weights have not seen these images; a different split would make their held-out figures false
    assert hashlib.sha256(held_out.labels.numpy().tobytes()).hexdigest()[:16] == "39265bec1b4ea324"


def test_to_uint8() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([[-7.0, 7.0]])).tolist() == [[0, 255]]
    with pytest.raises(UserError, match="image 1 holds NaN"):
        to_uint8(torch.tensor([[0.0, 0.0], [0.0, float("nan")]]))


def test_affine_moves_by_what_it_says() -> None:
    dot = torch.full((256, 1, 16, 16), -1.0)
    dot[:, :, 7:9, 7:9] = 1
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(Affine()(dot, generator), dot)
    moved = Affine(shift=2)(dot, generator)
    assert (moved.min() >= -1) and (moved.max() <= 1)
    weight = moved[:, 0].numpy() + 1
    for axis in (1, 2):
        travel = (weight.sum(axis) * np.arange(16)).sum(1) / weight.sum((1, 2)) - 7.5
        assert np.abs(travel).max() < 2.1
        assert travel.std() == pytest.approx(4 / 12**0.5, rel=0.1)  # uniform on [-2, 2]


def test_affine_turns_and_scales() -> None:
    bar = torch.full((256, 1, 16, 16), -1.0)
    bar[:, :, 7:9, 2:14] = 1
    generator = torch.Generator().manual_seed(0)
    weight = Affine(rotation=30)(bar, generator)[:, 0].double() + 1
    y, x = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    angle = torch.rad2deg(0.5 * torch.atan2(2 * (weight * x * y).sum((1, 2)), (weight * (x**2 - y**2)).sum((1, 2))))
    assert 25 < angle.abs().max() < 31
    length = (Affine(scale=0.2)(bar, generator)[:, 0].double() + 1).sum((1, 2)) / (2 * 24)
    assert length.min() < 0.8 and length.max() > 1.2  # an area, so up to 0.8**2 and 1.25**2
