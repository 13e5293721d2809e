"""The state machine, move by move: what each fact does, and what is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cerebro_tune.hopper
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
    WorkerStayedAway,
)
from cerebro_tune.hopper import TRANSITIONS, Hopper
from cerebro_tune.instructions import DropState, Instruction, ReportUnit, StartJob
from cerebro_tune.policy import AutoPolicy, Board, Candidate, Choice, Policy, Ready, Regime
from cerebro_tune.story import Move, diagram
from cerebro_tune.units import Decision, Shard, Status, Trial, Unit, WorkerId
from hopper_oracle import PackedPolicy, snapshot

W0, W1 = WorkerId(0), WorkerId(1)
PURE = ["units", "events", "instructions", "hopper", "policy", "bounds", "simulate", "roster", "story", "invariants"]


def machine(
    shards: int = 2, workers: int = 1, trials: int = 1, epochs: int = 1, *, live_trials: int | None = None,
    report_every: str = "unit", max_failures: int = 2, policy: str | Policy = "auto",
) -> Hopper:  # fmt: skip
    """Every worker holds every shard; trials a, b, ... are added and nothing is dispatched."""
    hopper = Hopper(
        [Shard(index, 10) for index in range(shards)],
        policy=policy,
        live_trials=live_trials,
        report_every=report_every,
        max_failures=max_failures,
    )
    for number in range(workers):
        hopper.apply(WorkerJoined(WorkerId(number), frozenset(range(shards))))
    for index in range(trials):
        hopper.apply(TrialAdded(Trial("abcdefgh"[index], index, epochs)))
    return hopper


def finish(hopper: Hopper, start: StartJob) -> list[Instruction]:
    """The job's only unit is done."""
    return hopper.apply(UnitFinished(start.job, start.units[0], 1.0))


def decide(hopper: Hopper, trial: str, decision: Decision) -> list[Instruction]:
    return hopper.apply(TrialDecided(trial, decision))


def one_unit(hopper: Hopper) -> StartJob:
    """Dispatch the one worker and end its unit."""
    [start] = hopper.dispatch()
    finish(hopper, start)
    return start


def test_a_trial_from_its_first_unit_to_its_last() -> None:
    hopper = machine(shards=2)
    [first] = hopper.dispatch()
    assert (first.worker, first.versions, first.hops) == (W0, (0,), (False,))
    assert hopper.status("a") is Status.RUNNING
    assert hopper.job_of(W0) == first.job
    assert hopper.dispatch() == []
    assert finish(hopper, first) == [ReportUnit(first.job, first.units[0], 1, epoch_done=False, last=False)]
    assert hopper.status("a") is Status.DECIDING
    assert hopper.progress("a") == (0, 1, 2)
    assert hopper.state_at("a") == W0
    assert hopper.dispatch() == []
    assert decide(hopper, "a", Decision.CONTINUE) == []
    [second] = hopper.dispatch()
    assert {first.units[0], second.units[0]} == {Unit("a", 0, 0), Unit("a", 0, 1)}
    assert second.versions == (1,)
    assert finish(hopper, second) == [ReportUnit(second.job, second.units[0], 2, epoch_done=True, last=True)]
    assert not hopper.settled
    assert decide(hopper, "a", Decision.CONTINUE) == [DropState("a", Status.FINISHED)]
    assert hopper.settled
    assert hopper.progress("a") == (1, 2, 2)


def test_without_a_report_due_a_trial_goes_on_at_once() -> None:
    hopper = machine(shards=2, report_every="epoch")
    [first] = hopper.dispatch()
    assert finish(hopper, first) == []
    assert hopper.status("a") is Status.READY
    [second] = hopper.dispatch()
    [report] = finish(hopper, second)
    assert isinstance(report, ReportUnit)
    assert report.epoch_done


@pytest.mark.parametrize(
    ("decision", "status", "dropped"),
    [
        (Decision.CONTINUE, Status.READY, False),
        (Decision.PAUSE, Status.PAUSED, False),
        (Decision.STOP, Status.STOPPED, True),
    ],
)
def test_an_answer_between_units(decision: Decision, status: Status, dropped: bool) -> None:
    hopper = machine()
    one_unit(hopper)
    assert decide(hopper, "a", decision) == ([DropState("a", status)] if dropped else [])
    assert hopper.status("a") is status


