"""Suites of images in files: MSCOCO and ImageNet in miniature, through every stage with small random networks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.cli import main
from tcbench.config.suite import Entry, Suite
from tcbench.data.images import Latents, list_images
from tcbench.errors import UserError
from tcbench.metrics import extractors
from tcbench.metrics.adm import read_moments, read_reference_images
from tcbench.metrics.frechet import Gaussian, frechet_distance
from tcbench.metrics.precision_recall import inside_real, radii
from tcbench.models.pretrained import Autoencoder, clean_captions
from tcbench.record.files import read_json, read_tensors, sha256, write_json
from tcbench.record.shards import read_shards
from tcbench.report.strips import read_strip
from tcbench.stages import encode
from tcbench.stages.conditioning import load_captions, load_examples, load_shown
from tcbench.stages.encode import encode_images
from tcbench.stages.images import load_decoder
from tcbench.stages.part import Part
from tcbench.stages.sample import sample_rows
from tcbench.stages.score import classes_of_real, measure_floor, score_rows
from tcbench.stages.train import train_row
from tcbench.tensors import draws
from tests import official
from tests.floors import DISTANCE, HALF, READING, assert_close
from tests.suites import altered

INCEPTION = "checkpoints/weights-inception-2015-12-05-6726825d.pth"
ADM = "data/adm/VIRTUAL_imagenet256_labeled.npz"
TRAINING = {
    "predictor_iterations": 1,
    "predictor_learning_rate": 1e-3,  # one iteration must show: what learned nothing is refused
    "patience": None,
    "refiner_iterations": 1,
    "training_batch_size": 2,
    "alpha_samples": 2,
}
TOKENCACHE = {"num_full_steps": 2, "beta": -2000, "refiner_blocks": 1, "refiner_rank": 2, **TRAINING}


class Colours(extractors._Network):
    """In Inception's place: mean colour, the red channel at four places, and their sums as logits."""

    LAYERS = ("3", "4", "logits")
    IMAGE_SHAPE = (3, None, None)

    def __init__(self, name: str, features_list: list[str], weights: Path, **_: object) -> None:
        super().__init__(name, features_list)
        assert weights.exists()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.check(images)
        pixels = images.float() / 255
        pooled, spatial = pixels.mean((2, 3)), F.adaptive_avg_pool2d(pixels[:, :1], 2).flatten(1)
        layers = {"3": pooled, "4": spatial, "logits": torch.cat([pooled, spatial], 1)}
        return tuple(layers[layer] for layer in self.features_list)


