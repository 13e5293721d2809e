"""What of a run's time goes into validating with default settings: Fashion-MNIST, in 8 and in 32 shards.

60,000 images to train on and 10,000 to validate with, two workers, 2 configs. After a unit in mid-epoch a subset is
measured, the same for all trials, and at the end of an epoch the whole set: the shares of the two are told apart, each
of workers x wall clock. Beside them stands what validating the whole set after every unit would add to a run, from the
seconds that these whole sets have taken.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from time import perf_counter

import _cnn
from _cnn import FASHION, Grid, of_fashion
from _report import Report
from _sizes import sized
from cerebro_tune import Cerebro, TrialResult

GRID: Grid = {"lr": [1e-3], "width": [16], "dropout": [0.0, 0.2]}
RUNS = sized(1, 5)
WORKERS, EPOCHS = 2, 1
SHARDS = (8, 32)
BAR = 5.0
NAMES = {
    "subset": "wall clock spent validating on subsets",
    "whole": "wall clock spent validating on the whole set",
    "added": "what the whole set after every unit would add",
}


def main() -> int:
    _cnn.quiet()
    report = Report("Validation with default settings")
    for shards in SHARDS:
        if _cnn.NO_FASHION:
            report.not_run(f"{shards} shards: {NAMES['subset']}", _cnn.NO_FASHION, row=15)
            continue
        shares = list(measure(shards))
        for key, name in NAMES.items():
            figures = [100 * run[key] for run in shares]
            bar = BAR if key == "subset" else None
            report.add(f"{shards} shards: {name}", statistics.median(figures), bar, "%", row=15, runs=figures)
    return report.finish()


def measure(shards: int) -> Iterator[dict[str, float]]:
    """The shares of each run."""
    task = of_fashion(sized(12_000, 60_000), shards=shards, epochs=EPOCHS)
    with _cnn.written(task) as executor, executor(workers=WORKERS) as cerebro:
        train(cerebro)  # the workers have trained before
        for _ in range(RUNS):
            began = perf_counter()
            trials = train(cerebro)
            yield shares_of(trials, WORKERS * (perf_counter() - began))


def train(cerebro: Cerebro) -> list[TrialResult]:
    results = cerebro.fit(FASHION.module, _cnn.configs_of(GRID), metric="val_loss")
    assert {trial.status for trial in results} == {"finished"}, [trial.error for trial in results]
    return list(results)


def shares_of(trials: list[TrialResult], spent_s: float) -> dict[str, float]:
    reports = [report for trial in trials for report in trial.history]
    ends = [report["epoch"] == round(report["epoch"]) for report in reports]
    seconds = [report["validation_time_s"] for report in reports]
    whole = [s for s, end in zip(seconds, ends, strict=True) if end]
    subset = [s for s, end in zip(seconds, ends, strict=True) if not end]
    every_unit = len(reports) * statistics.median(whole) - sum(whole)
    return {
        "subset": sum(subset) / spent_s,
        "whole": sum(whole) / spent_s,
        "added": every_unit / (spent_s - sum(subset)),
    }


if __name__ == "__main__":
    sys.exit(main())
