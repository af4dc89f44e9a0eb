"""One batch's run prepared once and repeated without the host deciding anything: for timing, and for many batches."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tcbench.engine.fastest import fastest
from tcbench.engine.plain import PlainBlocks
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter, Prompt
from tcbench.record.executed import PlanRecord
from tcbench.samplers import Sampler, SamplerSettings, ancestral_noise, make_sampler
from tcbench.sampling import (
    MacTotals,
    Passes,
    Prompts,
    default_prompts,
    denoise,
    initial_noise,
    latents_dtype,
    start_run,
)
from tcbench.watch.checking import values_unchecked
from tcbench.watch.undisturbed import undisturbed

ExecutionPath = Literal["fused", "plain"]

Read = Callable[[Tensor], float]
"""What gives the host a number of the device."""


class Graph(Protocol):
    """Work that was captured, as `torch.cuda.CUDAGraph`."""

    def capture_end(self) -> None:
        """What is enqueued from here on is no part of it."""

    def replay(self) -> None:
        """Enqueue the work again; it reads and writes the memory that it did when it was captured."""


class Graphs(Protocol):
    """Where steps are captured."""

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Graphs are captured inside, one after another."""

    def begin(self) -> Graph:
        """Capture what is enqueued from here on."""


class CudaGraphs:
    """CUDA graphs that share their memory, because they always run in the order in which they were captured."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """On a stream of their own. What earlier runs left is freed first: graphs cannot use its memory, and it must
        not go while they are captured."""
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        try:
            with torch.cuda.stream(self._stream):
                yield
        except BaseException:
            self._leave()
            raise
        torch.cuda.synchronize()

    def _leave(self) -> None:
        """Tell torch's allocator that a capture is over that the driver broke off, as it does where the host waits for
        the device. `capture_end` fails then before it says so, and as long as a capture runs no cached memory is freed,
        which the next row's captures begin with."""
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # none runs: the capture ended as it should
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)

    def begin(self) -> Graph:
        """Capture what this thread enqueues; others may go on using the device."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph


class Inputs:
    """What tells a batch from another, in tensors that stay where they are, so that captured steps read them again.

    Everything random about a sample is drawn from its index: noise on the host, here; what a method draws inside a step
    on the device, from `index`.

    Args:
        steps: that the sampler takes.
        index: int64 [n] on the device, which methods draw from; filled with the batch's indices.
        sample_index: those of the first batch, on the CPU.
        prompts: as `sample_batch` takes them.
    """

    def __init__(
        self,
        adapter: Adapter,
        settings: SamplerSettings,
        steps: int,
        index: Tensor,
        sample_index: Tensor,
        prompts: Prompts | None,
    ) -> None:
        self._adapter, self._settings, self._prompts, self._index = adapter, settings, prompts, index
        self._taken = steps
        device, dtype = adapter.device, latents_dtype(adapter)
        self.noise = initial_noise(adapter, settings.seed, sample_index).to(device, dtype)
        self.prompt = self._shown(sample_index).to(device).clone()
        # the last step of an ancestral sampler adds no noise
        drawn = range(steps - 1) if settings.solver == "euler_ancestral" else range(0)
        self._ancestral = [self._drawn(sample_index, step).to(device, dtype) for step in drawn]

    def ancestral(self, step: int) -> Tensor:
        """What an ancestral sampler adds at a step (`samplers.ancestral_noise`)."""
        return self._ancestral[step]

    @torch.inference_mode()
    def fill(self, sample_index: Tensor) -> Prompt:
        """Become another batch of as many samples; waits for nothing that the device still has to do, unless `prompts`
        does.

        Returns:
            what they show, as `prompts` said it

        Raises:
            ValueError: they are more or fewer.
        """
        if sample_index.shape != self._index.shape:
            raise ValueError(f"{len(sample_index)} samples in the place of {len(self._index)}")
        _send(self._index, sample_index)
        _send(self.noise, initial_noise(self._adapter, self._settings.seed, sample_index))
        for step, noise in enumerate(self._ancestral):
            _send(noise, self._drawn(sample_index, step))
        shown = self._shown(sample_index)
        if isinstance(self.prompt, Tensor):
            assert isinstance(shown, Tensor)
            _send(self.prompt, shown)
        else:
            assert not isinstance(shown, Tensor)
            self.prompt.copy_(shown)
        return shown

    def _shown(self, sample_index: Tensor) -> Prompt:
        return default_prompts(self._adapter, sample_index) if self._prompts is None else self._prompts(sample_index)

    def _drawn(self, sample_index: Tensor, step: int) -> Tensor:
        return ancestral_noise(self._adapter, self._settings, sample_index, self._taken, step)


def _send(target: Tensor, source: Tensor) -> None:
    """Copy from the host in the order of the device's work; from pageable memory the host would wait for all of it."""
    target.copy_(source.pin_memory() if target.is_cuda and not source.is_cuda else source, non_blocking=True)


