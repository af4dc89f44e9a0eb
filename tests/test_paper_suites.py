"""The suites of full-size captioned models: their configs, the files they name, prompts, text encoders and decoders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

from tcbench.budget.costing import macs_of
from tcbench.cli import main
from tcbench.config.fields import Images
from tcbench.config.load import load_suite
from tcbench.config.needs import needs
from tcbench.config.suite import Suite
from tcbench.data import to_uint8
from tcbench.errors import NotRun, UserError
from tcbench.models.pretrained import Autoencoder, TextEncoder, clean_captions, weights_files
from tcbench.models.specs import MODELS
from tcbench.record.files import read_json, read_tensors, write_json
from tcbench.registry import data_source
from tcbench.report.schedule_table import table1
from tcbench.stages.conditioning import load_captions, load_examples
from tcbench.stages.images import autoencoder_digests, load_decoder
from tcbench.stages.readings import load_scorers
from tcbench.stages.ready import load_adapter, recorded_options
from tcbench.stages.render import _first_images
from tcbench.stages.sample import row_fingerprint, sample_rows
from tcbench.stages.score import score_rows
from tests import official
from tests.floors import NETWORK, assert_close
from tests.suites import altered

# --- the configs


@pytest.mark.parametrize("path", official.CONFIGS, ids=lambda path: path.stem)
def test_every_outside_file_is_described(path: Path) -> None:
    suite = load_suite(path)
    described = {str(file.path) for file in suite.files.values()}
    assert suite.model.latents is not None
    outside = [
        suite.model.weights,
        suite.model.text_encoder,
        suite.model.latents.folder,
        suite.data.prompts.file,
        suite.scoring.real,
    ]
    if "clip_score" in suite.scoring.metrics:
        outside.append(suite.scoring.clip.weights)
    if "image_reward" in suite.scoring.metrics:
        outside += [suite.scoring.image_reward.weights, suite.scoring.image_reward.tokenizer]
    training = suite.training.images or Images(folder=suite.model.latents.folder)
    outside += [suite.scoring.extractor_weights, training.folder, training.captions]
    assert {str(file) for file in outside if isinstance(file, str | Path)} <= described
    reads = {"text_encoder", "prompts"} if suite.data.name != "imagenet" else set()
    assert {need.name for need in needs(suite)} >= {"denoiser", "autoencoder"} | reads
    wanted = {"clip_score": "clip", "image_reward": "image_reward", "vbench": "vbench", "fid": "inception"}
    assert {wanted[metric] for metric in suite.scoring.metrics if metric in wanted} <= suite.files.keys()


@pytest.mark.parametrize("path", official.CONFIGS, ids=lambda path: path.stem)
def test_settings_cost_what_the_paper_says(path: Path) -> None:
    """Uncached and reduced steps by the paper's count, PixArt-alpha's padding aside (docs/reproduction-notes.md)."""
    suite = load_suite(path)
    off = 0.045 if suite.model.name == "pixart-256" else 0.003
    for name, row in suite.rows.items():
        if row.method in ("uncached", "fewer_steps") and row.paper:
            tmacs = macs_of(suite.model.name, suite[name].method, row.nfe)["paper_rule"] / 1e12
            assert tmacs == pytest.approx(row.paper.tmacs, rel=off, abs=0.01)  # the paper cuts digits off


@pytest.mark.parametrize("path", official.CONFIGS, ids=lambda path: path.stem)
def test_table_1_has_the_papers_line_for_every_setting_of_tokencache(path: Path) -> None:
    """Rows that leave #Full and beta to the method are scheduled by the paper's, and their records say so."""
    suite = load_suite(path)
    assert suite.adaptive_rows
    options = {name: recorded_options(suite[name]) for name in suite.adaptive_rows if not suite[name].row.full_steps_of}
    rows = [
        {"suite": suite.suite, "model": suite.model.name, "resolution": 256, "nfe": suite[name].nfe,
         "settings": said, "i_steps": range(said["num_full_steps"])}
        for name, said in options.items()
    ]  # fmt: skip
    stands_for = suite.about.stands_for
    table = table1(rows, differs="", stands_for=(stands_for.name, stands_for.resolution) if stands_for else None).tidy
    assert set(table["nfe"]) == {suite[name].nfe for name in suite.predictor_rows}
    published = table.dropna(subset="paper_beta")
    assert (published["beta"] == published["paper_beta"]).any() or published.empty


@pytest.mark.parametrize("path", official.CONFIGS, ids=lambda path: path.stem)
def test_every_rival_and_control_has_a_row_at_tokencaches_macs(path: Path) -> None:
    """Whether no setting is nearer, `tcbench validate --macs` says."""
    rows = load_suite(path).rows
    for name in [name for name, row in rows.items() if row.method == "tokencache" and not row.control]:
        matched = {row.method for row in rows.values() if row.target == name}
        assert matched >= {"fewer_steps", "fora", "toca", "random_tokens", "no_tokens"}, name
        alike = [row for row in rows.values() if row.method == "tokencache" and row.nfe == rows[name].nfe]
        assert any(row.options.get("cost_weight") == "auto" for row in alike), name


