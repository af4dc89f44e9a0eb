"""Peers: the same weights, noise and sampler through other implementations, uncached and with their own caching."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from diffusers.hooks.pyramid_attention_broadcast import apply_pyramid_attention_broadcast
from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tcbench.config.speed import PeerName
from tcbench.errors import NotRun
from tcbench.models.adapter import Adapter
from tcbench.models.dit import DiTAdapter
from tcbench.registry import make_method
from tcbench.replay import ExecutionPath, Replay
from tcbench.samplers import ReferenceDDIM, SamplerSettings
from tcbench.sampling import initial_noise, sample_labels
from tcbench.stages.timing import Prepared

BRANCHES = (r"^.*transformer_blocks\.\d+\.(attn1|ff)$",)
"""The modules whose outputs TaylorSeer's hooks forecast; their default matches none of DiT's."""


def _dit(adapter: Adapter) -> DiTAdapter:
    if not isinstance(adapter, DiTAdapter):
        raise NotRun("needs a class-conditional DiT")
    return adapter


class DiffusersRun:
    """A run of diffusers' own forward pass.

    Args:
        adapter: the model; its weights are shared unless `cache` is given, which works on a copy.
        compile: options of `torch.compile`, or None for eager.
        cache: installs caching on a model for this run and returns what empties it.
    """

    def __init__(
        self,
        adapter: Adapter,
        nfe: int,
        settings: SamplerSettings,
        sample_index: Tensor,
        compile: dict[str, Any] | None = None,
        cache: "Install | None" = None,
    ) -> None:
        self._spec = _dit(adapter).spec
        self.nfe, self._guidance = nfe, self._spec.guidance(settings.guidance_scale)
        self._sampler = ReferenceDDIM(nfe, settings.spacing)
        device, dtype = adapter.device, adapter.dtype
        self._noise = initial_noise(adapter, settings.seed, sample_index).to(device, dtype)
        label = sample_labels(sample_index, self._spec.num_classes).to(device)
        self._rows = torch.cat([label, torch.full_like(label, self._spec.num_classes)])
        self._timesteps = [torch.full_like(self._rows, timestep) for timestep in self._sampler.timesteps]
        self._index = 0
        self.model, self._forget = adapter.model, _nothing
        if cache:
            self.model = copy.deepcopy(adapter.model)
            self._forget = cache(self.model, self)
        self._forward = torch.compile(self.model, **compile) if compile is not None else self.model

    @property
    def timestep(self) -> int:
        """The timestep of the current step."""
        return int(self._sampler.timesteps[self._index])

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Enqueue a sampling step; 0 starts again from the noise, with nothing cached."""
        if index == 0:
            self._latents = self._noise
            self._forget()
        self._index = index
        x = self._latents
        output = self._forward(torch.cat([x, x]), self._timesteps[index], class_labels=self._rows).sample
        eps = self._guidance.combine([output[:, : self._spec.in_channels]])
        self._latents, _ = self._sampler.step(eps, index, x)

    def run(self) -> Tensor:
        """All steps; the final latents."""
        for index in range(self.nfe):
            self.step(index)
        return self._latents

    def macs(self) -> int:
        """MACs per sample of one run, as torch's FLOP counter sees it; the fused attention of a CPU escapes it."""
        forward, self._forward = self._forward, self.model
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.run()
        self._forward = forward
        return counter.get_total_flops() // 2 // len(self._noise)


class MatrixProducts:
    """The linear layers and attention of every block, back to back and nothing else: a floor under a full step."""

    def __init__(self, adapter: Adapter, nfe: int, settings: SamplerSettings, sample_index: Tensor) -> None:
        _dit(adapter)
        self.nfe, shape = nfe, adapter.shape
        self._qkv = [torch.cat([b.attn1.to_q.weight, b.attn1.to_k.weight, b.attn1.to_v.weight]) for b in adapter.blocks]
        self._blocks, self._heads = adapter.blocks, adapter.spec.num_heads
        rows = 2 * len(sample_index)
        like = {"device": adapter.device, "dtype": adapter.dtype}
        self._x = torch.randn(rows, shape.num_tokens, shape.width, **like)  # type: ignore[call-overload]

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Enqueue the products of one full step."""
        x = self._x
        for block, qkv in zip(self._blocks, self._qkv, strict=True):
            F.linear(x[:, 0], block.norm1.linear.weight)
            parts = F.linear(x, qkv).unflatten(2, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
            F.linear(mixed, block.attn1.to_out[0].weight)
            F.linear(F.linear(x, block.ff.net[0].proj.weight), block.ff.net[2].weight)

    def run(self) -> Tensor:
        """All steps; their input."""
        for index in range(self.nfe):
            self.step(index)
        return self._x


Install = Callable[[torch.nn.Module, DiffusersRun], Callable[[], None]]


def _nothing() -> None:
    """There is no cache to empty."""


def _hooks_emptier(model: torch.nn.Module) -> Callable[[], None]:
    """What empties the caches of diffusers' hooks."""

    def forget() -> None:
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
        _set_cache_context(model, CacheContext("guided"))

    return forget


