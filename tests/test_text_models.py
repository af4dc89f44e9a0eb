"""PixArt-alpha and Open-Sora-Plan: against stock diffusers and by hand. `test_contract.py` has what all models keep."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tcbench.artefacts import load_artefacts, save_artefacts
from tcbench.budget.costing import macs_of
from tcbench.data import Dataset
from tcbench.engine.engine import Engine
from tcbench.engine.soft import soft_hidden
from tcbench.errors import UserError
from tcbench.ledger import plan_macs
from tcbench.models.adapter import Adapter, Text
from tcbench.models.networks import build_transformer, load_transformer, save_transformer
from tcbench.models.networks import make_adapter as adapt
from tcbench.models.open_sora_plan import attend_in_groups, groups_of
from tcbench.models.pixart import from_reference_layout
from tcbench.models.specs import MODELS, OpenSoraPlanSpec, PixArtSpec
from tcbench.plan import ALL, NONE, Block, Decision, Plan, PlanError, Site, Tokens, every_unit
from tcbench.record.files import read_tensors
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.shapes import Macs
from tcbench.tensors.groups import group_of
from tcbench.training.caching import train
from tcbench.training.pairs import uncached_values
from tests import official
from tests.floors import NETWORK, TRAJECTORY, assert_close, deviation

from .conftest import make_adapter, make_prompt, make_run, model_inputs

TEXT_MODELS = ["tiny-pixart", "tiny-osp"]
over_models = pytest.mark.parametrize("model", TEXT_MODELS)


def embedded(adapter: Adapter, rows: int = 4, step: int = 500) -> tuple[Tensor, object]:
    latent, prompt = model_inputs(adapter, rows)
    context = adapter.prepare(prompt)
    return adapter.embed(latent, context), adapter.condition(torch.full((rows,), step), context)


# --- against stock diffusers


@torch.inference_mode()
def test_dense_open_sora_plan_is_stock_allegro() -> None:
    """With diffusers' own attention and positions, which ours must match to the bit."""
    spec = MODELS["tiny-osp"].model_copy(update={"dense_blocks": (0, 1, 2, 3)})
    adapter = adapt(build_transformer(spec, zero_init=False), spec)
    latent, prompt = model_inputs(adapter, 2)
    timestep = torch.tensor([10, 900])
    ours = adapter.plain(latent, timestep, prompt)
    for block in adapter.blocks:
        block.attn1.set_processor(AllegroAttnProcessor2_0())
    *axes, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (8, 4)), (8, 4), 2)
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T.unsqueeze(1)
    stock = adapter.model(
        latent, prompt.states_RTC, timestep, encoder_attention_mask=prompt.mask_RT, image_rotary_emb=(axes, places)
    ).sample
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("block", [2, 3])
def test_skiparse_groups_by_hand(block: int) -> None:
    """'(g k) -> k g' with k = 4 in even blocks, '(n m k) -> m (n k)' with m = k = 4 in odd ones."""
    tokens = torch.arange(64)
    groups = tokens.view(16, 4).T if block == 2 else tokens.view(4, 4, 4).transpose(0, 1).flatten(1)
    assert [group_of(group, groups_of(block)).unique().tolist() for group in groups] == [[0], [1], [2], [3]]
    queries, keys, values = torch.randn(3, 2, 4, 64, 24, dtype=torch.float64, generator=torch.Generator()).unbind()
    mixed = attend_in_groups(queries, keys, values, block)
    for group in groups:
        alone = F.scaled_dot_product_attention(queries[:, :, group], keys[:, :, group], values[:, :, group])
        assert_close(mixed[:, :, group], alone, NETWORK)


@over_models
@torch.inference_mode()
def test_recomputed_tokens_are_what_all_tokens_would_be(model: str) -> None:
    """At the input that filled the cache, with its keys and values: whatever their groups and places."""
    adapter = make_adapter(model)
    x, condition = embedded(adapter)
    run = make_run(adapter, 2, torch.arange(2))
    units = [Block(block) for block in range(4)]
    index = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(row))[:11] for row in range(4)])
    engine = Engine(adapter, run)
    full = engine.hidden(every_unit(units, ALL, keys="cached"), 0, x, condition)
    part = engine.hidden(Plan({unit: Decision(Tokens(index), keys="cached") for unit in units}), 1, x, condition)
    assert_close(part, full, NETWORK)
    assert not torch.equal(part, x)


