"""Files as they are found in the wild: each kind in toy size gives what is right, or one line that names the cause."""

import argparse
import io
import json
import os
import pathlib
import re
import subprocess
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image, PngImagePlugin
from safetensors.torch import save, save_file
from torch import Tensor

from tcbench.data.images import list_images, read_rgb, to_square
from tcbench.data.prompts import coco_captions
from tcbench.data.videos import list_videos
from tcbench.errors import UserError
from tcbench.metrics.adm import read_moments, read_reference_images
from tcbench.models.networks import fill_transformer, load_transformer
from tcbench.models.specs import MODELS
from tcbench.models.weights import read_state
from tcbench.outside.foreign import read_text
from tcbench.registry import data_source
from tcbench.stages.images import image_side
from tests import official

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 334643268\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"

STAND_INS = [
    (b"", "it is empty"),
    (LFS, "it is a Git LFS pointer; run `git lfs pull`"),
    (PAGE, "it is a web page"),
    (b"Entry not found\n", "it is text that begins 'Entry not found'"),
    (b"\x1f\x8b\x08\x00\x00\x00", "it is a gzip archive; unpack it"),
]


def one_line(function: Callable[..., object], *arguments: object) -> str:
    """What a user reads instead of the result."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- images

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
GREY = COLOURS[..., 0]


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (6, 4), bits: int = 8, kind: int = 2) -> bytes:
    """A PNG, written chunk by chunk; `kind` as its header has it."""
    header = b"".join(number.to_bytes(4, "big") for number in size) + bytes([bits, kind, 0, 0, 0])
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in parts
    )


def rows(pixels: np.ndarray) -> tuple[bytes, bytes]:
    return b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels))


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees clockwise
    Image.fromarray(np.rot90(COLOURS, 1)).save(path, "PNG", exif=exif)


def animated(path: Path) -> None:
    frames = [Image.fromarray(pixels) for pixels in (COLOURS, 255 - COLOURS)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def transparent(path: Path) -> None:
    alpha = np.full((4, 6, 1), 255, np.uint8)
    alpha[0] = 0
    Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)).save(path, "PNG")


def palette(path: Path, **more: Any) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    image.putpalette(COLOURS.tobytes())
    image.save(path, "PNG", **more)


ON_WHITE = np.concatenate([np.full((1, 6, 3), 255, np.uint8), COLOURS[1:]])
SEE_THROUGH = np.where(np.arange(24).reshape(4, 6, 1) == 3, 255, COLOURS)
IN_GREY = GREY[..., None].repeat(3, axis=2)
CMYK = Image.fromarray(COLOURS).convert("CMYK")
LONG_TEXT = (b"zTXt", b"workflow\0\0" + zlib.compress(b"{" * 3_000_000))

READ: dict[str, tuple[Callable[[Path], object], np.ndarray]] = {
    "16 bit grey": (lambda p: Image.fromarray(GREY.astype(np.uint16) * 257).save(p, "PNG"), IN_GREY),
    "16 bit grey TIFF": (lambda p: Image.fromarray(GREY.astype(np.uint16) * 257).save(p, "TIFF"), IN_GREY),
    "16 bit PGM": (
        lambda p: p.write_bytes(b"P5 6 4 65535\n" + (GREY.astype(">u2") * 257).tobytes()),
        IN_GREY,
    ),
    "16 bit colours": (lambda p: p.write_bytes(png(rows(COLOURS.astype(">u2") * 257), bits=16)), COLOURS),
    "1 bit": (lambda p: Image.fromarray(GREY > 127).save(p, "PNG"), np.where(IN_GREY > 127, 255, 0)),
    "palette": (palette, COLOURS),
    "transparent palette": (lambda p: palette(p, transparency=3), SEE_THROUGH),
    "alpha": (transparent, ON_WHITE),
    "grey": (lambda p: Image.fromarray(GREY).save(p, "BMP"), IN_GREY),
    "CMYK": (lambda p: CMYK.save(p, "TIFF"), np.array(CMYK.convert("RGB"))),
    "EXIF rotation": (turned, COLOURS),
    "animation": (animated, COLOURS),
    "long text": (lambda p: p.write_bytes(png(LONG_TEXT, rows(COLOURS))), COLOURS),
    "WebP": (lambda p: Image.fromarray(COLOURS).save(p, "WEBP", lossless=True), COLOURS),
    "damaged EXIF": (lambda p: p.write_bytes(png((b"eXIf", b"II*\0\xff\xff"), rows(COLOURS))), COLOURS),
}


@pytest.mark.parametrize("kind", READ)
def test_images_are_read_as_they_are_shown(tmp_path: Path, kind: str) -> None:
    write, expected = READ[kind]
    path = tmp_path / "image.jpg"  # the content says what it is
    write(path)
    assert np.array_equal(np.array(read_rgb(path)), expected)


def test_an_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).convert("RGBA").save(tmp_path / "a.png")
    assert np.array_equal(np.array(read_rgb(tmp_path / "a.png")), COLOURS)


def half_a_jpeg(path: Path) -> None:
    official.draw_image(path, 0)
    path.write_bytes(path.read_bytes()[:700])


def loop(path: Path) -> None:
    path.symlink_to(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "floating point": (lambda p: Image.fromarray(GREY / np.float32(255)).save(p, "TIFF"), "holds floating-point"),
    "32 bit": (lambda p: Image.fromarray(GREY.astype(np.int32)).save(p, "TIFF"), "black and white are not known"),
    "white is 0": (
        lambda p: Image.fromarray(GREY.astype(np.uint16)).save(p, "TIFF", tiffinfo={262: 0}),
        "black and white are not known",
    ),
    "too large": (lambda p: p.write_bytes(png(size=(20_000, 20_000))), "has more pixels than are read"),
    "too much text": (
        lambda p: p.write_bytes(png((b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000))), rows(COLOURS))),
        "not a readable image",
    ),
    "truncated": (half_a_jpeg, "not a readable image (image file is truncated"),
    "loop of links": (loop, "cannot be read (Too many levels of symbolic links)"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "not found"),
    "folder": (lambda p: p.mkdir(), "cannot be read (Is a directory)"),
    "drawing in PostScript": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "text"),
    **{says: (lambda p, content=content: p.write_bytes(content), says) for content, says in STAND_INS},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_images_are_refused_in_a_line(tmp_path: Path, kind: str) -> None:
    write, says = REFUSED[kind]
    path = tmp_path / "image.jpg"
    write(path)
    said = one_line(read_rgb, path)
    assert said.startswith(f"{path}: ") and says in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_said_to_be(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    official.draw_image(folder / "a.png", 0)
    (folder / "a.png").chmod(0)
    assert "cannot be read (Permission denied)" in one_line(read_rgb, folder / "a.png")
    assert "cannot be read (Permission denied)" in one_line(read_state, folder / "a.png")
    folder.chmod(0)
    said = one_line(list_images, folder)
    folder.chmod(0o700)
    assert "cannot be listed (Permission denied)" in said


def drawn(folder: Path, *names: str | bytes) -> Path:
    """A folder with an image under every name."""
    for number, name in enumerate(names):
        official.draw_image(folder / os.fsdecode(name), number)
    return folder


def test_classes_that_are_numbers_count_by_value(tmp_path: Path) -> None:
    listing = list_images(drawn(tmp_path, *(f"{number}/a.png" for number in range(1000))))
    assert [path.parent.name for path in listing.paths] == [str(number) for number in range(1000)]
    assert listing.classes == tuple(range(1000)) and listing.num_classes == 1000


def test_names_of_any_kind_are_in_a_fixed_order(tmp_path: Path) -> None:
    names = ["a10.png", "a2.jpg", "a2.png", "A2.png", "²x.png", "2.PNG", "10.webp", b"\xff.png", "é.JPEG", "x{0}.tiff"]
    folder = drawn(tmp_path, *names)
    listing = list_images(folder)
    found = [os.fsencode(path.name) for path in listing.paths]
    assert sorted(found) == sorted(map(os.fsencode, names))  # stems may come twice: every file counts
    assert found[:2] == [b"2.PNG", b"10.webp"] and found.index(b"a2.png") < found.index(b"a10.png")
    assert next(listing.decoded(8, len(names))).shape == (len(names), 3, 8, 8)
    assert listing.digest == list_images(folder).digest


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    drawn(tmp_path, "1/a.png", "1/._a.png", "1/.b.jpg", ".cache/a.png", "__MACOSX/a.png")
    for name in (".DS_Store", "1/Thumbs.db", "1/desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    listing = list_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in listing.paths] == ["1/a.png"]
    assert listing.num_classes == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("1/b.heic", "1/b.heic: not one of .apng, .avif"),
        ("1/b", "1/b: not one of"),
        ("1/images/b.png", "1/images: a folder inside a class's folder"),
        ("labels.csv", "labels.csv: lies beside the classes' folders"),
    ],
)
def test_what_would_be_dropped_is_named(tmp_path: Path, name: str, says: str) -> None:
    drawn(tmp_path, "1/a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert says in one_line(list_images, tmp_path)


# --- the crop


def adm_crop(image: Image.Image, side: int) -> np.ndarray:
    """`center_crop_arr` of ADM, step by step on arrays: halves are means of 2 x 2 pixels."""
    pixels = np.array(image)
    while min(pixels.shape[:2]) >= 2 * side:
        high, wide = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = np.array(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BOX))
    factor = side / min(pixels.shape[:2])
    size = round(pixels.shape[1] * factor), round(pixels.shape[0] * factor)
    pixels = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(64, 40), (41, 67), (16, 16), (9, 5), (33, 32), (200, 31)])
def test_halving_is_adms_crop(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels)
    for side in (8, 16):
        expected = adm_crop(image, side)
        assert np.array_equal(np.array(to_square(image, side, "halving", Path("a.png"))), expected)
        assert np.array(to_square(image, side, "once", Path("a.png"))).shape == (side, side, 3)


def test_halves_are_means_of_boxes() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    means = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
    found = np.array(to_square(Image.fromarray(pixels), 16, "halving", Path("a.png")))
    assert np.abs(found - means).max() <= 1  # PIL rounds twice, after either direction
    once = np.array(to_square(Image.fromarray(pixels), 16, "once", Path("a.png")))
    assert not np.array_equal(once, found)


def test_an_endless_strip_is_refused_before_it_is_enlarged() -> None:
    strip = Image.new("RGB", (4_000_000, 1))
    assert "pixels when its short side has 64" in one_line(to_square, strip, 64, "halving", Path("a.png"))


def test_imagenet_is_halved_and_the_listing_says_so(tmp_path: Path) -> None:
    drawn(tmp_path, "1/a.png")
    once, halving = list_images(tmp_path), list_images(tmp_path, resize="halving")
    assert once.digest != halving.digest
    pixels = next(halving.decoded(8, 1))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, adm_crop(Image.open(tmp_path / "1/a.png").convert("RGB"), 8))
    for name in ("paper-dit-256", "paper-dit-512"):
        config = next(path for path in official.CONFIGS if path.stem == name).read_text(encoding="utf-8")
        assert "images: {folder: data/imagenet/train, resize: halving}" in config


def test_how_far_the_crops_are_apart(photos: list[Image.Image]) -> None:
    """The numbers of docs/user-files.md: on two photographs, and on latents of an autoencoder with random weights."""
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**levels, block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4).eval()
    page = (Path(__file__).parent.parent / "docs" / "user-files.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d+) \| \d \| (.*) \|$", page, re.MULTILINE)
    assert len(lines) == 4
    for side, said in lines:
        once, halving = (
            torch.stack([torch.from_numpy(np.array(to_square(photo, int(side), way, Path("a")))) for photo in photos])
            for way in ("once", "halving")
        )
        with torch.no_grad():
            latents = [vae.encode(part.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean for part in (once, halving)]
        pixels = (once.float() - halving.float()).abs()
        moved = (latents[0] - latents[1]).square().mean().sqrt() / latents[0].std()
        assert said == f"{pixels.mean():.1f} | {pixels.max():.0f} | {100 * moved:.0f} %"


@pytest.fixture
def photos() -> list[Image.Image]:
    """The two photographs that come with scikit-learn, 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


