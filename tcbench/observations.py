"""What a method may look at at the start of a step: one registry of sizes, prices and how each is computed.

The engine computes and charges (`tcbench.engine.engine`), costing charges and answers with the size alone
(`tcbench.budget.costing`); both read the same entry, so nothing can be looked at without its price. Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tcbench.errors import UserError, did_you_mean
from tcbench.ledger import block_macs, predictor_macs
from tcbench.method import Run
from tcbench.shapes import Macs, ModelShape

if TYPE_CHECKING:
    from torch import Tensor


class LiveStep(Protocol):
    """A step whose tensors exist: what an observation is computed from."""

    run: Run
    step: int
    x_RND: "Tensor"
    """The embedded stream."""
    condition: Any
    input_RC: "Tensor | None"
    """The transformer's input latents, where the engine has them."""
    engine: Any


@dataclass(frozen=True)
class Observation:
    """Something to look at; `arguments` are the method's, a block's number for one.

    Attributes:
        size: (shape, *arguments) -> sizes of the tensor after its rows.
        compute: (live step, *arguments) -> the tensor, [R, *size].
        macs: (shape, *arguments) -> the price per row.
        tag: (*arguments) -> the heading it is charged under.
        lent: whether the run goes on computing with the tensor.
    """

    size: Callable[..., tuple[int, ...]]
    compute: Callable[..., "Tensor"]
    macs: Callable[..., Macs] = lambda shape, *_: Macs()
    tag: Callable[..., str] = lambda *_: "score"
    lent: bool = False


def _scores(live: LiveStep, name: str) -> "Tensor":
    scorer = live.run.artefacts.scorers.get(name)
    if scorer is None:
        raise UserError(f"scorer {name!r} is not among the artefacts; train the row first, or set artefacts_from")
    return scorer(live.engine.blocks, live.x_RND, live.condition)


def _uniform(live: LiveStep) -> "Tensor":
    import torch

    from tcbench.tensors import draws

    run = live.run
    blocks = torch.arange(run.shape.num_blocks, device=run.sample_index.device)
    numbers = draws.uniform(run.seed, run.sample_index[:, None], run.shape.num_tokens, live.step, blocks)
    return numbers.repeat(run.rows_per_sample, 1, 1)


def _updates(live: LiveStep) -> "Tensor":
    import torch

    x, updates = live.x_RND, []
    for module in live.engine.adapter.blocks:
        after = live.engine.blocks.block(module, x, live.condition)
        updates.append(after - x)
        x = after
    return _of_image(live, torch.stack(updates, dim=1), dim=2)


def _modulated_input(live: LiveStep) -> "Tensor":
    adapter = live.engine.adapter
    module = adapter.blocks[0]
    name, gated = next(iter(adapter.modulation(module, live.condition).items()))
    return _of_image(live, adapter.part_input(module, name, live.x_RND, gated))


def _output(live: LiveStep) -> "Tensor":
    if live.engine.output is None:
        raise UserError("the network's output is looked at before there is one; compute the first step in full")
    return live.engine.output


def _input(live: LiveStep) -> "Tensor":
    assert live.input_RC is not None, "the engine was given embedded tokens, not latents"
    return live.input_RC


def _noise_level(live: LiveStep) -> "Tensor":
    if not live.run.noise_levels:
        raise UserError("the sampler of this run walks no chain of noise levels; decide without them")
    import torch

    rows, device = len(live.x_RND), live.x_RND.device
    # filled on the device: a captured graph cannot copy from the host
    return torch.stack([torch.full((rows,), scale, device=device) for scale in live.run.noise_levels[live.step]], dim=1)


def _of_image(live: LiveStep, stream: "Tensor", dim: int = 1) -> "Tensor":
    text = live.run.shape.joint_text
    return stream.narrow(dim, text, stream.shape[dim] - text)


def _every_token(shape: ModelShape, *_: Any) -> tuple[int, ...]:
    return (shape.num_tokens,)


def _every_token_of_blocks(shape: ModelShape, *_: Any) -> tuple[int, ...]:
    return shape.num_blocks, shape.num_tokens


OBSERVATIONS: dict[str, Observation] = {
    "latent": Observation(
        size=lambda shape: (shape.num_tokens, shape.width),
        compute=lambda live: _of_image(live, live.x_RND),
        lent=True,
    ),
    "input": Observation(size=lambda shape: shape.latent_shape, compute=_input, lent=True),
    "output": Observation(size=lambda shape: shape.output_shape, compute=_output, lent=True),
    "noise_level": Observation(size=lambda shape: (2,), compute=_noise_level),
    "modulated_input": Observation(
        size=lambda shape: (shape.num_tokens, shape.width),
        compute=_modulated_input,
        # the first block's modulation once more, and a LayerNorm
        macs=lambda shape: shape.blocks[0].modulation + Macs(0, shape.width * shape.stream_tokens),
    ),
    "scores": Observation(
        size=_every_token_of_blocks,
        compute=_scores,
        macs=lambda shape, name: predictor_macs(shape),
        tag=lambda name: name,
    ),
    "uniform": Observation(size=_every_token_of_blocks, compute=_uniform),
    # charged by the plan that asked for them (`ledger.observation_macs`)
    "attention_received": Observation(
        size=_every_token, compute=lambda live, block: live.engine.cache.attention_received(block)
    ),
    "attention_entropy": Observation(
        size=_every_token, compute=lambda live, block: live.engine.cache.attention_entropy(block)
    ),
    "value_norms": Observation(size=_every_token, compute=lambda live, block: live.engine.cache.value_norms(block)),
    "block_output": Observation(
        size=lambda shape, block: (shape.num_tokens, shape.width),
        compute=lambda live, block: live.engine.cache.output(block),
        lent=True,
    ),
    "checked": Observation(
        size=lambda shape, block: (2, shape.num_tokens, shape.width),
        compute=lambda live, block: live.engine.cache.checked(block),
        lent=True,
    ),
    "updates": Observation(
        size=lambda shape: (shape.num_blocks, shape.num_tokens, shape.width),
        compute=_updates,
        macs=lambda shape: sum((block_macs(shape, block, None) for block in range(shape.num_blocks)), Macs()),
        tag=lambda: "oracle",
    ),
}
"""By name; `tcbench.method.Look` has a method for each."""


def observation(name: str) -> Observation:
    """An entry by name.

    Raises:
        UserError: there is none (suggests near misses).
    """
    if name not in OBSERVATIONS:
        raise UserError(f"looks at {name!r}, which there is not; {did_you_mean(str(name), OBSERVATIONS)}")
    return OBSERVATIONS[name]
