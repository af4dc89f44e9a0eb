"""Videos in files: which frames are shown, files that cannot be used, and from annotations to a trained row."""

import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch

from tcbench.config.needs import needs
from tcbench.config.suite import Suite
from tcbench.data.videos import VideoListing, centred, frame_numbers, list_videos
from tcbench.errors import UserError
from tcbench.record.files import read_json, read_tensors, write_json
from tcbench.record.videos import from_mp4
from tcbench.stages import encode
from tcbench.stages.conditioning import load_captions, load_examples
from tcbench.stages.encode import encode_images
from tcbench.stages.images import load_autoencoder
from tcbench.stages.sample import sample_rows
from tcbench.stages.train import train_row
from tcbench.tensors import draws
from tests import official
from tests.floors import HALF, assert_close
from tests.official import grey, write_video

from .conftest import GOLDEN
from .test_image_suites import TOKENCACHE

CLIPS = GOLDEN.with_name("golden-video") / "clips"


# --- as the reference


@pytest.mark.parametrize("name", ["wide", "high", "small"])
def test_crop_and_scale(name: str) -> None:
    tensors, settings = read_tensors(CLIPS.with_suffix(".safetensors"))[0], read_json(CLIPS.with_suffix(".json"))
    error = (centred(tensors[f"{name}.frames"], (32, 32)) - tensors[f"{name}.clip"]).abs().max()
    assert error <= settings["clips"][name]["tolerance"]


@pytest.mark.parametrize("case", read_json(CLIPS.with_suffix(".json"))["frame_indices"], ids=json.dumps)
def test_frames_at_a_training_rate(case: dict[str, Any]) -> None:
    """A clip of fewer frames than wanted, which the reference cuts to 4k + 1, is refused here."""
    numbers = frame_numbers(case["fps"], case["train_fps"], case["start"], case["num_frames"])
    assert (len(numbers) >= case["wanted"]) == (len(case.get("indices", [])) == case["wanted"])
    assert numbers[: len(case.get("indices", []))].tolist() == case.get("indices", [])


def test_other_proportions() -> None:
    frames = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(centred(frames, (16, 8)), 2 * (frames[..., 4:12].float() / 255) - 1)


# --- files


def turn(path: Path) -> None:
    """Let players show a file turned clockwise by a quarter, as telephones write them: in its track's matrix."""
    content, one = path.read_bytes(), 0x10000
    upright = b"".join(number.to_bytes(4, "big") for number in (one, 0, 0, 0, one, 0, 0, 0, 0x40000000))
    turned = b"".join((number % 2**32).to_bytes(4, "big") for number in (0, one, 0, -one, 0, 0, 0, 0, 0x40000000))
    track = content.index(b"tkhd")
    path.write_bytes(content[:track] + content[track:].replace(upright, turned, 1))


def listing(folder: Path, *entries: dict[str, Any], rate: float = 16) -> VideoListing:
    write_json(folder / "annotations.json", list(entries))
    return list_videos(folder, folder / "annotations.json", rate)


def shown(video: torch.Tensor) -> list[int]:
    """The number of every frame, by its grey on the right."""
    return [round(((level + 1) * 127.5 - grey(0)) / (grey(1) - grey(0))) for level in video[0, :, 8, -2].tolist()]


def test_clips_start_where_they_are_drawn(tmp_path: Path) -> None:
    write_video(tmp_path / "a/long.mp4", 30)
    (clip,) = listing(tmp_path, {"path": "a/long.mp4", "frame_idx": "2:28", "cap": " A  cat.\n"}).clips
    assert (clip.caption, clip.start, clip.stop) == ("A cat.", 2, 28)
    videos = VideoListing((clip,), 16)
    first, last = (videos.read(0, 5, (16, 32), place) for place in (0.0, 0.999))
    assert first.shape == (3, 5, 16, 32) and first.dtype == torch.float32
    assert shown(first) == [2, 3, 5, 6, 8] and shown(last) == [20, 21, 23, 24, 26]
    assert shown(VideoListing((clip,), 24.05).read(0, 5, (16, 32), 0.0)) == [2, 3, 4, 5, 6]
    assert first[:, :, :, :15].max() < -0.98  # the left half is black


