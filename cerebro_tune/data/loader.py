"""Batches by torch's DataLoader, whose processes are kept from unit to unit.

To start two processes takes longer than many a unit. So one DataLoader lives as long as the run's data in a worker; its
sampler gives the draws of whichever unit is on.
"""

from __future__ import annotations

import ctypes
import gc
import io
import os
import pickle
import signal
import sys
import traceback
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, ClassVar

import cloudpickle

from cerebro_tune.data.base import NO_ROWS, Draw, Drawn, Reader
from cerebro_tune.errors import CerebroError, ConfigurationError, RowError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_PR_SET_PDEATHSIG = 1

_DYING_S = 1.0
"""How long a process takes at most from closing its descriptors to its end."""


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """What torch's DataLoader takes, under its names."""

    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int | None = None
    timeout: float = 0
    worker_init_fn: Callable[[int], None] | None = None


class Loader:
    """Gives the batches of one unit after another; processes, where asked for, start with `start`."""

    def __init__(self, reader: Reader, options: LoaderOptions, device: str) -> None:
        self._reader, self._options = reader, options
        self._pin = options.pin_memory and device.startswith("cuda")
        self._draws: Sequence[Draw] = ()
        self._loader: DataLoader[Drawn] | None = None
        self._iterator: Any = None
        self._turn = 0

    def start(self) -> None:
        """Start the processes, ahead of the first draw, and have each that reads compare its data: DataError."""
        for _ in self.read([NO_ROWS] * max(1, self._options.num_workers)):
            pass

    def read(self, draws: Sequence[Draw]) -> Iterator[Drawn]:
        """The batches of these draws, in order. A new call ends what a former one has not given yet."""
        self._turn += 1
        return self._one_at_a_time(draws, self._turn)

    @property
    def died(self) -> str | None:
        """How loader processes died, if any did."""
        dead = [process for process in getattr(self._iterator, "_workers", ()) if not process.is_alive()]
        if not dead:
            return None
        return ", ".join(f"process {process.pid} ended with {_told(process.exitcode)}" for process in dead)

    def close(self) -> None:
        """End the processes."""
        iterator, self._iterator, self._loader = self._iterator, None, None
        if hasattr(iterator, "_shutdown_workers"):
            # Not left to the garbage collector: a traceback that somebody keeps would keep the processes.
            iterator._shutdown_workers()
            for thread in [queue._thread for queue in iterator._index_queues]:
                if thread is not None:  # which closes the queue's pipe, and nobody else does
                    thread.join(_DYING_S)

    def _one_at_a_time(self, draws: Sequence[Draw], turn: int) -> Iterator[Drawn]:
        for drawn in self._loaded(draws):
            yield drawn
            if turn != self._turn:
                raise ConfigurationError(
                    "The batches of a unit were iterated again before a first iteration was over: finish one first, "
                    "or keep batches in a list."
                )

    def _loaded(self, draws: Sequence[Draw]) -> Iterator[Drawn]:
        if not self._options.num_workers and not self._pin:
            for draw in draws:  # not `map`, which a StopIteration of the user's code would end without a word
                yield self._reader[draw]
            return
        try:
            self._draws = draws
            for step in (self._begin, *repeat(self._next, len(draws))):
                with self._watched():
                    drawn = step()
                if drawn is not None:
                    yield drawn
        except Exception as error:
            if isinstance(error, OSError | EOFError):
                # Of a batch whose memory went with its process, which closes its descriptors before it has ended.
                processes = {process.sentinel: process for process in getattr(self._iterator, "_workers", ())}
                for sentinel in wait(list(processes), _DYING_S):
                    processes[sentinel].join(_DYING_S)
            if not self.died:
                self.close()  # a process that hangs, or answers late, must not be asked for another unit's batches
            raise

    def _begin(self) -> None:
        """Set the processes, started if they are not, to the draws of this unit."""
        if self._loader is None:
            self._loader = self._make()
        self._iterator = iter(self._loader)  # with processes the same every time, begun anew

    def _next(self) -> Drawn:
        drawn: Drawn | CerebroError = next(self._iterator)
        if isinstance(drawn, CerebroError):
            raise drawn
        return drawn

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Have the death of a process raise in here, at once, and nowhere else.

        Left to itself torch raises out of its handler of SIGCHLD whatever this process is at then: hopping a state, or,
        inline, the coordinator's own work.
        """
        self._watch(True)
        try:
            if died := self.died:
                raise RuntimeError(f"Before its batches were asked for, loader {died}")
            yield
        finally:
            self._watch(False)

    def _watch(self, on: bool) -> None:
        from torch._C import _remove_worker_pids, _set_worker_pids

        iterator = self._iterator
        if getattr(iterator, "_worker_pids_set", on) == on:  # of no processes: neither on nor off
            return
        if on:
            _set_worker_pids(id(iterator), tuple(process.pid for process in iterator._workers))
        else:
            _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = on

    def _make(self) -> DataLoader[Drawn]:
        import torch
        from torch.utils.data import DataLoader

        options = self._options
        workers: dict[str, Any] = {}
        if options.num_workers:
            workers = {
                "num_workers": options.num_workers,
                "persistent_workers": True,
                "prefetch_factor": options.prefetch_factor,
                "timeout": options.timeout,
                "worker_init_fn": _Birth(os.getpid(), self._reader, options.worker_init_fn),
            }
        return DataLoader(
            _Telling(self._reader),  # type: ignore[arg-type]  # a Dataset by what it can do
            batch_size=None,  # a draw is a whole batch
            sampler=_Current(self),
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # of one draw, where its stubs know lists of samples only
            pin_memory=self._pin,
            generator=torch.Generator(),  # or it would draw from the unit's
            **workers,
        )


class _Telling:
    """A reader whose own errors come as values: torch would bury their sentence in a traceback of its wrapper's."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, draw: Draw) -> Drawn | CerebroError | _Packed:
        from torch.utils.data import get_worker_info

        try:
            drawn = self._reader[draw]
            return drawn if get_worker_info() is None else _Packed(drawn)
        except CerebroError as error:
            error.add_note(traceback.format_exc())  # which a pickled error does not keep
            return error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # no stubs
    """By value what a script defines, and through shared memory what torch sends so."""

    # Of the class: the pickler in C looks here once, when it is made.
    dispatch_table: ClassVar[Any] = ChainMap(ForkingPickler._extra_reducers, cloudpickle.Pickler.dispatch_table)  # type: ignore[attr-defined]


