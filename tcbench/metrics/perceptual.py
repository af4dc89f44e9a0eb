"""LPIPS: learned perceptual image patch similarity (Zhang et al., CVPR 2018), version 0.1 with AlexNet.

The authors' package ships the linear layers that weigh the channels. AlexNet's own weights are torchvision's, which do
not ship: `scoring.lpips.weights` names their file.
"""

import warnings
from pathlib import Path

import lpips
import torch
from torch import Tensor, nn

from tcbench.errors import NotRun, UserError
from tcbench.metrics.deviation import shown
from tcbench.metrics.readings import frames, rgb
from tcbench.metrics.samples import PairScorer
from tcbench.models.weights import check_state, read_state

LEAST = 32
"""Pixels along a side: of smaller images AlexNet's last layers see nothing."""
_BATCH = 64


def load_lpips(weights: Path, device: torch.device | str = "cpu") -> PairScorer:
    """LPIPS of pairs of images, of videos its mean over frames; grey ones repeat their channel.

    Args:
        weights: torchvision's alexnet-owt-7be5be79.pth.
        device: where to run.

    Raises:
        NotRun: there is no such file.
        UserError: it holds something else.
    """
    if not (path := weights.expanduser()).exists():
        raise NotRun(f"needs {path} (download.pytorch.org/models/alexnet-owt-7be5be79.pth)")
    with warnings.catch_warnings():  # it calls torchvision by arguments that are deprecated
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = {name: tensor for name, tensor in read_state(path).items() if name.startswith("features.")}
    layers = nn.ModuleDict({name: layer for part in network.net.children() for name, layer in part.named_children()})
    ours = {name.removeprefix("features."): tensor for name, tensor in state.items()}
    check_state(ours, layers, "torchvision's AlexNet", path)
    layers.load_state_dict(ours)
    network.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def score(images: Tensor, reference: Tensor) -> Tensor:
        if min(images.shape[-2:]) < LEAST:
            size = "x".join(map(str, images.shape[-2:]))
            raise UserError(f"lpips: images of {size} are smaller than {LEAST}x{LEAST}; take it out of the metrics")
        pairs = zip(images.split(_BATCH), reference.split(_BATCH), strict=True)
        return torch.cat([_of_batch(network, a, b, device) for a, b in pairs])

    return score


def _of_batch(network: nn.Module, images: Tensor, reference: Tensor, device: torch.device | str) -> Tensor:
    sides = [rgb(shown(side)).to(device) for side in (images, reference)]
    if images.ndim == 5:
        sides = [frames(side) for side in sides]
    return network(*sides).view(len(images), -1).mean(1).cpu()
