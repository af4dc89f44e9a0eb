"""Methods on diffusers' own pipelines: off is off, on is tcbench's own sampling, and what does not fit is one line."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from pydantic import Field
from torch import Tensor

import tcbench
from tcbench.artefacts import add_refiners, load_artefacts, save_artefacts
from tcbench.attach import call, served
from tcbench.attach.call import noise_levels
from tcbench.data import Dataset
from tcbench.engine.fused import FusedBlocks
from tcbench.engine.plain import PlainBlocks
from tcbench.errors import UserError
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Look, Method, Run
from tcbench.models.adapter import Prompt, Text
from tcbench.models.networks import build_transformer
from tcbench.models.predictor import CachePredictor
from tcbench.models.specs import MODELS
from tcbench.plan import ALL, NONE, Plan, every_unit
from tcbench.registry import make_method
from tcbench.samplers import Chain, ReferenceDDIM, ReferenceDPMSolver, SamplerSettings
from tcbench.sampling import Passes, denoise
from tcbench.training.caching import train
from tests import attach_times
from tests.floors import TRAJECTORY, assert_close

NFE, SCALE, SIZE, CAPTION = 6, 3.0, 8, (5, 32)
FORA = {"interval": 3}


class OurSampler:
    """A sampler of tcbench's as diffusers' pipelines use a scheduler."""

    order = init_noise_sigma = 1

    def __init__(self, make: Callable[[int], Chain]) -> None:
        self.make = make

    def set_timesteps(self, steps: int, device: object = None) -> None:
        self.chain, self.taken = self.make(steps), 0
        self.timesteps, self.alphas_cumprod = torch.tensor(self.chain.timesteps), None

    def scale_model_input(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x

    def step(self, output: Tensor, timestep: Tensor, x: Tensor, return_dict: bool = True) -> Any:
        self.latents, _ = self.chain.step(output, self.taken, x)
        self.taken += 1
        return SimpleNamespace(prev_sample=self.latents) if return_dict else (self.latents,)


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    kind = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    return AutoencoderKL(**kind, block_out_channels=[8], norm_num_groups=4, latent_channels=4).eval()


BLOCKS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "sample_size": SIZE, "out_channels": 8}


def dit() -> DiTPipeline:
    """diffusers' own DiT, random, with the embedder that all blocks of an official conversion have."""
    torch.manual_seed(0)
    # diffusers gives one of a block's two LayerNorms this eps and the other 1e-6; here the difference shows
    transformer = DiTTransformer2DModel(**BLOCKS, num_embeds_ada_norm=1000, norm_eps=0.1).eval()
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    return quiet(DiTPipeline(transformer, vae(), DDIMScheduler()))


def pixart(kind: type = PixArtAlphaPipeline, **changes: Any) -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    width = {"cross_attention_dim": 32, "caption_channels": CAPTION[1]}
    transformer = PixArtTransformer2DModel(**(BLOCKS | width | changes)).eval()
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": DPMSolverMultistepScheduler()}
    return quiet(kind(transformer=transformer, **parts))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def captions(samples: int) -> Text:
    generator = torch.Generator().manual_seed(2)
    states, negative = (torch.randn(count, *CAPTION, generator=generator) for count in (samples, 1))
    mask = torch.arange(CAPTION[0]) < 2 + torch.arange(samples)[:, None]
    return Text(states, mask, negative=Text(negative, mask[:1]))


