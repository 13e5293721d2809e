"""The life of a worker process: obey orders from its socket until the other end says so, or is gone."""

from __future__ import annotations

import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Lock, Thread
from time import sleep
from typing import Any

from cerebro_tune.errors import StateMemoryError
from cerebro_tune.store import BufferRef
from cerebro_tune.units import WorkerId
from cerebro_tune.wholefile import LOOK_AGAIN_S, told
from cerebro_tune.workers.messages import (
    Exit,
    Forget,
    Grant,
    Joined,
    Message,
    NeedBuffer,
    Output,
    Ready,
    Rest,
    Setup,
    Task,
    Waiting,
)
from cerebro_tune.workers.runner import UnitRunner, run_task, set_up


@dataclass(frozen=True, slots=True)
class Boot:
    """The first thing a worker process hears: who it is, where it computes, and for whom."""

    worker: WorkerId
    device: str
    visible_devices: str | None
    threads: int
    coordinator: int


def live(descriptor: int) -> None:
    """Be a worker on this socket; returns when told to exit or when the coordinator is gone."""
    connection = Connection(descriptor)
    boot: Boot = connection.recv()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to answer
    _end_with(connection, boot.coordinator)
    _take_device(boot)
    worker = _Worker(connection, boot)
    os.register_at_fork(after_in_child=worker.disown)
    worker.obey()


def _take_device(boot: Boot) -> None:
    """Choose device and threads; CUDA reads the variable when it starts, so this comes before anything touches it."""
    if boot.visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = boot.visible_devices
    os.environ["OMP_NUM_THREADS"] = str(boot.threads)  # for what user code starts
    import torch

    torch.set_num_threads(boot.threads)


def _end_with(connection: Connection, coordinator: int) -> None:
    """End this process at once when the coordinator dies or hangs up, also in the middle of a unit."""
    watch = select.poll()
    watch.register(connection.fileno(), getattr(select, "POLLRDHUP", 0))  # a hang-up is reported without asking
    if hasattr(os, "pidfd_open"):
        try:
            watch.register(os.pidfd_open(coordinator), select.POLLIN)
        except ProcessLookupError:
            os._exit(1)

    def wait_for_the_end() -> None:
        watch.poll()
        os._exit(1)

    Thread(target=wait_for_the_end, name="cerebro-watch", daemon=True).start()


class _Worker:
    def __init__(self, connection: Connection, boot: Boot) -> None:
        self._connection, self._lock = connection, Lock()
        self._worker = boot.worker
        self._trial: str | None = None
        self._runner = UnitRunner(boot.worker, boot.device, self._grow, self._stand_still)
        _speak_through(Relay("stdout", self._relay), Relay("stderr", self._relay))

    def obey(self) -> None:
        self._say(Joined(self._worker))
        while True:
            try:
                order = self._connection.recv()
            except (EOFError, OSError):
                return
            match order:
                case Setup():
                    self._say(Ready(self._worker, set_up(self._runner, order)))
                case Task():
                    self._trial = order.unit.trial
                    said = run_task(self._runner, order)
                    sys.stdout.flush()
                    sys.stderr.flush()
                    self._trial = None
                    self._say(said)
                case Forget():
                    self._runner.forget(order)
                case Rest():
                    self._runner.close()
                case Exit():
                    self._runner.close()
                    return

    def disown(self) -> None:
        """In a process that this one forks, such as a DataLoader's: the socket is not its own.

        Kept open there, it would hide the worker's death from the coordinator; written to, it would garble what the
        worker says. What is printed goes to where the worker's own output would.
        """
        self._connection.close()
        _speak_through(sys.__stdout__, sys.__stderr__)

    def _grow(self, trial: str, nbytes: int) -> BufferRef:
        self._say(NeedBuffer(self._worker, trial, nbytes))
        grant: Grant = self._connection.recv()
        if grant.buffer is None:
            raise StateMemoryError(grant.error)
        return grant.buffer

    def _stand_still(self, error: OSError) -> None:
        self._say(Waiting(self._worker, told(error)))
        sleep(LOOK_AGAIN_S)

    def _relay(self, stream: str, text: str) -> None:
        self._say(Output(self._worker, self._trial, stream, text))

    def _say(self, message: Message) -> None:
        with self._lock:  # user code may print from threads of its own
            self._connection.send(message)


def _speak_through(out: Any, err: Any) -> None:
    """Make these the process's streams, also for loggers that hold those of before: Lightning's do, once imported."""
    instead = {id(sys.stdout): out, id(sys.stderr): err}
    sys.stdout, sys.stderr = out, err
    for logger in (logging.root, *logging.Logger.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in instead:
                handler.stream = instead[id(handler.stream)]


class Relay(io.TextIOBase):
    """A text stream that hands on whole lines, and what is left of one when flushed."""

    def __init__(self, name: str, hand_on: Callable[[str, str], None]) -> None:
        self.name, self._hand_on, self._open = name, hand_on, ""

    def writable(self) -> bool:  # noqa: D102
        return True

    def write(self, text: str) -> int:  # noqa: D102
        lines, end, self._open = (self._open + text).rpartition("\n")
        if end:
            self._hand_on(self.name, lines)
        return len(text)

    def flush(self) -> None:  # noqa: D102
        if self._open:
            rest, self._open = self._open, ""
            self._hand_on(self.name, rest)


def main() -> None:
    """A worker in a fresh interpreter: where CUDA forbids to fork, or the platform does."""
    live(int(sys.argv[1]))
    os._exit(0)
