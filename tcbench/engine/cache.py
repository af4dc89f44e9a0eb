"""What a run remembers between steps; created empty at its start and dropped at its end.

Values are stored per unit (`tcbench.plan.Unit`), keys and values per block. A refresh of some tokens writes into the
stored tensor in place, so a P-step allocates nothing for the tokens it reuses.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tcbench.plan import HOLD, Fill, Forecast, Mix, PlanError, Spread, Unit


@dataclass
class _Entry:
    """What is stored of a unit.

    Attributes:
        step: at which it was last computed.
        factors: `factors[i]` is the i-th backward difference quotient at `step`, [0] the value.
        past: the last values that a `Mix` reads, the latest first: the value alone unless a mix keeps more.
    """

    step: int
    factors: list[Tensor]
    past: list[Tensor]


def take_tokens(x_RND: Tensor, index_RK: Tensor) -> Tensor:
    """The tokens of each row named by `index_RK`: [R, K, D]."""
    return x_RND.gather(1, index_RK.unsqueeze(-1).expand(-1, -1, x_RND.shape[-1]))


def num_bytes(held: Iterable[Tensor]) -> int:
    """Of tensors; what is there twice counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in held}.values())


class Cache:
    """Stored features of one run."""

    def __init__(self) -> None:
        self._entries: dict[Unit, _Entry] = {}
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._attention: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}
        self._value_norms: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._checked: dict[int, Tensor] = {}

    def store(self, unit: Unit, value_RND: Tensor, step: int, fill: Fill = HOLD) -> None:
        """Store a freshly computed value, and what its fill needs of the past, as far as there is one.

        That is difference quotients up to the order of a `Forecast`, or as many values as a `Mix` has weights.
        """
        _refuse_gradient(unit, value_RND)
        old, factors, past = self._entries.get(unit), [value_RND], [value_RND]
        if old and isinstance(fill, Forecast):
            for before in old.factors[: fill.order]:
                factors.append((factors[-1] - before) / (step - old.step))
        if old and isinstance(fill, Mix):
            past += old.past[: len(fill.weights) - 1]
        self._entries[unit] = _Entry(step, factors, past)

    def refresh(self, unit: Unit, index_RK: Tensor, value_RKD: Tensor) -> None:
        """Overwrite some tokens of a stored value in place; the others keep theirs, however old."""
        _refuse_gradient(unit, value_RKD)
        value = self._entry(unit).factors[0]
        value.scatter_(1, index_RK.unsqueeze(-1).expand_as(value_RKD), value_RKD)

    def refresh_rows(self, unit: Unit, rows_K: Tensor, value_KND: Tensor) -> None:
        """Overwrite some rows of a stored value in place; the others keep theirs."""
        _refuse_gradient(unit, value_KND)
        self._entry(unit).factors[0][rows_K] = value_KND

    def spread(self, unit: Unit, index_RK: Tensor, spread: Spread, first: int = 0) -> None:
        """Let the tokens in `index_RK`, which were refreshed, tell their groups (`Spread`), in place.

        Args:
            first: place of the first token of the image in the stream.
        """
        value = self._entry(unit).factors[0][:, first:]
        group_RK, fresh = spread.group_RN.gather(1, index_RK), take_tokens(value, index_RK)
        row_RK = torch.arange(len(value), device=value.device)[:, None].expand_as(group_RK)
        # not scatter_add, whose sums come in another order every time on a GPU
        sums = torch.zeros_like(value).index_put((row_RK, group_RK), fresh, accumulate=True)
        value.mul_(1 - spread.ratio).add_(take_tokens(sums, spread.group_RN), alpha=spread.ratio)

    def value(self, unit: Unit) -> Tensor:
        """The last computed value, which a refresh overwrites: [R, N, D]."""
        return self._entry(unit).factors[0]

    def read(self, unit: Unit, fill: Fill, step: int) -> Tensor:
        """The stand-in for a unit's value at `step`: [R, N, D]. A mix of used values remembers it: once a step."""
        entry = self._entry(unit)
        if isinstance(fill, Mix):
            value = _mixed(unit, fill, entry.past)
            if fill.of == "used":
                entry.past = [value, *entry.past][: len(fill.weights)]
            return value
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

    def store_value_norms(self, block: int, norm_RN: Tensor) -> None:
        """Store what `tcbench.method.Look.value_norms` shows of a block."""
        self._value_norms[block] = norm_RN

    def value_norms(self, block: int) -> Tensor:
        """What `store_value_norms` stored last: [R, N]."""
        return _seen(self._value_norms, block, "values were")

    def store_output(self, block: int, x_RND: Tensor) -> None:
        """Store the stream behind a block."""
        self._outputs[block] = x_RND

    def output(self, block: int) -> Tensor:
        """What `store_output` stored last: [R, N, D]."""
        return _seen(self._outputs, block, "output was")

    def store_checked(self, block: int, used_RND: Tensor, computed_RND: Tensor) -> None:
        """Store the stream behind a block as the step used it, and as computing the block would have made it."""
        self._checked[block] = torch.stack([used_RND, computed_RND], dim=1)

    def checked(self, block: int) -> Tensor:
        """What `store_checked` stored last: [R, 2, N, D]."""
        return _seen(self._checked, block, "check was")

    def num_bytes(self) -> int:
        """Memory held, in bytes; what is held under two names counts once."""
        held = [tensor for entry in self._entries.values() for tensor in [*entry.factors, *entry.past]]
        held += [tensor for pair in self._keys_values.values() for tensor in pair]
        for seen in (self._attention, self._entropy, self._value_norms, self._outputs, self._checked):
            held += seen.values()
        return num_bytes(held)

    def _entry(self, unit: Unit) -> _Entry:
        if unit not in self._entries:
            raise PlanError(f"{unit}: the cache is read before it was written; the plan of the first step must be full")
        return self._entries[unit]


def _mixed(unit: Unit, mix: Mix, past: list[Tensor]) -> Tensor:
    """The weighted sum; the last value itself, where it holds."""
    last = max((place for place, weight in enumerate(mix.weights) if weight), default=0)
    if last >= len(past):
        raise PlanError(f"{unit}: a fill mixes {last + 1} values, and {len(past)} were stored; keep as many before")
    if mix.holds:
        return past[0]
    value = past[0] * mix.weights[0]
    for before, weight in zip(past[1:], mix.weights[1:], strict=False):
        value = value.add(before, alpha=weight) if weight else value
    return value


def _seen(stored: dict[int, Tensor], block: int, what: str) -> Tensor:
    if block not in stored:
        raise PlanError(f"block {block}: no {what} observed yet; an earlier step must ask for it")
    return stored[block]


def _refuse_gradient(unit: Unit, value: Tensor) -> None:
    if value.requires_grad:
        raise RuntimeError(f"{unit} would be cached with a gradient attached; cached blocks are frozen")
