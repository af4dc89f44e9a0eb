"""CLIP score, ImageReward and VBench: against their packages where recorded, and what is said where they cannot run."""

import json

import pytest
import torch
from transformers import BlipTextConfig, BlipVisionConfig

from tcbench.errors import NotRun, UserError
from tcbench.metrics.image_reward import load_image_reward
from tests.references import image_reward

HERE = image_reward.HERE
VOCABULARY = str(HERE / "image_reward_vocabulary")


@pytest.fixture(scope="module")
def small_image_reward(tmp_path_factory):
    """The checkpoint that the package's rewards were recorded with, under its official names, and its shape."""
    recorded = json.loads((HERE / "image_reward.json").read_text(encoding="utf-8"))
    state = {name: torch.from_numpy(image_reward.fill(name, shape)) for name, shape in recorded["parameters"].items()}
    path = tmp_path_factory.mktemp("image_reward") / "ImageReward.pt"
    torch.save(state, path)
    width, layers = image_reward.WIDTH, image_reward.LAYERS
    small = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 4 * width,
    }
    vision = BlipVisionConfig(**small, image_size=image_reward.SIDE, patch_size=16, layer_norm_eps=1e-6)
    text = BlipTextConfig(
        **small, vocab_size=40, max_position_embeddings=64, encoder_hidden_size=width, is_decoder=True
    )
    return path, vision, text, recorded["rewards"]


def test_image_reward_is_the_packages_own(small_image_reward):
    path, vision, text, rewards = small_image_reward
    model = load_image_reward(path, VOCABULARY, vision=vision, text=text)
    pictures = [torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in image_reward.pictures()]
    ours = [model(picture, [caption]).item() for picture, caption in zip(pictures, image_reward.CAPTIONS, strict=True)]
    assert len({round(reward, 3) for reward in rewards}) == 3
    assert ours == pytest.approx(rewards, abs=1e-6)
