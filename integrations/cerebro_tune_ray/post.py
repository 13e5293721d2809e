"""The actor of a worker: it starts the worker as a process of its node, hands orders in and what is said out.

That the worker is a process of its own, and not this one, has three reasons: user code runs on a main thread, and may
fork loaders without Ray's threads in them; how it died is seen here; and it is the same worker as of backend "local".

States come and go as arrays, which Ray's object store carries; here they live in a store like the coordinator's. A
state that a unit left stays until the coordinator calls it stale, so that it need not come again for the next unit.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from cerebro_tune.store import BufferCache, BufferRef, StateStore
from cerebro_tune.workers.local import LocalWorkers
from cerebro_tune.workers.messages import (
    Exit,
    Finished,
    Forget,
    Joined,
    Message,
    Order,
    Raised,
    Rest,
    RunSpec,
    Setup,
    Task,
)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Post:
    """One worker. `listen` does all the work, on a thread of its own; the orders that come meanwhile wake it.

    path: where the coordinator finds modules, which may be here too.
    """

    def __init__(self, number: int, device: str, threads: int, path: Sequence[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)
        self._workers = LocalWorkers((device,), threads, first=number, fork=False)
        (self._worker,) = self._workers.ids
        # The coordinator's budget bounds the states that there are; here only the memory of the node does.
        self._store = StateStore(psutil.virtual_memory().total, Path(tempfile.gettempdir(), "cerebro-tune-none"))
        self._buffers = BufferCache()
        self._freed: list[int] = []
        self._orders: deque[tuple[Order, Bytes | None, Sequence[str]]] = deque()

    @ray.method(concurrency_group="listening", num_returns="streaming")
    def listen(self) -> Iterator[tuple[Message, Any]]:
        """What the worker says, until it is told to exit; with a state, or where it is."""
        self._workers.start(self._store.grow)
        while True:
            while self._orders:
                if not self._carry_out(*self._orders.popleft()):
                    return
            for message in self._workers.wait():
                yield message, self._attachment(message)

    @ray.method(num_returns=0)
    def set_up(self, spec: RunSpec, check: tuple[int, ...], check_validation: bool) -> None:
        """A `Setup`, in parts: what is the same for all workers is stored once for all of them."""
        self._take(Setup(spec, check, check_validation))

    @ray.method(num_returns=0)
    def obey(self, order: Order, state: Bytes | None = None, stale: Sequence[str] = ()) -> None:
        """Take an order, a task with the state that it begins with unless that is here; drop the states of `stale`."""
        self._take(order, state, stale)

    def _take(self, order: Order, state: Bytes | None = None, stale: Sequence[str] = ()) -> None:
        self._orders.append((order, state, stale))
        self._workers.wake()

    def _carry_out(self, order: Order, state: Bytes | None, stale: Sequence[str]) -> bool:
        """Hand an order on; false when it was the last."""
        self._drop(stale)
        if isinstance(order, Exit):
            self._close()
            return False
        self._workers.send(self._worker, self._for_worker(order, state))
        return True

    def _for_worker(self, order: Order, state: Bytes | None) -> Order:
        match order:
            case Task():
                return self._with_buffers(order, state)
            case Forget():
                self._drop(order.trials)
                return Forget(order.trials, self._take_freed())
            case Setup() | Rest():
                self._store.close()
                self._take_freed()
        return order

    def _with_buffers(self, task: Task, state: Bytes | None) -> Task:
        """The task with buffers of this machine, the committed one filled; its export is the coordinator's matter."""
        trial = task.unit.trial
        if task.committed is None:
            self._drop([trial])  # begun here before, and lost
        elif state is not None:
            arrived = self._memory(self._store.grow(trial, len(state)))
            arrived[: len(state)] = state
            self._store.commit(trial, len(state), task.digest)
        committed, used, working = self._store.buffers(trial)
        assert committed is None or self._store.digest_of(trial) == task.digest, "the state kept is the one committed"
        if freed := self._take_freed():
            self._workers.send(self._worker, Forget((), freed))
        return replace(task, committed=committed, committed_bytes=used, working=working, export=None)

    def _attachment(self, message: Message) -> Any:
        match message:
            case Joined():
                return socket.gethostname()
            case Finished():
                trial, used = message.unit.trial, message.used
                written = self._store.grow(trial, used)  # large enough: the unit has written there
                self._store.commit(trial, used, message.digest)
                return self._memory(written)[:used]
            case Raised():
                self._store.abandon(message.unit.trial)
        return None

    def _memory(self, buffer: BufferRef) -> Bytes:
        return np.frombuffer(self._buffers.open(buffer).memory, np.uint8)

    def _drop(self, trials: Sequence[str]) -> None:
        for trial in trials:
            self._freed += self._store.drop(trial)

    def _take_freed(self) -> tuple[int, ...]:
        """Keys of buffers that the worker may forget; this process does so here."""
        freed = (*self._freed, *self._store.freed())
        self._freed.clear()
        self._buffers.forget(freed)
        return freed

    def _close(self) -> None:
        self._workers.close()
        self._buffers.close()
        self._store.close()


_OPTIONS: dict[str, Any] = {"max_restarts": 0, "concurrency_groups": {"listening": 1}}
PostActor: Any = ray.remote(**_OPTIONS)(Post)
