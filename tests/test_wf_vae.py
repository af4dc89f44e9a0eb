"""WF-VAE: files, slices in time, variants; tests/test_golden_video.py compares it with the reference."""

import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.models.wf_vae import (
    WFVAE,
    VideoAutoencoder,
    WFVAEConfig,
    build_wf_vae,
    load_wf_vae,
    read_config,
    to_bytes,
)
from tcbench.record.files import read_json, read_tensors, write_json
from tests.floors import NETWORK, assert_close
from tests.official import WF_VAE, write_wf_vae

from .conftest import GOLDEN

FOLDER = GOLDEN.with_name("golden-video") / "wfvae"
V1_3_0 = {name: WF_VAE[name] for name in ("connect_res_layer_num", "norm_type", "t_interpolation")}


def small(**changed: object) -> WFVAEConfig:
    """Few channels and v1.3.0's variants, or others."""
    return WFVAEConfig.model_validate(WF_VAE | changed)


# --- files


def test_names_and_shapes_at_full_size() -> None:
    with torch.device("meta"):
        vae = WFVAE(WFVAEConfig(**V1_3_0))
    official = read_json(FOLDER / "keys_v1_3_0.json")
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == official["shapes"]
    assert sum(parameter.numel() for parameter in vae.parameters()) == official["parameters"]


@pytest.mark.parametrize("shape", ["ema", "trainer", "state dict", "plain"])
def test_checkpoints_of_four_shapes(tmp_path: Path, shape: str) -> None:
    state = read_tensors(FOLDER / "weights.safetensors")[0]
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    filters = {"encoder.wavelet_tranform_l1.aa": torch.ones(1, 1, 2, 2), "loss.weight": torch.ones(3), "epoch": 3}
    filters |= {f"decoder.inverse_wavelet_{word}form_l2.h": torch.ones(1, 1, 2, 2, 2) for word in ("tran", "trans")}
    trainer = {"epoch": 3, "state_dict": {"gen_model": wrong, "dics_model": {}}, "optimizer_state": {"state": {}}}
    saved = {
        "ema": trainer | {"ema_state_dict": {f"module.{name}": tensor for name, tensor in (state | filters).items()}},
        "trainer": trainer | {"ema_state_dict": {}, "state_dict": {"gen_model": state | filters, "dics_model": wrong}},
        "state dict": {"state_dict": state | filters},
        "plain": state | filters,
    }
    torch.save(saved[shape], tmp_path / "merged.ckpt")
    write_json(tmp_path / "config.json", read_json(FOLDER / "config.json"))
    loaded = load_wf_vae(tmp_path, "cpu", torch.float32).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


class Command:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_wf_vae(tmp_path)
    (tmp_path / "merged.ckpt").write_bytes(pickle.dumps({"state_dict": Command()}))
    with pytest.raises(UserError, match=r"merged\.ckpt: truncated or not a plain checkpoint"):
        load_wf_vae(tmp_path, "cpu", torch.float32)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ([1, 2], "not a checkpoint of WF-VAE"),
        ({"state_dict": [1, 2]}, "not a checkpoint of WF-VAE"),
        ({"ema_state_dict": [1]}, "not a checkpoint of WF-VAE"),
        ({"epoch": 3}, "encoder.connect_l1.weight is missing; give a checkpoint of WF-VAE"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, saved: object, says: str) -> None:
    write_wf_vae(tmp_path)
    torch.save(saved, tmp_path / "merged.ckpt")
    with pytest.raises(UserError) as caught:
        load_wf_vae(tmp_path, "cpu", torch.float32)
    assert str(tmp_path / "merged.ckpt") in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"_class_name": "CausalVAEModel"}, "not the config of a WFVAEModel"),
        ({"l1_dowmsample_block": "Spatial2xTime2x3DDownsample"}, "l1_dowmsample_block: 'Spatial2xTime2x3DDownsample'"),
        ({"decoder_energy_flow_hidden_size": 16}, "decoder_energy_flow_hidden_size is not base_channels"),
        ({"scale": [0.2]}, "scale and shift need latent_dim numbers each"),
        ({"norm_type": "groupnorm"}, "channels are not in 32 groups"),
        ({"norm_type": "batchnorm"}, "norm_type: Input should be 'layernorm' or 'groupnorm'"),
    ],
)
def test_other_configs_are_refused(tmp_path: Path, changed: dict, says: str) -> None:
    write_json(tmp_path / "config.json", read_json(FOLDER / "config.json") | changed)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value) and says in str(caught.value)


