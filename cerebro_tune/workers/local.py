"""Workers on this machine, one process each."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import monotonic

import psutil

from cerebro_tune.errors import StateMemoryError, WorkerError
from cerebro_tune.units import WorkerId
from cerebro_tune.workers import server
from cerebro_tune.workers.base import Grow, WakePipe, Workers
from cerebro_tune.workers.child import Boot
from cerebro_tune.workers.messages import Exit, Grant, Lost, Message, NeedBuffer, Order

_END_S = 2.0
"""How long a process may take to end by itself before it is killed."""


@dataclass
class _Seat:
    """A worker as the coordinator sees it."""

    worker: WorkerId
    connection: Connection
    pid: int
    parent: _Server | subprocess.Popen[bytes]
    """Who tells how it ended: the server that forked it, or the handle of an interpreter of its own."""


class LocalWorkers(Workers):
    """Forked by a server process; in fresh interpreters where CUDA is used (it cannot be forked) or on macOS."""

    def __init__(self, devices: Sequence[str], threads: int, first: int = 0, fork: bool | None = None) -> None:
        super().__init__(devices, threads, first)
        may_fork = sys.platform == "linux" and not any(device.startswith("cuda") for device in devices)
        self._fork = may_fork if fork is None else fork
        self._seats: dict[WorkerId, _Seat] = {}
        self._server: _Server | None = None
        self._pipe: WakePipe | None = None
        self._said: list[Message] = []

    def start(self, grow: Grow) -> None:  # noqa: D102
        self._grow = grow
        self._pipe = WakePipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe.reader, selectors.EVENT_READ)
        for worker in self.ids:
            self.restart(worker)

    def restart(self, worker: WorkerId) -> None:  # noqa: D102
        if seat := self._seats.pop(worker, None):
            self._unseat(seat, kill=True)
        self._said = [message for message in self._said if message.worker != worker]
        ours, theirs = socket.socketpair()
        with theirs:
            parent = self._live_server() if self._fork else _interpreter("child", theirs)
            pid = parent.fork(theirs) if isinstance(parent, _Server) else parent.pid
        connection = Connection(ours.detach())
        self._seats[worker] = _Seat(worker, connection, pid, parent)
        self._selector.register(connection, selectors.EVENT_READ, self._seats[worker])
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(self._boot(worker))

    def send(self, worker: WorkerId, order: Order) -> None:  # noqa: D102
        if seat := self._seats.get(worker):
            with suppress(BrokenPipeError, ConnectionResetError):  # it is gone; `wait` will say so
                seat.connection.send(order)

    def wait(self, timeout_s: float | None = None) -> list[Message]:  # noqa: D102
        assert self._pipe is not None, "wait before start"
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._pipe.reader:
                self._pipe.silence()
            else:
                self._hear(key.data)
        said, self._said = self._said, []
        return said

    def wake(self) -> None:  # noqa: D102
        if self._pipe is not None:
            self._pipe.ring()

    def stopped(self) -> list[WorkerId]:  # noqa: D102
        return [worker for worker, seat in self._seats.items() if _is_stopped(seat.pid)]

    def close(self) -> None:  # noqa: D102
        if self._pipe is None:
            return
        for worker in self._seats:
            self.send(worker, Exit())
        deadline = monotonic() + _END_S
        for seat in self._seats.values():
            _hear_out(seat.connection, deadline)
            self._unseat(seat, kill=False)
        self._seats.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._selector.close()
        self._pipe.close()
        self._pipe = None

    @property
    def pids(self) -> dict[WorkerId, int]:
        """The process of each worker."""
        return {worker: seat.pid for worker, seat in self._seats.items()}

    def _live_server(self) -> _Server:
        if self._server is not None and self._server.gone:
            self._server.close()
            self._server = None
        if self._server is None:
            self._server = _Server()
        return self._server

    def _boot(self, worker: WorkerId) -> Boot:
        """Each CUDA worker sees its own device only, as device 0."""
        kind, _, index = self.device(worker).partition(":")
        if kind != "cuda":
            return Boot(worker, kind, None, self.threads, os.getpid())
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = allowed.split(",")[int(index or 0)] if allowed else index or "0"
        return Boot(worker, "cuda:0", visible, self.threads, os.getpid())

    def _hear(self, seat: _Seat) -> None:
        try:
            message = seat.connection.recv()
        except (EOFError, OSError):  # also when it died in the middle of a message
            self._lose(seat)
            return
        if isinstance(message, NeedBuffer):
            try:
                grant = Grant(self._grow(message.trial, message.nbytes))
            except StateMemoryError as error:
                grant = Grant(None, str(error))
            self.send(seat.worker, grant)
        else:
            self._said.append(message)

    def _lose(self, seat: _Seat) -> None:
        self._said.append(Lost(seat.worker, self._unseat(seat, kill=False)))
        self._seats.pop(seat.worker, None)

    def _unseat(self, seat: _Seat, kill: bool) -> str:
        """End a worker's process if it has not ended, and tell how it ended."""
        self._selector.unregister(seat.connection)
        seat.connection.close()  # from here on it has two reasons to end: this, and what follows
        if kill:
            with suppress(ProcessLookupError):
                os.kill(seat.pid, signal.SIGKILL)
        if isinstance(seat.parent, _Server):
            status = seat.parent.status_of(seat.pid)
            return "nobody saw how, its server was gone" if status is None else _told(os.waitstatus_to_exitcode(status))
        try:
            return _told(seat.parent.wait(_END_S))
        except subprocess.TimeoutExpired:
            seat.parent.kill()
            return _told(seat.parent.wait())


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def _hear_out(connection: Connection, deadline: float) -> None:
    """Wait until a worker that was told to exit hangs up, having let go of what it holds: loaders, a DataModule.

    To close the connection would end it at once.
    """
    with suppress(EOFError, OSError):
        while connection.poll(max(0.0, deadline - monotonic())):
            connection.recv()


