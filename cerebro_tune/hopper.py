"""The state machine of model hopper parallelism.

Theory of operation
-------------------
The machine holds what is true of a run (trials, shards, workers, open jobs) and nothing else: no clock, no I/O, no
thread, no randomness of its own. A shell around it tells it facts and carries out its orders:

    orders = hopper.apply(event)      # ReportUnit, DropState
    starts = hopper.dispatch()        # StartJob for idle workers, once a batch of events has been applied

`dispatch` is apart from `apply` so that a tuner which answers at once has its decision applied before the worker that
has just got idle is given something else. The same object runs under the simulator (virtual clock), the live executor
and recovery (events from the journal), and equal events give equal orders.

A trial's life is the table TRANSITIONS; nothing else changes a status. Between two units a trial *is* its committed
state, a version number (units committed) and a bit mask of the shards it has still to visit in this epoch; so a pause,
a hop and a clone cost the machine nothing. A worker that dies takes no more with it than the unit it ran: the unit goes
back, and starts again from the same version. A unit that has begun is never interrupted: a PAUSE or STOP for a running
trial is remembered and joined with the decision at the unit's end, the firmer one wins.

An event that the tables do not allow raises IllegalEventError and changes nothing: each handler checks, then acts.

The logical clock (policy "fixed")
----------------------------------
Real durations differ from run to run; a run that repeats exactly must not look at them. So time is counted as if every
unit lasted 1: units end in the order in which they were started. `_line` holds the open jobs in that order. A result
that comes early waits in its job until the job is at the head; then it is committed and reported, and the clock stands
until the tuner has decided. At that instant, and not before, what the tuner has meanwhile added is let in, and each
worker without a job is promised its next one, before any further result is looked at. A worker that was lost keeps its
place: its job waits for it to join again. Hence choices and reports are a function of the seed, the trials and the
decisions. What a tuner adds after its answer is let in with its next answer, or at once when no job is open.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NoReturn, cast

from cerebro_tune.errors import ConfigurationError, IllegalEventError, InvariantError
from cerebro_tune.events import (
    Event,
    SearchEnded,
    TrialAdded,
    TrialCloned,
    TrialDecided,
    UnitFailed,
    UnitFinished,
    WorkerJoined,
    WorkerLost,
)
from cerebro_tune.instructions import DropState, Instruction, ReportUnit, StartJob
from cerebro_tune.policy import NOWHERE, Board, Candidate, Choice, Policy, make_policy
from cerebro_tune.story import Row
from cerebro_tune.units import Decision, Shard, Status, Trial, Unit, WorkerId


class Move(Enum):
    """What can happen to a trial."""

    ADMIT = "admit"
    START = "start"
    COMMIT = "commit"  # the unit is committed; no report is due
    REPORT = "report"  # the unit is committed, the tuner is asked
    LOSE = "lose"  # the worker died in the unit
    GIVE_UP = "give up"  # ... once too often
    RAISE = "raise"  # the user's code raised
    CONTINUE = "continue"
    PAUSE = "pause"
    STOP = "stop"
    END = "end"  # CONTINUE or STOP with no units left


TRANSITIONS: dict[Status, dict[Move, Status]] = {
    Status.QUEUED: {
        Move.ADMIT: Status.READY,
        Move.CONTINUE: Status.QUEUED,
        Move.PAUSE: Status.PAUSED,
        Move.STOP: Status.STOPPED,
    },
    Status.READY: {
        Move.START: Status.RUNNING,
        Move.CONTINUE: Status.READY,
        Move.PAUSE: Status.PAUSED,
        Move.STOP: Status.STOPPED,
    },
    Status.RUNNING: {
        Move.COMMIT: Status.READY,
        Move.REPORT: Status.DECIDING,
        Move.LOSE: Status.READY,
        Move.GIVE_UP: Status.FAILED,
        Move.RAISE: Status.FAILED,
        # remembered until the unit's end
        Move.CONTINUE: Status.RUNNING,
        Move.PAUSE: Status.RUNNING,
        Move.STOP: Status.RUNNING,
    },
    Status.DECIDING: {
        Move.CONTINUE: Status.READY,
        Move.PAUSE: Status.PAUSED,
        Move.STOP: Status.STOPPED,
        Move.END: Status.FINISHED,
    },
    Status.PAUSED: {
        Move.CONTINUE: Status.QUEUED,
        Move.PAUSE: Status.PAUSED,
        Move.STOP: Status.STOPPED,
        Move.END: Status.FINISHED,
    },
    Status.FINISHED: {},
    Status.STOPPED: {},
    Status.FAILED: {},
}

_LIVE = frozenset({Status.READY, Status.RUNNING, Status.DECIDING})
_ENDED = frozenset({Status.FINISHED, Status.STOPPED, Status.FAILED})
_MOVE_OF = {Decision.CONTINUE: Move.CONTINUE, Decision.PAUSE: Move.PAUSE, Decision.STOP: Move.STOP}
_STORY_ROWS = 64
_RECENT_UNITS = 5  # the moving average is the plain mean up to here, and forgets at this rate after
_PACE_RATE = 0.05


class _Record(Candidate):
    """A trial as the machine knows it."""

    __slots__ = (
        "cause",
        "deaths",
        "epoch",
        "job",
        "key",
        "listed",
        "state_at",
        "status",
        "story",
        "trial",
        "units_done",
        "wish",
    )

    def __init__(self, trial: Trial, shards: int) -> None:
        super().__init__(trial.index, left=(1 << shards) - 1, units_left=trial.epochs * shards)
        self.trial = trial
        self.status = Status.QUEUED
        self.epoch = 0
        self.units_done = 0
        self.deaths = 0
        self.wish: Decision | None = None  # a decision that came during a unit
        self.job: _Job | None = None
        self.state_at: WorkerId | None = None
        self.key = 0.0
        self.listed = False  # in the list of ready trials
        self.cause = 0
        self.story: deque[Row] = deque(maxlen=_STORY_ROWS)


class _Seat:
    """A worker as the machine knows it. Under the logical clock it stays, empty, when the worker is lost."""

    __slots__ = ("cause", "fresh", "held", "id", "job", "pace", "present")

    def __init__(self, worker: WorkerId) -> None:
        self.id = worker
        self.held = 0  # bit s is set when the worker holds shard s
        self.present = False
        self.job: _Job | None = None
        self.fresh = True  # not yet asked, since it got idle, with all ready trials
        self.pace = 1.0  # moving average of its unit times over those trials' own averages
        self.cause = 0


class _Job:
    """Units of one shard, given to one worker together."""

    __slots__ = ("early", "number", "open", "records", "seat", "shard")

    def __init__(self, seat: _Seat, shard: int, records: Sequence[_Record]) -> None:
        self.number = 0  # 0: promised, and not begun
        self.seat = seat
        self.shard = shard
        self.records = {record.trial.id: record for record in records}
        self.open: list[Unit] = [Unit(record.trial.id, record.epoch, shard) for record in records]
        self.early: list[UnitFinished | UnitFailed] = []  # results that wait for their turn on the logical clock


class Hopper:
    """The machine; see the module's head.

    `live_trials` bounds the trials that are ready, running or deciding (None: no bound). `report_every` is "unit" or
    "epoch". A trial whose units' workers died more than `max_failures` times fails. `seed` drives "random" and "fixed".
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        policy: str | Policy = "auto",
        live_trials: int | None = None,
        report_every: str = "unit",
        max_failures: int = 2,
        seed: int = 0,
    ) -> None:
        _check_arguments(shards, live_trials, report_every, max_failures)
        self._shards = tuple(shards)
        self._policy = make_policy(policy, seed)
        self._limit = live_trials
        self._report_units = report_every == "unit"
        self._max_failures = max_failures
        self._records: dict[str, _Record] = {}
        self._queue: OrderedDict[str, _Record] = OrderedDict()
        self._inbox: OrderedDict[str, _Record] = OrderedDict()  # logical clock: to be queued at its next instant
        self._ready: list[tuple[float, int, Candidate]] = []
        self._newly: list[_Record] = []  # got ready since the last dispatch
        self._elders: list[int] = []  # orders of admission of the live trials
        self._admitted = 0
        self._search_ended = False
        self._seats: dict[int, _Seat] = {}
        self._idle: dict[int, _Seat] = {}
        self._jobs: dict[int, _Job] = {}
        self._job_count = 0
        self._line: deque[_Job] = deque()  # logical clock: open and promised jobs in their order
        self._awaited: _Record | None = None  # logical clock: it stands until this trial is decided
        self._board = Board(shards=len(self._shards))
        self._regime = self._policy.regime(self._board)
        self._events = 0
        self._handlers = {
            TrialAdded: self._on_trial_added,
            TrialCloned: self._on_trial_cloned,
            WorkerJoined: self._on_worker_joined,
            WorkerLost: self._on_worker_lost,
            UnitFinished: self._on_unit_ended,
            UnitFailed: self._on_unit_ended,
            TrialDecided: self._on_trial_decided,
            SearchEnded: self._on_search_ended,
        }

    # ---------------------------------------------------------------- events in

    def apply(self, event: Event) -> list[Instruction]:
        """Take in one fact and return the orders that follow from it. Raises IllegalEventError, changing nothing."""
        out: list[Instruction] = []
        self._handlers[type(event)](event, out)  # type: ignore[operator]
        return out

    def _on_trial_added(self, event: TrialAdded, out: list[Instruction]) -> None:
        self._check_new(event, event.trial)
        self._events += 1
        self._enrol(_Record(event.trial, len(self._shards)))

    def _on_trial_cloned(self, event: TrialCloned, out: list[Instruction]) -> None:
        self._check_new(event, event.trial)
        source = self._find(event, event.source)
        if source.status in _ENDED:
            _refuse(event, f"trial {event.source!r}", source.status.value, "cloning one whose state still exists")
        units = event.trial.epochs * len(self._shards)
        if units <= source.units_done:
            done = f"{source.units_done} units trained"
            _refuse(event, f"trial {event.source!r}", done, f"a clone of more units than that, not {units}")
        self._events += 1
        record = _Record(event.trial, len(self._shards))
        record.epoch, record.left, record.units_done = source.epoch, source.left, source.units_done
        if not record.left:
            record.left = (1 << len(self._shards)) - 1
        record.units_left = units - source.units_done
        record.state_at, record.home, record.last = source.state_at, source.home, source.last
        self._enrol(record)

    def _on_worker_joined(self, event: WorkerJoined, out: list[Instruction]) -> None:
        seat = self._seats.get(event.worker.number)
        if seat is not None and seat.present:
            _refuse(event, str(event.worker), "here already", "WorkerLost, UnitFinished or UnitFailed of its job")
        unknown = sorted(s for s in event.shards if not 0 <= s < len(self._shards))
        if unknown or not event.shards:
            _refuse(event, str(event.worker), f"unknown with shards {unknown}", f"some of 0..{len(self._shards) - 1}")
        self._events += 1
        if seat is None:
            seat = self._seats[event.worker.number] = _Seat(event.worker)
        seat.present = True
        seat.held = sum(1 << shard for shard in event.shards)
        seat.cause = self._events
        if seat.job is None:
            self._idle[event.worker.number] = seat
        self._workers_changed()

    def _on_worker_lost(self, event: WorkerLost, out: list[Instruction]) -> None:
        seat = self._seats.get(event.worker.number)
        if seat is None or not seat.present:
            _refuse(event, str(event.worker), "not here", "WorkerJoined")
        self._events += 1
        seat.present = False
        for record in self._records.values():
            if record.state_at == event.worker:
                record.state_at = None
                if not self._policy.logical:
                    record.home = NOWHERE
        if seat.job is not None and seat.job.number:
            self._take_back(seat.job, event, out)
        if not self._policy.logical:
            seat.job = None
            del self._seats[event.worker.number]
            self._idle.pop(event.worker.number, None)
        self._workers_changed()
        self._admit()

    def _on_unit_ended(self, event: UnitFinished | UnitFailed, out: list[Instruction]) -> None:
        job = self._jobs.get(event.job)
        if job is None:
            opened = ", ".join(map(str, sorted(self._jobs))) or "none"
            _refuse(event, f"job {event.job}", "not open", f"units of the open jobs: {opened}")
        if event.unit not in job.open:
            _refuse(event, f"job {event.job}", f"of {job.open} still", "the end of one of these")
        if isinstance(event, UnitFinished) and not event.elapsed_s >= 0:
            _refuse(event, f"job {event.job}", "running", "a duration of 0 seconds or more")
        self._events += 1
        job.open.remove(event.unit)
        if not job.open:
            del self._jobs[event.job]
        if self._policy.logical:
            job.early.append(event)
            self._tick(out)
            return
        if not job.open:
            self._seat_free(job)
        self._settle(job, event, out)
        self._admit()

    def _on_trial_decided(self, event: TrialDecided, out: list[Instruction]) -> None:
        record = self._find(event, event.trial)
        status = record.status
        if status in _ENDED:
            _refuse(event, f"trial {event.trial!r}", status.value, "nothing: it has ended")
        self._events += 1
        decision = event.decision
        if status is Status.RUNNING:
            if decision is not Decision.CONTINUE or record.wish is not Decision.STOP:
                record.wish = Decision.STOP if record.wish is Decision.STOP else decision
            self._move(record, _MOVE_OF[decision], event, out)
            return
        self._decide(record, decision, event, out)
        if record is self._awaited:
            self._awaited = None
            self._let_in()
            self._tick(out)
        self._admit()

    def _on_search_ended(self, event: SearchEnded, out: list[Instruction]) -> None:
        self._events += 1
        self._search_ended = True
        self._admit()

    # ---------------------------------------------------------------- what events do

    def _enrol(self, record: _Record) -> None:
        record.cause = self._events
        self._records[record.trial.id] = record
        self._enqueue(record)
        self._admit()

    def _enqueue(self, record: _Record) -> None:
        (self._inbox if self._policy.logical else self._queue)[record.trial.id] = record

    def _admit(self) -> None:
        """Let queued trials in while there is room; under the logical clock only its instants do."""
        if not self._policy.logical:
            self._fill()

    def _fill(self) -> None:
        while self._queue and (self._limit is None or self._board.live < self._limit):
            _, record = self._queue.popitem(last=False)
            if record.order < 0:
                record.order = self._admitted
                self._admitted += 1
            self._move(record, Move.ADMIT, None, [])
        self._board.admitting = bool(self._queue) or not self._search_ended

    def _let_in(self) -> None:
        self._queue.update(self._inbox)
        self._inbox.clear()

    def _settle(self, job: _Job, event: UnitFinished | UnitFailed, out: list[Instruction]) -> bool:
        """Commit or fail a unit whose time has come; True when the tuner is asked."""
        record = job.records[event.unit.trial]
        record.job = None
        if isinstance(event, UnitFailed):
            self._move(record, Move.RAISE, event, out)
            return False
        bit = 1 << event.unit.shard
        if record.status is not Status.RUNNING or not record.left & bit or record.epoch != event.unit.epoch:
            raise InvariantError(f"{event} cannot be committed\n" + "\n".join(map(str, record.story)))
        record.left ^= bit
        record.units_done += 1
        record.units_left -= 1
        record.last = event.unit.shard
        record.home = job.seat.id.number
        record.state_at = job.seat.id if job.seat.present else None
        epoch_done = not record.left
        if epoch_done:
            record.epoch += 1
            record.left = (1 << len(self._shards)) - 1 if record.units_left else 0
        if self._policy.learns:
            _learn(record, job.seat, event.elapsed_s / len(job.records))
        if self._report_units or epoch_done:
            self._move(record, Move.REPORT, event, out)
            last = not record.units_left
            out.append(ReportUnit(event.job, event.unit, record.units_done, epoch_done, last))
            return True
        self._move(record, Move.COMMIT, event, out)
        self._grant_wish(record, event, out)
        return False

    def _grant_wish(self, record: _Record, event: Event, out: list[Instruction]) -> None:
        if record.wish is not None:
            self._decide(record, Decision.CONTINUE, event, out)

    def _decide(self, record: _Record, decision: Decision, event: Event, out: list[Instruction]) -> None:
        if record.wish is not None:
            decision = decision.joined(record.wish)
            record.wish = None
        move = _MOVE_OF[decision]
        if not record.units_left and decision is not Decision.PAUSE:
            move = Move.END
        self._move(record, move, event, out)
        if record.job is not None and record.status is not Status.READY:
            self._break_promise(record.job, record)

    def _break_promise(self, job: _Job, record: _Record) -> None:
        """Logical clock: take a trial that was paused or stopped, or failed, out of a job that has not begun."""
        record.job = None
        del job.records[record.trial.id]
        job.open = [unit for unit in job.open if unit.trial != record.trial.id]
        if not job.open and not job.early:
            self._line.remove(job)
            job.seat.job = None

    def _take_back(self, job: _Job, event: WorkerLost, out: list[Instruction]) -> None:
        """Return the units that died with their worker; under the logical clock they keep their place."""
        self._jobs.pop(job.number, None)
        job.number = 0
        lost = [job.records[unit.trial] for unit in job.open]
        for record in lost:
            record.deaths += 1
            if not self._policy.logical:
                record.job = None
            if record.deaths > self._max_failures:
                self._move(record, Move.GIVE_UP, event, out)
                if record.job is not None:
                    self._break_promise(job, record)
                continue
            self._move(record, Move.LOSE, event, out)
            self._grant_wish(record, event, out)

    def _seat_free(self, job: _Job) -> None:
        seat = job.seat
        seat.job = None
        seat.fresh = True
        seat.cause = self._events
        if seat.present:
            self._idle[seat.id.number] = seat

    def _workers_changed(self) -> None:
        board = self._board
        seats = [seat for _, seat in sorted(self._seats.items())]
        board.workers = len(seats)
        held = once = 0
        for seat in seats:
            if held & seat.held:
                once = -1
            held |= seat.held
        board.pinned = once == 0 and len(seats) > 1
        board.ring = _ring([seat.held for seat in seats], len(self._shards)) if board.pinned else []
        self._note_elders()
        for seat in self._idle.values():
            seat.fresh = True

    def _note_elders(self) -> None:
        count = min(self._board.workers, len(self._elders))
        self._board.elders = self._elders[count - 1] if count else -1

    # ---------------------------------------------------------------- the one place where a status changes

    def _move(self, record: _Record, move: Move, what: Event | StartJob | None, out: list[Instruction]) -> None:
        before = record.status
        after = TRANSITIONS[before][move]
        record.story.append(Row(self._events, move.name, before, after, what))
        record.cause = self._events
        if after is before:
            return
        record.status = after
        was_live, is_live = before in _LIVE, after in _LIVE
        if was_live is not is_live:
            self._count_live(record, 1 if is_live else -1)
        if after is Status.READY:
            if record.job is None:
                self._list(record)
        elif record.listed:
            self._unlist(record)
        if before is Status.QUEUED and not is_live:
            self._queue.pop(record.trial.id, None)
            self._inbox.pop(record.trial.id, None)
        if after is Status.QUEUED:
            self._enqueue(record)
        elif after in _ENDED:
            record.wish = None
            out.append(DropState(record.trial.id, after))

    def _count_live(self, record: _Record, step: int) -> None:
        self._board.live += step
        if step > 0:
            insort(self._elders, record.order)
        else:
            del self._elders[bisect_left(self._elders, record.order)]
        self._note_elders()

    def _list(self, record: _Record) -> None:
        record.key = self._policy.key(self._regime, record)
        record.listed = True
        insort(self._ready, (record.key, record.order, record))
        self._newly.append(record)

    def _unlist(self, record: _Record) -> None:
        record.listed = False
        del self._ready[bisect_left(self._ready, (record.key, record.order))]

    # ---------------------------------------------------------------- orders out

    def dispatch(self) -> list[StartJob]:
        """Give idle workers something to do. To be called when a batch of events has been applied."""
        if self._policy.logical:
            return self._dispatch_promised()
        if not self._idle:
            return []
        self._note_regime()
        homes = {record.home for record in self._newly}
        news = sorted((r.key, r.order, r) for r in self._newly if r.listed)
        self._newly.clear()
        starts: list[StartJob] = []
        for number in sorted(self._idle, key=lambda number: (number not in homes, number)):
            seat = self._idle[number]
            ready = self._ready if seat.fresh else [entry for entry in news if cast(_Record, entry[2]).listed]
            seat.fresh = False
            choice = self._policy.choose(self._regime, self._board, number, seat.held, ready) if ready else None
            if choice is not None:
                job = self._promise(seat, choice)
                del self._idle[number]
                starts.append(self._start(job))
        return starts

    def _note_regime(self) -> None:
        """Sort the ready trials anew when other rules hold now, and let every idle worker look at them all."""
        regime = self._policy.regime(self._board)
        if regime is self._regime:
            return
        self._regime = regime
        records = [cast(_Record, entry[2]) for entry in self._ready]
        for record in records:
            record.key = self._policy.key(regime, record)
        self._ready = sorted((record.key, record.order, record) for record in records)
        for seat in self._idle.values():
            seat.fresh = True

    def _promise(self, seat: _Seat, choice: Choice) -> _Job:
        records = [cast(_Record, trial) for trial in choice.trials]
        job = seat.job = _Job(seat, choice.shard, records)
        for record in records:
            record.job = job
            self._unlist(record)
        return job

    def _start(self, job: _Job) -> StartJob:
        self._job_count += 1
        job.number = self._job_count
        self._jobs[job.number] = job
        seat = job.seat
        records = [job.records[unit.trial] for unit in job.open]
        versions = tuple([record.units_done for record in records])
        hops = tuple([record.units_done > 0 and record.state_at != seat.id for record in records])
        order = StartJob(job.number, seat.id, tuple(job.open), versions, hops)
        for record in records:
            self._move(record, Move.START, order, [])
        return order

    # ---------------------------------------------------------------- the logical clock

    def _tick(self, out: list[Instruction]) -> None:
        """Let results take effect in the order of their jobs until one is missing or the tuner is asked."""
        while self._awaited is None:
            self._fill()
            self._promise_all()
            if not self._line or not self._line[0].early:
                return
            job = self._line[0]
            if job.open:
                return
            event = job.early.pop(0)
            if not job.early:
                self._line.popleft()
                job.seat.job = None
            if self._settle(job, event, out):
                self._awaited = job.records[event.unit.trial]

    def _promise_all(self) -> None:
        self._note_regime()
        self._newly.clear()
        for number, seat in sorted(self._seats.items()):
            if seat.job is None and self._ready:
                choice = self._policy.choose(self._regime, self._board, number, seat.held, self._ready)
                if choice is not None:
                    self._line.append(self._promise(seat, choice))

    def _dispatch_promised(self) -> list[StartJob]:
        if self._awaited is not None:
            return []
        if not self._line:
            self._let_in()
            self._fill()
            self._promise_all()
        return [self._start(job) for job in self._line if not job.number and job.open and job.seat.present]

    # ---------------------------------------------------------------- checks

    def _check_new(self, event: Event, trial: Trial) -> None:
        if trial.id in self._records:
            status = self._records[trial.id].status.value
            _refuse(event, f"trial {trial.id!r}", f"{status} already", "a new id")
        if trial.epochs < 1:
            _refuse(event, f"trial {trial.id!r}", f"of {trial.epochs} epochs", "1 epoch or more")

    def _find(self, event: Event, trial: str) -> _Record:
        record = self._records.get(trial)
        if record is None:
            _refuse(event, f"trial {trial!r}", "unknown", "TrialAdded or TrialCloned")
        return record

    def validate(self) -> None:
        """Check the invariants; raises InvariantError with the story of the trial concerned."""

    # ---------------------------------------------------------------- questions

    def story(self, trial: str) -> list[Row]:
        """Return what happened to a trial, the latest rows (a bounded number of them)."""
        return list(self._records[trial].story)

    @property
    def trials(self) -> list[str]:
        """Ids of all trials, in the order in which they were added."""
        return list(self._records)

    def status(self, trial: str) -> Status:
        """Where the trial is in its life."""
        return self._records[trial].status

    def progress(self, trial: str) -> tuple[int, int, int]:
        """Return (epochs done, units committed, units in all)."""
        record = self._records[trial]
        return record.epoch, record.units_done, record.units_done + record.units_left

    def state_at(self, trial: str) -> WorkerId | None:
        """Return the worker that committed the trial's state and is still there."""
        return self._records[trial].state_at

    def job_of(self, worker: WorkerId) -> int | None:
        """Return the number of the job that the worker runs."""
        seat = self._seats.get(worker.number)
        return seat.job.number or None if seat is not None and seat.job is not None else None

    @property
    def live(self) -> int:
        """How many trials are ready, running or deciding."""
        return self._board.live

    @property
    def settled(self) -> bool:
        """Nothing is queued, ready, running or deciding: without new events nothing more will happen."""
        return not self._board.live and not self._queue and not self._inbox


