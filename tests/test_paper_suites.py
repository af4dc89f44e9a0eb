"""The suites of full-size captioned models: their configs, the files they name, prompts, text encoders and decoders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MT5Config, MT5EncoderModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tcbench.cli import main
from tcbench.config import Images, load_suite
from tcbench.costing import macs_of
from tcbench.data import to_uint8
from tcbench.data.prompts import read_prompts
from tcbench.errors import UserError
from tcbench.files import read_json, read_tensors, write_json
from tcbench.models.pretrained import Autoencoder, TextEncoder, clean_captions
from tcbench.needs import needs
from tcbench.stages.common import load_captions, load_decoder, load_examples
from tcbench.stages.render import _first_images
from tcbench.stages.sample import row_fingerprint, sample_rows
from tests.test_wf_vae import save_wf_vae

CONFIGS = sorted((Path(__file__).parent.parent / "config").glob("paper-*.yaml"))


# --- the configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_outside_file_is_described(path: Path) -> None:
    suite = load_suite(path)
    described = {str(file.path) for file in suite.files.values()}
    assert suite.latents is not None
    outside = [suite.weights, suite.text_encoder, suite.latents.folder, suite.prompts.file, suite.real]
    outside += [suite.extractor_weights, *(suite.training or Images(folder=suite.latents.folder)).model_dump().values()]
    assert {str(file) for file in outside if isinstance(file, str | Path)} <= described
    reads = {"text_encoder", "prompts"} if suite.data != "imagenet" else set()
    assert {need.name for need in needs(suite)} >= {"denoiser", "autoencoder"} | reads
    wanted = {"clip_score": "clip", "image_reward": "image_reward", "vbench": "vbench", "fid": "inception"}
    assert {wanted[metric] for metric in suite.metrics if metric in wanted} <= suite.files.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_cost_what_the_paper_says(path: Path) -> None:
    """Uncached and reduced steps by the paper's count, PixArt-alpha's padding aside (docs/reproduction-notes.md)."""
    suite = load_suite(path)
    off = 0.045 if suite.model == "pixart-256" else 0.003
    for name, row in suite.rows.items():
        if row.method in ("uncached", "fewer_steps") and row.paper:
            tmacs = macs_of(suite.model, suite.method(name), row.nfe)["paper_rule"] / 1e12
            assert tmacs == pytest.approx(row.paper.tmacs, rel=off, abs=0.01)  # the paper cuts digits off


def test_command_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = next(path for path in CONFIGS if path.stem == "paper-pixart-256-parti")
    missing = len(load_suite(config).files)
    assert main(["validate", str(config), "--files"]) == 1
    said = capsys.readouterr().out
    assert "missing denoiser: checkpoints/PixArt-XL-2-256x256.pth" in said and "not there; hf download PixArt" in said
    assert "here    prompts: prompts/PartiPrompts.tsv, 1632 prompts of partiprompts" in said
    suite = load_suite(config)
    assert suite.training and suite.training.captions
    for file in suite.files.values():
        monkeypatch.setenv("HOME", str(tmp_path))
        path = file.path.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.holds or path == suite.training.folder:
            path.mkdir()
            for name in file.holds[:-1]:
                (path / name).touch()
        else:
            path.touch()
    annotations = [{"image_id": 1, "id": 1, "caption": "one"}]
    write_json(suite.training.captions, {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": annotations})
    assert main(["validate", str(config), "--files"]) == 1
    said = capsys.readouterr().out
    assert f"3 of {missing + 1} missing" in said and "lacks pytorch_model.bin.index.json" in said
    assert "lacks 1 of the 1 images that data/coco/annotations/captions_train2017.json describes, 1.jpg" in said
    (suite.training.folder / "1.jpg").touch()
    for file in suite.files.values():
        for name in file.holds:
            (file.path / name).touch()
    assert main(["validate", str(config), "--files"]) == 0
    said = capsys.readouterr().out
    assert f"0 of {missing + 1} missing" in said and "data/coco/train2017, 1 images, trains predictor" in said


# --- prompts


def test_partiprompts_ship() -> None:
    prompts = read_prompts("partiprompts")
    assert len(prompts) == len(set(prompts)) == 1632
    assert prompts[0] == "bond" and all(prompt == prompt.strip() and "\t" not in prompt for prompt in prompts)


def test_first_captions_by_image(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 9, "id": 5, "caption": "nine,  later "},
        {"image_id": 2, "id": 7, "caption": "two\n"},
        {"image_id": 9, "id": 4, "caption": "nine "},
    ]
    write_json(tmp_path / "captions.json", {"annotations": annotations})
    assert read_prompts("coco", tmp_path / "captions.json") == ("two", "nine")


def test_vbench_prompts_once_each(tmp_path: Path) -> None:
    write_json(tmp_path / "full.json", [{"prompt_en": name, "dimension": []} for name in ("b", "a", "b")])
    assert read_prompts("vbench", tmp_path / "full.json") == ("b", "a")


def test_captions_are_cleaned_as_pixart_alphas() -> None:
    """Markup, addresses and brackets go, dashes and quotes are made alike, and the case is lowered."""
    given = ["A <b>Dog</b> (see www.dogs.com) – by @rex", "The corgi’s HEAD"]
    assert clean_captions(given) == ["a dog see - by", "the corgi's head"]
    prompts = read_prompts("partiprompts")
    changed = [old for old, new in zip(prompts, clean_captions(prompts), strict=True) if new != old.lower()]
    assert len(changed) == 25


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("coco", "{}", "not the prompts of coco (KeyError: 'annotations')"),
        ("vbench", "{", "not valid JSON"),
        ("vbench", "[]", "holds no prompts of vbench"),
        ("partiprompts", "Prompts\nbond\n", "not the prompts of partiprompts (KeyError: 'Prompt')"),
        ("coco", None, "not found; `tcbench validate CONFIG --files`"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    path = tmp_path / "prompts"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_prompts(name, path)
    assert str(path) in str(caught.value) and says in str(caught.value)


# --- text encoder and decoder, small and random, as transformers and diffusers save them


def save_text_encoder(folder: Path, kind: str = "t5") -> Any:
    words = ["<pad>", "</s>", "<unk>", "a", "high", "quality", "sun", "dog", "cat"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**sizes)) if kind == "t5" else MT5EncoderModel(MT5Config(**sizes))
    model.eval().save_pretrained(folder)
    return model


def save_decoder(folder: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    vae.eval().save_pretrained(folder)
    return vae


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_captions_are_padded_cut_and_masked(tmp_path: Path, kind: str) -> None:
    model = save_text_encoder(tmp_path, kind)
    text = TextEncoder(tmp_path, 4, "cpu", torch.float32)(["a dog", "a high quality sun dog cat", "cat"])
    assert text.states_RTC.shape == (3, 4, 32)
    assert text.mask_RT.sum(1).tolist() == [3, 4, 2]
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[8, 1]])).last_hidden_state
    assert torch.allclose(text.states_RTC[2, :2], alone[0], atol=1e-5)


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(UserError, match="a bert, not a T5 or mT5"):
        TextEncoder(tmp_path, 4, "cpu", torch.float32)
    with pytest.raises(UserError, match="nowhere: no text encoder there"):
        TextEncoder(tmp_path / "nowhere", 4, "cpu", torch.float32)
    with pytest.raises(UserError, match="nowhere: no autoencoder there"):
        Autoencoder(tmp_path / "nowhere", 1.0, "cpu")


def test_images_are_encoded_and_decoded(tmp_path: Path) -> None:
    vae, draw = save_decoder(tmp_path), torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(tmp_path, 0.5, "cpu")
    noise = torch.randn(2, 4, 4, 4, generator=draw)
    images = autoencoder.decode(noise)
    with torch.no_grad():
        assert torch.equal(images, to_uint8(vae.decode(noise / 0.5).sample))
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    latents = autoencoder.encode(images, noise)
    assert torch.allclose(latents, 0.5 * (posterior.mean + posterior.std * noise), atol=1e-5)


# --- from prompts to images


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small PixArt-alpha with everything random, on PartiPrompts."""
    monkeypatch.chdir(tmp_path)
    save_text_encoder(tmp_path / "t5")
    save_decoder(tmp_path / "vae")
    settings = yaml.safe_load(next(path for path in CONFIGS if "parti" in path.stem).read_text(encoding="utf-8"))
    settings |= {
        "suite": "mini", "model": "tiny-pixart", "weights": "random", "device": "cpu", "text_encoder": "t5",
        "latents": {"kind": "sd", "folder": "vae", "scale": 0.5}, "samples": 4, "batch_size": 2,
        "shard_batches": 1, "traced": 2, "training": None,
        "prompts": {"per_prompt": 3, "template": "high quality {}"}, "tables": {}, "figure": {"nfe": 3}, "files": {},
        "rows": {"plain": {"method": "uncached", "nfe": 3}, "ours": {"method": "tokencache", "nfe": 3,
                 "options": {"num_full_steps": 2, "beta": -20, "refiner_blocks": 1}}}, "defaults": {},
    }  # fmt: skip
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "mini.yaml"