@pytest.mark.parametrize(
    ("decision", "status"),
    [
        (Decision.CONTINUE, Status.FINISHED),
        (Decision.STOP, Status.FINISHED),
        (Decision.PAUSE, Status.PAUSED),
    ],
)
def test_an_answer_after_the_last_unit(decision: Decision, status: Status) -> None:
    hopper = machine(shards=1)
    one_unit(hopper)
    decide(hopper, "a", decision)
    assert hopper.status("a") is status
    if status is Status.PAUSED:
        assert decide(hopper, "a", Decision.CONTINUE) == [DropState("a", Status.FINISHED)]


@pytest.mark.parametrize("answer", Decision)
@pytest.mark.parametrize("wish", [Decision.PAUSE, Decision.STOP])
def test_a_wish_for_a_running_trial_joins_the_answer(wish: Decision, answer: Decision) -> None:
    hopper = machine()
    [start] = hopper.dispatch()
    assert decide(hopper, "a", wish) == []
    assert hopper.status("a") is Status.RUNNING
    finish(hopper, start)
    assert hopper.status("a") is Status.DECIDING
    decide(hopper, "a", answer)
    stopped = Decision.STOP in {wish, answer}
    assert hopper.status("a") is (Status.STOPPED if stopped else Status.PAUSED)


@pytest.mark.parametrize(
    ("wishes", "status"),
    [
        ([Decision.PAUSE], Status.PAUSED),
        ([Decision.STOP], Status.STOPPED),
        ([Decision.PAUSE, Decision.CONTINUE], Status.READY),
        ([Decision.STOP, Decision.CONTINUE], Status.STOPPED),
        ([Decision.STOP, Decision.PAUSE], Status.STOPPED),
    ],
)
def test_wishes_apply_at_the_units_end_when_nothing_is_asked(wishes: list[Decision], status: Status) -> None:
    hopper = machine(report_every="epoch")
    [start] = hopper.dispatch()
    for wish in wishes:
        decide(hopper, "a", wish)
    finish(hopper, start)
    assert hopper.status("a") is status


def test_a_wish_applies_when_the_worker_dies() -> None:
    hopper = machine()
    hopper.dispatch()
    decide(hopper, "a", Decision.STOP)
    assert hopper.apply(WorkerLost(W0)) == [DropState("a", Status.STOPPED)]


@pytest.mark.parametrize("decision", [Decision.PAUSE, Decision.STOP])
@pytest.mark.parametrize("trial", ["a", "b"])
def test_a_waiting_trial_is_paused_or_stopped_at_once(trial: str, decision: Decision) -> None:
    hopper = machine(trials=2, live_trials=1)
    assert [hopper.status(each) for each in hopper.trials] == [Status.READY, Status.QUEUED]
    decide(hopper, trial, decision)
    assert hopper.status(trial) is (Status.PAUSED if decision is Decision.PAUSE else Status.STOPPED)
    other = "b" if trial == "a" else "a"
    assert hopper.status(other) is Status.READY


def test_admission_is_in_order_and_bounded() -> None:
    hopper = machine(trials=4, live_trials=2)
    assert [hopper.status(trial) for trial in "abcd"] == [Status.READY] * 2 + [Status.QUEUED] * 2
    decide(hopper, "a", Decision.PAUSE)
    assert hopper.status("c") is Status.READY
    decide(hopper, "a", Decision.CONTINUE)
    assert hopper.status("a") is Status.QUEUED
    decide(hopper, "b", Decision.STOP)
    decide(hopper, "c", Decision.STOP)
    assert [hopper.status(trial) for trial in "ad"] == [Status.READY, Status.READY]
    assert hopper.live == 2


