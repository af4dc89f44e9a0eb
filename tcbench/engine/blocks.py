"""What an engine needs of whatever executes the units of a plan."""

from typing import Any, ClassVar, Protocol

from torch import Tensor

from tcbench.plan import All, Decision, Nothing, Settled, Site, Tokens
from tcbench.record.executed import Execution


class Blocks(Protocol):
    """How the units of a plan are executed on the token stream.

    `whole` and `part` move the stream through a block or one of its parts; `who` is already resolved. Without a
    decision all tokens are computed and nothing is stored.

    Attributes:
        execution: how.
        counts_on_device: whether the host waits for no number of tokens that the device decided.
    """

    execution: ClassVar[Execution]
    counts_on_device: ClassVar[bool]

    def prepare(self, context: Any) -> None:
        """Called once per run, with the run's context (`Adapter.prepare`)."""

    def condition(self, step: int, context: Any) -> Any:
        """What conditions the rows at a step (`Adapter.condition`)."""

    def embed(self, latent: Tensor, context: Any) -> Tensor:
        """Tokens of the latents, [R, N, D] (`Adapter.embed`)."""

    def begin(self, step: int, x_RND: Tensor, condition: Any) -> None:
        """Start a step at the embedded tokens."""

    @property
    def stream(self) -> Tensor:
        """The tokens after what was executed since `begin`, [R, N, D]."""

    def add(self, value_RND: Tensor) -> None:
        """Add to the stream."""

    def replace(self, value_RND: Tensor) -> None:
        """Go on with another stream."""

    def part_input(self, site: Site) -> Tensor:
        """The stream as a part takes it, normalised and modulated, [R, N, D]."""

    def whole(self, block: int, who: All | Nothing | Tokens, decision: Decision | None) -> None:
        """A block whose update is one unit; a parallel one that is left to be computed comes without a decision."""

    def part(self, site: Site, who: Settled, decision: Decision | None) -> None:
        """One part of a block, which is a unit or is left to be computed."""

    def block(self, module: Any, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block that is not the model's (a predictor's), for all tokens and beside the stream: [R, N, D]."""

    def unembed(self, condition: Any) -> Tensor:
        """The model's output from the stream: [R, out_channels, ...]."""