class _Packed:
    """What was drawn, pickled: by value, which a queue's own pickler cannot, and here, where a failure is told.

    In the queue's thread it would be printed and the batch lost, for which the worker would wait without end. Tensors
    go through shared memory, as ever.
    """

    def __init__(self, drawn: Drawn) -> None:
        file = io.BytesIO()
        try:
            _Pickler(file).dump(drawn)
        except Exception as error:  # pickling runs code of the object's own, which may raise anything
            raise RowError(
                f"A batch cannot be sent from its loader process: {type(error).__name__}: {error}. Return tensors, "
                'numbers, text and containers of these, or load in the worker itself: loader={"num_workers": 0}.'
            ) from error
        self._content = file.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._content,)


class _Current:
    """The sampler: the draws of the unit that is on."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Draw]:
        return iter(self._loader._draws)

    def __len__(self) -> int:
        return len(self._loader._draws)


class _Birth:
    """What a loader process does first: see to it that it ends with the worker, then what the user wants."""

    def __init__(self, parent: int, reader: Reader, then: Callable[[int], None] | None) -> None:
        self._parent, self._reader, self._then = parent, reader, then

    def __call__(self, number: int) -> None:
        # Mapped states are not in a fork: to collect one here would unmap whatever lies in its place by now.
        gc.freeze()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends units, not what they read with
        if sys.platform == "linux":
            # At once, also after a kill that leaves the worker no time; torch itself looks every five seconds.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self._parent:
                os._exit(1)
        if self._then is not None:
            from torch.utils.data import get_worker_info

            # Where recipes look for the Dataset, to open a file or to seed a generator in it.
            object.__setattr__(get_worker_info(), "dataset", self._reader.source)
            self._then(number)


def _as_it_is(drawn: Drawn) -> Drawn:
    return drawn


def _told(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
