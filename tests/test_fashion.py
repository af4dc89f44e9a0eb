"""Fashion-MNIST and CIFAR-10 in miniature: loaders, the recipes of their suites, classifiers, and the trial."""

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from tcbench.config.load import load_suite
from tcbench.config.needs import needs
from tcbench.data import to_uint8
from tcbench.data.sets import fashion as fashion_module
from tcbench.data.sets.cifar10 import Cifar10
from tcbench.data.sets.fashion import Fashion
from tcbench.errors import UserError
from tcbench.metrics.extractors import make_extractor
from tcbench.models.classifier import FashionCNN, load_classifier
from tcbench.models.networks import load_transformer
from tcbench.models.specs import MODELS
from tcbench.record.files import read_json, read_tensors
from tcbench.registry import data_source
from tcbench.stages import pretrain as pretrain_module
from tcbench.stages import trial
from tcbench.stages.pretrain import pretrain
from tcbench.training.base import PretrainRecipe
from tests.suites import altered

CONFIG = Path(__file__).parent.parent / "config" / "fashion.yaml"
SIZE = {"num_blocks": 2, "num_heads": 1, "patch_size": 8}
ON_A_CPU = {"bfloat16": False, "compile": False}


def drawn(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 28, 28], classes [n]): a bar at a height that says the class."""
    labels = np.arange(count, dtype=np.uint8) % 10
    images = np.random.default_rng(len(part)).integers(0, 60, (count, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3] = 255
    return images, labels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of Fashion-MNIST's form, 120 images to train on and 40 held out; images compressed, labels not."""
    root = tmp_path / "fashion"
    root.mkdir()
    digests: dict[str, dict[str, str]] = {}
    for part, prefix, count in (("train", "train", 120), ("test", "t10k", 40)):
        images, labels = drawn(part, count)
        header = [np.array(numbers, ">u4").tobytes() for numbers in ((2051, count, 28, 28), (2049, count))]
        content = {
            f"{prefix}-images-idx3-ubyte": header[0] + images.tobytes(),
            f"{prefix}-labels-idx1-ubyte": header[1] + labels.tobytes(),
        }
        (root / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content[f"{prefix}-images-idx3-ubyte"]))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(content[f"{prefix}-labels-idx1-ubyte"])
        digests[part] = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    monkeypatch.setattr(fashion_module, "_SHA256", digests)
    monkeypatch.setattr(Fashion, "usual_folders", (tmp_path / "nowhere", root))
    return root


def test_fashion_is_read_as_it_is_with_a_margin(folder: Path) -> None:
    for part, count in (("train", 120), ("test", 40)):
        images, labels = drawn(part, count)
        data = Fashion(folder).images(held_out=part == "test")
        assert (data.images.shape, data.images.dtype) == ((count, 1, 32, 32), torch.float32)
        assert torch.equal(to_uint8(data.images)[:, 0, 2:-2, 2:-2], torch.from_numpy(images))
        margin = torch.ones(32, 32, dtype=torch.bool)
        margin[2:-2, 2:-2] = False
        assert (data.images[:, 0, margin] == -1).all()
        assert data.labels.tolist() == labels.tolist()
        found = data_source("fashion").images(held_out=part == "test")  # in the second of the usual folders
        assert torch.equal(found.images, data.images)


