"""Stand-ins for what a method would have trained, for timing: the right shapes and costs, no skill.

Choices are still taken by the method, on the stand-ins' output: a predictor with a random head selects other tokens for
every sample and step; a router opens a stated share of its branches, drawn at random; alpha-bar is flat, so that the
schedule has the published number of I-steps; random gates open for about half of the rows; refiners need nothing,
because LoRA is merged into the weights; curves of SmoothCache and MagCache are drawn, and TeaCache takes changes as
they are.

What a method reads on the host to decide by says nothing on random weights either, so that no threshold has the MACs
that it has on a trained model. It waits for the number and is told another (`random_reads`): drawn, the same in every
run, so that a setting's MACs are known before anything runs and a budget can be met.
"""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from tcbench.artefacts import read_imported
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method, Run, Table
from tcbench.models.adapter import Adapter, Text
from tcbench.models.predictor import CachePredictor
from tcbench.models.specs import FluxSpec, ModelSpec, TextSpec
from tcbench.sampling import Prompts
from tcbench.shapes import ModelShape
from tcbench.timesteps import respaced_timesteps
from tcbench.trainable import (
    CalibrateMagnitudes,
    CalibrateReuse,
    CollectScores,
    ImportRouter,
    ImportSchedule,
    TrainChainRouter,
    TrainGates,
    TrainRouter,
    TrainScorer,
)

OPEN, CLOSED = 5.0, -5.0  # the bounds of a trained router's logits
LARGEST_CHANGE = 0.2  # of a step, as methods measure it: published thresholds are of this size


def untrained_artefacts(
    adapter: Adapter, method: Method, nfe: int, seed: int, open_branches: float | None = None
) -> Artefacts:
    """Stand-ins for what `method.training` declares, but for TeaCache's polynomial.

    Args:
        nfe: steps of the uncached reference.
        seed: of heads and routers.
        open_branches: the share of branches that a router opens.

    Raises:
        UserError: the method trains a router and `open_branches` is not given.
    """
    timesteps = respaced_timesteps(method.sampled_steps(nfe))
    scorers: dict[str, CachePredictor] = {}
    tables: dict[str, Table] = {}
    alpha_bar = None
    for stage in method.training(Run(adapter.shape, timesteps, adapter.spec.guidance(), torch.arange(1))):
        match stage:
            case TrainScorer():
                scorers[stage.name] = random_predictor(adapter, seed)
            case CollectScores():
                alpha_bar = (0.5,) * len(timesteps)
            case ImportRouter() | ImportSchedule():
                tables[stage.name] = read_imported(stage, adapter.shape, len(timesteps))
            case TrainRouter() | TrainChainRouter():
                if open_branches is None:
                    raise UserError(f"{method.name}: its router is not trained here; set open_branches, e.g. 0.17")
                every = 2 if isinstance(stage, TrainRouter) else 1
                tables[stage.name] = random_router(adapter.shape, len(timesteps), open_branches, seed, every)
            case TrainGates():
                tables[stage.name] = random_gates(adapter.shape, len(timesteps), seed)
            case CalibrateReuse():
                curves = len(adapter.shape.kinds), stage.lookahead
                tables[stage.name] = random_curves(*curves, len(timesteps), seed)
            case CalibrateMagnitudes():
                tables[stage.name] = (random_ratios(len(timesteps), seed),)
    return Artefacts(scorers=scorers, alpha_bar=alpha_bar, tables=tables)


def random_predictor(adapter: Adapter, seed: int) -> CachePredictor:
    """A Cache Predictor whose scores differ: its head is random, so that their logits have a variance near 1."""
    predictor = CachePredictor(adapter)
    weight = torch.randn(predictor.head.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        predictor.head.weight.copy_(weight * adapter.shape.width**-0.5)
    return predictor.requires_grad_(False).eval()


def random_router(shape: ModelShape, nfe: int, open_branches: float, seed: int, every: int = 2) -> Table:
    """A router of `TrainRouter`'s form that opens the same share of every branch, as whole numbers allow.

    Args:
        every: from the last step on, so many steps share one row that is used.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((nfe, len(shape.sites)), CLOSED)
    used = logits[::every]  # the rows that are used, of second steps for one
    for name in shape.kinds:
        columns = [column for column, site in enumerate(shape.sites) if site.part == name]
        share = torch.full((len(used) * len(columns),), CLOSED)
        share[torch.randperm(len(share), generator=generator)[: round(open_branches * len(share))]] = OPEN
        used[:, columns] = share.view(len(used), len(columns))
    return tuple(map(tuple, logits.tolist()))


def random_gates(shape: ModelShape, nfe: int, seed: int) -> Table:
    """Gates of `TrainGates`' form that tell rows apart."""
    gates = nfe * len(shape.sites_of("mix", "pointwise"))
    weights = torch.randn(gates, shape.width, generator=torch.Generator().manual_seed(seed))
    return tuple(map(tuple, weights.tolist()))


def random_curves(parts: int, lookahead: int, nfe: int, seed: int) -> Table:
    """Curves of `CalibrateReuse`'s form: every step changes a part by a drawn amount, and changes add up."""
    rows = []
    for part in range(parts):
        change = _changes(f"{seed} {part}", nfe)
        for lag in range(1, lookahead + 1):
            known = [sum(change[step + 1 : step + 1 + lag]) for step in range(nfe - lag)]
            rows.append((*known, *[math.nan] * lag))
    return tuple(rows)


def random_ratios(nfe: int, seed: int) -> tuple[float, ...]:
    """Ratios of `CalibrateMagnitudes`' form: residuals shrink by a drawn amount at every step."""
    return 1.0, *(1 - change / 2 for change in _changes(f"{seed}", nfe - 1))


def random_reads(seed: int, open_rows: float = 0.5) -> Callable[[Tensor], float]:
    """Numbers of one run in the place of those that are read on the host: relative changes, or masks of rows.

    Args:
        open_rows: the share of rows that a mask names.
    """
    generator = random.Random(seed)

    def number(value: Tensor) -> float:
        if value.is_floating_point():
            return generator.uniform(0, LARGEST_CHANGE)
        return sum(2**row for row in range(32) if generator.random() < open_rows)  # of `Look.read_rows`

    return number


def _changes(seed: str, count: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.uniform(0, LARGEST_CHANGE) for _ in range(count)]


def random_captions(spec: ModelSpec, seed: int) -> Prompts | None:
    """Captions of random states, as long as the model reads, for models that read any."""
    if not isinstance(spec, TextSpec):
        return None
    count, channels = spec.caption_tokens, spec.caption_channels

    def captions(sample_index: Tensor) -> Text:
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(1 + len(sample_index), count, channels, generator=generator)
        mask = torch.ones(len(states), count, dtype=torch.bool)
        pooled = None
        if isinstance(spec, FluxSpec):
            pooled = torch.randn(len(sample_index), spec.pooled_channels, generator=generator)
        return Text(states[1:], mask[1:], negative=Text(states[:1], mask[:1]), pooled_RC=pooled)

    return captions
