"""A batch leaves everything as it found it: the weights, what was trained, the process; or it is refused."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.watch.checking import bits
from tcbench.watch.guard import author_of
from tcbench.watch.surroundings import kept_surroundings


@contextmanager
def undisturbed(method: Any, *watched: nn.Module | Tensor) -> Iterator[None]:
    """Sample inside; whatever a method changed under what is sampled later is noticed.

    Raises:
        UserError: `kept_weights`, or the process is not what it was; names the method.
    """
    with kept_weights(method, *watched), kept_surroundings(author_of(method)):
        yield


@contextmanager
def kept_weights(method: Any, *watched: nn.Module | Tensor) -> Iterator[None]:
    """Refuse that weights change inside. The host waits for the device once, at the end.

    Args:
        method: who is blamed.
        watched: the model, the method's scorers, and what else is there to be read.

    Raises:
        UserError: one of them is not what it was; names the method.
    """
    before = _checksum(watched)
    yield
    after = _checksum(watched)
    if after.shape != before.shape or not after.equal(before):
        what = "the weights of the model, what was trained or the samples"
        raise UserError(f"{author_of(method)}: changes {what}, which are there to be read")


def _checksum(watched: Iterable[nn.Module | Tensor]) -> Tensor:
    """A number for every tensor, int64 [T], on the device: a change of any entry shows, and of their order."""
    tensors = []
    for each in watched:
        tensors += [each] if isinstance(each, Tensor) else [*each.parameters(), *each.buffers()]
    words = [_words(tensor.detach()) for tensor in tensors]
    longest = max(map(len, words))
    places = {device: torch.arange(1, 1 + longest, device=device) for device in {value.device for value in words}}
    return torch.stack([(value * places[value.device][: len(value)]).sum().to(words[-1].device) for value in words])


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bytes as int64, the last word filled up with zeros."""
    octets = bits(tensor).flatten().view(torch.int8)
    if len(octets) % 8 or octets.storage_offset() % 8:
        octets = F.pad(octets, (0, -len(octets) % 8)).clone()
    return octets.view(torch.int64)
