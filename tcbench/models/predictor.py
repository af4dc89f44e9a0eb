"""The Cache Predictor (Sec. III-C): one DiT block and a linear head, a score for every token in every block at once."""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.ledger import block_macs
from tcbench.method import Macs, ModelShape
from tcbench.models.dit import DiTAdapter, DiTBlock


class CachePredictor(nn.Module):
    """alpha_theta(x_t, t) of Eq. (8).

    The block starts as a copy of the model's first; the model's own embeddings of x_t, t and the label feed it. As in
    DiT's final layer a LayerNorm precedes the head, so that the scale of the embeddings does not set the scale of the
    scores. The head starts at zero: every score is 0.5 until trained.
    """

    def __init__(self, adapter: DiTAdapter) -> None:
        super().__init__()
        self.block: DiTBlock = copy.deepcopy(adapter.blocks[0])
        self.block.norm1.emb = None  # the model's embedder is shared and stays frozen
        shape = adapter.shape
        self.head = nn.Linear(shape.width, shape.num_blocks)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(adapter.model.device)

    def forward(self, adapter: DiTAdapter, x_RND: Tensor, condition_RD: Tensor) -> Tensor:
        """Scores in (0, 1): [R, L, N]."""
        modulation, x = adapter.modulation(self.block, condition_RD), x_RND
        for branch, part in modulation.items():
            x = x + part.gate * adapter.branch(self.block, branch, x, part)
        return self.head(F.layer_norm(x, x.shape[-1:])).sigmoid().transpose(1, 2)

    @staticmethod
    def macs(shape: ModelShape) -> Macs:
        """Per row and call: a whole block and the head."""
        head = Macs(shape.width * shape.num_blocks * shape.num_tokens, shape.width * shape.num_tokens)
        return block_macs(shape, shape.num_tokens) + head