# --- checkpoints

TINY = MODELS["tiny-dit"]


class Config:
    """Of a training script; a user's own class, which is not at hand where the checkpoint is read."""

    def __init__(self) -> None:
        self.learning_rate = 1e-4


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return official.dit_layout(official.random_denoiser(TINY))


@pytest.fixture(scope="module")
def others() -> dict[str, Tensor]:
    return official.dit_layout(official.build_transformer(TINY, seed=2))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def inside(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("blocks.1.", "blocks.1._orig_mod."): tensor for key, tensor in state.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Any]] = {
    "bare": lambda state, _: state,
    "module.": lambda state, _: prefixed(state, "module."),
    "_orig_mod.": lambda state, _: prefixed(state, "_orig_mod."),
    "both": lambda state, _: prefixed(state, "module._orig_mod."),
    "both, turned": lambda state, _: {"model": prefixed(state, "_orig_mod.module.")},
    "blocks compiled": lambda state, _: inside(state),
    "model": lambda state, _: {"model": state, "step": 3},
    "state_dict": lambda state, _: {"state_dict": state, "epoch": torch.tensor(3)},
    "Lightning": lambda state, _: {"state_dict": prefixed(state, "model."), "hyper_parameters": Config()},
    "ema": lambda state, other: {"ema": state, "model": other},
    "PixArt-alpha's trainer": lambda state, other: {"state_dict": other, "state_dict_ema": prefixed(state, "module.")},
    "no ema": lambda state, _: {"model": state, "ema": None},
    "empty ema": lambda state, _: {"model": state, "ema": {}},
    "Lightning's module with an average": lambda state, other: {
        "state_dict": {**prefixed(other, "model."), **prefixed(state, "ema_model.module."), "vae.scale": torch.ones(3)}
    },
    "LitEma": lambda state, other: {
        "state_dict": prefixed(other, "model.")
        | {f"model_ema.{key.replace('.', '')}": tensor for key, tensor in state.items()}
        | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    },
    "ema_pytorch": lambda state, other: {
        **prefixed(state, "ema_model."),
        **prefixed(other, "online_model."),
        "step": torch.tensor([7]),
        "initted": torch.tensor([True]),
    },
    "AveragedModel": lambda state, _: {**prefixed(state, "module."), "n_averaged": torch.tensor(3)},
    "and an epoch": lambda state, _: state | {"epoch": 3},
    "settings": lambda state, _: {
        "model": state,
        "args": argparse.Namespace(out=pathlib.Path("x"), mine=Config(), rate=np.float32(1e-4), device=torch.device(0)),
    },
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrappings_of_trainers_are_taken_off(
    tmp_path: Path, weights: dict[str, Tensor], others: dict[str, Tensor], wrapping: str, capsys: Any
) -> None:
    torch.save(WRAPPED[wrapping](weights, others), tmp_path / "a.ckpt")
    state = read_state(tmp_path / "a.ckpt")
    assert state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in state)
    said = capsys.readouterr().err
    two = "ema", "PixArt-alpha's trainer", "Lightning's module with an average", "LitEma", "ema_pytorch"
    assert said.count("reads the averaged weights") == (wrapping in two)


