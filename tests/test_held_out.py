"""Held-out losses: which examples they are of, when training ends, and what it keeps."""

from collections.abc import Iterator

import pytest
import torch

from tcbench.data import Dataset
from tcbench.errors import UserError
from tcbench.samplers import ReferenceDDIM
from tcbench.trainable import TrainRefiners
from tcbench.training.held_out import QUIET, HeldOut
from tcbench.training.pairs import Pairs

from .conftest import make_adapter


def watched(losses: list[float], patience: int | None, iterations: int = 200) -> tuple[HeldOut, torch.Tensor, int]:
    """A stage with these held-out losses, whose weight counts iterations: (watch, weight, when it ended)."""
    stage = TrainRefiners(blocks=1, rank=1, iterations=iterations, batch_size=1, learning_rate=0.5, patience=patience)
    weight, coming = torch.zeros(1), iter(losses)
    watch = HeldOut(stage, {"weight": weight}, lambda: next(coming))
    done = 0
    while done < iterations and not watch.enough(done):
        done += 1
        weight += 1
    return watch, weight, done


def falling(start: float, factor: float) -> Iterator[float]:
    while True:
        yield start
        start *= factor


def test_training_goes_on_while_the_loss_falls() -> None:
    losses = falling(8.0, 0.9)
    watch, weight, done = watched([next(losses) for _ in range(21)], patience=QUIET)
    told = watch.finish()
    assert done == weight.item() == 200 and told["ended"] == "stopped early"
    assert told["held_out_loss_kept"] == told["held_out_loss"][-1]


@pytest.mark.parametrize("patience", [2, 5])
def test_training_ends_when_the_loss_is_quiet_and_keeps_the_best(patience: int) -> None:
    watch, weight, done = watched([8, 4, 2.0, *[3.0] * 40], patience)
    told = watch.finish()
    assert done == 10 * (2 + patience) and weight.item() == 20
    assert told["held_out_loss_kept"] == 2 and told["ended"] == "trained to convergence"


def test_without_patience_all_iterations_are_taken_and_the_last_weights_kept() -> None:
    watch, weight, done = watched([8, 4, 2.0, *[3.0] * 40], None)
    told = watch.finish()
    assert done == weight.item() == 200
    assert told["held_out_loss_kept"] == 3 and told["ended"] == "trained to convergence"


@pytest.mark.parametrize("last", [2.1, float("nan"), float("inf")])
def test_a_loss_that_rose_is_refused(last: float) -> None:
    watch, _, _ = watched([1.0, 0.5, *[last] * 40], None)
    with pytest.raises(UserError, match=r"^TrainRefiners: the held-out loss went from 1 to .*lower .* rate, 0\.5"):
        watch.finish()


def test_held_out_examples_are_not_trained_on() -> None:
    """Two x0 of the same index differ by nothing; noise is taken out by a chain without any."""
    data = Dataset(torch.arange(47.0).view(-1, 1, 1, 1).expand(-1, 4, 16, 16), torch.zeros(47, dtype=torch.int64))
    chain = ReferenceDDIM(4)
    chain.signal, chain.sigma = torch.ones(5), torch.zeros(5)
    train = Pairs(make_adapter("tiny-dit"), data, chain, seed=0)

    def seen(pairs: Pairs) -> set[int]:
        return set(pairs.start(torch.zeros(800, dtype=torch.int64))[0][:, 0, 0, 0].int().tolist())

    held_out = seen(train.again(0, held_out=True))
    assert held_out == {9, 19, 29, 39} and seen(train) == set(range(47)) - held_out
    few = Pairs(train.adapter, data[:4], chain, seed=0)
    assert seen(few) == {0, 1, 2} and seen(few.again(0, held_out=True)) == {3}
    with pytest.raises(UserError, match="1 examples; give two or more"):
        Pairs(train.adapter, data[:1], chain, seed=0)
