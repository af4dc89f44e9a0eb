"""State of a training that was killed, so that it goes on and ends with the same bits as one that was not.

Everything random is drawn from one generator, so what a stage has learnt, its optimiser, that generator and the number
of iterations are all that there is. A stage that is over is gone through again from its last state.
"""

import io
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tcbench.record.files import is_whole, sealed

EVERY = 120.0
"""Seconds of training between two states."""


class Stateful(Protocol):
    """Whatever has a state."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as `torch.save` takes it."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go back to it."""


class Weights:
    """Tensors by name, as something with a state."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        """Copies of them."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write them where they are."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(state[name])


class Clock:
    """The seconds of a stage, over all processes that went through a part of it.

    Attributes:
        earlier: of processes before this one.
    """

    def __init__(self) -> None:
        self._began, self.earlier = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """So far."""
        return self.earlier + time.perf_counter() - self._began


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write what `torch.save` takes, sealed.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    content = io.BytesIO()  # torch's own writer has other exceptions for a full disk
    torch.save(state, content)
    with sealed(path) as temporary:
        temporary.write_bytes(content.getbuffer())


class Stage:
    """The iterations of one stage of training.

    Args:
        path: its file; None keeps no state.
        key: identifies the run; a state of another one is not gone on from, nor one that is damaged.
        generator: that everything is drawn from, on the CPU.
        history: lists that the loop appends to.
        parts: what else changes from iteration to iteration.
        clock: is told what processes before this one took.
        writes: whether it keeps the state, which every process of a crew reads and one writes.
    """

    def __init__(
        self,
        path: Path | None,
        key: str,
        generator: torch.Generator,
        history: dict[str, list[float]],
        parts: Mapping[str, Stateful],
        clock: Clock,
        writes: bool = True,
    ) -> None:
        self._path, self._key, self._parts, self._clock, self._writes = path, key, parts, clock, writes
        self._generator, self._history = generator, history

    def iterations(self, total: int) -> Iterator[int]:
        """The iterations that are left, in order; between them the state is written, if it is time."""
        done, written = self._load(), time.monotonic()
        for iteration in range(done, total):
            yield iteration
            if time.monotonic() - written >= EVERY or iteration == total - 1:
                self._save(iteration + 1)
                written = time.monotonic()

    def _save(self, done: int) -> None:
        if self._path is None or not self._writes:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        said = {"key": self._key, "done": done, "history": self._history, "generator": self._generator.get_state()}
        write_state(self._path, said | {"parts": state, "wall_s": self._clock.seconds})

    def _load(self) -> int:
        """Go back to the state, if there is one that is whole; how many iterations are done."""
        if self._path is None or not is_whole(self._path):
            return 0
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        if state["key"] != self._key:
            return 0
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self._generator.set_state(state["generator"])
        for name, values in state["history"].items():
            self._history.setdefault(name, [])[:] = values
        self._clock.earlier = state["wall_s"]
        return state["done"]


class Unfinished:
    """The states of a row's training, in a folder of their own.

    Args:
        folder: where; None keeps none.
        key: identifies everything that the training depends on.
        writes: as `Stage` takes it.
    """

    def __init__(self, folder: Path | None = None, key: str = "", writes: bool = True) -> None:
        self._folder, self._key, self._writes = folder, key, writes
        self._number, self._clocks = 0, [Clock()]

    def begin(self, number: int) -> None:
        """The stage of this number comes next."""
        self._number = number
        self._clocks.append(Clock())

    @property
    def seconds(self) -> float:
        """Of the stage at hand, over all processes that went through a part of it."""
        return self._clocks[-1].seconds

    @property
    def earlier(self) -> float:
        """Seconds of training in processes before this one."""
        return sum(clock.earlier for clock in self._clocks)

    def stage(
        self, generator: torch.Generator, history: dict[str, list[float]], parts: Mapping[str, Stateful]
    ) -> Stage:
        """The iterations of the stage at hand, as `Stage`."""
        path = None if self._folder is None else self._folder / f"stage-{self._number}.pt"
        return Stage(path, f"{self._key}-{self._number}", generator, history, parts, self._clocks[-1], self._writes)

    def remove(self) -> None:
        """The training is over and its results are written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # with what a kill left half-written
