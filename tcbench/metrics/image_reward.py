"""ImageReward (Xu et al., NeurIPS 2023) from its official checkpoint, on transformers' own BLIP classes.

The package `image-reward` pins a timm and needs a transformers that exclude everything else here; its network is BLIP's
image encoder and image-grounded text encoder with a linear head, so only the names of the tensors differ.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from tcbench.errors import NotRun, UserError
from tcbench.metrics.readings import rgb
from tcbench.models.weights import read_state

VISION = BlipVisionConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=224,
    patch_size=16, layer_norm_eps=1e-6,
)  # fmt: skip
TEXT = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, is_decoder=True)  # a decoder has the cross-attention
MAX_WORDS = 35
"""Word pieces of a caption in the official `score`; wrappers that pad to 512 get other scores."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the authors' validation set; a reward is in these standard deviations."""

_RENAMED = (
    (r"^visual_encoder\.", "vision."),
    (r"^text_encoder\.", "text."),
    (r"^vision\.cls_token", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj", "vision.embeddings.patch_embedding"),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"(?<=\d)\.attn\.qkv", ".self_attn.qkv"),
    (r"(?<=\d)\.attn\.proj", ".self_attn.projection"),
    (r"(?<=\d)\.norm([12])\.", r".layer_norm\1."),
)
_HEAD = (0, 2, 4, 6, 7)  # the official head counts its dropouts
_UNUSED = ("vision_proj.", "text_proj.")  # of BLIP's contrastive loss


class ImageReward(nn.Module):
    """Rewards of (image, caption) pairs.

    Attributes:
        vision, text: BLIP's image encoder and its text encoder with cross-attention to the image.
        mlp: the head, linear throughout as published: text width -> 1024 -> 128 -> 64 -> 16 -> 1.
    """

    def __init__(
        self, tokenizer: BertTokenizer, vision: BlipVisionConfig = VISION, text: BlipTextConfig = TEXT
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, 1024, 128, 64, 16, 1)
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
        side = vision.image_size
        self.preprocess = Compose([
            Resize(side, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(side),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ])  # fmt: skip

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor, captions: Sequence[str]) -> Tensor:
        """Rewards, float32 [B] on the CPU, of uint8 images [B, 1 or 3, H, W], resized by PIL as the package does."""
        device = next(self.parameters()).device
        pixels = torch.stack([
            self.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in rgb(images_BCHW)
        ])  # fmt: skip
        words = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=MAX_WORDS, return_tensors="pt"
        ).to(device)
        hidden = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=self.vision(pixels.to(device)).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return ((self.mlp(hidden[:, 0]) - MEAN) / STD).flatten().float().cpu()


def load_image_reward(
    weights: Path,
    tokenizer: str,
    device: torch.device | str = "cpu",
    vision: BlipVisionConfig = VISION,
    text: BlipTextConfig = TEXT,
) -> ImageReward:
    """Load the official checkpoint.

    Args:
        weights: ImageReward.pt of the Hugging Face repository THUDM/ImageReward (1.8 GB).
        tokenizer: a folder with the vocabulary of bert-base-uncased, or that name if it is cached or may be downloaded.
        device: where to run.
        vision, text: the network's shape, if it is not the official one.

    Raises:
        NotRun: a file is not there.
        UserError: it is there and not what it should be.
    """
    path = weights.expanduser()
    if not path.exists():
        raise NotRun(f"needs {weights}: download ImageReward.pt (1.8 GB) from huggingface.co/THUDM/ImageReward")
    try:
        words = BertTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise NotRun(f"needs the vocabulary of bert-base-uncased; no tokenizer at {tokenizer!r}") from error
    model = ImageReward(words, vision, text)
    state = {_renamed(key): tensor for key, tensor in read_state(path).items()}
    wanted = model.state_dict().keys()
    state = {key: tensor for key, tensor in state.items() if not key.startswith(_UNUSED) and "position_ids" not in key}
    if unmatched := sorted(wanted ^ state.keys()):
        raise UserError(
            f"{weights}: not ImageReward's checkpoint ({unmatched[0]} has no counterpart); download it again"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{weights}: not ImageReward's checkpoint ({str(error).splitlines()[1].strip()})") from error
    return model.requires_grad_(False).eval().to(device)


def _renamed(key: str) -> str:
    """A tensor's name here, from its name in the official checkpoint."""
    key = key.removeprefix("blip.")
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    layer = re.match(r"mlp\.layers\.(\d+)\.(.*)", key)
    return f"mlp.{_HEAD.index(int(layer[1]))}.{layer[2]}" if layer else key
