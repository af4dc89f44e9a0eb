"""What a method holds between steps, without a run: the engine itself, on tensors that have shapes and no values."""

from dataclasses import replace

import torch
from torch import Tensor

from tcbench.budget.untrained import random_captions, untrained_artefacts
from tcbench.method import Method
from tcbench.models.networks import build_transformer, make_adapter
from tcbench.models.specs import MODELS
from tcbench.precision import Dtype, weights_dtype
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Passes, default_prompts, start_run

FAR = 1e6
"""What is read on the host in the place of a number: everything has moved far, so that it is computed and stored."""


@torch.inference_mode()
def cache_bytes(model: str, method: Method, nfe: int, dtype: Dtype = "fp32") -> int:
    """Bytes that are held for one sample at the end of a run, all of its rows, as `Samples.cache_bytes` counts them.

    Exact where plans follow from shapes; of what is decided on the host, the dearest outcome of every step is taken.
    What is trained has stand-ins of the right shapes.

    Args:
        nfe: steps of the uncached sampler.
        dtype: what the model computes in.
    """
    spec, index = MODELS[model], torch.arange(1)
    adapter = make_adapter(build_transformer(spec, device="meta", dtype=weights_dtype(dtype), zero_init=False), spec)
    artefacts = untrained_artefacts(adapter, method, nfe, seed=0, open_branches=0)
    _, run = start_run(adapter, method, nfe, SamplerSettings(1.0), index, artefacts)
    passes = Passes(adapter, replace(run, sample_index=index), method.start)
    for engine in passes.engines:
        engine.read = _far
    captions = random_captions(spec, seed=0)
    prompt = captions(index) if captions else default_prompts(adapter, index)
    passes.prepare(prompt.to("meta"))
    latent = torch.empty(1, *spec.latent_shape, device="meta")
    for step in range(run.nfe):
        passes(step, latent)
    return passes.cache_bytes


def _far(value: Tensor) -> float:
    return FAR
