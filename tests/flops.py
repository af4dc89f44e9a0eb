"""What torch counts: the formulas of `FlopCounterMode`, without its account by module.

That account and taking every operation apart cost four times what is counted. Here a layer is counted where it is
called, and only what has no formula is taken apart.
"""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_flop_count

aten = torch.ops.aten


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return mm_flop(x.flatten(0, -2).shape, weight.T.shape)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


class TorchFlops(TorchDispatchMode):
    """Counts while it is entered; the fused attention of a CPU too, which `FlopCounterMode` does not see.

    Attributes:
        total: floating-point operations, two a multiply-accumulate.
    """

    formulas: ClassVar = {aten.linear: _linear, aten.scaled_dot_product_attention: _attention} | flop_registry

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if formula := self.formulas.get(op.overloadpacket):
            made = op(*args, **kwargs)
            self.total += formula(*args, **kwargs, out_val=made)
            return made
        if not _hides_others(op):
            return op(*args, **kwargs)
        with self:
            return op.decompose(*args, **kwargs)


WITHOUT_PRODUCTS = {
    *(aten.layer_norm, aten.rms_norm, aten.dropout),
    *(aten.flatten, aten.unflatten, aten.chunk, aten.expand_as, aten.to, aten.type_as),
}
"""What a model calls most of the operations that are made of others, none of which is a product."""


@cache
def _hides_others(op: Any) -> bool:
    """Whether an operation is made of others, which may be products."""
    return op.overloadpacket not in WITHOUT_PRODUCTS and op._can_decompose()
