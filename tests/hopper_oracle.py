"""An independent account of a run: it sees only the facts told to the machine and the orders it gave."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

from cerebro_tune.events import (
    Event,
    RunResumed,
    TrialAdded,
    TrialCloned,
    TrialRestored,
    UnitFailed,
    UnitFinished,
    WorkerJoined,
    WorkerLost,
    WorkerStayedAway,
)
from cerebro_tune.hopper import Hopper
from cerebro_tune.instructions import DropState, Instruction, ReportUnit, StartJob
from cerebro_tune.policy import AutoPolicy, Board, Choice, Ready, Regime
from cerebro_tune.units import Decision, Status, Trial, Unit, WorkerId


class PackedPolicy(AutoPolicy):
    """Up to three trials that need the same shard go in one job: the seam for fused training."""

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        choice = super().choose(regime, board, worker, held, ready)
        if choice is None:
            return None
        first, shard = choice.trials[0], choice.shard
        more = [trial for _, _, trial in ready if trial is not first and trial.left >> shard & 1]
        return Choice((first, *more[:2]), shard)


def snapshot(hopper: Hopper) -> bytes:
    """Everything the machine holds."""
    return pickle.dumps(hopper)


@dataclass
class Account:
    """One trial as seen from outside."""

    trial: Trial
    trained: list[Unit] = field(default_factory=list)  # finished units, those of a clone's source before it included
    reports: list[ReportUnit] = field(default_factory=list)
    running: int | None = None
    worker: WorkerId | None = None  # where the last unit was trained, if it is still there
    ended: Status | None = None


class Ledger:
    """Checks, order by order, the six invariants."""

    def __init__(self, shards: int, *, logical: bool) -> None:
        self.shards = shards
        self.logical = logical
        self.accounts: dict[str, Account] = {}
        self.holdings: dict[WorkerId, frozenset[int]] = {}
        self.lost: dict[WorkerId, frozenset[int]] = {}
        self.away: set[WorkerId] = set()
        self.busy: dict[WorkerId, int] = {}
        self.open: dict[int, tuple[StartJob, list[Unit]]] = {}
        self.numbers: set[int] = set()
        self.starts: list[StartJob] = []

    def told(self, event: Event, orders: list[Instruction], committed: int = 0) -> None:
        """Take note of a legal event and its orders; `committed` is the source's progress when a trial is cloned."""
        match event:
            case TrialAdded(trial):
                self.accounts[trial.id] = Account(trial)
            case TrialCloned(trial, source):
                past = self.accounts[source]
                self.accounts[trial.id] = Account(trial, past.trained[:committed], worker=past.worker)
            case TrialRestored(trial, units, visited):
                whole = [Unit(trial.id, number // self.shards, number % self.shards) for number in range(units)]
                latest = [Unit(trial.id, units // self.shards, shard) for shard in visited]
                self.accounts[trial.id] = Account(trial, whole[: units - len(visited)] + latest)
            case WorkerJoined(worker, shards):
                self.holdings[worker] = shards
                self.lost.pop(worker, None)
                self.away.discard(worker)
            case WorkerLost(worker):
                self.lose(worker)
            case RunResumed():
                for worker in list(self.holdings):
                    self.lose(worker)
            case WorkerStayedAway(worker):
                self.away.add(worker)
            case UnitFinished() | UnitFailed():
                self.end_unit(event)
        for order in orders:
            self.ordered(order)

    def lose(self, worker: WorkerId) -> None:
        self.lost[worker] = self.holdings.pop(worker)
        if (job := self.busy.pop(worker, None)) is not None:
            for unit in self.open.pop(job)[1]:
                self.accounts[unit.trial].running = None
        for account in self.accounts.values():
            account.worker = None if account.worker == worker else account.worker

    def end_unit(self, event: UnitFinished | UnitFailed) -> None:
        order, units = self.open[event.job]
        units.remove(event.unit)
        account = self.accounts[event.unit.trial]
        account.running = None
        if isinstance(event, UnitFinished):
            account.trained.append(event.unit)
            account.worker = order.worker
        if not units:
            del self.open[event.job]
            del self.busy[order.worker]

    def ordered(self, order: Instruction) -> None:
        match order:
            case StartJob():
                self.check_start(order)
            case ReportUnit():
                self.check_report(order)
            case DropState(trial, status):
                account = self.accounts[trial]
                assert account.ended is None, "a state is dropped once"
                assert status in {Status.FINISHED, Status.STOPPED, Status.FAILED}
                account.ended = status
                if status is Status.FINISHED:
                    self.check_complete(account)

    def check_start(self, order: StartJob) -> None:
        assert order.job not in self.numbers, "a job number is used once"
        self.numbers.add(order.job)
        self.starts.append(order)
        assert order.worker in self.holdings, "a job goes to a worker that is there"
        assert order.worker not in self.busy, "exclusivity"
        assert len({unit.shard for unit in order.units}) == 1, "a job is about one shard"
        assert order.units[0].shard in self.holdings[order.worker] | self.stood_in_for(), "the shard is there"
        for unit, version, hop in zip(order.units, order.versions, order.hops, strict=True):
            account = self.accounts[unit.trial]
            assert account.ended is None, "an ended trial runs no more"
            assert account.running is None, "isolation"
            assert version == len(account.trained), "the predecessor's state"
            assert unit.epoch == version // self.shards, "epochs follow one another"
            assert unit.epoch < account.trial.epochs, "no more epochs than asked for"
            assert unit.shard not in self.visited(account, unit.epoch), "a shard is visited once an epoch"
            assert hop == (version > 0 and account.worker != order.worker), "a hop is a move"
            account.running = order.job
        self.busy[order.worker] = order.job
        self.open[order.job] = (order, list(order.units))

    def stood_in_for(self) -> frozenset[int]:
        """The shards that anybody may be given: by the clock all of those that are away, else what is nobody's."""
        missing = frozenset[int]().union(*(self.lost[worker] for worker in self.away))
        return missing if self.logical else missing.difference(*self.holdings.values())

    def visited(self, account: Account, epoch: int) -> list[int]:
        return [unit.shard for unit in account.trained if unit.epoch == epoch]

    def check_report(self, report: ReportUnit) -> None:
        account = self.accounts[report.unit.trial]
        assert account.trained[report.units_done - 1] == report.unit, "the report counts the units trained so far"
        assert all(report.units_done > earlier.units_done for earlier in account.reports), "committed once"
        assert report.epoch_done == (report.units_done % self.shards == 0)
        assert report.last == (report.units_done == account.trial.epochs * self.shards)
        assert account.ended is None
        account.reports.append(report)

    def check_complete(self, account: Account) -> None:
        for epoch in range(account.trial.epochs):
            assert sorted(self.visited(account, epoch)) == list(range(self.shards)), "completeness"


class Model:
    """What the status of every trial must be, by the words of the contract, when results take effect at once."""

    WAITING = "queued or ready"

    def __init__(self, shards: int, *, report_units: bool, max_failures: int) -> None:
        self.shards = shards
        self.report_units = report_units
        self.max_failures = max_failures
        self.status: dict[str, Status | str] = {}
        self.left: dict[str, int] = {}
        self.deaths: dict[str, int] = {}
        self.stop: set[str] = set()
        self.pause: set[str] = set()

    def added(self, trial: Trial, done: int = 0) -> None:
        self.status[trial.id] = self.WAITING
        self.left[trial.id] = trial.epochs * self.shards - done
        self.deaths[trial.id] = 0

    def decided(self, trial: str, decision: Decision) -> None:
        if self.status[trial] is Status.RUNNING:
            if decision is Decision.STOP:
                self.stop.add(trial)
            elif decision is Decision.PAUSE:
                self.pause.add(trial)
            else:
                self.pause.discard(trial)
            return
        stop = decision is Decision.STOP or trial in self.stop
        pause = decision is Decision.PAUSE or trial in self.pause
        self.forget(trial)
        if stop or not pause:
            if not self.left[trial]:
                self.status[trial] = Status.FINISHED
            elif stop:
                self.status[trial] = Status.STOPPED
            else:
                self.status[trial] = self.WAITING
        else:
            self.status[trial] = Status.PAUSED

    def forget(self, trial: str) -> None:
        self.stop.discard(trial)
        self.pause.discard(trial)

    def wishes(self, trial: str) -> None:
        """A unit ended without a report, or with its worker: what was remembered applies at once."""
        self.status[trial] = self.WAITING
        if trial in self.stop:
            self.status[trial] = Status.STOPPED
        elif trial in self.pause:
            self.status[trial] = Status.PAUSED
        self.forget(trial)

    def finished(self, unit: Unit) -> None:
        self.left[unit.trial] -= 1
        if self.report_units or self.left[unit.trial] % self.shards == 0:
            self.status[unit.trial] = Status.DECIDING
        else:
            self.wishes(unit.trial)

    def returned(self, trial: str) -> None:
        """Its unit was lost with the coordinator, which is nobody's failure."""
        self.wishes(trial)

    def died(self, trial: str) -> None:
        self.deaths[trial] += 1
        if self.deaths[trial] > self.max_failures:
            self.status[trial] = Status.FAILED
        else:
            self.wishes(trial)