def test_a_failed_unit_ends_its_trial() -> None:
    hopper = machine(trials=2)
    [start] = hopper.dispatch()
    failed = start.units[0].trial
    orders = hopper.apply(UnitFailed(start.job, start.units[0], "ZeroDivisionError"))
    assert orders == [DropState(failed, Status.FAILED)]
    [other] = hopper.dispatch()
    assert other.units[0].trial != failed


def test_shards_of_a_worker_that_stays_away_are_dealt_to_the_others() -> None:
    hopper = Hopper([Shard(index, 1) for index in range(2)])
    hopper.apply(WorkerJoined(W0, frozenset({0})))
    hopper.apply(WorkerJoined(W1, frozenset({1})))
    for number in range(2):
        hopper.apply(TrialAdded(Trial(f"t{number}", number, 4)))

    def visits(rounds: int) -> list[tuple[WorkerId, int]]:
        seen = []
        for _ in range(rounds):
            for start in hopper.dispatch():
                seen.append((start.worker, start.units[0].shard))
                for report in hopper.apply(UnitFinished(start.job, start.units[0], 1.0)):
                    hopper.apply(TrialDecided(report.unit.trial, Decision.CONTINUE))  # type: ignore[union-attr]
        return seen

    hopper.apply(WorkerLost(W1))
    assert visits(5) == [(W0, 0), (W0, 0)], "what only it holds waits for it"
    hopper.apply(WorkerStayedAway(W1))
    assert set(visits(6)) == {(W0, 0), (W0, 1)}
    hopper.apply(WorkerJoined(W1, frozenset({1})))
    assert set(visits(4)) == {(W0, 0), (W1, 1)}, "and it has its own again"


def test_a_lost_workers_unit_is_run_again_from_the_same_version() -> None:
    hopper = machine(workers=2, shards=2)
    one_unit(hopper)
    decide(hopper, "a", Decision.CONTINUE)
    [start] = hopper.dispatch()
    hopper.apply(WorkerLost(start.worker))
    assert hopper.status("a") is Status.READY
    assert hopper.state_at("a") is None
    [again] = hopper.dispatch()
    assert again.units == start.units
    assert again.versions == start.versions
    assert again.hops == (True,)
    assert again.job != start.job
    with pytest.raises(IllegalEventError, match=f"job {start.job} is not open"):
        finish(hopper, start)


def test_a_trial_whose_workers_keep_dying_fails() -> None:
    hopper = machine(max_failures=1)
    every = frozenset({0, 1})
    hopper.dispatch()
    assert hopper.apply(WorkerLost(W0)) == []
    hopper.apply(WorkerJoined(W0, every))
    hopper.dispatch()
    assert hopper.apply(WorkerLost(W0)) == [DropState("a", Status.FAILED)]


def test_only_the_running_trial_is_charged_with_a_death() -> None:
    hopper = machine(trials=2, max_failures=0)
    [start] = hopper.dispatch()
    [other] = {"a", "b"} - {start.units[0].trial}
    hopper.apply(WorkerLost(W0))
    assert hopper.status(start.units[0].trial) is Status.FAILED
    assert hopper.status(other) is Status.READY


def test_a_clone_goes_on_from_what_its_source_committed() -> None:
    hopper = machine(shards=3, workers=2, epochs=2)
    first = one_unit(hopper)
    decide(hopper, "a", Decision.CONTINUE)
    [running] = hopper.dispatch()
    hopper.apply(TrialCloned(Trial("b", 1, 2), "a"))
    assert hopper.progress("b") == (0, 1, 6)
    assert hopper.state_at("b") == first.worker
    [clone] = hopper.dispatch()
    assert clone.units[0].trial == "b"
    assert clone.versions == (1,)
    assert clone.hops == (clone.worker != first.worker,)
    assert clone.units[0].shard != first.units[0].shard
    assert running.versions == (1,)


def test_a_clone_may_have_more_epochs_than_a_source_that_is_through() -> None:
    hopper = machine(shards=1, epochs=1)
    one_unit(hopper)
    with pytest.raises(IllegalEventError, match="a clone with more units than that"):
        hopper.apply(TrialCloned(Trial("b", 1, 1), "a"))
    hopper.apply(TrialCloned(Trial("b", 1, 2), "a"))
    [start] = hopper.dispatch()
    assert start.units == (Unit("b", 1, 0),)


