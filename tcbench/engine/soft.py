"""The training path: gates between fresh and cached values, differentiably."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tcbench.models.adapter import Adapter, TransformerBlock
from tcbench.plan import Block, Site, Unit

Gate = Tensor | Callable[[Tensor], Tensor]
"""How much of a unit is fresh: broadcastable to [R, N, D]; of a part also made from its modulated input [R, N, D]."""


def soft_hidden(
    adapter: Adapter,
    x_RND: Tensor,
    condition: Any,
    gates: Mapping[Unit, Gate],
    cached: Mapping[Unit, Tensor],
    inputs: Sequence[Tensor] | None = None,
    checkpointed: bool = False,
    used: dict[Unit, Tensor] | None = None,
) -> Tensor:
    """The training path: every unit in `gates` is gate * fresh + (1 - gate) * cached, differentiably.

    This is Eq. (6) with alpha relaxed to [0, 1] and the recursion through the cached path (x-hat^l from x-hat^{l-1};
    docs/reproduction-notes.md, reading 1). Everything is computed for all tokens and nothing is written in place. At
    gates of 0 and 1 it equals the engine with `keys="recomputed"` (tests/test_engine.py).

    Args:
        x_RND: embedded tokens.
        condition: of timestep and prompt; timesteps may differ between rows.
        gates: by `Block` or `Site`; where they tell tokens apart, a joint text's are always computed.
        cached: the stored value of every unit in `gates`, [R, N, D].
        inputs: the uncached input of every block; if given, each block starts from it instead of from the cached path,
            which is Alg. 1's literal line 13.
        checkpointed: keep every block's input alone for the gradient, and compute the block again: the same bits in
            less memory.
        used: is given what came of every branch before its gate, blended or not, [R, N, D].

    Returns:
        x-hat^L, [R, N, D].
    """
    x, text = x_RND, adapter.shape.joint_text

    def blend(unit: Unit, gate: Tensor, fresh: Tensor) -> Tensor:
        if text and gate.ndim > 1 and gate.shape[1] > 1:
            gate = F.pad(gate, (0, 0, text, 0), value=1.0)
        return torch.lerp(cached[unit].to(gate.dtype), fresh.to(gate.dtype), gate)

    def through(index: int, module: TransformerBlock, before: Tensor) -> Tensor:
        x, parts = before, adapter.modulation(module, condition)
        apart = used is not None or any(Site(index, name) in gates for name in parts)
        parallel = adapter.shape.blocks[index].parallel
        if parallel and not apart:
            x, parts = adapter.block(module, before, condition), {}
        for name, gated in parts.items():
            taken = before if parallel else x
            out, gate = adapter.part(module, name, taken, gated), gates.get(site := Site(index, name))
            if gate is not None and not isinstance(gate, Tensor):
                gate = gate(adapter.part_input(module, name, taken, gated)[:, text:])
            value = out if gate is None else blend(site, gate, out)
            if used is not None:
                used[site] = value
            x = adapter.gated_sum(x, gated, value)
        if (whole := gates.get(unit := Block(index))) is not None:
            assert isinstance(whole, Tensor), "only a part has a modulated input"
            x = before + blend(unit, whole, x - before)
        return x

    for index, module in enumerate(adapter.blocks):
        x = x if inputs is None else inputs[index]
        if checkpointed:
            x = checkpoint(through, index, module, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = through(index, module, x)
    return x
