"""Generated videos: what is kept of them and how exactly, mp4 files as VBench reads them, and what VBench says."""

import json
import sys
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.metrics.readings import temporal_flickering
from tcbench.metrics.vbench import DIMENSIONS
from tcbench.outside.places import VBENCH, vbench_environment
from tcbench.record.files import read_json, read_tensors
from tcbench.record.shards import misshapen, read_shards
from tcbench.record.videos import KEPT, from_mp4, kept_frames, packed, to_mp4, unpacked
from tcbench.report.page import _playing
from tcbench.report.strips import write_strip
from tcbench.stages.render import render_strips
from tcbench.stages.sample import row_fingerprint, sample_rows
from tcbench.stages.vbench import score_videos
from tests import full_size_clip, official
from tests.suites import altered

LOSSY = 6.0
"""Levels of 255 that crf 10 and colours of a quarter of the pixels cost on average in smooth pictures."""


def smooth(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A video of bytes that moves, from black to white in every frame: [3, T, H, W]."""
    t, y, x = np.ogrid[:frames, :height, :width]
    grey = 255 * ((x + 2 * t) % width) / (width - 1)
    return (
        np.stack([grey + 0 * y, 255 - grey + 0 * y, 255 * (y + 0 * x + 0 * t) / (height - 1)]).round().astype(np.uint8)
    )


# --- files


def test_an_mp4_shows_the_bytes() -> None:
    """Not 128 and 255, which bytes taken for numbers in [-1, 1] would give."""
    video = smooth(9)
    content = to_mp4(video, 18)
    shown = from_mp4(content)
    assert shown.shape == (9, 48, 64, 3) and abs(shown.astype(float) - np.moveaxis(video, 0, -1)).mean() < LOSSY
    with av.open(BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.codec_context.name) == (9, 18, "h264")
        assert stream.codec_context.pix_fmt == "yuv420p"
    assert to_mp4(video, 18) == content


def test_numbers_of_one_channel_become_grey_levels() -> None:
    levels = np.float32([-1.5, -1, 0, 1]).repeat(16)
    shown = from_mp4(to_mp4(np.broadcast_to(levels, (1, 2, 16, 64)), 4))
    assert abs(shown[0, 8, [8, 24, 40, 56]].astype(int) - [[0], [0], [128], [255]]).max() <= 3


def test_a_shard_keeps_some_frames_to_the_bit_and_all_as_mp4() -> None:
    videos = np.stack([smooth(93, 16, 16), smooth(93, 16, 16)[:, ::-1]])
    tensors = packed(videos, 18)
    assert kept_frames(93).tolist() == [0, 18, 37, 55, 74, 92] and kept_frames(5).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(tensors["image"], videos[:, :, [0, 18, 37, 55, 74, 92]]) and tensors["image"].shape[2] == KEPT
    first, second = unpacked(tensors, 18)
    assert first == to_mp4(videos[0], 18) and second == to_mp4(videos[1], 18) and first != second
    assert not misshapen(whole := {**_others(2), **tensors})
    for broken in ({"mp4_bytes": tensors["mp4_bytes"][:1]}, {"mp4": tensors["mp4"][:-1]}):
        assert misshapen(whole | broken) == "mp4 and mp4_bytes do not fit"
    assert misshapen({name: array for name, array in whole.items() if name != "mp4_bytes"})


def _others(count: int) -> dict[str, np.ndarray]:
    number, state = np.arange(count), np.zeros((3, count, 4), np.float32)
    return {"index": number, "label": number, "x0": state, "xt": state}


# --- from samples to VBench


@pytest.fixture
def videos(paper_folder: Path) -> Suite:
    """Open-Sora-Plan, but small, sampled: six videos of two prompts, in three shards."""
    suite = official.small_suite(
        "paper-osp",
        {"samples.count": 6, "samples.batch_size": 2, "samples.shard_batches": 1,
         "rows": {"plain": {"method": "uncached", "nfe": 3}}},
    )  # fmt: skip
    sample_rows(suite.entries)
    return suite


PACKAGE = '''
"""What VBench's process uses of the package: prompts, file names and results as there."""
import json, os
from pathlib import Path
import av, numpy as np

class VBench:
    def __init__(self, device, full_info, folder):
        self.info, self.folder = json.loads(Path(full_info).read_text()), folder

    def evaluate(self, videos_path, name, dimension_list, local):
        assert local
        (dimension,) = dimension_list
        found = []
        for entry in [entry for entry in self.info if dimension in entry["dimension"]]:
            paths = [f"{videos_path}/{entry['prompt_en']}-{number}.mp4" for number in range(5)]
            found += [(path, self.flickering(path)) for path in paths if os.path.exists(path)]
        videos = [{"video_path": path, "video_results": score} for path, score in found]
        result = {dimension: [np.mean([score for _, score in found]), videos]}
        (Path(self.folder) / f"{name}_eval_results.json").write_text(json.dumps(result))

    def flickering(self, path):
        with av.open(path) as container:
            assert container.streams.video[0].average_rate == 18
            frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
        return 1 - np.mean([abs(a - b).mean() for a, b in zip(frames, frames[1:])]) / 255
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose vbench has the package's interface, and whose torch is no more than its process uses."""
    package, program = tmp_path / "env" / "packages" / "vbench", tmp_path / "env" / "bin" / "python"
    package.mkdir(parents=True)
    program.parent.mkdir()
    (package / "__init__.py").write_text(PACKAGE, encoding="utf-8")
    entry = {"prompt_en": "a dog", "dimension": ["temporal_flickering"]}
    (package / "VBench_full_info.json").write_text(json.dumps([entry]), encoding="utf-8")
    torch_too = "set_grad_enabled = device = lambda argument: argument\n"
    (package.parent / "torch.py").write_text(torch_too, encoding="utf-8")
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{package.parent}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "env" / "requirements.txt").touch()
    monkeypatch.setenv(VBENCH, str(tmp_path / "env"))


