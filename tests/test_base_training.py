"""Training of the embedded suites' models, and the weights that ship with the package."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tcbench.data import Dataset, split
from tcbench.errors import UserError
from tcbench.models.adapter import Text
from tcbench.models.classifier import DIGITS_CLASSIFIER, DigitsCNN, load_classifier
from tcbench.models.networks import build_transformer, load_transformer, make_adapter
from tcbench.models.specs import MODELS
from tcbench.models.text import encode_text, load_text_encoder, text_encoder_beside
from tcbench.outside.places import ASSETS, locate
from tcbench.record.files import read_json, read_tensors, sha256, write_tensors
from tcbench.registry import data_source
from tcbench.training.base import Conditioned, PretrainRecipe, denoising_loss, pretrain_denoiser
from tcbench.training.classifier import ClassifierRecipe, accuracy, train_classifier
from tcbench.training.running import deterministic
from tests.floors import NETWORK, assert_close

SMALL = MODELS["digits-dit"].model_copy(update={"num_blocks": 2, "num_heads": 2, "patch_size": 4, "name": "small"})
RECIPE = PretrainRecipe(iterations=24, batch_size=16, warmup=2, ema=0.5, log_every=12)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data_source("digits").images()


def trained(digits: Dataset, folder: Path, recipe: PretrainRecipe = RECIPE) -> tuple[dict, dict[str, Any]]:
    pretrain_denoiser(SMALL, *split(digits), "eps", recipe, "cpu", folder / "w.safetensors", folder / "log.json")
    return read_tensors(folder / "w.safetensors")[0], read_json(folder / "log.json")


def test_denoiser_learns_and_is_reproducible(digits: Dataset, tmp_path: Path) -> None:
    first, log = trained(digits, tmp_path / "a")
    assert log["weights"] == sha256(tmp_path / "a" / "w.safetensors")
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
    before = build_transformer(SMALL, seed=recipe.seed).get_parameter(table).half()
    after = trained(digits, tmp_path, recipe)[0][table]
    assert (before != after).any(1).tolist() == moved


def test_diverged_training_stops(digits: Dataset, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"learning_rate": 1e30, "warmup": 0, "log_every": 4})
    with pytest.raises(UserError, match="lower learning_rate"):
        trained(digits, tmp_path, recipe)
    assert not (tmp_path / "w.safetensors").exists()


def test_data_must_fit_the_model(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tiny-dit: images \[1, 16, 16\]"):
        pretrain_denoiser(MODELS["tiny-dit"], digits, digits, "eps", RECIPE, "cpu", tmp_path / "w", tmp_path / "log")
    with pytest.raises(UserError, match="with classes, not what a pixart model"):
        pretrain_denoiser(MODELS["scenes-pixart"], digits, digits, "eps", RECIPE, "cpu", tmp_path / "w", tmp_path / "l")


SMALL_TEXT = {
    "scenes": MODELS["scenes-pixart"].model_copy(update={"num_blocks": 2, "num_heads": 1, "patch_size": 4}),
    "moving": MODELS["moving-osp"].model_copy(update={"num_blocks": 2, "num_heads": 1, "dense_blocks": (0,)}),
}


@pytest.mark.parametrize(("name", "target"), [("scenes", "eps"), ("moving", "v")])
def test_an_interrupted_captioned_training_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: Any
) -> None:
    spec, data = SMALL_TEXT[name], data_source(name).compose(range(32), held_out=False)
    recipe = PretrainRecipe(**data_source(name).recipes["denoiser"]).model_copy(
        update={"iterations": 12, "batch_size": 4, "warmup": 2, "log_every": 4, "ema": 0.5}
    )

    def train(folder: str) -> Path:
        out = tmp_path / folder / "denoiser.safetensors"
        out.parent.mkdir(exist_ok=True)
        pretrain_denoiser(spec, data, data[:8], target, recipe, "cpu", out, out.with_name("log.json"))
        return out

    whole, calls = train("whole"), 0

    def interrupt(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 22:  # the sixth iteration: four, twice eight evaluations, and two more
            raise KeyboardInterrupt
        return denoising_loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tcbench.training.base.denoising_loss", interrupt)
        train("cut")
    state = tmp_path / "cut" / "denoiser-state.pt"
    assert state.exists()
    cut = train("cut")
    assert not state.exists()
    assert read_json(cut.with_name("log.json")) == read_json(whole.with_name("log.json"))
    for one, other in ((whole, cut), (text_encoder_beside(whole), text_encoder_beside(cut))):
        first, again = read_tensors(one)[0], read_tensors(other)[0]
        assert all(torch.equal(first[key], again[key]) for key in first)
    history = read_json(whole.with_name("log.json"))["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    text = load_text_encoder(text_encoder_beside(whole))
    assert not torch.equal(text.shared.weight, Conditioned(spec, "cpu", recipe.seed).encoder.shared.weight)


def test_a_state_of_another_recipe_is_refused(tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tcbench.training.base.write_log", stop)
        trained(digits, tmp_path)
    with pytest.raises(UserError, match="an interrupted run of another recipe"):
        trained(digits, tmp_path, RECIPE.model_copy(update={"seed": 1}))


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
    model = load_classifier(DigitsCNN, DIGITS_CLASSIFIER)
    assert accuracy(model, split(digits)[1]) > 0.95
    log = read_json(ASSETS / "digits/classifier-log.json")
    assert ClassifierRecipe(**log["recipe"]) == ClassifierRecipe()
    assert log["history"][-1]["held_out_accuracy"] == pytest.approx(accuracy(model, split(digits)[1]), abs=0.01)


def test_classifier_outputs(digits: Dataset) -> None:
    model, images = load_classifier(DigitsCNN, DIGITS_CLASSIFIER), digits.images[:5]
    with torch.no_grad():
        output, one = model(images), model(images[3:4])
    shapes = {key: tuple(value.shape) for key, value in output.items()}
    assert shapes == {"features": (5, 64), "spatial": (5, 7, 4, 4), "logits": (5, 10)}
    assert output["spatial"].min() < 0  # before the activation
    assert_close(output["features"][3:4], one["features"], NETWORK)


@pytest.mark.parametrize(("how", "says"), [("truncated", "truncated"), ("shape", "head.bias has shape")])
def test_bad_classifier_files_are_named(tmp_path: Path, how: str, says: str) -> None:
    path = tmp_path / "cnn.safetensors"
    state = DigitsCNN().state_dict()
    write_tensors(path, state | {"head.bias": torch.zeros(3)} if how == "shape" else state)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=says) as caught:
        load_classifier(DigitsCNN, path)
    assert str(path) in str(caught.value)


def test_shipped_denoiser(digits: Dataset) -> None:
    log = read_json(ASSETS / "digits/denoiser-log.json")
    assert PretrainRecipe(**log["recipe"]) == PretrainRecipe(bfloat16=True, compile=True)
    model, (_, held_out) = load_transformer(MODELS["digits-dit"]), split(digits)
    timesteps = torch.arange(len(held_out)) * 1000 // len(held_out)
    noise = torch.randn(held_out.images.shape, generator=torch.Generator().manual_seed(0))
    network = make_adapter(model, MODELS["digits-dit"])

    def loss(labels: torch.Tensor, drop: bool = False) -> torch.Tensor:
        def predict(noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, drop: torch.Tensor) -> Any:
            return network.plain(noisy, timesteps, network.drop(labels, drop))[:, :1]

        dropped = torch.full((len(labels),), drop)
        return denoising_loss(predict, Dataset(held_out.images, labels), dropped, timesteps, noise, "eps")

    with torch.no_grad():
        right, null, wrong = loss(held_out.labels), loss(held_out.labels, True), loss((held_out.labels + 1) % 10)
    assert right == pytest.approx(log["history"][-1]["held_out_loss"], rel=0.1)
    assert right < null < wrong  # it listens to the label, and guidance has a direction


@pytest.mark.parametrize(
    ("name", "model", "target"), [("scenes", "scenes-pixart", "eps"), ("moving", "moving-osp", "v")]
)
def test_shipped_captioned_denoisers(name: str, model: str, target: Any) -> None:
    log = read_json(ASSETS / name / "denoiser-log.json")
    on_a_gpu = {"bfloat16": True, "compile": True}
    assert PretrainRecipe(**log["recipe"]) == PretrainRecipe(**data_source(name).recipes["denoiser"] | on_a_gpu)
    spec, held_out = MODELS[model], data_source(name).compose(range(48), held_out=True)
    adapter = make_adapter(load_transformer(spec), spec)
    encoder = load_text_encoder(text_encoder_beside(locate(spec.weights)))
    timesteps = torch.arange(len(held_out)) * 1000 // len(held_out)
    noise = torch.randn(held_out.images.shape, generator=torch.Generator().manual_seed(0))

    def loss(words: torch.Tensor, drop: bool = False) -> torch.Tensor:
        def predict(noisy: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor, drop: torch.Tensor) -> Any:
            return adapter.plain(noisy, timesteps, adapter.drop(Text(*encode_text(encoder, words)), drop))[:, :1]

        dropped = torch.full((len(words),), drop)
        return denoising_loss(predict, Dataset(held_out.images, words), dropped, timesteps, noise, target)

    with torch.no_grad():
        right, null, wrong = loss(held_out.labels), loss(held_out.labels, True), loss(held_out.labels.roll(1, 0))
    assert right == pytest.approx(log["history"][-1]["held_out_loss"], rel=0.2)
    assert right < null < wrong  # it reads captions it never saw, and guidance has a direction


def test_shipped_files_are_small() -> None:
    for name in (DIGITS_CLASSIFIER, *(spec.weights for spec in MODELS.values() if spec.weights)):
        assert (ASSETS / name).stat().st_size < 6e6
