"""Makes image_reward.json: rewards by the package image-reward 1.5 itself, on a small network with weights by formula.

    pip install image-reward==1.5 "transformers<4.56" openai-clip torch==2.12.* torchvision==0.27.* "setuptools<81"
    python tests/references/image_reward.py

Tests build the same weights and images with `fill` and `pictures`, so that only captions and rewards are stored.
"""

import importlib
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WIDTH, LAYERS, SIDE = 32, 2, 64
CAPTIONS = ["a painting of three cats", "two dogs, left of a large red seven.", "unknown words " * 30]


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's values from its official name: every layer shows in the output, no norm is the identity."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "norm" in name.lower() and name.endswith("weight"):
        return 1 + 0.2 * values
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 25
    return values / np.float32(np.sqrt(fan_in))


def pictures() -> list[np.ndarray]:
    """Three uint8 images [H, W, 3] of different shapes, none of them the network's."""
    draw = np.random.RandomState(0)
    return [np.kron(draw.randint(0, 256, (8, 8 + k, 3)), np.ones((10, 10, 1))).astype(np.uint8) for k in range(3)]


def main() -> None:
    """Score every picture with its caption through the package's own `score`."""
    import torch
    import transformers
    from ImageReward.models.BLIP import blip, blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from PIL import Image

    package = importlib.import_module("ImageReward.ImageReward")  # its own name hides the module in the package
    torch.set_num_threads(1)
    vocabulary = transformers.BertTokenizer.from_pretrained(str(HERE / "image_reward_vocabulary"))
    blip.BertTokenizer.from_pretrained = lambda name: vocabulary
    blip_pretrain.create_vit = lambda vit, image_size, *_: (
        VisionTransformer(img_size=SIDE, patch_size=16, embed_dim=WIDTH, depth=LAYERS, num_heads=2),
        WIDTH,
    )
    head = package.MLP
    package.MLP = lambda width: head(WIDTH)
    transform = package._transform
    package._transform = lambda side: transform(SIDE)
    med = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH,
           "vocab_size": 40, "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
           "add_cross_attention": True, "pad_token_id": 0, "type_vocab_size": 2, "encoder_width": WIDTH}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "med_config.json"
        config.write_text(json.dumps(med))
        model = package.ImageReward(str(config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(fill(name, tuple(parameter.shape))))
        rewards = []
        for number, (picture, caption) in enumerate(zip(pictures(), CAPTIONS, strict=True)):
            path = Path(folder) / f"{number}.png"
            Image.fromarray(picture).save(path)
            with torch.no_grad():
                rewards.append(model.score(caption, str(path)))
    names = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    made_by = {"image-reward": "1.5", "transformers": transformers.__version__, "torch": torch.__version__}
    record = {"made_by": made_by, "rewards": rewards, "parameters": names}
    (HERE / "image_reward.json").write_text(json.dumps(record, indent=1) + "\n")
    print(rewards, file=sys.stderr)


if __name__ == "__main__":
    main()
