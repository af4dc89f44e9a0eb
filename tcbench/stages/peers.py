"""Peers: the same weights, noise and sampler through other implementations, uncached and with their own caching."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.faster_cache import apply_faster_cache
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from diffusers.hooks.mag_cache import apply_mag_cache
from diffusers.hooks.pyramid_attention_broadcast import apply_pyramid_attention_broadcast
from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tcbench.budget.untrained import random_captions
from tcbench.config.speed import PeerName
from tcbench.errors import NotRun
from tcbench.models.adapter import Adapter, Prompt, Text
from tcbench.models.dit import DiTAdapter
from tcbench.models.flux import FluxAdapter
from tcbench.models.pixart import PixArtAdapter
from tcbench.models.wan import WanAdapter
from tcbench.registry import make_method
from tcbench.replay import CudaGraphs, ExecutionPath, Graph, Replay
from tcbench.samplers import SamplerSettings, make_sampler
from tcbench.sampling import default_prompts, initial_noise, latents_dtype
from tcbench.stages.timing import Prepared

BRANCHES = (r"^.*blocks\.\d+\.(attn|attn1|attn2|ff|ff_context|ffn|proj_mlp|proj_out)$",)
"""The modules whose outputs TaylorSeer's hooks forecast; their default matches none of DiT's."""

INTERVAL = 3
"""Of caches that compute a step and reuse it at the next two."""

MERGED = 0.5
"""The share of tokens that ToMe merges: tomesd's default."""


def _of_diffusers(adapter: Adapter) -> None:
    """Refuse models whose classes and pipelines are not diffusers' own."""
    if not isinstance(adapter, DiTAdapter | PixArtAdapter | FluxAdapter | WanAdapter):
        raise NotRun("needs a class of diffusers: DiT, PixArt-alpha, FLUX.1 or Wan 2.1")


def _in_one_pass(adapter: Adapter) -> None:
    """Refuse models of which this project runs the halves of a guided pair in turn."""
    if isinstance(adapter, WanAdapter):
        raise NotRun("needs both halves of the guided pair in one pass: its hook keeps one state for all")


def _rows(adapter: Adapter, settings: SamplerSettings, sample_index: Tensor) -> list[Prompt]:
    """By pass what its rows show: classes in turn, or captions of random states as the rows of tables do."""
    prompts = random_captions(adapter.spec, settings.seed) or partial(default_prompts, adapter)
    guidance, prompt = adapter.spec.guidance(settings.guidance_scale), prompts(sample_index).to(adapter.device)
    passes = guidance.prompts(adapter, prompt)
    return [rows.to(adapter.device, adapter.dtype) if isinstance(rows, Text) else rows for rows in passes]


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    """Modules to change, with the weights of these."""
    weights: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