@torch.inference_mode()
def test_fresh_keys_stay_in_their_group() -> None:
    """Two tokens of different groups do not see each other, two of the same do."""
    adapter = make_adapter("tiny-osp")
    x, condition = embedded(adapter, rows=2)
    together = torch.tensor([[0, 4], [0, 1]])  # block 2 skips: 0 and 4 share a group, 0 and 1 do not
    runs = {}
    for name, index in (("pair", together), ("alone", together[:, :1])):
        engine = Engine(adapter, make_run(adapter, 2, torch.arange(1)))
        engine.hidden(Plan({Site(2, "attn"): Decision(ALL)}), 0, x, condition)
        moved = x + 1
        engine.hidden(Plan({Site(2, "attn"): Decision(Tokens(index))}), 1, moved, condition)
        runs[name] = engine.cache.read(Site(2, "attn"), Decision(NONE).fill, 1)[:, 0]
    assert deviation(runs["pair"][0], runs["alone"][0]) > 10 * NETWORK.allowed
    assert_close(runs["pair"][1], runs["alone"][1], NETWORK)


@torch.inference_mode()
def test_sized_models_are_told_the_size() -> None:
    spec = MODELS["tiny-pixart"].model_copy(update={"sized": True})
    adapter = adapt(build_transformer(spec, zero_init=False), spec)
    latent, prompt = model_inputs(adapter, 2)
    timestep = torch.tensor([10, 900])
    size = {"resolution": torch.full((2, 2), 128.0), "aspect_ratio": torch.ones(2, 1)}
    stock = adapter.model(
        latent, prompt.states_RTC, timestep, added_cond_kwargs=size, encoder_attention_mask=prompt.mask_RT
    ).sample
    context = adapter.prepare(prompt)
    x, condition = adapter.embed(latent, context), adapter.condition(timestep, context)
    run = make_run(adapter, 2, torch.arange(1))
    assert torch.equal(adapter.unembed(Engine(adapter, run).hidden(Plan(), 0, x, condition), condition), stock)
    with FlopCounterMode(display=False) as counter:
        adapter.condition(timestep, adapter.prepare(prompt))
    shape, unsized = spec.shape, MODELS["tiny-pixart"].shape
    assert shape.outer.matmul - unsized.outer.matmul == 3 * (256 * 32 + 32**2)
    once = shape.once.matmul + 256 * 96 + 96**2 + 6 * 96**2 + 3 * (256 * 32 + 32**2)
    assert counter.get_total_flops() == 2 * 2 * once


# --- prompts


@over_models
def test_padding_and_neighbours_do_not_matter(model: str) -> None:
    adapter = make_adapter(model)
    latent, prompt = model_inputs(adapter, 3)
    other = Text(torch.where(prompt.mask_RT[:, :, None], prompt.states_RTC, 7.0), prompt.mask_RT)
    timestep = torch.full((3,), 300)
    with torch.inference_mode():
        output = adapter.plain(latent, timestep, prompt)
        assert torch.equal(output, adapter.plain(latent, timestep, other))
        assert_close(output[1:2], adapter.plain(latent[1:2], timestep[:1], prompt[1:2]), NETWORK)
        assert not torch.allclose(output, adapter.plain(latent, timestep, prompt[torch.tensor([1, 2, 0])]), atol=0.1)


def test_guidance_uses_the_learned_null_caption_under_the_captions_mask() -> None:
    adapter, prompt = make_adapter("tiny-pixart"), make_prompt(make_adapter("tiny-pixart"), 3)
    rows = adapter.guided(prompt)
    assert torch.equal(rows.states_RTC[:3], prompt.states_RTC) and torch.equal(
        rows.mask_RT, prompt.mask_RT.repeat(2, 1)
    )
    assert all(torch.equal(state, adapter.model.null_caption) for state in rows.states_RTC[3:])
    some = adapter.drop(prompt, torch.tensor([False, True, False]))
    assert torch.equal(some.states_RTC[[0, 2]], prompt.states_RTC[[0, 2]])
    assert torch.equal(some.states_RTC[1], adapter.model.null_caption)


def test_guidance_without_a_null_caption_needs_a_negative_prompt() -> None:
    spec = MODELS["tiny-osp"].model_copy(update={"null_caption": False})
    adapter = adapt(build_transformer(spec, zero_init=False), spec)
    assert not hasattr(adapter.model, "null_caption")
    prompt, negative = (replace(make_prompt(adapter, *of), negative=None) for of in ((2,), (1, 5)))
    with pytest.raises(UserError, match="guidance needs a negative prompt"):
        adapter.guided(prompt)
    rows = adapter.guided(Text(prompt.states_RTC, prompt.mask_RT, negative))
    assert all(torch.equal(row, negative.states_RTC[0]) for row in rows.states_RTC[2:])
    assert all(torch.equal(row, negative.mask_RT[0]) for row in rows.mask_RT[2:])


