"""Open-Sora-Plan's denoiser and WF-VAE against outputs of the reference code: the cases of tests/golden-video."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tcbench.cli import main
from tcbench.golden.check import check_case
from tcbench.models import wf_vae
from tcbench.models.networks import build_transformer
from tcbench.models.specs import MODELS
from tcbench.record.files import read_json, read_tensors, write_json, write_tensors

from .conftest import GOLDEN

WF_VAE, OSP = (GOLDEN.with_name("golden-video") / name for name in ("wfvae", "osp"))
OSP_WEIGHTS = 52801.19602990127


@pytest.fixture(scope="module")
def osp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser's cases, with the weights they were made with: drawn by name in alphabetical order and scaled."""
    folder = tmp_path_factory.mktemp("golden") / "osp"
    shutil.copytree(OSP, folder)
    config, full = read_json(OSP / "config.json"), read_json(OSP / "keys_v1_3_0.json")["shapes"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    sides = {2304: width, 6912: 3 * width, 9216: 4 * width, 13824: 6 * width, 4096: config["caption_channels"]}
    draw, state = torch.Generator().manual_seed(5), {}
    for name in sorted(full):
        shape = [sides.get(side, side) for side in full[name]]
        gain = 1.7 if name.endswith(("to_q.weight", "to_k.weight")) else 0.7 if "adaln_single.linear.w" in name else 1
        state[name] = torch.randn(shape, generator=draw)
        state[name] *= 0.05 if name.endswith("bias") else state[name][0].numel() ** -0.5
        state[name] *= gain
    # not a digest: with fewer instructions torch rounds what it draws otherwise
    size = sum(tensor.double().abs().sum().item() for tensor in state.values())
    assert size == pytest.approx(OSP_WEIGHTS, rel=1e-7), "torch draws other numbers than when the cases were made"
    write_tensors(folder / "diffusion_pytorch_model.safetensors", state)
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "compared"),
    [
        ("forward", "osp_forward", {"v_t999", "v_t500", "v_t19"}),
        ("sampling", "osp", {"timesteps", "latent_free_running"}),
    ],
)
def test_denoiser(osp: Path, name: str, kind: str, compared: set[str]) -> None:
    report = check_case(osp, name)
    assert report["passed"] and report["kind"] == kind and report["quantities"].keys() == compared, report


def test_names_and_shapes_of_the_denoiser_at_full_size() -> None:
    model = build_transformer(MODELS["osp-93x256"], device="meta")
    ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert ours == read_json(OSP / "keys_v1_3_0.json")["shapes"]


@pytest.mark.parametrize("name", ["frames_21", "image"])
def test_autoencoder(name: str) -> None:
    report = check_case(WF_VAE, name)
    compared = {"mean", "logvar", "latent", "decoded", "frames", "frames_that_differ"}
    assert report["passed"] and report["kind"] == "wf_vae" and report["quantities"].keys() == compared, report


def test_wavelets() -> None:
    report = check_case(WF_VAE, "wavelets")
    assert report["passed"] and report["quantities"].keys() == {"W3", "W3inv_of_W3", "W2", "W2inv_of_W2"}, report


def test_a_case_of_parts_names_its_inputs(tmp_path: Path) -> None:
    """For the path, not the values: expected is what this package computes, which the cases above hold."""
    for name in ("config.json", "weights.safetensors", "image.safetensors"):
        shutil.copy(WF_VAE / name, tmp_path)
    source = read_json(WF_VAE / "image.json")["source"]
    write_json(tmp_path / "inside.json", {"source": source, "of": "image: `video` encoded, `z` / 0.18215 decoded"})
    inputs = read_tensors(WF_VAE / "image.safetensors")[0]
    vae = wf_vae.build_wf_vae(
        wf_vae.read_config(WF_VAE / "config.json"), read_tensors(WF_VAE / "weights.safetensors")[0]
    )
    statistics = torch.cat(vae.encode(inputs["video"]), dim=1)
    subbands = vae.encoder.wavelet_in(inputs["video"].movedim(1, -1), wf_vae.Slice()).movedim(-1, 1)
    expected = {"encoder.conv_out": statistics[..., :16, :16], "W3(video)": subbands[..., :16, :16]}
    write_tensors(tmp_path / "inside.safetensors", expected)
    report = check_case(tmp_path, "inside")
    assert report["passed"] and report["kind"] == "wf_vae_parts" and len(report["quantities"]) == 2, report
    write_tensors(tmp_path / "inside.safetensors", expected | {"W3(video)": expected["W3(video)"] + 1e-3})
    assert not check_case(tmp_path, "inside")["passed"]


@pytest.mark.parametrize("mistake", [{"SPACE_TIME_HAAR": ((1, 2, 3), 8**-0.5)}, {"EPS": 1e-5}, "nearest"], ids=str)
def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mistake: dict | str) -> None:
    shutil.copytree(WF_VAE, tmp_path, dirs_exist_ok=True)
    if mistake == "nearest":
        write_json(tmp_path / "config.json", read_json(WF_VAE / "config.json") | {"t_interpolation": mistake})
    else:
        for constant, value in mistake.items():
            monkeypatch.setattr(wf_vae, constant, value)
    assert not check_case(tmp_path, "frames_21")["quantities"]["decoded"]["passed"]


def test_command_runs_a_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["golden", str(WF_VAE)]) == 0
    assert json.loads(capsys.readouterr().out)["cases"].keys() == {"frames_21", "image", "wavelets"}


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(WF_VAE, tmp_path, dirs_exist_ok=True)
    settings = read_json(WF_VAE / "image.json")
    for changed, says in (
        ({"quantities": None}, "image.json: quantities: not tolerances by quantity"),
        ({"of": "that one"}, "of: names no case"),
    ):
        write_json(tmp_path / "image.json", settings | changed)
        if "of" in changed:
            write_tensors(tmp_path / "image.safetensors", {"encoder.conv_out": torch.zeros(1)})
        assert main(["golden", str(tmp_path), "image"]) == 2
        assert says in capsys.readouterr().err
