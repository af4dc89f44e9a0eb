"""Suites of images in files: MSCOCO and ImageNet in miniature, through every stage with small random networks."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from tcbench import noise
from tcbench.cli import main
from tcbench.config import Suite, load_suite
from tcbench.data.images import Latents, list_images
from tcbench.errors import UserError
from tcbench.files import read_json, sha256, write_json
from tcbench.metrics import extractors
from tcbench.metrics.adm import read_moments, read_reference_images
from tcbench.metrics.frechet import Gaussian, frechet_distance
from tcbench.metrics.precision_recall import inside_real, radii
from tcbench.models.pretrained import Autoencoder, clean_captions
from tcbench.report.strips import read_strip
from tcbench.stages import encode
from tcbench.stages.common import load_captions, load_decoder, load_examples
from tcbench.stages.encode import encode_images
from tcbench.stages.sample import sample_rows
from tcbench.stages.score import measure_floor, read_shards, score_rows
from tcbench.stages.train import train_row
from tests.test_paper_suites import CONFIGS, save_decoder, save_text_encoder

TRAINING = {"predictor_iterations": 1, "refiner_iterations": 1, "training_batch_size": 2, "alpha_samples": 2}
TOKENCACHE = {"num_full_steps": 2, "beta": -20, "refiner_blocks": 1, "refiner_rank": 2, **TRAINING}


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
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with an autoencoder, a text encoder, and `Colours` as Inception."""
    monkeypatch.chdir(tmp_path)
    save_decoder(tmp_path / "vae")
    save_text_encoder(tmp_path / "t5")
    (tmp_path / "inception.pth").write_bytes(b"any")
    monkeypatch.setitem(extractors.EXTRACTORS, "inception-v3-adm", Colours)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(tmp_path / "inception.pth"))
    monkeypatch.setattr(encode, "SHARD", 3)
    monkeypatch.setattr(encode, "BATCH", 2)
    yield tmp_path


