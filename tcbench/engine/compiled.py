"""`PlainBlocks` with what is computed of all tokens compiled: for models that no kernels of this project serve.

Compiled are a part of all tokens, from the stream to its output, and the sum behind it; blocks of one class share the
code. What few tokens compute, whose number changes from step to step and block to block, is left to the model's own
layers. Modulation of all steps is made when the run starts. Results differ from `PlainBlocks` by rounding, because
operations are fused and products have other sizes (tests/test_compiled.py).
"""

import os
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from tcbench.engine.ahead import Ahead
from tcbench.engine.cache import Cache
from tcbench.engine.plain import PlainBlocks, everyone
from tcbench.errors import UserError
from tcbench.method import Run
from tcbench.models.adapter import Adapter, Gated
from tcbench.record.executed import Execution

VARIANTS = 64
"""How often one function is compiled before torch says that something is wrong: classes of blocks, with and without
LoRA, by part, batch size and dtype. torch's own limit is 8."""

SWITCH = "TCBENCH_COMPILE"

Compiler = str | Callable[..., Any]
"""As `torch.compile` takes its `backend`."""


def can_compile(adapter: Adapter) -> bool:
    """Whether `CompiledBlocks` serves this model where it is, and is not switched off.

    Raises:
        UserError: the switch says something else.
    """
    if (said := os.environ.get(SWITCH)) not in (None, "off"):
        raise UserError(f"{SWITCH}={said}: is not known; set it to off, or unset it")
    return adapter.compiles and adapter.device.type == "cuda" and not said


class CompiledBlocks(PlainBlocks):
    """`Blocks` by compiled parts, for sampling: nothing has a gradient.

    Args:
        compiler: what compiles; another one in tests.
    """

    execution: ClassVar[Execution] = "compiled"

    def __init__(self, adapter: Adapter, run: Run, cache: Cache, compiler: Compiler = "inductor") -> None:
        super().__init__(adapter, run, cache)
        self._compiler, self._tokens = compiler, run.shape.joint_text + run.shape.num_tokens
        self._ahead = Ahead(adapter, run)

    def prepare(self, context: Any) -> None:
        """Make what modulates all steps."""
        self._ahead.prepare(context)

    def condition(self, step: int, context: Any) -> Any:
        """What conditions the rows at a step."""
        return self._ahead.condition(step)

    def everyone(
        self, module: Any, part: str, x_RND: Tensor, gated: Gated, joined: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A part of all tokens."""
        return self._compiled(everyone)(self.adapter, module, part, x_RND, gated, joined)

    def gated_sum(self, x_RKD: Tensor, gated: Gated, value_RKD: Tensor) -> Tensor:
        """The stream behind a part."""
        if x_RKD.shape[1] != self._tokens:
            return super().gated_sum(x_RKD, gated, value_RKD)
        return self._compiled(_gated_sum)(self.adapter, x_RKD, gated, value_RKD)

    def block(self, module: Any, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block beside the stream."""
        x, joined = x_RND, self.adapter.is_parallel(module)
        for part, gated in self.adapter.modulation(module, condition).items():
            if joined and self.adapter.kind(part) != "mix":
                continue  # the projection behind attention has joined it
            value, _ = self.everyone(module, part, x, gated, joined)
            x = self.gated_sum(x, gated, value)
        return x

    def _modulation(self, block: int) -> Mapping[str, Gated]:
        return self._ahead.modulation(self.step, block)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(function, self._compiler)


def _gated_sum(adapter: Adapter, x_RND: Tensor, gated: Gated, value_RND: Tensor) -> Tensor:
    return adapter.gated_sum(x_RND, gated, value_RND)


@cache
def _compiled(function: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    """Compiled for shapes as they come; a UserError if a piece of it cannot be."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                return compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = " ".join(str(error).split("\n")[:2])  # who failed, and how
            raise UserError(
                f"torch.compile failed ({why}); it takes a C compiler, and {SWITCH}=off runs the model's own layers"
            ) from error

    return call
