"""Whether the tokens that a method chooses can be recomputed. Imports no torch.

Shapes and types are always checked, which costs nothing. Values have to be read, and on a GPU the host then waits: they
are checked (`checks_values`) unless whoever runs many batches says that an earlier one was (`values_unchecked`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tcbench.plan import Merged, Plan, PlanError, Rows, Tokens
from tcbench.tensors.unseen import is_unseen

if TYPE_CHECKING:
    from torch import Tensor

_CHECKS_VALUES = ContextVar("checks_values", default=True)


def checks_values() -> bool:
    """Whether values are checked here, at the price of a wait for the device."""
    return _CHECKS_VALUES.get()


@contextmanager
def values_unchecked(so: bool = True) -> Iterator[None]:
    """Check no values inside, if so: for batches after the first on a GPU, and where a run is captured or timed."""
    token = _CHECKS_VALUES.set(checks_values() and not so)
    try:
        yield
    finally:
        _CHECKS_VALUES.reset(token)


def readable(value: "Tensor") -> bool:
    """Whether a tensor's values are to be checked, and are there to be read."""
    return checks_values() and not is_unseen(value) and not value.is_meta


def bits(tensor: "Tensor") -> "Tensor":
    """The same memory read as integers, which are equal where numbers are not (NaN)."""
    import torch

    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()])


def check_tokens(plan: Plan, rows: int, num_tokens: int, device: object = None) -> None:
    """Whether a model can recompute the tokens that a plan names; one read for all of them where values are checked.

    Args:
        rows: of the transformer's batch, R.
        num_tokens: of a row, N.
        device: where the model is; None: nowhere, a method is costed.

    Raises:
        PlanError: an index, a mask of rows or groups have another shape than the batch; an index is on another device,
            names a token that does not exist or, unless it is spread, one twice in a row; `used` is not between 0 and
            the number of columns; a group to be merged lacks the token in whose place it is computed.
    """
    for unit, decision in plan.decisions.items():
        if isinstance(decision.who, Rows) and len(decision.who.mask) != rows:
            raise PlanError(f"{unit}: {len(decision.who.mask)} rows are decided; the batch has {rows}")
        grouped = decision.who if isinstance(decision.who, Merged) else decision.spread
        if grouped and tuple(grouped.group_RN.shape) != (rows, num_tokens):
            groups = list(grouped.group_RN.shape)
            raise PlanError(f"{unit}: the groups of tokens are {groups}; the tokens are {[rows, num_tokens]}")
    chosen = {
        unit: decision.who for unit, decision in plan.decisions.items() if isinstance(decision.who, Tokens | Merged)
    }
    for unit, tokens in chosen.items():
        index_RK = tokens.index_RK
        if index_RK.shape[0] != rows:
            raise PlanError(f"{unit}: the index of tokens has {index_RK.shape[0]} rows; the batch has {rows}")
        if index_RK.shape[1] > num_tokens:
            raise PlanError(f"{unit}: {index_RK.shape[1]} tokens are chosen; a row has {num_tokens}")
        if device is None or is_unseen(index_RK) or index_RK.is_meta:
            continue
        for tensor in (index_RK, tokens.group_RN if isinstance(tokens, Merged) else tokens.used):
            if tensor is not None and tensor.device != device:
                raise PlanError(f"{unit}: tokens are chosen on {tensor.device}; the model is on {device}")
    read = {unit: tokens for unit, tokens in chosen.items() if tokens.index_RK.shape[1] and readable(tokens.index_RK)}
    spread = {unit for unit in read if plan.decisions[unit].spread}
    if not read:
        return
    import torch

    faults = torch.stack([_faults(tokens, num_tokens) for tokens in read.values()])
    for (unit, tokens), found in zip(read.items(), faults.tolist(), strict=True):
        count = tokens.index_RK.shape[1]
        says = [
            f"`used` is not between 0 and the {count} columns of the index",
            f"a token is chosen that does not exist; they are 0 to {num_tokens - 1}",
            "a token is chosen twice in a row",
            f"a group is not of the token in whose place it is computed; they are 0 to {count - 1}",
        ]
        for fault, text in zip(found, says, strict=True):
            if fault and not (unit in spread and text == says[2]):
                raise PlanError(f"{unit}: {text}")


def _faults(tokens: Tokens | Merged, num_tokens: int) -> "Tensor":
    """bool [4]: `used` out of range, a token out of range, a token twice, a group of other tokens; on the device."""
    import torch

    index_RK, count = tokens.index_RK, tokens.index_RK.shape[1]
    used = torch.full((1,), count, device=index_RK.device)
    stray = torch.zeros((), dtype=torch.bool, device=index_RK.device)
    if isinstance(tokens, Merged):
        group_RN = tokens.group_RN
        own_RK = group_RN.gather(1, index_RK.clamp(0, num_tokens - 1))
        stray = (own_RK != torch.arange(count, device=index_RK.device)).any() | (group_RN.amin() < 0)
        stray = stray | (group_RN.amax() >= count)
    elif tokens.used is not None:
        used = tokens.used
    columns_K = torch.arange(count, device=index_RK.device)
    counted_K = columns_K < used
    outside = (((index_RK < 0) | (index_RK >= num_tokens)) & counted_K).any()
    # columns that do not count are no token, each another one
    distinct_RK = torch.where(counted_K, index_RK, num_tokens + columns_K).sort(dim=1).values
    twice = (distinct_RK.diff(dim=1) == 0).any()
    return torch.stack([((used < 0) | (used > count)).any(), outside, twice, stray])
