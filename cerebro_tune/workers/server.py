"""A small process that has torch imported, and Lightning if need be, and forks workers on request.

Forking takes milliseconds where a fresh interpreter takes seconds to import torch, and workers share what was
imported. Unlike multiprocessing's forkserver it never imports the user's main module, so unguarded scripts and
notebooks work, and it leaves nothing behind: it ends when its control socket does, and each worker ends with its own.

On the control socket: one byte with a worker's socket attached asks for a fork. The answers are (pid, exit status or
None) as fixed-size structs: None when a worker was forked, its wait status when it ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ANSWER = struct.Struct("<qq")
"""(pid, wait status), the status -1 for a worker that was just forked."""

FORK = b"f"

_LOOK_S = 0.2
_FRAMEWORKS = ("pytorch_lightning", "lightning.pytorch")
"""Imported where the coordinator has them, for every worker at once."""

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from cerebro_tune.workers.{module} import main; main()"
)
"""What the interpreter of a server or of a fresh worker runs: the coordinator's own path, then `main`."""


def command(module: str, descriptor: int, *arguments: str) -> list[str]:
    """The command line of a server, or of a worker in a fresh interpreter, that speaks on this descriptor."""
    return [sys.executable, "-c", PROGRAM.format(module=module), str(descriptor), json.dumps(sys.path), *arguments]


def frameworks() -> list[str]:
    """What this process has imported that its workers will need: the arguments of a server."""
    return [name for name in _FRAMEWORKS if name in sys.modules]


def main() -> None:
    """Serve until the control socket ends, and end at once: to take torch down takes most of a second."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    with _ending_with(control):
        _import(sys.argv[3:])
    _serve(control)
    sys.stdout.flush()
    os._exit(0)


def _import(names: list[str]) -> None:
    """Import what every worker needs, and leave all of it to them as it is.

    Without the collector, which looks through a million new objects again and again and finds nothing; frozen, they are
    not looked at in the workers either, whose pages stay those of this process.
    """
    gc.disable()
    import torch._dynamo  # noqa: F401  # the first optimizer that is made needs it too

    from cerebro_tune.workers import child  # noqa: F401

    for name in names:
        with suppress(Exception):  # a worker that cannot do without will say why
            importlib.import_module(name)
    gc.freeze()
    gc.enable()


def _serve(control: socket.socket) -> None:
    bell, bell_end = socket.socketpair()
    for end in (bell, bell_end):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # it need only ring the bell
    signal.set_wakeup_fd(bell_end.fileno(), warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(bell, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if bell in ready:
                bell.recv(4096)
                _reap(control)
            if control in ready and not _fork_one(control):
                signal.set_wakeup_fd(-1)  # workers end now too, and the bell is gone
                return


@contextmanager
def _ending_with(control: socket.socket) -> Iterator[None]:
    """Look now and then whether the coordinator has hung up: imports take seconds, on a busy machine many.

    By a timer, not a thread, which a process that forks must not have.
    """
    watch = select.poll()
    watch.register(control, getattr(select, "POLLRDHUP", select.POLLHUP))

    def look(*_: object) -> None:
        if watch.poll(0):
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _fork_one(control: socket.socket) -> bool:
    """Fork a worker onto the socket that came with the request; false when the coordinator hung up."""
    request, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if not request:
        return False
    (descriptor,) = descriptors
    pid = os.fork()
    if pid == 0:
        _become_worker(control, descriptor)
    os.close(descriptor)
    return _answer(control, pid, -1)


def _become_worker(control: socket.socket, descriptor: int) -> None:
    """Never returns: the forked process must not run on in the server's frames."""
    from cerebro_tune.workers import child

    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        child.live(descriptor)
    finally:
        sys.stdout.flush()
        os._exit(0)


def _reap(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _answer(control, pid, status)


def _answer(control: socket.socket, pid: int, status: int) -> bool:
    """Tell the coordinator; false when it is gone."""
    try:
        control.sendall(ANSWER.pack(pid, status))
    except OSError:
        return False
    return True
