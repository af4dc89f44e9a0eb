"""Captioned scenes and videos: what a caption says is what is shown, and what is held out stays out."""

import re
from functools import cache
from itertools import pairwise

import pytest
import torch

from tcbench.data.captions import LENGTH, PAD, WORDS, decode, encode, is_held_out
from tcbench.data.sets import moving, scenes
from tcbench.data.sets.moving import Clip
from tcbench.data.sets.scenes import SIDE, SIZES, Scene
from tcbench.errors import UserError
from tcbench.registry import data_source

DRAWS = range(400)
draw = cache(lambda name, index, held_out: data_source(name).draw(index, held_out))


@pytest.mark.parametrize(("name", "shape"), [("scenes", (1, 24, 24)), ("moving", (1, 5, 16, 16))])
def test_items_depend_on_their_index_alone(name: str, shape: tuple[int, ...]) -> None:
    data = data_source(name).compose([7, 2, 7], held_out=False)
    assert data.images.shape == (3, *shape)
    assert data.images.min() == -1
    assert data.images.max() <= 1
    assert torch.equal(data.images[0], data.images[2])
    assert torch.equal(data.images[1], data_source(name).compose([2], held_out=False).images[0])
    for held_out, seed in ((True, 0), (False, 1)):
        assert not torch.equal(data.images[1], data_source(name).compose([2], held_out, seed).images[0])


@pytest.mark.parametrize("name", ["scenes", "moving"])
def test_held_out_meanings_are_never_trained_on(name: str) -> None:
    parts = [{draw(name, index, held_out).meaning for index in DRAWS} for held_out in (False, True)]
    assert not parts[0] & parts[1]
    assert [{is_held_out(meaning) for meaning in part} for part in parts] == [{False}, {True}]


def test_either_wording_of_a_relation_has_one_meaning() -> None:
    pairs = [scene for index in DRAWS if " of a" in (scene := draw("scenes", index, True)).caption]
    swapped = [scene for scene in pairs if scene.caption != scene.meaning]
    assert 0.3 < len(swapped) / len(pairs) < 0.7
    for scene in swapped:
        assert re.sub("right of", "left of", scene.caption).split(" left of ")[::-1] == scene.meaning.split(" left of ")


def test_scenes_show_what_they_say() -> None:
    for index in DRAWS:
        scene = draw("scenes", index, False)
        assert isinstance(scene, Scene)
        words = scene.caption.split()
        for item in scene.items:
            assert 0 <= item.top <= SIDE - item.size
            assert 0 <= item.left <= SIDE - item.size
        for first, other in pairwise(scene.items):
            apart = abs(first.top - other.top), abs(first.left - other.left)
            assert max(apart) >= min(first.size, other.size), f"{scene.caption} overlaps"
        if words[0] == "two":
            assert [item.size for item in scene.items] == [SIZES[words[1]]] * 2
        for relation, first in (("left of", 0), ("right of", 1)):
            if f" {relation} a" in scene.caption:
                assert scene.items[first].left < scene.items[1 - first].left
        for relation, first in (("above", 0), ("below", 1)):
            if f" {relation} a" in scene.caption:
                assert scene.items[first].top < scene.items[1 - first].top


def test_videos_move_as_they_say() -> None:
    for index in DRAWS:
        clip = draw("moving", index, False)
        assert isinstance(clip, Clip)
        for item, phrase in zip(clip.items, clip.caption.split(" left of "), strict=True):
            end = item.top + item.down * (moving.FRAMES - 1), item.left + item.right * (moving.FRAMES - 1)
            assert all(0 <= place <= moving.SIDE - moving.SIZE for place in (item.top, item.left, *end))
            speed = 0 if "still" in phrase else moving.SPEEDS[phrase.split()[-1]]
            down, right = (0, 0) if not speed else moving.DIRECTIONS[phrase.split()[-2]]
            assert (item.down, item.right) == (down * speed, right * speed)


def test_a_moving_digit_is_one_handwriting_shifted() -> None:
    index = next(i for i in DRAWS if draw("moving", i, False).caption.endswith("moving right quickly"))
    (item,) = draw("moving", index, False).items
    video = data_source("moving").compose([index], held_out=False).images[0, 0]
    for before, after in pairwise(video):
        assert torch.equal(before[:, : -item.right], after[:, item.right :])


def test_captions_to_words_and_back() -> None:
    said = ["a large three left of a small seven", "", "an eight moving up slowly"]
    words = encode(said)
    assert words.shape == (3, LENGTH)
    assert decode(words) == said
    assert (words[1] != PAD).sum() == 1  # the null caption is its end alone
    for name in ("scenes", "moving"):
        drawn = [draw(name, index, True).caption for index in DRAWS]
        assert decode(data_source(name).captions(torch.arange(len(DRAWS)), held_out=True)) == drawn
        assert all(len(caption.split()) < LENGTH and set(caption.split()) <= set(WORDS) for caption in drawn)
    with pytest.raises(UserError, match="unknown word 'ten'"):
        encode(["a large ten"])
    with pytest.raises(UserError, match="more than 15 words"):
        encode(["a " * LENGTH])


def test_a_suites_images_come_with_their_captions() -> None:
    data = data_source("scenes").images(held_out=True)
    assert data.images.shape == (2048, 1, scenes.SIDE, scenes.SIDE)
    assert torch.equal(data.labels[:5], data_source("scenes").captions(torch.arange(5), held_out=True))
    assert not torch.equal(data.labels[:5], data_source("scenes").captions(torch.arange(5), held_out=False))
