"""Many batches of one row: on a GPU the first as it is, those after it by captured steps (`tcbench.replay`)."""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.data import Decode, refuse_nan
from tcbench.engine.fastest import fastest
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter
from tcbench.record.executed import PlanRecord
from tcbench.replay import Graphs, Replay
from tcbench.samplers import SamplerSettings
from tcbench.sampling import MacTotals, Prompts, Samples, finite, refuse_broken, sample_batch
from tcbench.watch.checking import values_unchecked
from tcbench.watch.undisturbed import undisturbed

Finish = Callable[[], Samples]
"""Waits for a batch that the device works on, on any thread, and says what is wrong with it (UserError)."""

GRAPHS = "TCBENCH_GRAPHS"
"""The environment variable that switches captured steps off (`off`), where a driver or a card does not bear them."""


@dataclass(frozen=True)
class Row:
    """What all batches of a row share; `nfe` is the uncached reference's."""

    name: str
    adapter: Adapter
    method: Method
    nfe: int
    settings: SamplerSettings
    artefacts: Artefacts
    prompts: Prompts | None


class Batches:
    """Samples a row batch by batch; a batch is called for by its indices and finished later.

    On a CPU, batches are sampled one by one and every value is checked. On a GPU this holds for the first of them. The
    others run no code of the method: their steps are those of a batch that was checked, captured and filled with other
    noise. Where that cannot be, they are sampled one by one with values unchecked, and a line on stderr says why:
    where `TCBENCH_GRAPHS` is off, the method decides on the host, the model's own layers run as they are, a capture
    fails, or captured steps, filled with the first batch, do not give its samples to the bit. Rounding is no excuse:
    which batch is a process's first depends on where an interrupted run stopped, and a sample must not. Batches of
    another size (the last), and those whose trajectory is kept, are sampled so too.

    Args:
        decode: makes images of samples.
        graphs: where to capture, for tests; without it, on a GPU.
    """

    def __init__(self, row: Row, decode: Decode, graphs: Graphs | None = None) -> None:
        self.row, self._decode, self._graphs = row, decode, graphs
        self._on_gpu = row.adapter.device.type != "cpu"
        if self._on_gpu:
            gc.collect()  # what another row captured goes: it refers to itself
        self._first: tuple[Tensor, Tensor] | None = None  # indices of the first batch, and its samples
        self._replay: Replay | None = None
        self._same: tuple[MacTotals, PlanRecord] | None = None  # what every captured batch computed, if it is the same
        self._one_by_one = not (self._on_gpu or graphs)  # no batch is captured
        if not self._one_by_one and (reason := self._reason()):
            self._give_up(reason)

    def __call__(self, index: Tensor, traced: int = 0) -> Finish:
        """Sample a batch.

        Args:
            index: the samples' indices, int64 [n].
            traced: keep the trajectory of the first `traced`.
        """
        if self._first is None or self._one_by_one or traced or index.shape != self._first[0].shape:
            return self._eagerly(index, traced)
        if self._replay is None:
            self._replay = self._captured(index)
            if self._replay is None:
                gc.collect()  # the room of what was captured is needed
                return self._eagerly(index, traced)
        return self._replayed(self._replay, index)

    # --- one by one

    def _eagerly(self, index: Tensor, traced: int) -> Finish:
        row, unchecked = self.row, self._on_gpu and self._first is not None
        # a batch that is not looked at inside is looked at from outside
        watched = (row.adapter.model, *row.artefacts.scorers.values())
        around = undisturbed(row.method, *watched) if unchecked else nullcontext()
        with values_unchecked(unchecked), around:
            samples = sample_batch(
                row.adapter, row.method, row.nfe, row.settings, index, row.artefacts, traced, row.prompts
            )
        if self._first is None:
            self._first = index, samples.image
        image, broken = self._decode(samples.image)
        refuse_nan(broken.cpu())
        finished = replace(samples, image=image.cpu())
        return lambda: finished

    # --- by captured steps

    def _reason(self) -> str | None:
        """Why no batch can be captured, if so."""
        if said := os.environ.get(GRAPHS):
            if said != "off":
                raise UserError(f"{GRAPHS}={said}: is not known; set it to off, or unset it")
            return f"{GRAPHS} is off"
        if self.row.method.decides == "host":
            return f"{self.row.method.name} decides on the host"
        if self._graphs is None and fastest(self.row.adapter).execution == "plain":
            return f"{self.row.adapter.spec.name} has no fused or compiled layers here"
        return None

    def _give_up(self, reason: str) -> None:
        self._one_by_one = True
        tqdm.write(f"{self.row.name}: batches are sampled one by one: {reason}", file=sys.stderr)

    def _captured(self, index: Tensor) -> Replay | None:
        """The steps captured with this batch's inputs, if they then give the first batch's samples, bit for bit.

        If they do not, something of the batch that was captured is left in them, or a library takes other kernels
        inside a capture.
        """
        assert self._first is not None
        first, expected = self._first
        try:
            replay = self._capture(index)
            replay.fill(first)
            moved = _difference(replay.run().float().cpu(), expected)
        except (RuntimeError, UserError) as error:  # a full GPU too: what is captured needs memory of its own
            said = str(error) or type(error).__name__
            self._give_up(f"its steps cannot be captured ({said.splitlines()[0]})")
            return None
        if moved:
            self._give_up(f"captured steps give other samples (by {moved:.2g} of their size)")
            return None
        return replay

    def _capture(self, index: Tensor) -> Replay:
        row = self.row
        run = row.adapter, row.method, row.nfe, row.settings, index, row.artefacts
        return Replay(*run, prompts=row.prompts, ahead=False, graphs=self._graphs)

    @torch.inference_mode()
    def _replayed(self, replay: Replay, index: Tensor) -> Finish:
        row = self.row
        shown = replay.fill(index)
        x = replay.run().float()
        image, broken = self._decode(x)
        sent = [_to_host(tensor) for tensor in (image, broken, finite(x), replay.counts)]
        done = torch.cuda.Event(blocking=True) if x.is_cuda else None
        if done:
            done.record()
        label = shown.cpu() if isinstance(shown, Tensor) else index
        nothing = torch.empty(replay.nfe, 0, *x.shape[1:])

        def finish() -> Samples:
            if done:
                done.synchronize()
            image, broken, whole, counts = sent
            refuse_broken(row.method, index, whole)
            refuse_nan(broken)
            macs, plans = self._account(replay, counts)
            return Samples(image, label, nothing, nothing, macs, plans, replay.cache_bytes)

        return finish

    def _account(self, replay: Replay, counts: Tensor) -> tuple[MacTotals, PlanRecord]:
        """What a batch computed; the same for all batches where no number of tokens is decided on the device."""
        if len(counts):
            return replay.account(counts.tolist())
        if self._same is None:
            self._same = replay.account([])
        return self._same


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, in pinned memory if it comes from a GPU, and then there when the device has got so far."""
    return tensor.to("cpu", non_blocking=True, copy=True)


def _difference(x: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference as a share of what was expected: 0 if no number differs, NaN if one is NaN."""
    if torch.equal(x, expected):
        return 0.0
    return ((x - expected).square().mean() / expected.square().mean()).sqrt().item()
