"""Peers: the same weights, noise and sampler through other implementations, uncached and with their own caching."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from diffusers.hooks.pyramid_attention_broadcast import apply_pyramid_attention_broadcast
from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tcbench.budget.untrained import random_captions
from tcbench.config.speed import PeerName
from tcbench.errors import NotRun
from tcbench.models.adapter import Adapter, Prompt, Text
from tcbench.models.dit import DiTAdapter
from tcbench.models.pixart import PixArtAdapter
from tcbench.registry import make_method
from tcbench.replay import ExecutionPath, Replay
from tcbench.samplers import SamplerSettings, make_sampler
from tcbench.sampling import default_prompts, initial_noise, latents_dtype
from tcbench.stages.timing import Prepared

BRANCHES = (r"^.*transformer_blocks\.\d+\.(attn1|attn2|ff)$",)
"""The modules whose outputs TaylorSeer's hooks forecast; their default matches none of DiT's."""

MERGED = 0.5
"""The share of tokens that ToMe merges: tomesd's default."""


def _of_diffusers(adapter: Adapter) -> None:
    """Refuse models whose classes and pipelines are not diffusers' own."""
    if not isinstance(adapter, DiTAdapter | PixArtAdapter):
        raise NotRun("needs a class-conditional DiT or PixArt-alpha")


def _rows(adapter: Adapter, settings: SamplerSettings, sample_index: Tensor) -> Prompt:
    """What the rows of a guided batch show: classes in turn, or captions of random states as the rows of tables do."""
    prompts = random_captions(adapter.spec, settings.seed) or partial(default_prompts, adapter)
    guidance, prompt = adapter.spec.guidance(settings.guidance_scale), prompts(sample_index).to(adapter.device)
    (rows,) = guidance.prompts(adapter, prompt)
    return rows.to(adapter.device, adapter.dtype) if isinstance(rows, Text) else rows


class DiffusersRun:
    """A run of diffusers' own forward pass.

    Args:
        adapter: the model, which calls it; its weights are shared unless `cache` is given, which works on a copy.
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
        _of_diffusers(adapter)
        self.nfe, self._guidance = nfe, adapter.spec.guidance(settings.guidance_scale)
        self._fresh = partial(make_sampler, adapter, nfe, settings, sample_index)  # multistep samplers remember
        self._sampler = self._fresh()
        device, self._dtype, self.grid, self.seed = adapter.device, adapter.dtype, adapter.shape.grid, settings.seed
        self._noise = initial_noise(adapter, settings.seed, sample_index).to(device, latents_dtype(adapter))
        self._prompt = _rows(adapter, settings, sample_index)
        self._timesteps = [torch.full((len(self._prompt),), t, device=device) for t in self._sampler.timesteps]
        self._index = 0
        self.model, self._forget = adapter.model, _nothing
        if cache:
            self.model = copy.deepcopy(adapter.model)
            self._forget = cache(self.model, self)
        self._adapter = copy.copy(adapter)
        self._adapter.model = torch.compile(self.model, **compile) if compile is not None else self.model

    @property
    def timestep(self) -> int:
        """The timestep of the current step."""
        return int(self._sampler.timesteps[self._index])

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Enqueue a sampling step; 0 starts again from the noise, with nothing cached."""
        if index == 0:
            self._latents, self._sampler = self._noise, self._fresh()
            self._forget()
        self._index = index
        x, channels = self._latents, self._adapter.spec.in_channels
        latents = self._guidance.latents(x).to(self._dtype)
        output = self._adapter.plain(latents, self._timesteps[index], self._prompt).to(x.dtype)
        prediction = self._guidance.combine([output[:, :channels]])
        self._latents, _ = self._sampler.step(prediction, index, x, output[: len(x), channels:])

    def run(self) -> Tensor:
        """All steps; the final latents."""
        for index in range(self.nfe):
            self.step(index)
        return self._latents

    def macs(self) -> int:
        """MACs per sample of one run, as torch's FLOP counter sees it; the fused attention of a CPU escapes it."""
        called, self._adapter.model = self._adapter.model, self.model
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.run()
        self._adapter.model = called
        return counter.get_total_flops() // 2 // len(self._noise)


class MatrixProducts:
    """The linear layers and attention of every block, back to back and nothing else: a floor under a full step."""

    def __init__(self, adapter: Adapter, nfe: int, settings: SamplerSettings, sample_index: Tensor) -> None:
        _of_diffusers(adapter)
        self.nfe, self._adapter = nfe, adapter
        self._context = adapter.prepare(prompt := _rows(adapter, settings, sample_index))
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
        cross_attention_block_skip_range=2,
        cross_attention_block_identifiers=("transformer_blocks",),
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
        patch_functor=DiTPatchFunctor() if isinstance(model, DiTTransformer2DModel) else None,
        check_forward_pattern=True,
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
        run = DiffusersRun(adapter, nfe, settings, index, compile={"mode": mode, "dynamic": False})
        with _compiler():
            run.step(0)
        return run

    return prepare


def _prepare_cached(cache: Install) -> Callable[..., DiffusersRun]:
    return lambda adapter, nfe, settings, index: DiffusersRun(adapter, nfe, settings, index, cache=cache)


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
    "diffusers-pab": Peer("diffusers, pyramid attention broadcast, range 2", _prepare_cached(_pyramid)),
    "diffusers-taylorseer": Peer("diffusers, TaylorSeer, interval 3, order 1", _prepare_cached(_taylorseer)),
    "diffusers-tomesd": Peer(f"diffusers, ToMe by tomesd, ratio {MERGED}", _prepare_cached(_tomesd)),
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
