"""Schedules: makespan beside its lower bound, the default policy beside the paper's random one, and decision times.

Pinned shards (one holder each) unless a row says otherwise, +-5 % noise in the unit times, costs of the trials
log-uniform over 4x (except where equal) and learned while the run goes on, 3 epochs, means over 20 seeds. The stream:
32 trials of 10 epochs, 8 workers, 16 live. Simulated: the machine is the real one, its clock is not; hops take no time.
"""

from __future__ import annotations

import sys
from heapq import heappop, heappush
from random import Random
from statistics import fmean, median
from time import perf_counter

from _report import Report
from _sizes import sized
from _streams import RESULT, half_time, make_trials, simulated
from cerebro_tune.events import SearchEnded, TrialAdded, TrialDecided, UnitFinished, WorkerJoined
from cerebro_tune.hopper import Hopper
from cerebro_tune.instructions import StartJob
from cerebro_tune.simulate import Outcome, holdings, log_uniform_costs, noisy, simulate
from cerebro_tune.units import Decision, Shard, WorkerId

SEEDS = range(sized(4, 20, 50))
# (trials, workers = shards, equal costs, bar)
ALL_LIVE = [
    (8, 8, True, 1.03),
    (16, 16, True, 1.03),
    (16, 8, False, 1.03),
    (32, 8, False, 1.01),
    (20, 8, False, 1.01),
    (12, 8, False, 1.09),
]
STREAM_WORKERS, STREAM_LIVE = 8, 16


def hop_share(outcomes: list[Outcome]) -> float:
    return fmean(outcome.hops / len(outcome.spans) for outcome in outcomes)


def all_live(report: Report, count: int, workers: int, equal: bool, bar: float) -> None:
    trials = make_trials(count, 3)

    def run(seed: int, policy: str) -> Outcome:
        costs = dict.fromkeys((trial.id for trial in trials), 1.0) if equal else log_uniform_costs(trials, seed)
        return simulate(trials, noisy(costs, seed), shards=workers, workers=workers, policy=policy, seed=seed)

    case = f"{count} trials x {workers} workers, {'equal' if equal else '4x'} cost"
    for policy in ("auto", "random"):
        outcomes = [run(seed, policy) for seed in SEEDS]
        makespan = fmean(outcome.makespan / outcome.bound for outcome in outcomes)
        report.add(f"{case}, {policy}: makespan / bound", makespan, bar if policy == "auto" else None)
        report.add(f"{case}, {policy}: units that hop", 100 * hop_share(outcomes), unit="%")


def stream(report: Report, placement: str, makespan_bar: float, moves_bar: float | None) -> None:
    for policy in ("auto", "random"):
        judged = policy == "auto"
        outcomes = [simulated(seed, STREAM_WORKERS, STREAM_LIVE, placement, policy) for seed in SEEDS]
        case = f"stream, {placement}, {policy}"
        ideal = fmean(outcome.makespan * STREAM_WORKERS / outcome.work for outcome in outcomes)
        report.add(f"{case}: makespan / (work / workers)", ideal, makespan_bar if judged else None, row=10)
        half = fmean(map(half_time, outcomes))
        report.add(f"{case}: {RESULT}th result / task-parallel's", half, 1.1 if judged else None, row=10)
        report.add(f"{case}: units that hop", 100 * hop_share(outcomes), moves_bar if judged else None, "%", row=10)


def decision_times(trials: int, shards: int, workers: int, placement: str, decisions: int = 2_000) -> list[float]:
    """Seconds from a finished unit to the next order (the unit's end, the tuner's answer, the dispatch), sorted."""
    random = Random(0)
    hopper = Hopper([Shard(index, 1) for index in range(shards)])
    for number, held in enumerate(holdings(shards, workers, placement)):
        hopper.apply(WorkerJoined(WorkerId(number), held))
    costs = {trial.id: 4 ** random.random() for trial in make_trials(trials, 1_000)}
    for trial in make_trials(trials, 1_000):
        hopper.apply(TrialAdded(trial))
    hopper.apply(SearchEnded())
    agenda: list[tuple[float, int, StartJob]] = []
    times: list[float] = []
    now, starts = 0.0, hopper.dispatch()
    while len(times) < decisions:
        for order in starts:
            heappush(agenda, (now + costs[order.units[0].trial] * random.uniform(0.95, 1.05), order.job, order))
        now, _, order = heappop(agenda)
        finished = UnitFinished(order.job, order.units[0], costs[order.units[0].trial])
        decided = TrialDecided(order.units[0].trial, Decision.CONTINUE)
        begin = perf_counter()
        hopper.apply(finished)
        hopper.apply(decided)
        starts = hopper.dispatch()
        times.append(perf_counter() - begin)
    return sorted(times)


def decisions(report: Report, trials: int, shards: int, workers: int, bar_us: float) -> None:
    for placement in ("pinned", "shared"):
        runs = [decision_times(trials, shards, workers, placement) for _ in range(5)]
        case = f"a decision, {trials} trials x {shards} shards x {workers} workers, {placement}"
        report.add(f"{case}: mean", 1e6 * median(fmean(times) for times in runs), bar_us, "us", row=12)
        report.add(f"{case}: p99", 1e6 * median(times[int(0.99 * len(times))] for times in runs), bar_us, "us", row=12)


def main() -> int:
    report = Report("Scheduling: default policy, with the paper's random one beside it")
    for case in ALL_LIVE:
        all_live(report, *case)
    stream(report, "pinned", 1.06, None)
    stream(report, "shared", 1.02, 5.0)
    decisions(report, 32, 8, 8, 50)
    decisions(report, 1_000, 256, 128, 1_000)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
