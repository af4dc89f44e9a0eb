"""Open-Sora-Plan's clips of 93 frames of 256x256 at full size, with random weights: seconds and peak memory.

    python -m tests.full_size_clip --out clip.json             # on a GPU, in minutes
    python -m tests.full_size_clip --size toy --steps 4        # the same code on a CPU, in seconds

What `tcbench sample config/paper-osp.yaml` does behind the text encoder: batches of two clips, guided, in 16 bits, by
captured steps after the first, decoded by WF-VAE from a checkpoint in the published layout, and written as mp4. Few
steps suffice, because a step of a kind takes as long as any other. It prints a line after every part, and keeps what it
has measured in `--out`. Random weights make noise, which is the worst case for an mp4's size and time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tcbench.batches import Batches, Row
from tcbench.budget.untrained import random_captions, untrained_artefacts
from tcbench.errors import UserError
from tcbench.models.networks import build_transformer, make_adapter
from tcbench.models.specs import MODELS
from tcbench.models.wf_vae import BLOCKS, WEIGHTS, VideoAutoencoder, WFVAEConfig, build_wf_vae
from tcbench.precision import set_products, weights_dtype
from tcbench.record.files import write_json
from tcbench.record.provenance import collect
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings

SIZES: dict[str, dict[str, Any]] = {
    "full": {"model": "osp-93x256", "vae": {}, "refiners": 4, "dtypes": ("fp16", "bf16")},
    "toy": {
        "model": "tiny-osp",
        "vae": {
            "latent_dim": 4,
            "base_channels": 8,
            "encoder_energy_flow_hidden_size": 4,
            "decoder_energy_flow_hidden_size": 8,
            "scale": (0.18215,) * 4,
            "shift": (0.0,) * 4,
        },
        "refiners": 1,
        "dtypes": ("fp32",),
    },
}
V1_3_0 = {"connect_res_layer_num": 2, "norm_type": "layernorm", "t_interpolation": "trilinear"}
BATCH = 2  # clips, as in config/paper-osp.yaml
FRACTION_FULL = 18 / 50  # of TokenCache's steps, as there
SOLVER = "euler_ancestral"
SLICES = 8, None  # latent frames that are decoded at once


class Measurements:
    """What was measured so far, by part; each is printed when it is known."""

    def __init__(self, device: torch.device, out: Path | None) -> None:
        self.device, self.out = device, out
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.record: dict[str, Any] = {"device": name, "torch": torch.__version__}
        self.began = time.time()

    def keep(self, part: str, **measured: Any) -> None:
        """Print and write."""
        self.record[part] = measured
        self.record["provenance"] = collect({}, [0], self.began)
        print(f"{part}: {json.dumps(measured)}", flush=True)
        if self.out:
            write_json(self.out, self.record)

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float, float | None]:
        """(what `work` returns, seconds, peak GiB on a GPU)."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = round(time.perf_counter() - started, 3)
        return result, seconds, round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None


def random_autoencoder(size: dict[str, Any], device: torch.device, dtype: Any) -> VideoAutoencoder:
    """WF-VAE with random weights, written and read as it is published."""
    torch.manual_seed(0)
    config = WFVAEConfig(**V1_3_0, **size["vae"])
    with tempfile.TemporaryDirectory() as folder:
        named = {"_class_name": "WFVAEModel", **BLOCKS, **config.model_dump(mode="json")}
        write_json(Path(folder) / "config.json", named)
        saved = {"state_dict": {"gen_model": build_wf_vae(config).state_dict()}, "ema_state_dict": {}}
        torch.save(saved, Path(folder) / WEIGHTS)
        return VideoAutoencoder(Path(folder), device, dtype)