def test_a_job_of_several_units_ends_with_the_last_of_them() -> None:
    hopper = machine(trials=3, policy=PackedPolicy())
    [start] = hopper.dispatch()
    assert [unit.trial for unit in start.units] == ["a", "b", "c"]
    assert len({unit.shard for unit in start.units}) == 1
    a, b, c = start.units
    hopper.apply(UnitFinished(start.job, b, 1.0))
    decide(hopper, "b", Decision.CONTINUE)
    assert hopper.dispatch() == []
    hopper.validate()
    hopper.apply(UnitFailed(start.job, a, "boom"))
    hopper.apply(WorkerLost(W0))
    assert [hopper.status(trial) for trial in "abc"] == [Status.FAILED, Status.READY, Status.READY]
    hopper.apply(WorkerJoined(W0, frozenset({0, 1})))
    [again] = hopper.dispatch()
    hopper.validate()
    assert c in again.units or again.units[0].trial == "b"


def test_an_idle_worker_is_offered_what_gets_ready_later() -> None:
    hopper = Hopper([Shard(0, 1), Shard(1, 1)], policy="random")
    hopper.apply(WorkerJoined(W0, frozenset({0})))
    hopper.apply(WorkerJoined(W1, frozenset({1})))
    hopper.apply(TrialAdded(Trial("a", 0, 1)))
    [start] = hopper.dispatch()
    assert hopper.dispatch() == []
    finish(hopper, start)
    assert hopper.dispatch() == []
    decide(hopper, "a", Decision.CONTINUE)
    [other] = hopper.dispatch()
    assert other.worker != start.worker
    assert other.hops == (True,)


def test_a_trial_stays_where_its_state_is_when_every_worker_holds_every_shard() -> None:
    hopper = machine(shards=4, workers=3, trials=3, epochs=3)
    hopper.apply(SearchEnded())
    running = {start.job: start for start in hopper.dispatch()}
    seats = {start.units[0].trial: start.worker for start in running.values()}
    while running:
        start = running.popitem()[1]
        finish(hopper, start)
        decide(hopper, start.units[0].trial, Decision.CONTINUE)
        for order in hopper.dispatch():
            running[order.job] = order
            assert seats[order.units[0].trial] == order.worker
            assert order.hops == (False,)
    assert hopper.settled


def test_a_trial_whose_answer_takes_a_while_still_stays_where_its_state_is() -> None:
    hopper = machine(workers=2, trials=2)
    first, second = hopper.dispatch()
    finish(hopper, first)
    decide(hopper, first.units[0].trial, Decision.STOP)
    finish(hopper, second)
    assert hopper.dispatch() == []
    decide(hopper, second.units[0].trial, Decision.CONTINUE)
    [start] = hopper.dispatch()
    assert (start.worker, start.hops) == (second.worker, (False,))


def test_a_death_too_many_makes_room_for_the_next_trial() -> None:
    hopper = machine(trials=2, live_trials=1, max_failures=0)
    hopper.dispatch()
    hopper.apply(WorkerLost(W0))
    assert [hopper.status(trial) for trial in "ab"] == [Status.FAILED, Status.READY]


class WatchedPolicy(AutoPolicy):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Regime, int, int]] = []
        self.boards: list[Board] = []

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        self.asked.append((regime, worker, len(ready)))
        self.boards.append(board)
        return super().choose(regime, board, worker, held, ready)


def test_a_worker_that_found_nothing_is_offered_only_news() -> None:
    policy = WatchedPolicy()
    hopper = Hopper([Shard(0, 1), Shard(1, 1)], policy=policy)
    hopper.apply(WorkerJoined(W0, frozenset({0})))
    for index in range(3):
        hopper.apply(TrialAdded(Trial("abc"[index], index, 1)))
    for _ in range(3):
        [start] = hopper.dispatch()
        finish(hopper, start)
        decide(hopper, start.units[0].trial, Decision.CONTINUE)
    assert hopper.dispatch() == []  # all three now need shard 1, which nobody holds
    hopper.apply(TrialAdded(Trial("d", 3, 1)))
    assert len(hopper.dispatch()) == 1
    assert [ready for _, _, ready in policy.asked] == [3, 3, 3, 3, 1]