def _interpreter(module: str, theirs: socket.socket, *arguments: str) -> subprocess.Popen[bytes]:
    """A fresh interpreter that runs a module of ours on this socket, in a session that Ctrl-C does not reach."""
    return subprocess.Popen(
        server.command(module, theirs.fileno(), *arguments),
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class _Server:
    """The coordinator's side of the forking server."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = _interpreter("server", theirs, *server.frameworks())
        self._ended: dict[int, int] = {}

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def fork(self, theirs: socket.socket) -> int:
        """Fork a worker onto this socket; return its pid."""
        try:
            socket.send_fds(self._control, [server.FORK], [theirs.fileno()])
            while True:
                pid, status = self._answer()
                if status == -1:
                    return pid
                self._ended[pid] = status
        except (EOFError, OSError) as error:
            raise WorkerError(
                f"The process that forks workers ended with {self._process.wait()}; what it printed above says why."
            ) from error

    def status_of(self, pid: int) -> int | None:
        """The wait status of a worker that is ending, killed if it takes too long; None if the server is gone."""
        try:
            self._control.settimeout(_END_S)
            while pid not in self._ended:
                try:
                    ended, status = self._answer()
                except TimeoutError:
                    os.kill(pid, signal.SIGKILL)
                    self._control.settimeout(None)
                else:
                    self._ended[ended] = status
            self._control.settimeout(None)
        except (EOFError, OSError):  # the server is gone, or was closed because it was
            return None
        return self._ended.pop(pid)

    def close(self) -> None:
        """Hang up, which ends it."""
        self._control.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> tuple[int, int]:
        parts = b""
        while len(parts) < server.ANSWER.size:
            part = self._control.recv(server.ANSWER.size - len(parts))
            if not part:
                raise EOFError
            parts += part
        pid, status = server.ANSWER.unpack(parts)
        return pid, status


def _told(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it exited with {code}"
    name = signal.Signals(-code).name
    hint = " (often the system's out-of-memory killer)" if name == "SIGKILL" else ""
    return f"it was killed by {name}{hint}"
