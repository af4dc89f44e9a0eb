"""Processes that train together, each on its own device with its share of every batch (accelerate).

Everything is drawn in every process from the same generator and for the whole batch, of which a process then takes its
rows. Gradients are means over the processes, so that all of them learn the same and need not be told; shares are of
equal size, so that the mean is the whole batch's, to rounding.
"""

import os
import re
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tcbench.errors import UserError

if TYPE_CHECKING:
    from tcbench.data import Dataset
    from tcbench.models.adapter import Prompt

Batch = TypeVar("Batch", bound="Prompt | Dataset")
"""What has a row for every sample."""


class Crew:
    """One process of those that train together; by itself it is the only one, and nothing below changes anything.

    Attributes:
        rank, size: which it is, and of how many.
    """

    rank, size = 0, 1

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch, [R, ...].

        Raises:
            UserError: they cannot be shared out equally.
        """
        return batch

    def joined(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order."""
        return rows

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        return value

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Put the mean over the processes in the place of every gradient that there is."""


class Member(Crew):
    """One of several, started by `train_together`.

    Args:
        cpu: whether it computes on the CPU.
    """

    def __init__(self, cpu: bool) -> None:
        from accelerate import PartialState  # slow to import

        threads = torch.get_num_threads()
        state = PartialState(cpu=cpu)
        torch.set_num_threads(threads)
        self.rank, self.size = state.process_index, state.num_processes

    def share(self, batch: Batch) -> Batch:
        """As `Crew.share`."""
        rows = len(batch)
        if rows % self.size:
            raise UserError(f"{self.size} GPUs do not share a batch of {rows} equally; give a divisor of it")
        return cast(Batch, batch[self.rank * rows // self.size : (self.rank + 1) * rows // self.size])

    def joined(self, rows: Tensor) -> Tensor:
        """As `Crew.joined`."""
        from accelerate.utils import gather

        return gather(rows.contiguous())

    def mean(self, value: Tensor) -> Tensor:
        """As `Crew.mean`."""
        from accelerate.utils import reduce

        return reduce(value.detach(), "mean")

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """As `Crew.average_gradients`."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        vector_to_parameters(self.mean(parameters_to_vector(gradients)), gradients)


ALONE = Crew()


def train_together(count: int, cpu: bool, work: Callable[[Crew], None]) -> None:
    """Do work in so many processes, forked from this one, which must not have used a GPU; if one fails, all end.

    Raises:
        UserError: what one of them raised.
    """
    from torch.multiprocessing import ProcessRaisedException, start_processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        start_processes(partial(_member, cpu=cpu, work=work), (count, port), count, start_method="fork")
    except ProcessRaisedException as error:
        _, *said = re.split(r"^tcbench\.[\w.]+: ", str(error), flags=re.MULTILINE)  # the name of one of our exceptions
        if not said:
            raise
        raise UserError(said[-1].strip()) from None


def _member(rank: int, count: int, port: int, cpu: bool, work: Callable[[Crew], Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(Member(cpu))
    torch.distributed.destroy_process_group()
