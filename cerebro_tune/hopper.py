"""The state machine of model hopper parallelism.

Theory of operation
-------------------
The machine holds what is true of a run (trials, workers, open jobs) and nothing else: no clock, no I/O, no thread. A
shell around it tells it facts and carries out its orders:

    orders = hopper.apply(event)      # ReportUnit, DropState
    starts = hopper.dispatch()        # StartJob for idle workers, once a batch of events has been applied

`dispatch` is apart from `apply` so that a tuner which answers at once has its decision applied before the worker that
has just got idle is given something else. The same object runs under the simulator (virtual clock), the live executor
and recovery (events from the journal): equal events give equal orders.

A trial's life is the table TRANSITIONS; nothing but `_move` changes a status. Between two units a trial *is* its
committed state: a version (units committed) and a bit mask of the shards still to be visited in this epoch. So a pause,
a hop and a clone cost the machine nothing, and a worker that dies takes only the unit it ran: the unit goes back, and
starts again from the same version. A unit that has begun is never interrupted: a PAUSE or STOP for a running trial is
remembered, and joined with the decision at the unit's end, where the firmer one wins.

An event that the table does not allow raises IllegalEventError and changes nothing: every handler checks, then acts.

A worker that was lost usually comes back at once, and what only it holds waits for it. When it is said to stay away,
its shards are dealt to the others until it joins again.

Speed: ready trials are kept sorted (`Offers`), and a worker that got idle walks down that list, testing one bit mask
per trial, until the policy is content. A worker that found nothing is offered only what got ready since.

The logical clock (policy "fixed")
----------------------------------
Real durations differ from run to run, and a run that repeats exactly must not look at them. So time is counted as if
every unit lasted 1: units end in the order in which they were started. `_line` holds the open jobs in that order. A
result that comes early waits in its job until the job is at the head; then it is committed and reported, and the clock
stands until the tuner has decided. At that instant, and before any further result is looked at, what the tuner has
added meanwhile is let in, and each worker without a job is promised its next one. A lost worker keeps its place: its
job waits for it to join again; while it stays away, whoever has nothing to run runs that job, in its place and turn.
Hence choices and reports are a function of seed, trials and decisions. What a tuner adds after its answer is let in at
its next answer, or at once when no job is open.

(Above 400 lines: the table, every handler and the logical clock belong to one machine, and are to be read together.)
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, NoReturn, cast

from cerebro_tune.errors import ConfigurationError, IllegalEventError, InvariantError
from cerebro_tune.events import (
    Event,
    RunResumed,
    SearchEnded,
    TrialAdded,
    TrialCloned,
    TrialDecided,
    TrialRestored,
    UnitFailed,
    UnitFinished,
    WorkerJoined,
    WorkerLost,
    WorkerStayedAway,
)
from cerebro_tune.instructions import DropState, Instruction, ReportUnit, StartJob
from cerebro_tune.invariants import check_all
from cerebro_tune.policy import NOWHERE, Board, Choice, Policy, make_policy, turns
from cerebro_tune.roster import Job, Offers, Seat, TrialRecord, learn
from cerebro_tune.story import Move, Row
from cerebro_tune.units import Decision, Shard, Status, Trial, WorkerId

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
        Move.CONTINUE: Status.RUNNING,  # this and the next two: remembered until the unit's end
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
_MOVE_OF = {Decision.CONTINUE: Move.CONTINUE, Decision.PAUSE: Move.PAUSE, Decision.STOP: Move.STOP}


class Hopper:
    """The machine; see the module's head.

    `live_trials` bounds the trials that are ready, running or deciding (None: no bound). `report_every` is "unit" or
    "epoch". A trial fails when workers died in its units more than `max_failures` times. `seed` is for the policies
    "random" and "fixed".
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
        self._shards = len(shards)
        self._policy = make_policy(policy, seed)
        self._turns = turns(self._shards, seed, shuffled=self._policy.logical)
        self._limit = live_trials
        self._report_units = report_every == "unit"
        self._max_failures = max_failures
        self._records: dict[str, TrialRecord] = {}
        self._queue: OrderedDict[str, TrialRecord] = OrderedDict()
        self._inbox: OrderedDict[str, TrialRecord] = (
            OrderedDict()
        )  # to be queued: at once, or at the clock's next instant
        self._offers = Offers()
        self._admitted: list[TrialRecord] = []  # in the order of their first admission
        self._overdue = 0  # the first so many of them are
        self._end_announced = False
        self._seats: dict[int, Seat] = {}
        self._idle: dict[int, Seat] = {}
        self._lost: dict[int, int] = {}  # lost workers by number: bit s is set when it held shard s
        self._away: set[int] = set()  # those of them that stay away
        self._jobs: dict[int, Job] = {}  # those that run, by number
        self._job_count = 0
        self._line: deque[Job] = deque()  # logical clock: open and promised jobs, in order
        self._awaited: TrialRecord | None = None  # logical clock: stands until this trial is decided
        self._board = Board(shards=self._shards)
        self._keepers: set[TrialRecord] = set()  # trials that a worker waits for
        self._regime = self._policy.regime(self._board)
        self._events = 0
        self._handlers: dict[type[Event], Callable[[Any, list[Instruction]], None]] = {
            TrialAdded: self._on_trial_added,
            TrialCloned: self._on_trial_cloned,
            TrialRestored: self._on_trial_restored,
            WorkerJoined: self._on_worker_joined,
            WorkerLost: self._on_worker_lost,
            WorkerStayedAway: self._on_worker_stayed_away,
            RunResumed: self._on_run_resumed,
            UnitFinished: self._on_unit_ended,
            UnitFailed: self._on_unit_ended,
            TrialDecided: self._on_trial_decided,
            SearchEnded: self._on_search_ended,
        }

    # ------------------------------------------------------------------ events in

    def apply(self, event: Event) -> list[Instruction]:
        """Take in one fact and return the orders that follow. Raises IllegalEventError, and then changes nothing."""
        out: list[Instruction] = []
        self._handlers[type(event)](event, out)
        return out

    def _on_trial_added(self, event: TrialAdded, out: list[Instruction]) -> None:
        self._check_new(event, event.trial)
        self._enrol(self._new_record(event.trial))

    def _on_trial_cloned(self, event: TrialCloned, out: list[Instruction]) -> None:
        self._check_new(event, event.trial)
        source = self._find(event, event.source)
        if not TRANSITIONS[source.status] and source.status is not Status.FAILED:  # its last good state may be there
            _refuse(event, f"trial {event.source!r}", source.status.value, "a source that has not ended, or has failed")
        units = event.trial.epochs * self._shards
        if units <= source.units_done:
            state = f"{source.units_done} units on"
            _refuse(event, f"trial {event.source!r}", state, f"a clone with more units than that in all, not {units}")
        record = self._new_record(event.trial)
        record.continue_from(source, self._shards)
        self._enrol(record)

    def _on_trial_restored(self, event: TrialRestored, out: list[Instruction]) -> None:
        self._check_new(event, event.trial)
        record = self._new_record(event.trial)
        known = event.visited <= set(range(self._shards)) and len(event.visited) == event.units % self._shards
        if not known or not 0 <= event.units < record.units_left:
            said = f"said to have {event.units} of {record.units_left} units behind it, with {set(event.visited) or {}}"
            _refuse(event, f"trial {event.trial.id!r}", said, "units left, and as many shards as the epoch has units")
        record.epoch, record.units_done = event.units // self._shards, event.units
        record.units_left -= event.units
        record.left &= ~sum(1 << shard for shard in event.visited)
        self._enrol(record)

    def _on_worker_joined(self, event: WorkerJoined, out: list[Instruction]) -> None:
        seat = self._seats.get(event.worker.number)
        if seat is not None and seat.present:
            _refuse(event, str(event.worker), "here already", "WorkerLost")
        if not event.shards or not all(0 <= shard < self._shards for shard in event.shards):
            held = f"said to hold shards {sorted(event.shards)}"
            _refuse(event, str(event.worker), held, f"one shard or more out of 0..{self._shards - 1}")
        self._events += 1
        if seat is None:
            seat = self._seats[event.worker.number] = Seat(event.worker)
        seat.present = True
        seat.own = sum(1 << shard for shard in event.shards)
        self._lost.pop(event.worker.number, None)
        self._away.discard(event.worker.number)
        seat.cause = self._events
        if not self._policy.logical:
            self._idle[event.worker.number] = seat
        self._workers_changed()

    def _on_worker_lost(self, event: WorkerLost, out: list[Instruction]) -> None:
        seat = self._seats.get(event.worker.number)
        if seat is None or not seat.present:
            _refuse(event, str(event.worker), "not here", "WorkerJoined")
        self._events += 1
        self._lose(seat, event, out)
        self._settle_down(out)

    def _on_run_resumed(self, event: RunResumed, out: list[Instruction]) -> None:
        self._events += 1
        for _, seat in sorted(self._seats.items()):
            if seat.present:
                self._lose(seat, event, out)
        self._settle_down(out)

    def _lose(self, seat: Seat, event: WorkerLost | RunResumed, out: list[Instruction]) -> None:
        """A worker is gone, and with it what it ran."""
        number = seat.id.number
        seat.present = False
        self._lost[number] = seat.own
        if not self._policy.logical:
            del self._seats[number]
            self._idle.pop(number, None)
        self._workers_changed()
        for record in self._records.values():
            if record.state_at == seat.id:
                record.state_at = None
                record.home = record.home if self._policy.logical else NOWHERE
        for early in [job for job in self._line if job.runner is seat]:
            early.orphans |= {result.unit.trial for result in early.early}
        if (job := seat.running) is not None:
            seat.running = None
            del self._jobs[job.number]
            self._take_back(job, event, out)

    def _on_worker_stayed_away(self, event: WorkerStayedAway, out: list[Instruction]) -> None:
        if event.worker.number not in self._lost:
            seat = self._seats.get(event.worker.number)
            _refuse(event, str(event.worker), "here" if seat is not None and seat.present else "unknown", "WorkerLost")
        self._events += 1
        self._away.add(event.worker.number)
        self._workers_changed()

    def _on_unit_ended(self, event: UnitFinished | UnitFailed, out: list[Instruction]) -> None:
        job = self._jobs.get(event.job)
        if job is None:
            opened = ", ".join(map(str, self._jobs)) or "none"
            _refuse(event, f"job {event.job}", "not open", f"the end of a unit of an open job; open: {opened}")
        if event.unit not in job.open:
            _refuse(event, f"job {event.job}", "open", f"the end of one of its units: {job.open}")
        if isinstance(event, UnitFinished) and not event.elapsed_s >= 0:
            _refuse(event, f"job {event.job}", "open", "a duration of 0 seconds or more")
        self._events += 1
        job.open.remove(event.unit)
        if not job.open:
            del self._jobs[event.job]
            job.runner.running = None
        if self._policy.logical:
            job.early.append(event)
        else:
            self._conclude(job, event, out)
            if not job.open:
                self._free(job.seat)
        self._settle_down(out)

    def _on_trial_decided(self, event: TrialDecided, out: list[Instruction]) -> None:
        record = self._find(event, event.trial)
        move = _MOVE_OF[event.decision]
        if move not in TRANSITIONS[record.status]:
            _refuse(event, f"trial {event.trial!r}", record.status.value, "no decision: it has ended")
        self._events += 1
        if record.status is Status.RUNNING:
            if record.wish is not Decision.STOP:
                record.wish = event.decision
            self._move(record, move, event, out)
            return
        self._decide(record, event.decision, event, out)
        if record is self._awaited:
            self._awaited = None
            self._let_in()
        self._settle_down(out)

    def _on_search_ended(self, event: SearchEnded, out: list[Instruction]) -> None:
        self._events += 1
        self._end_announced = True
        self._settle_down(out)

    # ------------------------------------------------------------------ what events do

    def _new_record(self, trial: Trial) -> TrialRecord:
        unit_s = 0.0 if self._policy.learns else 1.0
        return TrialRecord(trial, self._shards, self._turns[trial.index % self._shards], unit_s)

    def _enrol(self, record: TrialRecord) -> None:
        self._events += 1
        record.cause = self._events
        self._records[record.trial.id] = record
        self._inbox[record.trial.id] = record
        if not self._policy.logical:
            self._let_in()

    def _settle_down(self, out: list[Instruction]) -> None:
        """Follow up an event: let in what there is room for; the logical clock goes on as far as it can."""
        if self._policy.logical:
            self._tick(out)
        else:
            self._let_in()

    def _let_in(self) -> None:
        """Take note of what the tuner has added, and admit what there is room for."""
        if self._inbox:
            self._queue.update(self._inbox)
            self._inbox.clear()
        self._board.admitting = not self._end_announced
        self._admit()

    def _admit(self) -> None:
        while self._queue and (self._limit is None or self._board.live < self._limit):
            _, record = self._queue.popitem(last=False)
            if record.order < 0:
                record.order = len(self._admitted)
                self._admitted.append(record)
            self._move(record, Move.ADMIT, None, [])
            self._note_overdue()
        self._board.queued = len(self._queue)

    def _note_overdue(self) -> None:
        """Let the trials go first after which twice as many were admitted as are live."""
        while self._overdue < len(self._admitted) - 2 * self._board.live:
            record = self._admitted[self._overdue]
            self._overdue += 1
            record.overdue = True
            if record.listed:
                self._offers.remove(record)
                self._offers.add(record, self._policy.key(self._regime, record))

    def _conclude(self, job: Job, event: UnitFinished | UnitFailed, out: list[Instruction]) -> bool:
        """Commit or fail a unit; True when the tuner is asked."""
        record = job.records[event.unit.trial]
        self._leave_job(record)
        if isinstance(event, UnitFailed):
            self._move(record, Move.RAISE, event, out)
            return False
        epoch_done = self._commit(record, job, event)
        if self._report_units or epoch_done:
            self._move(record, Move.REPORT, event, out)
            out.append(ReportUnit(event.job, event.unit, record.units_done, epoch_done, not record.units_left))
            return True
        self._move(record, Move.COMMIT, event, out)
        self._grant_wish(record, event, out)
        return False

    def _commit(self, record: TrialRecord, job: Job, event: UnitFinished) -> bool:
        """Count a finished unit, once; True at an epoch's end."""
        bit = 1 << event.unit.shard
        if record.status is not Status.RUNNING or not record.left & bit or record.epoch != event.unit.epoch:
            raise InvariantError("\n".join([f"{event} cannot be committed", *map(str, record.story)]))
        self._board.time_left -= record.time_left
        record.left ^= bit
        record.units_done += 1
        record.units_left -= 1
        record.last = event.unit.shard
        record.home = job.seat.id.number
        record.state_at = None if record.trial.id in job.orphans else job.runner.id
        if self._policy.learns:
            learn(record, job.seat, event.elapsed_s)
        self._board.time_left += record.time_left
        if record.left:
            return False
        record.epoch += 1
        record.left = (1 << self._shards) - 1 if record.units_left else 0
        return True

    def _grant_wish(self, record: TrialRecord, event: Event, out: list[Instruction]) -> None:
        if record.wish is not None:
            self._decide(record, record.wish, event, out)

    def _decide(self, record: TrialRecord, decision: Decision, event: Event, out: list[Instruction]) -> None:
        if record.wish is not None:
            decision = decision.joined(record.wish)
            record.wish = None
        ends = not record.units_left and decision is not Decision.PAUSE
        self._move(record, Move.END if ends else _MOVE_OF[decision], event, out)
        if record.job is not None and record.status is not Status.READY:
            self._break_promise(record.job, record)

    def _take_back(self, job: Job, event: WorkerLost | RunResumed, out: list[Instruction]) -> None:
        """Return the units that died with their worker; under the logical clock they keep their place."""
        job.number = 0
        for record in [job.records[unit.trial] for unit in job.open]:
            record.deaths += isinstance(event, WorkerLost) and not event.with_node
            if not self._policy.logical:
                self._leave_job(record)
            if record.deaths > self._max_failures:
                self._move(record, Move.GIVE_UP, event, out)
                if record.job is not None:
                    self._break_promise(job, record)
            else:
                self._move(record, Move.LOSE, event, out)
                self._grant_wish(record, event, out)

    def _break_promise(self, job: Job, record: TrialRecord) -> None:
        """Logical clock: take a trial that goes on no more out of a job that has not begun."""
        self._leave_job(record)
        del job.records[record.trial.id]
        job.open = [unit for unit in job.open if unit.trial != record.trial.id]
        if not job.open and not job.early:
            self._line.remove(job)
            job.seat.job = None

    def _leave_job(self, record: TrialRecord) -> None:
        record.job = None
        if record.kept:
            record.kept = 0
            self._keepers.discard(record)
            self._note_kept()

    def _note_kept(self) -> None:
        self._board.kept = 0
        for record in self._keepers:
            self._board.kept |= record.kept
        self._refresh_idle()

    def _refresh_idle(self) -> None:
        for seat in self._idle.values():
            seat.fresh = True

    def _free(self, seat: Seat) -> None:
        seat.job = None
        seat.fresh = True
        seat.cause = self._events
        self._idle[seat.id.number] = seat

    def _workers_changed(self) -> None:
        self._stand_in()
        self._board.seat([seat.held for _, seat in sorted(self._seats.items())])
        self._refresh_idle()

    def _stand_in(self) -> None:
        """Deal the shards that only workers who stay away hold to those who are here, one after the other."""
        seats = [seat for _, seat in sorted(self._seats.items())]
        here = 0
        for seat in seats:
            seat.held = seat.own
            here |= seat.own
        missing = 0
        for number in self._away:
            missing |= self._lost[number] & ~here
        for seat, shard in zip(cycle(seats), [s for s in range(self._shards) if missing >> s & 1], strict=False):
            seat.held |= 1 << shard

    # ------------------------------------------------------------------ the one place where a status changes

    def _move(
        self, record: TrialRecord, move: Move, what: Event | StartJob | None, out: list[Instruction], cause: int = 0
    ) -> None:
        before = record.status
        after = TRANSITIONS[before][move]
        record.cause = cause or self._events
        record.story.append(Row(record.cause, move, before, after, what))
        if after is before:
            return
        record.status = after
        if (before in _LIVE) is not (after in _LIVE):
            joins = after in _LIVE
            self._board.live += 1 if joins else -1
            self._board.time_left += record.time_left if joins else -record.time_left
        if record.listed:
            self._offers.remove(record)
        if after is Status.READY:
            if record.job is None:
                self._offers.add(record, self._policy.key(self._regime, record))
        elif after is Status.QUEUED:
            self._inbox[record.trial.id] = record
        elif before is Status.QUEUED:
            self._queue.pop(record.trial.id, None)
            self._inbox.pop(record.trial.id, None)
        if not TRANSITIONS[after]:
            record.wish = None
            out.append(DropState(record.trial.id, after))

    # ------------------------------------------------------------------ orders out

    def dispatch(self) -> list[StartJob]:
        """Give idle workers something to do. To be called when a batch of events has been applied."""
        if self._policy.logical:
            return self._dispatch_promised()
        if not self._idle:
            return []
        self._note_regime()
        news = self._offers.take_news()
        homes = {record.home for record in news}
        starts: list[StartJob] = []
        for number in sorted(self._idle, key=lambda number: (number not in homes, number)):
            seat = self._idle[number]
            ready = self._offers.ready if seat.fresh else Offers.still_offered(news)
            seat.fresh = False
            choice = self._policy.choose(self._regime, self._board, number, seat.held, ready) if ready else None
            if choice is not None:
                del self._idle[number]
                starts.append(self._start(self._promise(seat, choice), seat))
        return starts

    def _note_regime(self) -> None:
        """When other rules hold now, sort the ready trials anew and let every idle worker look at all of them."""
        regime = self._policy.regime(self._board)
        if regime is not self._regime:
            self._regime = regime
            self._offers.sort(lambda record: self._policy.key(regime, record))
            self._refresh_idle()

    def _promise(self, seat: Seat, choice: Choice) -> Job:
        records = [cast(TrialRecord, trial) for trial in choice.trials]
        job = seat.job = Job(seat, choice.shard, records)
        for record in records:
            record.job = job
            self._offers.remove(record)
            record.kept = self._policy.keep(self._regime, self._board, record, choice.shard)
            if record.kept:
                self._keepers.add(record)
                self._note_kept()
        return job

    def _start(self, job: Job, seat: Seat) -> StartJob:
        self._job_count += 1
        job.number = self._job_count
        job.runner, seat.running = seat, job
        self._jobs[job.number] = job
        records = [job.records[unit.trial] for unit in job.open]
        order = StartJob(
            job.number,
            seat.id,
            tuple(job.open),
            tuple([record.units_done for record in records]),
            tuple([record.units_done > 0 and record.state_at != seat.id for record in records]),
        )
        for record in records:
            self._move(record, Move.START, order, [], max(record.cause, seat.cause))
        return order

    # ------------------------------------------------------------------ the logical clock

    def _tick(self, out: list[Instruction]) -> None:
        """Let results take effect in the order of their jobs, until one is missing or the tuner is asked."""
        while self._awaited is None:
            self._admit()
            self._promise_all()
            if not self._line or self._line[0].open:
                return
            job = self._line[0]
            job.early.sort(key=lambda event: list(job.records).index(event.unit.trial))
            event = job.early.pop(0)
            if not job.early:
                self._line.popleft()
                job.seat.job = None
                job.seat.cause = self._events
            if self._conclude(job, event, out):
                self._awaited = job.records[event.unit.trial]

    def _promise_all(self) -> None:
        self._note_regime()
        self._offers.take_news()
        for number, seat in sorted(self._seats.items()):
            if seat.job is None and self._offers.ready:
                choice = self._policy.choose(self._regime, self._board, number, seat.held, self._offers.ready)
                if choice is not None:
                    self._line.append(self._promise(seat, choice))

    def _dispatch_promised(self) -> list[StartJob]:
        if self._awaited is not None:
            return []
        if not self._line:
            self._let_in()
            self._promise_all()
        starts = []
        for job in self._line:
            if job.open and not job.number and (seat := self._runner_for(job.seat)) is not None:
                starts.append(self._start(job, seat))
        return starts

    def _runner_for(self, seat: Seat) -> Seat | None:
        """Who is to begin the job of a seat, if anybody can now."""
        seats = [other for _, other in sorted(self._seats.items())] if seat.id.number in self._away else [seat]
        return next((other for other in seats if other.present and other.running is None), None)

    # ------------------------------------------------------------------ questions

    def validate(self) -> None:
        """Check the invariants; raises InvariantError with the story of the trial concerned."""
        check_all(self._records, self._seats, self._jobs, self._shards)

    def story(self, trial: str) -> list[Row]:
        """Return what happened to a trial; a bounded number of rows, the latest ones."""
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

    def visited(self, trial: str) -> frozenset[int]:
        """Return the shards that the trial has visited in the epoch it is in."""
        left = self._records[trial].left
        return frozenset(shard for shard in range(self._shards) if left and not left >> shard & 1)

    def state_at(self, trial: str) -> WorkerId | None:
        """Return the worker that committed the trial's state and has been here since."""
        return self._records[trial].state_at

    @property
    def lost(self) -> frozenset[int]:
        """The numbers of workers that were here and are lost."""
        return frozenset(self._lost)

    def job_of(self, worker: WorkerId) -> int | None:
        """Return the number of the job that the worker runs."""
        seat = self._seats.get(worker.number)
        return None if seat is None or seat.running is None else seat.running.number

    @property
    def live(self) -> int:
        """How many trials are ready, running or deciding."""
        return self._board.live

    @property
    def settled(self) -> bool:
        """Nothing is queued, ready, running or deciding: without new events nothing more will happen."""
        return not self._board.live and not self._queue and not self._inbox

    # ------------------------------------------------------------------ checks

    def _check_new(self, event: Event, trial: Trial) -> None:
        if trial.id in self._records:
            _refuse(event, f"trial {trial.id!r}", self._records[trial.id].status.value, "a new id")
        if trial.epochs < 1:
            _refuse(event, f"trial {trial.id!r}", f"of {trial.epochs} epochs", "1 epoch or more")

    def _find(self, event: Event, trial: str) -> TrialRecord:
        record = self._records.get(trial)
        if record is None:
            _refuse(event, f"trial {trial!r}", "unknown", "TrialAdded or TrialCloned")
        return record


def _refuse(event: Event, role: str, state: str, legal: str) -> NoReturn:
    raise IllegalEventError(f"{event} is not legal: {role} is {state}; legal then: {legal}")


def _check_arguments(shards: Sequence[Shard], live_trials: int | None, report_every: str, max_failures: int) -> None:
    if not shards or [shard.index for shard in shards] != list(range(len(shards))):
        raise ConfigurationError(f"shards are to be numbered 0, 1, ... in order, not {[s.index for s in shards]}")
    if live_trials is not None and live_trials < 1:
        raise ConfigurationError(f"live_trials is {live_trials}; give 1 or more, or None for no bound")
    if report_every not in {"unit", "epoch"}:
        raise ConfigurationError(f'report_every is {report_every!r}; choose "unit" or "epoch"')
    if max_failures < 0:
        raise ConfigurationError(f"max_failures is {max_failures}; give 0 or more")