def test_prompts_become_images(config: Path) -> None:
    suite = load_suite(config)
    sample_rows(suite, ("plain",))
    manifest = read_json(suite.folder / "samples" / "plain" / "row.json")
    prompts = read_prompts("partiprompts")
    assert manifest["captions"] == [prompts[0]] * 3 + [prompts[1]]
    tensors, _ = read_tensors(suite.folder / "samples" / "plain" / "shard-00000.safetensors")
    assert tensors["image"].shape == (2, 3, 32, 32) and tensors["image"].dtype == torch.uint8
    assert tensors["label"].tolist() == [0, 0] and tensors["xt"].shape == (3, 2, 4, 16, 16)
    assert manifest["resolution"] == 32
    captions = load_captions(suite)
    assert torch.equal(
        captions(torch.tensor([2])).states_RTC, captions.encoder([f"high quality {prompts[0]}"]).states_RTC
    )


def test_prompts_alone_train_nothing(config: Path) -> None:
    suite = load_suite(config)
    with pytest.raises(UserError, match="training: data 'partiprompts' bring no images to train on"):
        load_examples(suite, load_captions(suite))


@pytest.fixture
def videos(config: Path) -> Path:
    """A small Open-Sora-Plan with everything random, and its video autoencoder."""
    save_text_encoder(config.parent / "mt5", "mt5")
    save_wf_vae(config.parent / "wf", latent_dim=4, scale=(0.18215,) * 4, shift=(0.0,) * 4)
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings |= {
        "model": "tiny-osp", "text_encoder": "mt5", "latents": {"kind": "wf", "folder": "wf"},
        "solver": "euler_ancestral", "prompts": settings["prompts"] | {"negative": "a cat"},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return config


def test_prompts_become_videos(videos: Path) -> None:
    suite = load_suite(videos)
    sample_rows(suite, ("plain",))
    manifest = read_json(suite.folder / "samples" / "plain" / "row.json")
    tensors, _ = read_tensors(suite.folder / "samples" / "plain" / "shard-00000.safetensors")
    assert tensors["image"].shape == (2, 3, 5, 128, 64) and tensors["image"].dtype == torch.uint8
    assert manifest["resolution"] == 64 and tensors["xt"].shape == (3, 2, 4, 2, 16, 8)
    assert torch.equal(tensors["image"], load_decoder(suite)(tensors["xt"][-1]))
    shown = _first_images(suite.folder / "samples" / "plain", 3)
    assert shown.shape == (3, 128, 5 * 64, 3) and np.array_equal(
        shown[0, :, 64:128], tensors["image"][0, :, 1].permute(1, 2, 0).numpy()
    )
    before = row_fingerprint(suite, "plain")
    save_wf_vae(videos.parent / "wf", latent_dim=4, scale=(0.2,) * 4, shift=(0.0,) * 4)
    assert row_fingerprint(suite, "plain") != before


def test_what_cannot_be_decoded_is_said(videos: Path) -> None:
    suite = load_suite(videos)
    other = suite.model_copy(update={"latents": suite.latents.model_copy(update={"kind": "sd"})})
    with pytest.raises(UserError, match=r"latents.kind: tiny-osp was trained with kind 'wf'; write that"):
        load_decoder(other)
    save_wf_vae(videos.parent / "wf")
    with pytest.raises(UserError, match="wf: latents of 8 channels, and tiny-osp denoises 4"):
        load_decoder(suite)
    settings = yaml.safe_load(videos.read_text(encoding="utf-8"))
    settings["latents"]["scale"] = 0.5
    videos.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"latents.scale: WF-VAE's own config.json says it; remove it here"):
        load_suite(videos)