def test_annotations_of_both_versions(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", 12)
    write_video(tmp_path / "fast.mp4", 12, rate=48)
    videos = listing(
        tmp_path,
        {
            "path": "fast.mp4",
            "cap": ["First.", "Second."],
            "num_frames": 12,
            "fps": 48.02,
            "resolution": {"height": 64},
        },
        {"path": "one.mp4", "cap": "Cut.", "num_frames": 6, "cut": [3, 9], "crop": [64, 128, 0, 32]},
        {"path": "one.mp4", "cap": []},
        {"path": "one.mp4", "cap": "Whole."},
        rate=24,
    )
    assert videos.captions == ("First.", "Cut.", "Whole.")
    assert shown(videos.read(0, 5, (16, 32), 0.0)) == [0, 2, 4, 6, 8]
    cut = videos.read(1, 5, (16, 32), 0.0)
    assert shown(cut) == [3, 4, 5, 6, 7] and cut[0, 0, 8, 0] > -0.9  # the black half is a margin
    assert shown(videos.read(2, 5, (16, 32), 0.999)) == [6, 7, 8, 9, 10]
    assert videos.digest != VideoListing(videos.clips, 16).digest


def test_turned_videos_are_shown_upright(tmp_path: Path) -> None:
    write_video(tmp_path / "turned.mp4", 6)
    turn(tmp_path / "turned.mp4")
    video = listing(tmp_path, {"path": "turned.mp4", "cap": "One."}, rate=24).read(0, 5, (32, 16), 0.0)
    assert video[:, :, :15].max() < -0.98 and video[:, :, 17:].min() > -0.9  # left goes up


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", 6)
    write_video(tmp_path / "steady.mp4", 12)
    write_video(tmp_path / "uneven.mp4", 10, times=[0, 1, 2, 3, 8, 9, 10, 11, 12, 13])
    write_video(tmp_path / "whole.mp4", 40)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut off.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"\0\0" * 800)
    for name, entry, says in (
        ("short.mp4", {}, "4 frames at 16 a second, and 5 are needed"),
        ("uneven.mp4", {}, "its frames do not keep to 17.1429 a second"),
        ("steady.mp4", {"fps": 30}, "its frames do not keep to 30 a second"),
        ("cut off.mp4", {}, "not a readable video"),
        ("text.mp4", {}, "not a readable video"),
        ("sound.wav", {}, "holds no video"),
        ("short.mp4", {"num_frames": 50}, "ends after 6 frames, and number"),
    ):
        videos = listing(tmp_path, {"path": name, "cap": "One.", **entry})
        with pytest.raises(UserError) as caught:
            videos.read(0, 5, (16, 16), 0.999)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not annotations of Open-Sora-Plan (Invalid JSON: "),
        ('{"images": []}', "not annotations of Open-Sora-Plan"),
        ('[{"cap": "One."}]', "not annotations of Open-Sora-Plan (0.path: Field required)"),
        (
            '[{"path": "a.mp4", "cap": "One.", "frame_idx": "all"}]',
            "not annotations of Open-Sora-Plan (0.frame_idx.0: ",
        ),
        ("[]", "describes no videos"),
        ('[{"path": "a/b.mp4", "cap": "One."}]', "lacks 1 of the 1 videos that"),
    ],
)
def test_other_annotations_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "annotations.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list_videos(tmp_path, tmp_path / "annotations.json", 16)
    assert str(tmp_path) in str(caught.value) and says in str(caught.value)


# --- from videos to a trained row


