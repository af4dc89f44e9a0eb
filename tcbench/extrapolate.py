"""Weights of a unit's last values (`tcbench.plan.Mix`) that go on from them: polynomials in the step index.

Nothing here sees a value: weights follow from the steps at which values were stored. Imports no torch.
"""

from collections.abc import Sequence
from math import factorial

Weights = tuple[float, ...]


def quotient_weights(steps: Sequence[int], order: int) -> list[Weights]:
    """What each backward difference quotient is of the values at `steps`, the latest first.

    As TaylorSeer's cache makes them (arXiv 2503.06923, its released code): quotient i + 1 is the difference of the last
    two quotients i over the distance of the last two steps alone, whatever the distances before; at the first step
    there is none but the value itself, and one more at every step.

    Returns:
        weights of the quotients 0 to at most `order`, as long as `steps`.
    """
    quotients: list[Weights] = []
    oldest_first = list(reversed(steps))
    for number, step in enumerate(oldest_first):
        new: list[Weights] = [tuple(float(number == other) for other in range(len(steps)))]
        for old in quotients[:order]:
            gap = step - oldest_first[number - 1]
            new.append(tuple((a - b) / gap for a, b in zip(new[-1], old, strict=True)))
        quotients = new
    return [tuple(reversed(weights)) for weights in quotients]


def combine(quotients: Sequence[Weights], factors: Sequence[float]) -> Weights:
    """The weights of a sum of quotients times factors, of which there may be more."""
    pairs = list(zip(quotients, factors, strict=False))
    return tuple(sum(factor * quotient[place] for quotient, factor in pairs) for place in range(len(quotients[0])))


def taylor(distance: float, order: int) -> list[float]:
    """Factors of the quotients 0 to `order` in a Taylor polynomial `distance` steps on."""
    return [distance**i / factorial(i) for i in range(order + 1)]


def hermite(distance: float, order: int, scale: float) -> list[float]:
    """The same with scaled physicists' Hermite polynomials for powers (HiCache): scale^i H_i(scale * distance) / i!."""
    x, values = scale * distance, [1.0, 2 * scale * distance]
    for i in range(1, order):
        values.append(2 * x * values[i] - 2 * i * values[i - 1])
    return [values[i] * scale**i / factorial(i) for i in range(order + 1)]
