"""CLIP score, ImageReward and VBench: against their packages where recorded, and what is said where they cannot run."""

import json
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
import yaml
from open_clip.openai import load_openai_model
from PIL import Image
from transformers import BlipTextConfig, BlipVisionConfig

from tcbench.config.load import load_suite
from tcbench.config.suite import Entry
from tcbench.data.captions import encode
from tcbench.errors import NotRun, UserError
from tcbench.metrics.catalogue import usual_metrics
from tcbench.metrics.clip import load_clip
from tcbench.metrics.extractors import Features
from tcbench.metrics.image_reward import load_image_reward
from tcbench.metrics.images import Images
from tcbench.metrics.readings import temporal_flickering
from tcbench.metrics.samples import Real, Samples
from tcbench.metrics.scoring import score_row
from tcbench.metrics.vbench import DIMENSIONS, table, total
from tcbench.record.records import VBENCH
from tcbench.stages import vbench
from tcbench.stages.readings import captions_of, load_scorers, read_samples
from tcbench.stats import batches
from tests import official
from tests.floors import READING, RECORDED, assert_close
from tests.references import flickering, image_reward
from tests.suites import altered, with_fields

HERE = image_reward.HERE
VOCABULARY = str(HERE / "image_reward_vocabulary")
SMOKE = Path(__file__).parent / "smoke.yaml"


def make_suite(folder, changes):
    raw = with_fields(yaml.safe_load(SMOKE.read_text(encoding="utf-8")), changes)
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load_suite(path)


# ImageReward


@pytest.fixture(scope="module")
def small_image_reward(tmp_path_factory):
    """The checkpoint that the package's rewards were recorded with, its shape, and those rewards."""
    path = tmp_path_factory.mktemp("image_reward") / "ImageReward.pt"
    rewards, sizes = official.write_image_reward(path), official.image_reward_sizes()
    return path, sizes["vision"], sizes["text"], rewards


def test_image_reward_is_the_packages_own(small_image_reward):
    path, vision, text, rewards = small_image_reward
    model = load_image_reward(path, VOCABULARY, vision=vision, text=text)
    pictures = [torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in image_reward.pictures()]
    ours = [model(picture, [caption]).item() for picture, caption in zip(pictures, image_reward.CAPTIONS, strict=True)]
    assert len({round(reward, 3) for reward in rewards}) == 3
    assert_close(ours, rewards, RECORDED)


def test_image_reward_says_what_it_lacks(small_image_reward, tmp_path, monkeypatch):
    path, vision, text, _ = small_image_reward
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotRun, match=r"^needs .*absent\.pt: download ImageReward\.pt"):
        load_image_reward(tmp_path / "absent.pt", VOCABULARY)
    with pytest.raises(NotRun, match=r"^needs the vocabulary of bert-base-uncased"):
        load_image_reward(path, str(tmp_path / "absent"), vision=vision, text=text)
    with pytest.raises(UserError, match=r"ImageReward\.pt: not ImageReward's checkpoint .*no counterpart"):
        load_image_reward(
            path, VOCABULARY, vision=BlipVisionConfig(**vision.to_dict() | {"num_hidden_layers": 3}), text=text
        )
    wide = BlipTextConfig(**text.to_dict() | {"vocab_size": 41})
    with pytest.raises(UserError, match=r"ImageReward\.pt: not ImageReward's checkpoint \(size mismatch"):
        load_image_reward(path, VOCABULARY, vision=vision, text=wide)