def noise(samples: int) -> Tensor:
    return torch.randn(samples, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def run(pipe: Any, samples: int = 2, steps: int = NFE, scale: float = SCALE, **others: Any) -> Tensor:
    """A call of either pipeline on the same noise: images of the DiT, latents of the PixArt-alpha."""
    called = {"num_inference_steps": steps, "guidance_scale": scale} | others
    if isinstance(pipe, DiTPipeline):
        generator = torch.Generator().manual_seed(3)
        return pipe(list(range(samples)), generator=generator, output_type="pt", **called).images
    text = captions(samples)
    assert text.negative
    embeds = {
        "prompt_embeds": text.states_RTC,
        "prompt_attention_mask": text.mask_RT,
        "negative_prompt_embeds": text.negative.states_RTC.expand(samples, -1, -1),
        "negative_prompt_attention_mask": text.negative.mask_RT.expand(samples, -1),
    }
    sizes = {
        "use_resolution_binning": False,
        "output_type": "latent",
        "negative_prompt": None,
        "latents": noise(samples),
    }
    return pipe(**(embeds | sizes | called)).images


PIPES = pytest.mark.parametrize("make", [dit, pixart])


# --- off is off


@PIPES
def test_off_is_bit_exact_and_so_is_everything_computed(make: Callable[[], Any]) -> None:
    pipe = make()
    plain, kind = run(pipe), type(pipe)
    with tcbench.enable_cache(pipe, "fora", **FORA) as cached:
        assert not torch.equal(run(pipe), plain)
        assert isinstance(pipe, kind) and cached.summary().full_steps == (0, 2, 5)
    assert type(pipe) is kind and torch.equal(run(pipe), plain)
    tcbench.enable_cache(pipe, "uncached")
    assert torch.equal(run(pipe), plain)
    assert "forward" not in vars(pipe.transformer)
    tcbench.disable_cache(pipe)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_steps_and_noise_levels_are_the_schedulers(scheduler: type) -> None:
    pipe, seen = dit(), Recorder()
    pipe.scheduler = scheduler()
    plain = run(pipe)
    with tcbench.enable_cache(pipe, seen) as cached:
        assert torch.equal(run(pipe), plain)
    steps = 2 * NFE - 1 if scheduler is HeunDiscreteScheduler else NFE
    assert cached.summary().steps == steps == len(seen.levels)
    signal, sigma = torch.tensor(seen.levels).T
    assert_close(signal**2 + sigma**2, torch.ones(steps), TRAJECTORY)
    fresh = scheduler()  # one that has taken no step yet
    fresh.set_timesteps(NFE)
    clean = fresh.add_noise(torch.ones(1), torch.zeros(1), fresh.timesteps[:1])
    assert_close(signal[:1], fresh.scale_model_input(clean, fresh.timesteps[0]), TRAJECTORY)


class Recorder(Method):
    """Computes everything and keeps what it sees."""

    name, label = "recorder", "recorder"
    outputs: list[Any] = Field(default_factory=list)
    levels: list[Any] = Field(default_factory=list)

    def plan(self, look: Look) -> Plan:
        if look.step:
            self.outputs.append(look.output().clone())
        if look.run.noise_levels:
            self.levels.append(look.run.noise_levels[look.step])
        return every_unit(look.run.shape.sites, ALL)


# --- on is tcbench's own sampling


def own(pipe: Any, method: Method, guided: bool = True, artefacts: Artefacts | None = None, blocks: Any = PlainBlocks):
    """(final latents, passes) of tcbench's own loop with the pipeline's transformer, sampler and noise."""
    adapter = tcbench.make_adapter(pipe.transformer, tcbench.spec_of(pipe.transformer))
    prompt: Prompt = torch.arange(2)
    if isinstance(pipe, PixArtAlphaPipeline):
        spec = adapter.spec.model_copy(update={"caption_tokens": CAPTION[0]})
        adapter, prompt = tcbench.make_adapter(pipe.transformer, spec), captions(2)
    if artefacts is not None and isinstance(artefacts, Path):
        artefacts, adapter = load_artefacts(artefacts, adapter)
    sampler = pipe.scheduler.make(NFE)
    guidance = adapter.spec.guidance(SCALE) if guided else Unguided()
    batch = Run(adapter.shape, sampler.timesteps, guidance, torch.arange(2), artefacts=artefacts or Artefacts())
    with torch.inference_mode():
        passes = Passes(adapter, batch, method.start, blocks)
        *_, (_, _, x) = denoise(passes, sampler, noise(2), prompt)
    return x, passes


def ours(make: Callable[[], Any]) -> Any:
    """The pipeline with the sampler that tcbench uses for it."""
    pipe = make()
    pipe.scheduler = OurSampler(ReferenceDDIM if make is dit else ReferenceDPMSolver)
    return pipe


def latents(pipe: Any) -> Tensor:
    """Of the samples, after a call."""
    return pipe.scheduler.latents[:2]


METHODS = {
    "fora": FORA,
    "toca": {"fresh_ratio": 0.5},
    "random_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "teacache": {"coefficients": (1.0, 0.0)},
    "tome_merge": {"parts": "attention-mlp"},
}


@PIPES
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_on_is_own_sampling(make: Callable[[], Any], name: str, scale: float) -> None:
    pipe, method = ours(make), make_method(name, METHODS[name])
    cached = tcbench.enable_cache(pipe, method)
    run(pipe, scale=scale)
    expected, passes = own(pipe, method, guided=scale > 1)
    summary = cached.summary()
    assert summary.plans == passes.plans and summary.macs == passes.macs
    assert summary.held_steps and summary.cache_bytes == passes.cache_bytes
    assert_close(latents(pipe), expected, TRAJECTORY)


@PIPES
def test_methods_see_the_conditional_half_first(make: Callable[[], Any]) -> None:
    pipe, attached, alone = ours(make), Recorder(outputs=[]), Recorder(outputs=[])
    with tcbench.enable_cache(pipe, attached):
        run(pipe)
    own(pipe, alone)
    for seen, expected in zip(attached.outputs, alone.outputs, strict=True):
        assert_close(seen, expected, TRAJECTORY)
        assert (seen[:2] - seen[2:]).abs().max() > 1e-3


@PIPES
def test_the_fused_path_serves_it(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class OnACpu(FusedBlocks):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, backend="torch")

    pipe = ours(make)
    cached = tcbench.enable_cache(pipe, "toca", fresh_ratio=0.5)
    run(pipe)
    plain, plans = latents(pipe), cached.summary().plans
    monkeypatch.setattr(call, "fuses", lambda adapter: True)
    monkeypatch.setattr(call, "FusedBlocks", OnACpu)
    run(pipe)
    assert cached.summary().fused and cached.summary().plans == plans
    assert_close(latents(pipe), plain, TRAJECTORY)


# --- calls, one after another


@PIPES
def test_state_restarts_at_every_call(make: Callable[[], Any]) -> None:
    pipe = make()
    with tcbench.enable_cache(pipe, "fora", **FORA) as cached:
        first = run(pipe)
        run(pipe, samples=3, steps=4)
        assert (cached.summary().samples, cached.summary().steps) == (3, 4)
        run(pipe, scale=1.0)
        assert cached.summary().rows_per_sample == 1
        assert torch.equal(run(pipe), first)


def test_images_per_prompt_and_callbacks() -> None:
    pipe, steps = pixart(), []
    plain = run(pipe, num_images_per_prompt=2, latents=noise(4))
    with tcbench.enable_cache(pipe, "uncached") as cached:
        called = {"callback": lambda step, timestep, x: steps.append((step, tuple(x.shape)))}
        assert torch.equal(run(pipe, num_images_per_prompt=2, latents=noise(4), **called), plain)
    assert cached.summary().samples == 4 and steps == [(step, (4, 4, SIZE, SIZE)) for step in range(NFE)]


def test_an_exception_ends_the_call_and_its_state() -> None:
    pipe = pixart()
    cached = tcbench.enable_cache(pipe, "fora", **FORA)
    with pytest.raises(UserError, match="fora: the pipeline was not called since"):
        cached.summary()
    first = run(pipe)

    def stop(step: int, timestep: Tensor, x: Tensor) -> None:
        if step == 3:
            raise KeyboardInterrupt

    def again(step: int, timestep: Tensor, x: Tensor) -> None:
        run(pipe)

    def late(step: int, timestep: Tensor, x: Tensor) -> None:
        if step == NFE - 1:
            pipe.transformer(x)

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback=stop)
    with pytest.raises(UserError, match="last call did not take all its steps; call it again"):
        cached.summary()
    with pytest.raises(UserError, match="is called within its own call"):
        run(pipe, callback=again)
    with pytest.raises(UserError, match="asked more often than the 6 steps"):
        run(pipe, callback=late)
    assert "forward" not in vars(pipe.transformer) and torch.equal(run(pipe), first)
    tcbench.disable_cache(pipe)


