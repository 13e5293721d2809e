"""What a run takes from the machine that it is on: time, and threads beside its loop. Tests give one of their own."""

from __future__ import annotations

import time
from concurrent.futures import Executor, ThreadPoolExecutor
from threading import Event


class Clock:
    """The machine's own."""

    def now(self) -> float:
        """Seconds, which only ever grow."""
        return time.monotonic()

    def sleep(self, seconds: float, unless: Event | None = None) -> None:
        """Return when so much time has passed, or something has happened."""
        (unless or Event()).wait(seconds)

    def beside(self, name: str) -> Executor:
        """One thread, which makes the calls that it is given one after the other."""
        return ThreadPoolExecutor(1, thread_name_prefix=f"cerebro-{name}")


CLOCK = Clock()