class DiffusersRun:
    """A run of diffusers' own forward pass.

    Args:
        adapter: the model, which calls it and whose weights are shared.
        compile: options of `torch.compile`, or None for eager.
        by_block: compile blocks, which are alike, instead of the model: a large one in seconds instead of minutes.
        cache: installs caching on a copy for this run and returns what empties it.
    """

    def __init__(
        self,
        adapter: Adapter,
        nfe: int,
        settings: SamplerSettings,
        sample_index: Tensor,
        compile: dict[str, Any] | None = None,
        by_block: bool = False,
        cache: "Install | None" = None,
    ) -> None:
        _of_diffusers(adapter)
        self.nfe, self._guidance = nfe, adapter.spec.guidance(settings.guidance_scale)
        self._fresh = partial(make_sampler, adapter, nfe, settings, sample_index)  # multistep samplers remember
        self._sampler = self._fresh()
        device, self._dtype, self.grid, self.seed = adapter.device, adapter.dtype, adapter.shape.grid, settings.seed
        self._noise = initial_noise(adapter, settings.seed, sample_index).to(device, latents_dtype(adapter))
        self._prompt = _rows(adapter, settings, sample_index)
        rows = len(self._prompt[0])
        self._timesteps = [torch.full((rows,), t, device=device) for t in self._sampler.timesteps]
        self._index = 0
        self.model, self._forget = adapter.model, _nothing
        self._enter: Callable[[int], None] = lambda number: None
        if cache:
            self.model = _copied(adapter.model)
            self._forget = cache(self.model, self)
            self._enter = lambda number: _set_cache_context(self.model, CacheContext(f"pass {number}"))
        self._adapter = copy.copy(adapter)
        self._adapter.model = self.model
        if compile is not None and by_block:
            self._adapter.model = _copied(adapter.model)
            for block in self._adapter.blocks_of(self._adapter.model):
                block.compile(**compile)
        elif compile is not None:
            self._adapter.model = torch.compile(self.model, **compile)

    @property
    def timestep(self) -> int:
        """The timestep of the current step."""
        return int(self._sampler.timesteps[self._index])

    @property
    def index(self) -> int:
        """The current step."""
        return self._index

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Enqueue a sampling step; 0 starts again from the noise, with nothing cached."""
        if index == 0:
            self._latents, self._sampler = self._noise, self._fresh()
            self._forget()
        self._index = index
        x, channels = self._latents, self._adapter.spec.in_channels
        latents = self._guidance.latents(x).to(self._dtype)
        outputs = [output.to(x.dtype) for output in self._forward(latents, self._timesteps[index])]
        prediction = self._guidance.combine([output[:, :channels] for output in outputs])
        self._latents, _ = self._sampler.step(prediction, index, x, outputs[0][: len(x), channels:])

    def _forward(self, latents: Tensor, timestep_R: Tensor) -> list[Tensor]:
        """The network's outputs, by pass."""
        outputs = []
        for number, rows in enumerate(self._prompt):
            self._enter(number)
            outputs.append(self._adapter.plain(latents, timestep_R, rows))
        return outputs

    def run(self) -> Tensor:
        """All steps; the final latents."""
        for index in range(self.nfe):
            self.step(index)
        return self._latents

    def macs(self) -> int:
        """MACs per sample of one run, as torch's FLOP counter sees it; the fused attention of a CPU escapes it."""
        called, self._adapter.model = self._adapter.model, self.model
        on_cpu = self._noise.device.type == "cpu"
        seen = sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()
        with FlopCounterMode(display=False) as counter, seen:
            self.run()
        self._adapter.model = called
        return counter.get_total_flops() // 2 // len(self._noise)


class MatrixProducts:
    """The linear layers and attention of every block, back to back and nothing else: a floor under a full step."""

    def __init__(self, adapter: Adapter, nfe: int, settings: SamplerSettings, sample_index: Tensor) -> None:
        _of_diffusers(adapter)
        self.nfe, self._adapter = nfe, adapter
        _layers_known(adapter)
        (prompt,) = _rows(adapter, settings, sample_index)
        self._context = adapter.prepare(prompt)
        like = {"device": adapter.device, "dtype": adapter.dtype}
        size = len(prompt), adapter.shape.num_tokens, adapter.shape.width
        self._x = torch.randn(*size, **like)  # type: ignore[call-overload]

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Enqueue the products of one full step."""
        x, heads = self._x, self._adapter.spec.num_heads
        for block in self._adapter.blocks:
            layers = self._adapter.linear_layers(block)
            if isinstance(self._adapter, DiTAdapter):  # others modulate all blocks by one layer
                F.linear(x[:, 0], block.norm1.linear.weight)
            for part, (weight, _) in layers.first.items():
                h = F.linear(x, weight)
                if (kind := self._adapter.kind(part)) != "pointwise":
                    queries, *own = h.unflatten(2, (-1, heads, x.shape[2] // heads)).permute(2, 0, 3, 1, 4)
                    keys, values = own if kind == "mix" else self._context.keys_values[block]
                    h = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
                F.linear(h, layers.last[part][0])

    def run(self) -> Tensor:
        """All steps; their input."""
        for index in range(self.nfe):
            self.step(index)
        return self._x


class CapturedRun(DiffusersRun):
    """The same with blocks compiled and the whole forward pass captured as one CUDA graph."""

    def __init__(self, adapter: Adapter, nfe: int, settings: SamplerSettings, sample_index: Tensor) -> None:
        super().__init__(adapter, nfe, settings, sample_index, compile={"dynamic": False}, by_block=True)
        self._graph: Graph | None = None
        with _compiler():
            self.step(0)
        if adapter.device.type == "cuda":
            self._capture(CudaGraphs())

    @torch.inference_mode()
    def _capture(self, graphs: CudaGraphs) -> None:
        self._input = self._guidance.latents(self._noise).to(self._dtype).clone()
        self._timestep = self._timesteps[0].clone()
        with graphs.capturing():
            graph = graphs.begin()
            try:
                self._output = super()._forward(self._input, self._timestep)
            finally:
                graph.capture_end()
        self._graph = graph

    def macs(self) -> int:
        """As of any other run: what is replayed calls nothing that could be counted."""
        graph, self._graph = self._graph, None
        macs = super().macs()
        self._graph = graph
        return macs

    def _forward(self, latents: Tensor, timestep_R: Tensor) -> list[Tensor]:
        if self._graph is None:
            return super()._forward(latents, timestep_R)
        self._input.copy_(latents)
        self._timestep.copy_(timestep_R)
        self._graph.replay()
        return self._output


Install = Callable[[torch.nn.Module, DiffusersRun], Callable[[], None]]


def _nothing() -> None:
    """There is no cache to empty."""


def _hooks_emptier(model: torch.nn.Module) -> Callable[[], None]:
    """What empties the caches of diffusers' hooks."""

    def forget() -> None:
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()

    return forget


