"""Commands from any thread, carried out on one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cerebro_tune.errors import CerebroError, ConfigurationError

T = TypeVar("T")

_OVER = "The run is over: it takes no more commands. Start another one."


class CommandQueue:
    """Whoever calls `ask` gets the answer, or the error, of a call made on the loop's thread between two events.

    Before there is a loop, and on its own thread, a call is made at once. `wake` makes the loop look here.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lock = threading.RLock()
        self._loop: threading.Thread | None = None
        self._over = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take_over(self) -> None:
        """The calling thread is the loop from now on."""
        with self._lock:
            self._loop = threading.current_thread()

    def ask(self, call: Callable[[], T]) -> T:
        """Have `call` made on the loop's thread and return its answer. ConfigurationError once the run is over."""
        with self._lock:
            if self._over:
                raise ConfigurationError(_OVER)
            if self._loop in (None, threading.current_thread()):
                return call()
            future = self.post(call)
        return future.result()

    def post(self, call: Callable[[], T]) -> Future[T]:
        """Leave a call for the loop and do not wait."""
        future: Future[T] = Future()
        self._waiting.append((call, future))
        self._wake()
        return future

    def carry_out(self) -> None:
        """Make the calls that wait; on the loop's thread."""
        while self._waiting:
            call, future = self._waiting.popleft()
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
                if not isinstance(error, CerebroError):  # a defect, the tuner's or ours: whoever drives must see it too
                    raise

    def close(self) -> bool:
        """Take no more calls and refuse those that wait; false if that was done before."""
        with self._lock:
            if self._over:
                return False
            self._over = True
        while self._waiting:
            self._waiting.popleft()[1].set_exception(ConfigurationError(_OVER))
        return True
