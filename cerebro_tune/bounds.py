"""What a schedule is measured by: how short a run could possibly be, and what task parallelism would make of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from heapq import heapreplace

from cerebro_tune.units import WorkerId


def makespan_bound(units: Iterable[tuple[str, WorkerId, float]], workers: int, *, pinned: bool) -> float:
    """Return max(busiest worker, longest trial), in the unit of the durations.

    `units` are (trial, worker, duration). With one holder per shard (`pinned`) each worker has to do what it did; where
    any worker may do anything the busiest one has at least its share of all the work. A trial's units never overlap.
    Source: the lower bound of nonpreemptive open shop, Cerebro (PVLDB 13(11), 2020), section 5.
    """
    of_trial: dict[str, float] = defaultdict(float)
    of_worker: dict[WorkerId, float] = defaultdict(float)
    for trial, worker, duration in units:
        of_trial[trial] += duration
        of_worker[worker] += duration
    busiest = max(of_worker.values(), default=0.0) if pinned else sum(of_worker.values()) / workers
    return max(busiest, *of_trial.values(), 0.0)


def task_parallel_ends(durations: Sequence[float], workers: int) -> list[float]:
    """Return when trials of these durations end, sorted, if each runs on one worker from start to end.

    First come, first served; every worker has all the data then: `workers` copies of it.
    """
    free = [0.0] * workers
    ends = []
    for duration in durations:
        end = free[0] + duration
        heapreplace(free, end)
        ends.append(end)
    return sorted(ends)
