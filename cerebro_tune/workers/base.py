"""What an executor asks of its workers; backends are found through the entry point group `cerebro_tune.workers`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import cloudpickle

from cerebro_tune.arguments import cores, devices_of
from cerebro_tune.clock import CLOCK, Clock
from cerebro_tune.errors import ConfigurationError, NotPicklableError
from cerebro_tune.store import BufferRef
from cerebro_tune.units import WorkerId
from cerebro_tune.wholefile import give_up
from cerebro_tune.workers.messages import Message, Order

Grow = Callable[[str, int], BufferRef]
"""Answers a worker that needs a working buffer for a trial: (trial, bytes) -> buffer."""


class Workers(ABC):
    """A fixed number of workers. One thread starts, sends, waits and closes; any thread may wake.

    Args:
        devices: One torch device string per worker.
        threads: What torch may use in each worker.
        first: Number of the first worker.
    """

    apart = False
    """Whether the workers, once started, are on several machines."""
    may_hang = True
    """Whether a worker that hangs leaves the coordinator free to notice."""
    stand_still: Callable[[OSError], object] = staticmethod(give_up)
    """What a unit in this very process calls while the disk is full; it may raise to give up."""
    clock: Clock = CLOCK
    """What the time of runs on these workers is counted by."""

    def __init__(self, devices: Sequence[str], threads: int, first: int = 0) -> None:
        self.ids = tuple(WorkerId(first + number) for number in range(len(devices)))
        self.devices, self.threads = tuple(devices), threads

    @classmethod
    def plan(
        cls,
        workers: int | None,
        devices: str | Sequence[str],
        per_device: int,
        resources: Mapping[str, float] | None,
    ) -> tuple[tuple[str, ...], Callable[[], Workers]]:
        """The device of each worker, and what makes the workers, as the arguments of `Cerebro` want it."""
        if resources is not None:
            raise ConfigurationError(
                f'resources_per_worker is {dict(resources)!r}, and only backend="ray" takes it: the workers of other '
                "backends are placed by workers, devices and workers_per_device."
            )
        found = devices_of(workers, devices, per_device)
        return found, partial(cls, found, max(1, len(cores()) // len(found)))

    def pinned(self, placement: str, shards: int) -> bool:
        """Whether each shard is to stay with one worker: "auto" is so where a machine would fetch what another has."""
        return placement == "pinned" or (placement == "auto" and self.apart and len(self.ids) <= shards)

    def device(self, worker: WorkerId) -> str:
        """Where a worker computes."""
        return self.devices[worker.number - self.ids[0].number]

    @abstractmethod
    def start(self, grow: Grow) -> None:
        """Bring every worker up; each says `Joined` through `wait`. `grow` is called inside `wait`."""

    @abstractmethod
    def send(self, worker: WorkerId, order: Order) -> None:
        """Give an order. Sending to a worker that is gone is no error: its `Lost` is on the way."""

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> list[Message]:
        """Block until a worker says something, `wake` is called or the time is over; return what was said."""

    @abstractmethod
    def wake(self) -> None:
        """Make `wait` return. From any thread, and from a signal handler."""

    def stopped(self) -> Collection[WorkerId]:
        """Workers whose process a signal or a debugger has stopped, as far as that can be known."""
        return ()

    @abstractmethod
    def restart(self, worker: WorkerId) -> None:
        """Bring up a replacement for a lost worker, or for one that is busy with what nobody wants any more."""

    @abstractmethod
    def close(self) -> None:
        """End every worker, busy or not, and leave nothing behind. May be called twice."""


class WakePipe:
    """A pipe that makes a selector return; ringing it twice is as good as once."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)

    def ring(self) -> None:
        """Make the reader readable."""
        with suppress(OSError):  # the pipe is full of rings already, or closed: whoever waited is gone
            os.write(self._writer, b"!")

    def silence(self) -> None:
        """Take out what was rung."""
        with suppress(BlockingIOError):
            os.read(self.reader, 4096)

    def close(self) -> None:
        """Close both ends; a ring after that finds descriptor -1, not somebody else's."""
        ends = self.reader, self._writer
        self.reader = self._writer = -1
        for end in ends:
            os.close(end)


def ship(what: Any, name: str) -> bytes:
    """Cloudpickle what is to travel to the workers; `name` begins the sentence of the error."""
    try:
        pickled: bytes = cloudpickle.dumps(what)
    except Exception as error:  # pickling runs code of the object's own, which may raise anything
        raise NotPicklableError(
            f"{name} cannot be sent to the workers: {type(error).__name__}: {error}. Make what it refers to "
            'inside the trainable instead (open files, locks and connections cannot travel), or use backend="inline".'
        ) from error
    return pickled


def backend_of(name: str) -> type[Workers]:
    """The backend of this name."""
    backends = {entry.name: entry for entry in entry_points(group="cerebro_tune.workers")}
    if name not in backends:
        raise ConfigurationError(f"There is no backend {name!r}; valid: {', '.join(sorted(backends))}.")
    backend: type[Workers] = backends[name].load()
    return backend