def test_fashion_files_are_checked(folder: Path) -> None:
    path = folder / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x00")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte: holds sha256 .*; get Fashion-MNIST again"):
        Fashion(folder).images(held_out=True)
    assert len(Fashion(folder).images()) == 120  # whose files are whole
    path.unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz: not found; install Debian's"):
        Fashion(folder).images(held_out=True)
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        Fashion(folder).images()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.Tensor, list[int]]:
    """(where files of CIFAR-10's form are, 120 images to train on and 40 held out; what they show; classes)."""
    root, labels = tmp_path / "data" / CIFAR10.base_folder, [number * 3 % 10 for number in range(160)]
    pixels = np.random.default_rng(0).integers(0, 90, (160, 3, 32, 32), np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[label % 3, 3 * label : 3 * label + 3] = 255

    def write(name: str, content: Any) -> tuple[str, str]:
        (root / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((root / name).read_bytes()).hexdigest()

    root.mkdir(parents=True)
    batches = [
        write(name, {"data": pixels[part].reshape(-1, 3072), "labels": labels[part]})
        for name, part in (
            ("data_batch_1", slice(0, 50)),
            ("data_batch_2", slice(50, 120)),
            ("test_batch", slice(120, 160)),
        )
    ]
    names, digest = write("batches.meta", {"label_names": [f"class {number}" for number in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", batches[:2])
    monkeypatch.setattr(CIFAR10, "test_list", batches[2:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": names, "key": "label_names", "md5": digest})
    monkeypatch.setattr(Cifar10, "usual_folders", (root.parent,))
    return root.parent, torch.from_numpy(pixels), labels


def test_cifar_is_read_as_it_is(cifar: tuple[Path, torch.Tensor, list[int]]) -> None:
    folder, pixels, labels = cifar
    train, test = Cifar10(folder).images(), Cifar10(folder).images(held_out=True)
    assert (train.images.shape, train.images.dtype) == ((120, 3, 32, 32), torch.float32)
    assert torch.equal(to_uint8(torch.cat([train.images, test.images])), pixels)
    assert train.labels.tolist() + test.labels.tolist() == labels
    (folder / CIFAR10.base_folder / "test_batch").write_bytes(b"else")
    with pytest.raises(UserError, match="missing or damaged; let torchvision download CIFAR10 into"):
        Cifar10(folder).images(held_out=True)


def test_suite_says_what_is_missing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suite = load_suite(CONFIG)
    assert {str(file.path) for file in suite.files.values()} == {
        suite.model.weights,
        str(suite.scoring.extractor_weights),
    }
    assert {need.name: need.problem for need in needs(suite)} == {
        "denoiser": "not there",
        "classifier": "not there",
        "data": None,
        "scoring.metrics": None,
    }


@pytest.mark.parametrize("name", ["fashion", "cifar10"])
def test_suite_trains_its_networks(
    name: str, folder: Path, cifar: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipes of full size but for the size; what they write is what the suite reads."""
    suite, data = altered(load_suite(CONFIG.with_stem(name)), {"model.device": "cpu"}), data_source(name)
    small = MODELS[suite.model.name].model_copy(update=SIZE)
    monkeypatch.setitem(pretrain_module.MODELS, small.name, small)
    changes = {"iterations": 30, "batch_size": 16, "warmup": 2, "log_every": 15}
    pretrain(suite, "denoiser", tmp_path, changes | ON_A_CPU | {"ema": 0.5})
    log = read_json(tmp_path / "denoiser-log.json")
    recipe = dict(data.recipes["denoiser"]) | changes | ON_A_CPU | {"ema": 0.5}
    assert PretrainRecipe(**log["recipe"]) == PretrainRecipe(**recipe)
    assert log["history"][1]["held_out_loss"] < log["history"][0]["held_out_loss"] < 1
    load_transformer(small, tmp_path / "denoiser.safetensors")

    pretrain(suite, "classifier", tmp_path, changes)
    history = read_json(tmp_path / "classifier-log.json")["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    extractor = make_extractor(f"{name}-cnn", tmp_path / "classifier.safetensors")
    features = extractor.extract(to_uint8(data.images(held_out=True).images))
    shapes = {name: tuple(values.shape) for name, values in vars(features).items()}
    assert shapes == {"pooled": (40, 128), "spatial": (40, 448), "logits": (40, 10)}
    with pytest.raises(UserError, match="have no classifier to train; known: cifar10, digits, fashion"):
        pretrain(altered(suite, {"data.name": "imagenet"}), "classifier", tmp_path, {})
    with pytest.raises(UserError, match=f"{name}-cnn: needs weights; run `tcbench pretrain {name} classifier`"):
        make_extractor(f"{name}-cnn")


def test_features_depend_on_the_sample_alone() -> None:
    torch.manual_seed(0)
    network, images = FashionCNN().eval(), torch.rand(5, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        together, alone = network(images), network(images[3:4])
    assert together["spatial"].min() < 0  # before the activation
    assert all(torch.allclose(together[name][3:4], alone[name], atol=1e-5) for name in together)


def test_trial_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["num_blocks=2", "num_heads=1", "patch_size=8"]
    recipe = ["iterations=4", "batch_size=4", "warmup=1", "log_every=2", "bfloat16=false", "compile=false"]
    arguments = ["--data", str(folder), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    arguments += ["--set", *recipe, "--model", *size, "--classifier", "iterations=4", "batch_size=8", "log_every=2"]
    arguments += ["--scales", "1", "1.5", "--samples", "20", "--final", "30", "--fine-steps", "3", "--steps", "2"]
    arguments += ["--checkpoints", "2", "--batch", "10"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tcbench.training.base.write_log", stop)
        trial.main(arguments)
    trial.main(arguments)
    scores = read_json(tmp_path / "out" / "scores.json")
    assert list(scores["checkpoints"]) == ["2"]  # scored before the stop
    assert set(scores["guidance"]) == {"1.0", "1.5"} and set(scores["floor"]) == {"20", "30"}
    best = min(scores["guidance"], key=lambda scale: scores["guidance"][scale]["fid"])
    assert (scores["final"]["scale"], scores["final"]["samples"], scores["fine"]["steps"]) == (float(best), 30, 3)
    shapes = dict(setting.split("=") for setting in size)
    spec = MODELS["fashion-dit"].model_copy(update={name: int(value) for name, value in shapes.items()})
    kept, trained = (
        load_transformer(spec, tmp_path / "out"),
        read_tensors(tmp_path / "work" / "denoiser.safetensors")[0],
    )
    assert all(torch.equal(value, trained[name].half().float()) for name, value in kept.named_parameters())
    load_classifier(FashionCNN, tmp_path / "out" / "classifier.safetensors")
    assert (tmp_path / "out" / "samples.png").stat().st_size > 0
