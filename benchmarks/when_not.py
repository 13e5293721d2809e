"""Where hopping does not help: our wall clock / that of what one would use instead, two cores, taking turns.

The alternative is plain Lightning over batches gathered by index: one `Trainer.fit` per config in two processes that
have loaded the data and wait for work, or for a single trial just one fit. Ours is `Cerebro.fit` on two workers that
are up; both sides have had a turn before. CNNs on Fashion-MNIST, in 8 shards, without a validation set except where a
row says otherwise. A loss of 5 % or less counts as none; what is beyond is stated as a loss.

- One long trial has one worker at a time. Long is an epoch of 8 units that take 0.1 s and more.
- With live_trials=1 the second worker has nothing to do. 3 trials end as searches do: with fewer trials than workers.
- A grid search of long trials without early stopping. Both validate once an epoch, and ours after each unit too.
- Units of 5, 20 and 50 ms: 1 batch of 64, and as many more as it takes.
- States whose bytes take 1, 5 and 20 % of a unit of 100 ms to move, pinned shards so that they have to: a buffer in the
  model, which nothing trains, is as large as that takes, by what 50 MB have taken beyond what none took.
- A data set that every node holds, so that no trial would have to move: workers of a Ray cluster of two nodes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import _cnn
from _cnn import Grid, Task, of_fashion
from _losing import BallastCnn, cluster
from _report import Report
from _sizes import sized
from _turns import Contender, Opened

ROUNDS = sized(1, 5, 9)
BATCH = 64
ROWS = sized(4_096, 12_288)
EPOCHS = 1
UNITS_MS = (5, 20, 50)
SHARES = (1, 5, 20)
STATE_UNIT_MS = 100
CALIBRATION_MB = 50
SIDE_S = sized(0.5, 0.8)
"""What either side is to take, about, where units are short."""
BAR = 1.05

ONE: Grid = {"lr": [1e-3], "width": [16], "dropout": [0.0]}
TWO: Grid = ONE | {"lr": [1e-3, 3e-3]}
THREE: Grid = ONE | {"lr": [3e-4, 1e-3, 3e-3]}
FOUR: Grid = ONE | {"lr": [3e-4, 1e-3, 3e-3, 1e-2]}


@dataclass(frozen=True)
class Case:
    """A row: what both train, and how each does it."""

    name: str
    grid: Grid
    ours: Opened
    alternative: Opened


def main() -> int:
    report = Report("Where hopping does not help: ours / the alternative")
    if _cnn.NO_FASHION:
        report.not_run("where it loses", _cnn.NO_FASHION, row="when not")
        return report.finish()
    _cnn.quiet()
    for case in cases():
        ratios = measure(case)
        report.add(case.name, statistics.median(ratios), BAR, row="when not", runs=ratios)
    return report.finish()


def measure(case: Case) -> list[float]:
    """Our wall clock beside the alternative's, run by run."""
    with Contender(case.ours) as ours, Contender(case.alternative) as alternative:
        for contender in (ours, alternative):
            contender.turn(case.grid)
        return [ours.turn(case.grid).wall_s / alternative.turn(case.grid).wall_s for _ in range(ROUNDS)]


def cases() -> Iterator[Case]:
    long = trained_only(ROWS, epochs=EPOCHS)
    yield Case(
        "one long trial (beside one fit)",
        ONE,
        partial(_cnn.hopping, long),
        partial(_cnn.one_after_another, long),
    )
    yield against_two("2 trials with live_trials=1", TWO, long, live_trials=1)
    yield against_two("3 trials on 2 workers", THREE, long)
    yield against_two("grid search of 4 long trials, validating", FOUR, of_fashion(ROWS, batch=BATCH, epochs=EPOCHS))
    batch_ms = time_batch()
    for unit_ms in UNITS_MS:
        yield against_two(f"units of {unit_ms} ms", FOUR, in_units(unit_ms, batch_ms))
    task = replace(in_units(STATE_UNIT_MS, batch_ms), module=BallastCnn)
    share = moving_share(task, CALIBRATION_MB) - moving_share(task, 0)
    for percent in SHARES:
        megabytes = CALIBRATION_MB * percent / 100 / share
        name = f"states that take {percent} % of a unit to move"
        yield against_two(name, FOUR | {"megabytes": [megabytes]}, task, placement="pinned")
    yield Case("a data set that every node holds", FOUR, partial(on_nodes, long), partial(_cnn.two_processes, long))


def against_two(name: str, grid: Grid, task: Task, **options: Any) -> Case:
    """Beside fits in two processes."""
    return Case(name, grid, partial(_cnn.hopping, task, **options), partial(_cnn.two_processes, task))


@contextmanager
def on_nodes(task: Task) -> Iterator[Any]:
    """By hops between two nodes."""
    with cluster(2), _cnn.hopping(task, backend="ray", placement="shared", devices="auto") as act:
        yield act


def trained_only(rows: int, **changes: Any) -> Task:
    """So many images to train on, and none to validate with."""
    return replace(of_fashion(rows, batch=BATCH, **changes), load=partial(_cnn.fashion, rows, validation=False))


def time_batch() -> float:
    """Milliseconds of a batch in a plain fit."""
    batches = 256
    task = trained_only(BATCH * batches, epochs=1)
    with Contender(partial(_cnn.one_after_another, task)) as contender:
        return min(contender.turn(ONE).wall_s for _ in range(3)) / batches * 1e3


def in_units(unit_ms: float, batch_ms: float) -> Task:
    """Shards of as many batches as a unit of this length has, and epochs until a side has had its time."""
    batches = max(1, round(unit_ms / batch_ms))
    shard_batches = _cnn.FASHION.shards * batches
    epoch_s = shard_batches * batch_ms / 1e3
    configs, workers = 4, 2
    epochs = max(1, round(SIDE_S * workers / (configs * epoch_s)))
    return trained_only(shard_batches * BATCH, epochs=epochs)


def moving_share(task: Task, megabytes: float) -> float:
    """What a hop takes of a unit whose state has so many megabytes more than its weights."""
    with _cnn.written(task) as executor, executor(workers=2, placement="pinned") as cerebro:
        results = cerebro.fit(task.module, _cnn.configs_of(FOUR | {"megabytes": [megabytes]}))
    reports = [report for trial in results for report in trial.history]
    return statistics.median(r["hop_time_s"] for r in reports) / statistics.median(r["unit_time_s"] for r in reports)


if __name__ == "__main__":
    sys.exit(main())