def test_dits_training_checkpoint_is_loaded_with_its_average(tmp_path: Path, capsys: Any) -> None:
    model = official.random_denoiser(TINY)
    official.write_dit_training(tmp_path / "0400000.pt", model, official.build_transformer(TINY, seed=2))
    loaded = load_transformer(TINY, tmp_path / "0400000.pt")
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert capsys.readouterr().err == f"{tmp_path}/0400000.pt: reads the averaged weights, 'ema', not 'model'\n"


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "bin", "npz"])
def test_the_content_says_what_a_checkpoint_is(tmp_path: Path, weights: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    for write in (save_file, torch.save, partial(torch.save, _use_new_zipfile_serialization=False)):
        write({key: tensor.contiguous() for key, tensor in weights.items()}, path)
        state = read_state(path)
        assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_torchscript_gives_its_tensors(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3)
    torch.jit.save(torch.jit.trace(layer, torch.zeros(1, 2)), tmp_path / "a.pt")
    state = read_state(tmp_path / "a.pt")
    assert torch.equal(state["weight"], layer.weight) and torch.equal(state["bias"], layer.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_any_floating_point_becomes_the_models(tmp_path: Path, dtype: torch.dtype, write: Any) -> None:
    state = {key: tensor.detach().to(dtype) for key, tensor in official.random_denoiser(TINY).named_parameters()}
    write(state, tmp_path / "a.bin")
    loaded = dict(load_transformer(TINY, tmp_path / "a.bin").named_parameters())
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in state.items())


def shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """A folder as diffusers saves it, in two shards and their index."""
    folder.mkdir(exist_ok=True)
    names = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key].contiguous() for key in state if names[key] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + json.dumps({"weight_map": names}).encode())
    return index