class Replay:
    """A run that can be repeated step by step, from the same noise and an empty cache, or filled with another batch.

    On a GPU, with fused or compiled blocks, every step is a captured CUDA graph. A method's decisions are captured with
    it: they are kernels that read the current latents. Where a method decides on the host, a step is as many graphs as
    its reads cut it into; a repetition waits for each number again, and takes the outcome that was captured, because it
    starts from the same noise. A sampler that cannot be captured (`Sampler.captures`) takes its steps between graphs.
    Nothing is captured where the host waits for how many tokens to compute (`Blocks.counts_on_device`).

    Args:
        nfe: steps of the uncached reference; the method may take fewer.
        prompts: sample indices [n] -> what they shall show; without it, class labels in turn.
        path: `plain` is the engine with the model's own layers; `fused` the fastest way to execute the same plans.
        ahead: make a run ahead, which checks, counts, and compiles what needs compiling. Without it, a batch of this
            size was sampled before.
        graphs: where to capture, if not where `path` and the device say.
        stand_in: makes, for each pass of each run, what says the numbers that a method decides by in the place of those
            it reads. The host waits for them all the same.

    Attributes:
        nfe: steps that the method takes.
        macs: the ledger's totals per sample (`Ledger.totals`) of the run ahead.
        step_macs: MACs per sample of every step, all overheads charged, of the run ahead.
        counts: int32 on the device, how many tokens the device chose in the last run, wherever it alone knows that.
    """

    def __init__(
        self,
        adapter: Adapter,
        method: Method,
        nfe: int,
        settings: SamplerSettings,
        sample_index: Tensor,
        artefacts: Artefacts | None = None,
        *,
        prompts: Prompts | None = None,
        path: ExecutionPath = "fused",
        ahead: bool = True,
        graphs: Graphs | None = None,
        stand_in: Callable[[], Read] | None = None,
    ) -> None:
        self._adapter, self._method, self._settings = adapter, method, settings
        self._blocks = fastest(adapter) if path == "fused" else PlainBlocks
        self._stand_in = stand_in
        self._sample_index = sample_index
        _, self._run = start_run(adapter, method, nfe, settings, sample_index, artefacts or Artefacts())
        self._inputs = Inputs(adapter, settings, self._run.nfe, self._run.sample_index, sample_index, prompts)
        self._steps: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
        self._next, self.nfe = 0, self._run.nfe
        self._graphs: list[list[_Segment]] = []  # by step
        self._between: _Between | None = None
        self._counted = 0  # numbers of tokens that the host waited for in the run ahead
        self._reads = 0
        self.step_macs: list[int] = []
        self.macs: dict[str, Any] = {}
        if ahead:
            with undisturbed(method, adapter.model, *self._run.artefacts.scorers.values(), self._run.sample_index):
                for step in range(self.nfe):
                    self._step(step)
                    self._counted += 0 if self._blocks.counts_on_device else len(self._passes.undecided)
                    so_far: dict[str, Any] = self._passes.macs
                    self.step_macs.append(so_far["per_sample"] - sum(self.step_macs))
                    self.macs = so_far
        if graphs is None and self._blocks is not PlainBlocks and not self._counted:
            graphs = CudaGraphs()
        if graphs is not None:
            self._capture(graphs)

    def fill(self, sample_index: Tensor) -> Prompt:
        """Become the run of other samples, as many, and say what they show. Only where the method decides nothing on
        the host are captured steps theirs."""
        self._sample_index = sample_index
        return self._inputs.fill(sample_index)

    def step(self, index: int) -> None:
        """Enqueue sampling step `index` without waiting for the device; 0 starts again.

        Raises:
            RuntimeError: a step was left out.
        """
        with values_unchecked():
            self._step(index)

    @torch.inference_mode()
    def _step(self, index: int) -> None:
        if index and index != self._next:
            raise RuntimeError(f"step {index} was asked for after step {self._next - 1}; steps follow each other")
        self._next = index + 1
        if self._graphs:
            for segment in self._graphs[index]:
                segment.replay(self._method.name, index, self._stand_in is None)
            if self._between:
                self._between.again(index)
            return
        if index == 0:
            self._begin()
        _, _, self._latents = next(self._steps)
        if self._next == self.nfe:
            self.counts = self._passes.undecided

    def run(self) -> Tensor:
        """All steps from the first: the final latents, [n, C, H, W]; the next run may write over them."""
        for step in range(self.nfe):
            self.step(step)
        return self._latents

    @property
    def latents(self) -> Tensor:
        """Those of the last run, or of its last step so far."""
        return self._latents

    @property
    def reads(self) -> int:
        """Numbers that the host waits for in a run: that the method decides by, and how many tokens to compute."""
        return self._reads + self._counted

    @property
    def captured(self) -> bool:
        """Whether steps are graphs."""
        return bool(self._graphs)

    def release(self) -> None:
        """Give back the memory of the last run, where no graph needs it: the next one begins with nothing anyway. Until
        then there is nothing to account for."""
        if not self._graphs:
            self._steps = iter(())
            del self._passes

    def account(self, counts: Sequence[int]) -> tuple[MacTotals, PlanRecord]:
        """What a run computed, per sample and by plans, if its `counts` were these."""
        return self._passes.account(counts)

    @property
    def rows_per_sample(self) -> int:
        """That the transformer computes at a step, in all passes."""
        return self._run.guidance.rows

    @property
    def cache_bytes(self) -> int:
        """Features held at the end of a run."""
        return self._passes.cache_bytes

    @property
    def policy_bytes(self) -> int:
        """What the method itself holds on the device at the end of a run: what it compares with, say."""
        return self._passes.policy_bytes

    def _read(self, value: Tensor) -> float:
        self._reads += 1
        return value.item()

    def _reading(self, read: Read) -> None:
        """How the numbers that the method decides by come to the host."""
        for engine in self._passes.engines:
            engine.read = _instead(read, self._stand_in()) if self._stand_in else read

    def _begin(self, end: Callable[[], object] | None = None) -> None:
        """Start a run; `end` ends the graph that is captured."""
        self._passes, self._reads = Passes(self._adapter, self._run, self._method.start, self._blocks), 0
        self._reading(self._read)
        draw = self._inputs.ancestral
        fresh = partial(make_sampler, self._adapter, self.nfe, self._settings, self._sample_index, draw)
        sampler: Sampler = fresh()  # because multistep samplers remember
        if end and not sampler.captures:
            sampler = self._between = _Between(sampler, fresh, self._inputs.noise, end)
        self._steps = denoise(self._passes, sampler, self._inputs.noise, self._inputs.prompt)

    @torch.inference_mode()
    @values_unchecked()
    def _capture(self, where: Graphs) -> None:
        """Capture every step."""
        graphs: list[list[_Segment]] = []
        # later reads need the values, so what is captured is run if there are any
        end = lambda: graphs[-1][-1].end(None, run=self._method.decides == "host")  # noqa: E731
        self._begin(end)

        def cut(value: Tensor) -> float:
            """End a graph where the host reads a number, run what there is, and go on in another."""
            self._reads += 1
            number = graphs[-1][-1].end(value)
            graphs[-1].append(_Segment(where.begin()))
            return number

        self._reading(cut)
        with where.capturing():
            for step in range(self.nfe):
                graphs.append([_Segment(where.begin())])
                try:
                    _, _, self._latents = next(self._steps)
                    if step == self.nfe - 1:
                        self.counts = self._passes.undecided
                except BaseException:
                    graphs[-1][-1].abandon()
                    raise
                if not self._between:
                    end()
        self._graphs = graphs