@pytest.fixture
def folder(paper_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the official files at toy size, and `Colours` as Inception."""
    (paper_folder / INCEPTION).write_bytes(b"any")
    monkeypatch.setattr(extractors, "InceptionADM", Colours)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(paper_folder / INCEPTION))
    monkeypatch.setattr(encode, "SHARD", 3)
    monkeypatch.setattr(encode, "BATCH", 2)
    return paper_folder


@pytest.fixture
def coco(folder: Path) -> Suite:
    return official.small_suite(
        "paper-pixart-256",
        {
            "scoring.metrics": ["fid", "clip_score", "mae", "psnr"],
            "scoring.floor_draws": 2,
            "show.tables": {"table3": {"title": "Table III", "metrics": ["fid", "clip_score"]}},
            "rows": {
                "plain": {"method": "uncached", "nfe": 3},
                "ours": {"method": "tokencache", "nfe": 3, "options": TOKENCACHE},
            },
        },
    )


@pytest.fixture
def imagenet(folder: Path) -> Suite:
    """Ten classes, and a reference batch with moments of `Colours`' size."""
    return official.small_suite(
        "paper-dit-256",
        {
            "scoring.metrics": ["fid", "sfid", "is", "precision", "recall", "mae", "fid_imagenet"],
            "scoring.floor_draws": 2,
            "show.tables": {"table2": {"title": "Table II", "metrics": ["fid", "sfid", "is", "precision", "recall"]}},
            "rows": {
                "plain": {"method": "uncached", "nfe": 3},
                "ours": {"method": "tokencache", "nfe": 3, "options": TOKENCACHE},
                "l2c": {"method": "learning_to_cache", "nfe": 3, "options": {"iterations": 1, "batch_size": 2}},
            },
        },
    )


def run(suite: Suite, *more: str) -> dict[str, Any]:
    """Every stage from images to tables, and more commands; the scores by row."""
    encode_images(suite)
    for row in suite.trained_rows:
        train_row(suite[row])
    sample_rows(suite.entries)
    score_rows(suite.entries)
    measure_floor(suite)
    for row in suite.predictor_rows:
        assert main(["diagnose", "mini.yaml", "--row", row]) == 0
    for command in ("latency", "tables", "diagnostics", *more):
        assert main([command, "mini.yaml"]) == 0
    return {row: read_json(suite.folder / "scores" / f"{row}.json") for row in suite.rows}


def samples_of(entry: Entry) -> Tensor:
    return torch.cat([shard["image"] for shard in read_shards(entry.samples)])


# --- through the stages


def test_coco_from_images_to_the_report(coco: Suite) -> None:
    scores = run(coco, "figures", "verdicts", "report")
    assert scores["ours"]["groups"] == 4 and scores["ours"]["resolution"] == 32
    real = torch.cat(list(list_images(Path("data/coco/val2017")).decoded(32, 3)))
    images = samples_of(coco["ours"])
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.uint8
    pooled = [(side.float() / 255).mean((2, 3)) for side in (images, real)]
    expected = frechet_distance(pooled[0], Gaussian.fit(pooled[1]))
    assert_close(scores["ours"]["quality"]["fid"]["value"], expected, DISTANCE)
    assert 0 < abs(scores["ours"]["quality"]["clip_score"]["value"]) < 100 and not scores["ours"]["metrics_not_run"]
    difference = (images.float() - samples_of(coco["plain"]).float()) / 127.5
    assert difference.any()
    assert_close(scores["ours"]["quality"]["mae"]["value"], difference.abs().mean(), READING)
    table = (coco.folder / "tables" / "table3.md").read_text(encoding="utf-8")
    assert "floor (not run: needs more than the 8 real images that there are)" in table
    lines, _ = read_strip(coco.folder, scores["ours"])
    assert np.array_equal(lines[0], images[:3].permute(0, 2, 3, 1).numpy())  # in colour


def test_imagenet_from_images_to_tables(imagenet: Suite) -> None:
    scores = run(imagenet)
    images = samples_of(imagenet["l2c"]).float() / 255
    published = Gaussian(torch.full((3,), float(np.float32(0.4))).double(), torch.eye(3).double() * 0.1)
    quality, pooled = scores["l2c"]["quality"], images.mean((2, 3))
    assert_close(quality["fid"]["value"], frechet_distance(pooled, published), DISTANCE)
    real = (read_reference_images(Path(ADM)).float() / 255).mean((2, 3))
    assert quality["precision"]["value"] == inside_real(pooled, real, radii(real)).double().mean().item()
    second = read_tensors(imagenet.folder / "real-features-imagenet.safetensors")[0]["pooled"]
    assert second.shape == (12, 1280) and quality["fid_imagenet"]["value"] > 0
    assert read_json(imagenet.folder / "scores" / "floor.json")["fid"]["n"] == 8  # of the batch's twelve images
    labels = torch.cat([shard["label"] for shard in read_shards(imagenet["plain"].samples)])
    assert torch.equal(labels, load_shown(imagenet)(torch.arange(8)))


def test_drawn_classes_depend_on_seed_and_sample_alone(imagenet: Suite) -> None:
    drawn = load_shown(imagenet)
    labels = drawn(torch.arange(1 << 16))
    assert torch.equal(drawn(torch.tensor([7, 70, 700])), labels[[7, 70, 700]])
    assert not torch.equal(load_shown(altered(imagenet, {"samples.seed": 1}))(torch.arange(100)), labels[:100])
    counts = torch.bincount(labels).double()
    misses = ((counts - counts.mean()).square() / counts.mean()).sum()  # chi-squared; 0 of classes in turn
    assert len(counts) == drawn.classes and 0.2 < misses / drawn.classes < 3
    balanced = altered(imagenet, {"samples.labels": "balanced"})
    assert load_shown(balanced) is None and classes_of_real(imagenet) is None
    with pytest.raises(UserError, match=r"samples\.labels: data 'partiprompts' bring captions"):
        official.small_suite("paper-pixart-1024", {"samples.labels": "drawn"})


def test_inception_and_adms_batch_as_they_are_published(
    paper_folder: Path, inception_file: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the one size that they have; few images, for each takes a fifth of a second."""
    Path(INCEPTION).symlink_to(inception_file[0])
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(inception_file[0]))
    official.write_adm(Path(ADM), count=4, pooled=2048, spatial=2023)
    rows = {"plain": {"method": "uncached", "nfe": 2}}
    suite = official.small_suite(
        "paper-dit-256",
        {"samples.count": 4, "scoring.metrics": ["is", "precision"], "rows": rows, "show.figure": {"nfe": 2}},
    )
    sample_rows(suite.entries)
    score_rows(suite.entries)
    assert read_json(suite.folder / "scores" / "plain.json")["quality"].keys() == {"is", "precision"}
    features = read_tensors(suite.folder / "real-features.safetensors")[0]
    pooled, spatial = read_moments(Path(ADM))
    assert features["pooled"].shape == (4, *pooled.mu.shape) and features["spatial"].shape == (4, *spatial.mu.shape)


# --- what is trained on


def test_latents_are_the_images_posteriors(coco: Suite) -> None:
    encode_images(coco)
    listing, autoencoder = (
        list_images(Path("data/coco/train2017")),
        Autoencoder(Path("checkpoints/sd-vae-ft-ema"), 0.18215, "cpu"),
    )
    noise = draws.gaussian(coco.training.seed, torch.arange(8), (4, 16, 16))
    expected = autoencoder.encode(torch.cat(list(listing.decoded(32, 8))), noise)
    examples = load_examples(coco, load_captions(coco, held_out=False))
    assert len(examples) == 8
    order = torch.tensor([7, 0, 3, 3])
    assert_close(examples.images[order], expected[order], HALF)


def test_captions_of_training_images_are_read_when_drawn(coco: Suite) -> None:
    encode_images(coco)
    shown, evaluated = load_captions(coco, held_out=False), load_captions(coco)
    first = [f"A dog ({100 + number}), view 0." for number in range(8)]
    drawn = load_examples(coco, shown).labels[torch.tensor([5])]
    assert torch.equal(drawn.states_RTC, evaluated.encoder(clean_captions([first[5]])).states_RTC)
    assert shown.prompts == tuple(first) and evaluated.prompts[0] == "A dog (200), view 0."


def test_a_damaged_shard_of_latents_is_refused_and_encoded_again(coco: Suite) -> None:
    encode_images(coco)
    index = read_json(coco.latents_index)
    damaged = Path(index["folder"]) / list(index["shards"])[1]
    whole, flipped = damaged.read_bytes(), bytearray(damaged.read_bytes())
    flipped[-3] ^= 1
    damaged.write_bytes(flipped)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: is not the shard .*; run `tcbench encode"):
        load_examples(coco, load_captions(coco, held_out=False))
    encode_images(coco)
    assert damaged.read_bytes() == whole
    coco.latents_index.write_text("{}")
    with pytest.raises(UserError, match=r"latents\.json: .*run `tcbench encode"):
        load_examples(coco, load_captions(coco, held_out=False))


def test_parts_encode_the_shards_of_one_job(coco: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images(coco)
    index = read_json(coco.latents_index)
    shards = [Path(index["folder"]) / name for name in index["shards"]]
    whole = [path.read_bytes() for path in shards]
    for path in (coco.latents_index, *shards):
        path.unlink()
    for number in (2, 1):
        encode_images(coco, Part(number, 2))
        assert [path.exists() for path in shards] == [number == 1, True, True] and not coco.latents_index.exists()
    monkeypatch.setattr(encode, "load_autoencoder", lambda _: pytest.fail("nothing is left to encode"))
    encode_images(coco)
    assert [path.read_bytes() for path in shards] == whole
    assert read_json(coco.latents_index)["shards"] == index["shards"]


def test_an_interrupted_encoding_goes_on(coco: Suite) -> None:
    encode_images(coco)
    index = read_json(coco.latents_index)
    shards = [Path(index["folder"]) / name for name in index["shards"]]
    before = [(sha256(path), path.stat().st_mtime_ns) for path in shards]
    assert len(shards) == 3 and len(Latents(shards)) == 8
    swapped = shards[0].read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    shards[1].write_bytes(swapped)
    coco.latents_index.unlink()
    encode_images(coco)
    assert [sha256(path) for path in shards] == [digest for digest, _ in before], "a shard in another's place"
    before = [(sha256(path), path.stat().st_mtime_ns) for path in shards]
    shards[1].unlink()
    encode_images(coco.model_copy(update={"suite": "other"}))
    assert [sha256(path) for path in shards] == [digest for digest, _ in before]
    assert [path.stat().st_mtime_ns == time for path, (_, time) in zip(shards, before, strict=True)] == [
        True,
        False,
        True,
    ]


def test_classes_are_folders_in_order(imagenet: Suite) -> None:
    encode_images(imagenet)
    examples = load_examples(imagenet, None)
    assert examples.labels.tolist() == [number for number in range(10) for _ in range(2)]
    assert examples.images[torch.tensor([0, 19])].shape == (2, 4, 16, 16)


# --- bad input


def test_images_that_are_not_there_are_named(coco: Suite) -> None:
    Path("data/coco/train2017/000000000103.png").unlink()
    with pytest.raises(UserError, match=r"data/coco/train2017: lacks 1 of the 8 images that .* describes, 0+103.png"):
        encode_images(coco)
    Path("data/coco/train2017/000000000103.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(UserError, match=r"0+103.png: not a readable image"):
        encode_images(coco)
    shutil.rmtree("data/coco/train2017")
    with pytest.raises(UserError, match=r"data/coco/train2017: not found; `tcbench validate CONFIG --files`"):
        encode_images(coco)


def test_training_asks_for_what_is_encoded(coco: Suite) -> None:
    with pytest.raises(UserError, match=r"results/mini/latents.json: not found"):
        load_examples(coco, load_captions(coco, held_out=False))
    encode_images(coco)
    write_json(Path("fewer.json"), read_json(Path("data/coco/annotations/captions_val2017.json")))
    training = {"folder": Path("data/coco/val2017"), "captions": Path("fewer.json")}
    other = altered(coco, {"training.images": coco.training.images.model_copy(update=training)})
    with pytest.raises(
        UserError, match=r"latents.json: is of other images than `training.images`; run `tcbench encode` again"
    ):
        load_examples(other, load_captions(other, held_out=False))


def test_folders_that_do_not_fit_the_model_are_refused(imagenet: Suite, coco: Suite) -> None:
    shutil.rmtree("data/imagenet/train/n00000003")
    with pytest.raises(UserError, match=r"data/imagenet/train: holds folders of 9 classes, and dit-xl-2-256 knows 10"):
        encode_images(imagenet)
    Path("data/imagenet/train/n00000003").mkdir()
    with pytest.raises(UserError, match=r"n00000003: no images in the folder of a class"):
        encode_images(imagenet)
    official.draw_image(Path("data/imagenet/train/stray.png"), 0)
    with pytest.raises(UserError, match=r"data/imagenet/train: holds images and folders side by side"):
        encode_images(imagenet)
    no_captions = coco.training.images.model_copy(update={"captions": None})
    with pytest.raises(UserError, match=r"data/coco/train2017: pixart-256 reads captions; name their file"):
        encode_images(altered(coco, {"training.images": no_captions}))
    with pytest.raises(UserError, match=r"sd-vae-ft-ema: latents of 4 channels, and scenes-pixart denoises 1"):
        load_decoder(altered(coco, {"model.name": "scenes-pixart"}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "not found; `tcbench validate"),
        (b"no archive", "not a reference batch of ADM"),
        ({"mu": [0]}, "sigma"),
        ({"mu": [0.0], "sigma": [[1.0]], "mu_s": [-0.1], "sigma_s": [[1.0]]}, "mu_s is negative"),
    ],
)
def test_other_reference_batches_are_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "batch.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        np.savez(path, **{name: np.asarray(values) for name, values in content.items()})
    with pytest.raises(UserError, match=says):
        read_moments(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scoring.extractor": None}, "scoring.extractor: fid compares features"),
        ({"scoring.extractor_weights": None}, "scoring.extractor_weights: those of inception-v3-adm do not ship"),
        ({"scoring.real": None}, "scoring.real: fid compares with real images"),
        ({"model.latents": None}, "model.latents: pixart-256 denoises latents of 4 channels; name their autoencoder"),
        ({"samples.shard_batches": 5}, "samples.batch_size: an interval needs two shards or more"),
    ],
)
def test_configs_that_lack_images_are_refused(coco: Suite, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"mini.yaml: {says}"):
        official.small_suite("paper-pixart-256", coco.model_dump(mode="json", by_alias=True) | changes)
