"""The Cache Predictor (Sec. III-C): one DiT block and a linear head, a score for every token in every block at once."""

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tcbench.kernels.chosen import Backend
from tcbench.kernels.scores import token_scores
from tcbench.ledger import predictor_macs
from tcbench.models.adapter import Adapter, TransformerBlock


class ComputesBlocks(Protocol):
    """The adapter, or whatever else computes a block of its model."""

    @property
    def backend(self) -> Backend:
        """Whether its kernels compute the head too."""

    def block(self, module: TransformerBlock, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block for all tokens: [R, N, D]."""


class CachePredictor(nn.Module):
    """alpha_theta(x_t, t) of Eq. (8).

    The block starts as a copy of the model's first; the model's own embeddings of x_t, t and the label feed it. As in
    DiT's final layer a LayerNorm precedes the head, so that the scale of the embeddings does not set the scale of the
    scores. The head starts at zero: every score is 0.5 until trained.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.block: TransformerBlock = adapter.copy_of_block(0)
        shape = adapter.shape
        self.joint_text = shape.joint_text
        self.head = nn.Linear(shape.width, shape.num_blocks)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(adapter.device)

    def forward(self, compute: ComputesBlocks, x_RND: Tensor, condition: Any) -> Tensor:
        """Scores in (0, 1), float32 whatever the model's dtype, because close scores must stay distinct: [R, L, N]."""
        x = compute.block(self.block, x_RND, condition)[:, self.joint_text :]
        # where a dtype is mixed in; the device of shapes alone has no autocast
        with torch.autocast(x.device.type, enabled=False) if x.device.type != "meta" else nullcontext():
            return token_scores(x, self.head.weight, self.head.bias, backend=compute.backend)

    macs = staticmethod(predictor_macs)
