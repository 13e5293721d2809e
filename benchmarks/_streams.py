"""The stream of trials that a tuner gives: 32 trials of 10 epochs whose units differ 4x in cost, as many as are live at
first, then another one for each that ends."""

from __future__ import annotations

from collections.abc import Iterable

from cerebro_tune.bounds import task_parallel_ends
from cerebro_tune.simulate import Outcome, log_uniform_costs, noisy, simulate
from cerebro_tune.units import Trial

TRIALS, EPOCHS = 32, 10
RESULT = TRIALS // 2
"""The rank of the result at which a stream is looked at in its midst."""


def make_trials(count: int, epochs: int) -> list[Trial]:
    return [Trial(f"t{index}", index, epochs) for index in range(count)]


def simulated(seed: int, workers: int, live: int, placement: str, policy: str = "auto") -> Outcome:
    """By hops, with a shard per worker."""
    trials = make_trials(TRIALS, EPOCHS)
    cost = noisy(log_uniform_costs(trials, seed), seed)
    return simulate(
        trials, cost, shards=workers, workers=workers, placement=placement, policy=policy, live_trials=live, ahead=live,
        seed=seed,
    )  # fmt: skip


def task_parallel(outcome: Outcome) -> list[float]:
    """When trials would have ended, sorted, with the same durations and each trial on one worker."""
    durations: dict[str, float] = dict.fromkeys((f"t{index}" for index in range(TRIALS)), 0.0)
    for span in outcome.spans:
        durations[span.unit.trial] += span.end - span.start
    return task_parallel_ends(list(durations.values()), outcome.workers)


def half_time(outcome: Outcome) -> float:
    """When half of the trials have ended, over when task parallelism has ended as many."""
    return outcome.result(RESULT) / task_parallel(outcome)[RESULT - 1]


def idle_share(busy: Iterable[tuple[float, float]], workers: int, until: float) -> float:
    """Part of the workers' time from 0 to `until` in which they were not busy."""
    return max(0.0, 1 - sum(min(end, until) - start for start, end in busy if start < until) / (workers * until))