def _pyramid(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: run.timestep,
    )
    apply_pyramid_attention_broadcast(model, config)
    return _hooks_emptier(model)


def _taylorseer(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    config = TaylorSeerCacheConfig(
        cache_interval=3,
        max_order=1,
        taylor_factors_dtype=next(model.parameters()).dtype,
        cache_identifiers=list(BRANCHES),
    )
    apply_taylorseer_cache(model, config)
    return _hooks_emptier(model)


def _dbcache(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    try:
        import cache_dit
        from cache_dit.caching.patch_functors import DiTPatchFunctor
    except ImportError as error:
        raise NotRun(f"needs cache-dit: pip install cache-dit ({error})") from error
    # Whether steps are alike depends on trained weights, so the threshold is out of reach and the schedule fixed.
    config = cache_dit.DBCacheConfig(
        num_inference_steps=run.nfe,
        Fn_compute_blocks=1,
        max_warmup_steps=3,
        residual_diff_threshold=1e9,
        max_continuous_cached_steps=2,
    )
    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=model.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=DiTPatchFunctor(),
        check_forward_pattern=True,
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    return lambda: cache_dit.refresh_context(model, cache_config=config)


@contextmanager
def _compiler() -> Iterator[None]:
    """A failing torch.compile is a peer that was not run, with its reason."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise NotRun(f"needs a working torch.compile ({str(error).splitlines()[0]})") from error


def _prepare_compiled(mode: str | None) -> Callable[..., DiffusersRun]:
    def prepare(adapter: Adapter, nfe: int, settings: SamplerSettings, index: Tensor) -> DiffusersRun:
        run = DiffusersRun(adapter, nfe, settings, index, compile={"mode": mode, "dynamic": False})
        with _compiler():
            run.step(0)
        return run

    return prepare


def _prepare_cached(cache: Install) -> Callable[..., DiffusersRun]:
    return lambda adapter, nfe, settings, index: DiffusersRun(adapter, nfe, settings, index, cache=cache)


def _prepare_ours(path: ExecutionPath) -> Callable[..., Replay]:
    def prepare(adapter: Adapter, nfe: int, settings: SamplerSettings, index: Tensor) -> Replay:
        return Replay(adapter, make_method("uncached", {}), nfe, settings, index, path=path)

    return prepare


@dataclass(frozen=True)
class Peer:
    """How tables call a peer, and what prepares its run."""

    label: str
    prepare: Callable[[Adapter, int, SamplerSettings, Tensor], Prepared]


PEERS: dict[PeerName, Peer] = {
    "tcbench": Peer("tcbench, uncached", _prepare_ours("fused")),
    "tcbench-plain": Peer("tcbench, uncached, plain path", _prepare_ours("plain")),
    "matrix-products": Peer("floor: linear layers and attention alone", MatrixProducts),
    "diffusers-eager": Peer("diffusers, eager", DiffusersRun),
    "diffusers-compiled": Peer("diffusers, compiled", _prepare_compiled(None)),
    "diffusers-graphs": Peer("diffusers, compiled, CUDA graphs", _prepare_compiled("reduce-overhead")),
    "diffusers-pab": Peer("diffusers, pyramid attention broadcast, range 2", _prepare_cached(_pyramid)),
    "diffusers-taylorseer": Peer("diffusers, TaylorSeer, interval 3, order 1", _prepare_cached(_taylorseer)),
    "cache-dit": Peer("cache-dit, all but the first block reused at 2 of 3 steps", _prepare_cached(_dbcache)),
}


def macs_per_sample(prepared: Prepared) -> int | None:
    """What a peer's run costs: by the ledger or, where there is none, by torch's FLOP counter; None for the floor."""
    match prepared:
        case Replay():
            return prepared.macs["per_sample"]
        case DiffusersRun():
            return prepared.macs()
    return None
