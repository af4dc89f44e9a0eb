"""A small CLIP for captioned scenes of digits: an open_clip model, so that CLIP score is what it is elsewhere."""

from pathlib import Path

from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from tcbench.data.captions import END, LENGTH, PAD, WORDS
from tcbench.data.sets.scenes import SIDE
from tcbench.models.weights import check_state, read_state
from tcbench.outside.places import locate

DIGITS_CLIP = "scenes/clip.safetensors"
_WIDTH, _LAYERS, _HEAD = 96, 4, 32


def build_digits_clip() -> CLIP:
    """With random weights from torch's global generator: 36 patches of 4x4 pixels, and the words of `data.captions`.

    `encode_image` takes [B, 3, 24, 24] in [-1, 1], `encode_text` word ids [B, LENGTH]; both give [B, 64].
    """
    vision = CLIPVisionCfg(layers=_LAYERS, width=_WIDTH, head_width=_HEAD, patch_size=4, image_size=SIDE)
    text = CLIPTextCfg(
        context_length=LENGTH, vocab_size=len(WORDS), width=_WIDTH, heads=_WIDTH // _HEAD, layers=_LAYERS,
        pad_id=PAD, eos_id=END, pool_type="eos",
    )  # fmt: skip
    return CLIP(64, vision, text)


def load_digits_clip(weights: Path | str = DIGITS_CLIP) -> CLIP:
    """The trained model, in eval mode; its weights ship with the package.

    Raises:
        UserError: the weights are missing, damaged or of another network.
    """
    path, model = locate(weights), build_digits_clip()
    state = {name: tensor.float() for name, tensor in read_state(path).items()}
    check_state(state, model, "the digits CLIP", path)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()
