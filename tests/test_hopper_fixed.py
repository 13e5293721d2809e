"""Policy "fixed": the run repeats exactly, whatever the durations and whoever dies."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebro_tune.events import (
    Event,
    SearchEnded,
    TrialAdded,
    TrialDecided,
    UnitFailed,
    UnitFinished,
    WorkerJoined,
    WorkerLost,
    WorkerStayedAway,
)
from cerebro_tune.hopper import Hopper
from cerebro_tune.instructions import DropState, Instruction, ReportUnit, StartJob
from cerebro_tune.simulate import holdings
from cerebro_tune.units import Decision, Shard, Status, Trial, Unit, WorkerId

TRIALS, EPOCHS = 14, 2


@dataclass
class World:
    """A shell with a real, that is random, sense of time; `chance` is all that differs between two runs."""

    hopper: Hopper
    held: list[frozenset[int]]
    chance: Random
    deaths: int
    gone: frozenset[int] = frozenset()
    now: float = 0.0
    tickets: int = 0
    agenda: list[tuple[float, int, Event]] = field(default_factory=list)
    orders: dict[int, StartJob] = field(default_factory=dict)
    added: int = 0
    ran: dict[Unit, WorkerId] = field(default_factory=dict)
    reports: list[tuple[Unit, WorkerId]] = field(default_factory=list)
    ends: list[tuple[str, Status]] = field(default_factory=list)
    visits: dict[WorkerId, list[Unit]] = field(default_factory=dict)

    def later(self, event: Event) -> None:
        self.tickets += 1
        heappush(self.agenda, (self.now + self.chance.expovariate(1.0), self.tickets, event))

    def add(self, trials: int) -> None:
        for _ in range(min(trials, TRIALS - self.added)):
            self.hopper.apply(TrialAdded(Trial(f"t{self.added}", self.added, EPOCHS)))
            self.added += 1
        if self.added == TRIALS:
            self.hopper.apply(SearchEnded())

    def play(self, at_first: int) -> World:
        for number, shards in enumerate(self.held):
            self.hopper.apply(WorkerJoined(WorkerId(number), shards))
        for number in sorted(self.gone):
            self.hopper.apply(WorkerLost(WorkerId(number)))
            self.hopper.apply(WorkerStayedAway(WorkerId(number)))
        self.add(at_first)
        self.dispatch()
        while self.agenda:
            self.now, _, event = heappop(self.agenda)
            if isinstance(event, UnitFinished | UnitFailed):
                if event.job not in self.orders:
                    continue  # its worker died
                del self.orders[event.job]
            self.tell(event)
            if self.deaths and self.chance.random() < 0.2:
                self.kill()
            self.dispatch()
            self.hopper.validate()
        assert self.hopper.settled
        return self

    def kill(self) -> None:
        here = [number for number in range(len(self.held)) if self.chance.random() < 0.5]
        for number in here[:1]:
            worker = WorkerId(number)
            if any(isinstance(event, WorkerJoined) and event.worker == worker for _, _, event in self.agenda):
                return  # it is away
            self.deaths -= 1
            job = self.hopper.job_of(worker)
            if job is not None:
                del self.orders[job]
                self.visits[worker].pop()
            self.tell(WorkerLost(worker))
            self.later(WorkerJoined(worker, self.held[number]))

    def tell(self, event: Event) -> None:
        self.obey(self.hopper.apply(event))

    def obey(self, orders: list[Instruction]) -> None:
        """Answer as a tuner does that takes one report after the other."""
        for order in orders:
            if isinstance(order, DropState):
                self.ends.append((order.trial, order.status))
            elif isinstance(order, ReportUnit):
                self.reports.append((order.unit, self.ran[order.unit]))
                answer = (Decision.CONTINUE,) * 8 + (Decision.PAUSE, Decision.STOP)
                decision = answer[hash((order.unit.epoch, order.unit.shard, int(order.unit.trial[1:]))) % 10]
                assert self.hopper.dispatch() == [], "the clock stands while the tuner thinks"
                more = self.hopper.apply(TrialDecided(order.unit.trial, decision))
                if self.chance.random() < 0.5:
                    self.dispatch()
                status = self.hopper.status(order.unit.trial)
                if status is Status.PAUSED and decision is Decision.PAUSE:
                    self.hopper.apply(TrialDecided(order.unit.trial, Decision.CONTINUE))
                if status in {Status.FINISHED, Status.STOPPED}:
                    self.add(1 + order.unit.shard % 2)
                self.obey(more)

    def dispatch(self) -> None:
        for order in self.hopper.dispatch():
            unit = order.units[0]
            self.orders[order.job] = order
            self.ran[unit] = order.worker
            self.visits.setdefault(order.worker, []).append(unit)
            raises = unit.trial == "t3" and unit.epoch == 1
            self.later(UnitFailed(order.job, unit, "boom") if raises else UnitFinished(order.job, unit, 1.0))


def played(
    chance: int,
    deaths: int,
    *,
    seed: int,
    shards: int,
    workers: int,
    placement: str,
    live: int | None,
    report: str,
    gone: frozenset[int] = frozenset(),
) -> World:
    hopper = Hopper(
        [Shard(index, 1) for index in range(shards)],
        policy="fixed",
        live_trials=live,
        report_every=report,
        max_failures=1_000,
        seed=seed,
    )
    return World(hopper, holdings(shards, workers, placement), Random(chance), deaths, gone).play(at_first=live or 6)


@given(
    chances=st.tuples(st.integers(), st.integers()),
    deaths=st.integers(0, 12),
    seed=st.integers(0, 5),
    shards=st.integers(1, 6),
    workers=st.integers(1, 4),
    placement=st.sampled_from(["pinned", "shared"]),
    live=st.none() | st.integers(1, 8),
    report=st.sampled_from(["unit", "epoch"]),
)
def test_a_run_repeats_exactly(chances: tuple[int, int], deaths: int, **world: int | str | None) -> None:
    world["workers"] = min(int(world["workers"] or 1), int(world["shards"] or 1))
    smooth, rough = played(chances[0], 0, **world), played(chances[1], deaths, **world)  # type: ignore[arg-type]
    assert rough.reports == smooth.reports
    assert rough.ends == smooth.ends
    assert rough.visits == smooth.visits


def test_another_seed_gives_another_order() -> None:
    size = {"shards": 4, "workers": 4, "placement": "pinned", "live": 6, "report": "unit"}
    runs = [played(0, 0, seed=seed, **size).reports for seed in range(4)]  # type: ignore[arg-type]
    assert all(run != runs[0] for run in runs[1:])


@pytest.fixture
def two_running() -> tuple[Hopper, StartJob, StartJob]:
    """Two workers, each with a unit of its own trial; `first` is first in line."""
    hopper = Hopper([Shard(0, 1), Shard(1, 1)], policy="fixed")
    for number in range(2):
        hopper.apply(WorkerJoined(WorkerId(number), frozenset({0, 1})))
        hopper.apply(TrialAdded(Trial(f"t{number}", number, 1)))
    first, second = hopper.dispatch()
    return hopper, first, second


def test_an_early_report_waits_for_its_turn(two_running: tuple[Hopper, StartJob, StartJob]) -> None:
    hopper, first, second = two_running
    assert hopper.apply(UnitFinished(second.job, second.units[0], 0.1)) == []
    assert hopper.status(second.units[0].trial) is Status.RUNNING
    assert hopper.progress(second.units[0].trial)[1] == 0
    assert hopper.dispatch() == []
    [report] = hopper.apply(UnitFinished(first.job, first.units[0], 9.0))
    assert isinstance(report, ReportUnit)
    assert report.unit == first.units[0]
    [next_report] = hopper.apply(TrialDecided(report.unit.trial, Decision.CONTINUE))
    assert isinstance(next_report, ReportUnit)
    assert next_report.unit == second.units[0]
    assert hopper.dispatch() == []
    hopper.apply(TrialDecided(next_report.unit.trial, Decision.CONTINUE))
    assert len(hopper.dispatch()) == 2


def test_a_job_of_a_lost_worker_waits_for_it(two_running: tuple[Hopper, StartJob, StartJob]) -> None:
    hopper, first, second = two_running
    hopper.apply(WorkerLost(first.worker))
    assert hopper.status(first.units[0].trial) is Status.READY
    assert hopper.apply(UnitFinished(second.job, second.units[0], 1.0)) == []
    assert hopper.dispatch() == []
    hopper.apply(WorkerJoined(first.worker, frozenset({0, 1})))
    [again] = hopper.dispatch()
    assert (again.worker, again.units, again.versions) == (first.worker, first.units, first.versions)
    [report] = hopper.apply(UnitFinished(again.job, again.units[0], 1.0))
    assert isinstance(report, ReportUnit)
    assert report.unit == first.units[0]


def test_a_job_of_a_worker_that_stays_away_is_run_by_another(two_running: tuple[Hopper, StartJob, StartJob]) -> None:
    hopper, first, second = two_running
    hopper.apply(WorkerLost(first.worker))
    hopper.apply(WorkerStayedAway(first.worker))
    assert hopper.dispatch() == [], "the other is busy"
    assert hopper.apply(UnitFinished(second.job, second.units[0], 1.0)) == []
    [again] = hopper.dispatch()
    assert (again.worker, again.units, again.versions) == (second.worker, first.units, first.versions)
    hopper.validate()
    [report] = hopper.apply(UnitFinished(again.job, again.units[0], 1.0))
    assert isinstance(report, ReportUnit)
    assert report.unit == first.units[0]
    assert hopper.state_at(first.units[0].trial) == second.worker


@pytest.mark.parametrize("decision", [Decision.PAUSE, Decision.STOP])
def test_a_lost_trial_that_is_called_off_holds_up_nobody(
    two_running: tuple[Hopper, StartJob, StartJob], decision: Decision
) -> None:
    hopper, first, second = two_running
    hopper.apply(UnitFinished(second.job, second.units[0], 1.0))
    hopper.apply(WorkerLost(first.worker))
    orders = hopper.apply(TrialDecided(first.units[0].trial, decision))
    assert [order.unit for order in orders if isinstance(order, ReportUnit)] == [second.units[0]]


def test_a_trial_that_is_given_up_holds_up_nobody() -> None:
    hopper = Hopper([Shard(0, 1)], policy="fixed", max_failures=0)
    for number in range(2):
        hopper.apply(WorkerJoined(WorkerId(number), frozenset({0})))
        hopper.apply(TrialAdded(Trial(f"t{number}", number, 1)))
    first, second = hopper.dispatch()
    hopper.apply(UnitFinished(second.job, second.units[0], 1.0))
    dropped, report = hopper.apply(WorkerLost(first.worker))
    assert dropped == DropState(first.units[0].trial, Status.FAILED)
    assert isinstance(report, ReportUnit)
    assert report.unit == second.units[0]


def test_a_finished_unit_is_not_lost_with_its_worker(two_running: tuple[Hopper, StartJob, StartJob]) -> None:
    hopper, first, second = two_running
    hopper.apply(UnitFinished(second.job, second.units[0], 1.0))
    hopper.apply(WorkerLost(second.worker))
    hopper.apply(WorkerJoined(second.worker, frozenset({0, 1})))
    assert hopper.dispatch() == []
    hopper.apply(UnitFinished(first.job, first.units[0], 1.0))
    orders = hopper.apply(TrialDecided(first.units[0].trial, Decision.STOP))
    assert [order.unit for order in orders if isinstance(order, ReportUnit)] == [second.units[0]]
    assert hopper.state_at(second.units[0].trial) is None


@given(
    seed=st.integers(0, 5), shards=st.integers(2, 6), placement=st.sampled_from(["pinned", "shared"]), away=st.data()
)
def test_a_run_with_fewer_workers_is_the_same_run(seed: int, shards: int, placement: str, away: st.DataObject) -> None:
    """But for who did the work, and when."""
    workers = away.draw(st.integers(2, shards))
    world = {"seed": seed, "shards": shards, "workers": workers, "placement": placement, "live": 4, "report": "unit"}
    whole = played(0, 0, **world)  # type: ignore[arg-type]
    gone = away.draw(st.sets(st.integers(0, workers - 1), min_size=1, max_size=workers - 1))
    short = played(1, 0, gone=frozenset(gone), **world)  # type: ignore[arg-type]
    assert [unit for unit, _ in short.reports] == [unit for unit, _ in whole.reports]
    assert short.ends == whole.ends
    assert not {WorkerId(number) for number in gone} & set(short.visits)