def test_command_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = next(path for path in official.CONFIGS if path.stem == "paper-pixart-256-parti")
    missing = len(load_suite(config).files)
    assert main(["validate", str(config), "--files"]) == 1
    said = capsys.readouterr().out
    assert "missing denoiser: checkpoints/PixArt-XL-2-256x256.pth" in said and "not there; hf download PixArt" in said
    assert "here    prompts: prompts/PartiPrompts.tsv, 1632 prompts of partiprompts" in said
    suite = load_suite(config)
    assert suite.training.images and suite.training.images.captions
    for file in suite.files.values():
        monkeypatch.setenv("HOME", str(tmp_path))
        path = file.path.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.holds or path == suite.training.images.folder:
            path.mkdir()
            for name in file.holds[:-1]:
                (path / name).touch()
        else:
            path.touch()
    annotations = [{"image_id": 1, "id": 1, "caption": "one"}]
    write_json(
        suite.training.images.captions, {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": annotations}
    )
    assert main(["validate", str(config), "--files"]) == 1
    said = capsys.readouterr().out
    assert f"3 of {missing + 1} missing" in said and "lacks pytorch_model.bin.index.json" in said
    assert "lacks 1 of the 1 images that data/coco/annotations/captions_train2017.json describes, 1.jpg" in said
    (suite.training.images.folder / "1.jpg").touch()
    for file in suite.files.values():
        for name in file.holds:
            (file.path / name).touch()
    assert main(["validate", str(config), "--files"]) == 0
    said = capsys.readouterr().out
    assert f"0 of {missing + 1} missing" in said and "data/coco/train2017, 1 images, trains predictor" in said


@pytest.mark.parametrize("path", official.CONFIGS, ids=lambda path: path.stem)
def test_every_official_file_is_read(path: Path, paper_folder: Path) -> None:
    """Inception and the images that it sees aside (`test_image_suites.py`)."""
    suite = altered(load_suite(path), {"model.device": "cpu", "model.dtype": "fp32"})
    for name in suite.files.keys() & ({"inception"} | official.NOT_HERE):
        suite.files[name].path.mkdir(parents=True)
    assert not [need for need in needs(suite) if need.problem]  # `validate` would say that 4 blocks are too few
    model = official.random_denoiser(MODELS[suite.model.name])
    assert all(map(torch.equal, load_adapter(suite).model.parameters(), model.parameters()))
    for held_out in (True, False):
        captions = load_captions(suite, held_out=held_out)
        assert captions is None or captions(torch.tensor([0])).states_RTC.isfinite().all()
    assert not any(isinstance(scorer, NotRun) for scorer in load_scorers(suite).values())
    size = {"sd": (32, 32), "wf": (5, 128, 64), "wan": (5, 64, 64)}[suite.model.latents.kind]
    latents = torch.zeros(1, *MODELS[suite.model.name].latent_shape)
    assert load_decoder(suite)(latents)[0].shape == (1, 3, *size)


# --- prompts


def test_partiprompts_ship() -> None:
    prompts = data_source("partiprompts").prompts()
    assert len(prompts) == len(set(prompts)) == 1632
    assert prompts[0] == "bond" and all(prompt == prompt.strip() and "\t" not in prompt for prompt in prompts)


def test_first_captions_by_image(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 9, "id": 5, "caption": "nine,  later "},
        {"image_id": 2, "id": 7, "caption": "two\n"},
        {"image_id": 9, "id": 4, "caption": "nine "},
    ]
    write_json(tmp_path / "captions.json", {"annotations": annotations})
    assert data_source("coco").prompts(tmp_path / "captions.json") == ("two", "nine")


def test_vbench_prompts_once_each(tmp_path: Path) -> None:
    write_json(tmp_path / "full.json", [{"prompt_en": name, "dimension": []} for name in ("b", "a", "b")])
    assert data_source("vbench").prompts(tmp_path / "full.json") == ("b", "a")


