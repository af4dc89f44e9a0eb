"""What a run remembers between steps; created empty at its start and dropped at its end.

Values are stored per unit (`tcbench.plan.Unit`), keys and values per block. A refresh of some tokens writes into the
stored tensor in place, so a P-step allocates nothing for the tokens it reuses.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from tcbench.plan import Fill, PlanError, Unit


@dataclass
class _Entry:
    """Taylor factors of a unit: `factors[i]` is the i-th backward difference quotient at `step`; [0] is the value."""

    step: int
    factors: list[Tensor]


def take_tokens(x_RND: Tensor, index_RK: Tensor) -> Tensor:
    """The tokens of each row named by `index_RK`: [R, K, D]."""
    return x_RND.gather(1, index_RK.unsqueeze(-1).expand(-1, -1, x_RND.shape[-1]))


class Cache:
    """Stored features of one run."""

    def __init__(self) -> None:
        self._entries: dict[Unit, _Entry] = {}
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._attention: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}

    def store(self, unit: Unit, value_RND: Tensor, step: int, order: int = 0) -> None:
        """Store a freshly computed value; with `order` > 0 also its difference quotients, as far as the past allows."""
        _refuse_gradient(unit, value_RND)
        old, factors = self._entries.get(unit), [value_RND]
        if old:
            for past in old.factors[:order]:
                factors.append((factors[-1] - past) / (step - old.step))
        self._entries[unit] = _Entry(step, factors)

    def refresh(self, unit: Unit, index_RK: Tensor, value_RKD: Tensor) -> None:
        """Overwrite some tokens of a stored value in place; the others keep theirs, however old."""
        _refuse_gradient(unit, value_RKD)
        value = self._entry(unit).factors[0]
        value.scatter_(1, index_RK.unsqueeze(-1).expand_as(value_RKD), value_RKD)

    def read(self, unit: Unit, fill: Fill, step: int) -> Tensor:
        """The stand-in for a unit's value at `step`: [R, N, D]."""
        entry = self._entry(unit)
        value = entry.factors[0]
        for order, factor in enumerate(entry.factors[1 : fill.order + 1], start=1):
            value = value + factor * ((step - entry.step) ** order / math.factorial(order))
        return value

    def store_keys_values(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Store a block's keys and values, each [R, heads, N, head_dim]."""
        self._keys_values[block] = keys, values

    def refresh_keys_values(self, block: int, index_RK: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite some tokens' keys and values in place; returns those of all tokens."""
        if block not in self._keys_values:
            raise PlanError(f"block {block}: cached keys are read before any were stored; the first step must be full")
        index = index_RK[:, None, :, None].expand_as(keys)
        stored_keys, stored_values = self._keys_values[block]
        return stored_keys.scatter_(2, index, keys), stored_values.scatter_(2, index, values)

    def store_attention(self, block: int, received_RN: Tensor) -> None:
        """Store the attention that a block's tokens received."""
        self._attention[block] = received_RN

    def attention_received(self, block: int) -> Tensor:
        """What `store_attention` stored last: [R, N]."""
        if block not in self._attention:
            raise PlanError(f"block {block}: no attention was observed yet; an earlier full step must ask for it")
        return self._attention[block]

    def store_entropy(self, block: int, entropy_RK: Tensor, index_RK: Tensor | None) -> None:
        """Store the entropy of the text attention of a block's tokens, or refresh that of some in place."""
        if index_RK is None:
            self._entropy[block] = entropy_RK
        else:
            self.attention_entropy(block).scatter_(1, index_RK, entropy_RK)

    def attention_entropy(self, block: int) -> Tensor:
        """What `store_entropy` stored last for every token: [R, N]."""
        if block not in self._entropy:
            raise PlanError(f"block {block}: no text attention was observed yet; an earlier full step must ask for it")
        return self._entropy[block]

    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        entries = [factor for entry in self._entries.values() for factor in entry.factors]
        pairs = [tensor for pair in self._keys_values.values() for tensor in pair]
        scores = [*self._attention.values(), *self._entropy.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*entries, *pairs, *scores])

    def _entry(self, unit: Unit) -> _Entry:
        if unit not in self._entries:
            raise PlanError(f"{unit}: the cache is read before it was written; the plan of the first step must be full")
        return self._entries[unit]


def _refuse_gradient(unit: Unit, value: Tensor) -> None:
    if value.requires_grad:
        raise RuntimeError(f"{unit} would be cached with a gradient attached; cached blocks are frozen")
