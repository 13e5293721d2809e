"""Contenders that take turns, each in a process of its own, so that what it uses can be told from what others do."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import count
from math import nan
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from _processes import Usage

Opened = Callable[[], AbstractContextManager[Callable[..., int]]]
"""Starts what a contender needs, and gives the call that is a turn, which returns how many units it has run."""

PRELOADED = ["pytorch_lightning", "cerebro_tune_lightning"]
"""Installed packages only: the server does not find the scripts of this folder."""
_LOOK_S = 0.2
_MEMORY_EVERY = 5  # looks


@dataclass(frozen=True)
class Turn:
    """What a turn took; of one that was watched, what all its processes have used together."""

    wall_s: float
    units: int
    cpu_s: float = nan
    peak_mb: float = nan

    @property
    def unit_ms(self) -> float:
        """Wall clock per unit."""
        return 1e3 * self.wall_s / self.units


def median(turns: Sequence[Turn]) -> Turn:
    """The turn that took the median of wall clock per unit; of an even number the slower one."""
    return next(turn for turn in turns if turn.unit_ms == statistics.median_high(each.unit_ms for each in turns))


class Contender:
    """Close it at the end; `opened` is a function that its process can import.

    What it uses is looked at only where it is `watched`: that takes 4 % of a core, which two busy workers miss and a
    plain loop beside an idle core does not.
    """

    def __init__(self, opened: Opened, watched: bool = False) -> None:
        self._watched = watched
        # forked from a process that has imported what takes long, where that cannot be seen in its memory
        context: Any = multiprocessing.get_context("spawn" if watched else "forkserver")
        if not watched:
            context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(opened, theirs))
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def turn(self, *arguments: Any) -> Turn:
        """Let it have its turn."""
        assert self._process.pid is not None, "started"
        if not self._watched:
            self._pipe.send(arguments)
            return Turn(*self._pipe.recv())
        usage = Usage(self._process.pid)
        self._pipe.send(arguments)
        for look in count():
            usage.look(memory=look % _MEMORY_EVERY == 0)
            if self._pipe.poll(_LOOK_S):
                break
        wall_s, units = self._pipe.recv()
        usage.look(memory=True)
        return Turn(wall_s, units, usage.cpu_s, usage.peak_mb)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def started(opened: dict[str, Opened], watched: bool = False) -> Iterator[dict[str, Contender]]:
    """All contenders, ready for their turns."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Contender(each, watched)) for name, each in opened.items()}


def _serve(opened: Opened, pipe: Connection) -> None:
    warnings.simplefilter("ignore")  # errors it tells on stderr
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), opened() as act:
        pipe.send(None)
        while True:
            try:
                arguments = pipe.recv()
            except EOFError:
                return
            began = perf_counter()
            units = act(*arguments)
            pipe.send((perf_counter() - began, units))
