"""The state machine under a virtual clock: what a schedule would take, without training anything.

It drives the same `Hopper` as the live executor does, so what it says about a policy is about the code that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from random import Random
from typing import TypeAlias

from cerebro_tune.bounds import makespan_bound
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.events import (
    Event,
    SearchEnded,
    TrialAdded,
    TrialDecided,
    UnitFinished,
    WorkerJoined,
    WorkerLost,
)
from cerebro_tune.hopper import Hopper
from cerebro_tune.instructions import DropState, Instruction, ReportUnit, StartJob
from cerebro_tune.policy import Policy
from cerebro_tune.units import Decision, Shard, Status, Trial, Unit, WorkerId

Cost: TypeAlias = Callable[[Unit, WorkerId], float]
Tuner: TypeAlias = Callable[[ReportUnit], Decision]


@dataclass(frozen=True, slots=True)
class Absence:
    """The worker with this number is lost at `start` and joins again at `end`, in virtual seconds."""

    worker: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Span:
    """One unit as it ran to its end."""

    unit: Unit
    worker: WorkerId
    start: float
    end: float
    hop: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run came to; times in virtual seconds."""

    spans: list[Span]
    ends: dict[str, float]  # when each trial ended
    statuses: dict[str, Status]
    workers: int
    bound: float  # no schedule of these durations can be shorter

    @property
    def makespan(self) -> float:
        """When the last trial ended."""
        return max(self.ends.values(), default=0.0)

    @property
    def work(self) -> float:
        """Durations of all units, added up."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def hops(self) -> int:
        """How often a state was brought to another worker."""
        return sum(span.hop for span in self.spans)

    @property
    def idle_share(self) -> float:
        """Part of the workers' time, until the last trial ended, in which they had nothing that counted to do."""
        return 1 - self.work / (self.makespan * self.workers) if self.makespan else 0.0

    def result(self, rank: int) -> float:
        """Return when the `rank`-th trial ended, from 1."""
        return sorted(self.ends.values())[rank - 1]


def log_uniform_costs(trials: Sequence[Trial], seed: int, spread: float = 4.0) -> dict[str, float]:
    """Draw a mean unit time for each trial, in [1, spread]."""
    random = Random(f"costs {seed}")
    return {trial.id: spread ** random.random() for trial in trials}


def noisy(costs: dict[str, float], seed: int, noise: float = 0.05) -> Cost:
    """Return a cost function: a trial's mean times 1 +- `noise`, a function of the unit and the seed alone."""

    def cost(unit: Unit, worker: WorkerId) -> float:
        draw = Random(f"{seed} {unit.trial} {unit.epoch} {unit.shard}").random()
        return costs[unit.trial] * (1 + noise * (2 * draw - 1))

    return cost


def holdings(shards: int, workers: int, placement: str) -> list[frozenset[int]]:
    """Return the shards of each worker: all of them ("shared"), or dealt out in turn ("pinned")."""
    if placement not in {"shared", "pinned"}:
        raise ConfigurationError(f'placement is {placement!r}; choose "shared" or "pinned"')
    step = 1 if placement == "shared" else workers
    return [frozenset(range(worker if step > 1 else 0, shards, step)) for worker in range(workers)]


def simulate(
    trials: Sequence[Trial],
    cost: Cost,
    *,
    shards: int,
    workers: int,
    placement: str = "pinned",
    policy: str | Policy = "auto",
    live_trials: int | None = None,
    report_every: str = "unit",
    ahead: int | None = None,
    tuner: Tuner = lambda report: Decision.CONTINUE,
    absences: Iterable[Absence] = (),
    seed: int = 0,
) -> Outcome:
    """Run the trials to their end.

    `ahead` is how many the tuner asks for before it has seen a result; it adds one more each time a trial ends. None:
    all at once. `tuner` answers each report at once.
    """
    hopper = Hopper(
        [Shard(index, 1) for index in range(shards)],
        policy=policy,
        live_trials=live_trials,
        report_every=report_every,
        max_failures=len(trials) + 1_000,
        seed=seed,
    )
    return _Run(hopper, list(trials), cost, tuner).play(holdings(shards, workers, placement), ahead, absences)


@dataclass(slots=True)
class _Run:
    """A run in progress: the shell around the machine, with a heap for a clock."""

    hopper: Hopper
    waiting: list[Trial]
    cost: Cost
    tuner: Tuner
    now: float = 0.0
    spans: list[Span] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    orders: dict[int, StartJob] = field(default_factory=dict)
    starts: dict[int, float] = field(default_factory=dict)
    agenda: list[tuple[float, int, Event]] = field(default_factory=list)
    tickets: count[int] = field(default_factory=count)

    def play(self, held: list[frozenset[int]], ahead: int | None, absences: Iterable[Absence]) -> Outcome:
        for number, shards in enumerate(held):
            self.tell(WorkerJoined(WorkerId(number), shards))
        for absence in absences:
            worker = WorkerId(absence.worker)
            self.agenda.append((absence.start, next(self.tickets), WorkerLost(worker)))
            self.agenda.append((absence.end, next(self.tickets), WorkerJoined(worker, held[absence.worker])))
        heapify(self.agenda)
        self.add(len(self.waiting) if ahead is None else ahead)
        self.dispatch()
        while self.agenda and not self.hopper.settled:
            self.now, _, event = heappop(self.agenda)
            if isinstance(event, UnitFinished):
                if event.job not in self.orders:
                    continue  # its worker died
                self.record(event)
            elif isinstance(event, WorkerLost) and (job := self.hopper.job_of(event.worker)) is not None:
                self.orders.pop(job, None)
            self.tell(event)
            self.dispatch()
        statuses = {trial: self.hopper.status(trial) for trial in self.hopper.trials}
        pinned = not any(a & b for a in held for b in held if a is not b)
        done = [(span.unit.trial, span.worker, span.end - span.start) for span in self.spans]
        return Outcome(self.spans, self.ends, statuses, len(held), makespan_bound(done, len(held), pinned=pinned))

    def add(self, trials: int) -> None:
        """Let the tuner ask for this many more trials, and say so when these are the last."""
        if not self.waiting:
            return
        added, self.waiting = self.waiting[:trials], self.waiting[trials:]
        for trial in added:
            self.tell(TrialAdded(trial))
        if not self.waiting:
            self.tell(SearchEnded())

    def tell(self, event: Event) -> None:
        """Apply an event, and answer all that follows from it as a tuner does that needs no time."""
        orders: list[Instruction] = self.hopper.apply(event)
        for order in orders:
            if isinstance(order, ReportUnit):
                self.tell(TrialDecided(order.unit.trial, self.tuner(order)))
            elif isinstance(order, DropState):
                self.ends[order.trial] = self.now
                self.add(1)

    def record(self, event: UnitFinished) -> None:
        order, start = self.orders[event.job], self.starts[event.job]
        at = order.units.index(event.unit)
        self.spans.append(Span(event.unit, order.worker, start, self.now, order.hops[at]))

    def dispatch(self) -> None:
        for order in self.hopper.dispatch():
            self.orders[order.job], self.starts[order.job] = order, self.now
            start = self.now
            for unit in order.units:
                duration = self.cost(unit, order.worker)
                start += duration
                heappush(self.agenda, (start, next(self.tickets), UnitFinished(order.job, unit, duration)))
