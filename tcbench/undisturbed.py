"""A batch leaves everything as it found it: the weights, what was trained, the process; or it is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.checking import bits
from tcbench.errors import UserError
from tcbench.guard import author_of
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter
from tcbench.surroundings import kept_surroundings


@contextmanager
def undisturbed(adapter: Adapter, method: Method, artefacts: Artefacts, *others: Tensor) -> Iterator[None]:
    """Sample inside; whatever a method changed under what is sampled later is noticed.

    Raises:
        UserError: `kept_weights`, or the process is not what it was; names the method.
    """
    with kept_weights(adapter, method, artefacts, *others), kept_surroundings(author_of(method)):
        yield


@contextmanager
def kept_weights(adapter: Adapter, method: Method, artefacts: Artefacts, *others: Tensor) -> Iterator[None]:
    """Refuse that weights change inside. The host waits for the device once, at the end.

    Raises:
        UserError: those of the model or of a scorer, or `others`, are not what they were; names the method.
    """
    modules = [adapter.model, *artefacts.scorers.values()]
    before = _checksum(modules, *others)
    yield
    after = _checksum(modules, *others)
    if after.shape != before.shape or not after.equal(before):
        what = "the weights of the model, what was trained or the samples"
        raise UserError(f"{author_of(method)}: changes {what}, which are there to be read")


def _checksum(modules: list[nn.Module], *others: Tensor) -> Tensor:
    """A number for every tensor, int64 [T], on the device: a change of any entry shows, and of their order."""
    tensors = [*others]
    for module in modules:
        tensors += [*module.parameters(), *module.buffers()]
    words = [_words(tensor.detach()) for tensor in tensors]
    places = {value.device: torch.arange(1, 1 + max(map(len, words)), device=value.device) for value in words}
    return torch.stack([(value * places[value.device][: len(value)]).sum().to(words[-1].device) for value in words])


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bytes as int64, the last word filled up with zeros."""
    octets = bits(tensor).flatten().view(torch.int8)
    if len(octets) % 8 or octets.storage_offset() % 8:
        octets = F.pad(octets, (0, -len(octets) % 8)).clone()
    return octets.view(torch.int64)
