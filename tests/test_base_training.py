"""Training of the embedded suite's models, and the weights that ship with the package."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tcbench.data import Dataset, load_images, split
from tcbench.errors import UserError
from tcbench.files import read_json, read_tensors, write_tensors
from tcbench.models.classifier import DIGITS_CLASSIFIER, DigitsCNN, load_classifier
from tcbench.models.specs import MODELS, build_transformer, load_transformer
from tcbench.models.weights import ASSETS
from tcbench.training.base import PretrainRecipe, eps_loss, pretrain_denoiser
from tcbench.training.classifier import ClassifierRecipe, accuracy, train_classifier
from tcbench.training.common import deterministic

SMALL = MODELS["digits-dit"].model_copy(update={"num_blocks": 2, "num_heads": 2, "patch_size": 4, "name": "small"})
RECIPE = PretrainRecipe(iterations=24, batch_size=16, warmup=2, ema=0.5, log_every=12)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_images("digits")


def trained(digits: Dataset, folder: Path, recipe: PretrainRecipe = RECIPE) -> tuple[dict, dict[str, Any]]:
    pretrain_denoiser(SMALL, digits, recipe, "cpu", folder / "w.safetensors", folder / "log.json")
    return read_tensors(folder / "w.safetensors")[0], read_json(folder / "log.json")


def test_denoiser_learns_and_is_reproducible(digits: Dataset, tmp_path: Path) -> None:
    first, log = trained(digits, tmp_path / "a")
    history = log["history"]
    assert [record["iteration"] for record in history] == [12, 24]
    assert history[1]["loss"] < history[0]["loss"]
    assert history[1]["held_out_loss"] < history[0]["held_out_loss"] < 1
    assert history[1]["train_loss"] == pytest.approx(history[1]["held_out_loss"], rel=0.1)
    assert PretrainRecipe(**log["recipe"]) == RECIPE

    torch.rand(3)  # the global generator does not matter
    again, log_again = trained(digits, tmp_path / "b")
    assert log_again == log
    assert all(torch.equal(first[key], again[key]) for key in first)
    other, _ = trained(digits, tmp_path / "c", RECIPE.model_copy(update={"seed": 1}))
    assert not torch.equal(first["proj_out_2.weight"], other["proj_out_2.weight"])

    model = load_transformer(SMALL, tmp_path / "a" / "w.safetensors")
    assert torch.equal(model.proj_out_2.weight, first["proj_out_2.weight"])
    assert read_tensors(tmp_path / "a" / "w.safetensors")[1]["model"] == "small"


@pytest.mark.parametrize(("dropout", "moved"), [(0.0, [True] * 10 + [False]), (1.0, [False] * 10 + [True])])
def test_dropped_labels_become_the_null_label(
    digits: Dataset, tmp_path: Path, dropout: float, moved: list[bool]
) -> None:
    recipe = RECIPE.model_copy(update={"iterations": 8, "weight_decay": 0.0, "label_dropout": dropout})
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    before = build_transformer(SMALL, seed=recipe.seed).get_parameter(table)
    after = trained(digits, tmp_path, recipe)[0][table]
    assert (before != after).any(1).tolist() == moved


def test_diverged_training_stops(digits: Dataset, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"learning_rate": 1e30, "warmup": 0, "log_every": 4})
    with pytest.raises(UserError, match="lower learning_rate"):
        trained(digits, tmp_path, recipe)
    assert not (tmp_path / "w.safetensors").exists()


def test_data_must_fit_the_model(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tiny-dit: images \[1, 16, 16\]"):
        pretrain_denoiser(MODELS["tiny-dit"], digits, RECIPE, "cpu", tmp_path / "w", tmp_path / "log")


def test_determinism_setting_is_restored() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError), deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()


def test_classifier_learns_and_is_reproducible(digits: Dataset, tmp_path: Path) -> None:
    recipe = ClassifierRecipe(iterations=120, warmup=5, learning_rate=5e-3, batch_size=32, log_every=40)
    for name in "ab":
        train_classifier(digits, recipe, "cpu", tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json")
    history = read_json(tmp_path / "a.json")["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["held_out_accuracy"] > 0.3  # chance is 0.1
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "b.json")
    first, again = (read_tensors(tmp_path / f"{name}.safetensors")[0] for name in "ab")
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_shipped_classifier(digits: Dataset) -> None:
    model = load_classifier()
    assert accuracy(model, split(digits)[1]) > 0.95
    log = read_json(ASSETS / "digits/classifier-log.json")
    assert ClassifierRecipe(**log["recipe"]) == ClassifierRecipe()
    assert log["history"][-1]["held_out_accuracy"] == pytest.approx(accuracy(model, split(digits)[1]), abs=0.01)


def test_classifier_outputs(digits: Dataset) -> None:
    model, images = load_classifier(), digits.images[:5]
    with torch.no_grad():
        output, one = model(images), model(images[3:4])
    shapes = {key: tuple(value.shape) for key, value in output.items()}
    assert shapes == {"features": (5, 64), "spatial": (5, 7, 4, 4), "logits": (5, 10)}
    assert output["spatial"].min() < 0  # before the activation
    assert torch.allclose(output["features"][3:4], one["features"], atol=1e-5)


@pytest.mark.parametrize(("how", "says"), [("truncated", "truncated"), ("shape", "head.bias has shape")])
def test_bad_classifier_files_are_named(tmp_path: Path, how: str, says: str) -> None:
    path = tmp_path / "cnn.safetensors"
    state = DigitsCNN().state_dict()
    write_tensors(path, state | {"head.bias": torch.zeros(3)} if how == "shape" else state)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=says) as caught:
        load_classifier(path)
    assert str(path) in str(caught.value)


def test_shipped_denoiser(digits: Dataset) -> None:
    log = read_json(ASSETS / "digits/denoiser-log.json")
    assert PretrainRecipe(**log["recipe"]) == PretrainRecipe(bfloat16=True, compile=True)
    model, (_, held_out) = load_transformer(MODELS["digits-dit"]), split(digits)
    timesteps = torch.arange(len(held_out)) * 1000 // len(held_out)
    noise = torch.randn(held_out.images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = eps_loss(model, held_out.images, held_out.labels, timesteps, noise)
        null = eps_loss(model, held_out.images, torch.full_like(held_out.labels, 10), timesteps, noise)
        wrong = eps_loss(model, held_out.images, (held_out.labels + 1) % 10, timesteps, noise)
    assert right == pytest.approx(log["history"][-1]["held_out_loss"], rel=0.1)
    assert right < null < wrong  # it listens to the label, and guidance has a direction


def test_shipped_files_are_small() -> None:
    for name in (DIGITS_CLASSIFIER, MODELS["digits-dit"].weights):
        assert (ASSETS / name).stat().st_size < 5e6
