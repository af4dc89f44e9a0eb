"""The embedded suites' own metrics: reading digits, comparing them with captions, and the digits CLIP."""

import json
from functools import cache

import pytest
import torch

from tcbench.data import to_uint8
from tcbench.data.captions import decode
from tcbench.errors import UserError
from tcbench.metrics.alignment import Alignment, scene_agrees, video_agrees
from tcbench.metrics.clip import load_digits_clip_scorer
from tcbench.metrics.extractors import make_extractor
from tcbench.models.digits_clip import build_digits_clip, load_digits_clip
from tcbench.models.reader import CLASSES, DigitReader, Reading, load_reader, read_digits, target_map
from tcbench.record.files import sha256, write_tensors
from tcbench.registry import data_source
from tcbench.training.clip import ClipRecipe, train_clip
from tcbench.training.reader import ReaderRecipe, layouts, train_reader
from tests.floors import NETWORK, assert_close

draw = cache(lambda name, index, held_out: data_source(name).draw(index, held_out))


def tracks(index, frames=5):
    """What a perfect reader reads in every frame of a held-out clip."""
    movers = draw("moving", index, True).items
    return [
        [Reading(m.digit, "small", m.top + f * m.down + 4, m.left + f * m.right + 4) for m in movers]
        for f in range(frames)
    ]


# reading


def test_what_a_perfect_map_says_is_read():
    truth = layouts(200, held_out=True)
    perfect = {"map": 20.0 * torch.nn.functional.one_hot(target_map(truth, 24), CLASSES).movedim(3, 1)}
    read = read_digits(lambda images: perfect, torch.empty(200, 1, 24, 24))
    key = lambda reading: (round(reading.y), round(reading.x), reading.digit, reading.size)  # noqa: E731
    assert [sorted(map(key, items)) for items in read] == [sorted(map(key, items)) for items in truth]


def test_a_doubtful_digit_is_none_and_a_blurred_one_is_one():
    scores = torch.zeros(1, CLASSES, 24, 24)
    scores[:, 0] = 20.0
    scores[0, 4, 5, 5] = 19.0  # "three" with probability 0.27
    assert read_digits(lambda images: {"map": scores}, torch.empty(1, 1, 24, 24)) == [[]]
    scores[0, 4, 5, 6], scores[0, 4, 5, 7] = 19.5, 19.4  # 0.38 and 0.35 beside it: one digit somewhere there
    [[reading]] = read_digits(lambda images: {"map": scores}, torch.empty(1, 1, 24, 24))
    assert reading.digit == 3 and reading.size == "small" and reading.y == pytest.approx(5, abs=0.01)
    assert 5.9 < reading.x < 6.5


def test_the_canvas_does_not_matter():
    torch.manual_seed(0)
    reader = DigitReader().eval()
    image = -torch.ones(1, 1, 24, 24)
    image[..., 8:16, 8:16] = torch.rand(8, 8)
    wide = -torch.ones(1, 1, 48, 48)
    wide[..., 12:36, 12:36] = image
    with torch.no_grad():
        near, far = (reader(x)["map"] for x in (image, wide))
    assert near.std() > 0.01
    assert_close(near, far[..., 12:36, 12:36], NETWORK)


# captions


def test_true_layouts_agree_with_their_captions_and_with_no_others():
    captions = [draw("scenes", index, True).caption for index in range(400)]
    truth = layouts(400, held_out=True)
    assert all(map(scene_agrees, captions, truth))
    others = [(other, items) for own, other, items in zip(captions, captions[1:], truth, strict=False) if own != other]
    assert len(others) > 350 and not any(scene_agrees(caption, items) for caption, items in others)


def flipped(items, axis):
    return [Reading(i.digit, i.size, **{"y": i.y, "x": i.x} | {axis: 24 - getattr(i, axis)}) for i in items]


@pytest.mark.parametrize(
    "caption, items, mirror",
    [
        ("a large three left of a small seven", [Reading(3, "large", 12, 6), Reading(7, "small", 12, 18)], "x"),
        ("a small seven below a large three", [Reading(3, "large", 6, 12), Reading(7, "small", 18, 12)], "y"),
        ("two small fives at the top", [Reading(5, "small", 4, 6), Reading(5, "small", 5, 18)], "y"),
        ("two large sixes at the right", [Reading(6, "large", 6, 18), Reading(6, "large", 18, 18)], "x"),
        ("an eight at the bottom left", None, "x"),
        ("a small eight at the bottom left", [Reading(8, "small", 20, 4)], "x"),
        ("a small eight at the top", [Reading(8, "small", 4, 12)], "y"),
    ],
)
def test_a_mirrored_scene_disagrees(caption, items, mirror):
    if items is None:  # a size that the caption does not name is no size that can be read
        assert not scene_agrees(caption, [Reading(8, "small", 20, 4)])
        return
    assert scene_agrees(caption, items)
    assert not scene_agrees(caption, flipped(items, mirror))
    assert not scene_agrees(caption, items[1:])
    assert not scene_agrees(caption, [*items, Reading(0, "small", 12, 12)])
    wrong = [Reading((item.digit + 1) % 10, item.size, item.y, item.x) for item in items]
    resized = [Reading(item.digit, "large" if item.size == "small" else "small", item.y, item.x) for item in items]
    assert not scene_agrees(caption, wrong) and not scene_agrees(caption, resized)


