"""Work that is done beside the caller, so that a device goes on while files are written. Imports no torch."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Aside:
    """Calls on one other thread, in order. The first that fails is raised by a later call or at the end.

    Args:
        waiting: calls that may wait; the caller waits before there are more. 0: calls run at once, on the caller's own
            thread.
    """

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._pool = ThreadPoolExecutor(1) if waiting else None
        self._calls: deque[Future[None]] = deque()

    def __call__(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have a function called."""
        if self._pool is None:
            call(*arguments)
            return
        self._calls.append(self._pool.submit(call, *arguments))
        while len(self._calls) > self._waiting:
            self._calls.popleft().result()

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is None:
            return
        if kind is None:
            try:
                while self._calls:
                    self._calls.popleft().result()
            finally:
                self._pool.shutdown(cancel_futures=True)
        else:
            self._pool.shutdown(cancel_futures=True)