@pytest.fixture
def mixkit(paper_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Open-Sora-Plan, but small, and six videos, one of them broken."""
    monkeypatch.setattr(encode, "VIDEO_SHARD", 4)
    monkeypatch.setattr(encode, "MOST_LEFT_OUT", 0.2)
    Path("data/mixkit/Cats/2.mp4").write_bytes(b"broken")
    return official.small_suite(
        "paper-osp",
        {
            "samples.count": 2,
            "samples.shard_batches": 1,
            "rows": {
                "plain": {"method": "uncached", "nfe": 3},
                "ours": {"method": "tokencache", "nfe": 3, "options": TOKENCACHE},
            },
        },
    )


def test_videos_are_encoded_once_and_trained_on(mixkit: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    encode_images(mixkit)
    assert "left out: data/mixkit/Cats/2.mp4: not a readable video" in capsys.readouterr().err
    index = read_json(mixkit.latents_index)
    assert index["left_out"].keys() == {"2"} and index["images"] == 5 and len(index["shards"]) == 2
    captions = load_captions(mixkit, held_out=False)
    examples = load_examples(mixkit, captions)
    assert examples.labels.captions == [f"A CAT ({number})." for number in (0, 1, 3, 4, 5)]
    latents = examples.images[torch.tensor([4, 2])]
    videos = list_videos(Path("data/mixkit"), mixkit.training.images.captions, 16)
    for latent, number in zip(latents, (5, 3), strict=True):
        key = torch.tensor([number])
        place = draws.uniform(mixkit.training.seed, key, 1).item()
        video, draw = videos.read(number, 5, (128, 64), place), draws.gaussian(mixkit.training.seed, key, (4, 2, 16, 8))
        assert_close(latent, load_autoencoder(mixkit).encode(video[None], draw)[0], HALF)
    Path("data/mixkit/Cats/0.mp4").write_bytes(b"unread, as its shard is there")
    encode_images(mixkit)
    assert read_json(mixkit.latents_index)["left_out"].keys() == {"2"}
    train_row(mixkit["ours"])
    sample_rows(mixkit.entries)
    tensors, _ = read_tensors(mixkit.folder / "samples" / "ours" / "shard-00000.safetensors")
    assert tensors["image"].shape == (1, 3, 5, 128, 64)
    assert from_mp4(tensors["mp4"].numpy().tobytes()).shape == (5, 128, 64, 3)


def test_captions_are_cleaned_for_training_only(mixkit: Suite) -> None:
    encode_images(mixkit)
    training, evaluated = load_captions(mixkit, held_out=False), load_captions(mixkit)
    read = training.read(["A CAT"]).states_RTC
    assert torch.equal(read, training.encoder(["a cat"]).states_RTC)
    read = evaluated.read(["A CAT"]).states_RTC
    assert torch.equal(read, training.encoder(["high quality, high aesthetic, A CAT"]).states_RTC)


def test_encoding_stops_where_too_many_are_left_out(mixkit: Suite) -> None:
    Path("data/mixkit/Cats/3.mp4").write_bytes(b"broken")
    with pytest.raises(
        UserError, match=r"data/mixkit: 2 of the 6 videos cannot be used, .*/Cats/2.mp4: not a readable"
    ):
        encode_images(mixkit)
    assert not mixkit.latents_index.exists()


def test_videos_are_counted_before_the_run(mixkit: Suite) -> None:
    (need,) = [need for need in needs(mixkit) if need.name == "training"]
    assert (need.used, need.problem) == ("6 videos, trains predictor and refiners", None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"frames_per_second": None},
            "training.images.frames_per_second: latents of kind 'wf'; give the rate of its training",
        ),
        ({"captions": None}, "training.images.captions: videos are listed there; name the file"),
    ],
)
def test_configs_that_lack_settings_of_videos_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {"plain": {"method": "uncached", "nfe": 3}}
    training = official.small_suite("paper-osp", {"rows": rows}).training.images.model_dump(mode="json")
    with pytest.raises(UserError) as caught:
        official.small_suite("paper-osp", {"rows": rows, "training.images": training | changes})
    assert says in str(caught.value)
