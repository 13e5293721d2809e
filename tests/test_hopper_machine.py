"""All six invariants, over random arrivals, clones, decisions, failures, worker losses and rejoins."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cerebro_tune.errors import IllegalEventError
from cerebro_tune.eventcodec import to_event, to_plain
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
from cerebro_tune.hopper import Hopper
from cerebro_tune.policy import AutoPolicy
from cerebro_tune.units import Decision, Shard, Status, Trial, Unit, WorkerId
from hopper_oracle import Ledger, Model, PackedPolicy, snapshot

ENDED = {Status.FINISHED, Status.STOPPED, Status.FAILED}
CLONED = set(Status) - {Status.FINISHED, Status.STOPPED}
PLACEMENTS = ("pinned", "shared", "replicas")


def held_by(placement: str, worker: int, shards: int, workers: int) -> frozenset[int]:
    """The shards of a worker; with replicas each shard has two neighbouring holders."""
    every = range(shards)
    if placement == "shared":
        return frozenset(every)
    near = {0} if placement == "pinned" else {0, 1}
    return frozenset(shard for shard in every if (worker - shard) % workers in near)


class HopperMachine(RuleBasedStateMachine):
    """A random world around the machine, with the ledger and the model looking on."""

    @initialize(
        shards=st.integers(1, 5),
        workers=st.integers(1, 4),
        placement=st.sampled_from(PLACEMENTS),
        policy=st.sampled_from(["auto", "random", "fixed", "packed", "packed fixed"]),
        live_trials=st.none() | st.integers(1, 5),
        report_every=st.sampled_from(["unit", "epoch"]),
        max_failures=st.integers(0, 3),
        seed=st.integers(0, 3),
    )
    def begin(self, shards: int, workers: int, placement: str, policy: str, **options: Any) -> None:
        workers = min(shards, workers)
        self.shards = shards
        self.logical = policy.endswith("fixed")
        self.greedy = policy == "random" or (policy == "auto" and placement == "shared")
        chosen = PackedPolicy(logical=self.logical) if policy.startswith("packed") else policy
        self.limit = options["live_trials"]
        self.make = partial(Hopper, [Shard(index, 1) for index in range(shards)], policy=chosen, **options)
        self.hopper = self.make()
        self.log: list[tuple[str, str, list[Any]]] = []  # as the journal of a run has it
        self.ledger = Ledger(shards, logical=self.logical)
        report_units = options["report_every"] == "unit"
        self.model = Model(shards, report_units=report_units, max_failures=options["max_failures"])
        self.worlds = {WorkerId(w): held_by(placement, w, shards, workers) for w in range(workers)}
        self.dispatched = False
        for worker in sorted(self.worlds):
            self.tell(WorkerJoined(worker, self.worlds[worker]))

    def tell(self, event: Event) -> None:
        committed = self.hopper.progress(event.source)[1] if isinstance(event, TrialCloned) else 0
        running = self.hopper.job_of(event.worker) if isinstance(event, WorkerLost) else None
        lost = [unit.trial for unit in self.ledger.open[running][1]] if running else []
        returned = [unit.trial for _, units in self.ledger.open.values() for unit in units]
        orders = self.hopper.apply(event)
        self.log.append((type(event).__name__, json.dumps(to_plain(event)), orders))
        self.ledger.told(event, orders, committed)
        self.dispatched = False
        match event:
            case TrialAdded(trial):
                self.model.added(trial)
            case TrialCloned(trial):
                self.model.added(trial, committed)
            case TrialRestored(trial, units):
                self.model.added(trial, units)
            case TrialDecided(trial, decision):
                self.model.decided(trial, decision)
            case UnitFinished(unit=unit):
                self.model.finished(unit)
            case UnitFailed(unit=unit):
                self.model.status[unit.trial] = Status.FAILED
        for trial in lost:
            self.model.died(trial)
        for trial in returned if isinstance(event, RunResumed) else ():
            self.model.returned(trial)

    @rule()
    def die_and_go_on(self) -> None:
        """The coordinator dies, and the next one tells a new machine what the journal has."""
        again = self.make()
        for kind, text, orders in self.log:
            assert orders == (again.apply(to_event(kind, json.loads(text))) if kind else again.dispatch())
        assert again.trials == self.hopper.trials
        for trial in again.trials:
            assert again.story(trial) == self.hopper.story(trial)
            assert again.visited(trial) == self.hopper.visited(trial)
        self.hopper = again
        self.tell(RunResumed())

    @rule()
    def dispatch(self) -> None:
        orders = self.hopper.dispatch()
        self.log.append(("", "", orders))
        for order in orders:
            self.ledger.ordered(order)
            for unit in order.units:
                self.model.status[unit.trial] = Status.RUNNING
        self.dispatched = True

    @rule(epochs=st.integers(1, 3))
    def add(self, epochs: int) -> None:
        number = len(self.hopper.trials)
        if number < 12:
            self.tell(TrialAdded(Trial(f"t{number}", number, epochs)))

    @rule(data=st.data(), epochs=st.integers(1, 3))
    def clone(self, data: st.DataObject, epochs: int) -> None:
        number = len(self.hopper.trials)
        sources = [
            trial
            for trial in self.hopper.trials
            if self.hopper.status(trial) in CLONED and self.hopper.progress(trial)[1] < epochs * self.shards
        ]
        if sources and number < 12:
            source = data.draw(st.sampled_from(sources))
            self.tell(TrialCloned(Trial(f"t{number}", number, epochs), source))
            assert self.hopper.progress(f"t{number}")[1] == self.hopper.progress(source)[1]

    @rule(data=st.data(), epochs=st.integers(1, 3))
    def restore(self, data: st.DataObject, epochs: int) -> None:
        number = len(self.hopper.trials)
        units = data.draw(st.integers(0, epochs * self.shards - 1))
        visited = frozenset(data.draw(st.permutations(range(self.shards)))[: units % self.shards])
        if number < 12:
            self.tell(TrialRestored(Trial(f"t{number}", number, epochs), units, visited))
            assert self.hopper.progress(f"t{number}") == (units // self.shards, units, epochs * self.shards)
            assert self.hopper.visited(f"t{number}") == visited

    @rule(data=st.data(), elapsed_s=st.floats(0, 10))
    @precondition(lambda self: self.ledger.open)
    def finish(self, data: st.DataObject, elapsed_s: float) -> None:
        job = data.draw(st.sampled_from(sorted(self.ledger.open)))
        unit = data.draw(st.sampled_from(self.ledger.open[job][1]))
        self.tell(UnitFinished(job, unit, elapsed_s))

    @rule(data=st.data())
    @precondition(lambda self: self.ledger.open)
    def fail(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.ledger.open)))
        unit = data.draw(st.sampled_from(self.ledger.open[job][1]))
        self.tell(UnitFailed(job, unit, "ValueError: boom"))

    @rule(data=st.data(), decision=st.sampled_from(Decision))
    def answer(self, data: st.DataObject, decision: Decision) -> None:
        asked = [trial for trial in self.hopper.trials if self.hopper.status(trial) is Status.DECIDING]
        if asked:
            self.tell(TrialDecided(data.draw(st.sampled_from(asked)), decision))

    @rule(data=st.data(), decision=st.sampled_from(Decision))
    def speak_out_of_turn(self, data: st.DataObject, decision: Decision) -> None:
        alive = [trial for trial in self.hopper.trials if self.hopper.status(trial) not in ENDED]
        if alive:
            self.tell(TrialDecided(data.draw(st.sampled_from(alive)), decision))

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if self.ledger.holdings:
            self.tell(WorkerLost(data.draw(st.sampled_from(sorted(self.ledger.holdings)))))

    @rule(data=st.data())
    def rejoin(self, data: st.DataObject) -> None:
        gone = sorted(set(self.worlds) - set(self.ledger.holdings))
        if gone:
            worker = data.draw(st.sampled_from(gone))
            self.tell(WorkerJoined(worker, self.worlds[worker]))

    @rule(data=st.data())
    def stay_away(self, data: st.DataObject) -> None:
        if self.ledger.lost:
            self.tell(WorkerStayedAway(data.draw(st.sampled_from(sorted(self.ledger.lost)))))

    @rule()
    def end_search(self) -> None:
        self.tell(SearchEnded())

    @rule(data=st.data())
    def try_the_illegal(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from(self.illegal_events()))
        before = snapshot(self.hopper)
        with pytest.raises(IllegalEventError, match=r"is not legal: .* is .*; legal then: "):
            self.hopper.apply(event)
        assert snapshot(self.hopper) == before

    def illegal_events(self) -> list[Event]:
        events: list[Event] = [
            TrialDecided("nobody", Decision.CONTINUE),
            TrialCloned(Trial("new", 99, 9), "nobody"),
            TrialAdded(Trial("new", 99, 0)),
            TrialRestored(Trial("new", 99, 1), self.shards, frozenset()),
            TrialRestored(Trial("new", 99, 2), 0, frozenset({0})),
            TrialRestored(Trial("new", 99, 2), self.shards, frozenset({self.shards})),
            WorkerLost(WorkerId(99)),
            WorkerStayedAway(WorkerId(99)),
            WorkerJoined(WorkerId(99), frozenset()),
            WorkerJoined(WorkerId(99), frozenset({self.shards})),
            UnitFinished(10_000, Unit("t0", 0, 0), 1.0),
            UnitFailed(0, Unit("t0", 0, 0), "boom"),
        ]
        events += [WorkerJoined(worker, shards) for worker, shards in self.ledger.holdings.items()]
        events += [WorkerStayedAway(worker) for worker in self.ledger.holdings]
        events += [WorkerLost(worker) for worker in self.worlds if worker not in self.ledger.holdings]
        for job, (order, units) in self.ledger.open.items():
            ended = [unit for unit in order.units if unit not in units]
            events += [UnitFinished(job, unit, 1.0) for unit in ended]
            events += [UnitFinished(job, Unit(units[0].trial, units[0].epoch + 1, units[0].shard), 1.0)]
            events += [UnitFinished(job, units[0], -1.0), UnitFinished(job, units[0], float("nan"))]
        events += [UnitFinished(s.job, s.units[0], 1.0) for s in self.ledger.starts if s.job not in self.ledger.open]
        for trial in self.hopper.trials:
            events.append(TrialAdded(Trial(trial, 99, 1)))
            if self.hopper.status(trial) in ENDED:
                events.append(TrialDecided(trial, Decision.CONTINUE))
            if self.hopper.status(trial) not in CLONED:
                events.append(TrialCloned(Trial("new", 99, 99), trial))
            elif self.hopper.progress(trial)[1] >= self.shards:
                events.append(TrialCloned(Trial("new", 99, 1), trial))
        return events

    @invariant()
    def it_validates(self) -> None:
        if not hasattr(self, "hopper"):
            return
        self.hopper.validate()
        assert self.limit is None or self.hopper.live <= self.limit
        for trial in self.hopper.trials:
            status = self.hopper.status(trial)
            assert len(self.hopper.story(trial)) <= 64
            assert (status in ENDED) == (self.ledger.accounts[trial].ended is not None)
            if not self.logical:
                waiting = status in {Status.QUEUED, Status.READY}
                assert (Model.WAITING if waiting else status) == self.model.status[trial]
                assert self.hopper.state_at(trial) == self.ledger.accounts[trial].worker
        for worker in self.worlds:
            assert self.hopper.job_of(worker) == self.ledger.busy.get(worker)

    @invariant()
    def no_worker_idles_beside_work(self) -> None:
        if not getattr(self, "dispatched", False) or not self.greedy:
            return
        ready = [trial for trial in self.hopper.trials if self.hopper.status(trial) is Status.READY]
        for worker, shards in self.ledger.holdings.items():
            if worker not in self.ledger.busy:
                for trial in ready:
                    account = self.ledger.accounts[trial]
                    epoch = len(account.trained) // self.shards
                    assert shards <= set(self.ledger.visited(account, epoch)), f"{worker} could run {trial}"

    def teardown(self) -> None:
        """In a fair world every trial comes to its end; who stays away need not come back while others are here."""
        if not hasattr(self, "hopper"):
            return
        self.tell(SearchEnded())
        for _ in range(10_000):
            trials = self.hopper.trials
            if all(self.hopper.status(trial) in ENDED for trial in trials):
                break
            before = snapshot(self.hopper)
            for worker in sorted(set(self.ledger.lost) - (self.ledger.away if self.ledger.holdings else set())):
                self.tell(WorkerJoined(worker, self.worlds[worker]))
            self.dispatch()
            for job, (_, units) in list(self.ledger.open.items()):
                for unit in list(units):
                    self.tell(UnitFinished(job, unit, 1.0))
            for trial in trials:
                if self.hopper.status(trial) in {Status.DECIDING, Status.PAUSED}:
                    self.tell(TrialDecided(trial, Decision.CONTINUE))
            assert snapshot(self.hopper) != before, "the run hangs"
        self.hopper.validate()
        assert self.hopper.settled
        assert self.hopper.live == 0
        assert not self.ledger.open
        assert self.hopper.dispatch() == []


TestHopperMachine = HopperMachine.TestCase
TestHopperMachine.settings = settings(stateful_step_count=60, deadline=None)


def test_a_policy_may_be_given_as_an_object() -> None:
    assert Hopper([Shard(0, 1)], policy=AutoPolicy()).dispatch() == []