def measure_autoencoder(measured: Measurements, autoencoder: VideoAutoencoder, latents: Tensor) -> Tensor:
    """Decode and encode one clip; returns its bytes."""
    vae, one = autoencoder.vae, latents[:1].to(autoencoder.device, autoencoder.dtype)
    for at_once in SLICES:
        runs = [measured.timed(lambda at_once=at_once: vae.decode(one, at_once)) for _ in range(4)]
        measured.keep(
            f"decode, slices of {at_once}",
            first_s=runs[0][1],
            s=min(run[1] for run in runs[1:]),
            peak_gib=max((run[2] for run in runs if run[2]), default=None),
        )
    if autoencoder.dtype != torch.float32:
        exact = build_wf_vae(vae.config, vae.state_dict(), device=autoencoder.device).decode(one.float(), SLICES[0])
        off = (runs[-1][0].float() - exact).abs().max() / exact.abs().max()
        measured.keep("decode, error of 16 bits", share_of_largest_value=round(off.item(), 5))
    (videos, broken), seconds, peak = measured.timed(lambda: autoencoder.decode(latents[:1]))
    shape = list(videos.shape)
    measured.keep("decode to bytes", s=seconds, peak_gib=peak, shape=shape, broken=bool(broken.any()))
    pixels = videos.float() / 127.5 - 1
    _, seconds, peak = measured.timed(lambda: autoencoder.encode(pixels, torch.zeros_like(latents[:1])))
    measured.keep("encode", s=seconds, peak_gib=peak)
    return videos.cpu()


def measure_files(measured: Measurements, videos: Tensor) -> None:
    """An mp4 of one clip."""
    try:
        from tcbench.record.videos import packed

        tensors, seconds, _ = measured.timed(lambda: packed(videos.numpy(), 18))
    except ImportError:
        measured.keep("mp4", not_run="needs the package av")
        return
    kept = list(tensors["image"].shape)
    measured.keep("mp4", s=seconds, bytes=int(tensors["mp4_bytes"][0]), kept=kept, raw_bytes=videos.nbytes)


def measure_rows(measured: Measurements, size: dict[str, Any], steps: int, dtype: Any, autoencoder: Any) -> None:
    """An uncached row and TokenCache, in one dtype."""
    spec = MODELS[size["model"]]
    set_products(dtype)
    build = partial(
        build_transformer, spec, device=measured.device, dtype=weights_dtype(dtype), seed=0, zero_init=False
    )
    model, seconds, _ = measured.timed(build)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured.keep(f"{dtype} denoiser", build_s=seconds, parameters=parameters)
    full = max(2, round(FRACTION_FULL * steps))
    cached = {"num_full_steps": full, "refiner_blocks": size["refiners"], "beta": -8000}
    for name, options in {"uncached": {}, "tokencache": cached}.items():
        adapter, method = make_adapter(model, spec), make_method(name, options)
        artefacts, settings = untrained_artefacts(adapter, method, steps, 0), SamplerSettings(7.5, solver=SOLVER)
        row = Row(name, adapter, method, steps, settings, artefacts, random_captions(spec, 0))
        measured.keep(f"{dtype} {name}", **measure_row(measured, Batches(row, autoencoder.decode)))


def measure_row(measured: Measurements, batches: Batches) -> dict[str, Any]:
    """Three batches, decoded: the first, one that is captured and one that is replayed."""
    seconds, peaks = [], []
    try:
        for number in range(3):
            index = torch.arange(number * BATCH, (number + 1) * BATCH)
            samples, took, peak = measured.timed(lambda index=index: batches(index)())
            seconds.append(took)
            peaks.append(peak)
    except (UserError, torch.OutOfMemoryError) as error:
        return {"not_run": str(error).splitlines()[0], "batches_s": seconds}
    return {
        "steps": batches.row.nfe,
        "clips": BATCH,
        "batches_s": seconds,
        "peak_gib": peaks,
        "tmacs": round(cast(int, samples.macs["per_sample"]) / 1e12, 4),
        "shape": list(samples.image.shape),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure everything; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--steps", type=int, default=10, help="of 50")
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), action="append", help="of the denoiser; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="a JSON file")
    parsed = parser.parse_args(arguments)
    size = SIZES[parsed.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = Measurements(device, parsed.out)
    spec = MODELS[size["model"]]
    autoencoder, seconds, _ = measured.timed(lambda: random_autoencoder(size, device, size["dtypes"][0]))
    parameters = sum(parameter.numel() for parameter in autoencoder.vae.parameters())
    measured.keep("autoencoder", written_and_read_s=seconds, parameters=parameters)
    latents = torch.randn(BATCH, *spec.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        videos = measure_autoencoder(measured, autoencoder, latents)
    measure_files(measured, videos)
    for dtype in parsed.dtype or size["dtypes"]:
        measure_rows(measured, size, parsed.steps, dtype, autoencoder)
    return measured.record


if __name__ == "__main__":
    main()