def test_missing_fields_take_the_references_defaults(tmp_path: Path) -> None:
    given = {"_class_name": "WFVAEModel", "_diffusers_version": "0.30.2", "scale": None, "new": 1}
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    config = read_config(tmp_path / "config.json")
    assert config == WFVAEConfig() and config.scale == (0.18215,) * 8
    assert (config.norm_type, config.t_interpolation, config.connect_res_layer_num) == ("groupnorm", "nearest", 1)


def test_a_folder_that_lacks_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no WF-VAE there \(config.json is missing\)"):
        load_wf_vae(tmp_path, "cpu", torch.float32)
    write_json(tmp_path / "config.json", read_json(FOLDER / "config.json"))
    with pytest.raises(UserError, match=r"no WF-VAE there \(merged.ckpt is missing\)"):
        load_wf_vae(tmp_path, "cpu", torch.float32)


# --- slices in time


def video_and_latents(frames: int) -> tuple[Tensor, Tensor]:
    """Float64, [1, 3, 4k + 1, 16, 24] and [1, 4, k + 1, 2, 3]."""
    draw = torch.Generator().manual_seed(frames)
    video = torch.rand(1, 3, 4 * (frames - 1) + 1, 16, 24, generator=draw, dtype=torch.float64)
    return 2 * video - 1, torch.randn(1, 4, frames, 2, 3, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("in_time", ["trilinear", "nearest"])
@pytest.mark.parametrize("frames", [1, 2, 3, 6, 8])
def test_slices_are_exact(in_time: str, frames: int) -> None:
    vae = build_wf_vae(small(t_interpolation=in_time), dtype=torch.float64)
    video, z = video_and_latents(frames)
    for at_once in (1, 2, 3, 5):
        for ours, whole in zip(vae.encode(video, at_once), vae.encode(video), strict=True):
            assert torch.allclose(ours, whole, rtol=0, atol=1e-12)
        assert torch.allclose(vae.decode(z, at_once), vae.decode(z), rtol=0, atol=1e-12)


def test_slices_bound_the_memory() -> None:
    """No layer sees more than a slice and the frames it kept, however long the video is."""
    vae, most = build_wf_vae(small()), 0

    def look(_: object, inputs: tuple[Tensor, ...]) -> None:
        nonlocal most
        most = max(most, inputs[0].shape[2])

    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_pre_hook(look)
    z = torch.randn(1, 4, 12, 1, 1)
    assert vae.decode(z, 2).shape == (1, 3, 45, 8, 8)
    assert most == 6  # 2 * 2 frames of a slice behind the upsampling, and 2 before them
    vae.decode(z)
    assert most == 25


def test_videos_are_causal() -> None:
    """A later frame changes no earlier latent; a later latent changes at most the frames of the one before it."""
    vae, (video, z) = build_wf_vae(small(), dtype=torch.float64), video_and_latents(4)
    mean, decoded = vae.encode(video)[0], vae.decode(z)
    video[:, :, 9:] = 0
    z[:, :, 3:] = 0
    assert torch.equal(vae.encode(video)[0][:, :, :3], mean[:, :, :3])
    assert torch.equal(vae.decode(z)[:, :, :7], decoded[:, :, :7])
    assert not torch.equal(vae.decode(z)[:, :, 7:9], decoded[:, :, 7:9])


@pytest.mark.parametrize("shape", [(4, 16, 16), (5, 12, 16)])
def test_other_sizes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=f"a video of {shape[0]} frames of {shape[1]}x{shape[2]}"):
        build_wf_vae(small()).encode(torch.zeros(1, 3, *shape))


# --- group norm


