"""Denoiser specs: shapes, initialisation, and checkpoints in and out."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tcbench.errors import UserError
from tcbench.models.dit import from_reference_layout
from tcbench.models.networks import build_transformer, load_transformer, save_transformer
from tcbench.models.specs import MODELS, DiTSpec
from tcbench.record.files import read_tensors, write_tensors
from tests import official

TINY = MODELS["tiny-dit"]


def outputs(model: torch.nn.Module, timestep: int = 500, label: int = 3) -> Tensor:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, torch.full((2,), timestep), class_labels=torch.full((2,), label)).sample


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_transformer(TINY, seed=1, zero_init=False)


@pytest.fixture
def saved(model: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_transformer(model, path, {"note": "x"})
    return path


@pytest.mark.parametrize(
    ("name", "tokens", "width", "parameters"),
    [
        # the reference DiT-XL/2 has 675.13 M values, of which pos_embed (tokens x width) is not a parameter here
        ("dit-xl-2-256", 256, 1152, 675_129_632 - 256 * 1152),
        ("dit-xl-2-512", 1024, 1152, 675_129_632 - 256 * 1152),
        ("digits-dit", 64, 64, 1_075_844),
        ("fashion-dit", 256, 192, 18_824_452),
        ("cifar10-dit", 256, 192, 18_824_452 + (192 + 192 + 1) * 2 * 4),  # two more colours of a patch, in and out
        # the golden model: 733,856 values with its position embedding
        ("tiny-dit", 64, 96, 733_856 - 64 * 96),
    ],
)
def test_shapes_without_allocation(name: str, tokens: int, width: int, parameters: int) -> None:
    spec = MODELS[name]
    model = build_transformer(spec, device="meta")
    assert (spec.num_tokens, spec.width, math.prod(spec.grid)) == (tokens, width, tokens)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_numerics_are_the_references(model: torch.nn.Module) -> None:
    block = model.transformer_blocks[0]
    assert block.norm3.eps == block.norm1.norm.eps == 1e-6
    assert block.norm1.emb.time_proj.downscale_freq_shift == 0
    assert len({id(b.norm1.emb) for b in model.transformer_blocks}) == 1
    assert not model.training
    assert block.norm1.emb.class_embedder.dropout_prob == 0
    assert block.norm1.emb.class_embedder.embedding_table.num_embeddings == TINY.num_classes + 1


def test_initialisations() -> None:
    assert outputs(build_transformer(TINY, seed=1)).abs().max() == 0
    model = build_transformer(TINY, seed=1, zero_init=False)
    base = outputs(model)
    assert torch.equal(base, outputs(build_transformer(TINY, seed=1, zero_init=False)))
    assert not torch.equal(base, outputs(build_transformer(TINY, seed=2, zero_init=False)))
    for other in (outputs(model, timestep=100), outputs(model, label=TINY.num_classes)):
        assert (other - base).std() > 0.1 * base.std()
    with torch.no_grad():
        model.transformer_blocks[2].ff.net[2].weight.zero_()
    assert (outputs(model) - base).std() > 0.01 * base.std()


def test_round_trip(model: torch.nn.Module, saved: Path) -> None:
    assert torch.equal(outputs(load_transformer(TINY, saved)), outputs(model))
    state, metadata = read_tensors(saved)
    assert metadata == {"note": "x"}
    assert sum("norm1.emb" in key for key in state) == 5  # one embedder: two linears and a table
    half = load_transformer(TINY, saved, dtype=torch.bfloat16)
    assert {t.dtype for t in (*half.parameters(), *half.buffers())} == {torch.bfloat16}


def test_per_block_embedders_load(model: torch.nn.Module, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "official.bin")
    assert torch.equal(outputs(load_transformer(TINY, tmp_path / "official.bin")), outputs(model))
    state["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"] += 1
    write_tensors(tmp_path / "other.safetensors", state)
    with pytest.raises(UserError, match=r"other.safetensors: transformer_blocks.2.norm1.emb"):
        load_transformer(TINY, tmp_path / "other.safetensors")


def test_dits_own_checkpoints_load(model: torch.nn.Module, tmp_path: Path) -> None:
    """The published file, and a training script's, of which the averaged weights are meant."""
    back, state = from_reference_layout(official.dit_layout(model)), dict(model.named_parameters())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    official.write_dit(tmp_path / "DiT-XL-2-256x256.pt", model)
    official.write_dit_training(tmp_path / "0400000.pt", model, plain=build_transformer(TINY, seed=2))
    for name in ("DiT-XL-2-256x256.pt", "0400000.pt"):
        assert torch.equal(outputs(load_transformer(TINY, tmp_path / name)), outputs(model))


def spoil(saved: Path, how: str) -> Path:
    state = read_tensors(saved)[0]
    name = "proj_out_2.bias"
    if how == "truncated":
        saved.write_bytes(saved.read_bytes()[:-100])
    elif how == "not torch":
        saved = saved.with_suffix(".pt")
        saved.write_bytes(b"not a checkpoint")
    elif how == "absent":
        saved.unlink()
    else:
        if how == "missing":
            del state[name]
        elif how == "shape":
            state[name] = state[name][:-1]
        elif how == "nan":
            state[name][3] = float("nan")
        elif how == "unknown":
            state["extra.weight"] = torch.zeros(1)
        write_tensors(saved, state)
    return saved


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "truncated"),
        ("not torch", "not a checkpoint: it is text that begins 'not a checkpoint'"),
        ("absent", "not found"),
        ("missing", "proj_out_2.bias is missing"),
        ("shape", r"proj_out_2.bias has shape \[31\], not \[32\]"),
        ("nan", "proj_out_2.bias holds NaN"),
        ("unknown", "extra.weight is not part of tiny-dit"),
    ],
)
def test_bad_files_are_named(saved: Path, how: str, says: str) -> None:
    path = spoil(saved, how)
    with pytest.raises(UserError, match=says) as caught:
        load_transformer(TINY, path)
    assert str(path) in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x_embedder.proj.weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a plain checkpoint"):
        load_transformer(TINY, tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_no_weights_is_said() -> None:
    with pytest.raises(UserError, match="ships without weights"):
        load_transformer(MODELS["dit-xl-2-256"])


def test_specs_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError, match="depth"):
        DiTSpec(**(TINY.model_dump() | {"depth": 3}))
