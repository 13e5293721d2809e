"""The simulator and the bounds: what it says can be checked by hand or against laws that no schedule breaks."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebro_tune.bounds import makespan_bound, task_parallel_ends
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.instructions import ReportUnit
from cerebro_tune.simulate import Absence, Outcome, holdings, log_uniform_costs, noisy, simulate
from cerebro_tune.units import Decision, Status, Trial, Unit, WorkerId


def trials(count: int, epochs: int = 1) -> list[Trial]:
    return [Trial(f"t{index}", index, epochs) for index in range(count)]


def same(unit: Unit, worker: WorkerId) -> float:
    """Every unit takes one second."""
    return 1.0


def assert_sound(outcome: Outcome, shards: int) -> None:
    """No worker and no trial does two things at once; every epoch visits every shard once."""
    for key in (lambda span: span.worker, lambda span: span.unit.trial):
        lanes: dict[object, list[tuple[float, float]]] = {}
        for span in outcome.spans:
            lanes.setdefault(key(span), []).append((span.start, span.end))
        for lane in lanes.values():
            lane.sort()
            assert all(before[1] <= after[0] for before, after in pairwise(lane))
    units = [span.unit for span in outcome.spans]
    assert len(set(units)) == len(units)
    assert all(0 <= unit.shard < shards for unit in units)


def test_equal_costs_rotate_without_a_gap() -> None:
    outcome = simulate(trials(4, 3), same, shards=4, workers=4)
    assert outcome.makespan == outcome.bound == 12.0
    assert outcome.idle_share == 0.0
    assert outcome.hops == 4 * 3 * 4 - 4
    assert set(outcome.statuses.values()) == {Status.FINISHED}


def test_one_trial_is_bound_by_itself() -> None:
    outcome = simulate(trials(1, 2), same, shards=4, workers=4)
    assert outcome.makespan == outcome.bound == 8.0
    assert outcome.idle_share == 0.75


@given(
    count=st.integers(1, 10),
    shards=st.integers(1, 6),
    workers=st.integers(1, 6),
    placement=st.sampled_from(["pinned", "shared"]),
    policy=st.sampled_from(["auto", "random", "fixed"]),
    live=st.none() | st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_no_schedule_beats_the_bound_or_loses_a_unit(
    count: int, shards: int, workers: int, placement: str, policy: str, live: int | None, seed: int
) -> None:
    workers = min(workers, shards)
    cost = noisy(log_uniform_costs(trials(count), seed), seed)
    outcome = simulate(
        trials(count, 2), cost, shards=shards, workers=workers, placement=placement, policy=policy, live_trials=live,
        seed=seed,
    )  # fmt: skip
    assert_sound(outcome, shards)
    assert len(outcome.spans) == count * 2 * shards
    assert outcome.makespan >= outcome.bound - 1e-9
    assert outcome.makespan <= outcome.work + 1e-9
    assert outcome.work == pytest.approx(sum(cost(span.unit, span.worker) for span in outcome.spans))
    assert 0 <= outcome.idle_share < 1


@pytest.mark.parametrize("policy", ["auto", "random", "fixed"])
def test_a_simulation_repeats_exactly(policy: str) -> None:
    cost = noisy(log_uniform_costs(trials(7), 1), 1)
    first, second = (simulate(trials(7, 2), cost, shards=4, workers=3, policy=policy, seed=5) for _ in range(2))
    assert first == second


def test_a_tuner_that_stops_and_pauses() -> None:
    def tuner(report: ReportUnit) -> Decision:
        if report.unit.trial == "t0":
            return Decision.STOP
        return Decision.PAUSE if report.unit.trial == "t1" and report.units_done == 2 else Decision.CONTINUE

    outcome = simulate(trials(3), same, shards=4, workers=2, tuner=tuner)
    assert outcome.statuses == {"t0": Status.STOPPED, "t1": Status.PAUSED, "t2": Status.FINISHED}
    assert sum(span.unit.trial == "t0" for span in outcome.spans) == 1
    assert sum(span.unit.trial == "t1" for span in outcome.spans) == 2


def test_trials_asked_for_as_others_end() -> None:
    outcome = simulate(trials(9), same, shards=2, workers=2, ahead=3)
    starts = {trial.id: min(s.start for s in outcome.spans if s.unit.trial == trial.id) for trial in trials(9)}
    ends = sorted(outcome.ends.values())
    for index in range(3, 9):
        assert starts[f"t{index}"] >= ends[index - 3]
    assert outcome.result(9) == outcome.makespan


def test_a_lost_worker_costs_the_unit_it_ran() -> None:
    outcome = simulate(trials(2), same, shards=2, workers=2, absences=[Absence(1, 0.5, 3.0)])
    assert set(outcome.statuses.values()) == {Status.FINISHED}
    assert_sound(outcome, 2)
    away = [span for span in outcome.spans if span.worker == WorkerId(1)]
    assert all(span.start >= 3.0 for span in away)
    assert len(outcome.spans) == 4


def test_fixed_gives_the_same_visits_whoever_is_away() -> None:
    def visits(outcome: Outcome) -> set[tuple[Unit, WorkerId]]:
        return {(span.unit, span.worker) for span in outcome.spans}

    calm = simulate(trials(6, 2), same, shards=4, workers=3, policy="fixed", seed=2)
    cost = noisy(log_uniform_costs(trials(6), 4), 4)
    gone = [Absence(worker, 1.3 + worker, 4.0 + worker) for worker in range(3)]
    rough = simulate(trials(6, 2), cost, shards=4, workers=3, policy="fixed", seed=2, absences=gone)
    assert visits(calm) == visits(rough)


@pytest.mark.parametrize(("count", "workers", "bar"), [(8, 8, 1.03), (16, 8, 1.05), (20, 8, 1.01), (12, 8, 1.10)])
def test_the_default_policy_is_near_the_bound(count: int, workers: int, bar: float) -> None:
    everyone, ratios = trials(count, 3), []
    for seed in range(5):
        costs = log_uniform_costs(everyone, seed) if count > workers else dict.fromkeys((t.id for t in everyone), 1.0)
        outcome = simulate(everyone, noisy(costs, seed), shards=workers, workers=workers)
        ratios.append(outcome.makespan / outcome.bound)
    assert fmean(ratios) <= bar


def test_the_bound_by_hand() -> None:
    w0, w1 = WorkerId(0), WorkerId(1)
    units = [("a", w0, 3.0), ("a", w1, 1.0), ("b", w0, 2.0)]
    assert makespan_bound(units, 2, pinned=True) == 5.0
    assert makespan_bound(units, 2, pinned=False) == 4.0
    assert makespan_bound([], 2, pinned=False) == 0.0


def test_task_parallelism_by_hand() -> None:
    assert task_parallel_ends([4.0, 1.0, 2.0, 2.0], 2) == [1.0, 3.0, 4.0, 5.0]


def test_holdings() -> None:
    assert holdings(5, 2, "pinned") == [frozenset({0, 2, 4}), frozenset({1, 3})]
    assert holdings(3, 2, "shared") == [frozenset({0, 1, 2})] * 2
    assert holdings(3, 1, "pinned") == [frozenset({0, 1, 2})]
    with pytest.raises(ConfigurationError, match="placement is 'spread'"):
        holdings(3, 2, "spread")