def test_samples_of_captioned_models_need_prompts() -> None:
    with pytest.raises(UserError, match="tiny-pixart: samples need prompts"):
        sample_batch(make_adapter("tiny-pixart"), make_method("uncached", {}), 2, SamplerSettings(4.5), torch.arange(2))


@over_models
@pytest.mark.parametrize("solver", ["dpm", "euler_ancestral"])
def test_samples_do_not_depend_on_their_batch(model: str, solver: str) -> None:
    """Ancestral noise is keyed by sample and step, too."""
    adapter, method = make_adapter(model), make_method("uncached", {})
    every, settings = make_prompt(adapter, 9), SamplerSettings(1.5, seed=2, solver=solver)

    def sampled(*index: int, seed: int = 2) -> Tensor:
        chosen = SamplerSettings(1.5, seed, solver=settings.solver)
        return sample_batch(
            adapter, method, 3, chosen, torch.tensor(index), prompts=lambda samples: every[samples]
        ).image

    together = sampled(3, 8, 1)
    assert together.shape == (3, *adapter.spec.latent_shape)
    assert_close(sampled(1, 3)[0], together[2], TRAJECTORY)
    assert not torch.allclose(sampled(3, 8, 1, seed=3), together, atol=0.1)


# --- observing attention over the text


@over_models
@torch.inference_mode()
def test_entropy_by_hand(model: str) -> None:
    adapter = make_adapter(model)
    x, condition = embedded(adapter, rows=2)
    engine, block = Engine(adapter, make_run(adapter, 2, torch.arange(1))), adapter.blocks[1]
    first = Plan({Site(1, "cross"): Decision(ALL, observe="cross")})
    engine.hidden(first, 0, x, condition)
    before = engine.cache.attention_entropy(1).clone()
    index = torch.tensor([[5, 60], [7, 7]])[:, :2]
    index[1] = torch.tensor([7, 8])
    engine.hidden(Plan({Site(1, "cross"): Decision(Tokens(index), observe="cross")}), 1, x + 1, condition)
    after = engine.cache.attention_entropy(1)
    stream = [Engine(adapter, engine.run) for _ in range(2)]

    def by_hand(x0: Tensor, other: Engine) -> Tensor:
        seen: list[Tensor] = []
        hook = block.attn2.to_q.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        other.hidden(Plan(), 0, x0, condition)
        hook.remove()
        text, mask = (
            adapter.model.caption_projection(make_prompt(adapter, 2).states_RTC),
            make_prompt(adapter, 2).mask_RT,
        )
        q, k = (
            layer(inputs).unflatten(2, (4, 24)).transpose(1, 2).double()
            for layer, inputs in ((block.attn2.to_q, seen[0]), (block.attn2.to_k, text))
        )
        weights = (q @ k.transpose(2, 3) / 24**0.5).masked_fill(~mask[:, None, None], -torch.inf).softmax(3).mean(1)
        return -(weights * weights.clamp(min=1e-300).log()).sum(2)

    assert_close(before, by_hand(x, stream[0]), NETWORK)
    fresh = by_hand(x + 1, stream[1])
    assert_close(after.gather(1, index), fresh.gather(1, index), NETWORK)
    untouched = torch.ones(2, 64, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(after[untouched], before[untouched])
    assert engine.ledger.by_tag["score"].matmul == 2 * (64 + 2) * 12 * 96
    with pytest.raises(PlanError, match="block 0: no text attention was observed yet"):
        engine.cache.attention_entropy(0)


@pytest.mark.parametrize("model", ["tiny-osp"])
@pytest.mark.parametrize("block", [0, 1, 2])
@torch.inference_mode()
def test_attention_received_inside_groups(model: str, block: int) -> None:
    adapter = make_adapter(model)
    queries, keys = torch.randn(2, 2, 4, 64, 24, generator=torch.Generator().manual_seed(0)).unbind()
    received = adapter.attention_received(adapter.blocks[block], queries, keys)
    scores = queries.double() @ keys.double().transpose(2, 3) / 24**0.5
    if block:
        groups = group_of(torch.arange(64), groups_of(block))
        scores = scores.masked_fill(groups[:, None] != groups, -torch.inf)
    assert_close(received, scores.softmax(3).mean(1).sum(1), NETWORK)


# --- training


@over_models
@torch.inference_mode()
def test_soft_gates_at_0_and_1_are_the_engine(model: str) -> None:
    adapter = make_adapter(model)
    before, after = embedded(adapter, step=600), embedded(adapter, step=500)
    sites = adapter.shape.sites
    _, cached = uncached_values(adapter, *before, sites)
    open_sites = set(sites[::2])
    gates = {site: torch.tensor(float(site in open_sites)) for site in sites}
    engine = Engine(adapter, make_run(adapter, 2, torch.arange(2)))
    engine.hidden(every_unit(sites, ALL), 0, *before)
    hard = engine.hidden(Plan({site: Decision(ALL if site in open_sites else NONE) for site in sites}), 1, *after)
    assert_close(soft_hidden(adapter, *after, gates, cached), hard, NETWORK)


@over_models
def test_everything_trains(model: str, tmp_path: Path) -> None:
    """Predictor, schedule and refiners with captions, saved and loaded; the sampler is the model's own.

    Without patience, which would keep refiners that gain nothing in three iterations as no change.
    """
    adapter = make_adapter(model)
    solver = {"tiny-pixart": "dpm", "tiny-osp": "euler_ancestral"}[model]
    settings, captions = SamplerSettings(2.0, solver=solver), make_prompt(adapter, 6)
    latents = torch.randn(6, *adapter.spec.latent_shape, generator=torch.Generator().manual_seed(1))
    method = make_method(
        "tokencache",
        {"num_full_steps": 2, "beta": -20.0, "refiner_blocks": 2, "refiner_rank": 2, "training_batch_size": 4,
         "predictor_iterations": 3, "refiner_iterations": 3, "alpha_samples": 2, "cache_ratio": 0.7,
         "predictor_learning_rate": 1e-2, "refiner_learning_rate": 1e-2, "patience": None},
    )  # fmt: skip

    def prompts(index: Tensor) -> Text:
        return captions[index % 6]

    artefacts, refiners, log = train(adapter, method, 4, settings, Dataset(latents, captions), 0, prompts)
    assert {name.split(".")[2] for name in refiners if "attn2" in name} == {"2", "3"}
    assert {name.split("attn2.")[1].split(".")[0] for name in refiners if "attn2" in name} == {"to_q", "to_out"}
    assert any(tensor.abs().max() > 0 for name, tensor in refiners.items() if "lora_B" in name)
    assert log["stages"][0]["cache_loss"] and len(artefacts.alpha_bar) == 4
    save_artefacts(tmp_path, artefacts, refiners, log)
    loaded, refined = load_artefacts(tmp_path, adapter)
    images = [
        sample_batch(chosen, method, 4, settings, torch.arange(2), loaded, prompts=prompts).image
        for chosen in (refined, adapter)
    ]
    assert images[0].isfinite().all() and not torch.equal(*images)


# --- checkpoints


def test_pixarts_own_checkpoints_load(tmp_path: Path) -> None:
    spec = official.SPECS["pixart-1024"]
    model = official.random_denoiser(spec)
    save_transformer(model, tmp_path / "saved.safetensors")
    state = read_tensors(tmp_path / "saved.safetensors")[0]
    back = from_reference_layout(official.pixart_layout(model))
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    official.write_pixart(tmp_path / "PixArt-XL-2-1024-MS.pth", model)
    for name in ("PixArt-XL-2-1024-MS.pth", "saved.safetensors"):
        loaded = load_transformer(spec, tmp_path / name)
        assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    torch.save({key: value for key, value in state.items() if key != "null_caption"}, tmp_path / "converted.bin")
    with pytest.raises(UserError, match=r"converted.bin: lacks the learned null caption, which diffusers' conversion"):
        load_transformer(spec, tmp_path / "converted.bin")


def test_diffusers_folders_load(tmp_path: Path) -> None:
    spec = official.SPECS["osp-93x256"]
    model = official.random_denoiser(spec)
    model.save_pretrained(tmp_path / "whole")
    official.write_open_sora_plan(tmp_path / "sharded", model)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in ("whole", "sharded"):
        loaded = load_transformer(spec, tmp_path / name)
        assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    next(iter((tmp_path / "sharded").glob("*00002*.safetensors"))).unlink()
    with pytest.raises(UserError, match=r"00002.*not found"):
        load_transformer(spec, tmp_path / "sharded")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: a folder without diffusion_pytorch_model.safetensors"):
        load_transformer(spec, tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"sample_height": 6}, "multiple of 16"), ({"head_dim": 16}, "multiple of 6"), ({"depth": 3}, "depth")],
)
def test_impossible_videos_are_refused(change: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        OpenSoraPlanSpec(**(MODELS["tiny-osp"].model_dump() | change))


@pytest.mark.parametrize(
    ("name", "millions"), [("pixart-256", 610.86), ("pixart-1024", 611.35), ("osp-93x256", 2771.98)]
)
def test_full_size_networks(name: str, millions: float) -> None:
    """Parameters, without PixArt-alpha's null caption, which diffusers' class lacks."""
    model = build_transformer(MODELS[name], device="meta")
    assert round(sum(p.numel() for key, p in model.named_parameters() if key != "null_caption") / 1e6, 2) == millions
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


# --- MACs


@pytest.mark.parametrize("name", ["pixart-256", "pixart-1024", "osp-93x256", *TEXT_MODELS])
def test_whole_model_by_torchs_counter(name: str) -> None:
    """diffusers' forward makes the text's keys and values at every step; here a run makes them once."""
    adapter = make_adapter(name, "meta")
    latent, prompt = model_inputs(adapter, 2)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        adapter.plain(latent, torch.zeros(2, device="meta"), prompt)
    assert counter.get_total_flops() == 2 * 2 * (plan_macs(Plan(), adapter.shape).matmul + adapter.shape.once.matmul)


@pytest.mark.parametrize(
    ("name", "giga_macs", "fvcore"),
    [("pixart-256", 149.0546, 149.1218), ("pixart-1024", 3254.7618, 3255.8376), ("osp-93x256", 17171.18, 17174.86)],
)
def test_one_forward_by_the_papers_count(name: str, giga_macs: float, fvcore: float) -> None:
    macs = plan_macs(Plan(), MODELS[name].shape)
    digits = len(str(fvcore).partition(".")[2])
    assert round((macs.matmul + macs.repeated) / 1e9, digits) == giga_macs
    assert round(macs.paper_rule / 1e9, digits) == fvcore


def test_the_text_is_paid_once_where_refiners_act_on_p_steps_alone() -> None:
    """Neither the refined nor the plain blocks make keys and values of the text again at their steps."""
    plain, refined = (make_adapter("tiny-pixart") for _ in range(2))
    refined.on_full_steps(plain)
    context = refined.prepare(refined.guided(make_prompt(refined, 2)))
    assert context.keys_values.keys() == {*refined.blocks, *plain.blocks}


def test_the_text_is_paid_once_by_us_and_at_every_step_by_the_paper() -> None:
    shape = MODELS["pixart-256"].shape
    totals = macs_of("pixart-256", make_method("uncached", {}), 20)
    step = plan_macs(Plan(), shape)
    assert shape.once.paper_rule == 0
    assert totals["per_sample"] == 2 * (20 * step.matmul + shape.once.matmul)
    assert totals["paper_rule"] == 2 * 20 * step.paper_rule
    held = plan_macs(every_unit([Site(3, "cross")], NONE), shape)
    assert step.paper_rule - held.paper_rule == 2 * 1152**2 * (256 + 120) + 2 * 256 * 120 * 1152
    assert Macs(1, 2, 3) + Macs(10, 20, 30) == Macs(11, 22, 33) and (Macs(1, 2, 3) * 2).paper_rule == 2 * (1 + 8 + 3)


@pytest.mark.parametrize(
    ("name", "nfe", "paper", "off"),
    [
        ("osp-93x256", 50, 1717.49, 5e-5),
        ("osp-93x256", 25, 858.74, 5e-5),
        ("pixart-256", 20, 5.74, 0.0395),  # with all 120 text tokens
        ("pixart-1024", 50, 324.86, 0.0025),
    ],
)
def test_the_papers_cells(name: str, nfe: int, paper: float, off: float) -> None:
    tmacs = macs_of(name, make_method("uncached", {}), nfe)["paper_rule"] / 1e12
    assert abs(tmacs / paper - 1) < off


def test_a_sparse_block_masks_what_it_recomputes() -> None:
    shape = MODELS["osp-93x256"].shape
    index = torch.zeros(1, 600, dtype=torch.int64)
    width, tokens = 2304, 6144
    for block, keys in ((1, tokens), (2, tokens // 4)):
        whole = plan_macs(every_unit([Site(block, "attn")], NONE), shape).matmul
        assert plan_macs(Plan(), shape).matmul - whole == 4 * tokens * width**2 + 2 * tokens * keys * width
        some = plan_macs(Plan({Site(block, "attn"): Decision(Tokens(index), keys="cached")}), shape).matmul
        assert some - whole == 4 * 600 * width**2 + 2 * 600 * tokens * width


def test_specs_are_of_their_family() -> None:
    assert isinstance(MODELS["pixart-1024"], PixArtSpec) and MODELS["pixart-1024"].sized
    assert MODELS["osp-93x256"].num_tokens == 24 * 16 * 16
