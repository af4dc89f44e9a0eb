"""A batch leaves everything as it found it: the weights, what was trained, the process; or it is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.checking import bits
from tcbench.errors import UserError
from tcbench.guard import author_of
from tcbench.method import Method, Run
from tcbench.models.adapter import Adapter
from tcbench.surroundings import kept_surroundings


@contextmanager
def undisturbed(adapter: Adapter, method: Method, run: Run) -> Iterator[None]:
    """Sample a batch inside; whatever its method changed under the batches and rows after it is noticed.

    The host waits for the device once, at the end.

    Raises:
        UserError: weights of the model or of a scorer, indices of samples or the process are not what they were.
    """
    modules = [adapter.model, *run.artefacts.scorers.values()]
    before = _checksum(modules, run.sample_index)
    with kept_surroundings(author_of(method)):
        yield
    after = _checksum(modules, run.sample_index)
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