def _instead(read: Read, stand_in: Read) -> Read:
    """Wait for a number, and say another."""

    def waited(value: Tensor) -> float:
        read(value)
        return stand_in(value)

    return waited


class _Between:
    """A sampler whose steps are taken between graphs, and taken again after every repetition of the graph before.

    Args:
        sampler: of the run that is captured.
        fresh: makes the sampler of a repetition.
        like: latents.
        end: ends the graph that is captured.
    """

    captures: ClassVar[bool] = True

    def __init__(self, sampler: Sampler, fresh: Callable[[], Sampler], like: Tensor, end: Callable[[], object]) -> None:
        self._sampler, self._fresh, self._end = sampler, fresh, end
        self._x = torch.empty_like(like)  # where the graphs read latents, from the second step on
        self._given: list[tuple[Tensor, Tensor, Tensor | None]] = []

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The sampler's."""
        return self._sampler.timesteps

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sampler's, behind the graph that gives `output`."""
        self._end()
        self._given.append((output, x, variance))
        return self._x, self._take(step)

    def again(self, step: int) -> None:
        """Take a step on what the graph has written now."""
        if step == 0:
            self._sampler = self._fresh()
        self._take(step)

    def _take(self, step: int) -> Tensor:
        output, x, variance = self._given[step]
        # copies, because a sampler may remember what it is given, and graphs write over it
        following, x0 = self._sampler.step(output.clone(), step, x.clone(), variance)
        self._x.copy_(following)
        return x0


class _Segment:
    """A captured graph, and the number that the host reads at its end."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._value: Tensor | None = None
        self._number = 0.0

    def end(self, value: Tensor | None, run: bool = True) -> float:
        """End the capture; the number, if one is read."""
        self._graph.capture_end()
        if run:
            self._graph.replay()
        if value is not None:
            self._value, self._number = value, value.item()
        return self._number

    def abandon(self) -> None:
        """End a capture that failed, so that the stream is free again."""
        with suppress(RuntimeError):  # it says that the capture failed, which is known
            self._graph.capture_end()

    def replay(self, method: str, step: int, decides: bool) -> None:
        """Run the graph, and wait for its number.

        Args:
            decides: whether what follows depends on the number.

        Raises:
            RuntimeError: the number is another than when the graphs were captured, so they may have the wrong outcome.
        """
        self._graph.replay()
        if self._value is not None and self._value.item() != self._number and decides:
            raise RuntimeError(f"{method}: step {step} read another number than when it was captured")