def _pyramid(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),  # FLUX.1's single ones too
        cross_attention_block_skip_range=2,
        cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: run.timestep,
    )
    apply_pyramid_attention_broadcast(model, config)
    return _hooks_emptier(model)


def _taylorseer(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    config = TaylorSeerCacheConfig(
        cache_interval=INTERVAL,
        max_order=1,
        taylor_factors_dtype=next(model.parameters()).dtype,
        cache_identifiers=list(BRANCHES),
    )
    apply_taylorseer_cache(model, config)
    return _hooks_emptier(model)


def _first_block(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    apply_first_block_cache(model, FirstBlockCacheConfig())
    (hook,) = [
        found
        for module in model.modules()
        if (registry := getattr(module, "_diffusers_hook", None))
        and (found := registry.get_hook(_FBC_LEADER_BLOCK_HOOK))
    ]
    looks = hook._should_compute_remaining_blocks

    def decides(residual: Tensor) -> bool:
        looks(residual)  # the host waits for the number as ever; what it says means nothing on random weights
        return run.index % INTERVAL == 0

    hook._should_compute_remaining_blocks = decides
    return _hooks_emptier(model)


def _magcache(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    config = MagCacheConfig(
        threshold=1.0,
        max_skip_steps=INTERVAL - 1,
        retention_ratio=0.0,
        num_inference_steps=run.nfe,
        mag_ratios=[1.0] * run.nfe,
    )
    apply_mag_cache(model, config)
    return _hooks_emptier(model)


def _fastercache(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 999),  # the first step, at 1000, has nothing to reuse
        is_guidance_distilled=True,
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: run.timestep,
    )
    apply_faster_cache(model, config)
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
        max_continuous_cached_steps=INTERVAL - 1,
    )
    pattern = cache_dit.ForwardPattern
    match model:
        case FluxTransformer2DModel():
            blocks: Any = [model.transformer_blocks, model.single_transformer_blocks]
            patterns: Any = [pattern.Pattern_1, pattern.Pattern_1]
        case WanTransformer3DModel():
            blocks, patterns = model.blocks, pattern.Pattern_2
        case _:
            blocks, patterns = model.transformer_blocks, pattern.Pattern_3
    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=blocks,
        forward_pattern=patterns,
        patch_functor=DiTPatchFunctor() if isinstance(model, DiTTransformer2DModel) else None,
        check_forward_pattern=True,
        has_separate_cfg=isinstance(model, WanTransformer3DModel),
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    return lambda: cache_dit.refresh_context(model, cache_config=config)


def _tomesd(model: torch.nn.Module, run: DiffusersRun) -> Callable[[], None]:
    """tomesd's own matching around every self-attention. Its `apply_patch` knows no block with adaLN."""
    try:
        from tomesd.merge import bipartite_soft_matching_random2d as matching
    except ImportError as error:
        raise NotRun(f"needs tomesd: pip install tomesd ({error})") from error
    generator = torch.Generator(next(model.parameters()).device)

    def around(block: Any) -> None:
        attend, pair = block.attn1.forward, list[Callable[[Tensor], Tensor]]()

        def match(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            height, width = run.grid
            pair[:] = matching(x, width, height, 2, 2, int(x.shape[1] * MERGED), generator=generator)

        def merged(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            merge, unmerge = pair
            return unmerge(attend(merge(hidden_states), *args, **kwargs))

        block.register_forward_pre_hook(match, with_kwargs=True)
        block.attn1.forward = merged

    for block in model.transformer_blocks:  # type: ignore[union-attr]
        around(block)

    def forget() -> None:
        generator.manual_seed(run.seed)

    return forget


@contextmanager
def _compiler() -> Iterator[None]:
    """A failing torch.compile is a peer that was not run, with its reason."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise NotRun(f"needs a working torch.compile ({str(error).splitlines()[0]})") from error


def _prepare_compiled(mode: str | None) -> Callable[..., DiffusersRun]:
    def prepare(adapter: Adapter, nfe: int, settings: SamplerSettings, index: Tensor) -> DiffusersRun:
        large = isinstance(adapter, FluxAdapter | WanAdapter)
        if large and mode:
            return CapturedRun(adapter, nfe, settings, index)
        run = DiffusersRun(adapter, nfe, settings, index, compile={"mode": mode, "dynamic": False}, by_block=large)
        with _compiler():
            run.step(0)
        return run

    return prepare


def _prepare_cached(cache: Install, *refusals: Callable[[Adapter], None]) -> Callable[..., DiffusersRun]:
    def prepare(adapter: Adapter, nfe: int, settings: SamplerSettings, index: Tensor) -> DiffusersRun:
        for refuse in refusals:
            refuse(adapter)
        return DiffusersRun(adapter, nfe, settings, index, cache=cache)

    return prepare


def _flow(adapter: Adapter) -> None:
    """Refuse models whose blocks diffusers' hooks of whole steps do not know."""
    if not isinstance(adapter, FluxAdapter | WanAdapter):
        raise NotRun("needs FLUX.1 or Wan 2.1")


def _layers_known(adapter: Adapter) -> None:
    """Refuse models whose layers tomesd's functions cannot go around."""
    if isinstance(adapter, FluxAdapter | WanAdapter):
        raise NotRun("needs DiT's or PixArt-alpha's layers")


def _prepare_ours(path: ExecutionPath, method: str = "uncached", **options: Any) -> Callable[..., Replay]:
    def prepare(adapter: Adapter, nfe: int, settings: SamplerSettings, index: Tensor) -> Replay:
        prompts = random_captions(adapter.spec, settings.seed)
        return Replay(adapter, make_method(method, options), nfe, settings, index, prompts=prompts, path=path)

    return prepare


@dataclass(frozen=True)
class Peer:
    """How tables call a peer, and what prepares its run."""

    label: str
    prepare: Callable[[Adapter, int, SamplerSettings, Tensor], Prepared]


PEERS: dict[PeerName, Peer] = {
    "tcbench": Peer("tcbench, uncached", _prepare_ours("fused")),
    "tcbench-plain": Peer("tcbench, uncached, plain path", _prepare_ours("plain")),
    "tcbench-tome": Peer(f"tcbench, ToMe merging, ratio {MERGED}", _prepare_ours("fused", "tome_merge", ratio=MERGED)),
    "matrix-products": Peer("floor: linear layers and attention alone", MatrixProducts),
    "diffusers-eager": Peer("diffusers, eager", DiffusersRun),
    "diffusers-compiled": Peer("diffusers, compiled", _prepare_compiled(None)),
    "diffusers-graphs": Peer("diffusers, compiled, CUDA graphs", _prepare_compiled("reduce-overhead")),
    "diffusers-pab": Peer("diffusers, pyramid attention broadcast, range 2", _prepare_cached(_pyramid, _in_one_pass)),
    "diffusers-fastercache": Peer(
        "diffusers, FasterCache, attention at every second step", _prepare_cached(_fastercache, _flow, _in_one_pass)
    ),
    "diffusers-taylorseer": Peer("diffusers, TaylorSeer, interval 3, order 1", _prepare_cached(_taylorseer)),
    "diffusers-firstblock": Peer(
        "diffusers, first-block cache, reused at 2 of 3 steps", _prepare_cached(_first_block, _flow)
    ),
    "diffusers-magcache": Peer("diffusers, MagCache, reused at 2 of 3 steps", _prepare_cached(_magcache, _flow)),
    "diffusers-tomesd": Peer(f"diffusers, ToMe by tomesd, ratio {MERGED}", _prepare_cached(_tomesd, _layers_known)),
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