def test_shards_are_read_by_their_folder_or_index(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    index = shards(tmp_path / "model", weights)
    for path in (index, index.parent):
        assert all(torch.equal(tensor, weights[key]) for key, tensor in read_state(path).items())
    (tmp_path / "model" / "part-1.safetensors").write_bytes(LFS)
    assert "part-1.safetensors: not a checkpoint: it is a Git LFS pointer" in one_line(read_state, index.parent)
    (tmp_path / "model" / "part-1.safetensors").unlink()
    assert "part-1.safetensors: not found, and the index lists it" in one_line(read_state, index.parent)
    save_file({"a": torch.ones(1)}, tmp_path / "model" / "part-1.safetensors")
    assert "part-1.safetensors: lacks " in one_line(read_state, index.parent)
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert "is no file beside it" in one_line(read_state, index.parent)
    index.write_text('{"metadata": {}}')
    assert "not an index of shards (weight_map: Field required)" in one_line(read_state, index.parent)
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    assert "pipeline; give its denoiser" in one_line(read_state, tmp_path / "pipeline")


BROKEN: dict[str, tuple[Any, str]] = {
    "int8": ({"a": torch.ones(2, dtype=torch.int8)}, "a holds int8: quantised weights"),
    "no names": ([torch.ones(2)], "not a state dict of tensors but a list"),
    "nothing": ({}, "not a state dict of tensors (holds nothing)"),
    "numbers": ({"a": 1, "b": {}}, "not a state dict of tensors (holds 'a', 'b')"),
    "nameless average": ({"ema": [torch.ones(2)], "model": {"a": torch.ones(2)}}, "'ema': not a state dict"),
    "a whole network": (torch.nn.Linear(2, 2), "not a state dict of tensors but objects of classes"),
    "twice": ({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}, "holds weights twice"),
    **{
        f"code: {name}": ({"model": {"a": torch.ones(1)}, "args": command}, "not a plain checkpoint: to read it is to")
        for name, command in {
            "system": Command(os.system, "touch executed"),
            "method": Command(Path.touch, Path("executed")),
            "eval": Command(eval, "open('executed', 'w')"),
            "call": Command(subprocess.call, ["touch", "executed"]),
        }.items()
    },
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("old", [False, True])
def test_other_checkpoints_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, old: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content, says = BROKEN[kind]
    torch.save(content, "a.pt", _use_new_zipfile_serialization=not old)
    said = one_line(read_state, Path("a.pt"))
    if not (old and kind == "a whole network"):  # what such a file names is not known beforehand
        assert says in said
    assert said.startswith("a.pt: ") and "trust" not in said and "weights_only" not in said
    assert not Path("executed").exists()


@pytest.mark.parametrize(("content", "says"), [*STAND_INS, (b"PK\x03\x04" + bytes(60), "truncated or not a plain")])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.ckpt"])
def test_what_stands_in_a_checkpoints_place_is_named(tmp_path: Path, content: bytes, says: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    said = one_line(load_transformer, TINY, tmp_path / name)
    assert said.startswith(f"{tmp_path / name}: ") and says in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state["proj_out_2.bias"].long(), "proj_out_2.bias holds int64, not floating-point"),
        (lambda state: state["proj_out_2.bias"][:, None], r"proj_out_2.bias has shape [32, 1], not [32]"),
    ],
)
def test_tensors_that_are_no_weights_are_named(tmp_path: Path, change: Any, says: str) -> None:
    state = {key: tensor.detach() for key, tensor in official.random_denoiser(TINY).named_parameters()}
    save_file(state | {"proj_out_2.bias": change(state).contiguous()}, tmp_path / "a.safetensors")
    assert says in one_line(load_transformer, TINY, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["dit-xl-2-256", "pixart-1024"])
