"""The workers of one run: who is ready, what each runs, what each is to let go of."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from cerebro_tune.errors import WorkerError
from cerebro_tune.settings import RunSettings
from cerebro_tune.store import BufferRef
from cerebro_tune.units import Unit, WorkerId
from cerebro_tune.workers.base import Workers
from cerebro_tune.workers.messages import Forget, Lost, Message, Ready, Rest, Setup, Task, Waiting

if TYPE_CHECKING:
    from cerebro_tune.run import Run

_LEAST_DEADLINE_S, _SLOWER_THAN_ANY = 30.0, 5.0
"""A unit that takes longer than this, and so many times longer than its trial's slowest one yet, hangs."""
_LOOK_S = 2.0
"""Between two looks whether workers that run a unit were stopped."""
_FUTILE_STARTS = 3
"""A worker that dies this often in a row before it is ready will not come up at all."""


@dataclass(slots=True)
class _Watch:
    """Over one unit: when it began, how long it may take, and when it must have ended.

    That is later where it had to wait, or where nobody looked.
    """

    began_s: float
    limit_s: float
    ends_s: float


class Crew:
    """What a run knows of its workers, beside the state machine."""

    def __init__(self, workers: Workers, settings: RunSettings) -> None:
        self._workers, self._settings = workers, settings
        self._now = workers.clock.now
        self._looked_s = self._next_s = self._now()
        """When it was looked who is stopped, and when somebody may be to tell of."""
        self._stopped: Set[WorkerId] = frozenset()
        self.ids = workers.ids
        self.running: dict[WorkerId, Unit] = {}
        self._watches: dict[WorkerId, _Watch] = {}
        """Over the units that run."""
        self._slowest_s: dict[str, float] = {}
        """Of the units of each trial that ended so far."""
        self.unready: set[WorkerId] = set()
        """Workers that were told of the run and have not answered."""
        self.late: set[WorkerId] = set()
        """Those of them that are not even up, and may not be for long."""
        self._futile_starts: dict[WorkerId, int] = dict.fromkeys(workers.ids, 0)
        self._configured: dict[WorkerId, set[str]] = {worker: set() for worker in workers.ids}
        """The trials of which each worker has the config."""
        self._forgotten: dict[WorkerId, tuple[list[str], list[int]]] = {worker: ([], []) for worker in workers.ids}

    def wait(self, timeout_s: float | None = None) -> list[Message]:
        """What the workers say next; nothing when the time has passed."""
        said = self._workers.wait(timeout_s)
        for message in said:
            if isinstance(message, Waiting) and (watch := self._watches.get(message.worker)) is not None:
                watch.ends_s = self._now() + watch.limit_s
        return said

    def ended(self, worker: WorkerId, whole: bool = True) -> Unit | None:
        """The unit that a worker ran; `whole` says that it came to its end, and not the worker to his."""
        watch, unit = self._watches.pop(worker, None), self.running.pop(worker, None)
        if watch is not None and unit is not None and whole:
            self._slowest_s[unit.trial] = max(self._now() - watch.began_s, self._slowest_s.get(unit.trial, 0.0))
        return unit

    def silent(self) -> list[Lost]:
        """Workers that run a unit for longer than can be explained, or were stopped: what they run, others shall."""
        now = self._now()
        if now < self._next_s:
            return []
        stopped = self._stopped_workers(now)
        self._next_s = min([self._looked_s + _LOOK_S, *(watch.ends_s for watch in self._watches.values())])
        return [
            Lost(worker, f"its process stands still, stopped by a signal, for {_LOOK_S:.0f} s now")
            if worker in stopped
            else Lost(worker, f"a unit of its has not ended in the {watch.limit_s:.0f} s that are allowed")
            for worker, watch in self._watches.items()
            if worker in stopped or now > watch.ends_s
        ]

    def _stopped_workers(self, now: float) -> Set[WorkerId]:
        """Those that were found stopped twice: a terminal stops and wakes all processes at once."""
        since_s = now - self._looked_s
        if since_s < _LOOK_S:
            return frozenset()
        self._looked_s = now
        if since_s > 2 * _LOOK_S:  # this process did not look, or was stopped itself, which says nothing of others
            for watch in self._watches.values():
                watch.ends_s = min(watch.ends_s + since_s, now + watch.limit_s)
        before, self._stopped = self._stopped, frozenset(self._workers.stopped())
        return before & self._stopped

    @property
    def patience_s(self) -> float | None:
        """Seconds until `silent` may have somebody to tell of; None where nobody can hang."""
        if not self._watches or not self._workers.may_hang:
            return None
        return max(0.0, self._next_s - self._now()) + 0.01

    def _limit_s(self, trial: str) -> float:
        if not self._workers.may_hang:
            return inf
        if self._settings.unit_deadline_s is not None:
            return self._settings.unit_deadline_s
        slowest_s = self._slowest_s.get(trial)  # trials differ: none says how long another takes
        return inf if slowest_s is None else max(_LEAST_DEADLINE_S, _SLOWER_THAN_ANY * slowest_s)

    @property
    def awaited(self) -> Set[WorkerId]:
        """Whose answer the others wait for before anything trains: of those that are late only if all are."""
        return self.unready - self.late if self.unready != set(self.ids) else self.unready

    def set_up(self, worker: WorkerId, *, check: bool) -> None:
        """Tell a worker of the run. Each shard is checked once on this machine, by one of the workers."""
        mine = tuple(range(worker.number, self._settings.shards, len(self.ids))) if check else ()
        self.unready.add(worker)
        self._workers.send(worker, Setup(self._settings.spec, mine, check and worker.number == 0))

    def became_ready(self, ready: Ready) -> None:
        """A worker has answered; raises what it found wrong."""
        self.unready.discard(ready.worker)
        self.late.discard(ready.worker)
        self._futile_starts[ready.worker] = 0
        if ready.error is not None:
            raise ready.error

    def replace(self, lost: Lost, *, check: bool) -> None:
        """Bring up another worker in the place of a lost one; WorkerError when that was futile too often."""
        worker = lost.worker
        self.unready.add(worker)
        self._futile_starts[worker] += 1
        if self._futile_starts[worker] > _FUTILE_STARTS:
            raise WorkerError(f"{worker} does not come up: {lost.reason}, {_FUTILE_STARTS} times in a row.")
        self._forgotten[worker] = ([], [])
        self._configured[worker].clear()
        self._workers.restart(worker)
        self.set_up(worker, check=check)

    def holdings(self, worker: WorkerId) -> frozenset[int]:
        """The shards that a worker holds."""
        first, step = (worker.number, len(self.ids)) if self._settings.pinned else (0, 1)
        return frozenset(range(first, self._settings.shards, step))

    def give(self, worker: WorkerId, tasks: Sequence[Task]) -> None:
        """Give an idle worker units to run."""
        trials, buffers = self._forgotten[worker]
        if trials or buffers:  # said only to an idle worker: it reads, so that the send cannot block
            self._workers.send(worker, Forget(tuple(trials), tuple(buffers)))
            self._forgotten[worker] = ([], [])
        now = self._now()
        if not self._watches:  # there was nothing to look at
            self._looked_s, self._next_s = now, now + _LOOK_S
        for task in tasks:
            self.running[worker] = task.unit
            limit_s = self._limit_s(task.unit.trial)
            self._watches[worker] = _Watch(now, limit_s, now + limit_s)
            self._next_s = min(self._next_s, now + limit_s)
            known, trial = self._configured[worker], task.unit.trial
            self._workers.send(worker, replace(task, config=None, recipe=None) if trial in known else task)
            known.add(trial)

    def forget(self, trials: Sequence[str], buffers: Sequence[int]) -> None:
        """Note what each worker is to let go of before its next unit."""
        if not trials and not buffers:
            return
        for ended, freed in self._forgotten.values():
            ended.extend(trials)
            freed.extend(buffers)

    def dismiss(self, lost: Set[WorkerId]) -> None:
        """The run is over: who is still busy with it is replaced, and who was lost unnoticed; the others rest."""
        for worker in self.ids:
            if worker in self.unready | lost or worker in self.running:
                self._workers.restart(worker)
            else:
                self._workers.send(worker, Rest())
        self.running.clear()
        self._watches.clear()
        self.unready.clear()


class Grower:
    """Answers workers that need a buffer, from the run in progress; it outlives runs, and keeps no executor alive."""

    run: Run | None = None

    def grow(self, trial: str, nbytes: int) -> BufferRef:
        """A working buffer for the unit that a worker runs."""
        assert self.run is not None, "a worker runs a unit, and there is no run"
        return self.run.grow(trial, nbytes)
