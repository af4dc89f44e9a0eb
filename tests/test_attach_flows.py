"""Methods on diffusers' FluxPipeline and WanPipeline: off is off, on is own sampling, what does not fit is said."""

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

import tcbench
from tcbench.errors import UserError
from tcbench.guidance import Distilled, TwoPasses
from tcbench.ledger import plan_macs
from tcbench.method import Artefacts, Look, Method, Run
from tcbench.models.adapter import Text
from tcbench.models.flux import unpack
from tcbench.models.networks import build_transformer
from tcbench.models.specs import MODELS
from tcbench.plan import Plan
from tcbench.registry import make_method
from tcbench.samplers import Flow, FlowEuler, FlowUniPC
from tcbench.sampling import Passes, denoise
from tests.floors import TRAJECTORY, assert_close

NFE, SCALE = 6, 3.0
FORA = {"interval": 3}
FLUX, WAN = MODELS["tiny-flux"], MODELS["tiny-wan"]


def flux(dtype: torch.dtype = torch.float32) -> Any:
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"])
    pipe = FluxPipeline(**parts, transformer=build_transformer(FLUX, dtype=dtype))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan(dtype: torch.dtype = torch.float32) -> Any:
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(**parts, scheduler=scheduler, transformer=build_transformer(WAN, dtype=dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, **others: Any) -> Tensor:
    """Final latents of two samples."""
    text, dtype = drawn(1, 2, 6, 32), pipe.transformer.dtype
    called = {"num_inference_steps": NFE, "output_type": "latent", "guidance_scale": SCALE, "width": 128}
    called |= {"generator": torch.Generator().manual_seed(3), "prompt_embeds": text.to(dtype)}
    if isinstance(pipe, FluxPipeline):
        called |= {"height": 128, "pooled_prompt_embeds": drawn(2, 2, 20).to(dtype)}
        return pipe(**(called | others)).images
    called |= {"height": 64, "width": 64, "num_frames": 5, "negative_prompt_embeds": drawn(4, 2, 6, 32).to(dtype)}
    return pipe(**(called | others)).frames


def own(pipe: Any, method: Method, sampler: Flow) -> tuple[Tensor, Passes]:
    """(final latents, passes) of tcbench's own loop with the pipeline's transformer and noise."""
    spec, mask = (FLUX if isinstance(pipe, FluxPipeline) else WAN), torch.ones(2, 6, dtype=torch.bool)
    adapter = tcbench.make_adapter(pipe.transformer, spec.model_copy(update={"caption_tokens": 6}))
    prompt = Text(drawn(1, 2, 6, 32), mask, negative=Text(drawn(4, 2, 6, 32), mask), pooled_RC=drawn(2, 2, 20))
    batch = Run(adapter.shape, sampler.timesteps, spec.guidance(SCALE), torch.arange(2), 0, Artefacts())
    with torch.inference_mode():
        passes = Passes(adapter, batch, method.start)
        *_, (_, _, x) = denoise(passes, sampler, drawn(3, 2, *spec.latent_shape), prompt)
    return x, passes


# --- off is off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [flux, wan])
def test_off_is_bit_exact_and_so_is_everything_computed(make: Any, dtype: torch.dtype) -> None:
    pipe = make(dtype)
    plain, kind = run(pipe), type(pipe)
    with tcbench.enable_cache(pipe, "fora", **FORA) as cached:
        assert not torch.equal(run(pipe), plain)
        assert isinstance(pipe, kind) and cached.summary().full_steps == (0, 2, 5)
    with tcbench.enable_cache(pipe, "uncached") as cached:
        assert torch.equal(run(pipe), plain)
        assert cached.summary().mac_ratio == 1
    assert type(pipe) is kind and "forward" not in vars(pipe.transformer) and torch.equal(run(pipe), plain)


def test_a_block_that_is_stored_whole_is_bit_exact_too() -> None:
    pipe = flux()
    plain = run(pipe)
    with tcbench.enable_cache(pipe, "random_tokens", num_full_steps=NFE, refiner_blocks=1):
        assert torch.equal(run(pipe), plain)


# --- on is tcbench's own sampling


METHODS = {"fora": FORA, "toca": {"fresh_ratio": 0.5}, "random_tokens": {"num_full_steps": 2, "refiner_blocks": 1}}


@pytest.mark.parametrize("name", METHODS)
def test_on_is_own_sampling(name: str) -> None:
    method = make_method(name, METHODS[name])
    for pipe, sampler in ((flux(), FlowEuler(NFE, "by_tokens", 64)), (wan(), FlowUniPC(NFE, 3.0))):
        cached = tcbench.enable_cache(pipe, method)
        latents = run(pipe)
        expected, passes = own(pipe, method, sampler)
        summary = cached.summary()
        assert summary.plans == passes.plans and summary.macs == passes.macs and summary.held_steps
        assert summary.cache_bytes == passes.cache_bytes and summary.samples == 2 and summary.rows_per_sample == 1
        assert_close(unpack(latents, FLUX) if isinstance(pipe, FluxPipeline) else latents, expected, TRAJECTORY)


def test_the_halves_of_wan_have_a_state_each() -> None:
    """What a pass holds comes of its own caption: the same captions in both give the same prediction in both."""
    pipe, text = wan(), drawn(1, 2, 6, 32)
    with tcbench.enable_cache(pipe, "fora", **FORA) as cached:
        guided = run(pipe, negative_prompt_embeds=text)
        assert cached.summary().macs_uncached == 2 * _uncached_macs(pipe)
        single = run(pipe, guidance_scale=1.0)
        assert cached.summary().macs_uncached == _uncached_macs(pipe)
        assert_close(guided, single, TRAJECTORY)
        assert not torch.equal(run(pipe), guided)


def _uncached_macs(pipe: Any) -> int:
    shape = tcbench.spec_of(pipe.transformer).model_copy(update=_SIZES).shape
    return int((plan_macs(Plan(), shape) * NFE + shape.once).matmul)


_SIZES = {"sample_frames": 2, "sample_height": 8, "sample_width": 8, "caption_tokens": 6}


@pytest.mark.parametrize("euler", [False, True])
def test_noise_levels_are_the_flows(euler: bool) -> None:
    pipe, seen = wan(), []
    if euler:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    class Recorder(Method):
        name, label = "recorder", "recorder"

        def plan(self, look: Look) -> Plan:
            seen.append(look.run.noise_levels[look.step])
            return Plan()

    with tcbench.enable_cache(pipe, Recorder()):
        run(pipe)
    assert len(seen) == 2 * NFE and all(sum(level) == pytest.approx(1) for level in seen)
    assert seen[0][1] > 0.99 and seen[:NFE:2] != seen[NFE::2]


# --- sizes and guidance


def test_images_may_be_of_any_size() -> None:
    pipe = flux()
    plain = run(pipe, width=192)
    with tcbench.enable_cache(pipe, "uncached") as cached:
        assert torch.equal(run(pipe, width=192), plain)
        assert cached.summary().tokens == 8 * 12
        run(pipe)
        assert cached.summary().tokens == 8 * 8


def test_a_negative_prompt_makes_flux_two_passes() -> None:
    pipe = flux()
    negative = {"true_cfg_scale": 2.0, "negative_prompt_embeds": drawn(5, 2, 6, 32)}
    negative["negative_pooled_prompt_embeds"] = drawn(6, 2, 20)
    plain = run(pipe, **negative)
    assert not torch.equal(run(pipe), plain)
    with tcbench.enable_cache(pipe, "uncached") as cached:
        assert torch.equal(run(pipe, **negative), plain)
        guided = cached.summary().macs["per_sample"]
        run(pipe)
        assert guided == 2 * cached.summary().macs["per_sample"]


def test_flux_schnell_reads_no_guidance() -> None:
    spec = FLUX.model_copy(update={"reads_guidance": False})
    pipe = flux()
    pipe.transformer = build_transformer(spec)
    plain = run(pipe)
    with tcbench.enable_cache(pipe, "uncached"):
        assert torch.equal(run(pipe), plain)
    assert not isinstance(spec.guidance(), Distilled) and isinstance(FLUX.guidance(), Distilled)
    assert isinstance(WAN.guidance(), TwoPasses)


# --- what does not fit


def test_what_the_adapter_would_compute_otherwise_is_refused() -> None:
    pipe = flux(torch.float16)
    with tcbench.enable_cache(pipe, "uncached"), pytest.raises(UserError, match=r"float16, .* use bfloat16"):
        run(pipe)
    pipe = flux()
    with tcbench.enable_cache(pipe, "uncached"):
        with pytest.raises(UserError, match="gives its transformer joint_attention_kwargs"):
            run(pipe, joint_attention_kwargs={"any": 1})
        run(pipe)
    pipe = wan()
    pipe.register_to_config(boundary_ratio=0.9)
    with tcbench.enable_cache(pipe, "uncached"), pytest.raises(UserError, match=r"is a Wan 2\.2"):
        run(pipe)


def test_specs_are_those_of_the_models() -> None:
    """What a known model's spec builds has a config that says the same, sizes aside."""
    sides = {"sample_height": 128, "sample_width": 128, "caption_tokens": 512, "shift": 1.0}
    inferred = tcbench.spec_of(build_transformer(FLUX, device="meta"))
    assert inferred == FLUX.model_copy(update=sides | {"name": "FluxTransformer2DModel"})
    sides = {"sample_frames": 21, "sample_height": 60, "sample_width": 104, "caption_tokens": 512, "shift": 1.0}
    inferred = tcbench.spec_of(build_transformer(WAN, device="meta"))
    assert inferred == WAN.model_copy(update=sides | {"name": "WanTransformer3DModel"})


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        (FluxTransformer2DModel, {"out_channels": 8}, "16 channels become 8 in its config"),
        (WanTransformer3DModel, {"image_dim": 24}, "image_dim is 24 in its config"),
        (WanTransformer3DModel, {"patch_size": (2, 2, 2)}, "patch_size is .* tcbench serves"),
    ],
)
def test_other_kinds_of_the_classes_are_refused(kind: Any, config: dict[str, Any], says: str) -> None:
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 16}
    more = {"num_single_layers": 1, "axes_dims_rope": (8, 8, 8)} if kind is FluxTransformer2DModel else {"ffn_dim": 8}
    with torch.device("meta"):
        transformer = kind(**(small | more | config))
    with pytest.raises(UserError, match=says):
        tcbench.spec_of(transformer)