def test_a_method_that_misbehaves_is_named() -> None:
    class Wrong(Method):
        name, label = "wrong", "wrong"

        def plan(self, look: Look) -> Plan:
            return every_unit(look.run.shape.sites, NONE)

    pipe = dit()
    plain = run(pipe)
    with tcbench.enable_cache(pipe, Wrong()), pytest.raises(UserError, match=r"methods/wrong.py: step 0: .*cache"):
        run(pipe)
    assert torch.equal(run(pipe), plain)


def test_it_can_be_moved_saved_copied_and_given_another_transformer(tmp_path: Path) -> None:
    pipe = dit()
    plain = run(pipe)
    cached = tcbench.enable_cache(pipe, "fora", **FORA)
    first = run(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    again = quiet(DiTPipeline.from_pretrained(tmp_path))
    assert type(again) is DiTPipeline and torch.equal(run(again), plain)
    assert torch.equal(run(quiet(copy.deepcopy(pipe))), first)
    pipe.to(torch.float64)
    moved = run(pipe)
    assert moved.dtype == torch.float64 and not torch.equal(moved, run(quiet(copy.deepcopy(again)).to(torch.float64)))
    pipe.to(torch.float32)
    pipe.transformer = again.transformer
    assert torch.equal(run(pipe), first)
    assert cached.summary().samples == 2


# --- what was trained


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A predictor with a random head, and refiners, made for NFE steps."""
    adapter = tcbench.make_adapter((pipe := dit()).transformer, tcbench.spec_of(pipe.transformer))
    generator = torch.Generator().manual_seed(4)
    predictor = CachePredictor(adapter)
    predictor.head.weight.data = torch.randn(predictor.head.weight.shape, generator=generator)
    lora = add_refiners(adapter, 1, 2, generator)
    weights = {name: torch.randn(value.shape, generator=generator) for name, value in lora.state_dict().items()}
    made = Artefacts(scorers={"predictor": predictor}, alpha_bar=(0.5,) * NFE)
    scores = {name: 0.0 for name in ("std_over_tokens", "std_over_samples", "std_over_blocks", "std_over_steps")}
    scores |= {"alpha_bar": list(made.alpha_bar or ()), "per_block": [], "histogram": {}}
    stage = {"kind": "TrainRefiners", "wall_s": 0.0, "blocks": 1, "rank": 2}
    log = {"nfe": NFE, "stages": [stage], "scores": scores, "settings": {"method": "tokencache"}}
    save_artefacts(tmp_path, made, {name: value for name, value in weights.items() if "lora_" in name}, log)
    return tmp_path


TOKENCACHE = {"num_full_steps": 2, "beta": -1.0, "refiner_blocks": 1, "cache_ratio": 0.7}


def test_trained_methods_take_a_folder(trained: Path) -> None:
    pipe = ours(dit)
    before = copy.deepcopy(pipe.transformer.state_dict())
    cached = tcbench.enable_cache(pipe, "tokencache", artefacts=trained, **TOKENCACHE)
    run(pipe)
    expected, passes = own(pipe, make_method("tokencache", TOKENCACHE), artefacts=trained)
    assert cached.summary().plans == passes.plans and cached.summary().macs["by_tag"]["predictor"]
    assert_close(latents(pipe), expected, TRAJECTORY)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    pipe.to(torch.float64)  # the scorer and the refiners follow
    run(pipe)
    moved = latents(pipe)
    tcbench.disable_cache(pipe)
    tcbench.enable_cache(pipe, "tokencache", artefacts=trained, **TOKENCACHE)
    run(pipe)
    assert moved.dtype == torch.float64 and torch.equal(latents(pipe), moved)
    with pytest.raises(UserError, match="made for 6 steps and the pipeline takes 4; give num_inference_steps=6"):
        run(pipe, steps=4)


CALIBRATED: dict[str, dict[str, Any]] = {
    "teacache": {"calibration_samples": 3, "degree": 2, "threshold": 2.0},
    "lazydit": {"iterations": 3, "batch_size": 2, "learning_rate": 0.1, "cost_weight": 1.0},
}
"""Methods whose artefacts are tables, with options by which training changes what is held."""


@pytest.mark.parametrize("name", CALIBRATED)
def test_methods_with_tables_take_a_folder(name: str, tmp_path: Path) -> None:
    pipe, method = ours(dit), make_method(name, CALIBRATED[name])
    adapter = served.adapter_of(pipe.transformer)
    data = Dataset(torch.randn(4, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.arange(4))
    artefacts, refiners, log = train(adapter, method, NFE, SamplerSettings(SCALE), data, 0)
    save_artefacts(tmp_path, artefacts, refiners, log)
    cached = tcbench.enable_cache(pipe, method, artefacts=tmp_path)
    run(pipe)
    expected, passes = own(pipe, method, artefacts=artefacts)
    assert cached.summary().plans == passes.plans and cached.summary().macs == passes.macs
    assert cached.summary().held_steps
    assert_close(latents(pipe), expected, TRAJECTORY)
    with pytest.raises(UserError, match="made for 6 steps and the pipeline takes 4; give num_inference_steps=6"):
        run(pipe, steps=4)


@pytest.mark.parametrize(
    ("name", "options"), [("teacache", {"coefficients": (1.0, 0.0)}), ("magcache", {"ratios": (1.0,)})]
)
def test_what_needs_no_training_needs_no_folder(name: str, options: dict[str, Any]) -> None:
    with tcbench.enable_cache(dit(), name, **options):
        pass
    with pytest.raises(UserError, match=f"{name}: is trained; give artefacts="):
        tcbench.enable_cache(dit(), name)


# --- what does not fit


def spoiled(spoil: Callable[[Any], Any]) -> Any:
    pipe = dit()
    spoil(pipe)
    return pipe


def compile_in_place(pipe: Any) -> None:
    pipe.transformer.compile()


def compile_around(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer)


def offload(pipe: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.transformer, ModelHook())


def hook_a_block(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *_: None)


def cast_layers(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float16, torch.float32)


def another_embedder(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias.data += 1


def another_activation(pipe: Any) -> None:
    pipe.transformer.register_to_config(activation_fn="gelu")


def attend_otherwise(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn1.processor = SimpleNamespace()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (compile_in_place, "transformer is compiled"),
        (compile_around, "transformer is compiled"),
        (offload, r"^transformer: hooks change or move it .*use pipe.to\(device\)"),
        (hook_a_block, r"^transformer.transformer_blocks.1: hooks"),
        (cast_layers, "hooks change or move it"),
        (lambda pipe: pipe.transformer.train(), r"training mode; call pipe.transformer.eval\(\)"),
        (another_embedder, r"transformer_blocks.2.norm1.emb differs from block 0's"),
        (another_activation, "DiTTransformer2DModel: activation_fn is 'gelu' in its config"),
        (attend_otherwise, "transformer_blocks.0.attn1: attends by SimpleNamespace"),
    ],
)
def test_transformers_that_are_not_served_are_refused(spoil: Callable[[Any], Any], says: str) -> None:
    pipe = spoiled(spoil)
    with pytest.raises(UserError, match=says) as caught:
        tcbench.enable_cache(pipe, "fora")
    assert "\n" not in str(caught.value) and type(pipe) is DiTPipeline
    pipe = dit()
    tcbench.enable_cache(pipe, "fora")
    spoil(pipe)
    with pytest.raises(UserError, match=says):  # at a later call, too
        run(pipe)


KNOWN = "no pipeline that tcbench knows; known: DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline"


@pytest.mark.parametrize(
    ("make", "method", "given", "says"),
    [
        (lambda: object(), "fora", {}, f"object: {KNOWN}"),
        (lambda: dit().transformer, "fora", {}, f"DiTTransformer2DModel: {KNOWN}"),
        (dit, "forra", {}, "did you mean 'fora'"),
        (dit, "fora", {"intervall": 3}, "unknown option 'intervall'; options: interval"),
        (dit, Recorder(), {"interval": 3}, "recorder: is given with its options; leave out interval"),
        (dit, "tokencache", {}, "tokencache: is trained; give artefacts=, the folder with its artefacts.json"),
        (dit, "tokencache", {"artefacts": "nowhere"}, r"nowhere/artefacts.json"),
    ],
)
def test_what_cannot_be_enabled_is_one_line(make: Callable[[], Any], method: Any, given: Any, says: str) -> None:
    pipe = make()
    with pytest.raises(UserError, match=says) as caught:
        tcbench.enable_cache(pipe, method, **given)
    assert "\n" not in str(caught.value) and not hasattr(pipe, "_tcbench_cached")


def test_on_twice_and_off_twice_are_errors(trained: Path) -> None:
    pipe = dit()
    with tcbench.enable_cache(pipe, "fora"):
        with pytest.raises(UserError, match="DiTPipeline: has FORA on it; call"):
            tcbench.enable_cache(pipe, "toca")
        tcbench.disable_cache(pipe)
    with pytest.raises(UserError, match="DiTPipeline: has no method on it"):
        tcbench.disable_cache(pipe)
    with pytest.raises(UserError, match="was trained for tokencache, not for learning_to_cache"):
        tcbench.enable_cache(pipe, "learning_to_cache", artefacts=trained)


def test_calls_that_do_not_fit_are_one_line() -> None:
    pipe = dit()
    with (
        tcbench.enable_cache(pipe, "fewer_steps", steps=4),
        pytest.raises(UserError, match="the pipeline decides its steps; give num_inference_steps=4"),
    ):
        run(pipe)
    pipe = pixart()
    tcbench.enable_cache(pipe, "fora")
    with pytest.raises(UserError, match="latents are 4x16x8; tcbench serves the transformer's own size, 4x8x8"):
        run(pipe, height=16 * pipe.vae_scale_factor, width=8 * pipe.vae_scale_factor, latents=None)
    tcbench.enable_cache(pipe := dit(), "fora")
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompts'"):
        run(pipe, prompts="a cat")


def test_sigma_is_an_entry() -> None:
    pipe = pixart(PixArtSigmaPipeline)
    plain = run(pipe)
    with tcbench.enable_cache(pipe, "uncached") as cached:
        assert torch.equal(run(pipe), plain)
    assert cached.summary().pipeline == "PixArtSigmaPipeline"


def test_a_sized_model_is_told_its_own_size() -> None:
    small = {"num_attention_heads": 3, "cross_attention_dim": 24, "num_layers": 1}
    pipe = pixart(sample_size=128, **small)
    called = {"samples": 1, "steps": 2, "scale": 1.0, "latents": torch.ones(1, 4, 128, 128)}
    pipe.vae_scale_factor = 8
    plain = run(pipe, **called)
    tcbench.enable_cache(pipe, "uncached")
    assert tcbench.spec_of(pipe.transformer).sized and torch.equal(run(pipe, **called), plain)
    pipe.vae_scale_factor = 4
    with pytest.raises(UserError, match="another image size than 1024 x 1024 pixels"):
        run(pipe, **called)


# --- what is said, and what is imported


def test_the_summary_says_what_was_held() -> None:
    pipe = dit()
    cached = tcbench.enable_cache(pipe, "fora", **FORA)
    run(pipe)
    summary = cached.summary()
    shape = tcbench.spec_of(pipe.transformer).shape
    assert summary.macs_uncached > summary.macs["per_sample"] and summary.recomputed == 0.5
    assert summary.mac_ratio == summary.macs_uncached / summary.macs["per_sample"]
    # the outputs of attention and MLP of every block, of 2 samples' pairs, in float32
    assert summary.cache_bytes == 2 * shape.num_blocks * 4 * shape.num_tokens * shape.width * 4
    lines = str(summary).splitlines()
    assert lines[0] == "FORA (interval=3) on DiTPipeline: 2 samples, guided pairs"
    assert lines[1] == "  steps   6: 3 full, 3 held" and "50.0%" in lines[3]
    tcbench.disable_cache(pipe)
    with tcbench.enable_cache(pipe, "fora", interval=1) as cached:
        run(pipe, samples=1, scale=1.0)
    assert cached.summary().mac_ratio == 1 and "NOTHING WAS HELD" in str(cached.summary())


def test_specs_are_those_of_the_models() -> None:
    """What a known model's spec builds has a config that says the same."""
    for name in ("tiny-dit", "tiny-pixart"):
        spec = MODELS[name]
        inferred = tcbench.spec_of(build_transformer(spec))
        as_diffusers = {"name": inferred.name, "guided_channels": 4} | (
            {} if name == "tiny-dit" else {"caption_tokens": 120, "null_caption": False}
        )
        assert inferred == spec.model_copy(update=as_diffusers)
    with pytest.raises(UserError, match="Linear: no transformer that tcbench has an adapter for"):
        tcbench.spec_of(torch.nn.Linear(1, 1))


def test_noise_levels_of_other_schedulers_are_unknown() -> None:
    assert noise_levels(SimpleNamespace(timesteps=torch.arange(3))) == ()


def test_importing_tcbench_imports_no_torch() -> None:
    code = """
import sys, tcbench
assert set(tcbench.__all__) <= set(dir(tcbench)) | set(tcbench._MODULES)
tcbench.make_method("fora", {}), tcbench.spec_of, tcbench.UserError
print(sorted({"torch", "diffusers", "numpy.random"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout and "diffusers" not in done.stdout
    with pytest.raises(AttributeError, match="module 'tcbench' has no attribute 'enable'"):
        tcbench.enable  # noqa: B018
    assert all(getattr(tcbench, name) for name in tcbench.__all__)


def test_the_measurement_at_full_size_runs_at_toy_size() -> None:
    """`tests/attach_times.py`, which needs a GPU to mean something."""
    rows = attach_times.main(["--size", "toy"])["rows"]
    assert [row["pipeline"] for row in rows] == ["dit"] * 4 + ["pixart"] * 4
    assert all(row["mac_ratio"] > 1.5 and row["cache_bytes"] for row in rows if row["method"])
