"""ASHA as the Cerebro paper runs it (PVLDB 13(11), 2020): R = 9, eta = 3, 24 hours, 8 workers; on recorded curves.

Rungs at 1, 3 and 9 epochs. By hops 16 trials are live, with a shard per worker as in the paper, or with all shards on
every worker; task parallelism has 8, each on one worker that has all the data, from rung to rung. Both promote
(Li et al., MLSys 2020), see the same configs in the same order, and pay nothing for a pause or a hop; the machine is
the real one, its clock is not. An epoch of the mean config takes 1.2 hours of a worker, so that task parallelism
explores about as many configs as in the paper. Beside them, hops with rungs from one shard on, at 1, 3, 8
and 24 units.

Explored: configs that have come to the first rung. Wrong: promotions of configs that are not among the
best third of all that have come to the rung in 24 hours. Time: until some config has the error, at the end of an epoch,
that the 10th best of all recorded ones ends with; 24 hours where none has. Means over the seeds, with 95 % intervals
of the ratio by the bootstrap over pairs. The seeds draw from 320 curves, which the intervals take as given.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from _asha import FROM_ONE_SHARD, Curves, Search, interval, recorded
from _report import Report
from _sizes import sized
from cerebro_tune.policy import abreast

SEEDS = range(sized(4, 60, 400))
WORKERS, HOURS, EPOCH_H, TARGET_RANK = 8, 24.0, 1.2, 10


@dataclass(frozen=True)
class Variant:
    name: str
    live: int
    placement: str
    by_unit: bool = False
    abreast: bool = False
    """Whether live trials advance side by side, as they do under Ray's schedulers that compare trials."""


STOCK = Variant("task-parallel, 8 live", WORKERS, "shared")
HOPS = [
    Variant("hops, 16 live, pinned", 2 * WORKERS, "pinned"),
    Variant("hops, 16 live, shared", 2 * WORKERS, "shared"),
    Variant("hops, 16 live, shared, abreast", 2 * WORKERS, "shared", abreast=True),
    Variant("hops, 16 live, shared, rungs from one shard on", 2 * WORKERS, "shared", by_unit=True),
]
MEASURES = {
    "configs explored": "",
    "wrong promotions": "%",
    "time to the error": "h",
    "found": "%",
    "best error": "%",
}


def one(variant: Variant, seed: int) -> list[float]:
    """What a search comes to, by MEASURES."""
    curves = recorded()
    hour_s = epoch_s(curves) / EPOCH_H
    first = FROM_ONE_SHARD if variant.by_unit else 1
    policy = abreast("auto") if variant.abreast else "auto"
    search = Search(curves, WORKERS, variant.live, variant.placement, variant.by_unit, first, seed, policy)
    search.run(lambda running: running.next_s > HOURS * hour_s)
    asha = search.asha
    explored = len(asha.values[0])
    wrong = 100 * asha.wrong_promotions() / max(1, len(asha.promotions))
    found = next((when / hour_s for when, accuracy in search.best if accuracy >= target(curves)), None)
    return [explored, wrong, HOURS if found is None else found, 100 * (found is not None), error(search)]


def epoch_s(curves: Curves) -> float:
    """What an epoch of the mean config takes."""
    return fmean(curves.shards * curve.unit_s + curve.whole_s for curve in curves.all)


def target(curves: Curves) -> float:
    return sorted((curve.whole[-1] for curve in curves.all), reverse=True)[TARGET_RANK - 1]


def error(search: Search) -> float:
    return 100 * (1 - search.best[-1][1])


def ratio(pairs: np.ndarray) -> float:
    """Of the means of both columns."""
    means = pairs.mean(axis=0)
    return float(means[0] / means[1])


def main() -> int:
    report = Report(f"ASHA, R = 9, eta = 3, {HOURS:g} virtual hours, {WORKERS} workers, {len(SEEDS)} seeds")
    found = {variant: np.array([one(variant, seed) for seed in SEEDS]) for variant in [STOCK, *HOPS]}
    for column, (measure, unit) in enumerate(MEASURES.items()):
        for variant, values in found.items():
            report.add(f"{measure}: {variant.name}", values[:, column].mean(), None, unit, row=11)
    for variant in HOPS:
        for column, (measure, bar, at_most) in enumerate(
            [("configs explored", 1.0, False), ("wrong promotions", 1.0, True), ("time to the error", None, True)]
        ):
            pairs = np.stack([found[variant][:, column], found[STOCK][:, column]], axis=1)
            case = f"{variant.name} / task-parallel: {measure}"
            judged = bar if not variant.by_unit and not variant.abreast else None  # the others are no like with like
            report.add(case, ratio(pairs), judged, at_most=at_most, row=11, interval=interval(pairs, ratio))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