def test_group_norm() -> None:
    """Statistics are those of whole videos, of single frames in 2D blocks; there is one slice whatever is asked for."""
    torch.manual_seed(0)
    sizes = {"base_channels": 32, "encoder_energy_flow_hidden_size": 32, "decoder_energy_flow_hidden_size": 32}
    vae = build_wf_vae(small(norm_type="groupnorm", **sizes))
    names = vae.state_dict()
    assert "encoder.mid.1.norm.weight" in names and "decoder.norm_out.weight" in names
    video, x = torch.rand(1, 3, 9, 16, 16), torch.randn(2, 4, 3, 5, 64)
    assert torch.equal(vae.encode(video, 1)[0], vae.encode(video)[0])
    z = torch.randn(1, 4, 3, 2, 2)
    assert torch.equal(vae.decode(z, 1), vae.decode(z))
    norm = torch.nn.GroupNorm(32, 64, eps=1e-6)
    block = vae.encoder.down2[1]
    assert_close(block.norm1(x), norm(x.movedim(-1, 1)).movedim(1, -1), NETWORK)
    two = vae.encoder.down1[1]
    frames = torch.randn(1, 4, 6, 6, 32)
    together = two(frames, None)
    assert_close(together[:, 2:3], two(frames[:, 2:3], None), NETWORK)
    three = vae.encoder.down2[1].norm1(x)
    assert not torch.allclose(three[:, :2], vae.encoder.down2[1].norm1(x[:, :2]), atol=1e-2)


# --- bytes and the denoiser's latents


def test_videos_of_bytes(tmp_path: Path) -> None:
    vae = write_wf_vae(tmp_path, scale=(0.5, 0.25, 1, 2), shift=(0.1, 0, -1, 0))
    autoencoder, draw = VideoAutoencoder(tmp_path, "cpu"), torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 2, 2, 3, generator=draw)
    scale, shift = (torch.tensor(by)[:, None, None, None] for by in ((0.5, 0.25, 1.0, 2.0), (0.1, 0.0, -1.0, 0.0)))
    videos, broken = autoencoder.decode(noise)
    assert not broken.any()
    assert autoencoder.channels == 4 and videos.shape == (2, 3, 5, 16, 24) and videos.dtype == torch.uint8
    one_by_one = [to_bytes(vae.decode(z / scale + shift)) for z in noise.split(1)]
    assert torch.equal(videos, torch.cat(one_by_one))
    pixels = videos.float() / 127.5 - 1
    latents = autoencoder.encode(pixels, noise)
    mean, log_variance = vae.encode(pixels)
    assert_close(latents, (mean + (log_variance / 2).exp() * noise - shift) * scale, NETWORK)
    noise[1, 0, 0, 0, 0] = float("nan")
    assert autoencoder.decode(noise)[1].tolist() == [False, True]


def test_bytes_are_cut_off() -> None:
    levels = torch.tensor([[-2.0, -1.0, -1 + 1.9 / 127.5, 1 - 0.1 / 127.5, 1.0, 3.0]])
    assert to_bytes(levels).tolist() == [[0, 0, 1, 254, 255, 255]]


# --- speed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("at_once", [8, None])
def test_speed_in_16_bit(at_once: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    """93 frames of 256x256 in 1.5 s at most on an H100, near what float32 gives."""
    torch.manual_seed(0)
    config = WFVAEConfig(**V1_3_0)
    vae = build_wf_vae(config, device="cuda", dtype=torch.float16)
    z = torch.randn(1, 8, 24, 32, 32, device="cuda", dtype=torch.float16)
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        video = vae.decode(z, at_once)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    used = torch.cuda.max_memory_allocated() / 2**30
    exact = build_wf_vae(config, vae.state_dict(), device="cuda").decode(z.float())
    off = (video.float() - exact).abs().max() / exact.abs().max()
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}, slices of {at_once}: {min(seconds[1:]):.3f} s, at first "
            f"{seconds[0]:.1f} s, {used:.1f} GiB, off by {off:.1e} of the largest value"
        )
    assert video.shape == (1, 3, 93, 256, 256) and off < 0.02
    assert min(seconds[1:]) < 1.5