def test_the_rules_change_with_the_run() -> None:
    policy = WatchedPolicy()
    hopper = machine(workers=2, trials=4, epochs=2, live_trials=3, policy=policy)
    hopper.apply(SearchEnded())
    running = hopper.dispatch()
    while running:
        start = running.pop(0)
        finish(hopper, start)
        decide(hopper, start.units[0].trial, Decision.CONTINUE)
        running += hopper.dispatch()
    regimes = list(dict.fromkeys(regime for regime, _, _ in policy.asked))
    assert regimes == [Regime.SHORTEST, Regime.LONGEST]
    assert policy.boards[-1].time_left == pytest.approx(0.0)


def test_a_worker_that_waits_in_rotation_takes_what_is_there_when_rotation_ends() -> None:
    hopper = Hopper([Shard(index, 1) for index in range(4)])
    for number in range(4):
        hopper.apply(WorkerJoined(WorkerId(number), frozenset({number})))
    for index in range(3):
        hopper.apply(TrialAdded(Trial("abc"[index], index, 1)))
    a, _, c = hopper.dispatch()
    finish(hopper, c)
    decide(hopper, "c", Decision.CONTINUE)
    finish(hopper, a)
    decide(hopper, "a", Decision.CONTINUE)
    [c] = hopper.dispatch()
    assert c.worker == WorkerId(3)  # a waits for shard 1, where b is, and workers 0 and 2 for whoever comes next
    for trial in "de":
        hopper.apply(TrialCloned(Trial(trial, 3, 1), "c"))
    starts = {start.worker.number: start.units[0].trial for start in hopper.dispatch()}
    assert starts in ({0: "d", 2: "a"}, {0: "e", 2: "a"})


class KeepingPolicy(AutoPolicy):
    """As if trial a always set the end of the run."""

    def regime(self, board: Board) -> Regime:
        return Regime.LONGEST

    def keep(self, regime: Regime, board: Board, trial: Candidate, shard: int) -> int:
        return trial.left & ~(1 << shard) if trial.order == 0 else 0


def test_a_worker_that_was_kept_for_a_trial_goes_on_when_that_trial_is_stopped() -> None:
    hopper = Hopper([Shard(0, 1), Shard(1, 1)], policy=KeepingPolicy())
    for number in range(2):
        hopper.apply(WorkerJoined(WorkerId(number), frozenset({number})))
    for index in range(3):
        hopper.apply(TrialAdded(Trial("abc"[index], index, 1)))
    [start] = hopper.dispatch()
    assert start.units == (Unit("a", 0, 0),)
    assert hopper.dispatch() == []
    finish(hopper, start)
    decide(hopper, "a", Decision.STOP)
    assert {start.units[0].trial for start in hopper.dispatch()} == {"b", "c"}


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (TrialAdded(Trial("a", 0, 1)), "trial 'a' is ready; legal then: a new id"),
        (TrialAdded(Trial("z", 0, 0)), "trial 'z' is of 0 epochs; legal then: 1 epoch or more"),
        (TrialCloned(Trial("z", 0, 1), "y"), "trial 'y' is unknown; legal then: TrialAdded or TrialCloned"),
        (TrialDecided("y", Decision.STOP), "trial 'y' is unknown"),
        (WorkerJoined(W0, frozenset({0})), "worker-0 is here already; legal then: WorkerLost"),
        (WorkerJoined(W1, frozenset({7})), r"worker-1 is said to hold shards \[7\]; legal then: .* out of 0..1"),
        (WorkerLost(W1), "worker-1 is not here; legal then: WorkerJoined"),
        (UnitFinished(5, Unit("a", 0, 0), 1.0), "job 5 is not open; .* open: none"),
    ],
)
def test_an_illegal_event_says_what_is_legal_and_changes_nothing(event: Event, message: str) -> None:
    hopper = machine()
    before = snapshot(hopper)
    with pytest.raises(IllegalEventError, match=message):
        hopper.apply(event)
    assert snapshot(hopper) == before