def test_equal_digits_are_in_any_relation_that_their_places_are():
    items = [Reading(4, "small", 12, 6), Reading(4, "small", 12, 18)]
    assert scene_agrees("a small four left of a small four", items)
    assert not scene_agrees("a small four above a small four", items)


def test_a_row_is_level_and_spaced():
    row = [Reading(2, "small", 10 + k % 2, 4 + 8 * k) for k in range(3)]
    assert scene_agrees("three small twos in a row", row)
    assert not scene_agrees("three small twos in a row", [Reading(i.digit, i.size, i.x, i.y) for i in row])
    assert not scene_agrees("three small twos in a row", [row[0], Reading(2, "small", 18, 12), row[2]])


def test_true_motions_agree_and_reversed_or_slower_ones_do_not():
    for index in range(150):
        clip, read = draw("moving", index, True), tracks(index)
        assert video_agrees(clip.caption, read)
        if any(mover.down or mover.right for mover in clip.items):
            assert not video_agrees(clip.caption, read[::-1])
            assert not video_agrees(clip.caption, [read[0]] * 5)
        assert not video_agrees(clip.caption, [items[1:] for items in read])


def test_most_frames_decide():
    caption, read = "a three moving right quickly", [[Reading(3, "small", 8, 4 + 2 * f)] for f in range(5)]
    assert video_agrees(caption, read)
    read[1] = []
    read[2] = [Reading(5, "small", 8, 8)]
    assert video_agrees(caption, read)
    read[3] = read[4] = []
    assert not video_agrees(caption, read)


# training, in little


def test_training_the_reader_is_repeatable_and_refuses_a_diverged_loss(tmp_path):
    recipe = ReaderRecipe(scenes=64, held_out=16, iterations=12, batch_size=8, warmup=1, log_every=6)
    for name in ("one", "two"):
        train_reader(recipe, "cpu", tmp_path / name / "reader.safetensors", tmp_path / f"{name}.json")
    assert sha256(tmp_path / "one/reader.safetensors") == sha256(tmp_path / "two/reader.safetensors")
    history = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))["history"]
    assert [record["iteration"] for record in history] == [6, 12] and history[1]["loss"] < history[0]["loss"]
    load_reader(tmp_path / "one/reader.safetensors")
    with pytest.raises(UserError, match="the loss is nan"):
        changed = recipe.model_copy(update={"learning_rate": 1e30})
        train_reader(changed, "cpu", tmp_path / "reader.safetensors", tmp_path / "log.json")


def test_training_the_clip_brings_captions_and_scenes_together(tmp_path):
    recipe = ClipRecipe(scenes=64, held_out=16, iterations=12, batch_size=16, warmup=1, log_every=6)
    train_clip(recipe, "cpu", tmp_path / "clip.safetensors", tmp_path / "log.json")
    history = json.loads((tmp_path / "log.json").read_text(encoding="utf-8"))["history"]
    assert history[1]["loss"] < history[0]["loss"]
    load_digits_clip(tmp_path / "clip.safetensors")
    write_tensors(tmp_path / "other.safetensors", DigitReader().state_dict())
    with pytest.raises(UserError, match=r"other\.safetensors: .* is missing; give a checkpoint of the digits CLIP"):
        load_digits_clip(tmp_path / "other.safetensors")


def test_the_caption_ends_at_its_end():
    """Padding must not reach the embedding."""
    torch.manual_seed(0)
    model = build_digits_clip().eval()
    words = data_source("scenes").compose(range(4), True).labels
    padded = words.clone()
    padded[padded == 0] = 7
    assert_close(model.encode_text(padded), model.encode_text(words), NETWORK)


# the weights that ship


@pytest.mark.parametrize(
    "name, ceiling", [("scenes", 0.9), ("moving", 0.75)]
)  # a clip is five scenes, all to be read right
def test_the_shipped_reader_reads_held_out_samples(name, ceiling):
    data = data_source(name).compose(range(300), True)
    media, captions = to_uint8(data.images), decode(data.labels)
    align = Alignment(load_reader())
    assert align(media, captions).mean() > ceiling
    assert align(media[:100], captions[1:101]).mean() < 0.05


def test_the_shipped_clip_prefers_a_scenes_own_caption():
    data = data_source("scenes").compose(range(200), True)
    media, captions = to_uint8(data.images), decode(data.labels)
    score = load_digits_clip_scorer()
    own, other = score(media, captions), score(media, captions[1:] + captions[:1])
    assert (own > other).float().mean() > 0.95 and own.mean() > other.mean() + 20


def test_features_of_videos_are_those_of_their_frames():
    videos = to_uint8(data_source("moving").compose(range(3), True).images)
    extractor = make_extractor("digit-reader")
    features = extractor.extract(videos)
    assert features.pooled.shape == (3, 5, 64) and features.spatial.shape == (3, 5, 112)
    assert_close(features.pooled[1], extractor.extract(videos[1].transpose(0, 1)).pooled, NETWORK)
