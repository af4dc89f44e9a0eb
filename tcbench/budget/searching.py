"""Searched schedules: the list of full steps from which samples deviate least, one procedure for every method.

A trial samples a calibration batch at a list and measures how far it is from the uncached one; the measure is the
caller's.
"""

from collections.abc import Callable, Iterable, Iterator

from tcbench.schedule import Placement, spread_evenly

Steps = tuple[int, ...]
PLACEMENTS: tuple[Placement, ...] = ("start", "interior", "end")


class Trials:
    """What was tried so far; nothing is tried twice, and no more than allowed.

    Attributes:
        deviation: of everything tried, in order.
    """

    def __init__(self, measure: Callable[[Steps], float], most: int) -> None:
        self._measure, self._most = measure, most
        self.deviation: dict[Steps, float] = {}

    @property
    def exhausted(self) -> bool:
        """Whether no trial is left."""
        return len(self.deviation) >= self._most

    @property
    def best(self) -> Steps:
        """The list that deviates least; of several the first."""
        return min(self.deviation, key=self.deviation.__getitem__)

    def try_all(self, lists: Iterable[Steps]) -> None:
        """Measure these, as far as trials last."""
        for steps in lists:
            if self.exhausted:
                return
            if steps not in self.deviation:
                self.deviation[steps] = self._measure(steps)


def search_steps(measure: Callable[[Steps], float], own: Steps, nfe: int, trials: int) -> tuple[Trials, str]:
    """Search the list of full steps from which samples deviate least, as many as in `own`.

    The first trials are the row's own list and the even spreads. From the best of them, one full step at a time, the
    last first, is moved earlier and later between its neighbours; a move that helps is kept. The stride begins at half
    the mean gap and is halved when no move helps.

    Args:
        measure: the deviation of a list, deterministic.
        own: the list that the row's options give.

    Returns:
        All that was tried, and why the search ended.
    """
    tried = Trials(measure, trials)
    tried.try_all([own, *(spread_evenly(len(own), nfe, placement) for placement in PLACEMENTS)])
    stride = max(1, nfe // len(own) // 2)
    while not tried.exhausted:
        before = tried.best
        for place in range(len(own) - 1, 0, -1):
            tried.try_all(_moves(tried.best, place, stride, nfe))
        if tried.best == before and stride == 1:
            return tried, "no move of one full step helps"
        stride = max(1, stride // 2) if tried.best == before else stride
    return tried, "all trials were used"


def _moves(steps: Steps, place: int, stride: int, nfe: int) -> Iterator[Steps]:
    """A full step earlier and later, as far as its neighbours let it."""
    before, *after = steps[place - 1], *steps[place + 1 : place + 2], nfe
    for step in (steps[place] - stride, steps[place] + stride):
        if before < step < after[0]:
            yield (*steps[:place], step, *steps[place + 1 :])
