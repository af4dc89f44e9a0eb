"""Whole calls of diffusers' pipelines at full size, with random weights, without and with a method on them: seconds.

    python -m tests.attach_times --out attach-times.json       # on a GPU, in two minutes
    python -m tests.attach_times --size toy                    # the same code on a CPU, in seconds

What somebody gains who writes `tcbench.enable_cache(pipe, ...)` and calls the pipeline as ever: in 16 bits, eager, the
pipeline's own scheduler, decoding included. What a method cannot touch, the scheduler and decoding, is in a call's
time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
)

import tcbench
from tcbench.models.networks import build_transformer
from tcbench.models.specs import MODELS
from tcbench.record.files import write_json
from tcbench.record.provenance import collect

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fora", {"interval": 3}),
    ("taylorseer", {"interval": 3, "order": 1}),
    ("duca", {"interval": 3}),
)
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "models": {"dit": "dit-xl-2-256", "pixart": "pixart-256"},
        "batch": 8,
        "steps": {"dit": 50, "pixart": 20},
        "vae": {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    },
    "toy": {
        "models": {"dit": "tiny-dit", "pixart": "tiny-pixart"},
        "batch": 2,
        "steps": {"dit": 6, "pixart": 6},
        "vae": {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 4},
    },
}
CALLS = 3  # behind the first


def make_pipeline(name: str, size: dict[str, Any], device: torch.device) -> tuple[Any, Callable[[], Any]]:
    """A pipeline, and its call on a fixed noise."""
    spec = MODELS[size["models"][name]]
    if name == "dit":
        spec = spec.model_copy(update={"num_classes": 1000})  # the pipeline's null class is the one behind
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = build_transformer(spec, device=device, dtype=dtype, seed=0, zero_init=False)
    vae = AutoencoderKL(**size["vae"]).eval().to(device, dtype)
    batch, steps = size["batch"], size["steps"][name]

    arguments: dict[str, Any]
    if name == "dit":
        pipe = DiTPipeline(transformer, vae, DDIMScheduler())
        arguments = {"class_labels": list(range(batch))}
    else:
        pipe = PixArtAlphaPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=DPMSolverMultistepScheduler()
        )
        states = torch.randn(batch, spec.caption_tokens, spec.caption_channels).to(device, dtype)
        mask, side = torch.ones(states.shape[:2], device=device), pipe.vae_scale_factor * spec.sample_size
        arguments = {
            **{"prompt_embeds": states, "prompt_attention_mask": mask},
            **{
                "negative_prompt": None,
                "negative_prompt_embeds": states.flip(1),
                "negative_prompt_attention_mask": mask,
            },
            **{"height": side, "width": side, "use_resolution_binning": False},
        }

    def call() -> Any:
        return pipe(**arguments, num_inference_steps=steps, generator=torch.Generator(device).manual_seed(0))

    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def seconds_of(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Of calls behind a first one, in which kernels are compiled."""
    taken = []
    for number in range(1 + CALLS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            taken.append(round(time.perf_counter() - started, 4))
    return taken


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Time everything; returns what was timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parsed = parser.parse_args(arguments)
    size, started = SIZES[parsed.size], time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"batch": size["batch"], "steps": size["steps"], "rows": []}
    for name in size["models"]:
        pipe, call = make_pipeline(name, size, device)
        plain = seconds_of(call, device)
        record["rows"].append({"pipeline": name, "method": None, "seconds": plain})
        for method, options in METHODS:
            with tcbench.enable_cache(pipe, method, **options) as cached:
                taken = seconds_of(call, device)
                summary = cached.summary()
            ratio = statistics.median(plain) / statistics.median(taken)
            record["rows"].append(
                {
                    "pipeline": name,
                    "method": method,
                    "options": options,
                    "seconds": taken,
                    "latency_ratio": round(ratio, 3),
                    "mac_ratio": round(summary.mac_ratio, 3),
                    "fused": summary.fused,
                    "cache_bytes": summary.cache_bytes,
                }
            )
            print(record["rows"][-1], flush=True)
    record["provenance"] = collect({"size": parsed.size}, [0], started)
    if parsed.out:
        write_json(parsed.out, record)
    return record


if __name__ == "__main__":
    main()