def test_an_ended_trial_takes_no_decision() -> None:
    hopper = machine()
    decide(hopper, "a", Decision.STOP)
    with pytest.raises(IllegalEventError, match="'a' is stopped; legal then: no decision: it has ended"):
        decide(hopper, "a", Decision.CONTINUE)
    with pytest.raises(IllegalEventError, match="legal then: a source that has not ended"):
        hopper.apply(TrialCloned(Trial("b", 1, 1), "a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, 'unknown policy \'best\'; choose "auto", "random" or "fixed"'),
        ({"live_trials": 0}, "live_trials is 0"),
        ({"report_every": "batch"}, "report_every is 'batch'"),
        ({"max_failures": -1}, "max_failures is -1"),
    ],
)
def test_arguments_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Hopper([Shard(0, 1)], **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="numbered 0, 1"):
        Hopper([Shard(1, 1)])


def test_the_story_tells_every_move_and_its_cause() -> None:
    hopper = machine(shards=1)  # events 1: joined, 2: added
    one_unit(hopper)  # 3
    decide(hopper, "a", Decision.CONTINUE)  # 4
    told = [(row.cause, row.move, row.after) for row in hopper.story("a")]
    assert told == [
        (2, Move.ADMIT, Status.READY),
        (2, Move.START, Status.RUNNING),
        (3, Move.REPORT, Status.DECIDING),
        (4, Move.END, Status.FINISHED),
    ]
    assert "deciding -> finished" in str(hopper.story("a")[-1])


def test_a_start_is_caused_by_the_later_of_its_two_conditions() -> None:
    hopper = machine(trials=2)  # events 1: joined, 2 and 3: added
    first = one_unit(hopper)  # 4: the worker is idle again
    [second] = hopper.dispatch()
    assert second.units[0].trial != first.units[0].trial
    assert hopper.story(second.units[0].trial)[-1].cause == 4


def test_an_invariant_error_carries_the_story() -> None:
    hopper = machine(shards=2)
    one_unit(hopper)
    hopper.validate()
    hopper._records["a"].left = 0b11  # forget that a shard was visited
    with pytest.raises(InvariantError, match=r"completeness(.|\n)*running -> deciding"):
        hopper.validate()


def test_every_status_can_be_reached_and_the_diagram_has_every_move() -> None:
    reached = {Status.QUEUED} | {after for moves in TRANSITIONS.values() for after in moves.values()}
    assert reached == set(TRANSITIONS) == set(Status)
    drawing = diagram(TRANSITIONS)
    assert "running --> failed: give up, raise" in drawing
    for before, moves in TRANSITIONS.items():
        for move, after in moves.items():
            assert any(
                line.startswith(f"    {before.value} --> {after.value}: ") and move.value in line
                for line in drawing.splitlines()
            )


def test_the_core_does_no_input_output_and_has_no_clock() -> None:
    allowed = {"__future__", "bisect", "collections", "dataclasses", "enum", "heapq", "itertools", "random", "typing"}
    folder = Path(cerebro_tune.hopper.__file__).parent
    for name in PURE:
        tree = ast.parse((folder / f"{name}.py").read_text())
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                own = module.removeprefix("cerebro_tune.") in {*PURE, "errors"}
                assert own or module.split(".")[0] in allowed, f"{name}.py imports {module}"
            if isinstance(node, ast.ImportFrom) and node.module == "random":
                assert [alias.name for alias in node.names] == ["Random"], "no global random"


def test_the_table_is_the_only_place_where_a_status_is_set() -> None:
    assignments = [
        ast.unparse(node)
        for name in PURE
        for node in ast.walk(ast.parse((Path(cerebro_tune.hopper.__file__).parent / f"{name}.py").read_text()))
        if isinstance(node, ast.Assign | ast.AugAssign) and ".status" in ast.unparse(node).split("=", maxsplit=1)[0]
    ]
    assert assignments == ["record.status = after", "self.status = Status.QUEUED"]