def test_checkpoints_of_another_model_are_refused(tmp_path: Path, every_combination: bool, name: str) -> None:
    """In the other one's layout, and in the right one with a tensor of a wrong shape or missing: blocks are alike."""
    layouts = {"dit-xl-2-256": official.dit_layout, "pixart-1024": official.pixart_layout}
    spec, states = official.SPECS[name], {}
    for other, layout in layouts.items():
        states[other] = layout(official.random_denoiser(official.SPECS[other]))
    state, path = states[name], tmp_path / "a.pt"
    other = next(content for other, content in states.items() if other != name)
    for key in state.keys() - {"pos_embed"}:
        if not every_combination and re.match(r"blocks\.[1-9]", key):
            continue
        without = {other: tensor for other, tensor in state.items() if other != key}
        tensor = state[key]
        for wrong in ({}, {key: tensor[:-1]}, {key: tensor.flatten()[None]}, {key: torch.tensor(1.0)}):
            assert one_line(fill_transformer, spec, without | wrong, path).startswith(f"{path}: ")
    assert one_line(fill_transformer, spec, other, path).startswith(f"{path}: ")


def test_folders_cloned_without_large_files_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tcbench.models.pretrained import Autoencoder, TextEncoder

    monkeypatch.chdir(tmp_path)
    official.write_autoencoder(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(LFS)
    assert "it is a Git LFS pointer" in one_line(Autoencoder, tmp_path / "vae", 0.18215, "cpu")
    (tmp_path / "vae" / "config.json").write_bytes(PAGE)
    suite = official.small_suite(
        "paper-dit-256",
        {
            "model.latents": {"kind": "sd", "folder": str(tmp_path / "vae")},
            "rows": {"plain": {"method": "uncached", "nfe": 3}},
        },
    )
    assert "config.json: not the config of an autoencoder (Invalid JSON" in one_line(image_side, suite)
    official.write_t5(tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(LFS)
    assert "spiece.model: not weights or" in one_line(TextEncoder, tmp_path / "t5", 8, "cpu", torch.float32)


# --- reference batches


def batch(path: Path, **changed: Any) -> None:
    official.write_adm(path)
    with np.load(path) as file:
        np.savez(path, **{name: value for name, value in (dict(file) | changed).items() if value is not None})


def test_channels_may_come_first(tmp_path: Path) -> None:
    batch(tmp_path / "a.npz")
    images = read_reference_images(tmp_path / "a.npz")
    batch(tmp_path / "b.npz", arr_0=images.numpy())
    assert images.shape == (12, 3, 32, 32) and torch.equal(read_reference_images(tmp_path / "b.npz"), images)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "arr_0 holds float32, not uint8"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "arr_0 has shape [4, 8, 8], not"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "arr_0 has shape [0, 8, 8, 3], not"),
        ({"arr_0": None}, "lacks arr_0 (holds arr_1, mu, "),
        ({"arr_0": np.array([{}])}, "not a reference batch of ADM (Object arrays cannot be loaded)"),
        ({"mu": np.zeros(5)}, "mu and sigma have shapes [5] and [3, 3]"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "mu is of 5 features, and the suite's extractor has 3"),
        ({"mu_s": np.zeros(4, complex)}, "mu_s holds complex128"),
        ({"sigma": np.full((3, 3), np.nan)}, "sigma holds float64, or NaN"),
        ({"mu_s": np.zeros(0), "sigma_s": np.zeros((0, 0))}, "mu_s and sigma_s have shapes [0] and [0, 0]"),
    ],
)
def test_other_batches_are_refused_in_a_line(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    path = tmp_path / "a.npz"
    batch(path, **changed)
    reading = (read_reference_images, path) if "arr_0" in changed else (read_moments, path, 3, 4)
    assert says in one_line(*reading)


@pytest.mark.parametrize(("content", "says"), STAND_INS)
def test_what_stands_in_a_batchs_place_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    assert says in one_line(read_moments, tmp_path / "a.npz")


# --- texts

COCO = {
    "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
    "annotations": [{"id": 5, "image_id": 1, "caption": "a  dog\n"}, {"id": 6, "image_id": 2, "caption": "a cat"}],
}


def changed(part: str, number: int, **fields: Any) -> dict[str, Any]:
    """COCO's with fields of an entry changed, or removed if None."""
    copy = json.loads(json.dumps(COCO))
    copy[part][number] |= fields
    copy[part][number] = {key: value for key, value in copy[part][number].items() if value is not None}
    return copy


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_are_read_in_their_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(COCO, indent=1), encoding=encoding, newline="\r\n")
    assert coco_captions(path) == [(1, "a dog"), (2, "a cat")]
    path.write_text("Prompt\tCategory\nein Bär\tx\n\nto\u2028day\ty\n", encoding=encoding, newline="\r\n")
    assert data_source("partiprompts").prompts(path) == ("ein Bär", "to\u2028day")


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes("Prompt\nein Bär\n".encode("latin-1"))
    assert "is no text in UTF-8" in one_line(read_text, tmp_path / "a.tsv")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (changed("annotations", 1, id=None), "annotations.1.id: Field required"),
        (changed("annotations", 1, image_id=None), "annotations.1.image_id: Field required"),
        (changed("annotations", 0, caption=7), "annotations.0.caption: Input should be a valid string"),
        (changed("annotations", 0, caption=" \n"), "the first caption of image 1 is empty"),
        (changed("annotations", 0, image_id=9), "captions image 9, which `images` does not list"),
        (changed("images", 0, id=None), "images.0.id: Field required"),
        (changed("images", 0, id=2), "`images` lists a number twice"),
        (changed("images", 0, file_name="3.png"), "lacks 1 of the 2 images"),
        ([1], "not captions of MSCOCO"),
        ({"images": []}, "annotations: Field required"),
    ],
)
def test_captions_that_lack_something_are_refused(tmp_path: Path, content: Any, says: str) -> None:
    folder, path = drawn(tmp_path / "images", "1.png", "2.png"), tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    assert says in one_line(list_images, folder, path)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("Prompt\n \t\n", "prompt 1 is empty"),
        ("Category\tPrompt\nx\ta dog\nx\n", "prompt 2 is empty"),
        ("Text\na\n", "KeyError: 'Prompt'"),
        ("", "holds no prompts"),
    ],
)
def test_prompts_that_say_nothing_are_refused(tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "a.tsv").write_text(lines)
    assert says in one_line(data_source("partiprompts").prompts, tmp_path / "a.tsv")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"cap": "a dog"}, "0.path: Field required"),
        ({"path": 3, "cap": "a dog"}, "0.path: Input should be a valid string"),
        ({"path": "a.mp4", "cap": 3}, "0.cap."),
        ({"path": "a.mp4", "cap": "a dog", "frame_idx": "0"}, "0.frame_idx"),
        ({"path": "a.mp4", "cap": "a dog", "fps": "fast"}, "0.fps: Input should be a valid number"),
        ({"path": "a.mp4", "cap": "a dog", "crop": [1, 2]}, "0.crop."),
        ({"path": "/nowhere/a.mp4", "cap": "a dog"}, "lacks 1 of the 1 videos"),
        ({"path": "a.mp4", "cap": [" "]}, "describes no videos"),
    ],
)
def test_annotations_that_lack_something_are_refused(tmp_path: Path, entry: dict[str, Any], says: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    assert says in one_line(list_videos, tmp_path, tmp_path / "a.json", 24)


# --- bytes at random


def mutated(content: bytes, draw: np.random.Generator) -> bytes:
    """Some bytes changed, a stretch removed or repeated, or the end cut off."""
    changed = bytearray(content)
    start, length = int(draw.integers(len(content))), int(draw.integers(1, 40))
    match draw.integers(4):
        case 0:
            for place in draw.integers(len(content), size=int(draw.integers(1, 9))):
                changed[place] = draw.integers(256)
        case 1:
            del changed[start : start + length]
        case 2:
            changed[start:start] = changed[start : start + length]
        case 3:
            del changed[start:]
    return bytes(changed)


def image_files() -> list[bytes]:
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        Image.fromarray(COLOURS).save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        found.append(buffer.getvalue())
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a dog" * 50, zip=True)
    Image.fromarray(GREY.astype(np.uint16)).save(buffer := io.BytesIO(), "PNG", pnginfo=text)
    return [*found, buffer.getvalue()]


def checkpoint_files() -> list[bytes]:
    state = {"module.a.weight": torch.arange(6.0).reshape(2, 3), "module.b": torch.ones(2, dtype=torch.bfloat16)}
    found = [save(state)]
    for old in (False, True):
        content = {"ema": state, "args": argparse.Namespace(a=[1, "x"], b=Path("x"))} if not old else {"model": state}
        torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=not old)
        found.append(buffer.getvalue())
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("files", "read", "count"), [(image_files, read_rgb, 150), (checkpoint_files, read_state, 150)]
)
def test_no_bytes_end_in_a_traceback(tmp_path: Path, files: Any, read: Any, count: int) -> None:
    draw, path, outcomes = np.random.default_rng(0), tmp_path / "file", set()
    for content in files():
        for _ in range(count):
            path.write_bytes(mutated(content, draw))
            try:
                read(path)
                outcomes.add("read")
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}
