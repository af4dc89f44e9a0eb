"""How fast things go on a card, and where that is known from.

Rates were measured on some card, model and dtype. Another one's is derived: by the ratio of the cards' peaks in the
dtypes concerned, and from the most similar model. Every rate says which of both it is.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from tcbench.errors import UserError
from tcbench.models.specs import MODELS
from tcbench.outside.places import ASSETS
from tcbench.precision import Dtype
from tcbench.record.files import read_json

HAND, RECORDED = ASSETS / "forecast" / "rates.yaml", ASSETS / "forecast" / "recorded.json"

What = Literal[
    "step", "plain", "efficiency", "uncached runs", "TrainScorer", "TrainRefiners", "TrainRouter", "sample memory",
    "training memory", "encode", "decode", "features", "readings", "score", "frechet", "distances", "kept", "kernel",
    "pairs", "read", "process", "load", "first batch", "render",
]  # fmt: skip
"""
step: a step that computes everything, by the path that sampling takes.
plain: the plain path's rate as a share of it, where training was not measured.
efficiency: of a method's MACs, as a share of it.
uncached runs: by the path that training takes, without a gradient.
Train*: a training stage's iterations.
sample memory: bytes of a sample in a batch, weights apart.
training memory: bytes of a token's channel in a block, for a pair.
score: what scoring a row of an embedded suite takes in all.
frechet: Frechet distances. distances, kept: what recall computes once and for every replicate. kernel: KID's.
pairs: pixels of images that one metric compares with the uncached ones. read: samples from disk, checked.
load: a denoiser's weights, read, checked and placed.
"""


class Rate(BaseModel):
    """One rate; fields that do not matter for it are empty.

    Attributes:
        value: in `unit`; a unit of something `/s` divides an amount, another one is multiplied with it.
        source: what it was measured on, or derived from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: What
    value: float = Field(gt=0)
    unit: str
    kind: Literal["measured", "derived"]
    source: str
    card: str = ""
    model: str = ""
    dtype: str = ""
    batch: int = 0
    method: str = ""
    nfe: int = 0

    def of(self, amount: float) -> float:
        """Seconds, or bytes, of an amount of work."""
        return amount / self.value if self.unit.endswith("/s") else amount * self.value

    def times(self, factor: float, why: str) -> "Rate":
        """A rate that is derived from this one."""
        if factor == 1 and not why:
            return self
        source = f"{self.source}; {why}" if why else self.source
        return self.model_copy(update={"value": self.value * factor, "kind": "derived", "source": source})