# CLIP score


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with random weights, as open_clip keeps one in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    torch.save(open_clip.model.CLIP(**model).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_clip_score_is_a_hundred_cosines_of_open_clips_embeddings(clip_folder):
    score = load_clip(f"local-dir:{clip_folder}", None)
    images = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["a cat", "two dogs", "a painting of a seven"]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    model.eval()
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(open_clip.tokenize(captions, context_length=16))
    expected = 100 * torch.cosine_similarity(image, text)
    assert expected.std() > 0.1
    assert_close(score(images, captions), expected, READING)
    grey = images[:, :1]
    assert_close(score(grey, captions), score(grey.repeat(1, 3, 1, 1), captions), READING)


@pytest.fixture
def openai_file(tmp_path, monkeypatch):
    """OpenAI's file of a small CLIP, which open_clip knows by the name of the full-size one."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14-quickgelu", official.CLIP)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", official.CLIP | {"embed_dim": 8})
    official.write_clip(tmp_path / "ViT-L-14.pt")
    return tmp_path / "ViT-L-14.pt"


def test_openais_file_is_read_without_its_code(openai_file, monkeypatch):
    theirs = load_openai_model(str(openai_file)).eval()  # runs the archive's code
    monkeypatch.setattr(torch.jit, "load", None)
    score = load_clip("ViT-L-14-quickgelu", str(openai_file))
    captions = ["a cat", "two dogs"]
    images = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = score.preprocess(images)
    channels = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    mean, std = (values[:, None, None] for values in channels)
    square = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((38, 32), Image.Resampling.BICUBIC)
    square = square.crop((3, 0, 35, 32))
    torch.testing.assert_close(pixels[0] * std + mean, torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
    with torch.no_grad():
        image, text = theirs.encode_image(pixels), theirs.encode_text(open_clip.tokenize(captions))
    torch.testing.assert_close(score(images, captions), 100 * torch.cosine_similarity(image, text))
    with pytest.raises(UserError, match=r"ViT-L-14.pt was trained with QuickGELU, and model 'ViT-L-14' is without"):
        load_clip("ViT-L-14", str(openai_file))
    with pytest.raises(UserError, match=r"ViT-L-14.pt: not the weights of ViT-B-32-quickgelu \("):
        load_clip("ViT-B-32-quickgelu", str(openai_file))


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"cos\ngetcwd\n.", r"os\.getcwd is no part"), (b"I1\n.", "its content is no module"), (b"(", "[Rr]an out")],
)
def test_other_archives_are_refused(tmp_path, content, says):
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", content)
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(UserError, match=rf"evil\.pt: a TorchScript archive that cannot be read \({says}"):
        load_clip("ViT-B-32-quickgelu", str(tmp_path / "evil.pt"))


def test_clip_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotRun, match=r"^needs the CLIP weights ViT-B-32-quickgelu/laion400m_e32"):
        load_clip("ViT-B-32-quickgelu", "laion400m_e32")
    with pytest.raises(NotRun, match=rf"^needs CLIP weights for ViT-B-32 at {tmp_path}/absent\.pt"):
        load_clip("ViT-B-32", f"{tmp_path}/absent.pt")
    with pytest.raises(UserError, match="'ViT-Z-1' is unknown to open_clip"):
        load_clip("ViT-Z-1", "openai")


# VBench


def test_vbench_total_gives_published_leaderboard_entries():
    """Raw dimensions and the three scores of two models on VBench's leaderboard, in percent."""
    lavie = [91.41, 97.47, 98.30, 96.38, 49.72, 54.94, 61.90, 91.82, 33.32, 96.80, 86.39, 34.09, 52.69, 23.56, 25.93,
             26.41]  # fmt: skip
    modelscope = [89.87, 95.29, 98.28, 95.79, 66.39, 52.06, 58.57, 82.25, 38.98, 92.40, 81.72, 33.68, 39.26, 23.39,
                  25.37, 25.67]  # fmt: skip
    for raw, published in ((lavie, (78.78, 70.31, 77.08)), (modelscope, (78.05, 66.54, 75.75))):
        ours = total([score / 100 for score in raw])
        assert [100 * ours[part] for part in ("quality", "semantic", "total")] == pytest.approx(published, abs=0.01)


def test_a_missing_dimension_makes_its_part_and_the_total_missing():
    scores = total([0.9] * 2 + [np.nan] + [0.9] * 13)
    assert np.isnan(scores["quality"]) and np.isnan(scores["total"]) and scores["semantic"] > 1


def test_temporal_flickering_is_the_packages_own():
    recorded = json.loads((HERE / "flickering.json").read_text(encoding="utf-8"))["temporal_flickering"]
    clips = [torch.from_numpy(clip).permute(3, 0, 1, 2)[None] for clip in flickering.clips()]
    assert_close([temporal_flickering(clip).item() for clip in clips], recorded, RECORDED)


def test_videos_are_named_by_the_protocol():
    assert vbench.video_names(["a", "b", "a"], "here") == ["a-0.mp4", "b-0.mp4", "a-1.mp4"]
    for captions, problem in (([], "has no captions"), (["a/b"], "cannot be a file name")):
        with pytest.raises(UserError, match=f"here: .*{problem}"):
            vbench.video_names(captions, "here")


def test_each_dimension_says_what_it_needs(tmp_path, monkeypatch):
    suite = make_suite(tmp_path, {"vbench.weights": str(tmp_path / "cache")})
    monkeypatch.setenv("TCBENCH_VBENCH", str(tmp_path / "env"))
    assert all("--build-env" in vbench.why_not(suite, dimension) for dimension in DIMENSIONS)
    (tmp_path / "env").mkdir()
    (tmp_path / "env/requirements.txt").touch()
    reasons = {dimension.name: vbench.why_not(suite, dimension) for dimension in DIMENSIONS}
    assert [name for name, reason in reasons.items() if reason is None] == ["temporal_flickering"]
    assert reasons["motion_smoothness"] == f"needs {tmp_path}/cache/amt_model/amt-s.pth (12 MB)"
    (tmp_path / "cache/grit_model").mkdir(parents=True)
    (tmp_path / "cache/grit_model/grit_b_densecap_objectdet.pth").touch()
    color = next(dimension for dimension in DIMENSIONS if dimension.name == "color")
    assert "needs detectron2" in vbench.why_not(suite, color)


def test_vbench_results_by_sample_give_the_packages_score():
    names = vbench.video_names(["a", "a", "b"], "here")
    answer = {
        "imaging_quality": {"score": 0.6, "videos": {"a-1.mp4": 50.0, "b-0.mp4": 70.0}},
        "scene": {"not_run": "why"},
        "color": {"score": float("nan"), "videos": {}},
    }
    results = vbench._by_sample(answer, names)
    assert results["imaging_quality"] == {"score": 0.6, "samples": {"1": 50.0, "2": 70.0}}
    assert results["scene"] == {"not_run": "why"} and results["color"]["not_run"].startswith("needs samples")
    answer["imaging_quality"]["score"] = 0.7
    with pytest.raises(UserError, match=r"imaging_quality is 0\.7, but"):
        vbench._by_sample(answer, names)
    scores = table({"imaging_quality": results["imaging_quality"]["samples"]}, 3)
    column = [dimension.name for dimension in DIMENSIONS].index("imaging_quality")
    assert scores[1:, column].tolist() == [0.5, 0.7] and np.isnan(scores).sum() == 3 * 16 - 2


def row_samples(count, **keywords):
    draw = torch.Generator().manual_seed(0)
    features = Features(*(torch.randn(count, size, generator=draw) for size in (4, 4, 3)))
    return Samples(features, **keywords)


def test_vbench_of_a_row_has_an_interval_over_batches():
    scores = torch.rand(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[:4, 3] = torch.nan  # samples whose prompts are not of that dimension
    samples = row_samples(8, readings={"vbench": scores})
    quality = score_row(samples, None, Real(samples.features), batches(8, 2), ["vbench"])["vbench"]
    assert quality["value"] == pytest.approx(100 * total(np.nanmean(scores.numpy(), axis=0))["total"])
    assert quality["se"] > 0


# readings in the score stage


def test_a_metric_that_cannot_run_is_reported_not_scored():
    ours = row_samples(4, readings={"alignment": torch.tensor([1.0, 0, 1, 1])}, not_run={"clip_score": "needs X"})
    uncached = row_samples(4, readings={"alignment": torch.ones(4)}, not_run={"clip_score": "needs X"})
    scores = score_row(ours, uncached, Real(ours.features), batches(4, 1), ["alignment", "clip_score"])
    assert "clip_score" not in scores and scores["alignment"]["value"] == 0.75
    with pytest.raises(UserError, match="needs the reading 'image_reward'"):
        score_row(ours, None, Real(ours.features), batches(4, 1), ["image_reward"])


def test_readings_of_a_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = (*usual_metrics(), "image_reward", "vbench", "temporal_flickering")  # captions are given below
    suite = altered(
        make_suite(tmp_path, {"scoring.image_reward.weights": str(tmp_path / "absent.pt")}),
        {"scoring.metrics": metrics},
    )
    scorers = load_scorers(suite)
    videos = torch.rand(6, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    words = encode(["a three moving left slowly"] * 6)
    manifest = {"samples": 6, "shards": {"shard-00000.safetensors": "0" * 64}}
    samples = words, Images.of(videos)
    readings, not_run = read_samples(Entry(suite, "row"), manifest, *samples, scorers)
    assert set(not_run) == {"image_reward", "vbench"} and not_run["vbench"].startswith("needs `tcbench vbench")
    again, _ = read_samples(Entry(suite, "row"), manifest, words, Images.of(videos * 0), scorers)
    assert torch.equal(again["temporal_flickering"], readings["temporal_flickering"])  # kept: the shards are the same

    results = {dimension.name: {"score": 0.5, "samples": {"0": 0.5}} for dimension in DIMENSIONS}
    VBENCH.write(suite.folder / "vbench/row.json", {"shards": manifest["shards"], "dimensions": results})
    readings, not_run = read_samples(Entry(suite, "row"), manifest, *samples, scorers)
    assert readings["vbench"].shape == (6, 16) and "vbench" not in not_run
    results["scene"] = {"not_run": "needs Y"}
    VBENCH.write(suite.folder / "vbench/row.json", {"shards": manifest["shards"], "dimensions": results})
    assert read_samples(Entry(suite, "row"), manifest, *samples, scorers)[1]["vbench"] == "needs Y (for scene)"
    with pytest.raises(UserError, match=r"row\.json: is of other samples"):
        read_samples(Entry(suite, "row"), manifest | {"shards": {}}, *samples, scorers)


def test_captions_are_the_rows_prompts_or_its_words():
    words = encode(["a three moving left slowly"])
    assert captions_of("row", {}, words) == ["a three moving left slowly"]
    assert captions_of("row", {"captions": ["a cat"]}, words) == ["a cat"]
    with pytest.raises(UserError, match="row row: its samples have no captions"):
        captions_of("row", {}, torch.tensor([3]))