def test_captions_are_cleaned_as_pixart_alphas() -> None:
    """Markup, addresses and brackets go, dashes and quotes are made alike, and the case is lowered."""
    given = ["A <b>Dog</b> (see www.dogs.com) – by @rex", "The corgi’s HEAD"]
    assert clean_captions(given) == ["a dog see - by", "the corgi's head"]
    prompts = data_source("partiprompts").prompts()
    changed = [old for old, new in zip(prompts, clean_captions(prompts), strict=True) if new != old.lower()]
    assert len(changed) == 25


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("coco", "{}", "not captions of MSCOCO (annotations: Field required)"),
        ("vbench", "{", "not the prompts of vbench (Invalid JSON: "),
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
        data_source(name).prompts(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


# --- text encoder and decoder, as published


RARE = "日本 a 🐶"
CAPTIONS = ("a dog", "A high quality photo of the sun, a dog and a cat", "", "ﬁne\tＡ  ½", RARE, "</s> <extra_id_0>")


@pytest.mark.parametrize("write", [official.write_t5, official.write_mt5])
def test_captions_are_cut_padded_and_masked(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    encoder = write(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    text_encoder = TextEncoder(tmp_path, 12, "cpu", torch.float32)
    text = text_encoder(CAPTIONS)
    ids, mask = text_encoder.tokenize(CAPTIONS)
    assert text.states_RTC.shape == (len(CAPTIONS), 12, 32) and torch.equal(text.mask_RT, mask)
    for caption, row, shown, states in zip(CAPTIONS, ids.tolist(), mask, text.states_RTC, strict=True):
        expected = [*pieces.encode(caption)[:11], 1]  # the end is kept where a caption is cut
        assert row == expected + [0] * (12 - len(expected)) and shown.sum() == len(expected)
        with torch.no_grad():
            alone = encoder(input_ids=torch.tensor([expected])).last_hidden_state[0]
        assert_close(states[: len(expected)], alone, NETWORK)
    assert mask[1].all() and mask[2].sum() == 1
    assert (2 in pieces.encode(RARE)) == (write is official.write_t5)  # mT5 has bytes in the place of "unknown"


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(UserError, match="a bert, not a T5, mT5 or UMT5"):
        TextEncoder(tmp_path, 4, "cpu", torch.float32)
    with pytest.raises(UserError, match="nowhere: no text encoder there"):
        TextEncoder(tmp_path / "nowhere", 4, "cpu", torch.float32)
    with pytest.raises(UserError, match="nowhere: no autoencoder there"):
        Autoencoder(tmp_path / "nowhere", 1.0, "cpu")


def forget(folder: Path, name: str) -> None:
    """Leave a tensor out of the first shard that has it."""
    for path in folder.glob("pytorch_model-*.bin"):
        state = torch.load(path)
        state.pop(name, None)
        torch.save(state, path)


def of_another(folder: Path) -> None:
    """Take the config of an encoder with fewer words."""
    for path in folder.glob("pytorch_model-*.bin"):
        state = torch.load(path)
        torch.save({key: tensor[:400] if tensor.shape[0] == 512 else tensor for key, tensor in state.items()}, path)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vocab_size": 400})


SECOND = "pytorch_model-00002-of-00002.bin"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "spiece.model").unlink(), r"no text encoder there \(.*spiece\.model"),
        (lambda folder: (folder / "spiece.model").write_bytes(b"\x0a\xff"), r"no text encoder there \(.*ModelProto"),
        (lambda folder: (folder / SECOND).unlink(), rf"no text encoder there \(.*{SECOND}"),
        (
            lambda folder: (folder / SECOND).write_bytes(b"PK\x03\x04"),
            r"no text encoder there \(.+\); download its whole folder",
        ),
        (
            lambda folder: forget(folder, "encoder.final_layer_norm.weight"),
            "lack encoder.final_layer_norm.weight, which",
        ),
        (of_another, "spiece.model has 500 pieces, and the encoder knows 400"),
    ],
    ids=["no pieces", "no pieces inside", "no shard", "no archive", "no tensor", "other pieces"],
)
def test_incomplete_encoders_are_refused(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    official.write_t5(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}: .*{says}"):
        TextEncoder(tmp_path, 4, "cpu", torch.float32)


@pytest.mark.parametrize("pickled", [False, True])
def test_images_are_encoded_and_decoded(tmp_path: Path, pickled: bool) -> None:
    vae, draw = official.write_autoencoder(tmp_path, pickled), torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(tmp_path, 0.5, "cpu")
    noise = torch.randn(2, 4, 4, 4, generator=draw)
    images, broken = autoencoder.decode(noise)
    assert not broken.any()
    with torch.no_grad():
        assert torch.equal(images, to_uint8(vae.decode(noise / 0.5).sample))
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    latents = autoencoder.encode(images, noise)
    assert_close(latents, 0.5 * (posterior.mean + posterior.std * noise), NETWORK)
    assert [path.suffix for path in weights_files(tmp_path)] == [".bin" if pickled else ".safetensors"]


# --- from prompts to images


@pytest.fixture
def suite(paper_folder: Path) -> Suite:
    """PixArt-alpha at 1024x1024, but small, with few prompts."""
    return official.small_suite(
        "paper-pixart-1024",
        {"samples.count": 4, "samples.batch_size": 2, "samples.shard_batches": 1,
         "data.prompts": {"per_prompt": 3, "template": "high quality {}"},
         "rows": {"plain": {"method": "uncached", "nfe": 3}}},
    )  # fmt: skip


def test_prompts_become_images_and_scores(suite: Suite) -> None:
    sample_rows(suite.entries)
    manifest = read_json(suite.folder / "samples" / "plain" / "row.json")
    prompts = data_source("partiprompts").prompts()
    assert manifest["captions"] == [prompts[0]] * 3 + [prompts[1]]
    parts = [read_tensors(path)[0] for path in sorted((suite.folder / "samples" / "plain").glob("*.safetensors"))]
    assert parts[0]["image"].shape == (2, 3, 32, 32) and parts[0]["image"].dtype == torch.uint8
    assert parts[0]["label"].tolist() == [0, 0] and parts[0]["xt"].shape == (3, 2, 4, 16, 16)
    assert manifest["resolution"] == 32
    captions = load_captions(suite)
    assert torch.equal(
        captions(torch.tensor([2])).states_RTC, captions.encoder([f"high quality {prompts[0]}"]).states_RTC
    )
    score_rows(suite.entries)
    quality, scorers = read_json(suite.folder / "scores" / "plain.json")["quality"], load_scorers(suite)
    images = torch.cat([part["image"] for part in parts])
    for name in ("clip_score", "image_reward"):
        expected = scorers[name](images, manifest["captions"])
        assert expected.std() > 0 and quality[name]["value"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_prompts_alone_train_nothing(suite: Suite) -> None:
    suite = altered(suite, {"training.images": None})
    with pytest.raises(UserError, match=r"training\.images: data 'partiprompts' bring no images to train on"):
        load_examples(suite, load_captions(suite))


@pytest.fixture
def videos(paper_folder: Path) -> Suite:
    """Open-Sora-Plan, but small, with few prompts, and an autoencoder that the test may change."""
    official.write_wf_vae(Path("vae"))
    return official.small_suite(
        "paper-osp",
        {"samples.count": 6, "samples.batch_size": 2, "samples.shard_batches": 1,
         "model.latents": {"kind": "wf", "folder": "vae"}, "rows": {"plain": {"method": "uncached", "nfe": 3}}},
    )  # fmt: skip


def test_prompts_become_videos(videos: Suite) -> None:
    """The negative prompt stands where the caption is left out."""
    sample_rows(videos.entries)
    folder, spec = videos.folder / "samples" / "plain", MODELS[videos.model.name]
    manifest = read_json(folder / "row.json")
    assert manifest["captions"] == ["a dog"] * 5 + ["two cats"] and manifest["resolution"] == 64
    captions = load_captions(videos)
    asked = captions(torch.tensor([0]))
    assert torch.equal(asked.states_RTC, captions.encoder(["high quality, high aesthetic, a dog"]).states_RTC)
    assert torch.equal(asked.negative.states_RTC, captions.encoder([videos.data.prompts.negative]).states_RTC)
    tensors, _ = read_tensors(folder / "shard-00000.safetensors")
    assert tensors["image"].shape == (2, 3, 5, 128, 64) and tensors["image"].dtype == torch.uint8
    assert tensors["xt"].shape == (3, 2, *spec.latent_shape) and tensors["xt"].isfinite().all()
    assert torch.equal(tensors["image"], load_decoder(videos)(tensors["xt"][-1])[0])
    shown = _first_images(folder, 3)
    reduced = tensors["image"][0, :, 1].float().unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)).round()
    assert shown.shape == (3, 64, 5 * 32, 3)
    assert np.array_equal(shown[0, :, 32:64], reduced.permute(1, 2, 0).numpy())
    assert autoencoder_digests(videos).keys() == {"config.json", "merged.ckpt"}
    before = row_fingerprint(videos["plain"])
    official.write_wf_vae(Path("vae"), scale=(0.2,) * 4)
    assert row_fingerprint(videos["plain"]) != before


def test_what_cannot_be_decoded_is_said(videos: Suite) -> None:
    other = altered(videos, {"model.latents": videos.model.latents.model_copy(update={"kind": "sd"})})
    with pytest.raises(UserError, match=r"latents.kind: osp-93x256 was trained with kind 'wf'; write that"):
        load_decoder(other)
    official.write_wf_vae(Path("vae"), latent_dim=8, scale=(1.0,) * 8, shift=(0.0,) * 8)
    with pytest.raises(UserError, match="vae: latents of 8 channels, and osp-93x256 denoises 4"):
        load_decoder(videos)
    with pytest.raises(UserError, match=r"latents.scale: its own config.json says it; remove it here"):
        official.small_suite("paper-osp", {"model.latents": {"kind": "wf", "folder": "vae", "scale": 0.5}})