class Card(BaseModel):
    """What a card can do at most, by its maker's data sheet; a core of a CPU has no peak that matters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_gb: float
    peak: dict[str, float]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    cards: dict[str, Card] = {}
    like: dict[str, str] = {}
    rates: tuple[Rate, ...]


@lru_cache
def _files() -> _File:
    hand, recorded = (
        _File.model_validate(yaml.safe_load(HAND.read_text(encoding="utf-8"))),
        _File.model_validate(read_json(RECORDED)),
    )
    return hand.model_copy(update={"rates": hand.rates + recorded.rates})


def known_cards() -> dict[str, Card]:
    """The cards that forecasts are made for, by the names that `--gpu` takes."""
    return dict(_files().cards)


def precision_of(dtype: str) -> str:
    """16 bits are 16 bits to a card."""
    return "16 bit" if dtype in ("bf16", "fp16") else dtype


class Rates:
    """The rates of one card.

    Args:
        card: a name of `known_cards`.
        calibrated: rates measured on the card at hand, which come before all others.

    Attributes:
        used: every rate that was asked for, in order.

    Raises:
        UserError: the card is unknown.
    """

    def __init__(self, card: str, calibrated: Sequence[Rate] = ()) -> None:
        if card not in known_cards():
            raise UserError(f"--gpu {card}: is not among {', '.join(known_cards())}; give one of these, or --calibrate")
        self.card, self.calibrated = card, tuple(calibrated)
        self.used: dict[Rate, None] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.card != "cpu"

    def step(self, model: str, dtype: Dtype, batch: int) -> Rate:
        """MACs a second of a full step, as sampled."""
        return self._found("step", model, dtype, batch)

    def efficiency(self, method: str, model: str, nfe: int) -> Rate:
        """A method's share of that rate."""
        stand_in = _files().like.get(method, method)
        if method == "uncached":
            return Rate(what="efficiency", value=1, unit="", kind="measured", source="by definition")
        named = self._candidates("efficiency", lambda rate: rate.method == method)
        likened = self._candidates("efficiency", lambda rate: rate.method == stand_in)
        if not (found := named or likened):  # the worst, so that a forecast is no promise
            found = self._candidates("efficiency", lambda rate: True)
            least = min(found, key=lambda rate: rate.value)
            return self._use(least.times(1, f"the least of all methods, for {method} was not timed"))
        best = min(found, key=lambda rate: (*_far(rate.model, model), abs(math.log(nfe / (rate.nfe or nfe)))))
        why = "" if named and best.model == model else f"measured of {best.method} on {best.model}"
        return self._use(best.times(1, why))

    def training(self, stage: str, model: str, dtype: Dtype, batch: int, macs: float) -> Rate:
        """MACs a second of a training stage's iterations.

        Args:
            macs: of one pair in an iteration, by model, which turns measured iterations into MACs.
        """
        exact = self._candidates(
            stage, lambda rate: rate.model == model and rate.dtype == precision_of(dtype) and rate.card == self.card
        )
        if exact:
            rate = min(exact, key=lambda rate: abs(math.log(batch / rate.batch)))
            in_macs = {"value": rate.value * rate.batch * macs, "unit": "MACs/s"}
            return self._use(rate.model_copy(update=in_macs))
        similar = self._candidates(stage, lambda rate: rate.model == model and rate.dtype == precision_of(dtype))
        if similar:
            rate = similar[0].model_copy(update={"value": similar[0].value * similar[0].batch * macs, "unit": "MACs/s"})
            return self._use(self._scaled(rate, dtype))
        return self.plain(model, dtype, batch)

    def plain(self, model: str, dtype: Dtype, batch: int) -> Rate:
        """MACs a second without a gradient by the path that training takes."""
        exact = self._candidates(
            "uncached runs", lambda rate: rate.model == model and rate.dtype == precision_of(dtype)
        )
        if exact:
            return self._use(self._scaled(exact[0], dtype))
        step = self._found("step", model, dtype, batch, note=False)
        if not self.on_gpu:  # there is one path
            return self._use(step)
        (share,) = self._candidates("plain", lambda rate: True)
        return self._use(step.times(share.value, f"times {share.value}, {share.source}"))

    def throughput(self, what: What, dtype: Dtype | None = None) -> Rate:
        """A rate that no model belongs to; with a `dtype`, of this card."""
        found = self._candidates(what, lambda rate: True)
        if not found:
            raise UserError(f"{HAND.name}: has no rate of {what!r} for {self.card}; add one, with its source")
        return self._use(self._scaled(found[0], dtype) if dtype else found[0])

    def memory(
        self, what: Literal["sample memory", "training memory"], model: str, batch: int, method: str = ""
    ) -> Rate:
        """Bytes; where a method was not seen, the most of all; of another model's sample, by the sizes of streams."""
        found = self._candidates(what, lambda rate: True)
        stand_in = _files().like.get(method, method)
        for fits in (lambda rate: rate.model == model, lambda rate: rate.method == stand_in):
            found = [rate for rate in found if fits(rate)] or found
        if not found:
            raise UserError(f"{RECORDED.name}: has no rate of {what!r} for {self.card}; run the speed suite there")
        nearest = min(abs(math.log(batch / (rate.batch or batch))) for rate in found)
        near = [rate for rate in found if abs(math.log(batch / (rate.batch or batch))) <= nearest]
        if what == "sample memory":
            near = [_as_large(rate, model) for rate in near]
        return self._use(max(near, key=lambda rate: rate.value))

    def per_row(self, model: str) -> Rate | None:
        """What scoring a row takes in all, where a suite of this model is committed."""
        found = self._candidates("score", lambda rate: rate.model == model)
        return self._use(found[0]) if found else None

    def _found(self, what: What, model: str, dtype: Dtype, batch: int, *, note: bool = True) -> Rate:
        found = self._candidates(what, lambda rate: True)
        if not found:
            raise UserError(f"{RECORDED.name}: has no rate of {what!r} for {self.card}; run the speed suite there")

        def off(rate: Rate) -> tuple[float, ...]:
            batches = abs(math.log(batch / rate.batch)) if rate.batch else 0
            return rate.dtype != precision_of(dtype), *_far(rate.model, model), rate.card != self.card, batches

        best = min(found, key=off)
        rate = self._scaled(best, dtype)
        if best.model != model:
            rate = rate.times(1, f"measured of {best.model}")
        return self._use(rate) if note else rate

    def _candidates(self, what: str, fits: Callable[[Rate], bool]) -> list[Rate]:
        """Rates that a card of this kind may go by; of a measured one here, no other."""
        here = [rate for rate in self.calibrated if rate.what == what and fits(rate)]
        return here or [rate for rate in _files().rates if rate.what == what and self._comparable(rate) and fits(rate)]

    def _comparable(self, rate: Rate) -> bool:
        return not rate.card or (rate.card != "cpu") == self.on_gpu

    def _scaled(self, rate: Rate, dtype: Dtype) -> Rate:
        """The rate on this card and in this dtype, by the peaks."""
        cards, wanted = known_cards(), precision_of(dtype)
        if not self.on_gpu or (rate.card == self.card and rate.dtype in ("", wanted)):
            return rate
        theirs = cards[rate.card].peak[rate.dtype or wanted]
        factor = cards[self.card].peak[wanted] / theirs
        return rate.times(
            factor, f"times {factor:.3g}, {self.card} {wanted} by {rate.card} {rate.dtype} at their peaks"
        )

    def _use(self, rate: Rate) -> Rate:
        self.used[rate] = None
        return rate


def _as_large(rate: Rate, model: str) -> Rate:
    """The rate of a model whose stream is larger or smaller."""
    if rate.model == model:
        return rate
    theirs, ours = (
        shape.stream_tokens * shape.width * shape.num_blocks
        for shape in (MODELS[rate.model].shape, MODELS[model].shape)
    )
    return rate.times(ours / theirs, f"times {ours / theirs:.2g}, the stream of {rate.model}")


def _far(measured: str, asked: str) -> tuple[bool, float]:
    """How far one model is from another: whether it is another one, and by how many times more or fewer tokens."""
    if measured == asked:
        return False, 0.0
    shapes = [MODELS[name].num_tokens for name in (measured, asked) if name in MODELS]
    return True, abs(math.log(shapes[0] / shapes[-1])) if len(shapes) == 2 else math.inf


def recorded_rates(path: Path = RECORDED) -> Iterable[Rate]:
    """What the committed results say."""
    return _File.model_validate(read_json(path)).rates
