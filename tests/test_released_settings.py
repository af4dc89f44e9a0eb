"""Settings of others' code at their limits, which no stored case has."""

from itertools import pairwise

import torch

from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Samples, sample_batch

from .conftest import make_adapter

NFE = 20


def sampled(name: str, **options: object) -> Samples:
    settings = SamplerSettings(guidance_scale=1.5)
    return sample_batch(make_adapter("tiny-dit"), make_method(name, options), NFE, settings, torch.arange(2))


def test_without_a_cap_seacache_skips_while_the_latent_moves_little() -> None:
    capped, free = (sampled("seacache", threshold=2.0, max_continuous=cap).plans.i_steps for cap in (2, None))
    gaps = [[stop - start for start, stop in pairwise(steps)] for steps in (capped, free)]
    assert max(gaps[0]) == 3 < max(gaps[1])
    assert free[0] == 0 and free[-1] == NFE - 1
    nothing_forced = sampled("seacache", threshold=2.0, max_continuous=None, first_steps=0, last_steps=0)
    assert nothing_forced.plans.i_steps == free[:-1], "the first step has nothing to hold"


def test_dbcache_of_one_block_without_warm_up_is_the_first_block_cache() -> None:
    """cache-dit's F1 B0 W0 is diffusers' first-block cache, bit for bit."""
    of_diffusers = sampled("first_block", threshold=0.4)
    of_cache_dit = sampled("dbcache", threshold=0.4, first_blocks=1, warmup_steps=0)
    assert of_cache_dit.image.equal(of_diffusers.image)
    assert 1 < len(of_cache_dit.plans.i_steps) < NFE, "some steps are skipped, some are not"


def test_ducas_linear_layerwise_shares_fall_with_depth() -> None:
    """R (1.4 - 0.8 s / S)(1.8 - 1.6 l / (L - 1)) 2.5, s steps to go."""
    method = make_method("duca", {"fresh_ratio": 0.08, "schedule": "ddpm250"})
    assert round(method.ratio(10, 20, 0, 4), 9) == round(0.08 * 1.0 * 1.8 * 2.5, 9)
    assert round(method.ratio(5, 20, 3, 4), 9) == round(0.08 * 1.2 * 0.2 * 2.5, 9)