def draw_image(path: Path, seed: int) -> None:
    """Blocks of random colours, wider than high."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours.repeat(14, axis=0).repeat(14, axis=1)).save(path)


def make_coco(root: Path, count: int) -> None:
    """train2017 and val2017 of `count` images each, with two captions an image, and their annotations."""
    for start, part in ((100, "train2017"), (200, "val2017")):
        names = {start + number: f"{start + number:012}.{'png' if number % 2 else 'jpg'}" for number in range(count)}
        for number, name in names.items():
            draw_image(root / part / name, number)
        captions = [
            {"image_id": number, "id": 10 * number + again, "caption": f"A dog ({number}), view {again}."}
            for number in names
            for again in (1, 0)
        ]
        images = [{"id": number, "file_name": name} for number, name in names.items()]
        write_json(root / f"annotations/captions_{part}.json", {"images": images[::-1], "annotations": captions})


def make_imagenet(root: Path, classes: int, each: int) -> None:
    for number in range(classes):
        for index in range(each):
            draw_image(root / f"n{number:08}" / f"{index}.JPEG", number * each + index)


def write_config(name: str, **changes: Any) -> Suite:
    """A shipped config with tiny networks, few samples and the rows given."""
    settings = yaml.safe_load(next(path for path in CONFIGS if path.stem == name).read_text(encoding="utf-8"))
    settings |= {
        "suite": "mini", "weights": "random", "device": "cpu", "extractor_weights": "inception.pth", "files": {},
        "latents": {"kind": "sd", "folder": "vae", "scale": 0.5}, "samples": 8, "batch_size": 1, "shard_batches": 2,
        "traced": 2, "figure": {"nfe": 3, "columns": 3}, "latency": {"batch_size": 1, "warmup": 0, "repeats": 1},
        "diagnostics_pairs": 2, "defaults": {}, "tables": {},
    } | changes  # fmt: skip
    Path("mini.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_suite("mini.yaml")


@pytest.fixture
def coco(folder: Path) -> Suite:
    make_coco(folder / "coco", 8)
    return write_config(
        "paper-pixart-256",
        model="tiny-pixart",
        text_encoder="t5",
        prompts={"file": "coco/annotations/captions_val2017.json", "clean": True},
        real="coco/val2017",
        training={"folder": "coco/train2017", "captions": "coco/annotations/captions_train2017.json"},
        metrics=["fid", "mae", "psnr"],
        tables={"table3": {"title": "Table III", "metrics": ["fid"]}},
        rows={
            "plain": {"method": "uncached", "nfe": 3},
            "ours": {"method": "tokencache", "nfe": 3, "options": TOKENCACHE},
        },
    )


@pytest.fixture
def imagenet(folder: Path) -> Suite:
    """Ten classes, and a reference batch whose moments are those of other images than its own."""
    make_imagenet(folder / "imagenet", 10, 2)
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    moments = {"mu": np.full(3, 0.4), "sigma": np.eye(3) * 0.1, "mu_s": np.full(4, 0.6), "sigma_s": np.eye(4) * 0.2}
    np.savez("adm.npz", arr_0=images, **{name: value.astype(np.float32) for name, value in moments.items()})
    return write_config(
        "paper-dit-256",
        model="tiny-dit",
        real="adm.npz",
        training={"folder": "imagenet"},
        metrics=["fid", "sfid", "is", "precision", "recall", "mae"],
        tables={"table2": {"title": "Table II", "metrics": ["fid", "sfid", "is", "precision", "recall"]}},
        rows={
            "plain": {"method": "uncached", "nfe": 3},
            "ours": {"method": "tokencache", "nfe": 3, "options": TOKENCACHE},
            "l2c": {"method": "learning_to_cache", "nfe": 3, "options": {"iterations": 1, "batch_size": 2}},
        },
    )


def run(suite: Suite, *more: str) -> dict[str, Any]:
    """Every stage from images to tables, and more commands; the scores by row."""
    encode_images(suite)
    for row in suite.trained_rows:
        train_row(suite, row)
    sample_rows(suite, tuple(suite.rows))
    score_rows(suite, tuple(suite.rows))
    measure_floor(suite)
    for row in suite.predictor_rows:
        assert main(["diagnose", "mini.yaml", "--row", row]) == 0
    for command in ("latency", "tables", "diagnostics", *more):
        assert main([command, "mini.yaml"]) == 0
    return {row: read_json(suite.folder / "scores" / f"{row}.json") for row in suite.rows}


def samples_of(suite: Suite, row: str) -> Tensor:
    return torch.cat([shard["image"] for shard in read_shards(suite, row)])


# --- through the stages


def test_coco_from_images_to_the_report(coco: Suite) -> None:
    scores = run(coco, "figures", "verdicts", "report")
    assert scores["ours"]["groups"] == 4 and scores["ours"]["resolution"] == 32
    real = torch.cat(list(list_images(Path("coco/val2017")).decoded(32, 3)))
    images = samples_of(coco, "ours")
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.uint8
    pooled = [(side.float() / 255).mean((2, 3)) for side in (images, real)]
    expected = frechet_distance(pooled[0], Gaussian.fit(pooled[1]))
    assert scores["ours"]["quality"]["fid"]["value"] == pytest.approx(expected, rel=1e-5)
    difference = (images.float() - samples_of(coco, "plain").float()) / 127.5
    assert difference.any()
    assert scores["ours"]["quality"]["mae"]["value"] == pytest.approx(difference.abs().mean().item(), rel=1e-5)
    table = (coco.folder / "tables" / "table3.md").read_text(encoding="utf-8")
    assert "floor (not run: needs more than the 8 real images that there are)" in table
    lines, _ = read_strip(coco.folder / "grids" / "strips" / "ours.png")
    assert np.array_equal(lines[0], images[:3].permute(0, 2, 3, 1).numpy())  # in colour


def test_imagenet_from_images_to_tables(imagenet: Suite) -> None:
    scores = run(imagenet)
    images = samples_of(imagenet, "l2c").float() / 255
    published = Gaussian(np.full(3, np.float32(0.4), np.float64), np.eye(3) * np.float32(0.1))
    quality, pooled = scores["l2c"]["quality"], images.mean((2, 3))
    assert quality["fid"]["value"] == pytest.approx(frechet_distance(pooled, published), rel=1e-5)
    real = (read_reference_images(Path("adm.npz")).float() / 255).mean((2, 3))
    assert quality["precision"]["value"] == inside_real(pooled, real, radii(real)).double().mean().item()
    assert read_json(imagenet.folder / "scores" / "floor.json")["fid"]["n"] == 8  # of the batch's twelve images
    labels = torch.cat([shard["label"] for shard in read_shards(imagenet, "plain")])
    assert labels.tolist() == list(range(8))


# --- what is trained on


def test_latents_are_the_images_posteriors(coco: Suite) -> None:
    encode_images(coco)
    listing, autoencoder = list_images(Path("coco/train2017")), Autoencoder(Path("vae"), 0.5, "cpu")
    draws = noise.gaussian(coco.training_seed, torch.arange(8), (4, 16, 16))
    expected = autoencoder.encode(torch.cat(list(listing.decoded(32, 8))), draws)
    examples = load_examples(coco, load_captions(coco, held_out=False))
    assert len(examples) == 8
    order = torch.tensor([7, 0, 3, 3])
    assert torch.allclose(examples.images[order], expected[order], atol=1e-2, rtol=1e-3)


def test_captions_of_training_images_are_read_when_drawn(coco: Suite) -> None:
    encode_images(coco)
    shown, evaluated = load_captions(coco, held_out=False), load_captions(coco)
    first = [f"A dog ({100 + number}), view 0." for number in range(8)]
    drawn = load_examples(coco, shown).labels[torch.tensor([5])]
    assert torch.equal(drawn.states_RTC, evaluated.encoder(clean_captions([first[5]])).states_RTC)
    assert shown.prompts == tuple(first) and evaluated.prompts[0] == "A dog (200), view 0."


def test_an_interrupted_encoding_goes_on(coco: Suite) -> None:
    encode_images(coco)
    index = read_json(coco.latents_index)
    shards = [Path(index["folder"]) / name for name in index["shards"]]
    before = [(sha256(path), path.stat().st_mtime_ns) for path in shards]
    assert len(shards) == 3 and len(Latents(shards)) == 8
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
    Path("coco/train2017/000000000103.png").unlink()
    with pytest.raises(UserError, match=r"coco/train2017: lacks 1 of the 8 images that .*json describes, 0+103.png"):
        encode_images(coco)
    Path("coco/train2017/000000000103.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(UserError, match=r"0+103.png: not a readable image"):
        encode_images(coco)
    shutil.rmtree("coco/train2017")
    with pytest.raises(UserError, match=r"coco/train2017: not found; `tcbench validate CONFIG --files`"):
        encode_images(coco)


def test_training_asks_for_what_is_encoded(coco: Suite) -> None:
    with pytest.raises(UserError, match=r"results/mini/latents.json: not found"):
        load_examples(coco, load_captions(coco, held_out=False))
    encode_images(coco)
    write_json(Path("fewer.json"), read_json(Path("coco/annotations/captions_val2017.json")))
    training = {"folder": Path("coco/val2017"), "captions": Path("fewer.json")}
    other = coco.model_copy(update={"training": coco.training.model_copy(update=training)})
    with pytest.raises(
        UserError, match=r"latents.json: is of other images than `training`; run `tcbench encode` again"
    ):
        load_examples(other, load_captions(other, held_out=False))


def test_folders_that_do_not_fit_the_model_are_refused(imagenet: Suite, coco: Suite) -> None:
    shutil.rmtree("imagenet/n00000003")
    with pytest.raises(UserError, match=r"imagenet: holds folders of 9 classes, and tiny-dit knows 10"):
        encode_images(imagenet)
    Path("imagenet/n00000003").mkdir()
    with pytest.raises(UserError, match=r"n00000003: no images in the folder of a class"):
        encode_images(imagenet)
    draw_image(Path("imagenet/stray.png"), 0)
    with pytest.raises(UserError, match=r"imagenet: holds images and folders side by side"):
        encode_images(imagenet)
    no_captions = coco.training.model_copy(update={"captions": None})
    with pytest.raises(UserError, match=r"coco/train2017: tiny-pixart reads captions; name their file"):
        encode_images(coco.model_copy(update={"training": no_captions}))
    with pytest.raises(UserError, match=r"vae: latents of 4 channels, and scenes-pixart denoises 1"):
        load_decoder(coco.model_copy(update={"model": "scenes-pixart"}))


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "not found; `tcbench validate"), (b"no archive", "not a reference batch of ADM"), ({"mu": [0]}, "sigma")],
)
def test_other_reference_batches_are_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "batch.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        np.savez(path, **content)
    with pytest.raises(UserError, match=says):
        read_moments(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extractor": None}, "extractor: fid compares features"),
        ({"extractor_weights": None}, "extractor_weights: those of inception-v3-adm do not ship"),
        ({"real": None}, "real: fid compares with real images"),
        ({"latents": None}, "latents: `training` is seen through an autoencoder"),
        ({"shard_batches": 5}, "batch_size: an interval needs two shards or more"),
    ],
)
def test_configs_that_lack_images_are_refused(coco: Suite, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"mini.yaml: {says}"):
        write_config("paper-pixart-256", **coco.model_dump(mode="json", by_alias=True) | changes)