def _learn(record: _Record, seat: _Seat, elapsed_s: float) -> None:
    """Move the trial's and the worker's averages; their product is the time a unit is expected to take."""
    seen = min(record.units_done, _RECENT_UNITS)
    record.unit_s += (elapsed_s / seat.pace - record.unit_s) / seen if record.unit_s else elapsed_s / seat.pace
    if record.unit_s > 0:
        seat.pace += _PACE_RATE * (elapsed_s / record.unit_s - seat.pace)


def _ring(holdings: Sequence[int], shards: int) -> list[int]:
    """Deal out the shards worker by worker, one from each in turn: neighbours on the ring are on different workers."""
    piles = [[shard for shard in range(shards) if held >> shard & 1] for held in holdings]
    return [pile[turn] for turn in range(shards) for pile in piles if turn < len(pile)]


def _check_arguments(shards: Sequence[Shard], live_trials: int | None, report_every: str, max_failures: int) -> None:
    if not shards or [shard.index for shard in shards] != list(range(len(shards))):
        raise ConfigurationError(f"shards must be numbered 0, 1, ... in order, not {[s.index for s in shards]}")
    if live_trials is not None and live_trials < 1:
        raise ConfigurationError(f"live_trials is {live_trials}; give 1 or more, or None for no limit")
    if report_every not in {"unit", "epoch"}:
        raise ConfigurationError(f'report_every is {report_every!r}; choose "unit" or "epoch"')
    if max_failures < 0:
        raise ConfigurationError(f"max_failures is {max_failures}; give 0 or more")


def _refuse(event: Event, role: str, state: str, legal: str | Iterable[str]) -> NoReturn:
    raise IllegalEventError(f"{event} is not legal: {role} is {state}; legal is {legal}")