def test_vbench_reads_a_rows_videos(videos: Suite, stand_in: None) -> None:
    """What needs no checkpoint is run on the files, and the rest says which is missing."""
    entry = videos["plain"]
    entry.videos.mkdir(parents=True)
    (entry.videos / "a cat-0.mp4").touch()
    score_videos(entry)
    names = [*(f"a dog-{number}.mp4" for number in range(5)), "two cats-0.mp4"]
    assert sorted(path.name for path in entry.videos.iterdir()) == names
    shards = [*read_shards(entry.samples, "np")]
    files = [file for tensors in shards for file in unpacked(tensors, 18)]
    assert [(entry.videos / name).read_bytes() for name in names] == files
    exact = torch.from_numpy(np.concatenate([tensors["image"] for tensors in shards]))
    shown = torch.from_numpy(np.stack([from_mp4(file) for file in files])).permute(0, 4, 1, 2, 3)
    assert shown.shape == exact.shape and abs(shown.float().mean() - exact.float().mean()) < 3
    record = read_json(entry.vbench)
    assert record["video"] == {"fps": 18, "codec": "libx264, crf 10"}
    scores = record["dimensions"]["temporal_flickering"]["samples"]
    assert scores.keys() == {"0", "1", "2", "3", "4"}  # of that dimension's prompts
    expected = temporal_flickering(shown)[:5].tolist()
    assert [scores[str(number)] for number in range(5)] == pytest.approx(expected, abs=1e-5)
    for dimension in DIMENSIONS:
        if dimension.needs:
            reason = record["dimensions"][dimension.name]["not_run"]
            assert reason.startswith("needs ") and dimension.needs[0] in reason and " MB" in reason, reason


@pytest.mark.skipif(not (vbench_environment() / "requirements.txt").exists(), reason="needs VBench's environment")
def test_vbenchs_own_package_reads_a_rows_videos(videos: Suite) -> None:
    """As above, by the package itself: what it reads of the files is what PyAV reads."""
    (full_info,) = vbench_environment().resolve().glob("lib/python*/site-packages/vbench/VBench_full_info.json")
    prompts = [entry for entry in json.loads(full_info.read_text()) if "temporal_flickering" in entry["dimension"]]
    file = Path("data/vbench/VBench_full_info.json")
    file.write_text(json.dumps(prompts[:2]), encoding="utf-8")
    entry = videos["plain"]
    sample_rows(videos.entries)
    score_videos(entry)
    scores = read_json(entry.vbench)["dimensions"]["temporal_flickering"]["samples"]
    files = [file for tensors in read_shards(entry.samples, "np") for file in unpacked(tensors, 18)]
    shown = torch.from_numpy(np.stack([from_mp4(file) for file in files])).permute(0, 4, 1, 2, 3)
    assert [scores[str(number)] for number in range(6)] == pytest.approx(temporal_flickering(shown).tolist(), abs=1e-4)


