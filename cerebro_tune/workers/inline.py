"""Workers that are the caller itself: no process, no pickle to lose a traceback in, `breakpoint()` works."""

from __future__ import annotations

import selectors
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cerebro_tune.seeding import kept_streams
from cerebro_tune.units import WorkerId
from cerebro_tune.workers.base import Grow, WakePipe, Workers
from cerebro_tune.workers.messages import Exit, Forget, Joined, Message, Order, Ready, Rest, Setup, Task
from cerebro_tune.workers.runner import UnitRunner, run_task, set_up


class InlineWorkers(Workers):
    """Each unit runs inside `wait`, on the thread that waits. Several workers take turns."""

    may_hang = False

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        super().__init__(devices, threads)
        self._tasks: deque[tuple[WorkerId, Task]] = deque()
        self._said: deque[Message] = deque()
        self._runners: dict[WorkerId, UnitRunner] = {}
        self._pipe: WakePipe | None = None

    def start(self, grow: Grow) -> None:  # noqa: D102
        self._pipe = WakePipe()
        self._grow = grow
        for worker in self.ids:
            self.restart(worker)

    def send(self, worker: WorkerId, order: Order) -> None:  # noqa: D102
        runner = self._runners[worker]
        match order:
            case Task():
                self._tasks.append((worker, order))
            case Setup():
                self._said.append(Ready(worker, set_up(runner, order)))
            case Forget():
                runner.forget(order)
            case Rest() | Exit():
                runner.close()

    def wait(self, timeout_s: float | None = None) -> list[Message]:  # noqa: D102
        assert self._pipe is not None, "wait before start"
        if not self._said and self._tasks:
            worker, task = self._tasks.popleft()
            with _borrowed_process(self.threads):
                self._said.append(run_task(self._runners[worker], task))
        if not self._said:
            with selectors.DefaultSelector() as selector:
                selector.register(self._pipe.reader, selectors.EVENT_READ)
                selector.select(timeout_s)
            self._pipe.silence()
        said = list(self._said)
        self._said.clear()
        return said

    def wake(self) -> None:  # noqa: D102
        if self._pipe is not None:
            self._pipe.ring()

    def _wait_for_room(self, error: OSError) -> None:
        self.stand_still(error)  # that of the run that is on: runners are made before it

    def restart(self, worker: WorkerId) -> None:  # noqa: D102
        self._tasks = deque((whose, task) for whose, task in self._tasks if whose != worker)
        self._said = deque(message for message in self._said if message.worker != worker)
        if runner := self._runners.pop(worker, None):
            runner.close()
        self._runners[worker] = UnitRunner(worker, self.device(worker), self._grow, self._wait_for_room)
        self._said.append(Joined(worker))

    def close(self) -> None:  # noqa: D102
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._tasks.clear()
        self._said.clear()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


@contextmanager
def _borrowed_process(threads: int) -> Iterator[None]:
    """Give the caller its random streams and thread count back after a unit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kept_streams():
            yield
    finally:
        torch.set_num_threads(before)
        sys.stdout.flush()