def test_without_its_environment_the_videos_are_written(videos: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VBENCH, "nowhere")
    score_videos(videos["plain"])
    assert len([*videos["plain"].videos.glob("*.mp4")]) == 6
    assert all(
        "--build-env" in result["not_run"] for result in read_json(videos["plain"].vbench)["dimensions"].values()
    )


def test_vbench_looks_at_no_images(videos: Suite) -> None:
    with pytest.raises(UserError, match="pixart-256 makes images; VBench looks at videos"):
        score_videos(altered(videos, {"model.name": "pixart-256"})["plain"])


def test_another_rate_is_another_video(videos: Suite) -> None:
    other = altered(videos, {"vbench.fps": 16})
    assert row_fingerprint(other["plain"]) != row_fingerprint(videos["plain"])
    shard = videos["plain"].shard(0)
    before = read_tensors(shard)[0]
    sample_rows(other.entries)
    after = read_tensors(shard)[0]
    assert torch.equal(before["image"], after["image"]) and not torch.equal(before["mp4"], after["mp4"])


def test_metrics_that_look_at_all_frames_are_refused(paper_folder: Path) -> None:
    rows = {"plain": {"method": "uncached", "nfe": 3}}
    with pytest.raises(UserError, match=r"scoring\.metrics\.1: temporal_flickering looks at all frames"):
        official.small_suite("paper-osp", {"rows": rows, "scoring.metrics": ["vbench", "temporal_flickering"]})


def test_the_measurement_at_full_size_runs_at_toy_size(tmp_path: Path) -> None:
    """`python -m tests.full_size_clip`, which needs a GPU for the full one."""
    measured = full_size_clip.main(["--size", "toy", "--steps", "4", "--out", str(tmp_path / "clip.json")])
    assert read_json(tmp_path / "clip.json") == measured
    assert not [part for part in measured.values() if "not_run" in part]
    for row in ("fp32 uncached", "fp32 tokencache"):
        assert measured[row]["shape"] == [2, 3, 5, 128, 64] and len(measured[row]["batches_s"]) == 3
    assert measured["fp32 tokencache"]["tmacs"] < measured["fp32 uncached"]["tmacs"]
    assert measured["mp4"]["kept"] == [1, 3, 5, 128, 64] and not measured["decode to bytes"]["broken"]


# --- in the report


def test_clips_play_where_only_some_frames_are_kept(videos: Suite) -> None:
    render_strips(videos, videos.folder, videos.folder)
    row = {"suite": videos.suite, "row": "plain"}
    with Image.open(BytesIO(_playing(videos.folder, row, np.zeros((3, 4, 8)), 2))) as clips:
        assert clips.n_frames == 5 and clips.size == (3 * 64, 128)  # columns of the figure
        shown = np.asarray(clips.convert("RGB"))
        assert clips.info["duration"] == 56
    first = read_tensors(videos["plain"].shard(0))[0]["image"][0, :, 0].permute(1, 2, 0).numpy()
    assert abs(shown[:, :64].astype(float).mean((0, 1)) - first.mean((0, 1))).max() < 8


def test_a_strip_plays_where_it_has_all_frames(tmp_path: Path) -> None:
    """Two samples of three frames, no torch: what published results bring."""
    tiles = np.arange(2 * 3, dtype=np.uint8).reshape(2, 1, 3, 1) * 40
    tiles = tiles.repeat(4, axis=1).repeat(4, axis=3).reshape(2, 4, 12)  # frames side by side
    write_strip(tmp_path, "suite", "row", "samples", [tiles])
    with Image.open(BytesIO(_playing(tmp_path, {"suite": "suite", "row": "row"}, tiles, 3))) as clips:
        assert clips.n_frames == 3 and clips.size == (8, 4)
        for number in range(3):
            clips.seek(number)
            assert np.asarray(clips.convert("L"))[0, ::4].tolist() == [40 * number, 40 * (3 + number)]
